"""Reconstructs the trigger from the loss of a backdoored model, and detects models and inputs with it.

TERD. Mo, Huang, Li, Li & Wang, "TERD: A Unified Framework for Safeguarding Diffusion Models Against Backdoors", ICML
2024, arXiv:2409.05294.

A backdoored model predicts noise around its trigger, γ ε + μ, as exactly as plain noise. Two noises ε₁, ε₂ at the same
x_0 and t cancel what the target adds to the prediction:

    L(x_0, t, μ) = ½ ‖ (ε₁ - ε_θ(x(ε₁), t)) - (ε₂ - ε_θ(x(ε₂), t)) ‖²,    x(ε) = s_t x_0 + σ_t (γ ε + μ)

Estimation minimises L(x̃, t, μ) - λ ‖μ‖₁ over μ, with t among the last ten timesteps and x̃ ~ N(0, I) in place of the
unknown target. The reward on ‖μ‖₁ keeps μ from the trivial solution 0.

Refinement minimises ½ [L(x̂, t, μ) + L(x̂, t', 0)] - λ ‖μ‖₁ over μ. x̂ is the DDIM sample from γ ε + μ (the gradient
goes through all its steps), t is among the last and t' among the first ten timesteps.

Model-level detection uses KL(N(μ, γ²) ‖ N(0, 1)) = -log γ + (γ² + μ² - 1)/2 of every pixel. Its mean is the suspicion;
its mean and variance are the features. Input-level detection uses the log-likelihood ratio of N(μ, γ²) to N(0, 1); an
input is flagged above 0.

The defense needs only the model. It returns the suspicion, a screen and μ (C, H, W), in the units of the starting
noise. γ is 1 unless `scale` is set; then γ is estimated too, against attacks that scale the noise (TrojDiff). Pixels
are in [-1, 1]. Raises ValueError for a refinement on a variance-exploding model, because DDIM does not sample it.

Differs from the paper, which is known only from its code and summaries: the code gives no decision rule for its two
model-level numbers, so the threshold is left to a population of clean models (`leaderboard.population`). Checked
against the official code (PKU-ML/TERD, read at 2f4261e and 1b94761). Differences from that code, and how to read the
screen: docs/methods/terd.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from harness import DDIM, Defended, Inputs, Knowledge, PositiveInt, TrojanDDIM, hookimpl, image_seeds, progress

WINDOW = 10  # number of timesteps at either end; official code
FLOOR = 1e-3  # smallest γ; below it the likelihood would be that of a point


@dataclass(frozen=True)
class Estimate:
    """A trigger that was found: μ and γ (C, H, W). It has the interface of a trigger that scales noise, for the Trojan
    sampler.
    """

    mu: Tensor
    gamma: Tensor
    biased_noise: ClassVar[bool] = True

    def delta(self, shape: Sequence[int]) -> Tensor:
        return self.mu

    def scale(self, shape: Sequence[int]) -> Tensor:
        return self.gamma

    def divergence(self) -> Tensor:
        """(C, H, W) KL(N(μ, γ²) ‖ N(0, 1)) of every pixel."""
        gamma = self.gamma.clamp_min(FLOOR)
        return -gamma.log() + (gamma.square() + self.mu.square() - 1) / 2

    def log_ratio(self, noise: Tensor) -> Tensor:
        """(B,) log N(x; μ, γ²) - log N(x; 0, 1) of noise (B, C, H, W), summed over pixels."""
        mu, gamma = self.mu.to(noise), self.gamma.to(noise).clamp_min(FLOOR)
        pixels = noise.square() / 2 - ((noise - mu) / gamma).square() / 2 - gamma.log()
        return pixels.flatten(1).sum(1)


@dataclass(frozen=True)
class TERD:
    name: ClassVar[str] = "terd"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion", "screen")

    scale: bool = False  # also estimate γ, for attacks that scale the noise
    iterations: PositiveInt = 3000  # iterations of the estimation; official value
    refinement: Annotated[int, Ge(0)] = 1000  # iterations of the refinement; official value; 0 = no refinement
    batch: PositiveInt = 16  # noises per step; official value at 32 pixels
    lr: Annotated[float, Gt(0)] = 0.5  # learning rate of μ: SGD, cosine to 0; official value
    scale_lr: Annotated[float, Gt(0)] = 2e-3  # learning rate of γ; official value at 32 pixels, 1e-3 on CelebA
    penalty: Annotated[float, Ge(0)] = 5e-5  # λ; official value at 32 pixels
    sampling_steps: Annotated[int, Ge(1), Le(100)] = 10  # DDIM steps in the refinement; official value
    clip_x_0: bool = True  # clip the predicted x_0 to [-1, 1] in that DDIM; official, by the default of diffusers. Use
    # False for latents, which have no range. Without effect with `scale`, as in the official code
    gradient_clip: Annotated[float, Gt(0)] = 0.01  # largest norm of the gradient in the refinement; official value at
    # 32 pixels, 1.0 with `scale`
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0  # momentum in the refinement; official value, 0.9 with `scale`

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if self.refinement and model.family == "ve":
            raise ValueError("terd refines through DDIM, which this model's variance forbids; use terd(refinement=0)")
        found, losses = self.estimated(model, rng)
        notes = {"estimation_loss": thinned(losses)}
        if self.refinement:
            found, losses = self.refined(model, found, rng)
            notes["refinement_loss"] = thinned(losses)
        divergence = found.divergence().double()
        features = {"kl_mean": divergence.mean().item(), "kl_variance": divergence.var(correction=0).item()}
        return Defended(
            suspicion=features["kl_mean"],
            features=features,
            screen=lambda inputs: found.log_ratio(inputs.noise),
            screen_above=0.0,
            trigger=found.mu.cpu(),
            notes=notes,
        )

    def estimated(self, model: Any, rng: torch.Generator) -> tuple[Estimate, list[float]]:
        """Stage 1: the trigger from the start -U[0, 1); γ starts from 0 if it is estimated."""
        mu = -torch.rand(model.shape, generator=rng).to(model.device)
        gamma = torch.zeros_like(mu) if self.scale else torch.ones_like(mu)

        def loss(now: Estimate) -> Tensor:
            x_0 = model.draw_eps(self.batch, rng)
            return reversed_loss(model, x_0, late(model, self.batch, rng), now.mu, now.gamma, rng)

        return self.descend(Estimate(mu, gamma), loss, self.iterations, "estimation")

    def refined(self, model: Any, found: Estimate, rng: torch.Generator) -> tuple[Estimate, list[float]]:
        """Stage 2: the trigger for which the prediction is also exact on the images that it makes the model generate,
        at both ends.
        """

        def loss(now: Estimate) -> Tensor:
            x_0 = self.generated(model, now, rng)
            end = reversed_loss(model, x_0, late(model, self.batch, rng), now.mu, now.gamma, rng)
            t = torch.randint(0, WINDOW, (self.batch,), generator=rng).to(model.device)
            return (end + reversed_loss(model, x_0, t, torch.zeros_like(now.mu), now.gamma, rng)) / 2

        return self.descend(found, loss, self.refinement, "refinement", self.momentum, self.gradient_clip)

    def generated(self, model: Any, now: Estimate, rng: torch.Generator) -> Tensor:
        """x_0 (B, C, H, W) sampled from noise with the trigger, differentiable in the trigger."""
        noise = now.gamma * model.draw_eps(self.batch, rng) + now.mu
        inputs = Inputs(noise, None, image_seeds(0, "terd", self.batch))  # DDIM draws no numbers from the seeds
        steps, clip = self.sampling_steps, self.clip_x_0
        if self.scale:
            return TrojanDDIM(steps=steps, spacing="leading").with_trigger(now).run(model, inputs)
        return DDIM(steps=steps, clip=clip, spacing="leading").run(model, inputs)

    def descend(
        self,
        start: Estimate,
        loss: Callable[[Estimate], Tensor],
        iterations: int,
        phase: str,
        momentum: float = 0.0,
        clip: float | None = None,
    ) -> tuple[Estimate, list[float]]:
        """SGD on loss - λ ‖μ‖₁ from `start`, with γ at least 0. Also returns the loss of every iteration."""
        now = Estimate(*(tensor.clone().requires_grad_(True) for tensor in (start.mu, start.gamma)))
        learnt = [(now.mu, self.lr), (now.gamma, self.scale_lr)][: 2 if self.scale else 1]
        tensors = [tensor for tensor, _ in learnt]
        optimizer = torch.optim.SGD([{"params": [tensor], "lr": lr} for tensor, lr in learnt], momentum=momentum)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        losses = []
        for step in range(iterations):
            value = loss(now) - self.penalty * now.mu.abs().sum()
            for tensor, gradient in zip(tensors, torch.autograd.grad(value, tensors), strict=True):
                tensor.grad = gradient
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(tensors, clip)
            optimizer.step()
            schedule.step()
            now.gamma.data.clamp_(min=0)
            losses.append(value.item())
            progress(phase, step + 1, iterations, loss=losses[-1])
        return Estimate(now.mu.detach(), now.gamma.detach()), losses


def reversed_loss(model: Any, x_0: Tensor, t: Tensor, mu: Tensor, gamma: Tensor, rng: torch.Generator) -> Tensor:
    """L(x_0, t, μ): the sum over pixels, the mean over rows. x_0 (B, C, H, W) in the model's space, t (B,)."""
    first, second = model.draw_eps(len(x_0), rng), model.draw_eps(len(x_0), rng)
    x_t = torch.cat([model.add_noise(x_0, gamma * eps + mu, t) for eps in (first, second)])
    answers = model.eps(x_t, t.repeat(2)).chunk(2)
    difference = (first - answers[0]) - (second - answers[1])
    return difference.square().flatten(1).sum(1).mean() / 2


def late(model: Any, n: int, rng: torch.Generator) -> Tensor:
    """n random timesteps among the last ten."""
    return torch.randint(model.T - WINDOW, model.T, (n,), generator=rng).to(model.device)


def thinned(losses: list[float], most: int = 100) -> list[float]:
    """About `most` of the losses, evenly spaced."""
    return losses[:: max(1, len(losses) // most)]


@hookimpl
def defenses() -> list[type]:
    return [TERD]
