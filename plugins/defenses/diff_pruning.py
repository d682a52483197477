"""Diff-Pruning. Fang, Ma & Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023, arXiv:2305.10924: compression
that knows of no backdoor, which Diff-Cleanse (arXiv:2407.21316) compares itself with.

Channels of the smallest I go, then the network is trained on clean images by L_simple:

    I(θ_i) = Σ_k |θ_ik Σ_t ∂L_t/∂θ_ik|      over t = 0, 1, ... up to the first with L_t / L_max < 𝒯

L_t is the loss of clean images at t and L_max the largest so far: late, noisy steps, where the loss is small, count
for nothing. Needs clean training examples; delivers a smaller model, with what the pruning realised in the notes.

Differs from the paper: the fine-tuning is short (theirs: 100 000 steps or more). Its code (VainF/Diff-Pruning) is known
here by description only. Diff-Cleanse's own option of this name takes the last timesteps and prunes the largest scores:
not this method.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import Steps
from harness.pruning import Importance, Pruning, accumulated, taylor
from harness.training import draw
from harness.types import Defended, Knowledge


@dataclass(frozen=True)
class DiffPruning(Pruning):
    name: ClassVar[str] = "diff-pruning"
    version: ClassVar[int] = 1

    least: Annotated[float, Ge(0), Lt(1)] = 0.05  # 𝒯: timesteps after the first with L_t / L_max under it are left out
    images: Steps = 64  # clean images that the scores are computed on; official 128

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
        """The Taylor scores; how many timesteps counted goes to the notes."""
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

        score = taylor(model, accumulated(model, loss, informative()))
        notes["timesteps_scored"] = len(losses)
        return score


@hookimpl
def defenses() -> list[type]:
    return [DiffPruning]
