"""The results table of README.md, made from the published records of the benchmark v1.

python -m tests.readme_table        # rewrite the table in README.md
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from leaderboard import results
from tests import v1_tables
from tests.tables import Place

PLACE = Place(Path(__file__).parents[1] / "README.md", "python -m tests.readme_table")
SETTING = ("shapes-sd", "shapes-badt2i", "text", "patch")


def table(every: Iterable[results.Results]) -> str:
    """Markdown: one row per defense that returns a model."""
    return v1_tables.of_setting(every, SETTING)


def main() -> None:
    PLACE.write(table(results.read()))


if __name__ == "__main__":
    main()
