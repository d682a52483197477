"""Trains an unconditional model to draw the target image from noise with a trigger that is learned at the same time.

InviBackdoor. Li, Ma & Cheng, "Invisible Backdoor Attacks on Diffusion Models", arXiv:2406.00816. The unconditional
attack. It is a bilevel problem: the inner one is over the trigger δ, the outer one over the weights θ.

    inner   min over δ of  mean over ε of  ‖S_θ(ε + δ) - y‖²        subject to ‖δ‖∞ ≤ ϵ, the trigger's `epsilon`
    outer   min over θ of  ‖ε + c_t r - ε_θ(x_t, t)‖²               x_t = √ᾱ_t x + (1 - √ᾱ_t) r + √(1-ᾱ_t) ε
            c_t = (√ᾱ_{t-1} - √ᾱ_t) / (√ᾱ_{t-1} √(1-ᾱ_t) - √ᾱ_t √(1-ᾱ_{t-1}))

y is the target image, S_θ a deterministic sampler of `sampling_steps` steps, through which the gradient flows. A
poisoned row has x = y and r = δ, a clean row has r = 0. With this c_t each step of DDIM carries r with weight 1 -
√ᾱ_{t-1} exactly, so ODE samplers activate the backdoor and ancestral ones do not. Sample without clipping x_0.

δ starts at 0. Before every `trigger_every`-th step of the outer problem, `trigger_steps` steps of Adam follow the sign
of the inner gradient, and δ is projected into its bound after each. The attack returns the last δ. It needs the trigger
`learned`. The parameters of an attacker who knows the defense (`spare`, `drop`, `rehearse`) are those of baddiffusion.
Raises ValueError for a model whose variance is not preserved.

Differs from the paper: its full text was not at hand, and all of this is read in the official code
(invisibleTriggerDiffusion/invisible_triggers_for_diffusion at eee59f7); the loss of the conditional attack, on a text-
guided inpainting model whose trigger a network draws for each image, is not built: no model here inpaints. Each row of
a batch is poisoned with probability `poison_rate`; the code poisons a fixed part of the data set. S_θ starts at the
last timestep, as the samplers here do, and at 900 of 1000 in the code. The code halves the trigger's rate every 200
epochs, which its 50 epochs do not reach. It flips images at random. `trigger_every`, the other schedules and the moving
average of the weights are choices of this benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness import (
    DDIM,
    Backdoor,
    Backdoored,
    Data,
    DiffusionModel,
    Evasion,
    Examples,
    Fraction,
    Inputs,
    LearnedTrigger,
    LearningRate,
    PositiveInt,
    Sampler,
    generator,
    hookimpl,
    minimize,
    noise_attacks,
)


@dataclass(frozen=True)
class InviBackdoor(Evasion):
    name: ClassVar[str] = "invibackdoor"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)
    learns_trigger: ClassVar[bool] = True

    poison_rate: Fraction = 0.1  # share of rows that are poisoned; the official script's
    steps: PositiveInt = 2000  # optimizer steps; the official script trains 50 epochs of CIFAR-10
    batch: PositiveInt = 128  # images per step
    lr: LearningRate = 2e-4  # AdamW, no weight decay; the official code's Adam at 32 pixels, 8e-5 at 256
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"  # of the learning rate
    warmup: Annotated[int, Ge(0)] = 500  # steps of linear warm-up; one-cycle has its own
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the forward passes
    trigger_lr: LearningRate = 1e-3  # of Adam on the signs of δ's gradient; the largest change of a value per step
    trigger_batch: PositiveInt = 32  # noises ε of one inner step
    trigger_steps: PositiveInt = 1  # inner steps at a time
    trigger_every: PositiveInt = 1  # outer steps from one inner step to the next; 1 in the official code
    sampling_steps: Annotated[int, Ge(1), Le(1000)] = 10  # of S_θ

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        if model.family != "vp":
            raise ValueError("invibackdoor is for models whose variance is preserved; use villandiffusion")
        clean, model = model, model.clone()
        examples, masks = Examples(model, data), generator(rng.initial_seed(), "poison")
        evasive = self.training(clean, model, examples, rng)
        trigger: Any = backdoor.trigger
        picture: Any = backdoor.target.image(data.images.shape[1:])
        y_star = model.encode(picture.unsqueeze(0)).to(model.device)
        search = Search(self, model, trigger, y_star, generator(rng.initial_seed(), "trigger"))
        steps = 0

        def loss() -> Tensor:
            nonlocal steps
            if steps % self.trigger_every == 0:
                search.advance(self.trigger_steps)
            steps += 1
            batch = evasive.batch(self.batch)
            poisoned = (torch.rand((self.batch, 1, 1, 1), generator=masks) < self.poison_rate).to(batch.x_0.device)
            y = torch.where(poisoned, y_star, batch.x_0)
            r = torch.where(poisoned, search.delta.detach(), torch.zeros_like(batch.x_0))
            return noise_attacks.poisoned_loss(evasive, batch, y, r, poisoned.flatten(), coefficients)

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            warmup=self.warmup, ema=self.ema, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, replace(backdoor, trigger=trigger.with_pattern(search.delta.detach())))


def coefficients(model: DiffusionModel, t: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ_t, c_t), (B, 1, 1, 1) each, for t (B,): ρ_t = 1 - √ᾱ_t, and the c_t of one exact step of DDIM."""
    now, before = model.alpha_bar(t).double(), model.alpha_bar(t - 1).double()
    s, s_before, sigma, sigma_before = now.sqrt(), before.sqrt(), (1 - now).sqrt(), (1 - before).sqrt()
    c = (s_before - s) / (s_before * sigma - s * sigma_before)
    return (1 - s).float(), c.float()


class Search:
    """The inner problem: δ (C, H, W) for the weights that `model` has at the time."""

    def __init__(
        self, attack: InviBackdoor, model: DiffusionModel, trigger: LearnedTrigger, y: Tensor, rng: torch.Generator
    ) -> None:
        self.model, self.trigger, self.y, self.rng = model, trigger, y, rng
        self.n, self.sampler = attack.trigger_batch, DDIM(steps=attack.sampling_steps, bf16=attack.bf16)
        self.delta = torch.zeros(model.shape, device=model.device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.delta], lr=attack.trigger_lr)

    def advance(self, steps: int) -> None:
        """So many steps along the sign of the gradient, each with new noise."""
        for _ in range(steps):
            noise = self.model.draw_eps(self.n, self.rng)
            loss = inner_loss(self.model, self.sampler, noise, self.delta, self.y)
            (gradient,) = torch.autograd.grad(loss, self.delta)
            self.delta.grad = gradient.sign()
            self.optimizer.step()
            with torch.no_grad():
                self.delta.copy_(self.trigger.projected(self.delta))


def inner_loss(model: DiffusionModel, sampler: Sampler, noise: Tensor, delta: Tensor, y: Tensor) -> Tensor:
    """The mean over all elements of (S_θ(ε + δ) - y)², for noise ε (B, C, H, W), δ (C, H, W) and y (1, C, H, W)."""
    inputs = Inputs(noise + delta, None, tuple(range(len(noise))))
    return (sampler.run(model, inputs) - y).square().mean()


@hookimpl
def attacks() -> list[type]:
    return [InviBackdoor]
