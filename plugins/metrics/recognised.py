"""What an unconditional model's images show, according to its judge.

    recognised = #{i : max_k p_k(x_i) > 0.9} / n            share of images that the judge is sure about, in [0, 1]
    class_balance = −Σ_k f_k log f_k / log K                entropy of the predicted classes, 1 = all equally frequent

Both are measured on the defended model with the clean inputs of the utility set; `_clean` is the value of the clean
model. A model that collapsed to a few images keeps a high `recognised` and has a low `class_balance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from harness import ABSENT, Evidence, ProbabilityJudge, Score, Who, hookimpl, offers, rate, unmeasured

NAMES = ("recognised", "class_balance")


@dataclass(frozen=True)
class Recognised:
    """recognised and class_balance (defended), recognised_clean and class_balance_clean (clean model)."""

    name: ClassVar[str] = "recognised"
    version: ClassVar[int] = 2

    sure: Annotated[float, Gt(0), Lt(1)] = 0.9  # probability above which an image counts as recognised

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        return self._of(evidence, "defended", "") | self._of(evidence, "clean", "_clean")

    def _of(self, evidence: Evidence, who: Who, suffix: str) -> dict[str, Score]:
        net = evidence.judge.net if offers(evidence.judge, ProbabilityJudge) else None
        images = evidence.utility(who)
        why = None
        if evidence.model.conditional:
            why = "the model takes prompts; see attribute_accuracy"
        elif net is None:
            why = "the judge gives no class probabilities"
        elif images is None:
            why = ABSENT[who]
        if why is not None or images is None:
            return {name + suffix: unmeasured(why or "", True) for name in NAMES}
        p = probabilities(net, images)
        return {
            f"recognised{suffix}": rate(p.max(1).values > self.sure, True),
            f"class_balance{suffix}": Score(balance(p.argmax(1), p.shape[1]), len(p), True),
        }


@torch.no_grad()
def probabilities(net: Any, images: Tensor) -> Tensor:
    """(N, K) class probabilities of the judge's first attribute."""
    logits = [next(iter(net(part).values())) for part in images.split(256)]
    return torch.cat(logits).double().softmax(1)


def balance(classes: Tensor, k: int) -> float:
    """Entropy of class frequencies over log K for classes (N,) int64 in 0..K-1; in [0, 1]."""
    f = torch.bincount(classes, minlength=k).double() / len(classes)
    return -(f[f > 0] * f[f > 0].log()).sum().item() / math.log(k)


@hookimpl
def metrics() -> list[type]:
    return [Recognised]
