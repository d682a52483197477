"""CLIP score: 100 × cosine of image and prompt embeddings, in [-100, 100].

The definition is that of Hessel et al. 2021 (arXiv:2104.08718) without its clamp at 0 and its factor 2.5, as the
backdoor papers report it. The encoders are the model's scorer, an open_clip network. The score carries its name:
`clip_score[<scorer>]`. `clip_score_triggered` compares images of prompts with the trigger with the prompts without it.
A high value means that the words still determine the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness import ABSENT, Evidence, Given, Score, Who, hookimpl, mean, unmeasured

SETS: dict[str, tuple[Who, Given]] = {
    "clip_score": ("defended", "clean"),
    "clip_score_triggered": ("defended", "triggered"),
    "clip_score_before": ("backdoored", "clean"),
    "clip_score_triggered_before": ("backdoored", "triggered"),
    "clip_score_clean": ("clean", "clean"),
}


@dataclass(frozen=True)
class ClipScore:
    """clip_score and clip_score_triggered (defended), clip_score_before and clip_score_triggered_before (backdoored),
    and clip_score_clean (clean model).
    """

    name: ClassVar[str] = "clip_score"
    version: ClassVar[int] = 1
    per_sample: ClassVar[tuple[str, ...]] = tuple(SETS)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        scorer, prompts = evidence.scorer, evidence.prompts
        if scorer is None or prompts is None:
            why = "the model takes no prompts" if prompts is None else f"model {evidence.model.name} has no scorer"
            return {name: unmeasured(why, True) for name in SETS}
        text = scorer.text_features(prompts)
        scores = {}
        for name, (who, given) in SETS.items():
            images = evidence.images(who, given)
            if images is None:
                scores[f"{name}[{scorer.name}]"] = unmeasured(ABSENT[who], True)
            else:
                scores[f"{name}[{scorer.name}]"] = mean(cosine(scorer.image_features(images), text), True)
        return scores


def cosine(images: Tensor, text: Tensor) -> Tensor:
    """(N,) 100 × cosine of (N, D) image and text features, row by row."""
    return 100 * torch.nn.functional.cosine_similarity(images.double(), text.double(), dim=1)


@hookimpl
def metrics() -> list[type]:
    return [ClipScore]
