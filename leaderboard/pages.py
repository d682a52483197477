"""A page for each cell and for each defense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leaderboard import orders, reported, summary
from leaderboard.rendering import slug
from leaderboard.summary import TASK_WORDS, TASKS, TRACK_WORDS, TRACKS, Cell
from leaderboard.tables import arguments, bare

if TYPE_CHECKING:
    from leaderboard.site import Site

_MOST_NOTES, _LONGEST_NOTE = 8, 200  # of a list of texts or parts; characters


def cell_page(site: Site, cell: Cell) -> None:
    sheets = [(s, p) for k, s in zip(cell.keys, cell.seeds, strict=True) if (p := site.sheet(k, "../")) is not None]
    task = cell.tasks[0] if cell.tasks else "purification"
    files = [site.files[key] for key in cell.keys]
    site.page(
        f"cells/{cell.id}.html", "cell.html.jinja", "../", cell=cell, sheets=sheets,
        figures=summary.figures_of(cell.track, task), scores=_scores(cell), unmeasured=_unmeasured(cell),
        parameters=_parameters(cell), notes=_notes(cell), files=files,
    )  # fmt: skip


def _scores(cell: Cell) -> list[dict[str, Any]]:
    """Every score that any seed measured: value and interval a seed."""
    names = dict.fromkeys(name for record in cell.records for name in record.get("scores") or {})
    rows = []
    for name in sorted(names):
        found = [(record.get("scores") or {}).get(name) or {} for record in cell.records]
        if all(score.get("value") is None for score in found):
            continue
        notes = dict.fromkeys(str(score["warning"]) for score in found if score.get("warning"))
        values = [(_plainly(score.get("value")), _between(score.get("interval"))) for score in found]
        rows.append({"name": name, "seeds": values, "n": found[0].get("n", ""), "note": "; ".join(notes)})
    return rows


def _unmeasured(cell: Cell) -> list[tuple[str, str]]:
    scores = (cell.records[0].get("scores") or {}) if cell.records else {}
    return sorted((name, str(s.get("warning") or "")) for name, s in scores.items() if s.get("value") is None)


def _notes(cell: Cell) -> list[tuple[str, list[str]]]:
    """What the defense said of its own work: (name, a text a seed)."""
    found = [dict(_said(record.get("provenance") or {})) for record in cell.records]
    names = dict.fromkeys(name for notes in found for name in notes)
    return [(name, [notes.get(name, "") for notes in found]) for name in sorted(names)]


def _said(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Its notes, and the text that it names as the trigger with every character beyond ASCII by its number."""
    yield from _flat(provenance.get("notes") or {})
    if provenance.get("found_trigger") is not None:
        yield "trigger found", ascii(provenance["found_trigger"])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
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


def _plainly(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6g}"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} – {interval[1]:.4g}"


def _parameters(cell: Cell) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """For each part of the cell its spec and its parameters, each with whether it has its default."""
    rows = []
    for part in ("model", "attack", "trigger", "target", "defense", "sampler"):
        spec, changed = str(cell.full.get(part, "")), arguments(cell.short.get(part, ""))
        rows.append((part, spec, [(key, value, key not in changed) for key, value in arguments(spec).items()]))
    return rows


def defense_page(site: Site, defense: str) -> None:
    mine = [cell for cell in site.cells if bare(cell.short["defense"]) == defense]
    tables = []
    for track in TRACKS:
        for task in TASKS:
            cells = [cell for cell in mine if cell.track == track and task in cell.tasks]
            if cells and not (defense == "none" and task == "purification"):
                title = f"{TASK_WORDS[task]}, {TRACK_WORDS[track].lower()} models"
                tables.append({"title": title, "figures": summary.figures_of(track, task), "cells": cells})
    sheets = [(c, p) for c in mine if c.keys and (p := site.sheet(c.keys[0], "../")) is not None]
    numbers = reported.shipped()
    beside = [
        (n, orders.span(n, orders.values(orders.matching(mine, n), n)), numbers.paper(n.paper))
        for n in numbers.of_defense(defense)
    ]
    site.page(
        f"defenses/{slug(defense)}.html", "defense.html.jinja", "../", defense=defense, cells=len(mine), tables=tables,
        reported=beside, sheets=sheets, legend=orders.LEGEND,
        orders=[o for o in site.orders if any(place.entry.defense == defense for place in o.places)],
    )  # fmt: skip
