"""Records → rows: one row a cell, seeds of the same cell pooled. Numbers here, words and layout in `report`.

Records are plain dictionaries as stored (NaN as null), with `doubts` where `harness.doubts.annotate` added them.
"""

from __future__ import annotations

import ast
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
CONTROLS = ("none", "finetune")
PARTS = ("model", "attack", "trigger", "target", "sampler", "defense")


@dataclass(frozen=True)
class Column:
    """score: its name in the record; "fid[]" stands for the one `fid[<judge>]`. digits: after the point.
    percent: a share shown in %. rank: how soon it goes when a terminal is narrow, 0 never."""

    title: str
    score: str
    digits: int = 2
    percent: bool = False
    interval: bool = False
    rank: int = 0


COLUMNS = (
    Column("ASR %", "asr", 1, percent=True, interval=True),
    Column("ASR@1e-3 %", "asr@1e-3", 1, percent=True, rank=3),
    Column("removal %", "removal", 1, percent=True, rank=1),
    Column("clean hits %", "clean_hits", 1, percent=True, rank=5),
    Column("false trig. %", "false_triggers", 1, percent=True, rank=6),
    Column("FD", "fid[]", 3, rank=8),
    Column("FD ratio", "fid_ratio[]", 2, rank=2),
    Column("CLIP", "clip_score[]", 1, rank=9),
    Column("attr. %", "attribute_accuracy", 1, percent=True),
    Column("drift", "drift", 4, rank=4),
    Column("cost s", "defense_wall_s", 0, rank=7),
)


@dataclass(frozen=True)
class Number:
    """A pooled score: mean over seeds, 95 % interval, or NaN with the reason."""

    value: float
    low: float | None = None
    high: float | None = None
    warning: str | None = None


@dataclass
class Row:
    """A cell over its seeds. `state` replaces the numbers: "failed: ..." or "n/a: ..."."""

    defense: str
    told: str
    place: str = ""
    state: str | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # column's score → the record's, which names the extractor
    n: int | None = None
    nfe: tuple[int, ...] = ()  # network evaluations of one sample, where known
    seeds: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    found: tuple[str | None, ...] = ()  # the text that the defense names as the trigger, a seed
    doubts: tuple[str, ...] = ()


@dataclass
class Table:
    track: str
    model: str
    attack: str
    trigger: str
    target: str
    sampler: str
    rows: list[Row]


def tables(records: Iterable[Record], dropped: Iterable[Record] = ()) -> list[Table]:
    """One table for each (model, attack, trigger, target, sampler), unconditional models first.

    dropped: cells that the grid left out, {"cell": {...}, "reason": "..."}.
    """
    done, left_out = list(records), list(dropped)
    words = short_specs([*done, *left_out])
    tracks = track_of(done)
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for group in _by_seed(done):
        groups[_setting(group[0]["cell"], words)].append(_row(group, words))
    for entry in left_out:
        cell = entry["cell"]
        row = Row(words["defense"].get(cell.get("defense", ""), ""), "–", state=f"n/a: {entry['reason']}")
        groups[_setting(cell, words)].append(row)
    made = [
        Table(tracks.get(bare(setting[0]), "unknown track"), *setting, rows=_ordered(rows))
        for setting, rows in groups.items()
    ]
    return sorted(
        made, key=lambda t: (t.track != "unconditional", t.track, t.model, bare(t.attack) == "none", t.attack)
    )


def _by_seed(records: Sequence[Record]) -> list[list[Record]]:
    """Records that differ in their seed only, in order of first appearance. Failed ones are apart, each by itself, and
    so is a second record of one seed, made by another version: that is no other seed."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        same = tuple(sorted((name, str(value)) for name, value in cell.items() if name != "seed"))
        there = any(other["cell"]["seed"] == cell["seed"] for other in groups.get((*same, ""), ()))
        groups.setdefault((*same, record["key"] if there or record.get("error") else ""), []).append(record)
    return list(groups.values())


def _row(group: Sequence[Record], words: Mapping[str, Mapping[str, str]]) -> Row:
    first = group[0]
    cell = first["cell"]
    row = Row(
        words["defense"][cell["defense"]],
        told_words(cell, first.get("knowledge") or ()),
        n=cell.get("n"),
        nfe=network_evaluations(group),
        seeds=tuple(sorted(record["cell"]["seed"] for record in group)),
        keys=tuple(record["key"] for record in group),
        found=tuple((record.get("provenance") or {}).get("found_trigger") for record in group),
        doubts=tuple(dict.fromkeys(words for record in group for words in record.get("doubts") or ())),
    )
    if first.get("error"):
        row.state = f"failed: {first['error']}"
        return row
    for column in COLUMNS:
        name = resolve(first, column.score)
        row.names[column.score] = name
        row.numbers[column.score] = pool([(record.get("scores") or {}).get(name) for record in group])
    return row


def network_evaluations(records: Iterable[Record]) -> tuple[int, ...]:
    """What one sample of each record costs, each number once; those that do not say are left out."""
    return tuple(sorted({nfe for r in records if (nfe := (r.get("provenance") or {}).get("nfe")) is not None}))


def resolve(record: Record, score: str) -> str:
    """The record's name for `score`: "fid[]" → "fid[digits-cnn]"."""
    if not score.endswith("[]"):
        return score
    names = record.get("scores") or {}
    return next((name for name in names if name.startswith(score[:-1]) and name.endswith("]")), score[:-2])


def pool(scores: Sequence[Mapping[str, Any] | None]) -> Number:
    """One seed: the score with its own interval. Several: mean and t interval over seeds, which are the unit of
    variance; seeds that could not be measured make the mean unmeasured too."""
    values = [number(score) for score in scores]
    for score, value in zip(scores, values, strict=True):
        if math.isnan(value):
            return Number(math.nan, warning=(score or {}).get("warning") or "not measured")
    if len(values) == 1:
        low, high = (scores[0] or {}).get("interval") or (None, None)
        return Number(values[0], low, high)
    low, high = seed_interval(values)
    return Number(math.fsum(values) / len(values), low, high)


def seed_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the mean by Student's t; none for equal values."""
    from scipy.stats import sem, t

    if len(set(values)) < 2:
        return None, None
    low, high = t.interval(0.95, len(values) - 1, loc=math.fsum(values) / len(values), scale=sem(values))
    return float(low), float(high)


def ends(number: Number, share: bool) -> tuple[float, ...]:
    """The interval's ends, () for none; those of a share within 0 and 1, where the interval of a mean may not be."""
    if number.low is None or number.high is None:
        return ()
    pair = (number.low, number.high)
    return tuple(min(1.0, max(0.0, end)) for end in pair) if share else pair


def number(score: Mapping[str, Any] | None) -> float:
    """A score's value as a float; NaN for null or an absent score."""
    value = None if score is None else score.get("value")
    return math.nan if value is None else float(value)


def track_of(records: Sequence[Record]) -> dict[str, str]:
    """Model name → "text-to-image" or "unconditional", as its records' provenance says, else by what was measured."""
    found: dict[str, str] = {}
    for record in records:
        said, scores = (record.get("provenance") or {}).get("track"), record.get("scores") or {}
        asked = any(not math.isnan(number(scores[name])) for name in scores if name.startswith(("attribute", "clip")))
        if said or scores:
            found[bare(record["cell"]["model"])] = str(said or ("text-to-image" if asked else "unconditional"))
    return found


def told_words(cell: Mapping[str, Any], knowledge: Sequence[str]) -> str:
    """What the defense was told, in the words of the table."""
    if cell.get("told") == "wrong-trigger":
        return "WRONG trigger (control)"
    told = ["TRIGGER" if word == "trigger" else word.replace("_", " ") for word in knowledge]
    return ", ".join(sorted(told, key=lambda word: word != "TRIGGER")) or "nothing"


def _ordered(rows: list[Row]) -> list[Row]:
    """Controls first, then ranked rows each followed by its wrong-trigger control, states last; fills `place`.

    Defenses that were told the trigger have places of their own (T1, T2 ...): they solved an easier problem. Places
    go by ASR to a tenth, then by drift, among rows without doubts about broken utility.
    """
    counts: Counter[str] = Counter()
    for row in sorted((row for row in rows if _ranked(row)), key=_merit):
        kind = "T" if "TRIGGER" in row.told else ""
        counts[kind] += 1
        row.place = f"{kind}{counts[kind]}"
    places = {row.defense: (row.place.startswith("T"), int(row.place.strip("T"))) for row in rows if row.place}
    last = (True, len(rows) + 1)

    def position(row: Row) -> tuple[Any, ...]:
        place = places.get(row.defense, last)
        control = CONTROLS.index(bare(row.defense)) if _control(row) else len(CONTROLS)
        return row.state is not None, control, place, row.defense, "control" in row.told

    return sorted(rows, key=position)


def _control(row: Row) -> bool:
    return bare(row.defense) in CONTROLS


def _ranked(row: Row) -> bool:
    usable = row.state is None and not math.isnan(row.numbers["asr"].value)
    return usable and not _control(row) and "control" not in row.told and not any("utility" in w for w in row.doubts)


def _merit(row: Row) -> tuple[float, float, str]:
    drift = row.numbers["drift"].value
    return round(row.numbers["asr"].value, 1), math.inf if math.isnan(drift) else drift, row.defense


def _setting(cell: Mapping[str, Any], words: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    names = ("model", "attack", "trigger", "target", "sampler")
    return tuple(words[name].get(cell.get(name, ""), str(cell.get(name, ""))) for name in names)


def short_specs(entries: Sequence[Record]) -> dict[str, dict[str, str]]:
    """For each part of a cell: full spec → its short form.

    That is the record's own (`provenance.short`: only what differs from the defaults) where there is one, else the
    parameters in which the specs of that name differ.
    """
    out: dict[str, dict[str, str]] = {}
    for part in PARTS:
        known = {str(entry["cell"][part]) for entry in entries if part in entry["cell"]}
        out[part] = short_of(sorted(known))
    for entry in entries:
        short = (entry.get("provenance") or {}).get("short") or {}
        for part in PARTS:
            if part in short:
                out[part][str(entry["cell"][part])] = str(short[part])
    return out


def short_of(specs: Iterable[str]) -> dict[str, str]:
    """Each spec → its name with only the parameters in which the specs of that name differ."""
    given = {spec: arguments(spec) for spec in specs}
    return {spec: _shortened(spec, given) for spec in given}


def _shortened(spec: str, specs: Mapping[str, Mapping[str, str]]) -> str:
    given = specs[spec]
    if not given:
        return spec.removesuffix("()")
    rivals = [other for name, other in specs.items() if bare(name) == bare(spec)]
    kept = [f"{key}={value}" for key, value in given.items() if any(other.get(key) != value for other in rivals)]
    return f"{bare(spec)}({', '.join(kept)})" if kept else bare(spec)


def arguments(spec: str) -> dict[str, str]:
    """The parameters of a spec "name(key=literal, ...)" as source text; {} if there are none or it does not parse."""
    _, opening, rest = spec.partition("(")
    try:
        call = ast.parse(f"f({rest}" if opening else "f()", mode="eval").body
    except SyntaxError:
        return {}
    words = call.keywords if isinstance(call, ast.Call) else []
    return {word.arg: ast.unparse(word.value) for word in words if word.arg}


def bare(spec: str) -> str:
    """The name in a spec: "elijah" of "elijah(lr=0.1)"."""
    return spec.partition("(")[0]
