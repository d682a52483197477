"""What `bench reproduce --keep` found of a record: each score then and now."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from harness.runs.record import Provenance


class Again(BaseModel):
    """A score then and now. within: in its interval, or equal to 1 % where it has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: str
    recorded: float
    low: float | None
    high: float | None
    again: float | None
    within: bool


class Attestation(BaseModel):
    """The outcome of running a record's cell again. same_key: whether code, weights and plugins were still the same.
    provenance: of the run that attests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    within: bool
    same_key: bool
    scores: tuple[Again, ...]
    provenance: Provenance
