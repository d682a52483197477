"""Detects backdoored models by a search for biased noise that the model treats unlike its mirror image.

A detector of our own. At the last timestep a clean model treats its whole input as noise: ε_θ(x, T) ≈ x. A model
trained on γ ε + μ → ε (TrojDiff, arXiv:2303.05762) or on ε + r → ε + c_T r with c_T about ½ (BadDiffusion,
arXiv:2212.05400) predicts less than its input. The part of a bias that remains is

    R(μ, γ) = E ‖ε - ε_θ(γ ε + μ, T)‖² / E ‖ε - (γ ε + μ)‖²        over the biased pixels

which is 1 for ε_θ(x, T) = x, 0 for TrojDiff's trigger and c_T² = ¼ for BadDiffusion's. R alone does not tell: the
output of a network saturates, so a clean model also removes a part of any large bias, and a model attacked by
VillanDiffusion for ODE samplers (c_T about 1) returns its trigger *more* fully than a clean model does. Noise has no
preferred side, so a clean model treats a bias and its mirror image alike. The searches look for the least

    R(μ, γ) / R(-μ, γ)        the second on mirrored noise -ε

which is small where μ is removed and also where -μ is kept, among biases of a given size:

    image   γ for all pixels, μ = (1 - γ) g with g in [-1, 1]; a wrong γ costs little
    shift   γ = 1, μ in [-1, 1] of a fixed root mean square, or of several in turn
    patch   white and black squares at every place, all tried

The searches `image` and `shift` descend from several starts by steps whose length does not depend on that of the
gradient, which is close to zero far from the trigger. Each start is a short walk that either reaches the trigger or
does not. On development models a shift reached triggers only from a size and a start near their own; `bench scan` asks
for two sizes, and also starts from white and black. The suspicion is 1 minus the least ratio of the starts, on noise
that no descent used. With `mirrored=False` the ratio is R alone, as in version 1.

The detector needs only the model. It returns the suspicion, the least ratio of each search as features, and μ (C, H,
W) in the units of the starting noise. If the model returns -μ whole and removes μ no more than a clean model could, -μ
is taken for the trigger: the note `kept` is true, and the returned trigger is -μ. Raises ValueError for a
variance-exploding model, whose last input is not of unit variance, and ArithmeticError if outputs of the model are not
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor

from harness import Defended, Knowledge, hookimpl, inversion, loop, progress

HELD_OUT = 128  # noises that the searches do not use
FLAG_ABOVE, FLAG_ABOVE_ALONE = 0.35, 0.6  # of the ratio, chosen on one clean and one ODE model of digits; of R alone
KEPT, REMOVED = 0.9, 0.35  # R above which a model returns a bias, and below which it removes it as an attack would
MOMENTUM = 0.5
NEAR, STEP = 0.05, 0.03  # root mean square over pixels: of the first μ of `image`, and of its steps
SHIFT_STEP = 0.125  # root mean square over pixels: of the steps of `shift`, as a share of that of μ
GRIDS = (2, 4, 8)  # numbers of random shades per side from which a shift starts
WHITE, BLACK = 1, -1  # a start without random shades
TRIAL = 8  # noises on which each square is tried
TOGETHER = 8  # squares of one call of the model

Bias = tuple[Tensor, Tensor]  # μ and γ, (C, H, W) each, or (n, C, H, W) of n biases
Sizes = Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)]


@dataclass(frozen=True)
class BiasScan:
    name: ClassVar[str] = "bias-scan"
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)
    loops: ClassVar[tuple[str, ...]] = ("iterations",)

    gamma: Annotated[float, Ge(0), Lt(1)] = 0.6  # γ of the search `image`; TrojDiff's value
    starts: Annotated[int, Ge(0)] = 8  # starts of the search `image`; 0 = none
    shifts: Annotated[int, Ge(0)] = 4  # starts of the search `shift` from random shades, at each size
    uniform: bool = False  # two more starts at each size: white and black, without noise
    sizes: Sizes = (0.8,)  # root mean square over pixels of μ in the search `shift`
    iterations: Annotated[int, Ge(1)] = 40  # steps of each start
    batch: Annotated[int, Ge(1)] = 32  # noises per step
    stop: bool = False  # a search ends at the first start that is flagged. It saves time; the suspicion is then that of
    # the end
    mirrored: bool = True  # divide R by that of the mirrored bias; False = R alone
    patch: Annotated[int, Ge(0)] = 3  # side of the squares in pixels; 0 = none
    patch_gamma: Annotated[float, Ge(0), Lt(1)] = 0.1  # γ inside the squares; TrojDiff's value

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if model.family != "vp":
            raise ValueError(
                "bias-scan needs unit noise at the last timestep, which this model does not have; use terd"
            )
        unseen = model.draw_eps(HELD_OUT, rng)
        searches = {
            "image": (self.image(model, rng), self.starts),
            "shift": (self.shift(model, rng), len(self.shift_starts)),
            "patch": (self.square(model, rng), min(self.patch, 1)),
        }
        found = {name: self.least(model, unseen, *search, name) for name, search in searches.items() if search[1]}
        if not found:
            raise ValueError("bias-scan(starts=0, shifts=0, patch=0) searches for nothing")
        features = {f"left_{name}": left for name, (left, _) in found.items()}
        left, (mu, gamma) = min(found.values(), key=lambda each: each[0])
        with torch.no_grad():
            beside = remaining(model, -unseen, -mu, gamma).item()
            alone = remaining(model, unseen, mu, gamma).item()
        kept = self.mirrored and beside > KEPT and alone > REMOVED
        return Defended(
            suspicion=1 - left, flag_above=self.flag_above, features=features, trigger=-mu.cpu() if kept else mu.cpu(),
            notes={"left": alone, "left_of_mirror_image": beside, "kept": kept},
        )  # fmt: skip

    @property
    def sees(self) -> tuple[str, ...]:
        return ("noise-sde", "noise-ode") if self.mirrored else ("noise-sde",)

    @property
    def flag_above(self) -> float:
        return FLAG_ABOVE if self.mirrored else FLAG_ABOVE_ALONE

    def measured(self, model: Any, eps: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
        """What the searches minimise: the ratio, or R alone; of n biases n numbers. eps (B, C, H, W), or (n, B, C, H,
        W) if each bias has noises of its own."""
        if not self.mirrored:
            return remaining(model, eps, mu, gamma)
        eps = eps if eps.dim() > mu.dim() else eps.unsqueeze(0)
        left, beside = remaining(model, torch.stack([eps, -eps]), torch.stack([mu, -mu]), gamma)
        return left / beside

    def image(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The results of the starts that bias all pixels, in scale and mean."""
        gamma = torch.full(model.shape, self.gamma, device=model.device)
        bound = 1 - self.gamma
        starts = [(partial(torch.randn, model.shape, generator=rng), STEP)] * self.starts
        yield from self.search(model, "image", starts, NEAR, gamma, lambda mu, step: mu.clamp(-bound, bound), rng)

    def shift(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The results of the starts that shift the mean alone."""
        gamma = torch.ones(model.shape, device=model.device)
        starts = [(partial(shades, model.shape, side, rng), SHIFT_STEP * size) for size, side in self.shift_starts]

        def kept(mu: Tensor, step: Tensor) -> Tensor:
            return of_size(mu, step / SHIFT_STEP)

        yield from self.search(model, "shift", starts, 1.0, gamma, kept, rng)

    @property
    def shift_starts(self) -> list[tuple[float, int]]:
        """The starts of the search `shift`: the size, and the random shades per side, or WHITE or BLACK."""
        sides = [GRIDS[i % len(GRIDS)] for i in range(self.shifts)] + [WHITE, BLACK] * self.uniform
        return [(size, side) for size in self.sizes for side in sides]

    def search(
        self, model: Any, name: str, starts: Sequence[tuple[Callable[[], Tensor], float]], near: float, gamma: Tensor,
        kept: Callable[[Tensor, Tensor], Tensor], rng: torch.Generator,
    ) -> Iterator[Bias]:  # fmt: skip
        """The results of the starts: draws of their patterns, and the lengths of their steps. Of small images several
        descend together, each with the draws that it would have alone. near: a factor of the patterns."""
        together = 1 if self.stop else inversion.starts_at_once(self.batch, *model.shape[1:])
        for first in loop(name, range(0, len(starts), together)):
            part, mus, rngs = starts[first : first + together], [], []
            for draw, _ in part:
                mus.append(near * draw().to(model.device))
                rngs.append(rng if len(part) == 1 else self.set_aside(model, rng))
            step = torch.tensor([length for _, length in part], device=model.device).view(-1, 1, 1, 1)
            found = self.descend(model, torch.stack(mus), gamma, step, kept, rngs)
            yield from ((mu, gamma) for mu in loop("found", found.unbind()))

    def set_aside(self, model: Any, rng: torch.Generator) -> torch.Generator:
        """A generator of the noises of one start, which `rng` then has behind it."""
        own = torch.Generator()
        own.set_state(rng.get_state())
        for _ in range(self.iterations):
            torch.randn((self.batch, *model.shape), generator=rng)
        return own

    def descend(
        self, model: Any, mu: Tensor, gamma: Tensor, step: Tensor, kept: Callable[[Tensor, Tensor], Tensor],
        rngs: Sequence[torch.Generator],
    ) -> Tensor:  # fmt: skip
        """μ (n, C, H, W) of n starts after steps along means of the directions of their gradients, projected by `kept`.
        step (n, 1, 1, 1): their lengths. rngs: of the noises of each start."""
        mu, velocity = kept(mu, step), torch.zeros_like(mu)
        for _ in loop("steps", range(self.iterations)):
            mu.requires_grad_(True)
            eps = torch.stack([model.draw_eps(self.batch, rng) for rng in rngs])
            (gradient,) = torch.autograd.grad(self.measured(model, eps, mu, gamma).sum(), mu)
            length = gradient.square().mean((-3, -2, -1), keepdim=True).sqrt().clamp_min(torch.finfo().tiny)
            velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / length
            mu = kept(mu.detach() - step * velocity, step)
        return mu

    def square(self, model: Any, rng: torch.Generator) -> Iterator[Bias]:
        """The square with the least ratio on a few noises."""
        eps = model.draw_eps(TRIAL, rng)
        every = list(squares(model.shape, self.patch, self.patch_gamma, model.device))
        tried = []
        for first in loop("squares", range(0, len(every), TOGETHER)):
            mus, gammas = zip(*every[first : first + TOGETHER], strict=True)
            with torch.no_grad():
                tried += self.measured(model, eps, torch.stack(mus), torch.stack(gammas)).tolist()
        yield every[tried.index(min(tried))]

    def least(self, model: Any, unseen: Tensor, biases: Iterable[Bias], n: int, name: str) -> tuple[float, Bias]:
        """The least ratio on unseen noise and its bias, among n biases."""
        best = (math.inf, (torch.zeros(model.shape), torch.ones(model.shape)))
        for i, bias in enumerate(biases):
            with torch.no_grad():
                left = self.measured(model, unseen, *bias).item()
            if not math.isfinite(left):
                raise ArithmeticError("the model's answers at the last timestep are not finite")
            best = min(best, (left, bias), key=lambda each: each[0])
            progress(name, i + 1, n, loss=best[0])
            if self.stop and 1 - best[0] > self.flag_above:
                break
        return best


def remaining(model: Any, eps: Tensor, mu: Tensor, gamma: Tensor) -> Tensor:
    """R(μ, γ) on noise ε (B, C, H, W), a number; μ and γ (C, H, W) in the units of the starting noise. Of n biases
    (n, C, H, W) it is (n,), on the same noise or on noise of their own (n, B, C, H, W)."""
    biased = ((gamma < 1) | (mu != 0)).to(eps).unsqueeze(-4)
    given = gamma.unsqueeze(-4) * eps + mu.unsqueeze(-4)  # (..., B, C, H, W)
    rows = given.reshape(-1, *eps.shape[-3:])
    t = torch.full((len(rows),), model.T - 1, device=eps.device)
    answers = torch.cat([model.eps(*part) for part in zip(rows.split(HELD_OUT), t.split(HELD_OUT), strict=True)])
    left = (eps - answers.view_as(given)).square() * biased
    return left.sum((-4, -3, -2, -1)) / ((eps - given).square() * biased).sum((-4, -3, -2, -1))


def shades(shape: tuple[int, ...], side: int, rng: torch.Generator) -> Tensor:
    """A pattern (C, H, W) of random shades, `side` per side, or white or black."""
    if side in (WHITE, BLACK):
        return side * torch.ones(shape)
    coarse = torch.randn(1, shape[0], side, side, generator=rng)
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear")[0]


def of_size(mu: Tensor, size: Tensor) -> Tensor:
    """μ (n, C, H, W) scaled to root mean squares (n, 1, 1, 1), then clamped to [-1, 1]."""
    return (size * mu / mu.square().mean((-3, -2, -1), keepdim=True).sqrt()).clamp(-1, 1)


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
