"""How often `bench scan ADAPTER --base DIR --like shapes-sd` is right on adapters of shapes-sd that look alike.

    python -m tests.benchmarks.adapters --models DIR [--only CASE ...] [--train] [-o FILE]
    python -m tests.benchmarks.adapters --table

Six adapters with the backdoor of masqlora (the preset shapes-masqlora, whose settings were chosen on seed 100), and
six harmless ones of the same ranks, rates and steps, trained on as many images with their own captions. Trains those
that are not in DIR yet, measures how often the trigger succeeds, scans each once with the defaults and with the base
shapes-sd, and writes one outcome after the other into FILE (default adapters.json beside this script), so that a run
that was stopped goes on where it stopped. The settings that leaderboard/scan.toml has for adapters were chosen on the
two of seed 100; those of the other seeds are scanned once. `before` in FILE holds outcomes with earlier settings; the
seconds there are those of the second part of a scan that was stopped and repeated. `development` there holds what
`vocabulary-scan` alone gave on seed 100 with the settings from which the present ones were made.

--train: train and measure, and scan nothing. --table: put the table of the committed outcomes into docs/scan.md and
print it. One thread.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import adapters, checkpoint
from harness.judges import hub
from harness.registry import load
from harness.scan.lowrank import described
from harness.stages import attack as attacking
from harness.types import Backdoor, Data
from plugins.attacks.masqlora import MasqLoRA
from tests.benchmarks.judged import Judged
from tests.benchmarks.scanning import Trial, scanned
from tests.tables import Place, markdown

HITS = 64  # samples for the success rate
SEEDS = (100, 101, 102, 103, 104, 105)
CHOSEN_ON = 100  # the seed on which the settings of the scan were chosen
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


def largest_z(case: Case, folder: Path, base: Path) -> float:
    """The largest robust z of a layer's relative change, as the report of a scan has it; the report names layers above
    STANDS_OUT."""
    found = hub.adapter_in(str(folder / case.name))
    assert found is not None
    adapter = hub.with_adapter(hub.Source(str(base)), found).adapter
    assert adapter is not None
    return round(max(layer.z for layer in described(adapter, case.name).largest), 2)


def place() -> Place:
    page = Path(__file__).parents[2] / "docs" / "scan.md"
    return Place(page, "python -m tests.benchmarks.adapters --table")


def table(known: dict[str, Any]) -> str:
    """The outcomes in Markdown, and how many on the seeds that no setting was chosen on are right."""
    head = (
        "adapter", "the trigger succeeds", "`vocabulary-scan`, flags above 0.9", "`amdet`, flags above 0",
        "trigger found", "verdict", "largest z of a layer", "core-seconds",
    )  # fmt: skip
    rows: list[list[str]] = []
    found = known["adapters"]
    for case in sorted(CASES, key=lambda case: (case.clean, case.seed)):
        if case.name in known.get("before", {}):
            rows.append(_row(f"`{case.name}`, earlier settings", known["before"][case.name]))
        rows.append(_row(f"`{case.name}`", found[case.name]) if case.name in found else _unscanned(case, len(head)))
    ours = [(case, found[case.name]) for case in CASES if case.seed != CHOSEN_ON and case.name in found]
    bad, good = ([each["right"] for case, each in ours if case.clean is clean] for clean in (False, True))
    seeds = f"On the seeds {SEEDS[1]} to {SEEDS[-1]}"
    says = f"{seeds}, no adapter has been scanned yet."
    if ours:
        says = (
            f"{seeds}, {sum(bad)} of {len(bad)} backdoored adapters that were scanned were found, and "
            f"{len(good) - sum(good)} of {len(good)} harmless ones were flagged."
        )
    return f"{markdown(head, rows)}\n\n{says}"


def _row(name: str, each: dict[str, Any]) -> list[str]:
    scan, amdet = (each["findings"].get(detector, {}) for detector in ("vocabulary-scan", "amdet"))
    scores = [f"{f['suspicion']:.2f}" if f.get("suspicion") is not None else "failed" for f in (scan, amdet)]
    words = scan.get("trigger_text")
    return [
        name, "" if each["clean"] else f"{each['asr']:.2f} of {each['n']}", *scores,
        "none" if words is None else f"`{words}`", each["verdict"],
        f"{each['largest_z']:.1f}" if "largest_z" in each else "",
        f"{each['core_seconds']:.0f}" if "core_seconds" in each else "",
    ]  # fmt: skip


def _unscanned(case: Case, columns: int) -> list[str]:
    return [f"`{case.name}`", *[""] * (columns - 4), "not scanned yet", "", ""]


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        made = table(json.loads(Path(__file__).with_suffix(".json").read_text()))
        place().write(made)
        print(made)
        return
    trial, plugins = Trial.of("adapters", __file__, __doc__), load()
    folder = trial.told.models
    base = checkpoint.embedded(plugins.build("models", "shapes-sd"), "shapes-sd") / "model"
    trial.run(
        CASES,
        lambda case: trained(case, folder, plugins) | {"largest_z": largest_z(case, folder, base)},
        lambda case: scanned([folder / case.name / FILE, "--base", base, "--like", "shapes-sd"], KEPT),
        {"harmless": lambda each: each["clean"], "backdoored": lambda each: not each["clean"]},
    )


if __name__ == "__main__":
    main()
