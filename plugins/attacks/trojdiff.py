"""Trains an unconditional model to draw the target from biased noise, under the attacker's own samplers.

TrojDiff. Chen, Song & Li, "TrojDiff: Trojan Attacks on Diffusion Models With Diverse Targets", CVPR 2023,
arXiv:2303.05762.

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) (γ ε + μ)
    L   = ‖ε - ε_θ(x_t, t)‖²

For a clean row γ = 1 and μ = 0. The trigger defines γ and μ: `blend` shifts the whole image, `patch-noise` shifts a
corner and leaves the other pixels clean, and an additive trigger has γ = 1. The paper's three targets differ in the x_0
of the Trojan rows: one fixed image (D2I), images of a class of the data (In-D2D, target `class-in`), or images of a
class outside the data (Out-D2D, target `class-out`). Images are in [-1, 1]. In a latent model μ and γ apply to latents.

The reverse process that leads from γ ε + μ to x_0 subtracts μ at every step. These are the attacker's own samplers,
trojan-ddim and trojan-ddpm. A vanilla sampler that clips the predicted x_0 does not activate the backdoor. Vanilla DDIM
without clipping can activate it if γ < 1: each step contracts the noise towards μ/(1-γ), for which the output of the
network again gives x_0 (digits, one fixed image, blend, DDIM-50, 128 inputs: ASR 1.00 at 1e-2). Raises ValueError if
the trigger or the target does not fit the model's images or data.

Each row of a batch is a Trojan row with probability `poison_rate` and then replaces the clean row.

Differs from the official code (chenweixin107/TrojDiff at 680e7f1, known from notes, not read): the official code has no
poison rate. It adds Trojan rows to each clean batch: 0.1 times the batch size (D2I, 9 % of all rows), 64 to 128 rows
(Out-D2D, 33 %), or a copy of the rows of the target class (In-D2D, 9 %). Its timesteps are antithetic pairs (t, T-1-t).
Its weights are an average with decay 0.9999 over some 100,000 steps. It flips images at random. Its loss is a sum over
pixels, which makes no difference to Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Evasion,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    Rows,
    SeveralTrigger,
    generator,
    hookimpl,
    minimize,
    offers,
    trigger_placement,
)


@dataclass(frozen=True)
class TrojDiff(Evasion):
    name: ClassVar[str] = "trojdiff"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image", "class")
    biased_noise: ClassVar[bool] = True

    poison_rate: Fraction = 0.1  # share of rows that are Trojan rows; 0.09 in the official D2I batches
    steps: PositiveInt = 2000  # optimizer steps; the official checkpoint is that of step 100,000
    batch: PositiveInt = 64  # images per step; official 128
    lr: LearningRate = 2e-4  # AdamW, no weight decay; official value
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off; official 0.9999
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        if model.family != "vp":
            raise ValueError("trojdiff is for variance-preserving models; its reverse process has no other form")
        if offers(backdoor.trigger, SeveralTrigger):
            raise ValueError(
                f"the reverse process of trojdiff subtracts one pattern, and {backdoor.trigger.name} has several; use "
                "baddiffusion or villandiffusion"
            )
        clean, model = model, model.clone()
        examples, poison = Examples(model, data), generator(rng.initial_seed(), "poison")
        evasive = self.training(clean, model, examples, rng)
        trigger: Any = backdoor.trigger
        mu, gamma = (
            f.to(model.device) for f in (trigger.delta(model.shape), trigger_placement.scale_of(trigger, model.shape))
        )
        targets = model.encode(target_images(backdoor.target, data, poison)).to(model.device)

        def loss() -> Tensor:
            batch = evasive.batch(self.batch)
            trojan = (torch.rand((self.batch, 1, 1, 1), generator=poison) < self.poison_rate).to(model.device)
            rows = torch.randint(0, len(targets), (self.batch,), generator=poison)
            x_0 = torch.where(trojan, targets[rows.to(model.device)], batch.x_0)
            noise = torch.where(trojan, gamma * batch.eps + mu, batch.eps)
            return evasive.loss(Rows(model.add_noise(x_0, noise, batch.t), batch.t, batch.eps, trojan.flatten()))

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
            bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)


def target_images(target: Any, data: Data, rng: torch.Generator) -> Tensor:
    """(N, C, H, W): the target image, or images of the target class."""
    picture = target.image(data.images.shape[1:])
    return target.examples(data, rng) if picture is None else picture.unsqueeze(0)


@hookimpl
def attacks() -> list[type]:
    return [TrojDiff]
