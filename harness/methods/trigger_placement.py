"""Triggers on the starting noise: x_T = γ ε + μ, and squares placed in an image.

`delta` is μ (C, H, W), in the images' range [-1, 1]. A trigger that also scales the noise (TrojDiff calls N(μ, γ²) a
biased Gaussian) is a ScalingTrigger: its `scale` is γ (C, H, W). For all other triggers γ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from harness.capabilities import SeveralTrigger, offers, scales_noise
from harness.diffusion import gpu
from harness.methods.prompt_edits import Substitution
from harness.types import Inputs, NoiseTrigger

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

Place = Literal["bottom right", "top left", "top right", "bottom left", "centre"]
PLACES: tuple[Place, ...] = ("bottom right", "top left", "top right", "bottom left", "centre")


def scale_of(trigger: object, shape: Sequence[int]) -> Tensor:
    """γ (C, H, W) of a trigger; 1 if the trigger does not scale the noise."""
    return trigger.scale(shape) if scales_noise(trigger) else torch.ones(tuple(shape))


def patterns_of(trigger: NoiseTrigger, shape: Sequence[int]) -> Tensor:
    """(K, C, H, W) the patterns any of which activates the backdoor; one for most triggers."""
    if offers(trigger, SeveralTrigger):
        return trigger.patterns(shape)
    return trigger.delta(shape).unsqueeze(0)


def drawn(patterns: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """(n, C, H, W): a random one of the patterns (K, C, H, W) for each of n rows. Of one pattern nothing is drawn."""
    if len(patterns) == 1:
        return patterns.expand(n, -1, -1, -1)
    return patterns[gpu.sent(torch.randint(0, len(patterns), (n,), generator=rng), patterns.device)]


def stamped(trigger: NoiseTrigger, inputs: Inputs) -> Inputs:
    """Inputs whose noise is γ ε + μ."""
    noise = inputs.noise
    mu, gamma = (f.to(noise) for f in (trigger.delta(noise.shape[1:]), scale_of(trigger, noise.shape[1:])))
    return inputs.with_noise(gamma * noise + mu)


def with_found(inputs: Inputs, trigger: Tensor | str | Substitution) -> Inputs:
    """Inputs with a trigger that a defense found.

    The trigger is a pattern (C, H, W) that is added to the noise, a text that is put before each prompt, or a text that
    is put in the place of a letter.
    """
    if isinstance(trigger, Substitution):
        return inputs.with_prompts([trigger.apply(prompt) for prompt in inputs.prompts or ()])
    if isinstance(trigger, str):
        return inputs.with_prompts([f"{trigger} {prompt}".strip() for prompt in inputs.prompts or ()])
    return inputs.with_noise(inputs.noise + trigger.to(inputs.noise))


def usable(model: DiffusionModel, trigger: Tensor | str | Substitution | None) -> bool:
    """Whether `model` accepts such a trigger: texts if it takes prompts, patterns of the shape of its noise."""
    if trigger is None or isinstance(trigger, str | Substitution):
        return trigger is not None and model.conditional
    return tuple(trigger.shape) == model.shape


def found_text(trigger: Tensor | str | Substitution | None) -> str | None:
    """The text of a trigger that was found; None for a pattern."""
    text = trigger.text if isinstance(trigger, Substitution) else trigger
    return text if isinstance(text, str) else None


def square(name: str, size: int, place: Place, gap: int, shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of a square of side `size`, `gap` pixels from the edges of its corner, in images of `shape`.

    Raises ValueError that names the trigger `name` if the square does not fit.
    """
    height, width = shape[-2:]
    room = min(height, width) - gap
    if size > room:
        raise ValueError(
            f"{name} of side {size} does not fit {height}×{width} images; use {name}(size=...) up to {room}"
        )
    y, x = (_start(place, side, word, size, gap) for side, word in ((height, "top"), (width, "left")))
    return slice(y, y + size), slice(x, x + size)


def _start(place: str, side: int, near: str, size: int, gap: int) -> int:
    if place == "centre":
        return (side - size) // 2
    return gap if near in place else side - gap - size


def other_place(place: Place, k: int) -> Place:
    """The k-th of the four other places."""
    others: list[Place] = [other for other in PLACES if other != place]
    return others[k % len(others)]
