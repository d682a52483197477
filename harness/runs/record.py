"""A record: what a cell came to, with everything that its numbers depend on. Written once, read everywhere.

In JSON what is unmeasured is null; here it is NaN. A record that does not have this form is refused with the place of
the first thing that is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from harness.types import PUBLIC_ENCODERS, Cell, Score

Track = Literal["unconditional", "text-to-image"]
OF_TEXT = ("prompts", "words")  # knowledge that there is none of where a model takes no prompts


ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


def bare(spec: str) -> str:
    """The plugin name of a spec: "elijah" of "elijah(lr=0.1)"."""
    return spec.partition("(")[0]


def control_name(given: str) -> str:
    """What a defense is given in a control: "decoy trigger", "second decoy trigger", "opposite trigger"."""
    kind, _, place = given.partition("-")
    return f"{ORDINALS[int(place)]} {kind} trigger" if place else f"{kind} trigger"


def control_words(given: str) -> str:
    """What a defense is given in a control, with its article."""
    return f"{'the' if given in ('opposite', 'zero') else 'a'} {control_name(given)}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class JobFacts(_Frozen):
    """A job upstream of a record. ingredients: what its key is the sha256 of (`harness.runs.job.condensed`); None in
    records that were made before they were kept."""

    kind: Literal["attack", "control", "defend", "sample", "measure"]
    label: str
    ingredients: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A job without ingredients is written as before they were kept, so that its record keeps its seal."""
        return {name: value for name, value in dump(self).items() if value is not None}


class Attempt(BaseModel):
    """One attempt at a job: what the engine noted of it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    job: str


class Sampled(_Frozen):
    """How an image set was made: the sampler's spec, network evaluations for one image."""

    sampler: str | None = None
    nfe: int


class Source(_Frozen):
    """Where a plugin comes from: name and version of its distribution, the digest of the code that it depends on, and
    the commit of its own checkout, with whether that had changes (None where it lies in none)."""

    distribution: str
    version: str | None = None
    code: str | None = None
    commit: str | None = None
    dirty: bool | None = None


class TriedControl(_Frozen):
    """A control trigger on the attacked model: hits out of n images, and the cosine of its pattern with the trigger's
    (None for text)."""

    name: str
    hits: int
    n: int
    cosine: float | None = None


class Control(_Frozen):
    """The control trigger that the defense was given: `tried[chosen]`. inert: whether it activates the backdoor on at
    most 5 % of the images."""

    given: str
    chosen: int
    inert: bool
    tried: tuple[TriedControl, ...] = Field(min_length=1)


class Provenance(_Frozen):
    """Where a record's numbers come from.

    versions: of Python and of the libraries that compute. commit, dirty: of the harness's checkout, None for an
    installed copy. jobs: key → what it was. short: the cell's specs with only what differs from the defaults. delivers:
    what the defense declares. nfe: network evaluations for one image. sampled: for each image set. accelerators: names
    of the GPUs. notes: what the defense said of its own work. found_trigger: the text that it names. unchanged: whether
    it returned the very weights that it was given. control: the control trigger that it was given. sources: part of the
    cell → where its plugin comes from.
    """

    versions: dict[str, str | None] = Field(default_factory=dict)
    python: str | None = None
    machine: str | None = None
    processor: str | None = None
    platform: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    jobs: dict[str, JobFacts] = Field(default_factory=dict)
    short: dict[str, str] = Field(default_factory=dict)
    track: Track | None = None
    delivers: tuple[str, ...] = ("model",)
    metrics: tuple[str, ...] = ()
    nfe: int | None = None
    sampled: dict[str, Sampled] = Field(default_factory=dict)
    accelerators: tuple[str, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)
    found_trigger: str | None = None
    unchanged: bool = False
    control: Control | None = None
    sources: dict[str, Source] = Field(default_factory=dict)


class Record(_Frozen):
    """The outcome of one cell. key: of its measure job. error: why there are no scores. knowledge: what the defense
    needs, by the names of `Knowledge`. sheet: the contact sheet's path, relative to the folder of results."""

    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    cell: Cell
    scores: dict[str, Score] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None
    attempts: tuple[Attempt, ...] = ()
    knowledge: tuple[str, ...] = ()
    provenance: Provenance = Field(default_factory=Provenance)
    sheet: str | None = None

    @field_validator("scores", mode="before")
    @classmethod
    def _unmeasured(cls, value: Any) -> Any:
        """null as NaN, in values and in per-sample values."""
        if not isinstance(value, Mapping):
            return value
        return {name: _with_nan(score) if isinstance(score, Mapping) else score for name, score in value.items()}

    @property
    def given(self) -> tuple[str, ...]:
        """What the defense was given, by the names of `Knowledge`: what it needs and its model has."""
        absent = OF_TEXT if self.provenance.track == "unconditional" else ()
        return tuple(name for name in self.knowledge if name not in absent)

    @property
    def attack_jobs(self) -> set[str]:
        """The keys of the jobs that made the backdoored model."""
        return {key for key, job in self.provenance.jobs.items() if job.kind == "attack"}

    def value(self, score: str) -> float:
        """The value of a score, NaN where it is absent or unmeasured. "fd[]" finds the one `fd[<judge>]`."""
        found = self.scores.get(self.name_of(score))
        return math.nan if found is None else found.value

    def name_of(self, score: str) -> str:
        """The record's name for `score`: "fd[]" → "fd[digits-cnn]"; without brackets where there is none. Of several
        encoders it is the model's judge. A distance may have its former name, "fid[digits-cnn]"."""
        if not score.endswith("[]"):
            return score
        named = [name for name in self.scores if name.endswith("]")]
        names = [name for stem in _stems(score) for name in named if name.startswith(stem)]
        return min(names, key=_of_public_encoder, default=score[:-2])


@cache
def _stems(score: str) -> tuple[str, str]:
    """What a name begins with that "fd[]" stands for, and its former one: "fd[", "fid["."""
    return score[:-1], re.sub("^(f|k)d", r"\1id", score[:-1])


def _of_public_encoder(name: str) -> bool:
    """Whether a score is in the features of a public encoder."""
    return name.partition("[")[2].startswith(PUBLIC_ENCODERS)


@dataclass(frozen=True)
class Dropped:
    """A combination that the grid left out because it cannot be run, and why."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    cell: Cell
    reason: str


def _with_nan(score: Mapping[str, Any]) -> dict[str, Any]:
    kept = score.get("per_sample")
    found = dict(score)
    if "value" in found and found["value"] is None:
        found["value"] = math.nan
    if isinstance(kept, list | tuple) and None in kept:
        found["per_sample"] = [math.nan if x is None else x for x in kept]
    return found
