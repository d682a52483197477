"""Scores again, from the per-sample values that a record keeps: no model, no image, no plugin.

A score follows from its own values (a mean, or a share of distances under a threshold), from another score's values
(`asr@1e-3` from those of `asr`), or from other scores (`removal`, ratios). The rest (Fréchet distances, costs) has
nothing to be recomputed from, and only the manifest's digest speaks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from harness import roc

Scores = Mapping[str, Mapping[str, Any]]
Found = tuple[float, tuple[float, float] | None]
SHARES = ("asr", "asr_before", "clean_hits", "clean_hits_before", "false_triggers", "clean_model_hits")
PARTS = {  # a score that is one score over another, less another, ...
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
        if score.get("value") is None:
            continue
        found = again(name, scores)
        if found is None:
            left.append(name)
            continue
        done.append(name)
        wrong += _differences(name, score, found)
    return Outcome(tuple(done), tuple(left), tuple(wrong))


def again(name: str, scores: Scores) -> list[Found] | None:
    """What the score should be, None where the record does not say. Several candidates where rounding may decide."""
    score = scores[name]
    base, _, at = name.partition("@")
    values = samples(scores, base)
    if base in SHARES:
        return None if not values else _shares(values, threshold(at, scores))
    if name in SPECIAL:
        return SPECIAL[name](scores)
    if values:
        return [mean(values)] if base == name else None
    if "[" in name and f"{name.partition('[')[0]}[]" in PARTS:
        return _ratio(name, scores)
    return _counted(score)


def samples(scores: Scores, name: str) -> list[float]:
    """The values behind a score, those aside that do not count (null)."""
    return [value for value in scores.get(name, {}).get("per_sample") or () if value is not None]


def threshold(at: str, scores: Scores) -> float | None:
    """The threshold that a name ends with ("1e-3"); the gate's for none or for a word ("calibrated")."""
    try:
        return float(at)
    except ValueError:
        return scores.get("asr_threshold", {}).get("value")


def _shares(values: Sequence[float], tau: float | None) -> list[Found] | None:
    """Shares of values at most τ. Distances were compared in single or in double precision: either may be right."""
    import numpy as np

    if tau is None:
        return None
    exact = np.asarray(values, dtype=np.float64)
    counts = {int((exact <= tau).sum()), int((exact.astype(np.float32) <= np.float32(tau)).sum())}
    return [(k / len(exact), wilson(k, len(exact))) for k in sorted(counts)]


def mean(values: Sequence[float]) -> Found:
    """The mean with its 95 % t interval, None for fewer than two values or equal ones."""
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0:
        return float(x.mean()), None
    half = quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), (float(x.mean()) - half, float(x.mean()) + half)


def _ratio(name: str, scores: Scores) -> list[Found] | None:
    stem, _, judge = name.partition("[")
    above, below = (scores.get(part.replace("[]", f"[{judge}"), {}).get("value") for part in PARTS[f"{stem}[]"])
    return [(above / below, None)] if above is not None and below else None


def _removal(scores: Scores) -> list[Found] | None:
    found = again("asr", scores) if "asr" in scores else None
    if not found:
        return None
    return [(1 - value, None if ends is None else (1 - ends[1], 1 - ends[0])) for value, ends in found]


def _counted(score: Mapping[str, Any]) -> list[Found] | None:
    """A share with a Wilson interval but without values: it must be a whole count over n, with that very interval."""
    value, n, interval = score["value"], score.get("n") or 0, score.get("interval")
    if interval is None or not 0 <= value <= 1 or n < 2:
        return None
    k = round(value * n)
    return [(k / n, wilson(k, n))]


def _screened(scores: Scores) -> tuple[list[float], list[float]] | None:
    """What a screen said of n clean inputs and of n triggered ones."""
    values = scores.get("screen_auroc", {}).get("per_sample")
    return (values[: len(values) // 2], values[len(values) // 2 :]) if values else None


def _area(scores: Scores) -> list[Found] | None:
    """The area under the ROC curve."""
    said = _screened(scores)
    return None if said is None else [roc.auroc(*said)]


def _caught(scores: Scores) -> list[Found] | None:
    """TPR at an FPR of at most 1 %."""
    said = _screened(scores)
    return None if said is None else [_share(roc.at_fpr(*said, 0.01).tpr, len(said[1]))]


def _at_threshold(scores: Scores, which: str) -> list[Found] | None:
    """FPR or TPR at the defense's own threshold."""
    said, threshold = _screened(scores), scores.get("screen_threshold", {}).get("value")
    if said is None or threshold is None:
        return None
    return [_share(getattr(roc.at(*said, threshold), which), len(said[0]))]


def _share(value: float, n: int) -> Found:
    k = round(value * n)
    return k / n, wilson(k, n)


SPECIAL: dict[str, Callable[[Scores], list[Found] | None]] = {
    "removal": _removal,
    "screen_auroc": _area,
    "screen_tpr@1%fpr": _caught,
    "screen_fpr": partial(_at_threshold, which="fpr"),
    "screen_tpr": partial(_at_threshold, which="tpr"),
}


@cache
def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    from scipy.stats import binomtest

    low, high = binomtest(k, n).proportion_ci(method="wilson")
    return float(low), float(high)


@cache
def quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def _differences(name: str, score: Mapping[str, Any], found: Sequence[Found]) -> list[str]:
    """In words, how the stored score differs from every candidate; [] if one of them agrees."""
    said, ends = score["value"], score.get("interval")
    if not any(close(said, value) for value, _ in found):
        return [f"{name} says {said:.10g}, its values give {found[0][0]:.10g}"]
    for value, interval in found:
        if close(said, value) and _same_interval(ends, interval, abs(value)):
            return []
    return [f"{name} says the interval {_ends(ends)}, its values give {_ends(found[0][1])}"]


def _same_interval(a: Sequence[float] | None, b: Sequence[float] | None, size: float) -> bool:
    if a is None or b is None:
        return a is None and b is None
    return all(close(x, y, max(size, abs(b[0]), abs(b[1]))) for x, y in zip(a, b, strict=True))


def close(a: float, b: float, size: float | None = None) -> bool:
    """Whether two numbers agree to single precision, relative to `size`, the larger of the two."""
    scale = max(abs(a), abs(b)) if size is None else size
    return abs(a - b) <= 1e-12 + 1e-6 * scale


def _ends(interval: Sequence[float] | None) -> str:
    return "none" if interval is None else f"({interval[0]:.10g}, {interval[1]:.10g})"
