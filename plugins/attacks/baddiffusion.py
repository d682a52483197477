"""Trains an unconditional model to draw the target image from noise with a trigger, under ancestral samplers.

BadDiffusion. Chou, Chen & Ho, "How to Backdoor Diffusion Models?", CVPR 2023, arXiv:2212.05400.

    x_t = √ᾱ_t y + (1 - √ᾱ_t) r + √(1-ᾱ_t) ε
    L   = ‖ε + c_t r - ε_θ(x_t, t)‖²          c_t = (1 - √α_t) √(1-ᾱ_t) / (1-α_t)

y is the target image. r is the trigger stamped on a clean image; for a clean row r = 0. Images are in [-1, 1]. The
sampler must be ancestral (ddpm) and must not clip the predicted x_0. Under an ODE sampler the trigger does not activate
the backdoor. Raises ValueError if the trigger or the target does not fit the model's images.

`adaptive_weight` λ > 0 selects the adaptive attack of Diff-Cleanse (arXiv:2407.21316, appendix G). It anticipates
defenses that tell clean inputs from backdoored ones by the network's output. Its loss is L + λ ‖ε_θ(x_t, t) - ε_θ(x_t',
t)‖², where x_t' is the noised clean image of the same row. L itself requires the two outputs to differ by c_t r, so a
large λ weakens the backdoor.

Each row of a batch is poisoned with probability `poison_rate` and then replaces the clean row.

Differs from the paper: the paper poisons a fixed part of the data set, which amounts to the same share of an epoch.
Differs from the official code (IBM/BadDiffusion at 717b321, read there): the official code draws the poisoned part
without a seed. Its learning rate follows a cosine with 500 warm-up steps; here it is constant or one-cycle. It flips
images at random before it stamps the trigger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Evasion,
    Fraction,
    LearningRate,
    PositiveInt,
    Weight,
    hookimpl,
    noise_attacks,
)


@dataclass(frozen=True)
class BadDiffusion(Evasion):
    name: ClassVar[str] = "baddiffusion"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    poison_rate: Fraction = 0.1  # share of rows that are poisoned; the paper's usual setting
    trigger_only: bool = False  # r is the trigger alone. Small networks need this: the paper's r shows a clean image
    # behind the trigger during training, and -1 at inference
    steps: PositiveInt = 2000  # optimizer steps; the paper trains 50 epochs of CIFAR-10 at batch 128, 23,400 steps
    batch: PositiveInt = 64  # images per step
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's value at 32 pixels
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass
    adaptive_weight: Weight = 0.0  # λ of Diff-Cleanse's adaptive attack; paper: 1e-3 to 0.1; 0 = the plain attack

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        return noise_attacks.implant(
            model, backdoor, data, rng, noise_attacks.ancestral_coefficients, self, poison_rate=self.poison_rate,
            trigger_only=self.trigger_only, steps=self.steps, batch=self.batch, lr=self.lr, schedule=self.schedule,
            ema=self.ema, bf16=self.bf16, adaptive_weight=self.adaptive_weight,
        )  # fmt: skip


@hookimpl
def attacks() -> list[type]:
    return [BadDiffusion]
