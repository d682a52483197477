"""No attack: the clean model, which is the control of every grid.

With `steps` > 0 the released model is first fine-tuned on clean data with the seed of the cell. Cells with several
seeds then give a population of different clean models, which the evaluation of detectors needs. All of them share the
initialisation of the released model. With `fresh` the denoiser starts from new weights, drawn by the seed of the cell,
so each model has an initialisation of its own. Give it the recipe of the released model.

    L = ‖ε - ε_θ(x_t, t, c)‖²        (DDPM's L_simple, Ho, Jain & Abbeel 2020, arXiv:2006.11239, eq. 14)

Images are in [-1, 1]. Raises Diverged if the loss diverges, and ValueError if `fresh` meets a layer that cannot draw
new weights. This control is not taken from a paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import nn

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    denoising_loss,
    derive,
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
    fresh: bool = False  # start from new weights instead of those of the released model
    batch: PositiveInt = 64  # examples per step
    lr: LearningRate = 2e-4  # AdamW
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass

    def __post_init__(self) -> None:
        if self.fresh and self.steps == 0:
            raise ValueError("none(fresh=True) starts from new weights, which steps=0 would not train; set steps")

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model = model.clone()
        if self.fresh:
            initialise(model.denoiser, derive(rng.initial_seed(), "fresh"))
        if self.steps > 0:
            examples = Examples(model, data)
            minimize(
                lambda: denoising_loss(model, examples.batch(self.batch, rng)), model.denoiser.parameters(),
                steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema, bf16=self.bf16, phase="fine-tune",
            )  # fmt: skip
        return Backdoored(model, backdoor)


FIXED = ("GaussianFourierProjection",)  # layers whose weights are constants of the network


def initialise(network: nn.Module, seed: int) -> None:
    """Draws new weights for a network, as its layers draw them when they are created.

    Raises ValueError if a layer has weights and no such method.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their weights from the global generator of the CPU
        device = next(network.parameters()).device
        network.to("cpu")
        for layer in network.modules():
            if not list(layer.parameters(recurse=False)) or type(layer).__name__ in FIXED:
                continue
            reset: Any = getattr(layer, "reset_parameters", None)
            if reset is None:
                raise ValueError(
                    f"none(fresh=True) cannot draw new weights for a {type(layer).__name__}; use fresh=False"
                )
            reset()
        network.to(device)


@hookimpl
def attacks() -> list[type]:
    return [NoAttack]
