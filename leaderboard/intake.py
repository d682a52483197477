"""How rows get into the committed results: one suite's folder, filled from runs and sealed anew each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard import report
from leaderboard.results import Results, keep_sheet, read_suite

Annotate = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


def refresh(folder: Path, annotate: Annotate) -> Results:
    """Write a folder's records, doubts, pictures, reports and manifest anew from its records.

    annotate: harness.doubts.annotate. Raises ResultsError.
    """
    return _write(folder, read_suite(folder), (), annotate)


def add(run: Path, folder: Path, annotate: Annotate) -> Results:
    """Put the records of a run's folder into `folder`, where a row of the same cell gives way to the new one.

    Attestations of rows that are gone go with them. Raises ResultsError.
    """
    new = read_suite(run)
    (folder / "records").mkdir(parents=True, exist_ok=True)
    return _write(folder, read_suite(folder), (new,), annotate)


def _write(folder: Path, old: Results, new: Sequence[Results], annotate: Annotate) -> Results:
    by_cell: dict[str, dict[str, Any]] = {}
    dropped: dict[str, dict[str, Any]] = {}
    for results in (old, *new):
        for record in results.records:
            sheet = results.sheet_file(record)
            kept = {**record, "sheet": keep_sheet(sheet, folder) if sheet else None}
            by_cell[str(sorted(record["cell"].items()))] = kept
        dropped |= {str(sorted(entry["cell"].items())): entry for entry in results.dropped}
    records = list(by_cell.values())
    keys, sheets = {record["key"] for record in records}, {record["sheet"] for record in records}
    for path in folder.glob("*/*"):
        kind = path.parent.name
        known = f"sheets/{path.name}" in sheets if kind == "sheets" else path.name.partition(".")[0] in keys
        if kind in ("records", "sheets", "reproduced") and not known:
            path.unlink()
    report.write(annotate(records), list(dropped.values()), folder, packed=True)
    return read_suite(folder)
