"""The report of a run: a table for the terminal, and report.md, report.json, report.csv and the records in a folder.

Reads records only. Every text that comes from a plugin or a record is data: it is escaped, never markup.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.runs import doubts
from harness.runs.jsonable import to_jsonable
from harness.runs.printable import one_line
from harness.runs.record import Dropped, Record
from harness.types import Cell, Doubt, Score
from leaderboard import population, results
from leaderboard.columns import Column, possible
from leaderboard.rows import Number, Row, Table, by_setting, control_of, pooled

LEGEND = (
    "Letters go by ASR: two rows share a letter where they are not shown to differ. They are shown to differ if they "
    "share at least three seeds and the 95 % interval of their paired difference excludes 0, as bench compare computes "
    "it. Blind defenses and those that were given the trigger have letters of their own. Controls, defenses that broke "
    "clean utility and rows with fewer than three seeds in common with another row have none. Brackets are 95 % "
    "intervals: over samples (Wilson) for one seed, and for several that give the same value; else over seeds (t). FD "
    "is compared only at equal n and extractor. NFE: network evaluations of one sample."
)
CELL = (
    "model",
    "attack",
    "trigger",
    "target",
    "defense",
    "sampler",
    "seed",
    "trigger_given",
    "n",
    "evaluation_seed",
    "utility_n",
    "utility_sampler",
)
MARKS = "abcdefghijklmnopqrstuvwxyz"
Text = Callable[[object], str]
WIDTH = 120  # characters of a line where stdout is no terminal
UNMEASURED = ("",) * 5  # cells of report.csv


def terminal(records: Iterable[Record], dropped: Iterable[Dropped] = (), width: int = WIDTH) -> str:
    """The leaderboard as text at most `width` columns wide where that is possible; what does not fit is left to
    report.md, and named."""
    parts, cells = [], pooled(list(records), list(dropped))
    hidden: dict[str, None] = {}
    for table in by_setting(cells):
        columns, notes = _measured(table), Notes()
        body = _render(table, columns, notes, one_line, "simple")
        while _wide(body) > width and any(column.leaves for column in columns):
            first = max(column.leaves for column in columns)
            columns, notes = [column for column in columns if column.leaves != first], Notes()
            body = _render(table, columns, notes, one_line, "simple")
        hidden |= dict.fromkeys(each.heading for each in _measured(table) if each not in columns)
        states = [f"  {one_line(r.defense)} [{one_line(r.knows)}]: {one_line(r.state)}" for r in table.of("missing")]
        footnotes = [f"  {mark}: {one_line(words)}" for mark, words in notes.legend()]
        remark = [f"  {one_line(table.remark)}"] if table.remark else []
        under = [textwrap.fill(line, width, subsequent_indent="    ") for line in (*states, *footnotes, *remark)]
        title = textwrap.fill(_title(table, one_line), width, subsequent_indent="  ", break_on_hyphens=False)
        parts.append("\n".join([title, "", body, *under]))
    detection = population.sentences(population.populations(cells), one_line)
    parts += ["\n".join(["detection over populations of models", "", *detection])] if detection else []
    legend = LEGEND + (f" Not shown for want of room: {'; '.join(hidden)}. report.md has them." if hidden else "")
    return "\n\n\n".join([*parts, textwrap.fill(legend, width)]) if parts else "no records"


def write(records: Sequence[Record], dropped: Sequence[Dropped], out: Path) -> dict[str, Path]:
    """Write the report into folder `out` and return {"md", "json", "csv", "records": path}.

    Contact sheets that records name and that lie in the folder are linked. Records and pictures of an earlier run are
    removed.
    """
    for record in records:
        results.write_record(out, record)
    for entry in dropped:
        results.write_dropped(out, entry)
    results.prune(out, records, dropped)
    for name, text in derived(records, dropped, out).items():
        results.write_text(out / name, text)
    return {kind: out / f"report.{kind}" for kind in ("md", "json", "csv")} | {"records": out / "records"}


def derived(records: Sequence[Record], dropped: Sequence[Dropped], out: Path) -> dict[str, str]:
    """What follows from the records: name → text of report.md, report.json and report.csv in folder `out`."""
    sheets = {r.key: r.sheet for r in records if r.sheet is not None and (out / r.sheet).is_file()}
    tables = by_setting(pooled(records, dropped))
    document = {
        "records": [brief(record) for record in records],
        "dropped": to_jsonable(dropped),
        "rows": [entry(table, row) for table in tables for row in table.rows],
        "sheets": sheets,
    }
    return {
        "report.md": markdown(records, dropped, sheets),
        "report.json": results.dump(document),
        "report.csv": comma_separated(records, tables, dropped),
    }


# ---- text -----------------------------------------------------------------------------------------------------------


def escape(text: object) -> str:
    """`one_line`, with everything escaped that Markdown or HTML would read as markup inside a line."""
    words = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", one_line(text))
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return words.replace("://", "&#58;//")  # GitHub makes links of bare addresses


class Notes:
    """Footnotes of a table: each reason gets one mark, in the order of first use."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, words: str) -> str:
        if words not in self._marks:
            self._marks[words] = mark(len(self._marks))
        return self._marks[words]

    def marks(self, doubted: Iterable[Doubt]) -> str:
        return " ".join(self.mark(doubt.text) for doubt in doubted) or "none"

    def legend(self) -> list[tuple[str, str]]:
        return [(mark, words) for words, mark in self._marks.items()]


def mark(i: int) -> str:
    """The i-th mark: a, b, ... z, aa, bb ..."""
    return MARKS[i % 26] * (i // 26 + 1)


# ---- tables ---------------------------------------------------------------------------------------------------------


def markdown(
    records: Sequence[Record], dropped: Sequence[Dropped] = (), sheets: Mapping[str, str] | None = None
) -> str:
    """report.md. sheets: key → path of its contact sheet, relative to the report."""
    cells = pooled(records, dropped)
    detection = population.rendered(population.populations(cells), escape)
    parts = ["# Leaderboard", every_cell(by_setting(cells), sheets if sheets is not None else {})]
    parts += ["## Detection over populations of models", population.LEGEND, detection] if detection else []
    return "\n\n".join(parts) + "\n"


def every_cell(tables: Iterable[Table], sheets: Mapping[str, str]) -> str:
    """The tables, one per setting (`by_setting`), as Markdown, below the headings of the tracks."""
    parts, track = [escape_words(LEGEND)], None
    for table in tables:
        if table.track != track:
            track = table.track
            parts.append(f"## Track: {escape(track)}")
        notes = Notes()
        parts += [f"### {_title(table, escape)}", _render(table, _measured(table), notes, escape, "pipe")]
        lines = [f"- **{escape(r.defense)}** ({escape(r.knows)}): {escape(r.state)}" for r in table.of("missing")]
        lines += [f"- <sup>{mark}</sup> {escape(words)}" for mark, words in notes.legend()]
        lines += [f"- letters: {escape(table.remark)}"] if table.remark else []
        named, links = _named(table), _links(table, sheets)
        lines += [f"- triggers found: {named}"] if named else []
        lines += [f"- contact sheets: {links}"] if links else []
        parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def escape_words(text: str) -> str:
    """Our own prose, in which only brackets could be read as markup."""
    return text.replace("[", "\\[").replace("#", "\\#")


def _of(table: Table) -> list[tuple[str, Record]]:
    """The records of a table with their defenses."""
    return [(row.defense, record) for row in table.rows for cell in row.cells for record in cell.records]


def _named(table: Table) -> str:
    """The texts that the defenses name as triggers, with every character beyond ASCII by its number."""
    found = [(name, record.cell.seed, record.provenance.found_trigger) for name, record in _of(table)]
    return ", ".join(f"{escape(name)}, seed {seed}: {escape(ascii(t))}" for name, seed, t in found if t is not None)


def _links(table: Table, sheets: Mapping[str, str]) -> str:
    found = [(name, record) for name, record in _of(table) if record.key in sheets]
    return ", ".join(f"[{escape(name)}, seed {record.cell.seed}]({sheets[record.key]})" for name, record in found)


def _title(table: Table, text: Text) -> str:
    return " · ".join(text(part) for part in (table.track, table.model, *table.settings))


def _measured(table: Table) -> list[Column]:
    """The columns that have a number in any row."""
    return [c for c in table.columns if any(not math.isnan(row.worst[c.score].value) for row in table.rows)]


def _render(table: Table, columns: Sequence[Column], notes: Notes, text: Text, style: str) -> str:
    from tabulate import tabulate

    numbers = [_heading(table, column) for column in columns]
    head = [text(x) for x in ("letters", "defense", "knowledge", *numbers, "n", "NFE", "seeds", "doubts")]
    if style == "simple":
        head = [word.replace(" ", "\n").replace("[", "\n[") for word in head]
    body = [_cells(row, columns, notes, text) for row in table.rows]
    return tabulate(body, head, tablefmt=style, disable_numparse=True)


def _heading(table: Table, column: Column) -> str:
    """The heading with the judge's name, FD[digits-cnn]: columns never mix judges."""
    judge = table.judge(column)
    return f"{column.heading}[{judge}]" if judge else column.heading


def _cells(row: Row, columns: Sequence[Column], notes: Notes, text: Text) -> list[str]:
    front = [row.letters or "–", text(row.defense), text(row.knows)]
    if row.state is not None:
        return [*front, *([row.state.kind] * len(columns)), "–", "–", "–", "see below"]
    numbers = [_number(row.worst[column.score], column, notes) for column in columns]
    seeds = "one seed" if row.seeds == 1 else f"{row.seeds} seeds"
    nfe = ", ".join(map(str, row.first.nfe)) or "–"
    return [*front, *numbers, str(row.first.specs.n), nfe, seeds, notes.marks(row.doubts)]


def _number(number: Number, column: Column, notes: Notes) -> str:
    if math.isnan(number.value):
        return f"n/a ({notes.mark(f'n/a: {number.warning}')})"
    scale = 100 if column.percent else 1
    value = f"{number.value * scale:.{column.digits}f}"
    said = [f"{end * scale:.{column.digits}f}" for end in number.ends]
    return f"{value} ({'–'.join(said)})" if column.interval and said else value


def _wide(text: str) -> int:
    return max(len(line) for line in text.splitlines())


# ---- files ----------------------------------------------------------------------------------------------------------


def entry(table: Table, row: Row) -> dict[str, Any]:
    """A row in report.json: what the tables say of it beyond its records' numbers."""
    return {
        "track": table.track, "model": table.model, "settings": table.settings, "defense": row.defense,
        "knowledge": row.first.knowledge, "trigger_given": row.trigger_given, "control": row.control,
        "letters": row.letters, "doubts": to_jsonable(row.doubts), "keys": row.first.keys,
        "state": None if row.state is None else asdict(row.state),
    }  # fmt: skip


def comma_separated(records: Sequence[Record], tables: Iterable[Table], dropped: Sequence[Dropped] = ()) -> str:
    """report.csv: a line per cell and seed, every score with value, interval and n. Unmeasured is "nan" with its
    warning. tables: of the records, `by_setting`, with their letters. doubts: their codes."""
    names = sorted({name for record in records for name in record.scores})
    parts = ("", " low", " high", " n", " warning")
    letters = {key: row.letters for table in tables for row in table.rows for key in row.first.keys}
    doubted = doubts.of(records)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    beside = ("nfe", "knowledge", "control", "letters", "state", "doubts")
    fields = ["key", *CELL, *beside, *(name + part for name in names for part in parts)]
    writer.writerow([safe(name) for name in fields])
    for record in records:
        state = f"failed: {record.error}" if record.error else "done"
        codes = " ".join(doubt.code for doubt in doubted[record.key])
        told = [record.provenance.nfe, " ".join(record.given), control_of(record.cell), letters[record.key]]
        about = [safe(x) for x in (record.key, *_specs(record.cell), *told, state, codes)]
        writer.writerow([*about, *(x for name in names for x in _csv_score(name, record.scores.get(name)))])
    for left in dropped:
        told = ["", "", control_of(left.cell), "", f"n/a: {left.reason}", ""]
        writer.writerow([safe(x) for x in ("", *_specs(left.cell), *told, *("" for _ in names for _ in parts))])
    return buffer.getvalue()


def _specs(cell: Cell) -> list[str | int]:
    return [getattr(cell, name) for name in CELL]


def _csv_score(name: str, score: Score | None) -> Sequence[str]:
    """Value, interval, n and warning as cells; most records lack most of the scores of all."""
    if score is None:
        return UNMEASURED
    found = (score.value, *(possible(name, score.interval) or ("", "")), score.n, score.warning)
    return [safe(value) for value in found]


def safe(value: object) -> str:
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets a ' in front."""
    if value is None or value == "":
        return ""
    if type(value) in (int, float):
        return str(value)
    text = one_line(value)
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def brief(record: Record) -> dict[str, Any]:
    """The record as JSON without attempts and per-sample values, which the files of the records keep."""
    scores = {name: replace(score, per_sample=None) for name, score in record.scores.items()}
    return to_jsonable(record.model_copy(update={"attempts": (), "scores": scores}))
