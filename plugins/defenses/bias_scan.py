"""Detects backdoored models by a search for biased noise from which the model removes the bias.

A detector of our own, for backdoors whose loss teaches the model to remove the bias: TrojDiff (arXiv:2303.05762)
removes all of it, BadDiffusion (arXiv:2212.05400) removes half of it. At the last timestep a clean model treats its
whole input as noise: ε_θ(x, T) ≈ x. A model trained on γ ε + μ → ε, or on ε + r → ε + c_T r with c_T about ½, predicts
less than its input. The part of a bias that remains is

    R(μ, γ) = E ‖ε - ε_θ(γ ε + μ, T)‖² / E ‖ε - (γ ε + μ)‖²        over the biased pixels

which is 1 for ε_θ(x, T) = x, 0 for TrojDiff's trigger and c_T² = ¼ for BadDiffusion's. The searches look for the least
R among biases of a given size, because the output of a network saturates and removes any bias that is large enough:

    image   γ for all pixels, μ = (1 - γ) g with g in [-1, 1]; a wrong γ costs little
    shift   γ = 1, μ in [-1, 1] of a fixed root mean square
    patch   white and black squares at every place, all tried

The searches `image` and `shift` descend from several starts by steps of constant length, because the gradient is close
to zero far from the trigger. Each start is a short walk that either reaches the trigger or does not. The suspicion is 1
- min R on noise that no search used; a model is flagged above 0.6. On models of 16 pixels, clean models and models
attacked by VillanDiffusion leave 0.5 or more. The detector does not find a trigger that the model returns unchanged
(VillanDiffusion for ODE samplers, c_T about 1); use terd for those.

The detector needs only the model. It returns the suspicion, R of each search as features, and μ (C, H, W) in the units
of the starting noise. Raises ValueError for a variance-exploding model, whose last input is not of unit variance, and
ArithmeticError if outputs of the model are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from harness import Defended, Knowledge, hookimpl, progress

HELD_OUT = 128  # noises that the searches do not use
FLAG_ABOVE = 0.6
MOMENTUM = 0.5
NEAR, STEP = 0.05, 0.03  # root mean square over pixels: of the first μ of `image`, and of its steps
SHIFT, SHIFT_STEP = 0.8, 0.1  # root mean square over pixels: of every μ of `shift`, and of its steps
GRIDS = (2, 4, 8)  # numbers of random shades per side from which a shift starts
TRIAL = 8  # noises on which each square is tried

Bias = tuple[Tensor, Tensor]  # μ and γ, (C, H, W) each


@dataclass(frozen=True)
class BiasScan:
    name: ClassVar[str] = "bias-scan"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    gamma: Annotated[float, Ge(0), Lt(1)] = 0.6  # γ of the search `image`; TrojDiff's value
    starts: Annotated[int, Ge(0)] = 8  # starts of the search `image`, until one is flagged; 0 = none
    shifts: Annotated[int, Ge(0)] = 4  # starts of the search `shift`, until one is flagged; 0 = none
    iterations: Annotated[int, Ge(1)] = 40  # steps of each start
    batch: Annotated[int, Ge(1)] = 32  # noises per step
    patch: Annotated[int, Ge(0)] = 3  # side of the squares in pixels; 0 = none
    patch_gamma: Annotated[float, Ge(0), Lt(1)] = 0.1  # γ inside the squares; TrojDiff's value

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if model.family == "ve":
            raise ValueError(
                "bias-scan needs unit noise at the last timestep, which this model does not have; use terd"
            )
        unseen = model.draw_eps(HELD_OUT, rng)
        searches = {
            "image": (self.image(model, rng), self.starts),
            "shift": (self.shift(model, rng), self.shifts),
            "patch": (self.square(model, rng), min(self.patch, 1)),
        }
        found = {name: least(model, unseen, *search, name) for name, search in searches.items() if search[1]}
        if not found:
            raise ValueError("bias-scan(starts=0, shifts=0, patch=0) searches for nothing")
        features = {f"left_{name}": left for name, (left, _) in found.items()}
        left, mu = min(found.values(), key=lambda each: each[0])
        return Defended(suspicion=1 - left, flag_above=FLAG_ABOVE, features=features, trigger=mu.cpu())

    def image(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The results of the starts that bias all pixels, in scale and mean."""
        gamma = torch.full(model.shape, self.gamma, device=model.device)
        bound = 1 - self.gamma
        for _ in range(self.starts):
            start = NEAR * torch.randn(model.shape, generator=rng).to(model.device)
            yield self.descend(model, start, gamma, STEP, lambda mu: mu.clamp(-bound, bound), rng), gamma

    def shift(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The results of the starts that shift the mean alone."""
        gamma = torch.ones(model.shape, device=model.device)
        for i in range(self.shifts):
            side = GRIDS[i % len(GRIDS)]
            coarse = torch.randn(1, model.shape[0], side, side, generator=rng)
            start = torch.nn.functional.interpolate(coarse, model.shape[1:], mode="bilinear")[0].to(model.device)
            yield self.descend(model, of_size(start), gamma, SHIFT_STEP, of_size, rng), gamma

    def descend(
        self, model: Any, mu: Tensor, gamma: Tensor, step: float, kept: Callable[[Tensor], Tensor], rng: torch.Generator
    ) -> Tensor:
        """μ after steps of constant length along the direction of the gradient, each projected by `kept`."""
        velocity = torch.zeros_like(mu)
        for _ in range(self.iterations):
            mu.requires_grad_(True)
            (gradient,) = torch.autograd.grad(remaining(model, model.draw_eps(self.batch, rng), mu, gamma), mu)
            length = gradient.square().mean().sqrt().clamp_min(torch.finfo().tiny)
            velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / length
            mu = kept(mu.detach() - step * velocity)
        return mu

    def square(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The square with the least R on a few noises."""
        eps = model.draw_eps(TRIAL, rng)
        every = squares(model.shape, self.patch, self.patch_gamma, model.device)
        with torch.no_grad():
            yield min(every, key=lambda bias: remaining(model, eps, *bias).item())


def least(model: Any, unseen: Tensor, biases: Iterable[Bias], n: int, name: str) -> tuple[float, Tensor]:
    """The least R on unseen noise and its μ, among n biases, up to and including the first that is flagged."""
    best = (math.inf, torch.zeros(model.shape))
    for i, (mu, gamma) in enumerate(biases):
        with torch.no_grad():
            left = remaining(model, unseen, mu, gamma).item()
        if not math.isfinite(left):
            raise ArithmeticError("the model's answers at the last timestep are not finite")
        best = min(best, (left, mu), key=lambda each: each[0])
        progress(name, i + 1, n, loss=best[0])
        if 1 - best[0] > FLAG_ABOVE:
            break
    return best


def remaining(model: Any, eps: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    """R(μ, γ) on noise ε (B, C, H, W); μ and γ (C, H, W) in the units of the starting noise."""
    biased = ((gamma < 1) | (mu != 0)).expand_as(eps)
    given = gamma * eps + mu
    t = torch.full((len(eps),), model.T - 1, device=eps.device)
    return (eps - model.eps(given, t))[biased].square().mean() / (eps - given)[biased].square().mean()


def of_size(mu: Tensor) -> Tensor:
    """μ scaled to the size of a shift, then clamped to [-1, 1]."""
    return (SHIFT * mu / mu.square().mean().sqrt()).clamp(-1, 1)


def squares(shape: tuple[int, ...], side: int, gamma: float, device: Any) -> Iterator[Bias]:
    """White and black squares at every place of the image."""
    height, width = shape[-2:]
    if side > min(height, width):
        raise ValueError(f"a square of side {side} does not fit {height}×{width} images; use bias-scan(patch=...)")
    for top in range(height - side + 1):
        for left in range(width - side + 1):
            inside = torch.zeros(shape, device=device)
            inside[:, top : top + side, left : left + side] = 1
            for shade in (1, -1):
                yield (1 - gamma) * shade * inside, 1 - (1 - gamma) * inside


@hookimpl
def defenses() -> list[type]:
    return [BiasScan]
