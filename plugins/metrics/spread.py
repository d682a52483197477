"""Spread: whether the defended model still generates different images.

    spread = σ(defended) / σ(clean model)      σ = root of the mean over pixels of the variance over images

Both are measured on the utility set, at the same noise and prompts. 1 means the variety of the clean model, 0 means
that all images are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness import ABSENT, Evidence, Score, Who, hookimpl, unmeasured


@dataclass(frozen=True)
class Spread:
    """spread (defended) and spread_before (backdoored)."""

    name: ClassVar[str] = "spread"
    version: ClassVar[int] = 2

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        return {"spread": spread(evidence, "defended"), "spread_before": spread(evidence, "backdoored")}


def spread(evidence: Evidence, who: Who) -> Score:
    images, clean = evidence.utility(who), evidence.utility("clean")
    if images is None or clean is None:
        return unmeasured(ABSENT["clean" if clean is None else who], True)
    if len(images) < 2 or deviation(clean) == 0:
        return unmeasured("the clean model's images do not vary", True)
    return Score(deviation(images) / deviation(clean), len(images), True)


def deviation(images: Tensor) -> float:
    """Root mean over pixels of the variance over images (N, C, H, W)."""
    return images.double().var(0).mean().sqrt().item()


@hookimpl
def metrics() -> list[type]:
    return [Spread]
