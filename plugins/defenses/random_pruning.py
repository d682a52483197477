"""Prunes random channels, then fine-tunes on clean images: the control of every pruning defense.

What random pruning removes needs no score. It is a baseline without knowledge of the backdoor; Diff-Pruning
(arXiv:2305.10924) also compares itself with random pruning.

The defense needs clean training examples. It returns a smaller model. The notes contain the shares that the pruning
realised.

Differs from the paper: nothing; neither the paper nor this benchmark claims that it removes backdoors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from harness import Defended, Knowledge, Pruning, hookimpl, pruning


@dataclass(frozen=True)
class RandomPruning(Pruning):
    name: ClassVar[str] = "random-pruning"
    version: ClassVar[int] = 1

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        notes: dict[str, Any] = {}
        student = model.clone()
        examples = self.examples(student, knowledge, rng)
        pruned = self.pruned(student, pruning.at_random(rng), notes)
        return Defended(model=self.tuned(pruned, model, examples, rng, notes), notes=notes)


@hookimpl
def defenses() -> list[type]:
    return [RandomPruning]
