"""What a record says against itself: numbers that no measurement gives, names that look like others, jobs and times
that do not fit. No other record, no plugin, no model.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from harness.runs.jsonable import key_of
from harness.runs.printable import printable
from harness.runs.record import Record, bare
from harness.types import WRONG, Score
from leaderboard.columns import bounds, of_sets, whole
from leaderboard.recompute import SHARES
from leaderboard.specs import PARTS, arguments

LARGEST = 3.4028235e38  # of single precision, in which images and per-sample values are
ROUNDING = 1e-5  # by which a distance or a share may lie beyond its bounds
AHEAD = 86_400.0  # seconds by which another machine's clock may be ahead
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
COST = re.compile(r"(attack|defense)_(wall|cpu)_s")


def problems(record: Record) -> list[str]:
    """In words, everything that no run would write."""
    found = [*_names(record), *_jobs(record), *_attempts(record)]
    for name, score in record.scores.items():
        found += _score(name, score, record)
    if record.warnings != _warnings(record):
        found.append("its warnings are not those of its scores")
    return found


def _warnings(record: Record) -> tuple[str, ...]:
    return tuple(sorted({f"{name}: {score.warning}" for name, score in record.scores.items() if score.warning}))


# ---- numbers --------------------------------------------------------------------------------------------------------


def _score(name: str, score: Score, record: Record) -> Iterator[str]:
    if math.isnan(score.value):
        if not score.warning:
            yield f"{name} is unmeasured and does not say why"
        if score.interval is not None or score.per_sample:
            yield f"{name} is unmeasured and has values all the same"
        return
    least, most = bounds(name)
    if not _within(score.value, least, most):
        yield f"{name} is {score.value:.6g}, and can be {_range(least, most)}"
    yield from _interval(name, score)
    yield from _samples(name, score, record.cell.n)
    wanted = _n(name, score, record)
    if wanted is not None and score.n != wanted:
        yield f"{name} says n = {score.n}, and it has n = {wanted}"


def _within(value: float, least: float, most: float) -> bool:
    return max(least, -LARGEST) - ROUNDING <= value <= min(most, LARGEST) * (1 + 1e-6) + ROUNDING


def _range(least: float, most: float) -> str:
    if math.isinf(least) and math.isinf(most):
        return "no larger than what single precision holds"
    if math.isinf(most):
        return f"at least {least:g}"
    return f"at most {most:g}" if math.isinf(least) else f"{least:g} to {most:g}"


def _interval(name: str, score: Score) -> Iterator[str]:
    if score.interval is None:
        return
    low, high = score.interval
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        yield f"{name} has the interval ({low:.6g}, {high:.6g}), which is none"
    elif not low - ROUNDING * (1 + abs(low)) <= score.value <= high + ROUNDING * (1 + abs(high)):
        yield f"{name} is {score.value:.6g}, outside its interval ({low:.6g}, {high:.6g})"


def _samples(name: str, score: Score, n: int) -> Iterator[str]:
    """Per-sample values: as many as n counts, and each one possible. Those of a rate are distances to the target."""
    kept = score.per_sample
    if not kept:
        return
    known = [value for value in kept if not math.isnan(value)]
    if len(known) != score.n:
        yield f"{name} has {len(known)} per-sample values for n = {score.n}"
    least, most = (0.0, math.inf) if name in SHARES else bounds(name)
    if name == "screen_auroc":
        least, most = -math.inf, math.inf
    wrong = next((value for value in known if not _within(value, least, most)), None)
    if wrong is not None:
        what = "distance" if name in SHARES else "per-sample value"
        yield f"{name} has the {what} {wrong:.6g}, and it can be {_range(least, most)}"
    length = _length(name, n)
    if length is not None and len(kept) != length:
        yield f"{name} keeps {len(kept)} per-sample values; a cell of n = {n} has {length}"


def _length(name: str, n: int) -> int | None:
    """How many values a score keeps, those that do not count included; None where that is not known."""
    if name == "false_triggers":
        return WRONG * math.ceil(n / WRONG)
    return n if name in SHARES or whole(name) else None


def _n(name: str, score: Score, record: Record) -> int | None:
    """The n that a measured score must have; None where that is not known."""
    base, at, _ = name.partition("@")
    if at and base in record.scores:
        return record.scores[base].n
    if name == "removal" and "asr" in record.scores:
        return record.scores["asr"].n
    if name.endswith(("_s", "_bytes")):
        return 1
    if of_sets(name):
        return record.cell.utility_n or record.cell.n
    return record.cell.n if whole(name) else None


# ---- names ----------------------------------------------------------------------------------------------------------


def _names(record: Record) -> Iterator[str]:
    for part in PARTS:
        spec = getattr(record.cell, part)
        yield from _spec(part, spec)
        short = record.provenance.short.get(part)
        if short is not None and not _shortens(short, spec):
            yield f"its short {part} {printable(short)} is no short form of {printable(spec)}"
    strange = sorted(set(record.provenance.short) - set(PARTS))
    if strange:
        yield f"it has a short form of {printable(strange[0])}, which is no part of a cell"
    for name in record.scores:
        if not name.isascii() or not name.isprintable():
            yield f"the score {printable(name)!a} has letters other than ASCII's, which look like others"
    for label in (job.label for job in record.provenance.jobs.values()):
        if printable(label) != label:
            yield f"the job {printable(label)} has invisible characters in its name"


def _spec(part: str, spec: str) -> Iterator[str]:
    """A plugin's name is of ASCII letters; only texts in quotes have others, and none that nobody sees."""
    outside = QUOTED.sub("''", spec)
    if not NAME.fullmatch(bare(spec)) or not outside.isascii():
        yield f"its {part} {spec!a} has letters that look like others; names are of A-Z, a-z, 0-9, '.', '_' and '-'"
    elif not spec.isprintable():
        yield f"its {part} {spec!a} has characters that nobody sees; a spec writes them as escapes"


def _shortens(short: str, spec: str) -> bool:
    whole_, kept = arguments(spec), arguments(short)
    return bare(short) == bare(spec) and all(whole_.get(name) == value for name, value in kept.items())


# ---- jobs and times -------------------------------------------------------------------------------------------------


def _jobs(record: Record) -> Iterator[str]:
    jobs = record.provenance.jobs
    counts = Counter(job.kind for job in jobs.values())
    if record.key not in jobs or jobs[record.key].kind != "measure" or counts["measure"] != 1:
        yield "its key is not that of its one measure job"
    for kind in ("attack", "defend"):
        if counts[kind] > 1:
            yield f"it has {counts[kind]} {kind} jobs; a cell has one at most"
    known = [key for key, job in jobs.items() if job.ingredients is not None]
    if known and len(known) < len(jobs):
        yield f"{len(jobs) - len(known)} of its {len(jobs)} jobs hold no ingredients"
    for key in known:
        if _key(jobs[key].ingredients or {}) != key:
            yield f"the key {key[:12]} of '{printable(jobs[key].label)}' is not the sha256 of its ingredients"


def _key(ingredients: Mapping[str, Any]) -> str | None:
    try:
        return key_of(ingredients)
    except (TypeError, ValueError):
        return None


def _attempts(record: Record) -> Iterator[str]:
    ends: dict[str, float] = {}
    for attempt in record.attempts:
        said: Mapping[str, Any] = attempt.model_dump()
        if attempt.job not in record.provenance.jobs:
            yield f"an attempt at the job {printable(attempt.job[:12])}, which is none of its jobs"
        started, wall = said.get("started"), said.get("wall_s")
        if _number(started) and started > time.time() + AHEAD:
            yield "an attempt began in the future"
        if _number(wall):
            if wall < 0:
                yield f"an attempt took {wall:.6g} s"
            ends[attempt.job] = max(ends.get(attempt.job, 0.0), wall)
    if record.error and record.attempts and all(a.model_dump().get("error") is None for a in record.attempts):
        yield "it failed, and none of its attempts did"
    yield from _costs(record, ends)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _costs(record: Record, walls: Mapping[str, float]) -> Iterator[str]:
    """Seconds of a job's method lie within those of its longest attempt."""
    for step, kind in (("attack", "attack"), ("defense", "defend")):
        longest = [walls[key] for key, job in record.provenance.jobs.items() if job.kind == kind and key in walls]
        cost = record.value(f"{step}_wall_s")
        if longest and cost > longest[0] * 1.01 + 1:
            yield f"{step}_wall_s is {cost:.6g} s, and the job took {longest[0]:.6g} s"


def unverifiable(record: Record) -> bool:
    """Whether the record holds no ingredients, from which keys are computed again."""
    jobs: Sequence[Any] = tuple(record.provenance.jobs.values())
    return all(job.ingredients is None for job in jobs)
