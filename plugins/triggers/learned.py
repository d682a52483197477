"""A pattern that the attack learns, added to the starting noise: x_T = ε + δ with ‖δ‖∞ ≤ `epsilon`.

InviBackdoor. Li, Ma & Cheng, "Invisible Backdoor Attacks on Diffusion Models", arXiv:2406.00816. The attack
`invibackdoor` learns δ (C, H, W), in the images' range [-1, 1] or in the space of the latents. The pattern is stored
with the attacked model and is the same for every job that needs it. Before the attack there is none.

Unit noise hides a pattern by its norm, so images of few pixels need a larger bound: on 1×16×16 pixels a bound of 0.69
allows the norm that a bound of 0.2 allows on 3×32×32.

Differs from the paper: its full text was not at hand. The bound is that of the official code
(invisibleTriggerDiffusion/invisible_triggers_for_diffusion at eee59f7, read there). The code also has an L2 bound,
which it leaves unused. The other triggers for the rate of false triggers are the learned pattern with its pixels in
another order; they are a choice of this benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness import Inputs, Modality, generator, hookimpl, trigger_placement


@dataclass(frozen=True)
class Learned:
    """Equal triggers have equal parameters; their patterns may differ."""

    name: ClassVar[str] = "learned"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    epsilon: Annotated[float, Gt(0), Le(1)] = 0.2  # bound of each value of δ; the official code's at 3×32×32
    other: Annotated[int, Ge(0)] = 0  # 0: δ; k: its pixels in the k-th other order, a control
    pattern: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def projected(self, pattern: Tensor) -> Tensor:
        """The nearest pattern with values within ±ε."""
        return pattern.clamp(-self.epsilon, self.epsilon)

    def with_pattern(self, pattern: Tensor) -> Learned:
        """The trigger with δ = `pattern` (C, H, W). Raises ValueError for one that leaves the bound."""
        largest = float(pattern.abs().max())
        if pattern.ndim != 3 or not largest <= self.epsilon * (1 + 1e-6):
            raise ValueError(
                f"a pattern of shape {tuple(pattern.shape)} and values up to {largest:.4g} is none of "
                f"learned(epsilon={self.epsilon:g})"
            )
        made = replace(self)
        object.__setattr__(made, "pattern", pattern.detach().cpu().clone())
        return made

    def delta(self, shape: Sequence[int]) -> Tensor:
        if self.pattern is None:
            raise ValueError(
                "the trigger learned has no pattern before an attack has learned it; use it in a suite with the attack "
                "invibackdoor, or use another trigger"
            )
        if tuple(self.pattern.shape) != tuple(shape):
            raise ValueError(f"the learned pattern is {tuple(self.pattern.shape)} and does not fit {tuple(shape)}")
        if self.other == 0:
            return self.pattern.clone()
        order = torch.randperm(self.pattern[0].numel(), generator=generator("learned", self.other))
        return self.pattern.flatten(1)[:, order].view_as(self.pattern)

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> Learned:
        """The same values in another order of the pixels."""
        made = replace(self, other=self.other + 1 + k)
        return made if self.pattern is None else made.with_pattern(self.pattern)


@hookimpl
def triggers() -> list[type]:
    return [Learned]
