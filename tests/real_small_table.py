"""The table of the suite `real-small` in docs/results.md, made from its published records.

python -m tests.real_small_table      # rewrite the table in docs/results.md
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harness.runs.record import Record, bare
from leaderboard import results
from tests.tables import Place, markdown, measured

PLACE = Place(Path(__file__).parents[1] / "docs" / "results.md", "python -m tests.real_small_table")
SUITE = "real-small"
HEAD = ("model", "defense", "ASR %", "FD ratio [mnist-cnn]", "recognised %", "suspicion", "AUROC of the screen")


def table(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each record of the suite, in the order of the results."""
    found = [record for suite in every if suite.suite == SUITE for record in suite.records]
    return markdown(HEAD, [_row(record) for record in found])


def _row(record: Record) -> list[str]:
    attacked = bare(record.cell.attack)
    return [
        "clean" if attacked == "none" else f"`{attacked}`, seed {record.cell.seed}",
        f"`{bare(record.cell.defense)}`",
        measured(record, "asr", 100, 1),
        measured(record, "fd_ratio[mnist-cnn]", 1, 2),
        measured(record, "recognised", 100, 1),
        measured(record, "suspicion", 1, 3),
        measured(record, "screen_auroc", 1, 2),
    ]


def main() -> None:
    PLACE.write(table(results.read()))


if __name__ == "__main__":
    main()
