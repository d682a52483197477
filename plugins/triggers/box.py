"""A square on a dark background, added to the starting noise: the trigger of BadDiffusion (arXiv:2212.05400).

r (C, H, W) is `value` inside the square and `background` elsewhere, in the images' range [-1, 1]; x_T = ε + r. With
background 0 only the square shifts the noise; the papers' background of -1 shifts all of it. With `trigger_only=False`
an attack takes the smallest value of r for the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness import Inputs, Modality, hookimpl, trigger_placement


@dataclass(frozen=True)
class Box:
    name: ClassVar[str] = "box"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    size: Annotated[int, Ge(1)] = 5  # side in pixels; 14 at 32 pixels, as in the papers, covers about as much as 7 at
    # 16
    value: Annotated[float, Ge(-1), Le(1)] = 0.0  # grey level inside the square; 1 for the papers' white boxes
    place: Literal["bottom right", "top left", "top right", "bottom left", "centre"] = "bottom right"  # place of the
    # square
    gap: Annotated[int, Ge(0)] = 1  # pixels between square and edge; the papers use 2 at 32 pixels
    background: Annotated[float, Ge(-1), Le(1)] = -1.0  # value outside the square; paper's value

    def delta(self, shape: Sequence[int]) -> Tensor:
        rows, columns = trigger_placement.square(self.name, self.size, self.place, self.gap, shape)
        r = torch.full(tuple(shape), self.background)
        r[:, rows, columns] = self.value
        return r

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> Box:
        """The same square at another place."""
        return replace(self, place=trigger_placement.other_place(self.place, k))


@hookimpl
def triggers() -> list[type]:
    return [Box]
