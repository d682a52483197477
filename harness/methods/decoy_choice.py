"""Which candidate becomes the control trigger that a defender is given, from the candidates' rates of hits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.types import INERT


def led(rates: Sequence[float], k: int) -> tuple[bool, int]:
    """(whether the candidates have a k-th inert one, its place); else the place of the best of the others, or -1 if
    there are none.

    rates: of hits, in the order of the candidates; NaN where nothing was measured, which is not inert.
    """
    inert = [i for i, rate in enumerate(rates) if rate <= INERT]
    if len(inert) >= k:
        return True, inert[k - 1]
    others = [i for i, rate in enumerate(rates) if not rate <= INERT]
    return False, min(others, key=lambda i: (math.isnan(rates[i]), rates[i])) if others else -1
