"""Prunes the channels that matter least for the clean loss, then fine-tunes; a baseline without knowledge of backdoors.

Diff-Pruning. Fang, Ma & Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023, arXiv:2305.10924. It is a
compression method, with which Diff-Cleanse (arXiv:2407.21316) compares itself.

The channels with the smallest I are removed. The network is then trained on clean images with L_simple:

    I(θ_i) = Σ_k |θ_ik Σ_t ∂L_t/∂θ_ik|      over t = 0, 1, ... up to the first with L_t / L_max < 𝒯

L_t is the loss of clean images at t, and L_max the largest loss so far. Late, noisy steps have a small loss and are
therefore left out. The defense needs clean training examples. It returns a smaller model. The notes contain the shares
that the pruning realised.

Differs from the paper: the fine-tuning is short (the paper: 100 000 steps or more). The official code
(VainF/Diff-Pruning) is known from a description only. The option of this name in Diff-Cleanse is a different method: it
takes the last timesteps and prunes the largest scores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from harness import Defended, Importance, Knowledge, PositiveInt, Pruning, draw, hookimpl, pruning


@dataclass(frozen=True)
class DiffPruning(Pruning):
    name: ClassVar[str] = "diff-pruning"
    version: ClassVar[int] = 1

    least: Annotated[float, Ge(0), Lt(1)] = 0.05  # 𝒯: timesteps after the first one with L_t / L_max below this are
    # left out
    images: PositiveInt = 64  # clean images on which the scores are computed; official 128. They take one forward and
    # one backward pass of them per timestep: on a CPU longer than a short fine-tuning

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        notes: dict[str, Any] = {}
        student = model.clone()
        examples = self.examples(student, knowledge, rng)
        start = time.perf_counter()
        x_0 = examples.latents[draw(self.images, len(examples.latents), rng)]
        importance = self.importance(student, x_0, rng, notes)
        notes["scoring_s"] = time.perf_counter() - start
        return Defended(
            model=self.tuned(self.pruned(student, importance, notes), model, examples, rng, notes), notes=notes
        )

    def importance(self, model: Any, x_0: Tensor, rng: torch.Generator, notes: dict[str, Any]) -> Importance:
        """The Taylor scores. The number of timesteps that were used is added to the notes."""
        eps = model.draw_eps(len(x_0), rng)
        losses: list[float] = []

        def loss(step: int) -> Tensor:
            t = torch.full((len(x_0),), step, device=model.device)
            value = (eps - model.eps(model.add_noise(x_0, eps, t), t)).square().mean()
            losses.append(value.item())
            return value

        def informative() -> Iterator[int]:
            for step in range(model.T):
                if losses and losses[-1] < self.least * max(losses):
                    return
                yield step

        score = pruning.taylor(model, pruning.accumulated(model, loss, informative()))
        notes["timesteps_scored"] = len(losses)
        return score


@hookimpl
def defenses() -> list[type]:
    return [DiffPruning]
