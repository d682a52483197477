"""Perceptual distance: how different the defended and the clean model's images of the same noise and prompt look.

    perceptual = mean_i d(x_i, x_i^clean)
    d(x, y) = mean over five stages l of mean over positions of ‖f_l(x) - f_l(y)‖²         in [0, 4]

f_l is the last feature map of a resolution of a public encoder, with norm 1 over the channels at every position. This
is the distance of LPIPS (Zhang et al. 2018, arXiv:1801.03924) without its learned weights and in the features of
another network. LPIPS itself needs AlexNet or VGG, whose weights no package ships. The score is therefore not LPIPS and
carries the encoder's name, `perceptual[efficientnet-lite0]`.

The image sets are those of the metric drift. `perceptual` uses clean inputs for both models. `perceptual_triggered`
compares the defended model's image of the input with the trigger with that of a model without a backdoor: the clean
model's image of the same noise, or of the prompt without the trigger. `_before` is the attacked model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness import (
    ABSENT,
    Evidence,
    Given,
    PerceptualEncoder,
    Score,
    Who,
    encoders_of,
    fidelity,
    hookimpl,
    mean,
    public_encoders,
    unmeasured,
)

SETS: dict[str, tuple[Who, Given]] = {
    "perceptual": ("defended", "clean"),
    "perceptual_before": ("backdoored", "clean"),
    "perceptual_triggered": ("defended", "triggered"),
    "perceptual_triggered_before": ("backdoored", "triggered"),
}


@dataclass(frozen=True)
class Perceptual:
    """perceptual and perceptual_triggered (defended; _before: backdoored), each followed by [<encoder>]."""

    name: ClassVar[str] = "perceptual"
    version: ClassVar[int] = 1
    per_sample: ClassVar[tuple[str, ...]] = tuple(SETS)

    encoders: tuple[str, ...] = ()  # public encoders beside those that the model names, such as efficientnet-lite2

    def __post_init__(self) -> None:
        for name in self.encoders:
            public_encoders.parsed(name)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        names = dict.fromkeys([*encoders_of(evidence.model), *self.encoders])
        if not names:
            why = f"model {evidence.model.name} names no public encoder that knows its images"
            return {name: unmeasured(why, False) for name in SETS}
        encoders = [public_encoders.load(name) for name in names]
        return {f"{name}[{e.name}]": compared(evidence, e, which) for e in encoders for name, which in SETS.items()}


def compared(evidence: Evidence, encoder: PerceptualEncoder, which: tuple[Who, Given]) -> Score:
    """The mean distance of one image set to the clean model's images of the same seeds."""
    beside: tuple[Who, Given] = evidence.untouched if which[1] == "triggered" else ("clean", "clean")
    images, clean = evidence.images(*which), evidence.images(*beside)
    if images is None or clean is None:
        return unmeasured(ABSENT["clean" if clean is None else which[0]], False)
    if which[0] == "defended":
        return mean(encoder.perceptual(images, clean), False)
    return mean(fidelity.perceptual_kept(encoder, images, clean), False)  # the same for every defense


@hookimpl
def metrics() -> list[type]:
    return [Perceptual]
