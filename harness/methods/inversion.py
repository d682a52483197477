"""Search for a trigger r on the starting noise: descent on a pattern, losses, and measures of images of shifted noise.

The losses are those of Elijah (arXiv:2312.00050) and of TERD (arXiv:2409.05294), from whose triggers other searches
start. The measures are how similar the images are and how plain they are. r is (C, H, W). It is added to unit noise, in
the space of the noise (latents in a latent model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from harness.diffusion.events import loop, progress
from harness.diffusion.model import DiffusionModel
from harness.types import Inputs, Sampler

Through = Literal["straight", "sampler"]
WINDOW = 10  # timesteps at either end of TERD's losses; official code
PIXELS = 2**15  # of the inputs of one call with a gradient, at most, where starts descend beside each other


def descend(
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    lr: float,
    iterations: int,
    phase: str = "inversion",
    stop: Callable[[], bool] | None = None,
) -> tuple[Tensor, list[float]]:
    """Minimises `loss(r)` over a pattern (C, H, W) by Adam from `start`. Returns (r, the loss of every iteration).

    stop: called after each loss and before its step, so that the returned r is the one that was judged. Raises
    ArithmeticError if the loss becomes NaN or infinite.
    """
    r = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([r], lr=lr)
    losses: list[float] = []
    for step in loop(phase, range(iterations)):
        value = loss(r)
        losses.append(value.item())
        if not torch.isfinite(value.detach()):
            raise ArithmeticError(
                f"{phase}: the loss became {losses[-1]} at iteration {step}; a lower lr usually helps"
            )
        progress(phase, step + 1, iterations, loss=losses[-1])
        if stop is not None and stop():
            break
        (r.grad,) = torch.autograd.grad(value, r)
        optimizer.step()
    return r.detach(), losses


def starts_at_once(batch: int, height: int, width: int) -> int:
    """How many starts descend beside each other, at least 1. Each gives the network 2·`batch` inputs of so many pixels;
    a call of small inputs costs more than their share of it."""
    return max(1, PIXELS // (2 * batch * height * width))


def descend_reversed(
    mu: Tensor,
    gamma: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    iterations: int,
    lr: float,
    scale_lr: float = 0.0,
    penalty: float = 5e-5,
    momentum: float = 0.0,
    clip: float | None = None,
    phase: str = "estimation",
) -> tuple[Tensor, Tensor, Tensor]:
    """SGD with a cosine to 0 on loss(μ, γ) - λ ‖μ‖₁, as in TERD. Returns (μ, γ, the value of every iteration).

    mu, gamma: the start, (C, H, W) each, or n starts (n, C, H, W) with n losses, which descend beside each other. The
    values are (iterations,), or (iterations, n). γ stays at least 0, and constant if scale_lr is 0. penalty: λ. clip:
    largest norm of the gradient, of all starts together.
    """
    mu, gamma = (tensor.detach().clone().requires_grad_(True) for tensor in (mu, gamma))
    learnt = [(mu, lr), (gamma, scale_lr)][: 2 if scale_lr else 1]
    tensors = [tensor for tensor, _ in learnt]
    optimizer = torch.optim.SGD([{"params": [tensor], "lr": rate} for tensor, rate in learnt], momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    values: list[Tensor] = []
    for step in loop(phase, range(iterations)):
        value = loss(mu, gamma) - penalty * mu.abs().sum((-3, -2, -1))
        for tensor, gradient in zip(tensors, torch.autograd.grad(value.sum(), tensors), strict=True):
            tensor.grad = gradient
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tensors, clip)
        optimizer.step()
        schedule.step()
        gamma.data.clamp_(min=0)
        values.append(value.detach().cpu())
        progress(phase, step + 1, iterations, loss=values[-1].mean().item())
    return mu.detach(), gamma.detach(), torch.stack(values)


def reversed_loss(
    model: DiffusionModel, x_0: Tensor, t: Tensor, mu: Tensor, gamma: Tensor, rng: torch.Generator,
    sign: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """TERD's L(x_0, t, μ) = ½ ‖(ε₁ - ε_θ(x(ε₁), t)) - (ε₂ - ε_θ(x(ε₂), t))‖² with x(ε) = s_t x_0 + σ_t (γ ε + μ).

    x_0 (B, C, H, W) in the model's space, t (B,), μ and γ (C, H, W). The sum over pixels, the mean over rows. Of n
    triggers, μ and γ (n, C, H, W) and x_0 (n, B, C, H, W), it is (n,), on the same t and noises. sign: a factor of both
    noises, (n, 1, 1, 1, 1) of n triggers; -1 gives the mirror image of the loss under the same rng.
    """
    mu, gamma = mu.unsqueeze(-4), gamma.unsqueeze(-4)
    first, second = (sign * model.draw_eps(len(t), rng) for _ in range(2))
    x_t = torch.stack([model.add_noise(x_0, gamma * eps + mu, t) for eps in (first, second)])
    rows = x_t.flatten(0, -4)
    answers = model.eps(rows, t.repeat(len(rows) // len(t))).view_as(x_t)
    difference = (first - answers[0]) - (second - answers[1])
    return difference.square().flatten(-3).sum(-1).mean(-1) / 2


def mirrored_search(
    model: DiffusionModel, signs: Sequence[float], batch: int, rng: torch.Generator
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """TERD's estimation on noise x_0: the starts -sign · U[0, 1), (n, C, H, W), and L(x_0, t, μ) (n,) as a function of
    μ and γ (n, C, H, W).

    Searches with sign 1 and -1 mirror each other, noises included. batch: noises per step of each.
    """
    sign = torch.tensor(signs, device=model.device).view(-1, 1, 1, 1, 1)
    start = -sign[:, 0] * torch.rand(model.shape, generator=rng).to(model.device)

    def loss(mu: Tensor, gamma: Tensor) -> Tensor:
        x_0 = sign * model.draw_eps(batch, rng)
        return reversed_loss(model, x_0, late(model, batch, rng), mu, gamma, rng, sign)

    return start, loss


def late(model: DiffusionModel, n: int, rng: torch.Generator) -> Tensor:
    """n random timesteps among the last ten, (n,). Raises ValueError for a flow."""
    _need_answers(model)
    return torch.randint(model.T - WINDOW, model.T, (n,), generator=rng).to(model.device)


def shift_loss(model: DiffusionModel, noise: Tensor, tau: Tensor, lam: float) -> Tensor:
    """Elijah's mean_CHW | λ τ - mean_b ε_θ(ε_b + τ, T-1) | for noise ε (B, C, H, W) and τ (C, H, W)."""
    t = torch.full((len(noise),), model.T - 1, device=noise.device)
    return (lam * tau - model.eps(at_the_end(model, noise + tau), t).mean(0)).abs().mean()


def at_the_end(model: DiffusionModel, noise: Tensor) -> Tensor:
    """x_T (B, C, H, W) of unit noise: the noise itself, or σ_max times the noise in variance-exploding models.

    Raises ValueError for a flow.
    """
    _need_answers(model)
    return noise * model.sigma(torch.tensor([model.T - 1], device=noise.device)) if model.family == "ve" else noise


def _need_answers(model: DiffusionModel) -> None:
    if model.family == "flow":
        raise ValueError(
            "this method reads a trigger from ε at the last timesteps, and there a flow's ε is its input whatever the "
            "network answers; use a defense of text-to-image models, such as skd"
        )


def images_of(
    model: DiffusionModel, sampler: Sampler, inputs: Inputs, r: Tensor, through: Through = "straight"
) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] that `sampler` generates from noise + r, differentiable in r.

    through: "sampler" differentiates every step of the sampler. "straight" does not: ∂x_0/∂x_T is replaced by a
    constant, here 1/B times the identity, so the gradient for r is the mean over the batch of the gradient for x_0. In
    both modes a value that the clamp to [-1, 1] cuts off keeps its gradient.
    """
    shifted = inputs.with_noise(inputs.noise.to(r) + r)
    if through == "sampler":
        x_0 = sampler.run(model, shifted)
    else:
        with torch.no_grad():
            x_0 = sampler.run(model, shifted)
        x_0 = x_0 + (r - r.detach()) / len(inputs)
    images = model.decode(x_0)
    return images + (images.clamp(-1, 1) - images).detach()


def cosines(features: Tensor) -> Tensor:
    """(B, B) cosine similarities of the rows of features (B, D)."""
    unit = torch.nn.functional.normalize(features.flatten(1), dim=1)
    return unit @ unit.T


def largest_cluster(features: Tensor, kappa: float) -> int:
    """Size of the largest set of rows of features (B, D) in which every two rows have a cosine above kappa.

    It is the largest clique of their graph, computed exactly. Takes about a second for 100 rows.
    """
    import networkx

    alike = (cosines(features.detach().double()) > kappa).fill_diagonal_(False).int().cpu().numpy()
    clique, _ = networkx.max_weight_clique(networkx.from_numpy_array(alike), weight=None)  # type: ignore[arg-type]
    return len(clique)


def entropy(images: Tensor, levels: int = 256) -> Tensor:
    """(B,) Shannon entropy in bits, 0..log2(levels), of the grey levels of images (B, C, H, W) in [-1, 1].

    A pixel between two levels counts for both, in proportion to its distance to each. This makes the histogram
    differentiable.
    """
    grey = (images.mean(1).flatten(1).clamp(-1, 1) + 1) / 2 * (levels - 1)
    below = grey.detach().floor().clamp(max=levels - 2)
    part = grey - below
    counts = grey.new_zeros(len(grey), levels)
    counts = counts.scatter_add(1, below.long(), 1 - part).scatter_add(1, below.long() + 1, part)
    share = counts / grey.shape[1]
    return -(share * (share + 1e-12).log2()).sum(1)
