"""What the attacks on the starting noise share: one forward process, one regression target, one fine-tuning loop.

x_t = √ᾱ_t y + ρ_t r + √(1-ᾱ_t) ε,    L = ‖ε + c_t r - ε_θ(x_t, t)‖²,    a clean image is the case r = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness.seeds import generator
from harness.training import Batch, Examples, minimize
from harness.types import Backdoor, Backdoored, Data

Coefficients = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
Rate = Annotated[float, Ge(0), Le(1)]
Steps = Annotated[int, Ge(1)]
LearningRate = Annotated[float, Gt(0), Le(1)]


def ancestral_coefficients(model: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ_t, c_t), (B, 1, 1, 1) each, of BadDiffusion: ρ_t = 1 - √ᾱ_t, c_t = (1 - √α_t) √(1-ᾱ_t) / (1-α_t).

    c_t is what makes the mean of DDPM's posterior carry r with weight ρ_{t-1}: the ancestral (SDE) sampler follows it.
    """
    a, a_bar = model.alpha(t).double(), model.alpha_bar(t).double()
    c = (1 - a_bar).sqrt() / (1 + a.sqrt())  # the paper's quotient, reduced: it is 0/0 in floats at small t
    return (1 - a_bar.sqrt()).float(), c.float()


def poisoned_loss(model: Any, batch: Batch, y: Tensor, r: Tensor, coefficients: Coefficients) -> Tensor:
    """The mean of ‖ε + c_t r - ε_θ(x_t, t)‖². y, r (B, C, H, W): a clean row has y = x_0 and r = 0."""
    rho, c = coefficients(model, batch.t)
    x_t = model.add_noise(y, batch.eps, batch.t) + rho * r
    return (batch.eps + c * r - model.eps(x_t, batch.t)).square().mean()


def implant(
    model: Any,
    backdoor: Backdoor,
    data: Data,
    rng: torch.Generator,
    coefficients: Coefficients,
    *,
    poison_rate: float,
    trigger_only: bool,
    **training: Any,
) -> Backdoored:
    """Fine-tune a copy of `model` so that ε + r leads to the target image.

    poison_rate: each row of a batch is poisoned with this probability. trigger_only: r is the trigger alone; otherwise
    the trigger stamped on the row's clean image (background pixels of the trigger, those at its minimum, show it).
    training: batch, and what `harness.training.minimize` takes.
    """
    model = model.clone()
    batch_size = training.pop("batch")
    examples, masks = Examples(model, data), generator(rng.initial_seed(), "poison")
    image_shape = data.images.shape[1:]
    target: Any = backdoor.target
    trigger: Any = backdoor.trigger
    target_image = target.image(image_shape)
    delta = trigger.delta(image_shape)
    y_star, r_star = (model.encode(x.unsqueeze(0)).to(model.device) for x in (target_image, delta))
    r_all = None if trigger_only else _stamped(model, examples.images, delta).to(model.device)

    def loss() -> Tensor:
        batch = examples.batch(batch_size, rng)
        poisoned = (torch.rand((batch_size, 1, 1, 1), generator=masks) < poison_rate).to(batch.x_0.device)
        r = r_star if r_all is None else r_all[batch.rows]
        y = torch.where(poisoned, y_star, batch.x_0)
        return poisoned_loss(model, batch, y, torch.where(poisoned, r, torch.zeros_like(r)), coefficients)

    minimize(loss, model.denoiser.parameters(), phase="implant", **training)
    return Backdoored(model, backdoor)


def _stamped(model: Any, images: Tensor, delta: Tensor) -> Tensor:
    """M·g + (1-M)·x: the trigger over each clean image, its background (its smallest value) transparent."""
    return model.encode(torch.where(delta > delta.min(), delta, images))
