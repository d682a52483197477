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
its mean and variance are features. μ and γ are the averages over all starts of the estimation. Every second start
mirrors the one before, noises included, so what is left of the starts cancels, and what a trigger adds on either side
of 0 stays. An even number of starts therefore needs no clean models to compare with, and `flag_above` can judge a
model. The start with the least L - λ ‖μ‖₁ on fresh noise is refined and returned. Input-level detection uses the
log-likelihood ratio of its N(μ, γ²) to N(0, 1); an input is flagged above 0.

The defense needs only the model. It returns the suspicion, a screen and μ (C, H, W), in the units of the starting
noise. γ is 1 unless `scale` is set; then γ is estimated too, against attacks that scale the noise (TrojDiff). Pixels
are in [-1, 1]. Raises ValueError for a refinement on a variance-exploding model, because DDIM does not sample it.

Differs from the paper, which is known only from its code and summaries: the code has one start, -U[0, 1), and gives no
decision rule for its two model-level numbers, which are those of the refined μ (`starts=1`). Without `flag_above` the
decision is left to a population of clean models (`leaderboard.population`). Checked against the official code
(PKU-ML/TERD, read at 2f4261e and 1b94761). Other differences, why the starts are mirrored, and how to read the screen:
docs/methods/terd.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from harness import (
    DDIM,
    Defended,
    Inputs,
    Knowledge,
    PositiveInt,
    TrojanDDIM,
    generator,
    hookimpl,
    image_seeds,
    inversion,
)

JUDGED = 128  # noises on which the losses of the starts are compared
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
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion", "screen")
    sees: ClassVar[tuple[str, ...]] = ("noise-sde", "noise-ode")
    loops: ClassVar[tuple[str, ...]] = ("iterations", "refinement")

    starts: PositiveInt = 2  # starts of the estimation: -U[0, 1), its mirror image, another -U[0, 1), and so on;
    # official: 1
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
    flag_above: Annotated[float, Ge(0)] | None = (
        None  # suspicion above which a model is flagged; None = a population of
    )
    # clean models decides
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0  # momentum in the refinement; official value, 0.9 with `scale`

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if self.refinement and model.family == "ve":
            raise ValueError("terd refines through DDIM, which this model's variance forbids; use terd(refinement=0)")
        together = min(2, inversion.starts_at_once(self.batch, *model.shape[1:]))
        groups = [range(k, min(k + together, self.starts)) for k in range(0, self.starts, together)]
        runs = [run for group in groups for run in self.estimated(model, group, rng.initial_seed())]
        objectives = [self.objective(model, found, generator(rng.initial_seed(), "judged")) for found, _ in runs]
        best = objectives.index(min(objectives))
        found, losses = runs[best]
        notes: dict[str, Any] = {
            "estimation_loss": thinned(losses),
            "starts": [
                {"kl_mean": kl.mean().item(), "loss": loss}
                for kl, loss in zip((each.divergence() for each, _ in runs), objectives, strict=True)
            ],
        }
        if self.refinement:
            found, losses = self.refined(model, found, rng)
            notes["refinement_loss"] = thinned(losses)
        judged = found if self.starts == 1 else average([each for each, _ in runs])
        divergence, best_divergence = judged.divergence().double(), found.divergence().double()
        features = {
            "kl_mean": divergence.mean().item(),
            "kl_variance": divergence.var(correction=0).item(),
            "kl_best": best_divergence.mean().item(),
            "loss_best": min(objectives),
        }
        return Defended(
            suspicion=features["kl_mean"],
            flag_above=self.flag_above,
            features=features,
            screen=lambda inputs: found.log_ratio(inputs.noise),
            screen_above=0.0,
            trigger=found.mu.cpu(),
            notes=notes,
        )

    def estimated(self, model: Any, starts: range, seed: int) -> list[tuple[Estimate, list[float]]]:
        """Stage 1 from the k-th start: the trigger from -U[0, 1), or for odd k the mirror image of the start before,
        with all noises mirrored. γ starts from 0 if it is estimated. starts: one k, or an even one and the next.
        """
        signs = [(-1.0) ** k for k in starts]
        mu, loss = inversion.mirrored_search(model, signs, self.batch, generator(seed, "start", starts[0] // 2))
        gamma = torch.zeros_like(mu) if self.scale else torch.ones_like(mu)
        found, losses = self.descend(Estimate(mu, gamma), loss, self.iterations, "estimation")
        each = zip(found.mu, found.gamma, losses.unbind(1), strict=True)
        return [(Estimate(mu, gamma), values.tolist()) for mu, gamma, values in each]

    @torch.no_grad()
    def objective(self, model: Any, found: Estimate, rng: torch.Generator) -> float:
        """L(x̃, t, μ) - λ ‖μ‖₁ on noise that no search used."""
        x_0, t = model.draw_eps(JUDGED, rng), inversion.late(model, JUDGED, rng)
        loss = inversion.reversed_loss(model, x_0, t, found.mu, found.gamma, rng)
        return (loss - self.penalty * found.mu.abs().sum()).item()

    def refined(self, model: Any, found: Estimate, rng: torch.Generator) -> tuple[Estimate, list[float]]:
        """Stage 2: the trigger for which the prediction is also exact on the images that it makes the model generate,
        at both ends.
        """

        def loss(mu: Tensor, gamma: Tensor) -> Tensor:
            x_0 = self.generated(model, Estimate(mu, gamma), rng)
            end = inversion.reversed_loss(model, x_0, inversion.late(model, self.batch, rng), mu, gamma, rng)
            t = torch.randint(0, inversion.WINDOW, (self.batch,), generator=rng).to(model.device)
            return (end + inversion.reversed_loss(model, x_0, t, torch.zeros_like(mu), gamma, rng)) / 2

        found, losses = self.descend(found, loss, self.refinement, "refinement", self.momentum, self.gradient_clip)
        return found, losses.tolist()

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
        loss: Callable[[Tensor, Tensor], Tensor],
        iterations: int,
        phase: str,
        momentum: float = 0.0,
        clip: float | None = None,
    ) -> tuple[Estimate, Tensor]:
        """SGD on loss(μ, γ) - λ ‖μ‖₁ from `start`. Also returns the loss of every iteration, of n starts (·, n)."""
        mu, gamma, losses = inversion.descend_reversed(
            start.mu, start.gamma, loss, iterations=iterations, lr=self.lr,
            scale_lr=self.scale_lr if self.scale else 0.0, penalty=self.penalty, momentum=momentum, clip=clip,
            phase=phase,
        )  # fmt: skip
        return Estimate(mu, gamma), losses


def average(found: Sequence[Estimate]) -> Estimate:
    """The mean of μ and of γ over starts. What is left of mirrored starts cancels; what draws all of them stays."""
    return Estimate(
        torch.stack([each.mu for each in found]).mean(0), torch.stack([each.gamma for each in found]).mean(0)
    )


def thinned(losses: list[float], most: int = 100) -> list[float]:
    """About `most` of the losses, evenly spaced."""
    return losses[:: max(1, len(losses) // most)]


@hookimpl
def defenses() -> list[type]:
    return [TERD]
