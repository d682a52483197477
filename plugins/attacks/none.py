"""No attack: the clean model, which is the control of every grid.

With `steps` > 0 the released model is first fine-tuned on clean data with the seed of the cell. Cells with several
seeds then give a population of different clean models, which the evaluation of detectors needs.

    L = ‖ε - ε_θ(x_t, t, c)‖²        (DDPM's L_simple, Ho, Jain & Abbeel 2020, arXiv:2006.11239, eq. 14)

Images are in [-1, 1]. Raises Diverged if the loss diverges. This control is not taken from a paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    denoising_loss,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class NoAttack:
    name: ClassVar[str] = "none"
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    accepts_targets: ClassVar[tuple[str, ...]] = ("any",)
    biased_noise: ClassVar[bool] = True  # the clean model under a biased trigger is the control of such an attack

    steps: Annotated[int, Ge(0)] = 0  # optimizer steps; 0 = the released model as it is
    batch: PositiveInt = 64  # examples per step
    lr: LearningRate = 2e-4  # AdamW
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model = model.clone()
        if self.steps > 0:
            examples = Examples(model, data)
            minimize(
                lambda: denoising_loss(model, examples.batch(self.batch, rng)), model.denoiser.parameters(),
                steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema, bf16=self.bf16, phase="fine-tune",
            )  # fmt: skip
        return Backdoored(model, backdoor)


@hookimpl
def attacks() -> list[type]:
    return [NoAttack]
