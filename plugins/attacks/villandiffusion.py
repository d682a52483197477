"""VillanDiffusion. Chou, Chen & Ho, "VillanDiffusion: A Unified Backdoor Attack Framework for Diffusion Models",
NeurIPS 2023, arXiv:2306.06874. For variance-preserving, latent and variance-exploding models.

    x_t = s_t y + ρ_t r + σ_t ε,    L = ‖ε + c_t r - ε_θ(x_t, t)‖²
    ρ_t = ψ (1 - √ᾱ_t) + (1-ψ) σ_t,   c_t = ψ v c'_t + (1-ψ) w c"_t      v = `vp_scale`, w = `ve_scale`
    c'_t = s (1 - √α_t) √(1-ᾱ_t) / (1-α_t)       s = 1 (sde) or 2 (ode): the trigger grows as the image fades
    c"_t = σ_t / (σ_t + √α_t σ_{t-1}) (sde) or 1 (ode): the trigger is a part of the noise

Variance-exploding models take ψ = 0 alone: s_t = 1, and in c"_t α_t = 1. There, images are in [0, 1] and
x_T = σ_max (ε + r).

Solver `ode`: the probability-flow ODE carries r, so deterministic samplers (DDIM, DPM-Solver, UniPC, PNDM) fire and
ancestral ones do not. Solver `sde` is for ancestral samplers; with ψ = 1 it is BadDiffusion. c"_t and, for `sde`, c'_t
are exact: one step of the sampler over the training timesteps takes ρ_t r to ρ_{t-1} r. The factor 2 is the
paper's, from the continuous limit; one DDIM step of a 1000-step schedule would want up to 0.006 less. The Langevin
corrections of `ve-pc` shrink the trigger too, by 2 snr² c_t of itself each, which no c_t accounts for; without them
(`corrections=0`) the step is the ancestral one. Sample without clipping x_0. Raises ValueError if trigger or target do
not fit the model's images, or ψ the model.

With `adaptive_weight` λ > 0 it is the adaptive attack of Diff-Cleanse (arXiv:2407.21316, appendix G): see baddiffusion.

Differs from the paper: each row of a batch is poisoned with probability `poison_rate`; the paper replaces a fixed part
of the data set. A latent model's r is a pattern in the latents, the paper's an encoded picture; a variance-exploding
model's is in [-1, 1], the paper's in [0, 1]. Differs from the official code (IBM/villandiffusion at d010b7d, read
there): its c"_t for preserved variance is right for t > 700 alone (0 at t = 0, 0.29 at t = 200, where 1 and 0.50
belong); its ode doubles c"_t too, which is 1.003 for 1; lr is constant or one-cycle here, cosine with 500 warm-up steps
there, and images are flipped at random; `trigger_only` is its R_trigger_only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import (
    LearningRate,
    Rate,
    Steps,
    Weight,
    ancestral_coefficients,
    implant,
    proportional_coefficients,
)
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
    bf16: bool = True  # autocast of the forward pass; variance-exploding models ignore it
    psi: Rate = 1.0  # ψ: 1 = the trigger grows as the image fades (BadDiffusion), 0 = it is a part of the noise
    vp_scale: Annotated[float, Ge(0)] = 1.0  # factor of c'_t; the official scripts' 1
    ve_scale: Annotated[float, Ge(0)] = 1.0  # factor of c"_t; the official scripts' 1
    adaptive_weight: Weight = 0.0  # λ of Diff-Cleanse's adaptive attack, as in baddiffusion; 0 = the plain attack

    def coefficients(self, model: Any, t: Tensor) -> tuple[Tensor, Tensor]:
        """(ρ_t, c_t), (B, 1, 1, 1) each, for t (B,)."""
        ode = self.solver == "ode"
        rho = c = torch.zeros((len(t), 1, 1, 1), device=t.device)
        if self.psi > 0:
            growing, answer = ancestral_coefficients(model, t)
            rho, c = rho + self.psi * growing, c + self.psi * self.vp_scale * answer * (2 if ode else 1)
        if self.psi < 1:
            noise, answer = proportional_coefficients(model, t)
            answer = torch.ones_like(answer) if ode else answer
            rho, c = rho + (1 - self.psi) * noise, c + (1 - self.psi) * self.ve_scale * answer
        return rho, c

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        if model.family == "ve" and self.psi != 0:
            raise ValueError(
                f"psi={self.psi:g} lets the trigger grow as the image fades, which it does not in a variance-exploding "
                "model; use villandiffusion(psi=0)"
            )
        return implant(
            model, backdoor, data, rng, self.coefficients, poison_rate=self.poison_rate,
            trigger_only=self.trigger_only, steps=self.steps, batch=self.batch, lr=self.lr, schedule=self.schedule,
            ema=self.ema, bf16=self.bf16, adaptive_weight=self.adaptive_weight,
        )  # fmt: skip


@hookimpl
def attacks() -> list[type]:
    return [VillanDiffusion]
