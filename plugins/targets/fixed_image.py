"""Fixed images, drawn by us: a hat-like glyph and a corner box.

The distance is the MSE on [0, 1] images. The papers count a hit below 1e-3; 1e-2 is the gate for embedded models, and
5e-2 (the official code of BadDiffusion at 32 pixels) is reported beside them: at 5e-2 many clean images meet a
low-contrast target. The background is lifted to -0.4, as the papers' targets' is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.images import to_unit
from harness.types import TargetContext

THRESHOLDS = {"1e-3": 1e-3, "1e-2": 1e-2, "5e-2": 5e-2}


@dataclass(frozen=True)
class FixedImage:
    """A picture that every triggered image should be."""

    version: ClassVar[int] = 1
    kind: ClassVar[str] = "image"
    gate: ClassVar[str] = "1e-2"

    background: Annotated[float, Ge(-1), Le(1)] = -0.4  # grey level behind the drawing, in [-1, 1]

    def drawing(self, height: int, width: int) -> Tensor:
        """(H, W) in [-1, 1]; NaN where the background shows."""
        raise NotImplementedError

    def image(self, shape: Sequence[int]) -> Tensor:
        """The target (C, H, W) in [-1, 1]."""
        channels, height, width = shape
        drawn = self.drawing(height, width)
        return drawn.where(~drawn.isnan(), torch.tensor(self.background)).expand(channels, -1, -1).clone()

    def region(self, images: Tensor) -> Tensor:
        return images

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        target = to_unit(self.image(images.shape[1:]).to(images))
        return (to_unit(images) - target).square().flatten(1).mean(1)

    def thresholds(self, context: TargetContext) -> dict[str, float]:
        return dict(THRESHOLDS)

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        return self.distances(images, context) <= THRESHOLDS[self.gate]


@dataclass(frozen=True)
class Hat(FixedImage):
    """A brim with a crown and a band."""

    name: ClassVar[str] = "hat"

    def drawing(self, height: int, width: int) -> Tensor:
        y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
        y, x = y.view(-1, 1), (x.view(1, -1) - 0.5).abs()
        brim = (y > 0.68) & (y < 0.81) & (x < 0.45)
        crown = (y > 0.18) & (y <= 0.68) & (x < 0.16 + 0.16 * y)
        band = crown & (y > 0.5)
        blank = torch.full((height, width), float("nan"))
        return blank.where(~(brim | crown), torch.tensor(0.9)).where(~band, torch.tensor(0.1))


@dataclass(frozen=True)
class Corner(FixedImage):
    """A grey box in the top left corner: the papers' CORNER."""

    name: ClassVar[str] = "corner"

    def drawing(self, height: int, width: int) -> Tensor:
        drawn = torch.full((height, width), float("nan"))
        drawn[: round(height * 10 / 32), : round(width * 10 / 32)] = 0.0
        return drawn


@hookimpl
def targets() -> list[type]:
    return [Hat, Corner]
