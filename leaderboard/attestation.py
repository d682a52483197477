"""What `bench reproduce --keep` found of a record: each score then and now."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from harness.runs.record import Provenance, Record
from harness.types import Score

COSTS = ("_wall_s", "_cpu_s", "_bytes")
EQUAL = 0.01  # relative difference up to which a number without an interval counts as the same


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


def compared(before: Mapping[str, Score], after: Mapping[str, float]) -> list[Again]:
    """Every measured score of a record but costs, then and now. after: the new values by score."""
    lines = []
    for name, score in sorted(before.items()):
        if math.isnan(score.value) or name.endswith(COSTS):
            continue
        low, high = score.interval or (None, None)
        again = after.get(name, math.nan)
        known, within = None if math.isnan(again) else again, is_within(score, again)
        lines.append(Again(score=name, recorded=score.value, low=low, high=high, again=known, within=within))
    return lines


def is_within(score: Score, again: float) -> bool:
    """Whether a new value lies in the recorded interval, or equals the recorded one where it has no interval."""
    if score.interval is None:
        return math.isclose(again, score.value, rel_tol=EQUAL, abs_tol=1e-9)
    low, high = score.interval
    return low <= again <= high or math.isclose(again, score.value, rel_tol=1e-9, abs_tol=1e-12)


def problems(seen: Attestation, record: Record) -> list[str]:
    """In words, what an attestation says of a record that is not so: it holds exactly the lines that its new values
    give beside the record's scores."""
    said = {line.score: line for line in seen.scores}
    wanted = compared(record.scores, {name: _value(line.again) for name, line in said.items()})
    found = []
    if sorted(line.score for line in seen.scores) != [line.score for line in wanted]:
        odd = sorted(set(said) ^ {line.score for line in wanted}) or sorted(said)
        found.append(f"does not attest exactly the scores of its record: {odd[0]}")
    wrong = [line.score for line in wanted if line.score in said and said[line.score] != line]
    if wrong:
        found.append(
            f"says of {wrong[0]} what its record and its new value do not give; run bench reproduce --keep again"
        )
    outside = [line.score for line in wanted if not line.within]
    if seen.within != (not outside):
        found.append(f"says within: {str(seen.within).lower()}, and {len(outside)} of its scores are not")
    elif outside:
        way = "run the row again, or remove both"
        found.append(f"says that the row was not reproduced: {', '.join(outside[:4])}; {way}")
    made = seen.provenance
    if made.dirty or made.commit is None or not re.fullmatch(r"[0-9a-f]{40}", made.commit):
        found.append("was made from no commit, or with uncommitted changes")
    return found


def _value(again: float | None) -> float:
    return math.nan if again is None else again
