"""The lines in which `bench leaderboard check` says what it found: short names of files, and one line for what several
rows of a folder have in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from leaderboard.check import Outcome, Problem

DIGITS = 12  # of a key


def brief(problem: Problem, root: Path) -> str:
    """The problem with the path of its file below the working directory or below `root`, the folder of all results, and
    with keys of 12 digits."""
    return f"{_short(problem.file, root)}: {problem.words}"


def summed(notes: Iterable[Problem], root: Path) -> list[str]:
    """A line for each note; one line for the notes that say the same of several records of a folder."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for each in notes:
        path = Path(each.file)
        folder = path.parents[1] if path.parent.name == "records" else path
        groups.setdefault((str(folder), each.words), []).append(each)
    lines = []
    for (folder, words), found in groups.items():
        if len(found) == 1:
            lines.append(brief(found[0], root))
        else:
            first = Path(found[0].file).name[:DIGITS]
            lines.append(f"{_short(folder, root)}: {len(found)} rows, such as {first}: {words}")
    return lines


def last(found: Outcome) -> str:
    """The verdict, with how much could be verified."""
    verdict = f"{len(found.problems)} problems" if found.problems else "all well"
    return (
        f"{verdict}: {found.records} records, {len(found.unverifiable)} of them unverifiable in part, "
        f"{found.recomputed} of {found.measured} scores recomputed from per-sample values, {found.reproduced} rows "
        f"reproduced, {found.bytes / 1e6:.1f} MB"
    )


def _short(file: str, root: Path) -> str:
    path, bases = Path(file), (Path.cwd(), root, root.parent)
    shown = next((path.relative_to(base) for base in bases if path != base and path.is_relative_to(base)), path)
    return re.sub(rf"\b([0-9a-f]{{{DIGITS}}})[0-9a-f]{{{64 - DIGITS}}}\b", r"\1", str(shown))
