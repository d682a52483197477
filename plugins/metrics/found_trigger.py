"""Whether the trigger that a defense found works: Diff-Cleanse (arXiv:2407.21316), table 1, prints it beside Elijah's.

    found_asr = #{i : d(x_i, target) ≤ τ} / n        x_i by the attacked model from ε_i + r̂, or from "text prompt_i"

r̂ is the defense's trigger, used as one would who found it: added to the noise, or put before the prompt, under the
cell's sampler, or the vanilla form of an attacker's own. d and τ are the target's, as for the attack success rate. A
found trigger far from the true one (`trigger_cosine`) may work all the same, and a near one may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.evidence import Evidence, rate, unmeasured
from harness.hookspecs import hookimpl
from harness.types import Score


@dataclass(frozen=True)
class FoundTrigger:
    """found_asr at the target's gate and found_asr@<threshold> at each of its thresholds, shares in [0, 1] with 95 %
    Wilson intervals. High is a good inversion."""

    name: ClassVar[str] = "found-trigger"
    version: ClassVar[int] = 1
    sets: ClassVar[tuple[str, ...]] = ("backdoored/found",)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        thresholds = {"": evidence.thresholds[evidence.gate]}
        thresholds |= {f"@{name}": tau for name, tau in evidence.thresholds.items()}
        why = unusable(evidence)
        if why is not None:
            return {f"found_asr{at}": unmeasured(why, True) for at in thresholds}
        distances = evidence.distances("backdoored", "found")
        assert distances is not None
        judged = distances[evidence.counted(len(distances))]
        if judged.isnan().any():
            return {f"found_asr{at}": unmeasured("a distance to the target is NaN", True) for at in thresholds}
        return {f"found_asr{at}": rate(judged <= tau, True) for at, tau in thresholds.items()}


def unusable(evidence: Evidence) -> str | None:
    """Why there is nothing to measure; None where there is something."""
    if not evidence.attacked:
        return "attack none: there is no backdoor to open"
    images = evidence.images("backdoored", "found")
    if images is None:
        return "the defense looks for no trigger"
    return None if len(images) else "the defense found no trigger"


@hookimpl
def metrics() -> list[type]:
    return [FoundTrigger]
