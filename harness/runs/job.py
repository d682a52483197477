"""One unit of work and the ways it can fail: data that plan, engine and records share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from harness.runs.jsonable import key_of
from harness.types import Cell, Stream

Kind = Literal["attack", "control", "defend", "sample", "measure"]


def condensed(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """A job's ingredients with one digest in the place of those of all modules of its code: what the job's key is the
    sha256 of, and what a record keeps, so that anybody can compute the key again."""
    return {**ingredients, "code": key_of(ingredients["code"])}


class Failure(StrEnum):
    """Why an attempt, or a job, has no result. What follows from each: harness/engine/failures.py."""

    plugin = "plugin error"  # the job's code raised, or left without a result
    nan = "nan"  # a loss or an image became NaN or infinite
    killed = "killed"  # ended by a signal that was not ours, or its machine was lost
    timeout = "timeout"  # longer than the wall limit
    stall = "stall"  # no event for too long
    memory = "memory"  # over the limit of main memory
    oom = "oom"  # CUDA out of memory
    environment = "environment"  # disk, driver, network or a library: nothing that the job did
    data = "data"  # something it reads is damaged, missing or refused
    skipped = "skipped"  # something it needs failed
    interrupted = "interrupted"  # stopped by the user or by --max-hours, or its driver died


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """Implant a backdoor. All parts are canonical specs.

    In the specs of later jobs `learned_by` is the attack job that learned the pattern of their triggers, None where
    these follow from their specs.
    """

    model: str
    attack: str
    trigger: str
    target: str
    seed: int
    plugin_files: tuple[str, ...] = ()
    kind: Literal["attack"] = "attack"


@dataclass(frozen=True, kw_only=True)
class ControlSpec:
    """Choose the control trigger `given` for the backdoor of job `attacked` (None: for the clean model). clean: the key
    of the clean model's images of the same inputs. n: inputs on which candidates are tried."""

    model: str
    trigger: str
    target: str
    sampler: str
    given: str
    seed: int
    n: int
    evaluation_seed: int
    clean: str
    attacked: str | None = None
    learned_by: str | None = None
    plugin_files: tuple[str, ...] = ()
    kind: Literal["control"] = "control"


@dataclass(frozen=True, kw_only=True)
class DefendSpec:
    """Run a defense on the model of job `attacked` (None: on the clean one). trigger: the spec of the trigger that the
    defender is given, None where it is given none. control: the job that chose a control for it, which the defender is
    given instead. screened, n, evaluation_seed: the trigger, the number of inputs of
    each kind that a screen is asked about, and what draws them; None where the defense delivers no screen. avoided: the
    trigger that the defender's prompts do not carry, None where ordinary prompts do not carry it anyway."""

    model: str
    defense: str
    seed: int
    attacked: str | None = None
    trigger: str | None = None
    control: str | None = None
    screened: str | None = None
    n: int = 0
    evaluation_seed: int = 0
    avoided: str | None = None
    learned_by: str | None = None
    plugin_files: tuple[str, ...] = ()
    kind: Literal["defend"] = "defend"


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Sample n inputs with each of `stamps` (None: as they are), or with the trigger that job `found_by` found. stream,
    evaluation_seed: what draws the inputs. avoided: the trigger that their prompts do not carry before they are
    stamped, None where ordinary prompts do not carry it anyway. beside: keys and stamps of the sets of the unprotected
    model, which may be finished and have the same inputs in the end."""

    model: str
    sampler: str
    n: int
    stream: Stream = "evaluation"
    evaluation_seed: int = 0
    attacked: str | None = None
    defended: str | None = None
    stamps: tuple[str | None, ...] = ()
    found_by: str | None = None
    avoided: str | None = None
    learned_by: str | None = None
    beside: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    plugin_files: tuple[str, ...] = ()
    kind: Literal["sample"] = "sample"


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """Compute the metrics of a cell. samples: "who/given" → key of the image set."""

    cell: Cell
    metrics: tuple[str, ...]
    samples: Mapping[str, str]
    attacked: str | None = None
    defended: str | None = None
    learned_by: str | None = None
    plugin_files: tuple[str, ...] = ()
    kind: Literal["measure"] = "measure"

    @property
    def model(self) -> str:
        return self.cell.model


JobSpec = AttackSpec | ControlSpec | DefendSpec | SampleSpec | MeasureSpec


@dataclass(frozen=True)
class Job:
    """What a process does: it publishes one artifact under `key`.

    needs: keys of artifacts that must exist first. spec: all that the process is given; it crosses as JSON. An engine
    that calls another `execute` than ours takes any mapping. method: jobs of one method differ in their seed alone and
    are expected to take as long as each other. estimate: seconds, for the order of work and for `bench plan`.
    reuse_key: a name for what the job loads and only reads; a process that has done a job of that name may be given
    this one next. None: a process of its own. on_gpu: whether it computes on a GPU where it has one. ingredients: what
    went into the key; kept with the artifact.
    """

    key: str
    kind: Kind
    label: str
    needs: tuple[str, ...]
    spec: JobSpec | Mapping[str, Any]
    estimate: float = 10.0
    reuse_key: str | None = None
    method: str = ""
    on_gpu: bool = True
    ingredients: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", self.label)
