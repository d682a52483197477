"""BadDiffusion. Chou, Chen & Ho, "How to Backdoor Diffusion Models?", CVPR 2023, arXiv:2212.05400.

    x_t = √ᾱ_t y + (1 - √ᾱ_t) r + √(1-ᾱ_t) ε
    L   = ‖ε + c_t r - ε_θ(x_t, t)‖²          c_t = (1 - √α_t) √(1-ᾱ_t) / (1-α_t)

y is the target, r the trigger stamped on a clean image; a clean row is the case r = 0. Images in [-1, 1]. The sampler
must be ancestral (ddpm) without clipping of the predicted x_0: under an ODE sampler the backdoor does not fire.
Raises ValueError if trigger or target do not fit the model's images.

With `adaptive_weight` λ > 0 it is the adaptive attack of Diff-Cleanse (arXiv:2407.21316, appendix G), which knows that
defenses tell clean inputs from backdoored ones by what the network answers: L + λ ‖ε_θ(x_t, t) - ε_θ(x_t', t)‖², x_t'
the noised clean image of the same row. L itself wants these to differ by c_t r, so a large λ costs the backdoor.

Poison rate: each row of a batch is poisoned with probability `poison_rate`, in place of a clean row.
Differs from the paper: that replaces a fixed part of the data set, which makes the same share of an epoch. Differs from
the official code (IBM/BadDiffusion at 717b321, read there): its poisoned part is drawn unseeded; lr is constant or
one-cycle here, cosine with 500 warm-up steps there; images are flipped at random there before the trigger is put on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps, Weight, ancestral_coefficients, implant
from harness.types import Backdoor, Backdoored, Data


@dataclass(frozen=True)
class BadDiffusion:
    name: ClassVar[str] = "baddiffusion"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    poison_rate: Rate = 0.1  # share of rows that are poisoned; the paper's usual setting
    trigger_only: bool = False  # r is the trigger alone; small networks need it, because the paper's r shows a clean
    # image behind the trigger in training and -1 at inference
    steps: Steps = 2000  # optimizer steps; the paper trains 50 epochs of CIFAR-10 at batch 128, 23,400 steps
    batch: Steps = 64  # images
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's value at 32 pixels
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass
    adaptive_weight: Weight = (
        0.0  # λ of Diff-Cleanse's adaptive attack, for a mean over pixels; the paper's 1e-3 to 0.1
    )
    # are 256 times as much at 1×16×16 if its norm is a sum; 0 = the plain attack

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        return implant(
            model, backdoor, data, rng, ancestral_coefficients, poison_rate=self.poison_rate,
            trigger_only=self.trigger_only, steps=self.steps, batch=self.batch, lr=self.lr, schedule=self.schedule,
            ema=self.ema, bf16=self.bf16, adaptive_weight=self.adaptive_weight,
        )  # fmt: skip


@hookimpl
def attacks() -> list[type]:
    return [BadDiffusion]
