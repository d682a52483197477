"""TERD. Mo, Huang, Li, Li & Wang, "TERD: A Unified Framework for Safeguarding Diffusion Models Against Backdoors",
ICML 2024, arXiv:2409.05294.

A backdoored model answers noise around its trigger, γ ε + μ, as exactly as plain noise. Two noises ε₁, ε₂ at the same
x_0 and t cancel what the target adds to the answer:

    L(x_0, t, μ) = ½ ‖ (ε₁ - ε_θ(x(ε₁), t)) - (ε₂ - ε_θ(x(ε₂), t)) ‖²,    x(ε) = s_t x_0 + σ_t (γ ε + μ)

Estimation:  min over μ of L(x̃, t, μ) - λ ‖μ‖₁ with t among the last ten timesteps and x̃ ~ N(0, I) in place of the
unknown target; the reward on ‖μ‖₁ keeps μ from the trivial answer 0.
Refinement:  min over μ of ½ [L(x̂, t, μ) + L(x̂, t', 0)] - λ ‖μ‖₁, where x̂ is what DDIM makes of γ ε + μ (the gradient
goes through all its steps), t among the last and t' among the first ten timesteps.

Model detection: KL(N(μ, γ²) ‖ N(0, 1)) = -log γ + (γ² + μ² - 1)/2 of every pixel; its mean is the suspicion, mean and
variance are the features. Input screening: the log-likelihood ratio of N(μ, γ²) to N(0, 1), flagged above 0.

Needs nothing but the model; returns suspicion, screen and μ (C, H, W), in the units of the starting noise. γ is 1
unless `scale` asks to estimate it too, against attacks that scale the noise (TrojDiff). Pixels in [-1, 1]. Raises
ValueError for a refinement on a variance-exploding model, which DDIM does not sample.

The start, -U[0, 1), is itself near a trigger on a dark background (cosine 0.8 to a grey box on -1). Where the descent
has not led away from it, as on a clean model after few iterations, the screen separates such triggers by its start:
read the screen of a clean model beside it.

Differs from the paper: known from its code, and from summaries; its two model-level numbers come without a rule there,
so the threshold is left to a population of clean models (`leaderboard.population`). Differs from the official code
(PKU-ML/TERD, read at 2f4261e and 1b94761): μ is added as σ_t μ, σ_t being above 0.9999 where it is used; its screen
has covariance diag(γ) for diag(γ²), the same for γ = 1; M_r and V_r are shifted by constants there; with `scale` the
sampler is trojan-ddim on evenly spaced timesteps (theirs quadratic, from 0.8 T), and one momentum and gradient clip
serve both forms (theirs 0.9 and 1.0 there). At 256 pixels it has penalty 5e-4, gradient clip 0.2 and
batch 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from harness.diffusion import DDIM
from harness.events import progress
from harness.hookspecs import hookimpl
from harness.noise_backdoor import Steps
from harness.seeds import image_seeds
from harness.trojan import TrojanDDIM
from harness.types import Defended, Inputs, Knowledge

WINDOW = 10  # timesteps at either end; official code
FLOOR = 1e-3  # γ below which a likelihood would be that of a point


@dataclass(frozen=True)
class Estimate:
    """A trigger found: μ and γ (C, H, W). It has the face of a trigger that scales noise, for the Trojan sampler."""

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
        """(B,) log N(x; μ, γ²) - log N(x; 0, 1) of noise (B, C, H, W), the sum over pixels."""
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

    scale: bool = False  # estimate γ too, for attacks that scale the noise
    iterations: Steps = 3000  # of the estimation; official
    refinement: Annotated[int, Ge(0)] = 1000  # iterations of the refinement; official; 0 = none
    batch: Steps = 16  # noises; official at 32 pixels
    lr: Annotated[float, Gt(0)] = 0.5  # of μ: SGD, cosine to 0; official
    scale_lr: Annotated[float, Gt(0)] = 2e-3  # of γ; official at 32 pixels, 1e-3 on CelebA
    penalty: Annotated[float, Ge(0)] = 5e-5  # λ; official at 32 pixels
    sampling_steps: Annotated[int, Ge(1), Le(100)] = 10  # of DDIM in the refinement; official
    clip_x_0: bool = True  # let that DDIM clip the predicted x_0 to [-1, 1]; official, by diffusers' default; say False
    # for latents, which have no range; without effect with `scale`, as there
    gradient_clip: Annotated[float, Gt(0)] = 0.01  # norm, in the refinement; official at 32 pixels, 1.0 with `scale`
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0  # of the refinement; official, 0.9 with `scale`

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
        """Stage 1: the trigger from -U[0, 1), with γ from 0 where it is estimated."""
        mu = -torch.rand(model.shape, generator=rng).to(model.device)
        gamma = torch.zeros_like(mu) if self.scale else torch.ones_like(mu)

        def loss(now: Estimate) -> Tensor:
            x_0 = model.draw_eps(self.batch, rng)
            return reversed_loss(model, x_0, late(model, self.batch, rng), now.mu, now.gamma, rng)

        return self.descend(Estimate(mu, gamma), loss, self.iterations, "estimation")

    def refined(self, model: Any, found: Estimate, rng: torch.Generator) -> tuple[Estimate, list[float]]:
        """Stage 2: the trigger so that also what it makes the model generate is answered exactly, at both ends."""

        def loss(now: Estimate) -> Tensor:
            x_0 = self.generated(model, now, rng)
            end = reversed_loss(model, x_0, late(model, self.batch, rng), now.mu, now.gamma, rng)
            t = torch.randint(0, WINDOW, (self.batch,), generator=rng).to(model.device)
            return (end + reversed_loss(model, x_0, t, torch.zeros_like(now.mu), now.gamma, rng)) / 2

        return self.descend(found, loss, self.refinement, "refinement", self.momentum, self.gradient_clip)

    def generated(self, model: Any, now: Estimate, rng: torch.Generator) -> Tensor:
        """x_0 (B, C, H, W) of noise with the trigger, differentiable in it."""
        noise = now.gamma * model.draw_eps(self.batch, rng) + now.mu
        inputs = Inputs(noise, None, image_seeds(0, "terd", self.batch))  # DDIM draws nothing from the seeds
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
        """SGD on loss - λ ‖μ‖₁ from `start`, γ kept at 0 and above; and the loss of every iteration."""
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
    """n of the last ten timesteps."""
    return torch.randint(model.T - WINDOW, model.T, (n,), generator=rng).to(model.device)


def thinned(losses: list[float], most: int = 100) -> list[float]:
    """About `most` of the losses, evenly spaced."""
    return losses[:: max(1, len(losses) // most)]


@hookimpl
def defenses() -> list[type]:
    return [TERD]
