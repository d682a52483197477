"""Records → what the page shows: cells pooled over seeds, and for each defense the worst case and the mean over them.

A table of defenses holds one model and one set of settings (attack, trigger, target, sampler): a defense that met one
attack is never placed against one that met five. Within it, and apart for defenses that were told the trigger, rows
whose 95 % intervals of the worst case overlap share a group: A, B, ... instead of a rank that the data do not carry.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.store import canonical
from leaderboard import recompute
from leaderboard.results import Results, protocol
from leaderboard.tables import CONTROLS, Number, bare, number, pool, resolve, short_specs, told_words

Record = Mapping[str, Any]
PLACE = ("model", "attack", "trigger", "target", "sampler")
TASKS = ("purification", "screening", "detection", "attacks")
TRACKS = ("unconditional", "text-to-image")
TRACK_WORDS = {"unconditional": "Unconditional", "text-to-image": "Text‑to‑image"}
TASK_WORDS = {
    "purification": "Purification",
    "screening": "Screening",
    "detection": "Detection",
    "attacks": "Attacks",
}
LEVELS = ("claimed", "recomputed", "reproduced")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAN = Number(math.nan)


@dataclass(frozen=True)
class Figure:
    """A column. score: as in the record, "fid[]" for the one `fid[<judge>]`. percent: a share shown in %.
    better: -1 lower, +1 higher, 0 neither. minor: left out where the screen is narrow."""

    title: str
    score: str
    digits: int = 1
    percent: bool = False
    better: int = 0
    minor: bool = False


ASR = Figure("ASR", "asr", percent=True, better=-1)
COST = Figure("Cost", "defense_wall_s", 0, better=-1, minor=True)
UTILITY = {
    "unconditional": Figure("FD ratio", "fid_ratio[]", 2, better=-1),
    "text-to-image": Figure("Attributes", "attribute_accuracy", percent=True, better=1),
}


def figures_of(track: str, task: str) -> tuple[Figure, ...]:
    """The columns of a view; rows are grouped by the first."""
    if task == "screening":
        return (
            Figure("AUROC", "screen_auroc", 3, better=1),
            Figure("TPR at 1 % FPR", "screen_tpr@1%fpr", percent=True, better=1),
            Figure("TPR, own threshold", "screen_tpr", percent=True, better=1, minor=True),
            Figure("FPR, own threshold", "screen_fpr", percent=True, better=-1, minor=True),
            COST,
        )
    if task == "detection":
        return (
            Figure("Suspicion", "suspicion", 4),
            Figure("Flagged", "flagged", percent=True),
            Figure("ASR", "asr", percent=True, minor=True),
            COST,
        )
    if task == "attacks":
        return (
            Figure("ASR", "asr_before", percent=True),
            Figure("ASR at MSE 1e-3", "asr_before@1e-3", percent=True, minor=True),
            Figure("False triggers", "false_triggers", percent=True, better=-1),
            Figure("FD ratio", "fid_ratio_before[]", 2, better=-1),
            Figure("Cost", "attack_wall_s", 0, better=-1, minor=True),
        )
    return (ASR, UTILITY[track], Figure("Drift", "drift", 4, better=-1, minor=True), COST)


@dataclass(frozen=True)
class Cell:
    """A cell over its seeds. `state` says "failed: ..." or "n/a: ..." where there are no numbers."""

    id: str
    track: str
    tasks: tuple[str, ...]
    full: Mapping[str, Any]  # the cell's canonical specs
    short: Mapping[str, str]  # the same, with only what differs from the defaults
    told: str  # what the defender knew, in words
    knows: bool  # whether it was told the trigger
    control: str  # "none", "finetune", "wrong trigger" or ""
    records: tuple[Record, ...]
    suites: tuple[str, ...]
    levels: tuple[str, ...]  # of each record
    attested: Mapping[str, Record]
    doubts: tuple[str, ...]
    protocol: str
    state: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record["cell"]["seed"] for record in self.records)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record["key"] for record in self.records)

    @property
    def defense(self) -> str:
        return self.short["defense"]

    @property
    def setting(self) -> tuple[str, ...]:
        """Where it was measured, apart from the model: (attack, trigger, target, sampler, samples)."""
        return (*(str(self.full.get(name, "")) for name in PLACE[1:]), str(self.full.get("n", "")))

    @property
    def level(self) -> str:
        return min(self.levels, key=LEVELS.index) if self.levels else LEVELS[0]

    def name(self, score: str) -> str:
        """The record's own name of a score, with the judge that it used."""
        return resolve(self.records[0], score) if self.records else score

    def figure(self, score: str) -> Number:
        """The score over seeds; NaN with the reason where it was not measured."""
        if self.state or not self.records:
            return Number(math.nan, warning=self.state)
        return pool([(record.get("scores") or {}).get(resolve(record, score)) for record in self.records])


@dataclass
class Row:
    """A defense in one table. worst, mean: score → number; deciding: score → the cell of the worst case."""

    cells: tuple[Cell, ...]
    worst: dict[str, Number] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    deciding: dict[str, Cell] = field(default_factory=dict)
    group: str = ""

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def doubts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(words for cell in self.cells for words in cell.doubts))

    @property
    def level(self) -> str:
        return min((cell.level for cell in self.cells), key=LEVELS.index)

    @property
    def seeds(self) -> int:
        return min(len(cell.seeds) for cell in self.cells)


@dataclass
class Block:
    """One table of defenses: a model, the settings that all rows share, and the rows in order."""

    model: str
    settings: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]  # the settings, for people
    judges: Mapping[str, str]  # score → judge in brackets, "" without one
    controls: list[Row]
    blind: list[Row]
    told: list[Row]


# ---- cells ----------------------------------------------------------------------------------------------------------


def cells(every: Iterable[Results]) -> list[Cell]:
    """All cells of all suites, each once. Of a record that several suites hold, the first is taken."""
    every = list(every)
    records, suites, attested = _merged(every)
    dropped = {canonical(d["cell"]): d for results in every for d in results.dropped}
    words = short_specs([*records.values(), *dropped.values()])
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records.values():
        name = _identity(record)
        again = any(record["cell"]["seed"] == other["cell"]["seed"] for other in groups[name])
        groups[_identity(record, alone=True) if again else name].append(record)
    levels = {key: level(record, attested.get(key)) for key, record in records.items()}
    made = [_cell(identity, group, words, suites, levels, attested) for identity, group in groups.items()]
    tracks = {cell.full["model"]: cell.track for cell in made if cell.track in TRACKS}
    made += [_left_out(entry, words, tracks) for entry in dropped.values()]
    return sorted(made, key=_order)


def _merged(every: Sequence[Results]) -> tuple[dict[str, Record], dict[str, list[str]], dict[str, Record]]:
    records: dict[str, Record] = {}
    suites: dict[str, list[str]] = defaultdict(list)
    attested: dict[str, Record] = {}
    for results in every:
        for record in results.records:
            records.setdefault(record["key"], record)
            suites[record["key"]].append(results.suite)
        attested |= results.reproduced
    return records, suites, attested


def _identity(record: Record, alone: bool = False) -> str:
    """Twelve hex digits for the cell without its seed. A failed record stands alone, and so does one whose cell and
    seed another version of the code has run too: those are no two seeds."""
    cell = {name: value for name, value in record["cell"].items() if name != "seed"}
    apart = record["key"] if record.get("error") or alone else ""
    return hashlib.sha256(canonical([cell, apart]).encode()).hexdigest()[:12]


def _cell(
    identity: str,
    group: Sequence[Record],
    words: Mapping[str, Mapping[str, str]],
    suites: Mapping[str, Sequence[str]],
    levels: Mapping[str, str],
    attested: Mapping[str, Record],
) -> Cell:
    group = sorted(group, key=lambda record: record["cell"]["seed"])
    first, keys = group[0], [record["key"] for record in group]
    cell, knowledge = first["cell"], first.get("knowledge") or ()
    return Cell(
        id=identity,
        track=_track(first),
        tasks=_tasks(group),
        full={name: value for name, value in cell.items() if name != "seed"},
        short={part: words[part].get(cell[part], cell[part]) for part in (*PLACE, "defense")},
        told=told_words(cell, knowledge),
        knows="trigger" in knowledge,
        control=_control(cell),
        records=tuple(group),
        suites=tuple(dict.fromkeys(suite for key in keys for suite in suites[key])),
        levels=tuple(levels[key] for key in keys),
        attested={key: attested[key] for key in keys if key in attested},
        doubts=tuple(dict.fromkeys(words for record in group for words in record.get("doubts") or ())),
        protocol=protocol(first),
        state=f"failed: {first['error']}" if first.get("error") else "",
    )


def _left_out(entry: Record, words: Mapping[str, Mapping[str, str]], tracks: Mapping[str, str]) -> Cell:
    cell = entry["cell"]
    short = {part: words[part].get(cell.get(part, ""), str(cell.get(part, ""))) for part in (*PLACE, "defense")}
    identity = hashlib.sha256(canonical([cell, "n/a"]).encode()).hexdigest()[:12]
    track = tracks.get(cell.get("model", ""), TRACKS[0])
    state = f"n/a: {entry['reason']}"
    return Cell(identity, track, ("purification",), cell, short, "–", False, "", (), (), (), {}, (), "", state)


def _track(record: Record) -> str:
    said = (record.get("provenance") or {}).get("track")
    return said if said in TRACKS else TRACKS[0]


def _tasks(group: Sequence[Record]) -> tuple[str, ...]:
    """What the defense is for: by what it says it delivers, and by what was measured."""
    if _control(group[0]["cell"]) == "none":
        return ("purification", "attacks")
    delivers = {what for record in group for what in (record.get("provenance") or {}).get("delivers") or ()}
    measured = {name for record in group for name in (record.get("scores") or {}) if _measured(record, name)}
    found = {"screening"} if "screen" in delivers or "screen_auroc" in measured else set()
    found |= {"detection"} if "suspicion" in delivers or "suspicion" in measured else set()
    found |= {"purification"} if not delivers or delivers & {"model", "sampler"} else set()
    return tuple(task for task in TASKS if task in found)


def _measured(record: Record, name: str) -> bool:
    return not math.isnan(number(record["scores"][name]))


def _control(cell: Record) -> str:
    if cell.get("told") == "wrong-trigger":
        return "wrong trigger"
    return bare(cell["defense"]) if bare(cell["defense"]) in CONTROLS else ""


def _order(cell: Cell) -> tuple[Any, ...]:
    s = cell.short
    clean = bare(s["attack"]) == "none"
    rank = CONTROLS.index(cell.control) if cell.control in CONTROLS else len(CONTROLS)
    place = (cell.track != TRACKS[0], s["model"], clean, s["attack"], s["trigger"], s["target"], s["sampler"])
    return (*place, bool(cell.state), rank, s["defense"], bool(cell.control), cell.id)


def level(record: Record, attestation: Record | None) -> str:
    """How far a record's numbers were checked: "claimed" (as handed in), "recomputed" (every score that has per-sample
    values follows from them) or "reproduced" (also run again, and within the interval)."""
    outcome = recompute.recompute(record.get("scores") or {})
    if outcome.problems or not outcome.recomputed:
        return "claimed"
    return "reproduced" if attestation is not None and attestation.get("within") is True else "recomputed"


# ---- tables of defenses ---------------------------------------------------------------------------------------------


def blocks(every: Iterable[Cell], track: str, task: str) -> list[Block]:
    """The tables of one view, those over most settings first."""
    figures = figures_of(track, task)
    mine = [c for c in every if c.track == track and task in c.tasks and not c.state and _attacked(c)]
    by_defense: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in mine:
        by_defense[cell.full["model"], cell.full["defense"], cell.full.get("told", "truth")].append(cell)
    coverages: dict[tuple[str, frozenset[tuple[str, ...]]], list[list[Cell]]] = defaultdict(list)
    for (model, *_), group in by_defense.items():
        if group[0].control not in CONTROLS:
            coverages[model, frozenset(cell.setting for cell in group)].append(group)
    controls = {key: group for key, group in by_defense.items() if group[0].control in CONTROLS}
    made = [_block(model, covered, groups, controls, figures) for (model, covered), groups in coverages.items()]
    return sorted(made, key=lambda block: (-len(block.settings), block.model, block.settings))


def _attacked(cell: Cell) -> bool:
    return bare(cell.short["attack"]) != "none"


def _block(
    model: str,
    covered: frozenset[tuple[str, ...]],
    groups: Sequence[Sequence[Cell]],
    controls: Mapping[tuple[str, ...], Sequence[Cell]],
    figures: Sequence[Figure],
) -> Block:
    beside = [[c for c in group if c.setting in covered] for key, group in controls.items() if key[0] == model]
    rows = [row(group, figures) for group in groups]
    wrong = {r.first.full["defense"]: r for r in rows if r.first.control}
    first = rows[0].first
    block = Block(
        first.short["model"],
        tuple(sorted(covered)),
        tuple(dict.fromkeys(setting_words(cell) for cell in rows[0].cells)),
        {figure.score: judge(first.name(figure.score)) for figure in figures},
        sorted(
            (row(group, figures) for group in beside if len({cell.setting for cell in group}) == len(covered)),
            key=lambda r: CONTROLS.index(r.first.control),
        ),
        [],
        [],
    )
    for knows, place in ((False, block.blind), (True, block.told)):
        ranked = grouped([r for r in rows if r.first.knows == knows and not r.first.control], figures[0])
        for each in ranked:
            place += [each, wrong.pop(each.first.full["defense"])] if knows and _has(wrong, each) else [each]
    block.told += wrong.values()
    return block


def _has(wrong: Mapping[str, Row], each: Row) -> bool:
    return each.first.full["defense"] in wrong


def setting_words(cell: Cell) -> str:
    s = cell.short
    return f"{s['attack']}, {s['trigger']} → {s['target']}, {s['sampler']}"


def judge(name: str) -> str:
    return name.partition("[")[2].rstrip("]")


def row(group: Sequence[Cell], figures: Sequence[Figure]) -> Row:
    """A defense over its cells. A score that any cell lacks has neither worst case nor mean."""
    made = Row(tuple(group))
    for figure in figures:
        found = [(cell.figure(figure.score), cell) for cell in group]
        missing = next((value for value, _ in found if math.isnan(value.value)), None)
        if missing is not None:
            made.worst[figure.score], made.mean[figure.score] = missing, math.nan
            continue
        sign = 1 if figure.better <= 0 else -1
        worst, cell = max(found, key=lambda pair: (sign * pair[0].value, pair[1].id))
        made.worst[figure.score], made.deciding[figure.score] = worst, cell
        made.mean[figure.score] = math.fsum(value.value for value, _ in found) / len(found)
    return made


def grouped(rows: Sequence[Row], by: Figure) -> list[Row]:
    """`rows` in order of the worst case, with `group` letters: a group takes in every row whose interval meets that of
    its first. Without an interval only equals tie. Unmeasured rows and those with broken utility have no letter."""
    sign = 1 if by.better <= 0 else -1
    ranked = sorted(
        (r for r in rows if _ranked(r, by)), key=lambda r: (sign * r.worst[by.score].value, r.first.defense)
    )
    index, head = -1, None
    for each in ranked:
        if head is None or not _meet(head.worst[by.score], each.worst[by.score]):
            index, head = index + 1, each
        each.group = LETTERS[index] if index < len(LETTERS) else str(index + 1)
    rest = sorted((r for r in rows if not _ranked(r, by)), key=lambda r: r.first.defense)
    return [*ranked, *rest]


def _ranked(each: Row, by: Figure) -> bool:
    broken = any("utility is broken" in words or "samples collapsed" in words for words in each.doubts)
    return not math.isnan(each.worst[by.score].value) and not broken


def _meet(a: Number, b: Number) -> bool:
    low_a, high_a = (a.value, a.value) if a.low is None or a.high is None else (a.low, a.high)
    low_b, high_b = (b.value, b.value) if b.low is None or b.high is None else (b.low, b.high)
    return low_a <= high_b and low_b <= high_a
