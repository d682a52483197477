"""A page for each cell and for each defense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.runs.record import Provenance
from leaderboard import paper_rankings, reported
from leaderboard.columns import TASK_WORDS, TASKS, TRACK_WORDS, TRACKS, Column, of_view, possible
from leaderboard.rendering import slug
from leaderboard.results import protocol
from leaderboard.rows import PooledCell
from leaderboard.specs import PARTS, arguments

if TYPE_CHECKING:
    from leaderboard.site import Site

_MOST_NOTES, _LONGEST_NOTE = 8, 200  # of a list of texts or parts; characters


@dataclass(frozen=True)
class ScoreLine:
    """A score of a cell: (value, interval) per seed."""

    name: str
    seeds: list[tuple[str, str]]
    n: int
    note: str


@dataclass(frozen=True)
class CellTable:
    """A defense's cells in one view."""

    title: str
    columns: tuple[Column, ...]
    cells: list[PooledCell]


def cell_page(site: Site, cell: PooledCell) -> None:
    sheets = [(s, p) for k, s in zip(cell.keys, cell.seeds, strict=True) if (p := site.sheet(k, "../")) is not None]
    task = cell.tasks[0] if cell.tasks else "purification"
    site.page(
        f"cells/{cell.id}.html", "cell.html.jinja", "../", site=site, cell=cell, sheets=sheets,
        columns=of_view(cell.track, task), scores=_scores(cell), unmeasured=_unmeasured(cell),
        parameters=_parameters(cell), notes=_notes(cell), files=[site.origins[key].file for key in cell.keys],
        protocol=protocol(cell.records[0]) if cell.records else "",
    )  # fmt: skip


def _scores(cell: PooledCell) -> list[ScoreLine]:
    """Every score that any seed measured."""
    lines = []
    for name in sorted({name for record in cell.records for name in record.scores}):
        found = [record.scores.get(name) for record in cell.records]
        known = [score for score in found if score is not None]
        if all(math.isnan(score.value) for score in known):
            continue
        notes = dict.fromkeys(score.warning for score in known if score.warning)
        seeds = [("n/a", "") if s is None else (_plainly(s.value), _between(possible(name, s.interval))) for s in found]
        lines.append(ScoreLine(name, seeds, known[0].n, "; ".join(notes)))
    return lines


def _unmeasured(cell: PooledCell) -> list[tuple[str, str]]:
    scores = cell.records[0].scores.items() if cell.records else ()
    return sorted((name, score.warning or "") for name, score in scores if math.isnan(score.value))


def _notes(cell: PooledCell) -> list[tuple[str, list[str]]]:
    """What the defense said of its own work: (name, one text per seed)."""
    found = [dict(_said(record.provenance)) for record in cell.records]
    names = dict.fromkeys(name for notes in found for name in notes)
    return [(name, [notes.get(name, "") for notes in found]) for name in sorted(names)]


def _said(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """Its notes, and the text that it names as the trigger with every character beyond ASCII by its number."""
    yield from _flat(provenance.notes)
    if provenance.found_trigger is not None:
        yield "trigger found", ascii(provenance.found_trigger)


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(name.inner, text) of nested notes; a curve is its first and last value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(x, (int, float)) for x in value):
        yield name, f"{_plainly(value[0])} … {_plainly(value[-1])} ({len(value)} values)"
    elif isinstance(value, list):
        for i, inner in enumerate(value[:_MOST_NOTES]):
            yield from _flat(inner, f"{name}.{i}")
    else:
        yield name, _plainly(value) if isinstance(value, (int, float)) else str(value)[:_LONGEST_NOTE]


def _plainly(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.6g}"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} – {interval[1]:.4g}"


def _parameters(cell: PooledCell) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """For each part of the cell its spec and its parameters, each with whether it has its default."""
    rows = []
    for part in PARTS:
        spec, changed = getattr(cell.specs, part), arguments(getattr(cell.short, part))
        rows.append((part, spec, [(key, value, key not in changed) for key, value in arguments(spec).items()]))
    return rows


def defense_page(site: Site, defense: str) -> None:
    mine = [cell for cell in site.cells if cell.defense == defense]
    tables = []
    for track in TRACKS:
        for task in TASKS:
            cells = [cell for cell in mine if cell.track == track and task in cell.tasks]
            if cells and not (defense == "none" and task == "purification"):
                title = f"{TASK_WORDS[task]}, {TRACK_WORDS[track].lower()} models"
                tables.append(CellTable(title, of_view(track, task), cells))
    sheets = [(c, p) for c in mine if c.keys and (p := site.sheet(c.keys[0], "../")) is not None]
    numbers = reported.shipped()
    beside = [
        (n, paper_rankings.span(n, paper_rankings.values(paper_rankings.matching(mine, n), n)), numbers.paper(n.paper))
        for n in numbers.of_defense(defense)
    ]
    site.page(
        f"defenses/{slug(defense)}.html", "defense.html.jinja", "../", site=site, defense=defense, cells=len(mine),
        tables=tables, reported=beside, sheets=sheets, legend=paper_rankings.LEGEND,
        rankings=[r for r in site.rankings if any(place.entry.defense == defense for place in r.places)],
    )  # fmt: skip
