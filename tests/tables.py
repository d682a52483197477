"""Tables in documents that are made from committed values: each stands between two markers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
