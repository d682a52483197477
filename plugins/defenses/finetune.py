"""Fine-tunes the denoiser on clean data: the control that every purification must beat.

    L = ‖ε - ε_θ(x_t, t, c)‖²        (DDPM's L_simple, Ho, Jain & Abbeel 2020, arXiv:2006.11239, eq. 14)

The defense needs clean training examples (images, and captions for a text-to-image model). It returns a purified model.
Only the denoiser is trained. The defense is not taken from a paper, and it is blind: it knows nothing about the
backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness import (
    Defended,
    Examples,
    Fraction,
    Knowledge,
    LearningRate,
    PositiveInt,
    denoising_loss,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class Finetune:
    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ("data",)

    steps: PositiveInt = 200  # optimizer steps
    batch: PositiveInt = 64  # examples per step
    lr: LearningRate = 2e-4  # AdamW
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        model = model.clone()
        examples = Examples(model, knowledge.data)
        losses = minimize(
            lambda: denoising_loss(model, examples.batch(self.batch, rng)), model.denoiser.parameters(),
            steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema, bf16=self.bf16, phase="finetune",
        )  # fmt: skip
        return Defended(model=model, notes={"final_loss": losses[-1]})


@hookimpl
def defenses() -> list[type]:
    return [Finetune]
