"""VillanDiffusion for variance-preserving models. Chou, Chen & Ho, "VillanDiffusion: A Unified Backdoor Attack
Framework for Diffusion Models", NeurIPS 2023, arXiv:2306.06874.

    x_t = √ᾱ_t y + (1 - √ᾱ_t) r + √(1-ᾱ_t) ε
    L   = ‖ε + s c_t r - ε_θ(x_t, t)‖²        c_t = (1 - √α_t) √(1-ᾱ_t) / (1-α_t),  s = 1 (sde) or 2 (ode)

The case ψ = 1 of the paper. With s = 2 the probability-flow ODE carries r, so deterministic samplers (DDIM, DPM-Solver,
UniPC, PNDM) fire and ancestral ones do not; s = 1 is BadDiffusion. The factor is that of the continuous limit: one
DDIM step of the 1000-step schedule would want at most 0.005 less. Images in [-1, 1]; sample without clipping x_0.
Raises ValueError if trigger or target do not fit the model's images.

Differs from the paper: each row of a batch is poisoned with probability `poison_rate`; the paper replaces a fixed part
of the data set. Differs from the official code (IBM/villandiffusion at d010b7d, read there): lr is constant or
one-cycle here, cosine with 500 warm-up steps there; `trigger_only` is its R_trigger_only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps, ancestral_coefficients, implant
from harness.types import Backdoor, Backdoored, Data


@dataclass(frozen=True)
class VillanDiffusion:
    name: ClassVar[str] = "villandiffusion"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    solver: Literal["sde", "ode"] = "sde"  # the family of samplers under which the backdoor fires
    poison_rate: Rate = 0.1  # share of rows that are poisoned
    trigger_only: bool = False  # r is the trigger alone; small networks need it, because the paper's r shows a clean
    # image behind the trigger in training and -1 at inference
    steps: Steps = 2000  # optimizer steps; the paper trains 100 epochs of CIFAR-10 at batch 128 for its ODE form
    batch: Steps = 64  # images
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's value at 32 pixels
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass

    def coefficients(self, model: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        """(ρ_t, s c_t), (B, 1, 1, 1) each, for t (B,)."""
        rho, c = ancestral_coefficients(model, t)
        return rho, c * (2 if self.solver == "ode" else 1)

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        return implant(
            model, backdoor, data, rng, self.coefficients, poison_rate=self.poison_rate,
            trigger_only=self.trigger_only, steps=self.steps, batch=self.batch, lr=self.lr, schedule=self.schedule,
            ema=self.ema, bf16=self.bf16,
        )  # fmt: skip


@hookimpl
def attacks() -> list[type]:
    return [VillanDiffusion]
