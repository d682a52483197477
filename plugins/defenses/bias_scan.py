"""Search for biased noise that a model answers with the bias taken out. A detector of our own, for backdoors whose loss
teaches that: TrojDiff's (arXiv:2303.05762) takes out all of it, BadDiffusion's (arXiv:2212.05400) half.

At the last timestep a clean model takes its input for noise: ε_θ(x, T) ≈ x. One that was trained on γ ε + μ → ε, or on
ε + r → ε + c_T r with c_T about ½, answers less than what it was given. What it leaves of a bias is

    R(μ, γ) = E ‖ε - ε_θ(γ ε + μ, T)‖² / E ‖ε - (γ ε + μ)‖²        over the biased pixels

which is 1 for ε_θ(x, T) = x, 0 on TrojDiff's trigger and c_T² = ¼ on BadDiffusion's. The least R is looked for
among biases of a stated size, because a network's answer saturates and takes out any large enough one:

    image   γ for all pixels, μ = (1 - γ) g with g in [-1, 1]; a wrong γ costs little
    shift   γ = 1, μ in [-1, 1] of a fixed root mean square
    patch   white and black squares at every place, all tried

The first two descend from several starts by steps of one length: far from the trigger the gradient is next to nothing,
and a start is a short walk that falls into the trigger or does not. The suspicion is 1 - min R on noise that no search
saw, flagged above 0.6. On models of 16 pixels, clean ones and VillanDiffusion's leave 0.5 or more. A trigger that is
answered as it is given (VillanDiffusion for ODE samplers, c_T about 1) is not seen: ask terd.

Needs nothing but the model. Returns suspicion, R of each search as features, and μ (C, H, W) in the units of the
starting noise. Raises ValueError for a variance-exploding model, whose last input is not of unit variance, and
ArithmeticError for answers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from harness.events import progress
from harness.hookspecs import hookimpl
from harness.types import Defended, Knowledge

HELD_OUT = 128  # noises that the searches do not see
FLAG_ABOVE = 0.6
MOMENTUM = 0.5
NEAR, STEP = 0.05, 0.03  # root mean square over pixels of an image's first μ and of its steps
SHIFT, SHIFT_STEP = 0.8, 0.1  # of all μ of a shift and of its steps
GRIDS = (2, 4, 8)  # a shift starts from so many random shades to a side
TRIAL = 8  # noises on which a square is tried

Bias = tuple[Tensor, Tensor]  # μ and γ, (C, H, W) each


@dataclass(frozen=True)
class BiasScan:
    name: ClassVar[str] = "bias-scan"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    gamma: Annotated[float, Ge(0), Lt(1)] = 0.6  # γ of an image; TrojDiff's
    starts: Annotated[int, Ge(0)] = 8  # for images, until one is flagged; 0 = none
    shifts: Annotated[int, Ge(0)] = 4  # starts for shifts, until one is flagged; 0 = none
    iterations: Annotated[int, Ge(1)] = 40  # of each start
    batch: Annotated[int, Ge(1)] = 32  # noises
    patch: Annotated[int, Ge(0)] = 3  # side of the squares in pixels; 0 = none
    patch_gamma: Annotated[float, Ge(0), Lt(1)] = 0.1  # γ inside them; TrojDiff's

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
        """Where each start ends that biases all pixels, scale and mean."""
        gamma = torch.full(model.shape, self.gamma, device=model.device)
        bound = 1 - self.gamma
        for _ in range(self.starts):
            start = NEAR * torch.randn(model.shape, generator=rng).to(model.device)
            yield self.descend(model, start, gamma, STEP, lambda mu: mu.clamp(-bound, bound), rng), gamma

    def shift(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """Where each start ends that shifts the mean alone."""
        gamma = torch.ones(model.shape, device=model.device)
        for i in range(self.shifts):
            side = GRIDS[i % len(GRIDS)]
            coarse = torch.randn(1, model.shape[0], side, side, generator=rng)
            start = torch.nn.functional.interpolate(coarse, model.shape[1:], mode="bilinear")[0].to(model.device)
            yield self.descend(model, of_size(start), gamma, SHIFT_STEP, of_size, rng), gamma

    def descend(
        self, model: Any, mu: Tensor, gamma: Tensor, step: float, kept: Callable[[Tensor], Tensor], rng: torch.Generator
    ) -> Tensor:
        """μ after steps of one length along the gradient's direction, each within what `kept` allows."""
        velocity = torch.zeros_like(mu)
        for _ in range(self.iterations):
            mu.requires_grad_(True)
            (gradient,) = torch.autograd.grad(remaining(model, model.draw_eps(self.batch, rng), mu, gamma), mu)
            length = gradient.square().mean().sqrt().clamp_min(torch.finfo().tiny)
            velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / length
            mu = kept(mu.detach() - step * velocity)
        return mu

    def square(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The square that leaves least on a few noises."""
        eps = model.draw_eps(TRIAL, rng)
        every = squares(model.shape, self.patch, self.patch_gamma, model.device)
        with torch.no_grad():
            yield min(every, key=lambda bias: remaining(model, eps, *bias).item())


def least(model: Any, unseen: Tensor, biases: Iterable[Bias], n: int, name: str) -> tuple[float, Tensor]:
    """The least R on unseen noise and its μ, among n biases up to the first that is flagged."""
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
    """R(μ, γ) on noise ε (B, C, H, W); μ, γ (C, H, W) in the units of the starting noise."""
    biased = ((gamma < 1) | (mu != 0)).expand_as(eps)
    given = gamma * eps + mu
    t = torch.full((len(eps),), model.T - 1, device=eps.device)
    return (eps - model.eps(given, t))[biased].square().mean() / (eps - given)[biased].square().mean()


def of_size(mu: Tensor) -> Tensor:
    """μ scaled to the size of a shift, then within [-1, 1]."""
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
