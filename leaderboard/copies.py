"""What records say against each other: numbers of one seed under another, numbers that rows of one backdoored model
share and do not, and a contact sheet of other images.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from harness.judges.statistics import BEFORE
from harness.runs.record import Record, bare
from harness.types import Cell, Score
from leaderboard.recompute import close

LEAST = 16  # different values from which on two equal rows of values are no coincidence
SHAKEN = 0.005  # relative difference up to which half of the values of two seeds are never alike
SHOWN = 8  # images of each model on a contact sheet
OF_PLACE = ("asr_threshold", "clean_model_hits", "false_triggers")  # beside *_before and *_clean
COSTS = ("_s", "_bytes")
ATTACKED = ("model", "attack", "trigger", "target", "seed")  # what an attack job's key depends on


@dataclass(frozen=True)
class Images:
    """The defended model's images behind a score. drift: the score that is 0 where they are the clean model's. varied:
    the score that says whether they differ from each other: where all are one image, it may be that of two models."""

    drift: str
    varied: str


TRIGGERED = Images("drift_triggered", "target_mse")
CLEAN = Images("drift", "spread")
IMAGES = {
    "asr": TRIGGERED,
    "target_mse": TRIGGERED,
    "drift_triggered": TRIGGERED,
    "clip_score_triggered": TRIGGERED,
    "target_clip_score": TRIGGERED,
    "clean_hits": CLEAN,
    "drift": CLEAN,
    "clip_score": CLEAN,
}


# ---- seeds ----------------------------------------------------------------------------------------------------------


def across(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """(record, what is wrong) for each one whose continuous values are, one by one, those of another model's images."""
    first: dict[tuple[str, bytes], list[Record]] = defaultdict(list)
    told: set[str] = set()
    for record in records:
        for name, values in _continuous(record):
            alike = first[name, values]
            other = next((o for o in alike if not _one_model(record, o)), None)
            if other is not None and record.key not in told:
                told.add(record.key)
                yield (
                    record,
                    (
                        f"its values of {name} are, one by one, those of {other.key[:12]} (seed {other.cell.seed}): "
                        "another model gives other images; run the seed again"
                    ),
                )
            alike.append(record)


def _continuous(record: Record) -> Iterator[tuple[str, bytes]]:
    """(score, its values in single precision) where they are too many different ones to coincide by chance."""
    import numpy as np

    clean = record.scores.get("clean_model_hits")
    for name, score in record.scores.items():
        images = IMAGES.get(name.partition("[")[0])
        if images is None or record.error or not score.per_sample or math.isnan(score.value):
            continue
        if record.value(images.drift) == 0 or _constant(record.scores.get(images.varied)):
            continue
        if clean is not None and _same(score, clean):
            continue
        with np.errstate(over="ignore"):
            values = np.asarray(score.per_sample, dtype=np.float32)
        if len(np.unique(values[~np.isnan(values)])) >= LEAST:
            yield name, values.tobytes()


def near(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """(record, what is wrong) for each one whose drifts are nearly those of another seed of its cell: a copy that was
    shaken. Models of two seeds differ by much more than that, even on the same noise; with the trigger both may give
    the target alike."""
    cells: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        cells[replace(record.cell, seed=0, evaluation_seed=0)].append(record)
    for seeds in cells.values():
        for i, record in enumerate(seeds):
            other = next((other for other in seeds[:i] if _nearly(record, other)), None)
            if other is not None:
                words = f"its values of drift are nearly those of {other.key[:12]} (seed {other.cell.seed})"
                yield record, f"{words}: another model gives other images; run the seed again"


def _nearly(a: Record, b: Record) -> bool:
    import numpy as np

    if a.cell.seed == b.cell.seed or _one_model(a, b):
        return False
    x, y = (dict(_continuous(record)).get("drift") for record in (a, b))
    if x is None or y is None or len(x) != len(y) or x == y:
        return False
    one, other = (np.frombuffer(values, dtype=np.float32) for values in (x, y))
    return bool(np.mean(np.isclose(one, other, rtol=SHAKEN, atol=0)) >= 0.5)


def _constant(score: Score | None) -> bool:
    """Whether a score says that all images are one: its values are equal, or, where it keeps none, it is 0 (spread)."""
    if score is None:
        return False
    return len(set(score.per_sample)) == 1 if score.per_sample else score.value < 0.01


def _one_model(a: Record, b: Record) -> bool:
    """Whether two records may show the same images: those of one backdoored model, of a clean one that no training
    changed, or of one cell that two versions of the code have run."""
    clean = bare(a.cell.attack) == bare(b.cell.attack) == "none"
    setting = ("model", "attack", "seed") if clean else ATTACKED
    if all(getattr(a.cell, name) == getattr(b.cell, name) for name in setting):
        return True
    if a.attack_jobs != b.attack_jobs:
        return False
    if a.attack_jobs:
        return a.cell.seed == b.cell.seed
    return not all("model" in r.provenance.delivers and r.value("change") != 0 for r in (a, b))


def attacks(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """(record, what is wrong) for each one whose attack job is another record's, of another attack or seed."""
    first: dict[str, Record] = {}
    for record in records:
        for key in sorted(record.attack_jobs):
            other = first.setdefault(key, record)
            part = next((n for n in ATTACKED if getattr(other.cell, n) != getattr(record.cell, n)), None)
            if part is not None:
                yield record, f"its attack job {key[:12]} is that of {other.key[:12]}, which has another {part}"


# ---- one backdoored model -------------------------------------------------------------------------------------------


def beside(first: Record, row: Record) -> list[str]:
    """In words, where two rows of one backdoored model differ in what is about that model and not about the defense. On
    machines of one kind the numbers are equal; on others each lies in the other's interval."""
    if row.key == first.key:
        return []
    exact = _machine(first) == _machine(row)
    return [
        f"{name} is {row.scores[name].value:.10g} of n = {row.scores[name].n}, and {first.scores[name].value:.10g} of "
        f"n = {first.scores[name].n} in {first.key[:12]}, which has the same backdoored model"
        for name in sorted(set(first.scores) & set(row.scores))
        if _of_place(name) and not _agree(first.scores[name], row.scores[name], exact)
    ]


def undefended(record: Record) -> list[str]:
    """In words, where a row of the defense `none` says something else of the attacked model than of the defended one,
    which are the same; nothing for the rows of other defenses."""
    if bare(record.cell.defense) != "none":
        return []
    pairs = [(name, name.replace(BEFORE, "")) for name in sorted(record.scores) if BEFORE in name]
    return [
        f"{before} is {record.scores[before].value:.10g} and {now} {record.scores[now].value:.10g}, and no defense is "
        "between the two"
        for before, now in pairs
        if now in record.scores and not _agree(record.scores[before], record.scores[now], True)
    ]


def _of_place(name: str) -> bool:
    stem = name.partition("[")[0].partition("@")[0]
    return stem in OF_PLACE or stem.endswith((BEFORE, "_clean"))


def _machine(record: Record) -> tuple[object, ...]:
    made = record.provenance
    return made.machine, made.processor, made.accelerators, tuple(sorted(made.versions.items()))


def _agree(a: Score, b: Score, exact: bool) -> bool:
    if math.isnan(a.value) or math.isnan(b.value):
        return math.isnan(a.value) == math.isnan(b.value)
    if a.n != b.n:
        return False
    if exact:
        return close(a.value, b.value, max(1.0, abs(a.value)))
    if a.interval is None or b.interval is None:
        return True
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


# ---- files ----------------------------------------------------------------------------------------------------------


def sheets(records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
    """(record, what is wrong) for each one that names the contact sheet of a record with other images."""
    first: dict[str, Record] = {}
    for record in records:
        if record.sheet is None:
            continue
        other = first.setdefault(record.sheet, record)
        for name in ("drift", "drift_triggered", "drift_before"):
            if (
                name in record.scores
                and name in other.scores
                and not _same(record.scores[name], other.scores[name], SHOWN)
            ):
                yield record, f"its contact sheet is that of {other.key[:12]}, whose images are others ({name} differs)"
                break


def twins(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) for each record whose key another one has with other numbers. records: by file."""
    first: dict[str, tuple[str, Record]] = {}
    for file, record in records:
        there, other = first.setdefault(record.key, (file, record))
        if other is record:
            continue
        differs = other.cell != record.cell or sorted(other.scores) != sorted(record.scores)
        names = [n for n in record.scores if not differs and not n.endswith(COSTS) and not _equal(n, record, other)]
        if differs or names:
            yield file, f"has the key of {there} and another {names[0] if names else 'cell or other scores'}"


def _equal(name: str, a: Record, b: Record) -> bool:
    return _agree(a.scores[name], b.scores[name], _machine(a) == _machine(b))


def _same(a: Score, b: Score, first: int | None = None) -> bool:
    """Whether two scores have the same values, or the same first ones."""
    x, y = ((score.per_sample or ())[:first] for score in (a, b))
    return len(x) == len(y) and all(u == v or (u != u and v != v) for u, v in zip(x, y, strict=True))
