"""The table of models of few steps in docs/results.md, made from the published records of the suite `few-steps`.

python -m tests.few_steps_table      # rewrite the table in docs/results.md
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness.registry import parse_spec
from harness.runs.record import Record, bare
from leaderboard import results
from tests.tables import Place, markdown, measured

PLACE = Place(Path(__file__).parents[1] / "docs" / "results.md", "python -m tests.few_steps_table")
SUITE = "few-steps"
HEAD = ("model", "after the attack", "forward passes", "ASR %", "hits without the trigger %", "attributes right %")
GIVEN = {"true": ", given the trigger", "decoy": ", given a decoy"}


def table(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each record of the suite, the teacher's first."""
    found = [record for suite in every if suite.suite == SUITE for record in suite.records]
    return markdown(HEAD, [_row(record) for record in sorted(found, key=_place)])


def _place(record: Record) -> tuple[str, bool, int, bool, str, str]:
    cell, attacked = record.cell, bare(record.cell.attack) != "none"
    return bare(cell.model), attacked, -_evaluations(record), *_told(record), _name(record)


def _told(record: Record) -> tuple[bool, str]:
    return "trigger" in record.knowledge, bare(record.cell.defense) if bare(record.cell.defense) != "none" else ""


def _evaluations(record: Record) -> int:
    """Of the network, for one image: two in each step with guidance."""
    sampler = parse_spec(record.cell.sampler)[1]
    return sampler["steps"] * (1 if sampler["guidance"] == 1 else 2)


def _name(record: Record) -> str:
    return f"`{bare(record.cell.defense)}`" + (
        GIVEN[record.cell.trigger_given] if "trigger" in record.knowledge else ""
    )


def _row(record: Record) -> list[str]:
    clean = bare(record.cell.attack) == "none"
    return [
        f"`{bare(record.cell.model)}`",
        "not attacked" if clean else _name(record),
        str(_evaluations(record)),
        measured(record, "asr", 100, 1),
        measured(record, "clean_hits", 100, 1),
        f"{100 * record.value('attribute_accuracy'):.1f}",
    ]


def main() -> None:
    PLACE.write(table(results.read()))


if __name__ == "__main__":
    main()
