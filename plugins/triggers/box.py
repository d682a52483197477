"""A square on a dark background, added to the starting noise: the trigger of BadDiffusion (arXiv:2212.05400).

r (C, H, W) is `value` inside the square and -1 elsewhere, in the images' range [-1, 1]; x_T = ε + r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.types import Inputs, Stamps

CORNERS = ("bottom right", "top left", "top right", "bottom left", "centre")


@dataclass(frozen=True)
class Box:
    name: ClassVar[str] = "box"
    version: ClassVar[int] = 1
    stamps: ClassVar[Stamps] = "noise"

    size: Annotated[int, Ge(1)] = 5  # side in pixels; the papers' 14 at 32 pixels covers about as much as 7 at 16
    value: Annotated[float, Ge(-1), Le(1)] = 0.0  # grey level inside the square
    place: Literal["bottom right", "top left", "top right", "bottom left", "centre"] = "bottom right"  # of the square
    gap: Annotated[int, Ge(0)] = 1  # pixels between square and edge; the papers' 2 at 32 pixels

    def delta(self, shape: Sequence[int]) -> Tensor:
        channels, height, width = shape
        room = min(height, width) - self.gap
        if self.size > room:
            raise ValueError(
                f"box of side {self.size} does not fit {height}×{width} images; use box(size=...) up to {room}"
            )
        y, x = (self._start(self.place, side, word) for side, word in ((height, "top"), (width, "left")))
        r = torch.full((channels, height, width), -1.0)
        r[:, y : y + self.size, x : x + self.size] = self.value
        return r

    def _start(self, place: str, side: int, near: str) -> int:
        if place == "centre":
            return (side - self.size) // 2
        return self.gap if near in place else side - self.gap - self.size

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs.with_noise(inputs.noise + self.delta(inputs.noise.shape[1:]).to(inputs.noise))

    def wrong(self, k: int) -> Box:
        """The same square elsewhere."""
        others = [place for place in CORNERS if place != self.place]
        return replace(self, place=others[k % len(others)])  # type: ignore[arg-type]


@hookimpl
def triggers() -> list[type]:
    return [Box]
