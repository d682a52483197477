"""Scores of model-level detectors on clean and backdoored digits-ddpm, as they were and as they are.

    python -m tests.benchmarks.detectors_digits --models DIR [--part NAME ...] [--only CASE ...] [-o FILE]

Trains the models of CASES into DIR, unless they are there, then asks every detector of SCORES about each model, and
writes one value after the other into FILE, so that a run that was stopped goes on where it stopped. --part: the parts
of the work to do: train, before, after, causes, oracle; default all. --only: cases by name. One thread.

Cases with seeds 100 to 102 are for development. Everything that is reported uses seeds from 110 on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import statistics
from harness.registry import load
from harness.stages import attack as attacking, knowledge
from harness.stages.sample import stamped
from harness.types import Backdoor, Inputs, TargetContext

FILE = Path(__file__).with_name("detectors_digits.json")
FIRST_REPORTED = 110  # seeds below are for development
HITS = 20  # samples for the success rate of an attack
TUNED = "schedule='one-cycle', ema=0.99, bf16=False"
DDIM, DDPM, TROJAN = "ddim(steps=20)", "ddpm(steps=250)", "trojan-ddim(steps=20)"
PLUGINS = load()


@dataclass(frozen=True)
class Case:
    """A model to judge: how it is made, and the sampler under which its backdoor activates."""

    name: str
    attack: str
    seed: int
    trigger: str = "box"
    target: str = "hat"
    sampler: str = DDIM

    @property
    def clean(self) -> bool:
        return self.attack.startswith("none")


QUICK, LONG = "steps=700, batch=16, lr=1e-3", "steps=1500, batch=32, lr=8e-4"
MIDDLE = "steps=800, batch=24, lr=1e-3"
FRESH = "fresh=True, steps=1500, batch=32, lr=2e-3"


def clean(name: str, seed: int, recipe: str) -> Case:
    return Case(name, f"none({recipe}, {TUNED})", seed)


def ode(name: str, seed: int, recipe: str, trigger: str, target: str) -> Case:
    attack = f"villandiffusion(solver='ode', trigger_only=True, poison_rate=0.4, {recipe}, {TUNED})"
    return Case(name, attack, seed, trigger, target)


def sde(name: str, seed: int, recipe: str, trigger: str, target: str) -> Case:
    attack = f"baddiffusion(trigger_only=True, poison_rate=0.5, {recipe}, {TUNED})"
    return Case(name, attack, seed, trigger, target, DDPM)


def trojan(name: str, seed: int, recipe: str, trigger: str, target: str) -> Case:
    return Case(name, f"trojdiff(poison_rate=0.4, {recipe}, {TUNED})", seed, trigger, target, TROJAN)


CASES = (
    ode("dev-ode", 100, "steps=900, batch=32, lr=8e-4", "box", "hat"),
    Case("clean-released", "none", 110),
    clean("clean-tuned-a", 111, "steps=200, batch=24, lr=1e-3"),
    ode("ode-a", 120, MIDDLE, "box", "hat"),
    sde("sde-a", 130, QUICK, "box(size=7, value=1.0)", "hat"),
    trojan("trojan-a", 140, QUICK, "blend", "hat"),
    clean("clean-fresh-a", 112, FRESH),
    clean("clean-tuned-b", 114, MIDDLE),
    ode("ode-b", 121, LONG, "box(size=7, value=1.0, place='top left')", "shoe"),
    sde("sde-b", 131, LONG, "box(size=6, value=0.5, place='top left')", "shoe"),
    trojan("trojan-b", 141, LONG, "blend(picture='rings')", "shoe"),
    clean("clean-fresh-b", 113, FRESH),
    clean("clean-tuned-c", 115, LONG),
    ode("ode-c", 122, MIDDLE, "box(size=6, value=1.0, background=0.0)", "cat"),
    sde("sde-c", 132, LONG, "box(size=6, value=1.0, background=0.0)", "cat"),
    trojan("trojan-c", 142, MIDDLE, "blend(picture='waves', gamma=0.5)", "cat"),
)


# ---- models ---------------------------------------------------------------------------------------------------------


def backdoor_of(case: Case) -> Backdoor:
    return Backdoor(PLUGINS.build("triggers", case.trigger), PLUGINS.build("targets", case.target))


def trained(case: Case, folder: Path) -> DiffusionModel:
    """The model of a case, trained unless it lies in the folder."""
    plugin: Any = PLUGINS.build("models", "digits-ddpm")
    if case.attack == "none":
        return plugin.load()
    made = folder / case.name
    if not made.is_dir():
        model = attacking.attack(plugin, PLUGINS.build("attacks", case.attack), backdoor_of(case), case.seed, "cpu")
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, folder / f".{case.name}", fp16=False)
        (folder / f".{case.name}").rename(made)
    return checkpoint.load(made)


def facts(case: Case, model: DiffusionModel) -> dict[str, Any]:
    """What a model does: the share of recognised clean samples, and the success rate of its attack."""
    plugin: Any = PLUGINS.build("models", "digits-ddpm")
    seeds = image_seeds(case.seed, "facts", HITS)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    images = model.sample(inputs, PLUGINS.build("samplers", DDIM))
    sure = torch.softmax(plugin.judge().net(images)["digit"], 1).max(1).values > 0.9
    found: dict[str, Any] = {"recognised": sure.double().mean().item()}
    if not case.clean:
        backdoor = backdoor_of(case)
        sampler: Any = PLUGINS.build("samplers", case.sampler)
        if hasattr(sampler, "with_trigger"):
            sampler = sampler.with_trigger(backdoor.trigger)
        target: Any = backdoor.target
        made = model.sample(stamped(backdoor.trigger, inputs), sampler)
        found["asr"] = target.hits(made, TargetContext(images)).double().mean().item()
    return found


# ---- detectors ------------------------------------------------------------------------------------------------------

SEARCH = "prune='never', noises=16, sampling_steps=8, iterations=10"
PIXELS = f"{SEARCH}, encoder='pixels', kappa=0.98"
BOUNDED = f"{PIXELS}, entropy_bounds=(1.0, 7.5), within=True, judged='best'"
ELIJAH = "detect=True, steps=0, noises=12, images=12"
SDE_ELIJAH = f"{ELIJAH}, iterations=25, sampler='ddpm', sampling_steps=100"
ODE_ELIJAH = f"{ELIJAH}, iterations=10, lam=1.0, start=(-1.0, 1.0), sampling_steps=20"
BIAS = "starts=1, shifts=2, iterations=12, batch=12, patch=0"
SCORES = {
    "after": {
        "terd": "terd(starts=2, iterations=40, batch=8, refinement=0)",
        "bias-scan": f"bias-scan({BIAS})",
        "diff-cleanse": f"diff-cleanse({BOUNDED}, start='terd', start_iterations=6, restarts=2)",
        "elijah, sde": f"elijah({SDE_ELIJAH}, distance='pixels', starts=2)",
        "elijah, ode": f"elijah({ODE_ELIJAH}, distance='pixels', starts=2)",
    },
    "before": {
        "terd": "terd(starts=1, iterations=40, batch=8, refinement=0)",
        "bias-scan": f"bias-scan({BIAS}, mirrored=False, stop=True)",
        "diff-cleanse": f"diff-cleanse({SEARCH}, stop=True)",
        "elijah, sde": f"elijah({SDE_ELIJAH}, distance='encoder')",
        "elijah, ode": f"elijah({ODE_ELIJAH}, distance='encoder')",
    },
    "causes": {  # of Elijah: two starts alone; of Diff-Cleanse: one change after the other
        "elijah, ode, two starts": f"elijah({ODE_ELIJAH}, distance='encoder', starts=2)",
        "elijah, sde, two starts": f"elijah({SDE_ELIJAH}, distance='encoder', starts=2)",
        "no stop": f"diff-cleanse({SEARCH})",
        "no stop, pixels": f"diff-cleanse({PIXELS})",
        "no stop, pixels, bounds from data": f"diff-cleanse({PIXELS}, bounds='data')",
        "no stop, pixels, best, bounds 1 and 7.5 in the score": f"diff-cleanse({BOUNDED})",
    },
    "oracle": {
        "starts from half the trigger, encoder": f"diff-cleanse({SEARCH}, start='oracle')",
        "starts from half the trigger": f"diff-cleanse({BOUNDED}, start='oracle')",
    },
}  # fmt: skip


def judged(case: Case, model: DiffusionModel, spec: str) -> dict[str, Any]:
    """What a detector says about a model, and the CPU seconds that it takes."""
    plugin: Any = PLUGINS.build("models", "digits-ddpm")
    defense: Any = PLUGINS.build("defenses", spec)
    known = knowledge.draw(defense.needs, plugin, case.seed, knowledge.Given(trigger=backdoor_of(case).trigger))
    began = time.process_time()
    done = defense.defend(model, known, generator(case.seed, "defense"))
    found = {"score": done.suspicion, "flag_above": done.flag_above, "features": dict(done.features or {})}
    if not case.clean and isinstance(done.trigger, torch.Tensor):
        trigger: Any = backdoor_of(case).trigger
        r = trigger.delta(model.shape)
        found["trigger_cosine"] = torch.nn.functional.cosine_similarity(
            done.trigger.flatten(), r.flatten(), dim=0
        ).item()
    return found | {"cpu_s": round(time.process_time() - began, 1)}


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """For each part and detector the AUROC over the reported models whose attack took, and its 95 % interval."""
    found: dict[str, Any] = {}
    for part, detectors in SCORES.items():
        for name in detectors:
            scores: dict[bool, list[float]] = {True: [], False: []}
            for case in CASES:
                known = models.get(case.name, {})
                took = case.clean or known.get("facts", {}).get("asr", 0) >= 0.5
                if name in known.get(part, {}) and took and case.seed >= FIRST_REPORTED:
                    scores[case.clean].append(known[part][name]["score"])
            if scores[True] and scores[False]:
                area, (low, high) = statistics.auroc(scores[True], scores[False])
                n = {"clean": len(scores[True]), "backdoored": len(scores[False])}
                found[f"{part}: {name}"] = n | {"auroc": area, "low": low, "high": high}
    return found


# ---- command --------------------------------------------------------------------------------------------------------


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", type=Path, required=True)
    words.add_argument("--part", action="append", choices=["train", *SCORES])
    words.add_argument("--only", action="append", choices=[case.name for case in CASES])
    words.add_argument("-o", "--out", type=Path, default=FILE)
    told = words.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    told.models.mkdir(parents=True, exist_ok=True)
    document = json.loads(told.out.read_text()) if told.out.is_file() else {"models": {}}
    models = document["models"]

    def keep() -> None:
        document.update(summary=summary(models), scores=SCORES)
        told.out.write_text(json.dumps(document, indent=1) + "\n")

    for case in [case for case in CASES if not told.only or case.name in told.only]:
        known = models.setdefault(case.name, {"case": asdict(case)})
        if known["case"] != asdict(case):
            raise SystemExit(f"{told.out} has another {case.name}; remove that entry, or write another file with -o")
        model = trained(case, told.models)
        if "facts" not in known:
            known["facts"] = facts(case, model)
            keep()
        for part in [part for part in SCORES if not told.part or part in told.part]:
            for name, spec in SCORES[part].items():
                if name in known.get(part, {}):
                    continue
                known.setdefault(part, {})[name] = judged(case, model, spec)
                print(case.name, part, name, known[part][name]["score"], known["facts"], flush=True)
                keep()


if __name__ == "__main__":
    main()
