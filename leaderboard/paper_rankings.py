"""Whether our numbers put defenses in the order that a paper puts them in: entries of reported.toml that name the same
`order`, beside our cells of the same attack, target and settings."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from harness.runs.record import Record, bare
from leaderboard import paired, reported
from leaderboard.reported import Number
from leaderboard.rows import Control, PooledCell
from leaderboard.specs import arguments

BUDGET = ("steps", "batch", "lr")  # what a model's size decides: no part of a setting
LEGEND = (
    "Ours is the range over cells and seeds. The tables' rule distinguishes two defenses: they share at least "
    f"{paired.LEAST_SEEDS} seeds of the attack, and the 95 % interval of their paired difference excludes 0. Models, "
    "data and judges differ from the paper's."
)


@dataclass(frozen=True)
class Place:
    """A paper's number and our values of the score that means most nearly the same, over cells and seeds."""

    entry: Number
    ours: tuple[float, ...]
    records: tuple[Record, ...] = ()  # behind `ours`

    @property
    def name(self) -> str:
        return f"{self.entry.defense}({self.entry.settings})" if self.entry.settings else self.entry.defense

    @property
    def shown(self) -> str:
        return span(self.entry, self.ours)


@dataclass(frozen=True)
class Ranking:
    """One comparison, the paper's best first. differences: sentences, none where ours has the same order."""

    paper: reported.Paper
    title: str
    track: str
    places: tuple[Place, ...]
    differences: tuple[str, ...]


def rankings(cells: Sequence[PooledCell], numbers: reported.Reported | None = None) -> list[Ranking]:
    """Every comparison of a paper of which we have measured at least two, as far as we have measured it."""
    numbers = numbers or reported.shipped()
    groups: dict[tuple[str, str], list[Number]] = defaultdict(list)
    for entry in numbers.number:
        if entry.order:
            groups[entry.paper, entry.order].append(entry)
    made = []
    for (paper, title), entries in groups.items():
        found = [(entry, matching(cells, entry)) for entry in entries]
        places = [
            Place(entry, values(mine, entry), tuple(record for cell in mine for record in cell.records))
            for entry, mine in found
        ]
        measured = sorted((p for p in places if p.ours), key=lambda p: -(p.entry.value or 0.0))
        if len(measured) > 1:
            track = next(cell.track for _, mine in found for cell in mine)
            made.append(Ranking(numbers.paper(paper), title, track, tuple(measured), differences(measured)))
    return made


def matching(cells: Sequence[PooledCell], entry: Number) -> list[PooledCell]:
    """Our cells of an entry's attack, and of its target and settings where it names them."""
    wanted = None if entry.settings is None else arguments(f"{entry.defense}({entry.settings})")
    return [
        cell
        for cell in cells
        if cell.defense == entry.defense
        if cell.attack in entry.attack.replace(" ", "").split(",")
        if not entry.target or bare(cell.specs.target) == entry.target
        if wanted is None or _settings(cell) == wanted
        if cell.control is not Control.decoy and cell.state is None
    ]


def _settings(cell: PooledCell) -> dict[str, str]:
    return {name: value for name, value in cell.changed("defense").items() if name not in BUDGET}


def values(cells: Sequence[PooledCell], entry: Number) -> tuple[float, ...]:
    """What each seed of the cells measured of the score that the entry calls ours, ascending."""
    if entry.ours is None:
        return ()
    found = [record.value(entry.ours) for cell in cells for record in cell.records]
    return tuple(sorted(value for value in found if not math.isnan(value)))


def span(entry: Number, ours: Sequence[float]) -> str:
    """Least and largest of our values in the entry's unit: "97–100 %"; "" where there are none."""
    scale, unit = (100, " %") if entry.unit == "share" else (1, "")
    return "–".join(dict.fromkeys(f"{scale * x:.4g}" for x in (ours[0], ours[-1]))) + unit if ours else ""


def differences(places: Sequence[Place]) -> tuple[str, ...]:
    """Where our order is not that of `places`, which is the paper's: one sentence for each pair that it has otherwise,
    one for all that it does not tell apart."""
    said, alike, apart = [], [], False
    for a, b in itertools.combinations(places, 2):
        ours = _sign(a, b)
        apart |= ours != 0
        equal = a.entry.value == b.entry.value
        if ours == 0 and not equal:
            alike.append(f"{a.name} and {b.name}")
        elif ours < 0 or (equal and ours > 0):
            above, below = (a, b) if ours > 0 else (b, a)
            there = "equal" if equal else f"{above.entry.shown} against {below.entry.shown}"
            said.append(f"{above.name} ({above.shown}) is above {below.name} ({below.shown}), in the paper {there}")
    if not apart:
        return ("no two of them are distinguished",)
    return (*said, *([f"not distinguished: {', '.join(alike)}"] if alike else []))


def _sign(a: Place, b: Place) -> int:
    """1 where the paired rule shows a above b, -1 where it shows it below, else 0."""
    found = paired.difference(a.entry.ours or "", paired.placed(a.records), paired.placed(b.records), better=1)
    return 0 if found is None or not found.differs else int(math.copysign(1, found.difference))
