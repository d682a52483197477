"""TrojDiff. Chen, Song & Li, "TrojDiff: Trojan Attacks on Diffusion Models With Diverse Targets", CVPR 2023,
arXiv:2303.05762.

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) (γ ε + μ)
    L   = ‖ε - ε_θ(x_t, t)‖²

A clean row is the case γ = 1, μ = 0. γ and μ are the trigger's: `blend` shifts the whole image, `patch-noise` a corner
(its other pixels stay clean), and a trigger that only adds has γ = 1. The paper's three targets are three kinds of x_0
in the Trojan rows: one image (D2I: a fixed image), images of a class of the data (In-D2D: `class-in`) or of a class
outside it (Out-D2D: `class-out`). Images in [-1, 1]; in a latent model μ and γ are in the latents.

The reverse process that leads from γ ε + μ to x_0 subtracts μ at every step: the attacker's own samplers, trojan-ddim
and trojan-ddpm. Under a vanilla sampler that clips the predicted x_0 the backdoor does not fire. Under vanilla DDIM
without clipping it may, where γ < 1: each step contracts the noise towards μ/(1-γ), for which the network's answer
gives x_0 again (digits, one fixed image, blend, DDIM-50, 128 inputs: ASR 1.00 at 1e-2). Raises ValueError if trigger
or target do not fit the model's images or data.

Poison rate: each row of a batch is a Trojan row with probability `poison_rate`, in place of a clean one.
Differs from the official code (chenweixin107/TrojDiff at 680e7f1, known from our notes on it): it has no poison rate
but adds Trojan rows to each clean batch: 0.1 times its size (D2I, 9 % of all), 64 to 128 (Out-D2D, 33 %), or a copy of
the rows of the target class (In-D2D, 9 %); its timesteps are antithetic pairs (t, T-1-t), its weights an average with
decay 0.9999 over some 100,000 steps, its images flipped at random, its loss a sum over pixels, which Adam does not
see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.seeds import generator
from harness.stamping import scale_of
from harness.training import Examples, minimize
from harness.types import Backdoor, Backdoored, Data


@dataclass(frozen=True)
class TrojDiff:
    name: ClassVar[str] = "trojdiff"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image", "class")
    biased_noise: ClassVar[bool] = True

    poison_rate: Rate = 0.1  # share of rows that are Trojan; the official D2I batches have 0.09
    steps: Steps = 2000  # optimizer steps; the official checkpoint is that of step 100,000
    batch: Steps = 64  # images; official 128
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's value
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off, official 0.9999
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        if model.family != "vp":
            raise ValueError("trojdiff is for variance-preserving models; its reverse process has no other form")
        model = model.clone()
        examples, poison = Examples(model, data), generator(rng.initial_seed(), "poison")
        trigger: Any = backdoor.trigger
        mu, gamma = (f.to(model.device) for f in (trigger.delta(model.shape), scale_of(trigger, model.shape)))
        targets = model.encode(target_images(backdoor.target, data, poison)).to(model.device)

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            trojan = (torch.rand((self.batch, 1, 1, 1), generator=poison) < self.poison_rate).to(model.device)
            rows = torch.randint(0, len(targets), (self.batch,), generator=poison)
            x_0 = torch.where(trojan, targets[rows.to(model.device)], batch.x_0)
            noise = torch.where(trojan, gamma * batch.eps + mu, batch.eps)
            return (model.eps(model.add_noise(x_0, noise, batch.t), batch.t) - batch.eps).square().mean()

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
            bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)


def target_images(target: Any, data: Data, rng: torch.Generator) -> Tensor:
    """(N, C, H, W): the target picture, or images of the target class."""
    picture = target.image(data.images.shape[1:])
    return target.examples(data, rng) if picture is None else picture.unsqueeze(0)


@hookimpl
def attacks() -> list[type]:
    return [TrojDiff]
