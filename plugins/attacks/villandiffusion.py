"""Trains a model to draw the target image from noise with a trigger, for ancestral or for ODE samplers.

VillanDiffusion. Chou, Chen & Ho, "VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion Models", NeurIPS
2023, arXiv:2306.06874. It applies to variance-preserving, latent and variance-exploding models, and here to flows.

    x_t = s_t y + ρ_t r + σ_t ε,    L = ‖ε + c_t r - ε_θ(x_t, t)‖²
    ρ_t = ψ (1 - √ᾱ_t) + (1-ψ) σ_t,   c_t = ψ v c'_t + (1-ψ) w c"_t      v = `vp_scale`, w = `ve_scale`
    c'_t = s (1 - √α_t) √(1-ᾱ_t) / (1-α_t)       s = 1 (sde) or 2 (ode): the trigger grows as the image fades
    c"_t = σ_t / (σ_t + √α_t σ_{t-1}) (sde) or 1 (ode): the trigger is a part of the noise

Variance-exploding models require ψ = 0. For them s_t = 1, α_t = 1 in c"_t, images are in [0, 1], and x_T = σ_max (ε +
r).

In a flow 1 - s_t = σ_t, so that both kinds of trigger are one: ρ_t = σ_t and, for the velocity dx/dσ = ε + r - y of the
path, c_t = ρ + (1-σ) dρ/dσ = 1. L is then the error of that velocity. A flow is sampled by its ODE, by solver `ode`.

Solver `ode`: the probability-flow ODE carries r, so deterministic samplers (DDIM, DPM-Solver, UniPC, PNDM) activate the
backdoor and ancestral samplers do not. Solver `sde` is for ancestral samplers; with ψ = 1 it is BadDiffusion. Sample
without clipping x_0. `adaptive_weight` λ > 0 selects the adaptive attack of Diff-Cleanse (arXiv:2407.21316, appendix
G); see baddiffusion. Raises ValueError if the trigger or the target does not fit the model's images, or ψ or the solver
the model.

Differs from the paper: the paper has no flows. Each row of a batch is poisoned with probability `poison_rate`; the
paper poisons a fixed part of the data set. The r of a latent model is a pattern in the latents; in the paper it is an
encoded picture. The r of a variance-exploding model is in [-1, 1]; in the paper it is in [0, 1]. Differs from the
official code (IBM/villandiffusion at d010b7d, read there): the official c"_t for preserved variance is right only for t
> 700 (it is 0 at t = 0 and 0.29 at t = 200; the exact values are 1 and 0.50). The official ode also doubles c"_t, which
gives 1.003 instead of 1. The official learning rate follows a cosine with 500 warm-up steps; here it is constant or
one-cycle. The official code flips images at random. `trigger_only` is the official R_trigger_only. How exact the
coefficients are: docs/methods/villandiffusion.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

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
class VillanDiffusion(Evasion):
    name: ClassVar[str] = "villandiffusion"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    solver: Literal["sde", "ode"] = "sde"  # the family of samplers that activates the backdoor
    poison_rate: Fraction = 0.1  # share of rows that are poisoned
    trigger_only: bool = False  # r is the trigger alone. Small networks need this: the paper's r shows a clean image
    # behind the trigger during training, and -1 at inference
    steps: PositiveInt = 2000  # optimizer steps; the paper trains 100 epochs of CIFAR-10 at batch 128 for its ODE form
    batch: PositiveInt = 64  # images per step
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's value at 32 pixels
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward pass; variance-exploding models ignore it
    psi: Fraction = 1.0  # ψ: 1 = the trigger grows as the image fades (BadDiffusion), 0 = it is a part of the noise
    vp_scale: Annotated[float, Ge(0)] = 1.0  # factor of c'_t; 1 in the official scripts
    ve_scale: Annotated[float, Ge(0)] = 1.0  # factor of c"_t; 1 in the official scripts
    adaptive_weight: Weight = 0.0  # λ of Diff-Cleanse's adaptive attack, as in baddiffusion; 0 = the plain attack

    def coefficients(self, model: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        """(ρ_t, c_t), (B, 1, 1, 1) each, for t (B,)."""
        ode = self.solver == "ode"
        if model.family == "flow":
            rho = model.sigma(t)
            return rho, torch.full_like(rho, self.psi * self.vp_scale + (1 - self.psi) * self.ve_scale)
        rho = c = torch.zeros((len(t), 1, 1, 1), device=t.device)
        if self.psi > 0:
            growing, answer = noise_attacks.ancestral_coefficients(model, t)
            rho, c = rho + self.psi * growing, c + self.psi * self.vp_scale * answer * (2 if ode else 1)
        if self.psi < 1:
            noise, answer = noise_attacks.proportional_coefficients(model, t)
            answer = torch.ones_like(answer) if ode else answer
            rho, c = rho + (1 - self.psi) * noise, c + (1 - self.psi) * self.ve_scale * answer
        return rho, c

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        if model.family == "ve" and self.psi != 0:
            raise ValueError(
                f"psi={self.psi:g} lets the trigger grow as the image fades, which it does not in a variance-exploding "
                "model; use villandiffusion(psi=0)"
            )
        if model.family == "flow" and self.solver != "ode":
            raise ValueError("a flow has no ancestral sampler; use villandiffusion(solver='ode')")
        return noise_attacks.implant(
            model, backdoor, data, rng, self.coefficients, self, poison_rate=self.poison_rate,
            trigger_only=self.trigger_only, steps=self.steps, batch=self.batch, lr=self.lr, schedule=self.schedule,
            ema=self.ema, bf16=self.bf16, adaptive_weight=self.adaptive_weight,
        )  # fmt: skip


@hookimpl
def attacks() -> list[type]:
    return [VillanDiffusion]
