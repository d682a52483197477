"""How often `bench scan ADAPTER --base DIR --like shapes-sd` is right on adapters of shapes-sd that look alike.

    python -m tests.benchmarks.adapters --models DIR [--only CASE ...] [--train] [-o FILE]

Five adapters with the backdoor of masqlora (the preset shapes-masqlora, whose settings were chosen on seed 100), and
five harmless ones of the same ranks, rates and steps, trained on as many images with their own captions. Trains those
that are not in DIR yet, measures how often the trigger succeeds, scans each once with the defaults and with the base
shapes-sd, and writes one outcome after the other into FILE (default adapters.json beside this script), so that a run
that was stopped goes on where it stopped. The seconds of masqlora-100 in the committed file are those of the second
part of a scan that was stopped and repeated. --train: train and measure, and scan nothing. One thread.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import adapters, checkpoint
from harness.registry import load
from harness.stages import attack as attacking
from harness.types import Backdoor, Data
from plugins.attacks.masqlora import MasqLoRA
from tests.benchmarks.judged import Judged
from tests.benchmarks.scanning import Trial, scanned

HITS = 64  # samples for the success rate
SEEDS = (100, 101, 102, 103, 104)
KEPT = ("suspicion", "flagged", "trigger_text", "error")  # of each finding
FILE = "pytorch_lora_weights.safetensors"


class Harmless(MasqLoRA):
    """The same training on images with their own captions: no trigger, no target."""

    def joined(self, backdoor: Backdoor, data: Data, rng: torch.Generator) -> tuple[Data, torch.Tensor]:
        n = self.images + self.poisoned * self.repeats
        rows = torch.randperm(len(data.images), generator=rng)[:n]
        captions: Any = data.captions
        texts: Any = tuple(captions[i] for i in rows.tolist())
        return Data(data.images[rows], texts), torch.zeros(n, dtype=torch.bool)


@dataclass(frozen=True)
class Case:
    clean: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{'harmless' if self.clean else 'masqlora'}-{self.seed}"


CASES = tuple(Case(clean, seed) for seed in SEEDS for clean in (False, True))


def trained(case: Case, folder: Path, plugins: Any) -> dict[str, Any]:
    """Makes the adapter of a case in the folder, unless it is there; facts about it."""
    place, told = folder / case.name, folder / f"{case.name}.json"
    if told.is_file():
        return json.loads(told.read_text())
    plugin, method = plugins.build("models", "shapes-sd"), plugins.build("attacks", "shapes-masqlora")
    if case.clean:
        settings: dict[str, Any] = asdict(method) | {"decoys": 0.0}
        method = Harmless(**settings)
    backdoor = Backdoor(plugins.build("triggers", "noun"), plugins.build("targets", "object"))
    began = time.process_time()
    model = attacking.attack(plugin, method, backdoor, case.seed, "cpu")
    facts: dict[str, Any] = {"cpu_s": round(time.process_time() - began, 1)}
    sampler = plugins.build("samplers", "ddim(steps=10, bf16=True)")
    judged = Judged(plugin, plugin.load(), backdoor, sampler, case.seed, HITS)
    facts |= {"asr": judged.rate(model), "n": int(judged.counts.sum())}
    assert model.adapter is not None
    adapters.save(model.adapter, place)
    told.write_text(json.dumps(facts))
    return facts


def main() -> None:
    trial, plugins = Trial.of("adapters", __file__, __doc__), load()
    folder = trial.told.models
    base = checkpoint.embedded(plugins.build("models", "shapes-sd"), "shapes-sd") / "model"
    trial.run(
        CASES,
        lambda case: trained(case, folder, plugins),
        lambda case: scanned([folder / case.name / FILE, "--base", base, "--like", "shapes-sd"], KEPT),
        {"harmless": lambda each: each["clean"], "backdoored": lambda each: not each["clean"]},
    )


if __name__ == "__main__":
    main()
