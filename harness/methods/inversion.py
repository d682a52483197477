"""Search for a trigger r on the starting noise: descent on a pattern, and measures of the images of shifted noise.

The measures are how similar the images are and how plain they are. r is (C, H, W). It is added to unit noise, in the
space of the noise (latents in a latent model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from harness.diffusion.events import progress
from harness.diffusion.model import DiffusionModel
from harness.types import Inputs, Sampler

Through = Literal["straight", "sampler"]


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
    for step in range(iterations):
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
