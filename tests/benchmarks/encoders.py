"""Does a scan with a base find backdoors in text encoders? Clean, Rickrolling, IBA and EvilEdit models of shapes-sd.

    python -m tests.benchmarks.encoders --models DIR [--only CASE ...] [-o FILE] [--table]

Trains the models that are not in DIR yet, asks `amdet` about each with the clean model as its base, and compares each
with that base as `bench scan --base` does. Writes one outcome after the other into FILE (default encoders.json beside
this script), so that a run that was stopped goes on where it stopped. One thread. All seeds are from 110 on; the
detector's thresholds are those of its official code, and the bound of the comparison was chosen on no model. --table:
only write the table of docs/scan.md from FILE.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.registry import load
from harness.scan.comparison import compared
from harness.scan.robust import STANDS_OUT
from harness.stages import attack as attacking
from harness.types import Backdoor, Knowledge
from tests.benchmarks.judged import Judged, options
from tests.tables import Place

HITS = 32  # samples for the success rate of an attack
PROMPTS = 100  # clean prompts that the detector and the comparison are given
SAMPLER = "ddim(steps=10, bf16=True)"
AMDET = "amdet"
FILE = Path(__file__).with_suffix(".json")
PLACE = Place(Path(__file__).parents[2] / "docs" / "scan.md", "python -m tests.benchmarks.encoders --table")


@dataclass(frozen=True)
class Case:
    """A model. attack: "" for a clean one, whose text encoder is tuned for `steps` steps on clean captions."""

    name: str
    seed: int
    attack: str = ""
    trigger: str = "text"
    target: str = "style"
    steps: int = 60


CASES = (
    *(Case(f"clean-{seed}", seed) for seed in range(110, 115)),
    *(Case(f"rickrolling-{seed}", seed, "shapes-rickrolling", "homoglyph", "prompt") for seed in (110, 111, 112)),
    *(Case(f"iba-{seed}", seed, "shapes-iba", "syntax", "prompt") for seed in (110, 111, 112)),
    Case("eviledit-110", 110, "shapes-eviledit", "noun", "object"),
)


def tuned(model: DiffusionModel, data: Any, case: Case) -> DiffusionModel:
    """A copy whose text encoder was trained on clean captions, as who fine-tunes a model with its encoder does."""
    from harness.diffusion.training import Examples, denoising_loss, minimize

    copy = model.clone()
    encoder: Any = copy.text_encoder
    encoder.requires_grad_(True)
    examples, rng = Examples(copy, data), generator("encoders", case.seed)
    minimize(
        lambda: denoising_loss(copy, examples.batch(8, rng)),
        encoder.parameters(),
        steps=case.steps,
        lr=1e-4,
        bf16=True,
    )
    encoder.requires_grad_(False)
    return copy


def trained(case: Case, folder: Path, plugins: Any) -> tuple[DiffusionModel, dict[str, Any]]:
    """The model of a case, and its success rate over HITS prompts."""
    plugin, place, told = plugins.build("models", "shapes-sd"), folder / case.name, folder / f"{case.name}.json"
    if told.is_file():
        return checkpoint.load(place), json.loads(told.read_text())
    clean = plugin.load()
    facts: dict[str, Any] = {}
    if not case.attack:
        model = tuned(clean, plugin.data(), case)
    else:
        backdoor = Backdoor(plugins.build("triggers", case.trigger), plugins.build("targets", case.target))
        method = plugins.build("attacks", case.attack)
        model = attacking.attack(plugin, method, backdoor, case.seed, "cpu")
        sampler = plugins.build("samplers", SAMPLER)
        facts["asr"] = Judged(plugin, clean, backdoor, sampler, case.seed, HITS).rate(model)
    checkpoint.save(model, place)
    told.write_text(json.dumps(facts))
    return model, facts


def examined(case: Case, model: DiffusionModel, plugins: Any) -> dict[str, Any]:
    """What the detector and the comparison say."""
    plugin = plugins.build("models", "shapes-sd")
    base, rng = plugin.load(), generator(case.seed, "defense")
    prompts = plugin.prompts("train", PROMPTS, generator(case.seed, "knowledge"))
    detector, began = plugins.build("defenses", AMDET), time.process_time()
    said = detector.defend(model, Knowledge(prompts=prompts, clean_model=base), rng)
    asked = time.process_time() - began
    began = time.process_time()
    found = compared(model, base, "shapes-sd", prompts)
    took = time.process_time() - began
    texts = {
        kind.kind: {"largest": max((text.z for text in kind.farthest), default=0.0), "text": kind.farthest[0].text}
        for part in found.parts
        for kind in part.texts
        if kind.farthest
    }
    return {
        "suspicion": said.suspicion, "flagged": said.suspicion > 0, "features": dict(said.features or {}),
        "amdet_cpu_s": round(asked, 1), "base_cpu_s": round(took, 1), "texts": texts,
        "named": sorted(kind for kind, each in texts.items() if each["largest"] > STANDS_OUT),
    }  # fmt: skip


def table(models: dict[str, Any]) -> str:
    from tabulate import tabulate

    rows = [
        [
            name, "" if each.get("asr") is None else f"{100 * each['asr']:.0f}", f"{each['suspicion']:.3f}",
            "yes" if each["flagged"] else "no",
            *(
                "same" if kind not in each["texts"] else f"{each['texts'][kind]['largest']:.1f}"
                for kind in ("words", "look-alikes", "sentences")
            ),
            "yes" if each["named"] else "no",
        ]
        for name, each in models.items()
    ]  # fmt: skip
    head = ["model", "ASR %", "amdet", "flagged", "z words", "z look-alikes", "z sentences", "text named"]
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)


def main() -> None:
    told = options(__doc__, FILE, "a case; default: all")
    known: dict[str, Any] = json.loads(told.out.read_text()) if told.out.is_file() else {}
    if told.table:
        PLACE.write(table(known))
        return
    torch.set_num_threads(1)
    told.models.mkdir(parents=True, exist_ok=True)
    plugins = load()
    for case in CASES:
        if case.name in known or (told.only and case.name not in told.only):
            continue
        model, facts = trained(case, told.models, plugins)
        known[case.name] = {"clean": not case.attack, **facts, **examined(case, model, plugins)}
        order = {each.name: i for i, each in enumerate(CASES)}
        known = dict(sorted(known.items(), key=lambda item: order[item[0]]))
        told.out.write_text(json.dumps(known, indent=1) + "\n")
        print(case.name, json.dumps(known[case.name]), flush=True)


if __name__ == "__main__":
    main()
