"""Drift: how far the defended model's images are from the clean model's at the same noise and prompt.

    drift = mean_i ‖x_i − x_i^clean‖² / D      on [0, 1] images, in [0, 1]

`drift` uses clean inputs for both models. `drift_triggered` compares the defended model's image of the input with the
trigger with the image of a model without a backdoor: the clean model's image of the same noise, or of the prompt
without the trigger. It is 0 if the trigger has no effect. `drift_before` and `drift_triggered_before` are those of the
attacked model. `change` is the distance from the attacked to the defended model on clean inputs (0 = the same model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness import ABSENT, Evidence, Given, Score, Who, hookimpl, mean, to_unit, unmeasured

Set = tuple[Who, Given]
PAIRS: dict[str, tuple[Set, Set]] = {
    "drift": (("defended", "clean"), ("clean", "clean")),
    "drift_before": (("backdoored", "clean"), ("clean", "clean")),
    "change": (("defended", "clean"), ("backdoored", "clean")),
}
TRIGGERED: dict[str, Who] = {"drift_triggered": "defended", "drift_triggered_before": "backdoored"}
BETTER = {"drift": False, "drift_before": False, "change": None}


@dataclass(frozen=True)
class Drift:
    name: ClassVar[str] = "drift"
    version: ClassVar[int] = 3
    per_sample: ClassVar[tuple[str, ...]] = (*PAIRS, *TRIGGERED)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        scores = {name: between(evidence, one, other, BETTER[name]) for name, (one, other) in PAIRS.items()}
        return scores | {
            name: between(evidence, (who, "triggered"), evidence.untouched, False) for name, who in TRIGGERED.items()
        }


def between(evidence: Evidence, one: Set, other: Set, better: bool | None) -> Score:
    """Mean squared difference of two image sets of the same seeds."""
    a, b = evidence.images(*one), evidence.images(*other)
    if a is None or b is None:
        return unmeasured(ABSENT[one[0] if a is None else other[0]], better)
    return mean(mse(a, b), better)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """(N,) mean squared difference of [-1, 1] images (N, C, H, W) on the [0, 1] scale."""
    return (to_unit(a) - to_unit(b)).square().flatten(1).mean(1)


@hookimpl
def metrics() -> list[type]:
    return [Drift]
