"""Tables in documents that are made from committed values: each stands between two markers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from harness.runs.record import Record

END = "<!-- end of table -->"


@dataclass(frozen=True)
class Place:
    """Where a table stands: its document, and the command that makes it, which its marker names."""

    page: Path
    command: str

    @property
    def begin(self) -> str:
        return f"<!-- table: {self.command} -->"

    def written(self) -> str:
        """The table as the document has it, "" without the marker."""
        return self.page.read_text().partition(self.begin)[2].partition(END)[0].strip()

    def write(self, table: str) -> None:
        """Put `table` between the markers. A document without them stays as it is."""
        head, begin, rest = self.page.read_text().partition(self.begin)
        if begin:
            self.page.write_text(f"{head}{begin}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the row `head` above `rows`."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the lowest and the highest in brackets where they differ; "" for no values."""
    if not values:
        return ""
    mean, low, high = (f"{number(values):.{digits}f}" for number in (fmean, min, max))
    return mean if low == high else f"{mean} ({low}–{high})"


def measured(record: Record, name: str, times: float, digits: int) -> str:
    """A score with its interval in brackets where it has one; "" where it is absent or unmeasured."""
    score = record.scores.get(name)
    if score is None or math.isnan(score.value):
        return ""
    words = f"{times * score.value:.{digits}f}"
    if score.interval is None:
        return words
    low, high = (f"{times * end:.{digits}f}" for end in score.interval)
    return f"{words} ({low}–{high})"
