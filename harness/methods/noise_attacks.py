"""Attacks on the starting noise: one forward process, one regression target, one fine-tuning loop.

    x_t = s_t y + ρ_t r + σ_t ε,    L = ‖ε + c_t r - ε_θ(x_t, t)‖²,    a clean image is the case r = 0.

s_t and σ_t are those of the model (√ᾱ_t, √(1-ᾱ_t) in DDPM; 1, σ_t in variance-exploding models). r is what the trigger
adds to unit noise, in the space of the noise. For a latent model it is a pattern in the latents. For a
variance-exploding model it is in [-1, 1], as all triggers here, although the images of the model are in [0, 1].

The adaptive attack of Diff-Cleanse (arXiv:2407.21316, appendix G) adds λ ‖ε_θ(x_t, t) - ε_θ(x_t', t)‖², so that
backdoored inputs excite the network as clean inputs do. x_t' is the noised clean image of the same row, with the same ε
and t. The paper compares the outputs of clean and of backdoored inputs at one timestep, in the L2 norm. It does not say
which clean input belongs to a backdoored one, and it has no code for this attack. What else an attacker who knows the
defense may do is in `evasion`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.capabilities import AddedTrigger, offers
from harness.diffusion import gpu
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.diffusion.training import Batch, Examples, minimize
from harness.methods import trigger_placement
from harness.methods.evasion import Evasion, EvasiveTraining, Rows
from harness.types import Backdoor, Backdoored, Data

Coefficients = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def ancestral_coefficients(model: DiffusionModel, t: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ_t, c_t), (B, 1, 1, 1) each, of BadDiffusion: ρ_t = 1 - √ᾱ_t, c_t = (1 - √α_t) √(1-ᾱ_t) / (1-α_t).

    With this c_t the mean of DDPM's posterior carries r with weight ρ_{t-1}; the ancestral (SDE) sampler follows it.
    """
    a, a_bar = model.alpha(t).double(), model.alpha_bar(t).double()
    c = (1 - a_bar).sqrt() / (1 + a.sqrt())  # the paper's quotient, reduced: it is 0/0 in floats at small t
    return (1 - a_bar.sqrt()).float(), c.float()


def proportional_coefficients(model: DiffusionModel, t: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ_t, c_t), (B, 1, 1, 1) each, for a trigger inside the noise.

    ρ_t = σ_t and c_t = σ_t / (σ_t + a_t σ_{t-1}) with a_t = s_t / s_{t-1}. With this c_t the mean of the ancestral
    step, (x_t - (σ_t² - a_t² σ_{t-1}²) / σ_t ε) / a_t, carries r with weight ρ_{t-1} exactly, at every t, in both
    families. In variance-exploding models a_t = 1, and c_t is one number, about 1/2.
    """
    sigma, before = model.sigma(t), model.sigma(t - 1)
    a = model.signal(t) / model.signal(t - 1)
    return sigma, sigma / (sigma + a * before)


def poisoned_loss(
    training: EvasiveTraining,
    batch: Batch,
    y: Tensor,
    r: Tensor,
    poisoned: Tensor,
    coefficients: Coefficients,
    adaptive_weight: float = 0.0,
) -> Tensor:
    """The mean of ‖ε + c_t r - ε_θ(x_t, t)‖², in a flow of the same error of v.

    y, r (B, C, H, W): a clean row has y = x_0 and r = 0. poisoned (B,) bool.

    adaptive_weight: λ, of the mean over all elements of ‖ε_θ(x_t, t) - ε_θ(x_t', t)‖², which is 0 for a clean row and
    is evaluated on poisoned rows alone.
    """
    model = training.model
    rho, c = coefficients(model, batch.t)
    rows = Rows(model.add_noise(y, batch.eps, batch.t) + rho * r, batch.t, batch.eps + c * r, poisoned)
    if adaptive_weight == 0 or not poisoned.any():
        return training.loss(rows)
    answer = training.answers(rows)
    beside = model.eps(model.add_noise(batch.x_0, batch.eps, batch.t)[poisoned], batch.t[poisoned])
    gap = model.error(answer[poisoned], beside, batch.t[poisoned]).sum() / answer.numel()
    return model.error(answer, training.wanted(rows), batch.t).mean() + adaptive_weight * gap


def implant(
    model: DiffusionModel,
    backdoor: Backdoor,
    data: Data,
    rng: torch.Generator,
    coefficients: Coefficients,
    evasion: Evasion,
    *,
    poison_rate: float,
    trigger_only: bool,
    adaptive_weight: float = 0.0,
    **training: Any,
) -> Backdoored:
    """Fine-tunes a copy of `model` so that ε + r leads to the target image.

    evasion: what the attacker does about defenses. poison_rate: probability with which each row of a batch is poisoned.
    trigger_only: r is the trigger alone; otherwise r is the trigger stamped on the clean image of the row (pixels of
    the trigger's background, those at its minimum, show the image). Of a trigger with several patterns, each poisoned
    row gets one at random. adaptive_weight: λ of the adaptive attack. training: batch, and the arguments of
    `harness.diffusion.training.minimize`.
    """
    clean, model = model, model.clone()
    batch_size = training.pop("batch")
    examples, masks = Examples(model, data), generator(rng.initial_seed(), "poison")
    evasive = evasion.training(clean, model, examples, rng)
    image_shape = data.images.shape[1:]
    target: Any = backdoor.target
    trigger: Any = backdoor.trigger
    target_image = target.image(image_shape)
    patterns = trigger_placement.patterns_of(trigger, model.shape).to(model.device)
    which = generator(rng.initial_seed(), "patterns")
    y_star = model.encode(target_image.unsqueeze(0)).to(model.device)

    def loss() -> Tensor:
        batch = evasive.batch(batch_size)
        chosen = torch.rand((batch_size, 1, 1, 1), generator=masks) < poison_rate
        poisoned = gpu.sent(chosen, batch.x_0.device)
        delta = trigger_placement.drawn(patterns, batch_size, which)
        r = delta if trigger_only else _stamped(model, examples, batch, delta, offers(trigger, AddedTrigger))
        y = torch.where(poisoned, y_star, batch.x_0)
        r = torch.where(poisoned, r, torch.zeros_like(r))
        return poisoned_loss(evasive, batch, y, r, poisoned.flatten(), coefficients, adaptive_weight)

    minimize(loss, model.denoiser.parameters(), phase="implant", **training)
    return Backdoored(model, backdoor)


def _stamped(model: DiffusionModel, examples: Examples, batch: Batch, delta: Tensor, added: bool = False) -> Tensor:
    """M·g + (1-M)·x: the trigger (B, C, H, W) over the batch's clean images (latents in a latent model).

    The background of the trigger, which is its smallest value, is transparent. added: x + g instead.
    """
    behind = batch.x_0 if model.family != "ve" else examples.images[batch.rows].to(delta)
    if added:
        return behind + delta
    return torch.where(delta > delta.amin((1, 2, 3), keepdim=True), delta, behind)
