"""Rehearsals: the distinct jobs of a suite, each run once in short form, and what they say of the whole suite.

Jobs that cost the same are rehearsed once. What decides the cost is the kind of the job, the model, and the names and
parameters of its method and its sampler. Lengths of loops do not count, because the time is linear in them. Learning
rates, poison rates and other fractions do not count either, except that 0 and 1 often switch something off.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from harness.capabilities import CheckpointedModel, MeasuredWork, delivers, offers
from harness.registry import Registry, parse_spec
from harness.runs import estimates
from harness.runs.job import (
    AttackSpec,
    ControlSpec,
    DefendSpec,
    Job,
    JobSpec,
    MeasureSpec,
    SampleSpec,
)
from harness.runs.jsonable import key_of, to_jsonable
from harness.runs.planning import Plan
from harness.runs.shortened import loops_of
from harness.runs.store import Store

BATCH = 50  # images of a rehearsed image set, one batch of a sampler
FEW = 16  # the same without a GPU
EXECUTE = "harness.runs.shortened:execute"


@dataclass(frozen=True)
class Group:
    """Jobs of one cost. signature: what decides it, as a digest. first: the key of the job that is rehearsed. lengths:
    of the loops of its method, by field. members: keys of all of them."""

    signature: str
    first: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """What a rehearsal of a job found, on one device. seconds: of the whole job, lowest, likely and highest. loops: its
    outermost loops, (phase, passes, seconds of each pass that was taken). host_bytes, device_bytes: the most that the
    rehearsal held. left_out_bytes: what the whole job holds beyond that."""

    label: str
    code: str
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    wall_s: float = 0.0
    loops: tuple[Mapping[str, Any], ...] = ()
    rows: int | None = None
    host_bytes: float = 0.0
    device_bytes: float | None = None
    left_out_bytes: float = 0.0
    error: str | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def main(self) -> Mapping[str, Any] | None:
        """The loop that takes longest."""
        return max(self.loops, key=lambda loop: loop["whole_s"], default=None)

    def pass_s(self) -> float | None:
        """Seconds of one pass of that loop, the last that was taken."""
        main = self.main
        return None if main is None else main["seconds"][-1]


# ---- groups ---------------------------------------------------------------------------------------------------------


class Costs:
    """What decides the cost of the jobs of a plan."""

    def __init__(self, jobs: Mapping[str, Job], registry: Registry) -> None:
        self.jobs, self.registry = jobs, registry
        self.built = cache(registry.build)
        self.signature = cache(self._signature)

    def spec(self, key: str) -> Any:
        return self.jobs[key].spec

    def _signature(self, key: str) -> str:
        return key_of({"rehearsed": to_jsonable(self.parts(self.spec(key)))})

    def parts(self, spec: JobSpec) -> list[Any]:
        """What decides the cost of a job, in JSON types."""
        match spec:
            case AttackSpec():
                return ["attack", spec.model, self.method("attacks", spec.attack), _names(spec.trigger, spec.target)]
            case ControlSpec():
                given = spec.given.partition("-")[0]
                names, sampler = _names(spec.trigger, spec.target), self.method("samplers", spec.sampler)
                return ["control", spec.model, names, sampler, given]
            case DefendSpec():
                method = self.method("defenses", spec.defense)
                short = not loops_of(self.built("defenses", spec.defense))
                control = self.spec(spec.control).given.partition("-")[0] if spec.control and short else None
                return ["defend", spec.model, method, _names(spec.trigger, spec.screened), control]
            case SampleSpec():
                defense = None if spec.defended is None else self.spec(spec.defended).defense
                wraps = defense is not None and "sampler" in delivers(self.built("defenses", defense))
                around = self.method("defenses", defense) if defense is not None and wraps else None
                return ["sample", spec.model, self.method("samplers", spec.sampler), around, spec.found_by is not None]
            case MeasureSpec():
                cell = spec.cell
                delivered = list(delivers(self.built("defenses", cell.defense)))
                return ["measure", cell.model, _names(cell.trigger, cell.target), list(spec.metrics), delivered]

    def method(self, kind: str, spec: str) -> list[Any]:
        """Name and parameters of a method or a sampler, without what its time is linear in and without fractions."""
        made = self.built(kind, spec)
        loops = {*loops_of(made), "steps"}
        values = {f.name: getattr(made, f.name) for f in fields(made) if f.init and f.name not in loops}
        steps = getattr(made, "steps", None)
        return [made.name, {name: _switch(value) for name, value in values.items()}, steps == 0]

    def groups(self) -> list[Group]:
        """The groups of all jobs, in the order of the plan."""
        found: dict[str, list[str]] = {}
        for key in self.jobs:
            found.setdefault(self.signature(key), []).append(key)
        return [Group(signature, self.first(keys), tuple(keys)) for signature, keys in found.items()]

    def first(self, keys: list[str]) -> str:
        """The job of a group that runs most of the code: inputs with a trigger, and measurements of most image sets."""

        def worth(key: str) -> tuple[int, int, int]:
            spec = self.spec(key)
            if isinstance(spec, SampleSpec):
                return int(any(spec.stamps)), int(spec.defended is None), -len(spec.stamps)
            return len(spec.samples) if isinstance(spec, MeasureSpec) else 0, 0, 0

        return max(keys, key=worth)

    def lengths(self, key: str) -> dict[str, int]:
        """The lengths of the loops of a job's method by field; of an image set, how many network evaluations it takes;
        of a measurement, its images."""
        spec = self.spec(key)
        if isinstance(spec, SampleSpec):
            return {"evaluations": spec.n * max(1, len(spec.stamps)) * self.built("samplers", spec.sampler).nfe}
        if isinstance(spec, MeasureSpec):
            return {"images": spec.cell.n}
        if isinstance(spec, AttackSpec | DefendSpec):
            kind, name = ("attacks", spec.attack) if isinstance(spec, AttackSpec) else ("defenses", spec.defense)
            made = self.built(kind, name)
            return {name: length for name in loops_of(made) if isinstance(length := getattr(made, name), int)}
        return {}


def _names(*specs: str | None) -> list[str | None]:
    return [None if spec is None else parse_spec(spec)[0] for spec in specs]


def _switch(value: Any) -> Any:
    """A parameter, or of a fraction only whether it is 0, 1 or another."""
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else "a fraction"
    return [_switch(each) for each in value] if isinstance(value, tuple) else value


# ---- the jobs of a rehearsal ----------------------------------------------------------------------------------------


def short_jobs(plan: Plan, costs: Costs, groups: Iterable[Group], gpu: bool, rows: int) -> dict[str, tuple[Group, Job]]:
    """Key → (group, job) of one job a group, which needs those of other groups in place of its own needs.

    rows: of a network at once, 0 for a number by its work, -1 for all. Jobs come before those that need them.
    """
    group_of = {member: group for group in groups for member in group.members}
    needed = {group_of[need].first for group in group_of.values() for need in plan.jobs[group.first].needs}
    made: dict[str, tuple[Group, Job]] = {}
    keys: dict[str, str] = {}

    def take(group: Group) -> str:
        if group.first not in keys:
            job = plan.jobs[group.first]
            mine = {need: take(group_of[need]) for need in _needs(job.spec, job.needs)}
            spec, images = _short(job.spec, mine, BATCH if gpu else FEW)
            asked = {"job": to_jsonable(spec), "keep": group.first in needed or job.kind != "defend",
                     "images": images, "rows": rows}  # fmt: skip
            key = key_of({"rehearsal": asked, "code": code_of(job), "gpu": gpu})
            keys[group.first] = key
            shares = _shared(spec) if isinstance(spec, SampleSpec) else None
            made[key] = (
                group,
                Job(
                    key,
                    job.kind,
                    job.label,
                    tuple(dict.fromkeys(mine.values())),
                    asked,
                    60.0,
                    shares,
                    on_gpu=job.on_gpu,
                ),
            )
        return keys[group.first]

    for group in dict.fromkeys(group_of.values()):
        take(group)
    return made


def _needs(spec: object, needs: Iterable[str]) -> Iterator[str]:
    yield from needs
    if isinstance(spec, ControlSpec):
        yield spec.clean


def _shared(spec: SampleSpec) -> str:
    return f"{spec.model} {spec.attacked} {spec.defended}"


def _short(spec: Any, keys: Mapping[str, str], batch: int) -> tuple[Any, float]:
    """The spec with few images and with the keys of a rehearsal, and how many times more images the job has."""
    renamed = {
        name: keys[key]
        for name in ("attacked", "defended", "control", "clean", "found_by", "learned_by")
        if (key := getattr(spec, name, None)) is not None and key in keys
    }
    spec = replace(spec, **renamed)
    match spec:
        case SampleSpec():
            stamps = max(1, len(spec.stamps))
            n = max(1, min(spec.n, batch // stamps))
            return replace(spec, n=n, beside=()), spec.n / n  # what it costs where the inputs did change
        case MeasureSpec():
            n = min(spec.cell.n, batch)
            samples = {name: keys[key] for name, key in spec.samples.items()}
            cell = replace(spec.cell, n=n, utility_n=min(spec.cell.utility_n, n))
            return replace(spec, cell=cell, samples=samples), spec.cell.n / n
        case ControlSpec() | DefendSpec():
            n = min(spec.n, batch)
            return replace(spec, n=n), spec.n / n if n else 1.0
    return spec, 1.0


def code_of(job: Job) -> str:
    """A digest of the code that a job runs."""
    return key_of({"code": job.ingredients.get("code", {})})


# ---- figures --------------------------------------------------------------------------------------------------------


def device(gpu: bool, threads: int) -> str:
    """What figures are kept under: this machine and its GPU, or the threads of its processor."""
    if gpu:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"
        return _slug(f"{socket.gethostname()} {name}")
    return _slug(f"{socket.gethostname()} cpu {threads} threads")


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-").lower()


def figure(original: Job, costs: Costs, manifest: Mapping[str, Any] | None, error: str | None) -> Figure:
    """The figure of a rehearsed job, by the manifest of its artifact. original: the job of the suite."""
    lengths = costs.lengths(original.key)
    if manifest is None:
        return Figure(original.label, code_of(original), error=error or "failed", lengths=lengths)
    told = dict(manifest["facts"]["rehearsal"])
    seconds = told.pop("seconds")
    cost = manifest["facts"].get("cost") or {}
    host = max(told.pop("host_bytes"), cost.get("peak_rss_bytes") or 0)
    return Figure(
        original.label, code_of(original), (seconds[0], seconds[1], seconds[2]), told["wall_s"], tuple(told["loops"]),
        told["rows"], host, told["device_bytes"], told["left_out_bytes"], None, lengths,
    )  # fmt: skip


def read_figures(store: Store, name: str) -> dict[str, Figure]:
    """Signature → figure of one device; figures of another form are passed over."""
    found = {}
    for signature, told in store.rehearsal(name).items():
        try:
            told = {**told, "seconds": tuple(told["seconds"]), "loops": tuple(told["loops"])}
            found[signature] = Figure(**told)
        except (TypeError, KeyError):
            continue
    return found


def write_figures(store: Store, name: str, found: Mapping[str, Figure]) -> None:
    store.write_rehearsal(name, to_jsonable(dict(found)))


def expected(found: Figure, lengths: Mapping[str, int]) -> tuple[float, float, float]:
    """Seconds of a job of the figure's group whose loops have other lengths: lowest, likely, highest."""
    low, middle, high = found.seconds
    spread = (low / middle, 1.0, high / middle) if middle else (1.0, 1.0, 1.0)
    loops = sum(loop["whole_s"] for loop in found.loops)
    seconds = middle
    for name, length in lengths.items():
        before = found.lengths.get(name)
        if not before or before == length:
            continue
        if name in ("evaluations", "images"):
            seconds = (middle - loops) + loops * length / before if loops else middle * length / before
        for loop in found.loops:
            if loop["total"] == before:
                seconds += (length - before) * loop["seconds"][-1]
    return seconds * spread[0], seconds, seconds * spread[2]


@dataclass(frozen=True)
class Expected:
    """What a rehearsal says of a job. seconds: lowest, likely, highest. device: on which it was rehearsed."""

    seconds: tuple[float, float, float]
    device: str
    figure: Figure


def predicted(
    jobs: Mapping[str, Job], registry: Registry, store: Store, only: str | None = None
) -> dict[str, Expected]:
    """What rehearsals say of jobs, by key, for those of which they do; of several devices the fastest counts. only: the
    name of one device."""
    known = {name: read_figures(store, name) for name in store.rehearsals() if only in (None, name)}
    if not any(known.values()):
        return {}
    costs, found = Costs(jobs, registry), {}
    for key in jobs:
        signature, lengths = costs.signature(key), costs.lengths(key)
        every = [
            Expected(expected(figures[signature], lengths), name, figures[signature])
            for name, figures in known.items()
            if signature in figures and figures[signature].error is None
        ]
        if every:
            found[key] = min(every, key=lambda each: each.seconds[1])
    return found


def lines(said: Mapping[str, Expected], missing: Iterable[str]) -> list[str]:
    """In words, what rehearsals say of the jobs that are still to be computed, a line for each device."""
    wanted = [said[key] for key in missing if key in said]
    told = []
    for name in sorted({each.device for each in wanted}):
        low, likely, high = (sum(each.seconds[k] for each in wanted if each.device == name) / 3600 for k in range(3))
        count = sum(each.device == name for each in wanted)
        told.append(f"* rehearsed on {name}: {count} jobs, about {likely:,.1f} hours ({low:,.1f} to {high:,.1f})")
    return told


# ---- what fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Bytes that a job needs in its suite, of main memory and of a GPU's (None without one), and what is there."""

    host: float
    gpu: float | None
    host_here: float
    gpu_here: float | None

    @property
    def fits(self) -> bool:
        return self.host <= self.host_here and (self.gpu is None or self.gpu <= (self.gpu_here or 0.0))


def room(found: Figure, key: str, costs: Costs, host_here: float, gpu_here: float | None) -> Room:
    """What a job needs in its suite: what its rehearsal held, the rows and moments that were left out, and the images
    that were."""
    from harness.judges.evidence import MOST_HELD

    spec = costs.spec(key)
    model = costs.built("models", spec.model)
    more = 0.0
    if offers(model, MeasuredWork):
        pixels = 4.0 * 3 * model.side**2
        if isinstance(spec, AttackSpec | DefendSpec):
            more = estimates.data_bytes(spec, model, costs.registry)
        elif isinstance(spec, SampleSpec):
            stamps = max(1, len(spec.stamps))
            more = pixels * spec.n * stamps * (1.5 if stamps == 1 else 2.0)
        elif isinstance(spec, MeasureSpec):
            sets = [costs.spec(key).n * max(1, len(costs.spec(key).stamps)) for key in set(spec.samples.values())]
            more = min(pixels * sum(sets), MOST_HELD + 2 * pixels * max(sets))
    if found.device_bytes is not None:
        return Room(found.host_bytes + more, found.device_bytes + found.left_out_bytes, host_here, gpu_here)
    return Room(found.host_bytes + found.left_out_bytes + more, None, host_here, None)


def remedy(key: str, costs: Costs) -> str:
    """What helps a job that does not fit."""
    spec = costs.spec(key)
    model = costs.built("models", spec.model)
    if isinstance(spec, AttackSpec | DefendSpec):
        saves = offers(model, CheckpointedModel) and not model.checkpointing
        return f"use a GPU with more memory, a smaller batch{f' or {model.name}(checkpointing=True)' if saves else ''}"
    if isinstance(spec, SampleSpec | MeasureSpec):
        return "use a machine with more memory, or a smaller n"
    return "use a machine with more memory"


def gpu_memory() -> float | None:
    """Bytes of memory of the first GPU; None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
