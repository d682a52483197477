"""Prunes the channels with the smallest weights, then fine-tunes on clean images.

A baseline without knowledge of the backdoor, after Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017,
arXiv:1608.08710:

    I(θ_i) = Σ_k θ_ik²

The defense needs clean training examples. It returns a smaller model. The notes contain the shares that the pruning
realised.

Differs from the paper: the score uses squares instead of absolute values. It covers all layers that must lose the same
channel, the layers that read it included, instead of one filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from harness import Defended, Knowledge, Pruning, hookimpl, pruning


@dataclass(frozen=True)
class MagnitudePruning(Pruning):
    name: ClassVar[str] = "magnitude-pruning"
    version: ClassVar[int] = 1

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        notes: dict[str, Any] = {}
        student = model.clone()
        examples = self.examples(student, knowledge, rng)
        pruned = self.pruned(student, pruning.magnitude(), notes)
        return Defended(model=self.tuned(pruned, model, examples, rng, notes), notes=notes)


@hookimpl
def defenses() -> list[type]:
    return [MagnitudePruning]
