"""How rows get into the committed results: from a run's folder into a suite's, each as a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.runs.record import Record
from leaderboard.results import (
    Results,
    ResultsError,
    distinct,
    keep_sheet,
    read_suite,
    write_dropped,
    write_record,
)
from leaderboard.specs import as_written, today


def add(run: Path, folder: Path, current: Callable[[str], str] = as_written) -> Results:
    """Put the records of a run's folder into `folder`. Files of rows that are there already keep their bytes.

    A row of the same cell under another key (its code or weights changed) gives way to the new one, and its attestation
    with it. current: a spec as it is written today, so that a row from before a plugin gained a parameter is known
    again. One under the same key stays, unless it failed: it has the same numbers, and if every contributor replaced
    the controls by those of their own run, their branches would conflict. Raises ResultsError, also where a folder has
    two records of a cell, and where the run has none.
    """
    new, old = read_suite(run), read_suite(folder)
    distinct([new])
    distinct([old])
    if not new.records:
        raise ResultsError(f"{run}: holds no records; give the folder that bench run SUITE -o DIR wrote")
    there = {record.key for record in old.records if not record.error}
    rows = [record for record in new.records if record.key not in there]
    pictures = [_readable(new, record) for record in rows]
    for record, picture in zip(rows, pictures, strict=True):
        sheet = None if picture is None else keep_sheet(picture, folder)
        write_record(folder, record.model_copy(update={"sheet": sheet}), packed=True)
    for entry in new.dropped:
        write_dropped(folder, entry)
    _give_way(old, new, current)
    return read_suite(folder)


def _readable(run: Results, record: Record) -> Path | None:
    """A record's contact sheet, checked before anything is written."""
    from leaderboard.rendering import picture_size

    sheet = run.sheet_file(record)
    if sheet is not None and picture_size(sheet) == (0, 0):
        raise ResultsError(f"{sheet}: a contact sheet that is no picture")
    return sheet


def _give_way(old: Results, new: Results, current: Callable[[str], str]) -> None:
    """Remove the rows of `old` whose cells `new` has under other keys, and the sheets that no row names any more."""
    keys = {today(record.cell, current): record.key for record in new.records}
    replaced = [r for r in old.records if keys.get(today(r.cell, current), r.key) != r.key]
    for record in replaced:
        old.record_file(record.key).unlink()
        (old.folder / "reproduced" / f"{record.key}.json").unlink(missing_ok=True)
    named = {record.sheet for record in read_suite(old.folder).records}
    for record in old.records:
        if record.sheet is not None and record.sheet not in named:
            (old.folder / record.sheet).unlink(missing_ok=True)
