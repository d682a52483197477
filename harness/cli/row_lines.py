"""The row of a cell as soon as it is measured: one line, while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from harness.engine.display import Silent
from harness.runs.execution import SCORES
from harness.runs.job import Job
from harness.runs.planning import Plan
from harness.runs.store import Store
from leaderboard.columns import ASR, AUROC, UTILITY


class RowLines(Silent):
    """Says the main scores of each cell that a run measures. say: takes a line."""

    def __init__(self, plan: Plan, store: Store, say: Callable[[str], None]) -> None:
        self.columns = {cell.key: (ASR, UTILITY[cell.track], AUROC) for cell in plan.cells}
        self.store, self.say = store, say

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        if status == "done" and job.key in self.columns:
            found = ", ".join(self._scores(job.key))
            if found:
                self.say(f"{job.label.removeprefix('measure ')}: {found}")

    def _scores(self, key: str) -> Iterator[str]:
        """ "ASR 98.4 %" and so on, of what was measured; nothing where the artifact cannot be read: it is built again
        when the record is made."""
        try:
            scores: dict[str, Any] = json.loads((self.store.artifact(key) / SCORES).read_text())
        except (OSError, ValueError):
            return
        for column in self.columns[key]:
            stem = column.score.replace("[]", "[")
            named = (score["value"] for name, score in scores.items() if name == stem or _is_judged(name, stem))
            if (value := next(named, None)) is not None:
                times, unit = (100, " %") if column.percent else (1, "")
                yield f"{column.title} {times * value:.{column.digits}f}{unit}"


def _is_judged(name: str, stem: str) -> bool:
    """Whether a score's name is a column's, with the judge in brackets."""
    return stem.endswith("[") and name.startswith(stem)
