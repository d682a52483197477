"""Main memory that this process may use: the machine's, or less in a container with a limit of its own.

A limit is that of a control group of Linux, of version 2 (memory.max) or 1 (memory.limit_in_bytes). psutil tells the
machine's memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

MEMBER = Path("/proc/self/cgroup")  # names the groups of this process
MOUNTED = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Kind:
    """The names of a version's files; droppable: the line of memory.stat with the pages that the system can drop."""

    limit: str
    used: str
    droppable: str


SECOND = Kind("memory.max", "memory.current", "inactive_file")
FIRST = Kind("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total() -> int:
    """Bytes of the machine, or of the smallest limit of a group of this process."""
    return min(psutil.virtual_memory().total, *(limit for limit, _ in _groups()))


def available() -> int:
    """Bytes that this process can still get, of the machine and under each limit; 0 where a limit is used up."""
    return max(0, min(psutil.virtual_memory().available, *(limit - used for limit, used in _groups())))


def limited() -> bool:
    """Whether a limit is below the memory of the machine."""
    return total() < psutil.virtual_memory().total


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each group of this process that has a limit."""
    for folder, kind in _folders():
        limit, used = _number(folder / kind.limit), _number(folder / kind.used)
        if limit is not None:
            yield limit, max(0, (used or 0) - _droppable(folder, kind))
    yield (2**63, 0)  # no group has a limit


def _folders() -> Iterator[tuple[Path, Kind]]:
    """The folders of the groups in which this process is, and of those around them: a limit holds for all below."""
    try:
        lines = MEMBER.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers == "":
            yield from ((folder, SECOND) for root in (MOUNTED, MOUNTED / "unified") for folder in _upwards(root, name))
        elif "memory" in controllers.split(","):
            yield from ((folder, FIRST) for folder in _upwards(MOUNTED / "memory", name))


def _upwards(root: Path, name: str) -> Iterator[Path]:
    """The folder of a group below `root` and those above it, up to `root`. In a container, the name may be that outside
    of it, and `root` is then the group's own folder."""
    inside = PurePosixPath(name.lstrip("/"))
    if ".." not in inside.parts:
        yield from (root / part for part in (inside, *inside.parents) if part != PurePosixPath("."))
    yield root


def _number(file: Path) -> int | None:
    """The number in a file of a group; None where there is none, as in "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _droppable(folder: Path, kind: Kind) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[:1] == [kind.droppable]), 0)
    except (OSError, ValueError, IndexError):
        return 0
