"""Likeness: the similarity of the defended and the clean model's images at the same noise and prompt, in features.

    clip_similarity = mean_i 100 cos(f(x_i), f(x_i^clean))          in [-100, 100]; f is the model's scorer
    perceptual_distance = mean_i ‖g(x_i) - g(x_i^clean)‖²           in [0, 4]; g is the judge's features at norm 1

The scores carry the name of their encoder. The perceptual distance resembles LPIPS (Zhang et al. 2018,
arXiv:1801.03924), but it uses the last layer of the data's own judge; it is not LPIPS. `_triggered` compares the
defended model's image of the input with the trigger with the image of a model without a backdoor: the clean model's
image of the same noise, or of the prompt without the trigger. `_before` uses the attacked model's image of the input
without the trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from harness import ABSENT, Evidence, Given, Score, Who, hookimpl, mean, unmeasured

SETS: dict[str, tuple[Who, Given]] = {
    "": ("defended", "clean"),
    "_triggered": ("defended", "triggered"),
    "_before": ("backdoored", "clean"),
}

NAMES = tuple(f"{stem}{ending}" for stem in ("clip_similarity", "perceptual_distance") for ending in SETS)


@dataclass(frozen=True)
class Likeness:
    """clip_similarity[<scorer>] and perceptual_distance[<judge>], each also with _triggered and _before."""

    name: ClassVar[str] = "likeness"
    version: ClassVar[int] = 2
    per_sample: ClassVar[tuple[str, ...]] = NAMES

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        scorer, judge = evidence.scorer, evidence.judge
        of = evidence.model.name
        scores = {}
        for ending, which in SETS.items():
            name = f"clip_similarity{ending}"
            if scorer is None:
                scores[name] = unmeasured(f"model {of} has no scorer", True)
            else:
                scores[f"{name}[{scorer.name}]"] = compare(evidence, which, scorer.image_features, similarity, True)
            name = f"perceptual_distance{ending}"
            if judge is None:
                scores[name] = unmeasured(f"model {of} has no judge", False)
            else:
                scores[f"{name}[{judge.name}]"] = compare(evidence, which, judge.features, distance, False)
        return scores


def compare(
    evidence: Evidence,
    which: tuple[Who, Given],
    features: Callable[[Tensor], Tensor],
    by: Callable[[Tensor, Tensor], Tensor],
    higher_is_better: bool,
) -> Score:
    """The mean of `by` between the features of one image set and those of the clean model."""
    beside: tuple[Who, Given] = evidence.untouched if which[1] == "triggered" else ("clean", "clean")
    images, clean = evidence.images(*which), evidence.images(*beside)
    if images is None or clean is None:
        return unmeasured(ABSENT["clean" if clean is None else which[0]], higher_is_better)
    return mean(by(features(images).double(), features(clean).double()), higher_is_better)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(N,) 100 × cosine of (N, D) features, row by row."""
    return 100 * cosine_similarity(a, b, dim=1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(N,) squared distance of (N, D) features scaled to norm 1, row by row."""
    return (normalize(a, dim=1) - normalize(b, dim=1)).square().sum(1)


@hookimpl
def metrics() -> list[type]:
    return [Likeness]
