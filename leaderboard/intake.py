"""How rows get into the committed results: one suite's folder, filled from runs and sealed anew each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard import report
from leaderboard.results import Results, cell_of, distinct, keep_sheet, read_suite

Annotate = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


def refresh(folder: Path, annotate: Annotate) -> Results:
    """Write a folder's records, doubts, pictures, reports and manifest anew from its records.

    annotate: harness.doubts.annotate. Raises ResultsError.
    """
    return _write(folder, read_suite(folder), (), annotate)


def add(run: Path, folder: Path, annotate: Annotate) -> Results:
    """Put the records of a run's folder into `folder`, where a row of the same cell gives way to the new one.

    Attestations of rows that are gone go with them. Raises ResultsError, also where a folder has two records of a cell.
    """
    return _write(folder, read_suite(folder), (read_suite(run),), annotate)


def _write(folder: Path, old: Results, new: Sequence[Results], annotate: Annotate) -> Results:
    by_cell: dict[str, dict[str, Any]] = {}
    dropped: dict[str, dict[str, Any]] = {}
    for results in (old, *new):
        distinct([results])
    for results in (old, *new):
        for record in results.records:
            sheet = results.sheet_file(record)
            kept = {**record, "sheet": keep_sheet(sheet, folder) if sheet else None}
            by_cell[cell_of(record)] = kept
        dropped |= {cell_of(entry): entry for entry in results.dropped}
    report.write(annotate(list(by_cell.values())), list(dropped.values()), folder, packed=True)
    return read_suite(folder)
