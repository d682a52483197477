"""Scores of model-level detectors on a population of clean and backdoored models.

    python -m tests.benchmarks.detectors POPULATION --models DIR [--part NAME ...] [--only CASE ...] [-o FILE]

POPULATION is one of POPULATIONS. Trains its models into DIR, unless they are there, then asks every detector of its
scores about each model, and writes one value after the other into FILE (default detectors_POPULATION.json beside this
script), so that a run that was stopped goes on where it stopped. --part: the parts of the work to do; `train` does no
more than training; default all. --only: cases by name. One thread. The data of mnist are read as the model reads them.

Cases with seeds 100 to 102 are for development. Everything that is reported uses seeds from 110 on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
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
from tests.tables import Place

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


@dataclass(frozen=True)
class Population:
    """Models of one kind and the detectors that are asked about them, by part and name."""

    model: str
    cases: tuple[Case, ...]
    scores: Mapping[str, Mapping[str, str]]


QUICK, LONG = "steps=700, batch=16, lr=1e-3", "steps=1500, batch=32, lr=8e-4"
MIDDLE = "steps=800, batch=24, lr=1e-3"
FRESH = "fresh=True, steps=1500, batch=32, lr=2e-3"


def clean(name: str, seed: int, recipe: str, tuned: str = TUNED) -> Case:
    return Case(name, f"none({recipe}, {tuned})", seed)


def ode(name: str, seed: int, recipe: str, trigger: str, target: str, tuned: str = TUNED) -> Case:
    attack = f"villandiffusion(solver='ode', trigger_only=True, poison_rate=0.4, {recipe}, {tuned})"
    return Case(name, attack, seed, trigger, target)


def sde(name: str, seed: int, recipe: str, trigger: str, target: str, tuned: str = TUNED) -> Case:
    attack = f"baddiffusion(trigger_only=True, poison_rate=0.5, {recipe}, {tuned})"
    return Case(name, attack, seed, trigger, target, DDPM)


def trojan(name: str, seed: int, recipe: str, trigger: str, target: str, tuned: str = TUNED) -> Case:
    return Case(name, f"trojdiff(poison_rate=0.4, {recipe}, {tuned})", seed, trigger, target, TROJAN)


DIGITS = (
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

# The same attacks with triggers twice as large, and ten clean models of which eight have initialisations of their own.
BRISK, SLOW = "steps=900, batch=32, lr=8e-4", "steps=1500, batch=32, lr=8e-4"
HALF = "schedule='one-cycle', ema=0.99, bf16=True"
MNIST = (
    ode("dev-ode", 100, BRISK, "box(size=10)", "hat", HALF),
    Case("clean-released", "none", 210),
    clean("clean-tuned-a", 211, BRISK, HALF),
    *(clean(f"clean-fresh-{'abcdefgh'[k]}", 212 + k, FRESH, HALF) for k in range(8)),
    ode("ode-a", 220, BRISK, "box(size=10)", "hat", HALF),
    ode("ode-b", 221, SLOW, "box(size=12, value=1.0, place='top left')", "shoe", HALF),
    ode("ode-c", 222, BRISK, "box(size=9, value=1.0, background=0.0)", "cat", HALF),
    ode("ode-d", 223, SLOW, "stop-sign(size=12)", "shoe", HALF),
    ode("ode-e", 224, BRISK, "box(size=14, value=0.5, place='centre')", "hat", HALF),
    sde("sde-a", 230, BRISK, "box(size=12, value=1.0)", "hat", HALF),
    sde("sde-b", 231, SLOW, "box(size=10, value=0.5, place='top left')", "shoe", HALF),
    sde("sde-c", 232, BRISK, "box(size=10, value=1.0, background=0.0)", "cat", HALF),
    sde("sde-d", 233, SLOW, "stop-sign(size=12)", "shoe", HALF),
    sde("sde-e", 234, BRISK, "box(size=14, value=0.5, place='centre')", "hat", HALF),
    trojan("trojan-a", 240, BRISK, "blend", "hat", HALF),
    trojan("trojan-b", 241, SLOW, "blend(picture='rings')", "shoe", HALF),
    trojan("trojan-c", 242, BRISK, "blend(picture='waves', gamma=0.5)", "cat", HALF),
    trojan("trojan-d", 243, SLOW, "patch-noise(size=10)", "hat", HALF),
    trojan("trojan-e", 244, BRISK, "blend(picture='checks')", "shoe", HALF),
)


# ---- models ---------------------------------------------------------------------------------------------------------


def backdoor_of(case: Case) -> Backdoor:
    return Backdoor(PLUGINS.build("triggers", case.trigger), PLUGINS.build("targets", case.target))


def trained(plugin: Any, case: Case, folder: Path) -> DiffusionModel:
    """The model of a case, trained unless it lies in the folder."""
    if case.attack == "none":
        return plugin.load()
    made = folder / case.name
    if not made.is_dir():
        model = attacking.attack(plugin, PLUGINS.build("attacks", case.attack), backdoor_of(case), case.seed, "cpu")
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, folder / f".{case.name}", fp16=False)
        (folder / f".{case.name}").rename(made)
    return checkpoint.load(made)


def facts(plugin: Any, case: Case, model: DiffusionModel) -> dict[str, Any]:
    """What a model does: the share of recognised clean samples, and the success rate of its attack."""
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
AS_THEY_ARE = {
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


PAPER = {  # the papers' lengths; TrojDiff scales the noise, so γ is estimated too
    "paper's length": {
        "terd": "terd(starts=2, iterations=3000, batch=8, refinement=1000)",
        "terd, scale": "terd(starts=2, iterations=3000, batch=8, refinement=1000, scale=True)",
    },
}
POPULATIONS = {
    "digits": Population("digits-ddpm", DIGITS, AS_THEY_ARE | PAPER),
    "mnist": Population("mnist-ddpm", MNIST, {name: AS_THEY_ARE[name] for name in ("after", "before", "causes")}),
}


def judged(plugin: Any, case: Case, model: DiffusionModel, spec: str) -> dict[str, Any]:
    """What a detector says about a model, and the CPU seconds that it takes."""
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


def summary(population: Population, models: dict[str, Any]) -> dict[str, Any]:
    """For each part and detector the AUROC over the reported models whose attack took, and its 95 % interval."""
    found: dict[str, Any] = {}
    for part, detectors in population.scores.items():
        for name in detectors:
            scores: dict[bool, list[float]] = {True: [], False: []}
            for case in population.cases:
                known = models.get(case.name, {})
                took = case.clean or known.get("facts", {}).get("asr", 0) >= 0.5
                if name in known.get(part, {}) and took and case.seed >= FIRST_REPORTED:
                    scores[case.clean].append(known[part][name]["score"])
            if scores[True] and scores[False]:
                area, (low, high) = statistics.auroc(scores[True], scores[False])
                n = {"clean": len(scores[True]), "backdoored": len(scores[False])}
                found[f"{part}: {name}"] = n | {"auroc": area, "low": low, "high": high}
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(population: Population, document: dict[str, Any]) -> str:
    """Two tables in Markdown: the scores of every reported model before and after, with the areas under the ROC curve,
    and the scores of every other setting, with the area where every model has one."""
    models, areas = document["models"], summary(population, document["models"])
    done = [case for case in population.cases if case.name in models and case.seed >= FIRST_REPORTED]
    names = [name for name in population.scores.get("after", {}) if name in population.scores.get("before", {})]
    rows = [["model", "ASR %", *(f"`{name.split(',')[0]}`{name.partition(',')[1:][1]}" for name in names)]]
    for case in done:
        known = models[case.name]
        rows.append([case.name, _asr(known), *(_change(known, name) for name in names)])
    rows.append(
        ["AUROC", "", *(" → ".join(_area(areas, f"{part}: {name}") for part in ("before", "after")) for name in names)]
    )
    others = {part: settings for part, settings in population.scores.items() if part not in ("before", "after")}
    more = [["setting", *(case.name for case in done), "AUROC"]]
    for part, settings in others.items():
        for name in settings:
            scores = [_score(models[case.name], part, name) for case in done]
            if any(score != "" for score in scores):
                label = name if part == "causes" else f"{name}, {part}"
                more.append([label, *scores, _area(areas, f"{part}: {name}") if all(scores) else ""])
    return "\n\n".join(_markdown(each) for each in (rows, more) if len(each) > 1)


def place(name: str) -> Place:
    """Where the tables of a population stand in docs/results.md."""
    page = Path(__file__).parents[2] / "docs" / "results.md"
    return Place(page, f"python -m tests.benchmarks.detectors {name} --table")


def _asr(known: dict[str, Any]) -> str:
    asr = known.get("facts", {}).get("asr")
    return "clean" if asr is None else f"{100 * asr:.0f}"


def _change(known: dict[str, Any], name: str) -> str:
    before, after = (_score(known, part, name) for part in ("before", "after"))
    return f"{before} → {after}" if before or after else ""


def _score(known: dict[str, Any], part: str, name: str) -> str:
    found = known.get(part, {}).get(name)
    if found is None:
        return ""
    return f"{found['score']:.5f}" if "terd" in name and part != "before" else f"{found['score']:.3f}"


def _area(areas: dict[str, Any], name: str) -> str:
    found = areas.get(name)
    return "" if found is None else f"{found['auroc']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


# ---- command --------------------------------------------------------------------------------------------------------


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("population", choices=sorted(POPULATIONS))
    words.add_argument("--models", type=Path, help="where the models are kept")
    words.add_argument(
        "--table", action="store_true", help="put the tables of FILE into docs/results.md and print them"
    )
    words.add_argument("--part", action="append", help="default: all")
    words.add_argument("--only", action="append", help="a case; default: all")
    words.add_argument("-o", "--out", type=Path)
    told = words.parse_args()
    population = POPULATIONS[told.population]
    _known(words, "--part", told.part, ["train", *population.scores])
    _known(words, "--only", told.only, [case.name for case in population.cases])
    out = told.out or Path(__file__).with_name(f"detectors_{told.population}.json")
    if told.table:
        made = tables(population, json.loads(out.read_text()))
        place(told.population).write(made)
        print(made)
        return
    if told.models is None:
        words.error("--models DIR is needed, unless --table prints what is there")
    plugin: Any = PLUGINS.build("models", population.model)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    told.models.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"models": {}}
    models = document["models"]

    def keep() -> None:
        document.update(summary=summary(population, models), scores=population.scores)
        out.write_text(json.dumps(document, indent=1) + "\n")

    for case in [case for case in population.cases if not told.only or case.name in told.only]:
        known = models.setdefault(case.name, {"case": asdict(case)})
        if known["case"] != asdict(case):
            raise SystemExit(f"{out} has another {case.name}; remove that entry, or write another file with -o")
        model = trained(plugin, case, told.models)
        if "facts" not in known:
            known["facts"] = facts(plugin, case, model)
            keep()
        for part in [part for part in population.scores if not told.part or part in told.part]:
            for name, spec in population.scores[part].items():
                if name in known.get(part, {}):
                    continue
                known.setdefault(part, {})[name] = judged(plugin, case, model, spec)
                print(case.name, part, name, known[part][name]["score"], known["facts"], flush=True)
                keep()


def _known(words: argparse.ArgumentParser, option: str, asked: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in asked or ():
        if name not in known:
            words.error(f"{option}: {name!r} is none of {', '.join(known)}")


if __name__ == "__main__":
    main()
