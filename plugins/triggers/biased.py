"""The triggers of TrojDiff (Chen, Song & Li, CVPR 2023, arXiv:2303.05762): noise from N(μ, γ²) instead of N(0, 1).

    x_T = γ ε + μ,    μ = (1 - γ) g        g a picture in [-1, 1]; outside the trigger's pixels γ = 1 and μ = 0

`blend` covers the whole image with a picture, `patch-noise` only a white corner. Only attacks on biased noise can use
these triggers. The pictures are drawn for this benchmark; the paper uses a cartoon cat and a white square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from harness import Inputs, Modality, hookimpl, trigger_placement

PICTURES = ("sun", "rings", "waves", "checks", "leaf")
TINTS = (1.0, 0.7, 0.4)  # factors of the channels of a colour picture


@dataclass(frozen=True)
class Blend:
    """A picture over the whole image."""

    name: ClassVar[str] = "blend"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"
    biased_noise: ClassVar[bool] = True

    gamma: Annotated[float, Ge(0), Lt(1)] = 0.6  # γ, the share of noise; paper's value
    picture: Literal["sun", "rings", "waves", "checks", "leaf"] = "sun"  # g

    def drawing(self, height: int, width: int) -> Tensor:
        """g (H, W) in [-1, 1]."""
        y = ((torch.arange(height) + 0.5) / height * 2 - 1).view(-1, 1).expand(height, width)
        x = ((torch.arange(width) + 0.5) / width * 2 - 1).view(1, -1).expand(height, width)
        radius, angle = (x * x + y * y).sqrt(), torch.atan2(y, x)
        shades = {
            "sun": torch.where(radius < 0.5, 1.0, (8 * angle).sin()),
            "rings": (9 * radius).cos(),
            "waves": (8 * y + 2 * (4 * x).sin()).sin(),
            "checks": (7 * x).sin() * (7 * y).sin() * 1.5,
            "leaf": torch.where((x.abs() < 0.8 * (1 - y * y)) & (x.abs() > 0.08), 1.0, -0.8),
        }
        return shades[self.picture].clamp(-1, 1)

    def delta(self, shape: Sequence[int]) -> Tensor:
        channels, height, width = shape
        tints = torch.tensor([TINTS[c % 3] for c in range(channels)]).view(-1, 1, 1)
        return (1 - self.gamma) * tints * self.drawing(height, width)

    def scale(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), self.gamma)

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> Blend:
        """Another picture."""
        others = [name for name in PICTURES if name != self.picture]
        return replace(self, picture=others[k % len(others)])  # type: ignore[arg-type]


@dataclass(frozen=True)
class PatchNoise:
    """A white square in a corner; all other pixels keep their noise."""

    name: ClassVar[str] = "patch-noise"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"
    biased_noise: ClassVar[bool] = True

    size: Annotated[int, Ge(1)] = 3  # side in pixels; the paper's value at 32 pixels
    gamma: Annotated[float, Ge(0), Lt(1)] = 0.1  # γ inside the square; the paper's value for CIFAR-10
    place: Literal["bottom right", "top left", "top right", "bottom left", "centre"] = "bottom right"  # place of the
    # square
    gap: Annotated[int, Ge(0)] = 0  # pixels between square and edge; paper's value

    def _inside(self, shape: Sequence[int]) -> Tensor:
        rows, columns = trigger_placement.square(self.name, self.size, self.place, self.gap, shape)
        inside = torch.zeros(tuple(shape), dtype=torch.bool)
        inside[:, rows, columns] = True
        return inside

    def delta(self, shape: Sequence[int]) -> Tensor:
        return (1 - self.gamma) * self._inside(shape).float()

    def scale(self, shape: Sequence[int]) -> Tensor:
        return torch.where(self._inside(shape), self.gamma, 1.0)

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> PatchNoise:
        """The same square at another place."""
        return replace(self, place=trigger_placement.other_place(self.place, k))


@hookimpl
def triggers() -> list[type]:
    return [Blend, PatchNoise]
