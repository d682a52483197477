"""Drawn triggers on a dark background, added to the starting noise: a stop sign and a pair of glasses.

They are the triggers of BadDiffusion (arXiv:2212.05400) and VillanDiffusion (arXiv:2306.06874), drawn for this
benchmark. r (C, H, W) is the drawing, and -1 elsewhere, in the images' range [-1, 1]; x_T = ε + r. In grey images a
colour is replaced by the mean of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness import Inputs, Modality, hookimpl, trigger_placement

WHITE, RED = (0.9, 0.9, 0.9), (0.7, -0.8, -0.8)
BACKGROUND = -1.0
OFFSETS = (0.0, -0.25, 0.25, -0.125, 0.125)  # offsets of the glasses from the middle, as a share of the height


@dataclass(frozen=True)
class StopSign:
    """A red octagon with a white rim and a white bar for its letters."""

    name: ClassVar[str] = "stop-sign"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    size: Annotated[int, Ge(4)] = 7  # side in pixels; the papers use 14 at 32 pixels
    place: Literal["bottom right", "top left", "top right", "bottom left", "centre"] = "bottom right"  # place of the
    # sign
    gap: Annotated[int, Ge(0)] = 1  # pixels between sign and edge; the papers use 2 at 32 pixels

    def delta(self, shape: Sequence[int]) -> Tensor:
        rows, columns = trigger_placement.square(self.name, self.size, self.place, self.gap, shape)
        side = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = side.abs().view(-1, 1), side.abs().view(1, -1)
        out = torch.maximum(torch.maximum(y, x), (y + x) / 2**0.5)  # 1 on the octagon's edge
        sign = out <= 1
        white = sign & ((out > 0.8) | ((y < 0.2) & (x < 0.55)))
        r = torch.full(tuple(shape), BACKGROUND)
        r[:, rows, columns] = _painted(shape[0], {RED: sign, WHITE: white})
        return r

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> StopSign:
        """The same sign at another place."""
        return replace(self, place=trigger_placement.other_place(self.place, k))


@dataclass(frozen=True)
class Glasses:
    """A pair of white rims with a bridge, in the middle."""

    name: ClassVar[str] = "glasses"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    share: Annotated[float, Gt(0), Le(1)] = 0.75  # width over the width of the image; the papers use 0.625 of 256
    # pixels
    offset: Annotated[float, Ge(-0.25), Le(0.25)] = 0.0  # offset from the middle downwards, as a share of the height

    def delta(self, shape: Sequence[int]) -> Tensor:
        channels, height, width = shape
        if self.share * min(height, width) < 8:
            raise ValueError(
                f"glasses {self.share:g} of the image wide have no rims in {height}×{width} images; use share=1 or "
                "images of 8 pixels and more"
            )
        y = ((torch.arange(height) + 0.5) / height - 0.5 - self.offset).view(-1, 1) * height / width / self.share
        x = ((torch.arange(width) + 0.5) / width - 0.5).view(1, -1) / self.share  # in [-0.5, 0.5] across the glasses
        off = ((x.abs() - 0.28).square() + y.square()).sqrt()
        thick = max(0.05, 0.6 / (self.share * width))
        rims = (off - 0.18).abs() <= thick
        bridge = (x.abs() < 0.1) & (y.abs() <= thick)
        return torch.full(tuple(shape), BACKGROUND).where(~(rims | bridge), _painted(channels, {WHITE: rims | bridge}))

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> Glasses:
        """The same glasses, higher or lower."""
        others = [offset for offset in OFFSETS if offset != self.offset]
        return replace(self, offset=others[k % len(others)])


def _painted(channels: int, layers: dict[tuple[float, float, float], Tensor]) -> Tensor:
    """(C, H, W): each colour where its mask (H, W) is set, later ones over earlier ones, the background elsewhere."""
    picture = torch.full((channels, *next(iter(layers.values())).shape), BACKGROUND)
    for rgb, mask in layers.items():
        colour = torch.tensor(rgb) if channels == 3 else torch.tensor(rgb).mean().repeat(channels)
        picture = picture.where(~mask, colour.view(-1, 1, 1))
    return picture


@hookimpl
def triggers() -> list[type]:
    return [StopSign, Glasses]
