"""Two defenses on the same backdoored model and the same samples: differences, intervals, tests.

Within one checkpoint, hits and misses are compared by the exact McNemar test (Agresti & Min's interval for the
difference), other values by the t interval of the paired differences and Wilcoxon's signed-rank test. Seeds of the
attack training are the unit of variance: with two or more of them, the interval and the test are Student's t over the
seeds' differences. Several comparisons are corrected after Holm. The effect comes first, p second.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.judges import statistics
from harness.runs.record import Record
from leaderboard import recompute
from leaderboard.recompute import SHARES, threshold

Place = tuple[tuple[str, str | int], ...]
SETTING = ("model", "attack", "trigger", "target", "sampler", "n")
DEFAULT_SCORES = ("asr", "drift", "attribute_accuracy", "screen_auroc")


@dataclass(frozen=True)
class Comparison:
    """`score` of A minus that of B in one setting. unit: "samples" (one checkpoint) or "seeds". n: samples, or seeds.

    by_seed: (seed, A, B) each. p: of the test named; p_holm: corrected over all comparisons made together. `low` and
    `high` are the 95 % interval of the difference, None where there is none.
    """

    score: str
    setting: Place
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    test: str
    unit: str
    n: int
    by_seed: tuple[tuple[int, float, float], ...]
    p_holm: float | None = None
    note: str | None = None


def compare(a: Iterable[Record], b: Iterable[Record], scores: Sequence[str] = DEFAULT_SCORES) -> list[Comparison]:
    """A against B in every setting and seed in which both have finished, corrected after Holm over what is returned.

    Only scores measured on both sides are compared. Raises ValueError where two rows share setting and seed but were
    made from different checkpoints or images: those are not paired.
    """
    pairs: dict[Place, list[tuple[Record, Record]]] = defaultdict(list)
    others = {place(record): record for record in b if not record.error}
    for record in a:
        other = others.get(place(record))
        if other is not None and not record.error:
            _same_start(record, other)
            pairs[_setting(record)].append((record, other))
    found = [
        made
        for setting, rows in sorted(pairs.items(), key=str)
        for score in scores
        if (made := _compared(score, setting, rows)) is not None
    ]
    corrected = holm([each.p for each in found])
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def place(record: Record) -> Place:
    """Where a record stands but for its defense: records of one place are about one backdoored model."""
    return (*_setting(record), ("seed", record.cell.seed))


def _setting(record: Record) -> Place:
    return tuple((name, getattr(record.cell, name)) for name in SETTING)


def _same_start(a: Record, b: Record) -> None:
    if attack_jobs(a) != attack_jobs(b):
        raise ValueError(
            f"records {a.key[:12]} and {b.key[:12]} defend different backdoored models (the attack was run by "
            "different code or weights): not paired. Run both anew with one version"
        )


def attack_jobs(record: Record) -> set[str]:
    """The keys of the jobs that made the record's backdoored model."""
    return {key for key, job in record.provenance.jobs.items() if job.kind == "attack"}


def _compared(score: str, setting: Place, rows: Sequence[tuple[Record, Record]]) -> Comparison | None:
    rows = sorted(rows, key=lambda pair: pair[0].cell.seed)
    rows = [pair for pair in rows if not any(math.isnan(record.value(score)) for record in pair)]
    values = [(a.cell.seed, a.value(score), b.value(score)) for a, b in rows]
    if not values:
        return None
    made = seeds(values) if len(values) > 1 else samples(score, *rows[0])
    difference, low, high, p, test, unit, n, note = made
    x, y = (math.fsum(row[i] for row in values) / len(values) for i in (1, 2))
    return Comparison(score, setting, x, y, difference, low, high, p, test, unit, n, tuple(values), note=note)


Made = tuple[float, float | None, float | None, float | None, str, str, int, str | None]


def seeds(values: Sequence[tuple[int, float, float]]) -> Made:
    """The mean difference over seeds with Student's t."""
    from scipy.stats import ttest_1samp

    d = [x - y for _, x, y in values]
    mean = math.fsum(d) / len(d)
    if len(set(d)) == 1:
        note = "every seed gives the same difference: no variance, no interval"
        return mean, None, None, None, "none", "seeds", len(d), note
    low, high = statistics.mean_interval(d) or (None, None)
    test: Any = ttest_1samp(d, 0.0)
    return mean, low, high, float(test.pvalue), "t over seeds", "seeds", len(d), None


def samples(score: str, a: Record, b: Record) -> Made:
    """One checkpoint: the same samples under A and under B."""
    note = "one seed: says nothing about another training of the attack"
    u, v = _both(per_sample(a, score), per_sample(b, score))
    tau_a, tau_b = (threshold(score.partition("@")[2], record.scores) for record in (a, b))
    if u and score.partition("@")[0] in SHARES and not math.isnan(tau_a + tau_b):
        x, y = [value <= tau_a for value in u], [value <= tau_b for value in v]
        only_a, only_b = (sum(p > q for p, q in zip(*pair, strict=True)) for pair in ((x, y), (y, x)))
        difference, low, high = paired_shares(only_a, only_b, len(x))
        return difference, low, high, mcnemar(only_a, only_b), "exact McNemar", "samples", len(x), note
    if u and score != "screen_auroc":
        difference, low, high, p = paired_means(u, v)
        return difference, low, high, p, "Wilcoxon signed rank", "samples", len(u), note
    difference = a.value(score) - b.value(score)
    return difference, None, None, None, "none", "samples", 0, f"not a mean over samples; {note}"


def per_sample(record: Record, score: str) -> Sequence[float]:
    """The values behind a score, NaN for those that do not count; those of `asr` behind `asr@1e-3`."""
    base = score.partition("@")[0]
    return recompute.per_sample(record.scores, base if base in SHARES else score)


def _both(u: Sequence[float], v: Sequence[float]) -> tuple[list[float], list[float]]:
    """The values of samples that count on both sides; two empty lists where they are not the same samples."""
    pairs = [(x, y) for x, y in zip(u, v, strict=False) if not math.isnan(x + y)]
    return ([x for x, _ in pairs], [y for _, y in pairs]) if len(u) == len(v) else ([], [])


# ---- statistics -----------------------------------------------------------------------------------------------------


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test from the two counts of discordant pairs; 1 where there is none."""
    from scipy.stats import binomtest

    n = only_a + only_b
    return 1.0 if n == 0 else float(binomtest(only_a, n, 0.5).pvalue)


def paired_shares(only_a: int, only_b: int, n: int) -> tuple[float, float, float]:
    """Difference of two paired shares with its 95 % interval after Agresti & Min (2005, Statistics in Medicine 24):
    Wald's with half an observation added to each cell of the 2×2 table. Clipped to [-1, 1]."""
    b, c, m = only_a + 0.5, only_b + 0.5, n + 2
    d = (b - c) / m
    half = statistics.Z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return (only_a - only_b) / n, max(-1.0, d - half), min(1.0, d + half)


def paired_means(u: Sequence[float], v: Sequence[float]) -> tuple[float, float | None, float | None, float | None]:
    """Mean difference with its 95 % t interval, and p of Wilcoxon's signed-rank test (None where nothing differs)."""
    import numpy as np
    from scipy.stats import wilcoxon

    d = np.asarray(u, dtype=float) - np.asarray(v, dtype=float)
    mean = float(d.mean())
    if len(d) < 2 or np.ptp(d) == 0:
        return mean, None, None, None
    low, high = statistics.mean_interval(d) or (None, None)
    test: Any = wilcoxon(d)
    return mean, low, high, float(test.pvalue)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values corrected after Holm (1979): the smallest of m times m, the next times m − 1, ..., never decreasing,
    at most 1. A missing p stays missing and does not count."""
    order = sorted((x, i) for i, x in enumerate(p) if x is not None)
    out: list[float | None] = [None] * len(p)
    least = 0.0
    for rank, (x, i) in enumerate(order):
        least = max(least, min(1.0, x * (len(order) - rank)))
        out[i] = least
    return out
