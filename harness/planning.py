"""From cells to jobs: what is computed once for many cells, and under which key.

    attack ─► defend ─► sample ─► measure ─► record          (clean models are sampled without an attack)

A key is the sha256 of everything that a job's numbers depend on; where it runs, how many others run beside it and
where it is reported are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from harness.grid import Suite, standard
from harness.job import Job
from harness.registry import Registry, parse_spec, source_digest, spec_of, write_spec
from harness.store import key_of
from harness.types import KNOWLEDGE, WRONG, Cell, delivers, extra_sets

KEY_VERSION = 3  # raise when the harness itself changes numbers
KNOWN_SHARE, KNOWN_LEAST = 0.1, 512  # clean training data a defender may hold: a tenth (Elijah's), at least this many
KNOWN_PROMPTS = 100  # clean prompts a defender may hold ("Sealing the Backdoor")
# First guesses of the seconds that a job takes, for the embedded models on one CPU core
BEGIN, STEP, EVALUATION = 5.0, 0.25, 0.003  # before the first step, an optimizer step, a network evaluation
SECONDS = {"attack": 300.0, "defend": 60.0, "measure": 5.0}  # of a method without steps


@dataclass(frozen=True)
class PlannedCell:
    """A cell, the key of its measure job (which is the record's key) and the keys of all jobs behind it."""

    cell: Cell
    key: str
    behind: tuple[str, ...]
    needs: tuple[str, ...]  # the defense's
    delivers: tuple[str, ...]  # the defense's
    short: Mapping[str, str]  # specs with only what differs from the defaults
    track: str


@dataclass
class Plan:
    """The jobs of a suite by key, in an order in which they could run, and its cells."""

    jobs: dict[str, Job] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)


def plan(suite: Suite, registry: Registry, threads: int = 1) -> Plan:
    """Every job that `suite` needs, each once."""
    planner = _Planner(registry, suite.metrics or standard(registry), threads)
    for cell in suite.cells:
        planner.add(cell)
    return planner.plan


class _Planner:
    def __init__(self, registry: Registry, metrics: Sequence[str], threads: int) -> None:
        self.registry, self.threads, self.plan = registry, threads, Plan()
        self.metrics = {name: self.identity("metrics", name) for name in sorted(metrics)}
        self.sets = {name for metric in metrics for name in extra_sets(registry.build("metrics", metric))}
        self.model_identity = cache(self._model_identity)

    def identity(self, kind: str, spec: str) -> dict[str, Any]:
        """What of a plugin its numbers depend on."""
        made = self.registry.build(kind, spec)
        return {
            "spec": self.registry.canonical(kind, spec),
            "version": made.version,
            "source": source_digest(type(made)),
        }

    def _model_identity(self, spec: str) -> dict[str, Any]:
        return self.identity("models", spec) | {"weights": self.registry.build("models", spec).digest()}

    def short(self, part: str, cell: Cell) -> str:
        """The spec of one part of a cell with only those parameters that differ from the defaults."""
        spec, kind = getattr(cell, part), "defenses" if part == "defense" else part + "s"
        name, given = parse_spec(spec)
        usual = parse_spec(self.registry.canonical(kind, name))[1]
        return write_spec(name, {k: v for k, v in given.items() if v != usual.get(k)})

    def _defended(self, cell: Cell) -> str:
        return self.short("defense", cell) + (" (told a wrong trigger)" if cell.told == "wrong-trigger" else "")

    def job(
        self,
        kind: Any,
        label: str,
        needs: Sequence[str],
        spec: dict[str, Any],
        numbers: dict[str, Any],
        shares: str | None = None,
    ) -> str:
        """Add the job whose result depends on `numbers` (and on the artifacts in `needs`); its key."""
        ingredients = {
            "key_version": KEY_VERSION,
            "kind": kind,
            "threads": self.threads,
            "precision": "fp32",
            "inputs": sorted(needs),
            **numbers,
        }
        key = key_of(ingredients)
        if key not in self.plan.jobs:
            files = [str(path) for path in self.registry.files]
            told = {"kind": kind, **spec, "plugin_files": files}
            self.plan.jobs[key] = Job(key, kind, label, tuple(needs), told, self.guess(kind, spec), shares)
        return key

    def guess(self, kind: str, spec: Mapping[str, Any]) -> float:
        """Seconds that a job may take, before any of its like was measured."""
        if kind == "sample":
            images = spec["n"] * len(spec.get("stamps", [None]))
            return BEGIN + EVALUATION * images * self.registry.build("samplers", spec["sampler"]).nfe
        method = {"attack": "attack", "defend": "defense"}.get(kind)
        steps = None if method is None else getattr(self.registry.build(method + "s", spec[method]), "steps", None)
        return BEGIN + STEP * steps if isinstance(steps, int) and steps else SECONDS[kind]

    def add(self, cell: Cell) -> None:
        attack = self.attack(cell)
        defend = self.defend(cell, attack)
        samples = self.samples(cell, attack, defend)
        key = self.measure(cell, attack, defend, samples)
        behind = tuple(k for k in (attack, defend, *samples.values(), key) if k is not None)
        defense = self.registry.build("defenses", cell.defense)
        short = {
            part: self.short(part, cell) for part in ("model", "attack", "trigger", "target", "defense", "sampler")
        }
        track = "text-to-image" if self.registry.build("models", cell.model).conditional else "unconditional"
        behind = tuple(dict.fromkeys(behind))
        self.plan.cells.append(PlannedCell(cell, key, behind, tuple(defense.needs), delivers(defense), short, track))

    def attack(self, cell: Cell) -> str | None:
        """Key of the attack job; None where the released clean model is left as it is."""
        if is_clean(cell) and not self.registry.build("attacks", cell.attack).steps:
            return None
        spec = {k: getattr(cell, k) for k in ("model", "attack", "trigger", "target", "seed")}
        numbers = {
            "model": self.model_identity(cell.model),
            "attack": self.identity("attacks", cell.attack),
            "trigger": self.identity("triggers", cell.trigger),
            "target": self.identity("targets", cell.target),
            "seed": cell.seed,
        }
        verb = "fine-tune" if is_clean(cell) else f"attack {self.short('attack', cell)} on"
        label = f"{verb} {self.short('model', cell)}, seed {cell.seed}"
        return self.job("attack", label, [], spec, numbers)

    def told(self, cell: Cell, needs: Sequence[str]) -> str | None:
        """Spec of the trigger that the defender is told; None where it is told none."""
        if "trigger" not in needs:
            return None
        if cell.told == "truth":
            return cell.trigger
        return spec_of(self.registry.build("triggers", cell.trigger).wrong(0))

    def defend(self, cell: Cell, attack: str | None) -> str | None:
        """Key of the defend job; None for defense `none`."""
        name = parse_spec(cell.defense)[0]
        if name == "none":
            return None
        defense = self.registry.build("defenses", cell.defense)
        needs = tuple(defense.needs)
        unknown = [need for need in needs if need not in KNOWLEDGE]
        if unknown:
            raise ValueError(f"defense '{name}' needs {unknown[0]!r}; there are {', '.join(KNOWLEDGE)}")
        told = self.told(cell, needs)
        apart = ["apart"] if {"data", "prompts"} <= set(needs) else []  # drawn one after the other before, with one key
        spec = {
            "model": cell.model, "attacked": attack, "defense": cell.defense, "told": told, "seed": cell.seed,
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "defense": self.identity("defenses", cell.defense),
            "told": None if told is None else self.identity("triggers", told),
            "known": [KNOWN_SHARE, KNOWN_LEAST, KNOWN_PROMPTS, *apart],
            "seed": cell.seed,
        }
        if "screen" in delivers(defense):
            spec["screened"] = {"trigger": cell.trigger, "n": cell.n}
            numbers["screened"] = {"trigger": self.identity("triggers", cell.trigger), "n": cell.n}
        about = ", told a wrong trigger" if cell.told == "wrong-trigger" else ""
        label = f"defend {self.short('defense', cell)}{about} on {self._whose(cell, attack)}"
        return self.job("defend", label, [attack] if attack else [], spec, numbers)

    def _whose(self, cell: Cell, attack: str | None) -> str:
        name = self.short("model", cell)
        if attack is None:
            return f"clean {name}"
        if is_clean(cell):
            return f"{name} fine-tuned, seed {cell.seed}"
        return f"{name} attacked by {parse_spec(cell.attack)[0]}, seed {cell.seed}"

    def samples(self, cell: Cell, attack: str | None, defend: str | None) -> dict[str, str]:
        """Keys of the image sets by "who/given"."""
        wrong = self.registry.build("triggers", cell.trigger)
        defense = self.registry.build("defenses", cell.defense)
        changes = {"model", "sampler"} & set(delivers(defense))
        stamps: dict[str, list[str | None]] = {
            "clean": [None],
            "triggered": [cell.trigger],
            "wrong": [spec_of(wrong.wrong(k)) for k in range(WRONG)],
        }
        models: dict[str, tuple[str | None, str | None]] = {
            "clean": (None, None),
            "backdoored": (attack, None),
            "defended": (attack, defend if changes else None),
        }
        wanted = [("clean", "clean"), ("backdoored", "clean"), ("backdoored", "triggered"), ("backdoored", "wrong"),
                  ("defended", "clean"), ("defended", "triggered")]  # fmt: skip
        if wrong.stamps == "noise":
            wanted.append(("clean", "triggered"))  # what this noise gives without a backdoor
        made = {f"{who}/{given}": self.sample(cell, models[who], stamps[given], given) for who, given in wanted}
        if defend and "backdoored/found" in self.sets and self.told(cell, defense.needs) is None:
            made["backdoored/found"] = self.sample_found(cell, attack, defend)
        return made

    def sample_found(self, cell: Cell, attack: str | None, defend: str) -> str:
        """The attacked model under the trigger that the defense found, sampled as clean inputs are: who found it knows
        no attacker's own process."""
        sampler = self.sampler(cell, "clean")
        spec = {
            "model": cell.model, "attacked": attack, "defended": None, "sampler": sampler, "n": cell.n,
            "found_by": defend,
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "sampler": self.identity("samplers", sampler),
            "found": [attack, defend],
            "n": cell.n,
        }
        label = f"sample inputs with the trigger that {self._defended(cell)} found on {self._whose(cell, attack)}"
        shares = _shared(cell, attack, None)
        return self.job("sample", label, [k for k in (attack, defend) if k], spec, numbers, shares)

    def sample(self, cell: Cell, of: tuple[str | None, str | None], stamps: Sequence[str | None], given: str) -> str:
        attack, defend = of
        sampler = self.sampler(cell, given)
        spec = {
            "model": cell.model, "attacked": attack, "defended": defend, "sampler": sampler, "stamps": stamps,
            "n": math.ceil(cell.n / len(stamps)),
        }  # fmt: skip
        numbers = {
            "model": self.model_identity(cell.model),
            "sampler": self.identity("samplers", sampler),
            "stamps": [None if stamp is None else self.identity("triggers", stamp) for stamp in stamps],
            "n": math.ceil(cell.n / len(stamps)),
        }
        who = f"{self._defended(cell)} on " if defend else ""
        label = f"sample {given} inputs, {who}{self._whose(cell, attack)}"
        needs = [k for k in (attack, defend) if k]
        # `inputs` is a set of keys, so which of them was attacked and which defended is said again
        numbers["of"] = [attack, defend]
        changed = "model" in delivers(self.registry.build("defenses", cell.defense))
        shares = _shared(cell, attack, defend if changed else None)
        return self.job("sample", label, needs, spec, numbers, shares)

    def sampler(self, cell: Cell, given: str) -> str:
        """The cell's sampler. One that is an attacker's own reverse process is for inputs with a trigger (wrong ones
        too); clean inputs are sampled by its vanilla form, whoever's model it is."""
        sampler = self.registry.build("samplers", cell.sampler)
        own = given == "clean" and hasattr(sampler, "vanilla")
        return spec_of(sampler.vanilla()) if own else cell.sampler

    def measure(self, cell: Cell, attack: str | None, defend: str | None, samples: dict[str, str]) -> str:
        spec = {
            "cell": asdict(cell), "attacked": attack, "defended": defend, "samples": samples,
            "metrics": list(self.metrics),
        }  # fmt: skip
        numbers = {
            "cell": asdict(cell),
            "model": self.model_identity(cell.model),
            "trigger": self.identity("triggers", cell.trigger),
            "target": self.identity("targets", cell.target),
            "metrics": self.metrics,
            "samples": samples,
        }
        needs = [k for k in dict.fromkeys([attack, defend, *samples.values()]) if k]
        label = f"measure {self._defended(cell)} on {self._whose(cell, attack)}"
        return self.job("measure", label, needs, spec, numbers)


def _shared(cell: Cell, attack: str | None, defend: str | None) -> str:
    """The name of the model that a sample job loads: the defended, else the attacked, else the clean one."""
    return f"{cell.model} {attack} {defend}"


def is_clean(cell: Cell) -> bool:
    """Whether the cell's model is without a backdoor: attack `none`, fine-tuned or not."""
    return parse_spec(cell.attack)[0] == "none"
