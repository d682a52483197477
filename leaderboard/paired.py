"""Two defenses on the same backdoored models and the same samples: differences, intervals, tests. `bench compare`, the
letters of the tables and the papers' rankings all follow from this module.

Seeds of the attack training are the unit of variance. Two defenses are shown to differ only if they share at least
LEAST_SEEDS seeds and the 95 % interval of their paired difference excludes 0. This interval is the wider one of two:

    over seeds    Student's t over the differences, one per seed
    over samples  of the same mean difference. Differences of sample i, which may have one starting noise at all seeds,
                  are averaged over the seeds first, and the interval is normal over the n averages

The interval over samples keeps seeds that agree by chance (0 of 100 hits against 1 of 100, three times) from counting
as proof. For a share without per-sample values it follows from the counts. Any other score without them has the
interval over seeds alone; where its seeds do not vary either, it has none.

With one seed, `bench compare` describes the one checkpoint: the exact McNemar test for hits (Agresti & Min's interval
for the difference), the t interval and Wilcoxon's signed-rank test for other values. This shows no difference between
defenses. p values are corrected after Holm; intervals are not corrected. The effect comes first, p second.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.judges import statistics
from harness.runs.record import Record, bare
from leaderboard import recompute
from leaderboard.columns import RANKING
from leaderboard.recompute import SHARES, threshold

Place = tuple[tuple[str, str | int], ...]
Pair = tuple[Record, Record]
Placed = Mapping[Place, Mapping[int, Record]]
SETTING = ("model", "attack", "trigger", "target", "sampler", "n")
MEASURED_ON = ("seed", "evaluation_seed", "utility_n", "utility_sampler")  # beside the setting
DEFAULT_SCORES = ("asr", "drift", "attribute_accuracy", "screen_auroc")
LEAST_SEEDS = 3  # of the attack's training; with fewer nothing is called better
ROUNDING = 1e-9  # of the numbers; differences that vary by less are equal
FEW = "fewer than three seeds: no comparison"


@dataclass(frozen=True)
class Comparison:
    """`score` of A minus that of B in one setting, or in the worst of several. unit: "samples" (one checkpoint) or
    "seeds". n: samples, or seeds.

    by_seed: (seed, A, B) each. p: of the test named; p_holm: corrected over all comparisons made together. `low` and
    `high` are the 95 % interval of the difference, None where there is none. differs: whether A and B are shown to
    differ, by the rule of this module.
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
    differs: bool = False
    p_holm: float | None = None
    note: str | None = None


def compare(a: Iterable[Record], b: Iterable[Record], scores: Sequence[str] = DEFAULT_SCORES) -> list[Comparison]:
    """A against B in every setting and seed in which both have finished, and in the worst setting of each model where
    they share several, corrected after Holm over what is returned.

    Only scores measured on both sides are compared. Raises ValueError where two rows share setting and seed but were
    made from different checkpoints or images: those are not paired.
    """
    ours, theirs = placed(a), placed(b)
    for one, other in _meeting(ours, theirs):
        _same_start(one, other)
    met = pairs(ours, theirs)
    found = [
        made
        for setting, rows in sorted(met.items(), key=str)
        for score in scores
        if (made := _compared(score, setting, rows)) is not None
    ]
    found += _over_settings(ours, theirs, [score for score in scores if score in RANKING])
    corrected = holm([each.p for each in found])
    return [replace(each, p_holm=p) for each, p in zip(found, corrected, strict=True)]


def _over_settings(a: Placed, b: Placed, scores: Sequence[str]) -> Iterator[Comparison]:
    """A against B over all settings that they share on one model, as a table over several settings compares rows."""
    models: dict[str | int, list[Place]] = defaultdict(list)
    for setting in sorted(set(a) & set(b), key=str):
        told = dict(setting)
        if bare(str(told["attack"])) != "none":
            models[told["model"]].append(setting)
    for model, settings in models.items():
        ours, theirs = ({each: side[each] for each in settings} for side in (a, b))
        words: Place = (("model", model), ("settings", f"the worst of {len(settings)} settings at each seed"))
        if len(settings) > 1:
            found = (difference(score, ours, theirs, RANKING[score]) for score in scores)
            yield from (replace(each, setting=words) for each in found if each is not None)


def difference(score: str, a: Placed, b: Placed, better: int) -> Comparison | None:
    """A against B over all settings that both met: of several, a side's value at a seed is its worst there, the largest
    if `better` is -1, the smallest if it is 1. Only seeds count that both have in each of them, of the same
    checkpoints. None where there is none."""
    met = pairs(a, b)
    rows = _worst_pairs(score, [_measured(score, met.get(setting, ())) for setting in a if setting in b], better)
    return _compared(score, (), rows) if rows else None


def placed(records: Iterable[Record]) -> Placed:
    """Setting → seed → record, of what has finished. A place that two records claim (one cell run by two versions of
    the code) has none: they are no two seeds, and nothing says which one counts."""
    found: dict[Place, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if not record.error:
            found[_setting(record)][record.cell.seed].append(record)
    return {
        setting: {seed: made[0] for seed, made in seeds.items() if len(made) == 1} for setting, seeds in found.items()
    }


def pairs(a: Placed, b: Placed) -> dict[Place, list[Pair]]:
    """By setting the records of A and B about the same backdoored model, one pair per seed, in the order of seeds."""
    met: dict[Place, list[Pair]] = defaultdict(list)
    for one, other in _meeting(a, b):
        if one.attack_jobs == other.attack_jobs and one.cell.evaluation_seed == other.cell.evaluation_seed:
            met[_setting(one)].append((one, other))
    return met


def _meeting(a: Placed, b: Placed) -> Iterator[Pair]:
    for setting, seeds in a.items():
        others = b.get(setting, {})
        yield from ((seeds[seed], others[seed]) for seed in sorted(seeds) if seed in others)


def place(record: Record) -> Place:
    """Where a record stands but for its defense: records of one place are about one backdoored model, measured on the
    same samples."""
    return (*_setting(record), *((name, getattr(record.cell, name)) for name in MEASURED_ON))


def _setting(record: Record) -> Place:
    return tuple((name, getattr(record.cell, name)) for name in SETTING)


def _same_start(a: Record, b: Record) -> None:
    if a.attack_jobs != b.attack_jobs:
        raise ValueError(
            f"records {a.key[:12]} and {b.key[:12]} defend different backdoored models (the attack was run by "
            "different code or weights): not paired. Run both anew with one version"
        )


def _measured(score: str, rows: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in rows if not any(math.isnan(record.value(score)) for record in pair)]


def _worst_pairs(score: str, settings: Sequence[Sequence[Pair]], better: int) -> list[Pair]:
    """For each seed that every setting has, A's worst record beside B's worst."""
    by_seed = [{pair[0].cell.seed: pair for pair in rows} for rows in settings]
    common = sorted(set.intersection(*map(set, by_seed))) if by_seed else []

    def worst(seed: int, side: int) -> Record:
        """Ties go to the first setting."""
        return min((found[seed][side] for found in by_seed), key=lambda record: better * record.value(score))

    return [(worst(seed, 0), worst(seed, 1)) for seed in common]


def _compared(score: str, setting: Place, rows: Sequence[Pair]) -> Comparison | None:
    rows = _measured(score, rows)
    values = tuple((a.cell.seed, a.value(score), b.value(score)) for a, b in rows)
    if not values:
        return None
    made = over_seeds(score, rows) if len(values) > 1 else samples(score, *rows[0])
    difference, low, high, p, test, unit, n, note = made
    x, y = (math.fsum(row[i] for row in values) / len(values) for i in (1, 2))
    enough = len(values) >= LEAST_SEEDS
    differs = enough and low is not None and high is not None and not low <= 0 <= high
    note = note if enough else "; ".join(filter(None, (FEW, note)))
    return Comparison(score, setting, x, y, difference, low, high, p, test, unit, n, values, differs, note=note)


Made = tuple[float, float | None, float | None, float | None, str, str, int, str | None]


def over_seeds(score: str, rows: Sequence[Pair]) -> Made:
    """The mean difference over at least two seeds with the wider one of its two intervals, and the larger one of their
    p values."""
    d = [a.value(score) - b.value(score) for a, b in rows]
    mean = math.fsum(d) / len(d)
    size = max(abs(record.value(score)) for pair in rows for record in pair)
    tests = {"t over seeds": _t_test(d, size), "normal over samples": _z_test(mean, _sampling_error(score, rows), size)}
    made = [(*found, name) for name, found in tests.items() if found is not None]
    if not made:
        note = "every seed gives the same difference: no variance, no interval"
        return mean, None, None, None, "none", "seeds", len(d), note
    half = max(half for half, _, _ in made)
    _, p, test = max(made, key=lambda found: found[1])
    return mean, mean - half, mean + half, p, test, "seeds", len(d), None


def _t_test(d: Sequence[float], size: float) -> tuple[float, float] | None:
    """Half the 95 % t interval of a mean of differences of numbers up to `size`, and its p; None where the differences
    vary by rounding alone."""
    import numpy as np
    from scipy.stats import t

    ends = statistics.mean_interval(d)
    if ends is None or np.ptp(d) <= ROUNDING * size:
        return None
    error = np.std(d, ddof=1) / math.sqrt(len(d))
    return (ends[1] - ends[0]) / 2, float(2 * t.sf(abs(np.mean(d)) / error, len(d) - 1))


def _z_test(mean: float, error: float, size: float) -> tuple[float, float] | None:
    """Half the 95 % normal interval of a mean with this standard error, and its p; None where the error is unknown or
    rounding alone."""
    if not error > ROUNDING * size:
        return None
    return statistics.Z * error, math.erfc(abs(mean) / error / math.sqrt(2))


def _sampling_error(score: str, rows: Sequence[Pair]) -> float:
    """The standard error that the samples alone give the mean difference over the seeds of `rows`: that of the samples'
    differences, averaged over the seeds. Shares have half a pair added to each cell of the 2×2 table, as in
    `paired_shares`. Where the records keep no values of the same number of samples, that of shares follows from their
    counts, and others have none (NaN)."""
    import numpy as np

    share = score.partition("@")[0] in (*SHARES, "removal")
    sides = [[parts(record, score) for record in pair] for pair in rows]
    shapes = {tuple(map(len, side)) for pair in sides for side in pair}
    if len(shapes) != 1 or shapes == {()}:
        return _counting_error(score, rows) if share else math.nan
    extra = 1 if share else 0
    variance = 0.0
    for k in range(len(sides[0][0])):
        d = np.mean([np.subtract(a[k], b[k]) for a, b in sides], axis=0)
        d = d[~np.isnan(d)]
        if len(d) < 2:
            return math.nan
        m = len(d) + 2 * extra
        variance += float((d @ d + extra - d.sum() ** 2 / m) / (m * (m if extra else m - 1)))
    return math.sqrt(max(0.0, variance))


def _counting_error(score: str, rows: Sequence[Pair]) -> float:
    """The standard error of a difference of two shares of which only the counts are known: as if the two sides had
    independent samples, but every seed the same ones. One hit and one miss are added to each share."""
    variance = 0.0
    for record in itertools.chain.from_iterable(rows):
        n = record.scores[record.name_of(score)].n
        share = (n * min(1.0, max(0.0, record.value(score))) + 1) / (n + 2)
        variance += share * (1 - share) / (n + 2) / len(rows)
    return math.sqrt(variance)


def parts(record: Record, score: str) -> list[Sequence[float]]:
    """What each sample adds to a score, NaN for one that does not count: a list whose mean is the score. Of an AUROC
    there are two, the placements of clean and of triggered inputs (DeLong et al. 1988). [] where none are kept."""
    base = score.partition("@")[0]
    if score == "removal":
        return [[1 - hit for hit in hits] for hits in parts(record, "asr")]
    if score == "screen_auroc":
        return _placements(record)
    values = per_sample(record, score)
    if base in SHARES:
        tau = threshold(score.partition("@")[2], record.scores)
        return [] if math.isnan(tau) or not values else [[_hit(value, tau) for value in values]]
    return [values] if values and score not in recompute.SPECIAL else []


def _hit(value: float, tau: float) -> float:
    return math.nan if math.isnan(value) else float(value <= tau)


def _placements(record: Record) -> list[Sequence[float]]:
    """For each clean input the share of triggered ones that score higher, for each triggered one the share of clean
    ones that score lower; ties count one half."""
    import numpy as np

    values = np.asarray(per_sample(record, "screen_auroc"), dtype=float)
    if not len(values) or np.isnan(values).any():
        return []
    clean, triggered = values[: len(values) // 2], values[len(values) // 2 :]
    above = (triggered[None] > clean[:, None]) + 0.5 * (triggered[None] == clean[:, None])
    return [above.mean(1), above.mean(0)] if len(clean) else []


def samples(score: str, a: Record, b: Record) -> Made:
    """One checkpoint: the same samples under A and under B."""
    note = "one seed says nothing about another training of the attack"
    u, v = _both(*(next(iter(parts(record, score)), ()) for record in (a, b)))
    if u and score.partition("@")[0] in (*SHARES, "removal"):
        only_a, only_b = (sum(p > q for p, q in zip(*pair, strict=True)) for pair in ((u, v), (v, u)))
        difference, low, high = paired_shares(only_a, only_b, len(u))
        return difference, low, high, mcnemar(only_a, only_b), "exact McNemar", "samples", len(u), note
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
