"""From cells to jobs: what is computed once for many cells, and under which key.

    attack ─► defend ─► sample ─► measure ─► record          (clean models are sampled without an attack)

A key is the sha256 of everything that a job's numbers depend on: its ingredients. Where the job runs, how many others
run beside it and where its numbers are reported are not among them.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from harness.capabilities import (
    AttackersSampler,
    ComputedTrigger,
    OrdinaryTrigger,
    PublishedArchitecture,
    SteppedMethod,
    delivers,
    extra_sets,
    keyed_libraries,
    offers,
)
from harness.methods.learned_triggers import LearnedTrigger
from harness.registry import Registry, parse_spec, presets, spec_of, write_spec
from harness.registry.code_digest import closure
from harness.registry.entry_points import file_of
from harness.registry.kept import derived
from harness.runs.evaluations import nfe_of
from harness.runs.job import (
    AttackSpec,
    ControlSpec,
    DefendSpec,
    Job,
    JobSpec,
    MeasureSpec,
    SampleSpec,
)
from harness.runs.jsonable import key_of
from harness.runs.record import control_words
from harness.runs.suite import AXES, Suite, standard
from harness.types import KNOWLEDGE, WRONG, Cell

if TYPE_CHECKING:
    from harness.runs.record import Track

# First guesses of the seconds that a job takes, for the embedded models on one CPU core
BEGIN, STEP, EVALUATION = 5.0, 0.25, 0.003  # before the first step, an optimizer step, a network evaluation
SECONDS = {"attack": 300.0, "control": 20.0, "defend": 60.0, "measure": 20.0}  # of a method without steps
STAGES = {
    kind: (f"harness.stages.{kind}", "harness.diffusion.checkpoint", *also)
    for kind, also in {
        "attack": (),
        "control": ("harness.stages.inputs",),
        "defend": ("harness.stages.knowledge", "harness.methods.decoys"),
        "sample": ("harness.stages.inputs", "harness.stages.findings", "harness.diffusion.images"),
        "measure": (),
    }.items()
}  # fmt: skip
CONTROL_N = 128  # inputs on which a candidate for a control trigger is tried, at most
CELL = tuple(each.name for each in fields(Cell))
Identity = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from: its distribution (of a single file its name), the digest of the code that it depends
    on, and the file of its class."""

    distribution: str
    code: str
    file: str


@dataclass(frozen=True)
class PlannedCell:
    """A cell, the key of its measure job (which is the record's key) and the keys of all jobs upstream of it."""

    cell: Cell
    key: str
    upstream: tuple[str, ...]
    needs: tuple[str, ...]  # the defense's
    delivers: tuple[str, ...]  # the defense's
    short: Mapping[str, str]  # specs with only what differs from the defaults
    track: Track
    origins: Mapping[str, Origin]  # part of the cell → where its plugin comes from


@dataclass
class Plan:
    """The jobs of a suite by key, in an order in which they could run, and its cells."""

    jobs: dict[str, Job] = field(default_factory=dict)
    cells: list[PlannedCell] = field(default_factory=list)

    def measured(self, key: str) -> MeasureSpec:
        """The spec of a measure job."""
        spec = self.jobs[key].spec
        assert isinstance(spec, MeasureSpec)
        return spec


def plan(suite: Suite, registry: Registry, threads: int = 1) -> Plan:
    """Every job that `suite` needs, each once."""
    planner = _Planner(registry, suite.metrics or standard(registry), threads)
    for cell in suite.cells:
        planner.add(cell)
    derived.save()
    return planner.plan


class _Planner:
    def __init__(self, registry: Registry, metrics: Sequence[str], threads: int) -> None:
        self.registry, self.threads, self.plan = registry, threads, Plan()
        self.metrics = tuple(sorted(metrics))
        self.known: dict[JobSpec, str] = {}  # keys of jobs; not of those that measure, as each belongs to one cell
        self.built, self.shortened = cache(registry.build), cache(self._shortened)
        self.sets = {name for metric in metrics for name in extra_sets(self.built("metrics", metric))}
        self.identity, self.digest, self.code = cache(self._identity), cache(self._digest), cache(self._code)
        self.wrong, self.vanilla = cache(self._wrong), cache(self._vanilla)
        self.origin = cache(self._origin)
        self.nfe = cache(self._nfe)
        self.metrics_identity = cache(self._metrics_identity)
        self.files = tuple(str(path) for path in registry.files)

    def _identity(self, kind: str, spec: str) -> Identity:
        """What of a plugin a number depends on, beside its code."""
        made = self.built(kind, spec)
        said: Identity = {"spec": spec_of(made), "version": made.version}
        keyed = {name: _minor(name) for name in keyed_libraries(made)}
        return said | ({"libraries": keyed} if keyed else {}) | self.digest(kind, spec)

    def _digest(self, kind: str, spec: str) -> Identity:
        made = self.built(kind, spec)
        if kind == "models":
            return {"weights": made.digest()}
        return {"weights": made.digest()} if kind == "triggers" and offers(made, ComputedTrigger) else {}

    def _code(self, stage: str, plugins: tuple[type, ...]) -> tuple[dict[str, str], str]:
        """Module → digest, and the digest of all."""
        code = closure(plugins, STAGES[stage])
        return code, key_of(code)

    def _nfe(self, sampler: str) -> int:
        return nfe_of(self.built("samplers", sampler))

    def _wrong(self, trigger: str) -> tuple[str, ...]:
        """Specs of the wrong triggers beside a trigger."""
        built = self.built("triggers", trigger)
        return tuple(spec_of(built.wrong(k)) for k in range(WRONG))

    def _vanilla(self, sampler: str) -> str | None:
        """The spec of the vanilla form of an attacker's own process; None for any other sampler."""
        built = self.built("samplers", sampler)
        return spec_of(built.vanilla()) if offers(built, AttackersSampler) else None

    def _metrics_identity(self) -> dict[str, Identity]:
        return {name: self.identity("metrics", name) for name in self.metrics}

    def short(self, part: str, cell: Cell) -> str:
        """The preset of one part of a cell, else its spec with only what differs from the defaults."""
        return presets.named(AXES[part], self.shortened(part, getattr(cell, part)))

    def _shortened(self, part: str, spec: str) -> str:
        name, given = parse_spec(spec)
        usual = parse_spec(spec_of(self.built(AXES[part], name)))[1]
        return write_spec(name, {k: v for k, v in given.items() if v != usual.get(k)})

    def _defended(self, cell: Cell) -> str:
        about = "" if cell.trigger_given == "true" else f" (given {control_words(cell.trigger_given)})"
        return self.short("defense", cell) + about

    def job(
        self, label: str, needs: Sequence[str], spec: JobSpec, parts: Mapping[str, Any], plugins: Sequence[Any],
        reuse_key: str | None = None, method: str | None = None, on_gpu: bool = True,
    ) -> str:  # fmt: skip
        """Add the job whose result depends on `parts`, on the code of `plugins` and on the artifacts in `needs`; its
        key. parts: ingredients by name."""
        code, digest = self.code(spec.kind, tuple(dict.fromkeys(type(plugin) for plugin in plugins)))
        ingredients = {
            "kind": spec.kind,
            "threads": self.threads,
            "precision": "fp32",
            "inputs": sorted(needs),
            "code": code,
            **parts,
        }
        key = key_of({**ingredients, "code": digest})  # as `condensed` has it
        if not isinstance(spec, MeasureSpec):
            self.known[spec] = key
        if key not in self.plan.jobs:
            spec = replace(spec, plugin_files=self.files) if self.files else spec
            self.plan.jobs[key] = Job(
                key, spec.kind, label, tuple(needs), spec, self.guess(spec), reuse_key, method or label, on_gpu,
                ingredients,
            )  # fmt: skip
        return key

    def guess(self, spec: JobSpec) -> float:
        """Seconds that a job may take, before any of its like was measured."""
        if isinstance(spec, SampleSpec):
            images = spec.n * max(1, len(spec.stamps))
            return BEGIN + EVALUATION * images * self.nfe(spec.sampler)
        method = None
        if isinstance(spec, AttackSpec):
            method = self.built("attacks", spec.attack)
        if isinstance(spec, DefendSpec):
            method = self.built("defenses", spec.defense)
        steps = method.steps if offers(method, SteppedMethod) else None
        return BEGIN + STEP * steps if isinstance(steps, int) and steps else SECONDS[spec.kind]

    def add(self, cell: Cell) -> None:
        attack = self.attack(cell)
        defend = self.defend(cell, attack)
        samples = self.samples(cell, attack, defend)
        key = self.measure(cell, attack, defend, samples)
        chosen = () if defend is None else self.chosen(defend)
        upstream = tuple(dict.fromkeys(k for k in (attack, *chosen, defend, *samples.values(), key) if k is not None))
        defense = self.built("defenses", cell.defense)
        short = {part: self.shortened(part, getattr(cell, part)) for part in AXES}
        track: Track = "text-to-image" if self.built("models", cell.model).conditional else "unconditional"
        origins = {part: self.origin(kind, getattr(cell, part)) for part, kind in AXES.items()}
        self.plan.cells.append(
            PlannedCell(cell, key, upstream, tuple(defense.needs), delivers(defense), short, track, origins)
        )

    def _origin(self, kind: str, spec: str) -> Origin:
        cls, distribution = type(self.built(kind, spec)), self.registry.distribution_of(kind, _name(spec))
        code = key_of(closure([cls]))[:16]
        return Origin(PurePath(distribution).name, code, file_of(cls.__module__))

    def chosen(self, defend: str) -> tuple[str, ...]:
        """Keys of the jobs that chose a control trigger for a defend job: of what they need and of themselves."""
        spec = self.plan.jobs[defend].spec
        control = spec.control if isinstance(spec, DefendSpec) else None
        return () if control is None else (*self.plan.jobs[control].needs, control)

    def attack(self, cell: Cell) -> str | None:
        """Key of the attack job; None where the released clean model is left as it is."""
        if is_clean(cell) and not self.built("attacks", cell.attack).steps:
            return None
        spec = AttackSpec(
            model=cell.model, attack=cell.attack, trigger=cell.trigger, target=cell.target, seed=cell.seed
        )
        if spec in self.known:
            return self.known[spec]
        axes = ("model", "attack", "trigger", "target")
        parts = {axis: self.identity(AXES[axis], getattr(cell, axis)) for axis in axes} | {"seed": cell.seed}
        verb = "fine-tune" if is_clean(cell) else f"attack {self.short('attack', cell)} on"
        method = f"{verb} {self.short('model', cell)}"
        plugins = [self.built(AXES[axis], getattr(cell, axis)) for axis in axes]
        return self.job(f"{method}, seed {cell.seed}", [], spec, parts, plugins, method=method)

    def given(self, cell: Cell, needs: Sequence[str]) -> str | None:
        """Spec of the trigger that the defender is given, or of which it is given a control; None where it is given
        none."""
        return cell.trigger if "trigger" in needs else None

    def avoided(self, cell: Cell) -> str | None:
        """Spec of the cell's trigger where ordinary prompts may carry it: no clean input and no prompt of a defender
        does. None for any other trigger."""
        return cell.trigger if offers(self.built("triggers", cell.trigger), OrdinaryTrigger) else None

    def avoidance(self, avoided: str | None) -> dict[str, Any]:
        """What a trigger that prompts avoid adds to the ingredients of a job."""
        return {} if avoided is None else {"avoided": self.identity("triggers", avoided)}

    def learned_by(self, attack: str | None, *triggers: str | None) -> str | None:
        """Key of the attack job that learned the pattern of one of these triggers; None where all follow from their
        specs."""
        learned = (trigger and offers(self.built("triggers", trigger), LearnedTrigger) for trigger in triggers)
        return attack if any(learned) else None

    def learning(self, learned_by: str | None) -> dict[str, Any]:
        """What a learned trigger adds to the ingredients of a job."""
        return {} if learned_by is None else {"learned by": learned_by}

    def control(self, cell: Cell, attack: str | None) -> str:
        """Key of the job that chooses the control trigger of a cell."""
        clean = self.sample(cell, (None, None), (None,), "clean")
        spec = ControlSpec(
            model=cell.model, attacked=attack, trigger=cell.trigger, target=cell.target, sampler=cell.sampler,
            given=cell.trigger_given, seed=cell.seed, n=min(cell.n, CONTROL_N), evaluation_seed=cell.evaluation_seed,
            clean=clean, learned_by=self.learned_by(attack, cell.trigger),
        )  # fmt: skip
        if spec in self.known:
            return self.known[spec]
        axes = ("model", "trigger", "target", "sampler")
        parts: dict[str, Any] = {axis: self.identity(AXES[axis], getattr(cell, axis)) for axis in axes}
        parts |= {
            "given": cell.trigger_given, "seed": cell.seed, "n": spec.n, "evaluation_seed": cell.evaluation_seed,
            "of": [attack, clean], **self.learning(spec.learned_by),
        }  # fmt: skip
        plugins = [self.built(AXES[axis], getattr(cell, axis)) for axis in axes]
        method = f"choose {control_words(cell.trigger_given)} on "
        return self.job(
            method + self._whose(cell, attack), [k for k in (attack, clean) if k], spec, parts, plugins,
            method=method + self._whose(cell, attack, seed=False),
        )  # fmt: skip

    def defend(self, cell: Cell, attack: str | None) -> str | None:
        """Key of the defend job; None for defense `none`."""
        name = _name(cell.defense)
        if name == "none":
            return None
        defense = self.built("defenses", cell.defense)
        unknown = [need for need in defense.needs if need not in KNOWLEDGE]
        if unknown:
            raise ValueError(f"defense '{name}' needs {unknown[0]!r}; there are {', '.join(KNOWLEDGE)}")
        given = self.given(cell, defense.needs)
        control = None if given is None or cell.trigger_given == "true" else self.control(cell, attack)
        screens = "screen" in delivers(defense)
        spec = DefendSpec(
            model=cell.model, attacked=attack, defense=cell.defense, trigger=given, control=control, seed=cell.seed,
            screened=cell.trigger if screens else None, n=cell.n if screens else 0,
            evaluation_seed=cell.evaluation_seed if screens else 0, avoided=self.avoided(cell),
            learned_by=self.learned_by(attack, given, cell.trigger if screens else None),
        )  # fmt: skip
        if spec in self.known:
            return self.known[spec]
        parts: dict[str, Any] = {
            "model": self.identity("models", cell.model),
            "defense": self.identity("defenses", cell.defense),
            "given trigger": None if given is None else self.identity("triggers", given),
            "control": control,
            "seed": cell.seed,
        }
        plugins = [self.built("models", cell.model), defense]
        told = (given, cell.trigger if screens else None, spec.avoided)
        plugins += [self.built("triggers", trigger) for trigger in told if trigger]
        parts |= self.avoidance(spec.avoided) | self.learning(spec.learned_by)
        if screens:
            parts["screened"] = {
                "trigger": self.identity("triggers", cell.trigger), "n": cell.n,
                "evaluation_seed": cell.evaluation_seed,
            }  # fmt: skip
        about = "" if control is None else f", given {control_words(cell.trigger_given)}"
        method = f"defend {self.short('defense', cell)}{about} on "
        return self.job(
            method + self._whose(cell, attack), [k for k in (attack, control) if k], spec, parts, plugins,
            method=method + self._whose(cell, attack, seed=False),
        )  # fmt: skip

    def _whose(self, cell: Cell, attack: str | None, seed: bool = True) -> str:
        name, ending = self.short("model", cell), f", seed {cell.seed}" if seed else ""
        if attack is None:
            return f"clean {name}"
        if is_clean(cell):
            return f"{name} fine-tuned{ending}"
        return f"{name} attacked by {_name(cell.attack)}{ending}"

    def samples(self, cell: Cell, attack: str | None, defend: str | None) -> dict[str, str]:
        """Keys of the image sets by "who/given"."""
        trigger = self.built("triggers", cell.trigger)
        defense = self.built("defenses", cell.defense)
        changes = {"model", "sampler"} & set(delivers(defense))
        stamps: dict[str, tuple[str | None, ...]] = {
            "clean": (None,),
            "triggered": (cell.trigger,),
            "wrong": self.wrong(cell.trigger),
            "utility": (None,),
        }
        models: dict[str, tuple[str | None, str | None]] = {
            "clean": (None, None),
            "backdoored": (attack, None),
            "defended": (attack, defend if changes else None),
        }
        wanted = [("clean", "clean"), ("backdoored", "clean"), ("backdoored", "triggered"), ("backdoored", "wrong"),
                  ("defended", "clean"), ("defended", "triggered")]  # fmt: skip
        if cell.utility_n:
            wanted += [(who, "utility") for who in models]
        if trigger.modality == "noise":
            wanted.append(("clean", "triggered"))  # what this noise gives without a backdoor
        made = {f"{who}/{given}": self.sample(cell, models[who], stamps[given], given) for who, given in wanted}
        if defend and "backdoored/found" in self.sets and self.given(cell, defense.needs) is None:
            made["backdoored/found"] = self.sample_found(cell, attack, defend)
        return made

    def sample_found(self, cell: Cell, attack: str | None, defend: str) -> str:
        """The attacked model under the trigger that the defense found, sampled as clean inputs are: who found it knows
        no attacker's own process."""
        sampler = self.sampler(cell, "clean")
        spec = SampleSpec(
            model=cell.model, attacked=attack, sampler=sampler, n=cell.n, evaluation_seed=cell.evaluation_seed,
            found_by=defend, avoided=self.avoided(cell),
        )  # fmt: skip
        if spec in self.known:
            return self.known[spec]
        parts = {
            "model": self.identity("models", cell.model),
            "sampler": self.identity("samplers", sampler),
            "found": [attack, defend],
            "drawn": _drawn(spec),
            **self.avoidance(spec.avoided),
        }
        plugins = [self.built("models", cell.model), self.built("samplers", sampler)]
        plugins += [self.built("triggers", spec.avoided)] if spec.avoided else []
        label = f"sample inputs with the trigger that {self._defended(cell)} found on "
        return self.job(
            label + self._whose(cell, attack), [k for k in (attack, defend) if k], spec, parts, plugins,
            _reuse_key(cell, attack, None), label + self._whose(cell, attack, seed=False),
        )  # fmt: skip

    def sample(self, cell: Cell, of: tuple[str | None, str | None], stamps: tuple[str | None, ...], given: str) -> str:
        attack, defend = of
        utility = given == "utility"
        sampler = self.sampler(cell, given)
        spec = SampleSpec(
            model=cell.model, attacked=attack, defended=defend, sampler=sampler, stamps=stamps,
            n=cell.utility_n if utility else math.ceil(cell.n / len(stamps)),
            stream="utility" if utility else "evaluation", evaluation_seed=cell.evaluation_seed,
            avoided=self.avoided(cell), learned_by=self.learned_by(self.attack(cell), *stamps),
            beside=self.beside(cell, of, stamps, given),
        )  # fmt: skip
        if spec in self.known:
            return self.known[spec]
        parts = {
            "model": self.identity("models", cell.model),
            "sampler": self.identity("samplers", sampler),
            "stamps": [None if stamp is None else self.identity("triggers", stamp) for stamp in stamps],
            "drawn": _drawn(spec),
            "of": [attack, defend],  # `inputs` is a set of keys; which of them was attacked and which defended is here
            **self.avoidance(spec.avoided),
            **self.learning(spec.learned_by),
        }
        plugins = [self.built("models", cell.model), self.built("samplers", sampler)]
        plugins += [self.built("triggers", stamp) for stamp in (*stamps, spec.avoided) if stamp is not None]
        delivered = delivers(self.built("defenses", cell.defense))
        if defend and "sampler" in delivered:  # a sampler that the defense delivers runs in this job
            plugins.append(self.built("defenses", cell.defense))
        who = f"{self._defended(cell)} on " if defend else ""
        label = f"sample {given} inputs, {who}"
        needs = [key for key in dict.fromkeys((attack, defend, spec.learned_by)) if key]
        return self.job(
            label + self._whose(cell, attack), needs, spec, parts, plugins,
            _reuse_key(cell, attack, defend if "model" in delivered else None),
            label + self._whose(cell, attack, seed=False),
        )  # fmt: skip

    def beside(
        self, cell: Cell, of: tuple[str | None, str | None], stamps: tuple[str | None, ...], given: str
    ) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """Keys and stamps of the unprotected model's sets that have the same inputs where a defense that returns a
        sampler alone leaves them as they are. They are no ingredients: the images are the same in either way."""
        attack, defend = of
        delivered = delivers(self.built("defenses", cell.defense))
        if defend is None or "sampler" not in delivered or "model" in delivered:
            return ()
        sets = [(stamps, given)]
        if given == "triggered" and self.sampler(cell, "clean") == self.sampler(cell, given):
            sets.append(((None,), "clean"))
        return tuple((self.sample(cell, (attack, None), theirs, name), theirs) for theirs, name in sets)

    def sampler(self, cell: Cell, given: str) -> str:
        """The cell's sampler, or its utility sampler for the utility set. One that is an attacker's own reverse
        process is for inputs with a trigger (decoys too); clean inputs are sampled by its vanilla form, whoever's model
        it is."""
        if given == "utility":
            return cell.utility_sampler
        return (self.vanilla(cell.sampler) if given == "clean" else None) or cell.sampler

    def measure(self, cell: Cell, attack: str | None, defend: str | None, samples: dict[str, str]) -> str:
        learned = self.learned_by(attack, cell.trigger)
        spec = MeasureSpec(
            cell=cell, attacked=attack, defended=defend, samples=samples, metrics=self.metrics, learned_by=learned
        )
        parts = {
            "cell": {name: getattr(cell, name) for name in CELL},
            "model": self.identity("models", cell.model),
            "trigger": self.identity("triggers", cell.trigger),
            "target": self.identity("targets", cell.target),
            "metrics": self.metrics_identity(),
            "samples": samples,
            **self.learning(learned),
        }
        axes = ("model", "trigger", "target")
        plugins = [self.built(AXES[axis], getattr(cell, axis)) for axis in axes]
        plugins += [self.built("metrics", name) for name in self.metrics]
        needs = [k for k in dict.fromkeys([attack, defend, *samples.values()]) if k]
        label = f"measure {self._defended(cell)} on "
        return self.job(
            label + self._whose(cell, attack), needs, spec, parts, plugins,
            method=label + self._whose(cell, attack, seed=False), on_gpu=offers(plugins[0], PublishedArchitecture),
        )  # fmt: skip


class _Outliner(_Planner):
    """Plans without weights and without code. Its keys are names only."""

    def _digest(self, kind: str, spec: str) -> Identity:
        return {}

    def _code(self, stage: str, plugins: tuple[type, ...]) -> tuple[dict[str, str], str]:
        return {}, key_of({})

    def _origin(self, kind: str, spec: str) -> Origin:
        return Origin(PurePath(self.registry.distribution_of(kind, _name(spec))).name, "", "")

    def alone(self, cell: Cell) -> dict[str, Job]:
        """The jobs of one cell."""
        self.plan, self.known = Plan(), {}
        self.add(cell)
        return self.plan.jobs


class Outlines:
    """The jobs of single cells with all ingredients but weights and code, which are not read. The keys are names only.
    Specs that were met before are not built again."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._planners: dict[tuple[str, ...], _Outliner] = {}

    def jobs(self, cell: Cell, metrics: Sequence[str]) -> dict[str, Job]:
        """Key → job, in an order in which they could run. metrics: all standard ones for none."""
        asked = tuple(metrics) or standard(self.registry)
        if asked not in self._planners:
            self._planners[asked] = _Outliner(self.registry, asked, 1)
        return self._planners[asked].alone(cell)


def _reuse_key(cell: Cell, attack: str | None, defend: str | None) -> str:
    """The name of the model that a sample job loads: the defended, else the attacked, else the clean one."""
    return f"{cell.model} {attack} {defend}"


def _drawn(spec: SampleSpec) -> dict[str, Any]:
    """What decides the inputs of a sample job, beside its model and stamps."""
    return {"stream": spec.stream, "evaluation_seed": spec.evaluation_seed, "n": spec.n}


def _minor(library: str) -> str:
    """Major and minor version of an installed library."""
    return ".".join(importlib.metadata.version(library).split(".")[:2])


def is_clean(cell: Cell) -> bool:
    """Whether the cell's model is without a backdoor: attack `none`, fine-tuned or not."""
    return _name(cell.attack) == "none"


@cache
def _name(spec: str) -> str:
    """Which plugin a spec asks for."""
    return parse_spec(spec)[0]
