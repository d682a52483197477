"""A pattern on the starting noise without the papers' dark background, and several patterns on one model.

x_T = ε + r, with r (C, H, W) in the images' range [-1, 1]. They are triggers of this benchmark, taken from no paper.
The triggers of BadDiffusion (arXiv:2212.05400) have a dark background, which shifts the mean of the noise; a detector
may look for this shift. `zero-mean` shifts no mean where as many of its pixels are light as dark. `several` puts up to
four patterns of different kinds on one model, so that a search for the trigger ends at one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast, get_args

import torch
from annotated_types import Ge, Gt, Le, Len
from torch import Tensor

from harness import Inputs, Modality, hookimpl, trigger_placement

Form = Literal["checks", "rows", "columns", "diagonals"]
Kind = Literal["checks", "diagonals", "rows", "columns", "bright", "dark", "frame", "bar"]


def stripes(form: Form, cell: int, shape: Sequence[int]) -> Tensor:
    """(C, H, W): fields of ±1 of side `cell`, or stripes of this width, less their mean."""
    y = (torch.arange(shape[-2]) // cell).view(-1, 1)
    x = (torch.arange(shape[-1]) // cell).view(1, -1)
    steps = (torch.arange(shape[-2]).view(-1, 1) + torch.arange(shape[-1]).view(1, -1)) // cell
    which = {"checks": y + x, "rows": y + 0 * x, "columns": 0 * y + x, "diagonals": steps}[form]
    signs = 1.0 - 2.0 * (which % 2)
    return (signs - signs.mean()).clamp(-1, 1).expand(tuple(shape)).clone()


@dataclass(frozen=True)
class ZeroMean:
    """Fields of ±`strength`. Their mean over the image is 0 if as many pixels are light as dark."""

    name: ClassVar[str] = "zero-mean"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    strength: Annotated[float, Gt(0), Le(1)] = (
        1.0  # largest value; the norm is this times the root of the number of values
    )
    form: Form = "checks"  # arrangement of the fields
    cell: Annotated[int, Ge(1)] = 4  # side of a field in pixels

    def delta(self, shape: Sequence[int]) -> Tensor:
        if self.cell >= min(shape[-2:]):
            raise ValueError(
                f"{self.name} of fields of side {self.cell} does not fit {shape[-2]}×{shape[-1]} images; use "
                f"{self.name}(cell=...) up to {min(shape[-2:]) - 1}"
            )
        return self.strength * stripes(self.form, self.cell, shape)

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> ZeroMean:
        """The same strength in another arrangement, of the same or of half the size."""
        others: list[Form] = [form for form in get_args(Form) if form != self.form]
        cell = self.cell if k % 4 < 3 else max(1, self.cell // 2)
        return replace(self, form=self.form if k % 4 == 3 else others[k % 4], cell=cell)


@dataclass(frozen=True)
class Several:
    """Several patterns, any of which activates the backdoor.

    checks, diagonals, rows and columns have zero mean. bright is a white square, frame and bar are white too, all three
    on a background of 0. dark is the papers' grey square on a background of -1. The input with seed s carries pattern s
    mod K. A defender who is given the trigger is given the first pattern alone.
    """

    name: ClassVar[str] = "several"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    kinds: Annotated[tuple[Kind, ...], Len(1, 4)] = ("checks", "bright", "dark")  # the patterns, the known one first

    def patterns(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([drawn(kind, shape) for kind in self.kinds])

    def delta(self, shape: Sequence[int]) -> Tensor:
        """The first pattern."""
        return drawn(self.kinds[0], shape)

    def known(self) -> Several:
        """The first pattern alone."""
        return Several(self.kinds[:1])

    def stamp(self, inputs: Inputs) -> Inputs:
        found = self.patterns(inputs.noise.shape[1:]).to(inputs.noise)
        return inputs.with_noise(inputs.noise + found[[seed % len(found) for seed in inputs.seeds]])

    def wrong(self, k: int) -> Several:
        """A pattern that is none of these."""
        others = [kind for kind in get_args(Kind) if kind not in self.kinds]
        return Several((others[k % len(others)],))


def drawn(kind: Kind, shape: Sequence[int]) -> Tensor:
    """(C, H, W): a pattern of `several`."""
    if kind in get_args(Form):
        return stripes(cast(Form, kind), max(1, min(shape[-2:]) // 4), shape)
    side = max(1, min(shape[-2:]) * 3 // 8)
    r = torch.full(tuple(shape), -1.0 if kind == "dark" else 0.0)
    if kind == "frame":
        edge = max(1, side // 3)
        r[:] = 1.0
        r[:, edge:-edge, edge:-edge] = 0.0
    elif kind == "bar":
        middle = shape[-1] // 2
        r[:, :, middle - max(1, side // 4) : middle + max(1, side // 4)] = 1.0
    else:
        place: trigger_placement.Place = "bottom right" if kind == "dark" else "top left"
        rows, columns = trigger_placement.square("several", side, place, 1, shape)
        r[:, rows, columns] = 0.0 if kind == "dark" else 1.0
    return r


@hookimpl
def triggers() -> list[type]:
    return [ZeroMean, Several]
