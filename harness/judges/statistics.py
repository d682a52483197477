"""Rates, means and ROC curves, each with its 95 % interval.

For a detector, higher scores mean "positive", and it flags values strictly above its threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from harness.types import Score

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

Z = 1.959964  # standard normal quantile of a 95 % interval
BEFORE = "_before"  # ends the names of scores of the attacked model, which are those of the defense `none`
DIGITS = 4  # significant ones of the per-sample values of a mean


@dataclass(frozen=True)
class Point:
    """One point of a ROC curve: flag above `threshold`. tpr and fpr are shares in [0, 1]."""

    threshold: float
    tpr: float
    fpr: float


def auroc(negatives: Sequence[float], positives: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The area under the ROC curve, 0..1, and its 95 % interval. Raises ValueError if either sequence is empty.

    The interval is Newcombe's (Statistics in Medicine 2006, method 5): all areas θ within 1.96 standard errors. The
    error is Hanley & McNeil's at θ itself, so an area of 1 has an interval too.
    """
    from sklearn.metrics import roc_auc_score

    if not len(negatives) or not len(positives):
        raise ValueError("an AUROC needs scores of both kinds")
    labels = [0] * len(negatives) + [1] * len(positives)
    area = float(roc_auc_score(labels, [*negatives, *positives]))
    return area, _area_interval(area, len(negatives), len(positives))


def _area_interval(area: float, m: int, n: int) -> tuple[float, float]:
    from scipy.optimize import brentq

    extra = (m + n) / 2 - 1

    def error(theta: float) -> float:
        spread = 1 + extra * (1 - theta) / (2 - theta) + extra * theta / (1 + theta)
        return math.sqrt(theta * (1 - theta) * spread / (m * n))

    solve: Any = brentq
    below, above = min(area, 1 - 1e-12), max(area, 1e-12)  # at 0 and 1 the error is 0, and the interval would be empty
    low = 0.0 if area == 0 else solve(lambda theta: area - theta - Z * error(theta), 0.0, below)
    high = 1.0 if area == 1 else solve(lambda theta: theta - area - Z * error(theta), above, 1.0)
    return low, high


def at_fpr(negatives: Sequence[float], positives: Sequence[float], most: float) -> Point:
    """The point with the largest true-positive rate at which at most the share `most` of the negatives is flagged.

    Fewer than 1/most negatives allow no false positive.
    """
    allowed = math.floor(most * len(negatives) + 1e-9)
    threshold = sorted(negatives, reverse=True)[allowed] if allowed < len(negatives) else -math.inf
    return at(negatives, positives, threshold)


def at(negatives: Sequence[float], positives: Sequence[float], threshold: float) -> Point:
    """The point of a given threshold."""
    fpr, tpr = (sum(score > threshold for score in scores) / len(scores) for scores in (negatives, positives))
    return Point(threshold, tpr, fpr)


@cache
def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of `hits` out of n, n at least 1."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return float(low), float(high)


def unmeasured(why: str, higher_is_better: bool | None = None) -> Score:
    """The score of something that could not be measured: NaN with the reason."""
    return Score(math.nan, 0, higher_is_better, warning=why)


def rate(hits: Tensor, higher_is_better: bool | None, per_sample: Tensor | None = None) -> Score:
    """The share of True in `hits` (N,) with its 95 % Wilson interval. NaN for N = 0."""
    n = len(hits)
    if n == 0:
        return unmeasured("no samples", higher_is_better)
    k = int(hits.sum())
    kept = None if per_sample is None else tuple(per_sample.double().tolist())
    return Score(k / n, n, higher_is_better, wilson(k, n), kept)


def mean(values: Tensor, higher_is_better: bool | None) -> Score:
    """The mean of `values` (N,) with its 95 % t interval (None if all are equal).

    Both are of the values with 4 significant digits, which are the per-sample values, so that a record is short and its
    mean follows from it. NaN for N = 0, and with a warning if any value is not finite.
    """
    n = len(values)
    if n == 0:
        return unmeasured("no samples", higher_is_better)
    import torch

    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        return unmeasured(f"{bad} of {n} values are not finite", higher_is_better)
    kept = tuple(float(f"{value:.{DIGITS}g}") for value in values.double().tolist())
    return Score(math.fsum(kept) / n, n, higher_is_better, mean_interval(kept), kept)


def mean_interval(values: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t; None for fewer than two values or for equal ones."""
    import numpy as np

    x = np.asarray(values, dtype=float)
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    center, scale = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    low, high = _t_quantiles(len(x) - 1)
    return float(low * scale + center), float(high * scale + center)


@cache
def _t_quantiles(degrees: int) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % quantile of Student's t."""
    from scipy.stats import t

    low, high = t.interval(0.95, degrees)
    return float(low), float(high)
