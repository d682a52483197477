"""Whether the trigger that a defense found activates the backdoor. Diff-Cleanse (arXiv:2407.21316), table 1, reports
it.

    found_asr = #{i : d(x_i, target) ≤ τ} / n        x_i by the attacked model from ε_i + r̂, or from "text prompt_i"

r̂ is the trigger that the defense found. It is applied as its finder would apply it: added to the noise, or put before
the prompt, under the cell's sampler, or under the vanilla form of an attacker's own sampler. d and τ are those of the
target, as for the attack success rate. A found trigger that is far from the true one (`trigger_cosine`) may still
activate the backdoor, and a near one may not. The paper reports this number for Elijah as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness import Evidence, Score, hookimpl, rate, unmeasured


@dataclass(frozen=True)
class FoundTrigger:
    """found_asr at the target's hit threshold and found_asr@<threshold> at each of its thresholds.

    Both are shares in [0, 1] with 95 % Wilson intervals. A high value means a good inversion.
    """

    name: ClassVar[str] = "found-trigger"
    version: ClassVar[int] = 1
    sets: ClassVar[tuple[str, ...]] = ("backdoored/found",)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        thresholds = {"": evidence.thresholds[evidence.hit_threshold]}
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
    """Why there is nothing to measure, or None if there is something."""
    if not evidence.attacked:
        return "attack none: there is no backdoor to open"
    images = evidence.images("backdoored", "found")
    if images is None:
        return "the defense looks for no trigger"
    return None if len(images) else "the defense found no trigger"


@hookimpl
def metrics() -> list[type]:
    return [FoundTrigger]
