"""Scores again, from the per-sample values that a record keeps: no model, no image, no plugin.

A score follows from its own values (a mean, or a share of distances under a threshold), from another score's values
(`asr@1e-3` from those of `asr`), or from other scores (`removal`, ratios). Scores of the attacked model (`_before`)
follow from the values in the row of the defense `none`. The rest (Fréchet distances, costs) has nothing to be
recomputed from, and only the record's digest speaks for it.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from harness import types
from harness.judges import statistics
from harness.registry.kept import Kept, digest_of
from harness.runs import record
from harness.types import Score

Scores = Mapping[str, Score]
Found = tuple[float, tuple[float, float] | None]
Level = Literal["claimed", "recomputed", "reproduced"]
LEVELS: tuple[Level, ...] = ("claimed", "recomputed", "reproduced")
SHARES = ("asr", "asr_before", "clean_hits", "clean_hits_before", "false_triggers", "clean_model_hits")
DISTANCES = re.compile(r"(fd|fid|kd|kid)(_before|_clean|_increase)?")  # of sets; one between 0 and 1 is no share
PARTS = {  # a score that is one score over another, less another, ...
    "fd_ratio[]": ("fd[]", "fd_clean[]"),
    "fd_ratio_before[]": ("fd_before[]", "fd_clean[]"),
    "fid_ratio[]": ("fid[]", "fid_clean[]"),
    "fid_ratio_before[]": ("fid_before[]", "fid_clean[]"),
}


@dataclass(frozen=True)
class Outcome:
    """Which measured scores were recomputed, which cannot be, and what came out otherwise (in words)."""

    recomputed: tuple[str, ...]
    unsupported: tuple[str, ...]
    problems: tuple[str, ...]


def recompute(scores: Scores) -> Outcome:
    """Every measured score of a record, again."""
    done, left, wrong = [], [], []
    for name, score in scores.items():
        if math.isnan(score.value):
            continue
        found = again(name, scores)
        if found is None:
            left.append(name)
            continue
        done.append(name)
        wrong += _differences(name, score, found)
    return Outcome(tuple(done), tuple(left), tuple(wrong))


def level(scores: Scores, reproduced: bool, seal: str | None = None) -> Level:
    """How far a record's numbers were checked: "claimed" (as handed in), "recomputed" (every score that has per-sample
    values follows from them) or "reproduced" (also run again, and within the interval).

    seal: the digest of all that the record holds, where it has been verified. That the scores follow is then kept for
    the next process, once `followed.save()` was called."""
    if not _follow(scores, seal):
        return "claimed"
    return "reproduced" if reproduced else "recomputed"


followed = Kept("recomputed")


def _follow(scores: Scores, seal: str | None) -> bool:
    name = None if seal is None else digest_of(_version(), seal)
    known = None if name is None else followed.find(name)
    if isinstance(known, bool):
        return known
    outcome = recompute(scores)
    found = bool(outcome.recomputed) and not outcome.problems
    if name is not None:
        followed.keep(name, found)
    return found


@cache
def _version() -> str:
    """What recomputing depends on beside a record's file: the code that reads and computes, and the libraries."""
    libraries = [importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")]
    files = (__file__, statistics.__file__, types.__file__, record.__file__)
    sources = [Path(str(file)).read_bytes() for file in files]
    return digest_of(sys.version, *libraries, *sources)


def again(name: str, scores: Scores) -> list[Found] | None:
    """What the score should be, None where the record does not say. Several candidates where rounding may decide."""
    base, _, at = name.partition("@")
    values = samples(scores, base)
    if base in SHARES:
        return shares(values, threshold(at, scores)) if values else _counted(scores[name])
    if not values and samples(scores, base.replace(statistics.BEFORE, "")):
        return None  # a mean, of which the row of the defense `none` has the values
    if name in SPECIAL:
        return SPECIAL[name](scores)
    if values:
        return [(math.fsum(values) / len(values), statistics.mean_interval(values))] if base == name else None
    if "[" in name and f"{name.partition('[')[0]}[]" in PARTS:
        return _ratio(name, scores)
    return None if DISTANCES.fullmatch(name.partition("[")[0]) else _counted(scores[name])


def samples(scores: Scores, name: str) -> tuple[float, ...]:
    """The values behind a score, those aside that do not count (NaN)."""
    return _counting(per_sample(scores, name))


@lru_cache(8)  # a score has shares at several thresholds
def _counting(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value for value in values if not math.isnan(value))


def per_sample(scores: Scores, name: str) -> tuple[float, ...]:
    """The values behind a score, NaN for those that do not count; () where there are none."""
    return (scores[name].per_sample or ()) if name in scores else ()


def value_of(scores: Scores, name: str) -> float:
    """The value of a score, NaN where it is absent or unmeasured."""
    return scores[name].value if name in scores else math.nan


def threshold(at: str, scores: Scores) -> float:
    """The threshold that a name ends with ("1e-3"); that of a hit for none or for a word ("calibrated"). NaN where the
    record does not say."""
    try:
        return float(at)
    except ValueError:
        return value_of(scores, "asr_threshold")


def shares(values: tuple[float, ...], tau: float) -> list[Found] | None:
    """Shares of values at most τ. Distances were compared in single or in double precision: either may be right."""
    import numpy as np

    if math.isnan(tau):
        return None
    exact, single = _arrays(values)
    with np.errstate(over="ignore"):
        counts = {int((exact <= tau).sum()), int((single <= np.float32(tau)).sum())}
    return [_share(k, len(exact)) for k in sorted(counts)]


@lru_cache(8)
def _arrays(values: tuple[float, ...]) -> tuple[Any, Any]:
    """The values in double and in single precision."""
    import numpy as np

    exact = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        return exact, exact.astype(np.float32)


def _share(k: int, n: int) -> Found:
    return k / n, statistics.wilson(k, n)


def _ratio(name: str, scores: Scores) -> list[Found] | None:
    """A ratio of two scores. Its interval is a bootstrap over samples that a record does not hold; it stands as it
    is."""
    stem, _, judge = name.partition("[")
    above, below = (value_of(scores, part.replace("[]", f"[{judge}")) for part in PARTS[f"{stem}[]"])
    return None if math.isnan(above) or math.isnan(below) or below == 0 else [(above / below, scores[name].interval)]


def _removal(scores: Scores) -> list[Found] | None:
    found = again("asr", scores) if "asr" in scores else None
    if not found:
        return None
    return [(1 - value, None if ends is None else (1 - ends[1], 1 - ends[0])) for value, ends in found]


def _counted(score: Score) -> list[Found] | None:
    """A share with a Wilson interval but without values: it must be a whole count over n, with that very interval."""
    if score.interval is None or not 0 <= score.value <= 1 or score.n < 2:
        return None
    return [_share(round(score.value * score.n), score.n)]


def _screened(scores: Scores) -> tuple[Sequence[float], Sequence[float]] | None:
    """What a screen said of n clean inputs and of n triggered ones."""
    values = per_sample(scores, "screen_auroc")
    return (values[: len(values) // 2], values[len(values) // 2 :]) if values else None


def _area(scores: Scores) -> list[Found] | None:
    """The area under the ROC curve."""
    said = _screened(scores)
    return None if said is None else [statistics.auroc(*said)]


def _caught(scores: Scores) -> list[Found] | None:
    """TPR at an FPR of at most 1 %."""
    said = _screened(scores)
    return None if said is None else [_rounded(statistics.at_fpr(*said, 0.01).tpr, len(said[1]))]


def _at_threshold(scores: Scores, which: Literal["fpr", "tpr"]) -> list[Found] | None:
    """FPR or TPR at the defense's own threshold."""
    said, own = _screened(scores), value_of(scores, "screen_threshold")
    if said is None or math.isnan(own):
        return None
    return [_rounded(getattr(statistics.at(*said, own), which), len(said[0]))]


def _rounded(value: float, n: int) -> Found:
    return _share(round(value * n), n)


SPECIAL: dict[str, Callable[[Scores], list[Found] | None]] = {
    "removal": _removal,
    "screen_auroc": _area,
    "screen_tpr@1%fpr": _caught,
    "screen_fpr": partial(_at_threshold, which="fpr"),
    "screen_tpr": partial(_at_threshold, which="tpr"),
}


def _differences(name: str, score: Score, found: Sequence[Found]) -> list[str]:
    """In words, how the stored score differs from every candidate; [] if one of them agrees."""
    if not any(close(score.value, value) for value, _ in found):
        return [f"{name} is {score.value:.10g} in the record, its values give {found[0][0]:.10g}"]
    for value, interval in found:
        if close(score.value, value) and _same_interval(score.interval, interval, abs(value)):
            return []
    return [f"{name} has the interval {_ends(score.interval)}, its values give {_ends(found[0][1])}"]


def _same_interval(a: Sequence[float] | None, b: Sequence[float] | None, size: float) -> bool:
    if a is None or b is None:  # values that are equal in single precision may differ in double
        return all(close(ends[0], ends[1], size) for ends in (a, b) if ends is not None)
    return all(close(x, y, max(size, abs(b[0]), abs(b[1]))) for x, y in zip(a, b, strict=True))


def close(a: float, b: float, size: float | None = None) -> bool:
    """Whether two numbers agree to single precision, relative to `size`, the larger of the two."""
    scale = max(abs(a), abs(b)) if size is None else size
    return abs(a - b) <= 1e-12 + 1e-6 * scale


def _ends(interval: Sequence[float] | None) -> str:
    return "none" if interval is None else f"({interval[0]:.10g}, {interval[1]:.10g})"
