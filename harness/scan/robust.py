"""How far a value stands out from the others of its kind: a z that a few large values do not move."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
STANDS_OUT = 6.0  # z above which a report names a text or a layer; ours, chosen on no model


def centre(values: Sequence[float], least: float) -> tuple[float, float]:
    """(median, spread) of values; z = (value - median) / spread. The spread is 1.4826 times the median absolute
    deviation, and at least `least`."""
    median = statistics.median(values)
    return median, max(least, NORMAL * statistics.median(abs(value - median) for value in values))
