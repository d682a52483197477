"""The report of a run: a table for the terminal, and report.md, report.json, report.csv and the records in a folder.

Reads records only. Every text that comes from a plugin or a record is data: it is escaped, never markup.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leaderboard import population, results
from leaderboard.tables import COLUMNS, Column, Number, Record, Row, Table, ends, tables

LEGEND = (
    "Places (#) go by ASR to a tenth, then by drift; T-places are defenses that were told the trigger. Controls, "
    "wrong-trigger controls and defenses that broke clean utility have none. Brackets are 95 % intervals: over samples "
    "(Wilson) for one seed, over seeds (t) for several. FD is compared at equal n and extractor only. "
    "NFE: network evaluations of one sample."
)
CELL = ("model", "attack", "trigger", "target", "defense", "sampler", "seed", "told", "n")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Text = Callable[[str], str]


def terminal(records: Iterable[Record], dropped: Iterable[Record] = (), width: int = 120) -> str:
    """The leaderboard as text at most `width` columns wide where that is possible; what does not fit is left to
    report.md.

    records: with `doubts` (harness.doubts.annotate). dropped: [{"cell": {...}, "reason": "..."}].
    """
    parts, done = [], list(records)
    for table in tables(done, dropped):
        columns, notes = _shown(table), Notes()
        body = _render(table, columns, notes, plain, "simple")
        while _wide(body) > width and any(column.rank for column in columns):
            widest = max(column.rank for column in columns)
            columns, notes = [column for column in columns if column.rank != widest], Notes()
            body = _render(table, columns, notes, plain, "simple")
        states = [f"  {plain(row.defense)} [{row.told}]: {plain(row.state)}" for row in table.rows if row.state]
        footnotes = [f"  {mark}: {plain(words)}" for mark, words in notes.legend()]
        parts.append("\n".join([_title(table, plain), "", body, *states, *footnotes]))
    detection = population.sentences(done, plain)
    parts += ["\n".join(["detection over populations of models", "", *detection])] if detection else []
    return "\n\n\n".join([*parts, textwrap.fill(LEGEND, width)]) if parts else "no records"


def write(records: Iterable[Record], dropped: Iterable[Record], out: Path, packed: bool = False) -> dict[str, Path]:
    """Write the report into folder `out` and return {"md", "json", "csv", "records": path}.

    packed: records as .json.gz. Contact sheets that records name and that lie in the folder are linked. Records and
    pictures of an earlier run are removed. At the end manifest.json seals the results in the folder.
    """
    done, left_out = [_plain_json(record) for record in records], [_plain_json(entry) for entry in dropped]
    for record in done:
        results.write_record(out, _file_name(record["key"]), results.dump(record), packed)
    results.prune(out, done)
    for name, text in derived(done, left_out, out).items():
        results.write_text(out / name, text)
    results.seal(out)
    return {kind: out / f"report.{kind}" for kind in ("md", "json", "csv")} | {"records": out / "records"}


def derived(records: Sequence[Record], dropped: Sequence[Record], out: Path) -> dict[str, str]:
    """What follows from the records: name → text of report.md, report.json and report.csv in folder `out`."""
    sheets = {r["key"]: r["sheet"] for r in records if r.get("sheet") and (out / r["sheet"]).is_file()}
    return {
        "report.md": markdown(records, dropped, sheets),
        "report.json": results.dump({"records": [brief(r) for r in records], "dropped": dropped, "sheets": sheets}),
        "report.csv": comma_separated(records, dropped),
    }


# ---- text -----------------------------------------------------------------------------------------------------------


def plain(text: object) -> str:
    """One line without characters that a terminal obeys or hides: those are shown as \\uXXXX."""
    words = str(text).replace("\n", " ").replace("\t", " ")
    if words.isprintable():
        return words
    return "".join(c if c == " " or _visible(c) else f"\\u{ord(c):04x}" for c in words)


def escape(text: object) -> str:
    """`plain`, with everything escaped that Markdown or HTML would read as markup inside a line."""
    words = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", plain(text))
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return words.replace("://", "&#58;//")  # GitHub makes links of bare addresses


def _visible(c: str) -> bool:
    return unicodedata.category(c)[0] not in "CZ"


class Notes:
    """Footnotes of a table: each reason gets one mark, in the order of first use."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, words: str) -> str:
        if words not in self._marks:
            self._marks[words] = letter(len(self._marks))
        return self._marks[words]

    def legend(self) -> list[tuple[str, str]]:
        return [(mark, words) for words, mark in self._marks.items()]


def letter(i: int) -> str:
    """The i-th mark: a, b, ... z, aa, bb ..."""
    return LETTERS[i % 26] * (i // 26 + 1)


# ---- tables ---------------------------------------------------------------------------------------------------------


def markdown(records: Sequence[Record], dropped: Sequence[Record] = (), sheets: Mapping[str, str] | None = None) -> str:
    """report.md. sheets: key → path of its contact sheet, relative to the report."""
    parts = ["# Leaderboard", escape_words(LEGEND)]
    track = None
    for table in tables(records, dropped):
        if table.track != track:
            track = table.track
            parts.append(f"## Track: {escape(track)}")
        notes = Notes()
        parts += [f"### {_title(table, escape)}", _render(table, _shown(table), notes, escape, "pipe")]
        states = [row for row in table.rows if row.state]
        lines = [f"- **{escape(row.defense)}** ({escape(row.told)}): {escape(row.state)}" for row in states]
        lines += [f"- <sup>{mark}</sup> {escape(words)}" for mark, words in notes.legend()]
        named = _named(table)
        lines += [f"- triggers found: {named}"] if named else []
        links = _links(table, sheets or {})
        lines += [f"- contact sheets: {links}"] if links else []
        parts += ["\n".join(lines)] if lines else []
    detection = population.rendered(records, escape)
    parts += ["## Detection over populations of models", population.LEGEND, detection] if detection else []
    return "\n\n".join(parts) + "\n"


def escape_words(text: str) -> str:
    """Our own prose, in which only brackets could be read as markup."""
    return text.replace("[", "\\[").replace("#", "\\#")


def _named(table: Table) -> str:
    """The texts that the defenses name as triggers, with every character beyond ASCII by its number."""
    found = [
        f"{escape(row.defense)}, seed {seed}: {escape(ascii(text))}"
        for row in table.rows
        for seed, text in zip(row.seeds, row.found, strict=True)
        if text is not None
    ]
    return ", ".join(found)


def _links(table: Table, sheets: Mapping[str, str]) -> str:
    found = [
        f"[{escape(row.defense)}, seed {seed}]({sheets[key]})"
        for row in table.rows
        for key, seed in zip(row.keys, row.seeds, strict=True)
        if key in sheets
    ]
    return ", ".join(found)


def _title(table: Table, text: Text) -> str:
    parts = [table.track, table.model, table.attack, f"{table.trigger} → {table.target}", table.sampler]
    return " · ".join(text(part) for part in parts)


def _shown(table: Table) -> list[Column]:
    """The columns that have a number in any row."""
    rows = [row for row in table.rows if row.state is None]
    return [c for c in COLUMNS if any(not math.isnan(row.numbers[c.score].value) for row in rows)]


def _render(table: Table, columns: Sequence[Column], notes: Notes, text: Text, style: str) -> str:
    from tabulate import tabulate

    head = ["#", "defense", "told", *(_heading(table, column) for column in columns), "n", "NFE", "seeds", "doubts"]
    head = [text(word) for word in head]
    if style == "simple":
        head = [word.replace(" ", "\n").replace("[", "\n[") for word in head]
    body = [_cells(row, columns, notes, text) for row in table.rows]
    return tabulate(body, head, tablefmt=style, disable_numparse=True)


def _heading(table: Table, column: Column) -> str:
    """The title with the extractor's name, FD[digits-cnn]: columns never mix extractors."""
    names = sorted({row.names.get(column.score, "") for row in table.rows} - {"", column.score})
    found = [name.partition("[")[2].rstrip("]") for name in names if "[" in name]
    if not column.score.endswith("[]") or not found:
        return column.title
    return f"{column.title}[{'/'.join(found)}]"


def _cells(row: Row, columns: Sequence[Column], notes: Notes, text: Text) -> list[str]:
    front = [row.place or "–", text(row.defense), text(row.told)]
    if row.state is not None:
        kind = row.state.partition(":")[0]
        return [*front, *([kind] * len(columns)), "–", "–", "–", "see below"]
    numbers = [_number(row.numbers[column.score], column, notes) for column in columns]
    seeds = "one seed" if len(row.seeds) == 1 else f"{len(row.seeds)} seeds"
    marks = " ".join(notes.mark(words) for words in row.doubts) or "none"
    return [*front, *numbers, str(row.n), ", ".join(map(str, row.nfe)) or "–", seeds, marks]


def _number(number: Number, column: Column, notes: Notes) -> str:
    if math.isnan(number.value):
        return f"n/a ({notes.mark(f'n/a: {number.warning}')})"
    scale = 100 if column.percent else 1
    value = f"{number.value * scale:.{column.digits}f}"
    said = [f"{end * scale:.{column.digits}f}" for end in ends(number, column.percent)]
    return f"{value} ({'–'.join(said)})" if column.interval and said else value


def _wide(text: str) -> int:
    return max(len(line) for line in text.splitlines())


# ---- files ----------------------------------------------------------------------------------------------------------


def comma_separated(records: Sequence[Record], dropped: Sequence[Record] = ()) -> str:
    """report.csv: a line a cell, every score with value, interval and n. Unmeasured is "nan" with its warning."""
    names = list(dict.fromkeys(name for record in records for name in record.get("scores") or {}))
    parts = ("", " low", " high", " n", " warning")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fields = ["key", *CELL, "nfe", "knowledge", "state", "doubts", *(name + part for name in names for part in parts)]
    writer.writerow([safe(name) for name in fields])
    for record in records:
        state = f"failed: {record['error']}" if record.get("error") else "done"
        nfe = (record.get("provenance") or {}).get("nfe")
        front = [record["key"], *(record["cell"].get(name) for name in CELL), nfe]
        front.append(" ".join(record.get("knowledge") or ()))
        scores = record.get("scores") or {}
        numbers = [value for name in names for value in _csv_score(scores.get(name))]
        writer.writerow([safe(x) for x in (*front, state, "; ".join(record.get("doubts") or ()), *numbers)])
    for entry in dropped:
        front = ["", *(entry["cell"].get(name) for name in CELL), "", "", f"n/a: {entry['reason']}", ""]
        writer.writerow([safe(x) for x in (*front, *("" for _ in names for _ in parts))])
    return buffer.getvalue()


def _csv_score(score: Mapping[str, Any] | None) -> list[Any]:
    if score is None:
        return ["", "", "", "", ""]
    low, high = score.get("interval") or ("", "")
    value = score.get("value")
    return ["nan" if value is None else value, low, high, score.get("n"), score.get("warning")]


def safe(value: object) -> str:
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets a ' in front."""
    text = "" if value is None else plain(value)
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _plain_json(record: Record) -> dict[str, Any]:
    return json.loads(json.dumps(results.null(record), sort_keys=True))


def brief(record: Record) -> dict[str, Any]:
    """The record without attempts and per-sample values, which the files of the records keep."""
    scores = record.get("scores") or {}
    kept = {name: {k: v for k, v in score.items() if k != "per_sample"} for name, score in scores.items()}
    return {**{name: value for name, value in record.items() if name != "attempts"}, "scores": kept}


def _file_name(key: str) -> str:
    """`key` if it is a plain file name. ValueError otherwise."""
    if not re.fullmatch(r"[\w-]+", key):
        raise ValueError(f"record key {key!r} is no file name; keys are hex digits")
    return key
