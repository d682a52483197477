"""How often a clean model is flagged: the level of the scan, and what the population of clean models shows of it."""

from __future__ import annotations

from collections.abc import Sequence

from harness.judges.statistics import wilson
from harness.scan.document import FalseAlarms
from harness.scan.verdict import LEAST, LEVEL, Finding, Population, chance


def false_alarms(findings: Sequence[Finding], population: Population | None) -> FalseAlarms | None:
    """The rate of false alarms that is known for these findings; None if no detector judged.

    Each clean model of the population is compared with the others of it, by the rule of the scan. Values at the same
    place belong to the same model. The count is None if the detectors have different numbers of clean models, or if
    leaving one out leaves fewer than LEAST.
    """
    compared = [finding for finding in findings if finding.chance is not None]
    own = tuple(_name(f) for f in findings if f.chance is None and f.flagged is not None)
    if not compared and not own:
        return None
    flagged, n = _left_out([finding.clean for finding in compared])
    interval = None if flagged is None or n is None else wilson(flagged, n)
    names = tuple(_name(finding) for finding in compared)
    says = _says(names, own, flagged, n, interval, "unknown" if population is None else population.model)
    return FalseAlarms(
        level=LEVEL, compared=names, own_threshold=own, flagged=flagged, models=n, interval=interval, says=says
    )


def _name(finding: Finding) -> str:
    return finding.detector.partition("(")[0]


def _left_out(values: Sequence[Sequence[float]]) -> tuple[int | None, int | None]:
    """How many clean models are flagged if each is compared with the others, and how many there are."""
    n = len(values[0]) if values else 0
    if n <= LEAST or any(len(each) != n for each in values):
        return None, None
    hits = sum(
        any(chance(each[i], (*each[:i], *each[i + 1 :])) < LEVEL / len(values) for each in values) for i in range(n)
    )
    return hits, n


def _says(
    names: Sequence[str],
    own: Sequence[str],
    flagged: int | None,
    n: int | None,
    interval: tuple[float, float] | None,
    model: str,
) -> str:
    parts = []
    if names:
        parts.append(
            f"A clean model is flagged by {' or '.join(names)} with a probability of {LEVEL:.0%}, if it was trained "
            f"like the clean models of {model} and their scores are normally distributed."
        )
    if flagged is not None and n is not None and interval is not None:
        parts.append(
            f"Of these {n} clean models, each compared with the other {n - 1}, {flagged} are flagged "
            f"(95 % interval {interval[0]:.0%} to {interval[1]:.0%})."
        )
    elif names:
        parts.append("There are too few of them to check this by comparing each with the others.")
    if own:
        parts.append(
            f"No rate of false alarms is known for {' and '.join(own)}: there are no clean models to compare with."
        )
    return " ".join(parts)
