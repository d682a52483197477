"""The results table of README.md, made from the published records of the suite `quick`.

python -m tests.readme_table        # rewrite the table in README.md
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.runs.record import Record
from leaderboard import results
from tests.tables import Place

PLACE = Place(Path(__file__).parents[1] / "README.md", "python -m tests.readme_table")
SUITE, MODEL = "quick", "shapes-sd"
COLUMNS = (("ASR %", "asr", 100, 1), ("attributes right %", "attribute_accuracy", 100, 1), ("drift", "drift", 1, 4))
HEAD = ("defense", "defense's knowledge", *(title for title, *_ in COLUMNS))
Row = tuple[str, ...]


def table(every: Iterable[results.Results]) -> str:
    """Markdown: one row per defense and knowledge on `MODEL`, means over the seeds, (lowest–highest) if they differ."""
    (quick,) = (suite for suite in every if suite.suite == SUITE)
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in quick.records:
        if _name(record, "model") == MODEL:
            groups[_place(record)].append(record)
    rows = [_row(groups[place]) for place in sorted(groups)]
    lines = ("| " + " | ".join(cells) + " |" for cells in [HEAD, ("---",) * len(HEAD), *rows])
    return "\n".join(lines)


def _name(record: Record, part: str) -> str:
    return getattr(record.cell, part).partition("(")[0]


def _place(record: Record) -> tuple[Any, ...]:
    """Where a record's row stands: the clean model first, then blind defenses, then those given the trigger."""
    defense, decoy = _name(record, "defense"), record.cell.trigger_given == "decoy"
    attacked = _name(record, "attack") != "none"
    return attacked, "trigger" in record.knowledge, defense != "none", defense, decoy


def _row(records: Sequence[Record]) -> Row:
    """One row of the table from the records of its seeds."""
    first = records[0]
    defense = f"`{_name(first, 'defense')}`" if _name(first, "attack") != "none" else "(clean model, no attack)"
    trigger = "decoy trigger (control)" if first.cell.trigger_given == "decoy" else "trigger"
    names = sorted(first.knowledge, key=lambda name: name != "trigger")
    knowledge = ", ".join(trigger if name == "trigger" else name for name in names)
    return defense, knowledge or "–", *(_pooled(records, *column[1:]) for column in COLUMNS)


def _pooled(records: Sequence[Record], score: str, scale: float, digits: int) -> str:
    values = [scale * record.value(score) for record in records]
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low}–{high})"


def main() -> None:
    PLACE.write(table(results.read()))


if __name__ == "__main__":
    main()
