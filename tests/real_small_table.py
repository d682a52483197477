"""The tables of the suite `real-small` in docs/results.md, one for each model, made from its published records.

python -m tests.real_small_table      # rewrite the table in docs/results.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.runs.record import Record, bare
from leaderboard import results
from tests.tables import Place, markdown, measured

PLACE = Place(Path(__file__).parents[1] / "docs" / "results.md", "python -m tests.real_small_table")
SUITE = "real-small"
JUDGES = {"mnist-ddpm": ("mnist-cnn",), "cifar10-ddpm": ("cifar10-cnn", "efficientnet-lite0")}


def table(every: Iterable[results.Results]) -> str:
    """Markdown: a table for each model with a row for each record, in the order of the results."""
    found = [record for suite in every if suite.suite == SUITE for record in suite.records]
    return "\n\n".join(filter(None, (_of_model(found, model, judges) for model, judges in JUDGES.items())))


def _of_model(every: Iterable[Record], model: str, judges: Sequence[str]) -> str:
    found = [record for record in every if bare(record.cell.model) == model]
    ratios = [f"FD ratio [{judge}]" for judge in judges]
    head = [f"`{model}`", "defense", "ASR %", *ratios, "recognised %", "suspicion", "AUROC of the screen"]
    return markdown(head, [_row(record, judges) for record in found]) if found else ""


def _row(record: Record, judges: Sequence[str]) -> list[str]:
    attacked = bare(record.cell.attack)
    return [
        "clean" if attacked == "none" else f"`{attacked}`, seed {record.cell.seed}",
        f"`{bare(record.cell.defense)}`",
        measured(record, "asr", 100, 1),
        *(measured(record, f"fd_ratio[{judge}]", 1, 2) for judge in judges),
        measured(record, "recognised", 100, 1),
        measured(record, "suspicion", 1, 3),
        measured(record, "screen_auroc", 1, 2),
    ]


def main() -> None:
    PLACE.write(table(results.read()))


if __name__ == "__main__":
    main()
