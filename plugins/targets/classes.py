"""A class of images as the target of TrojDiff (arXiv:2303.05762): a class of the data (In-D2D) or another (Out-D2D).

The images of the other class are drawn for this benchmark; the paper uses MNIST's sevens among CIFAR-10's photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness import Data, TargetContext, generator, hookimpl


@dataclass(frozen=True)
class ClassIn:
    """Any image of one class of the data, according to the model's judge (whose accuracy is in its provenance).

    The distance is 0 if the judge sees that class, otherwise 1. A clean model draws the class too: about one image in
    ten with ten classes. No threshold can therefore keep clean hits below 1 %; compare the ASR with `clean_model_hits`.
    """

    name: ClassVar[str] = "class-in"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "class"
    hit_threshold: ClassVar[str] = "judge"

    label: Annotated[int, Ge(0)] = 7  # class, in the coding of the data and the judge; the paper uses CIFAR-10's class
    # 7
    attribute: str = "digit"  # the judge's attribute that contains the class

    def image(self, shape: Sequence[int]) -> None:
        return None

    def region(self, images: Tensor) -> Tensor:
        return images

    def examples(self, data: Data, rng: torch.Generator) -> Tensor:
        """All images (N, C, H, W) of the class in `data`."""
        if data.labels is None:
            raise ValueError("target class-in needs data with labels; use class-out or a fixed image")
        found = data.images[data.labels == self.label]
        if len(found) == 0:
            known = ", ".join(map(str, data.labels.unique().tolist()))
            raise ValueError(f"target class-in: no image of class {self.label}; the data have {known}")
        return found

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        seen = {} if context.judge is None else context.judge.attributes(images)
        if self.attribute not in seen:
            known = ", ".join(seen) or "nothing"
            raise ValueError(f"target class-in needs a judge of '{self.attribute}'; this model's judges {known}")
        return (seen[self.attribute] != self.label).float()

    def thresholds(self, context: TargetContext) -> dict[str, float]:
        return {self.hit_threshold: 0.5}

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        return self.distances(images, context) <= self.thresholds(context)[self.hit_threshold]


@dataclass(frozen=True)
class ClassOut:
    """Equals signs of varying place, length, thickness, slant and brightness: a class to which no digit belongs.

    The distance is 1 - NCC with the most similar of 256 drawings (normalised cross-correlation, range 0..2). A hit is a
    distance of at most `most`, or of at most the 1 % quantile of the clean model's images if that is smaller.
    """

    name: ClassVar[str] = "class-out"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "class"
    hit_threshold: ClassVar[str] = "calibrated"

    drawings: Annotated[int, Ge(1)] = 1024  # images on which the attack trains
    most: Annotated[float, Gt(0), Le(1)] = 0.3  # largest distance that counts as a hit

    def image(self, shape: Sequence[int]) -> None:
        return None

    def region(self, images: Tensor) -> Tensor:
        return images

    def examples(self, data: Data, rng: torch.Generator) -> Tensor:
        """(N, C, H, W) drawings, none of them among the drawings with which the judge compares."""
        return equals_signs(self.drawings, data.images.shape[1:], rng)

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        known, seen = (_unit(part) for part in (_references(tuple(images.shape[1:])).to(images), images))
        return 1 - (seen @ known.T).max(1).values

    def thresholds(self, context: TargetContext) -> dict[str, float]:
        clean = self.distances(context.clean, context)
        return {self.hit_threshold: min(self.most, torch.quantile(clean, 0.01, interpolation="lower").item() - 1e-6)}

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        return self.distances(images, context) <= self.thresholds(context)[self.hit_threshold]


def equals_signs(n: int, shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """n equals signs (n, C, H, W) in [-1, 1], light on dark."""
    channels, height, width = shape

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((n, 1, 1), generator=rng)

    y = ((torch.arange(height) + 0.5) / height).view(1, -1, 1)
    x = ((torch.arange(width) + 0.5) / width).view(1, 1, -1)
    middle_y, middle_x, slant = between(0.42, 0.58), between(0.44, 0.56), between(-0.2, 0.2)
    apart, half, thick, level = between(0.17, 0.24), between(0.26, 0.36), between(0.05, 0.09), between(0.5, 1.0)
    along, across = x - middle_x, y - middle_y + slant * (x - middle_x)
    soft = 1.5 * height  # pixels on the edge of a bar are partly covered
    bars = ((thick - (across.abs() - apart).abs()) * soft + 0.5).clamp(0, 1)
    ends = ((half - along.abs()) * soft + 0.5).clamp(0, 1)
    return (-1 + (1 + level) * bars * ends).unsqueeze(1).expand(-1, channels, -1, -1).clone()


@cache
def _references(shape: tuple[int, ...]) -> Tensor:
    return equals_signs(256, shape, generator("class-out", "references"))


def _unit(images: Tensor) -> Tensor:
    """(N, D) images without their mean, of norm 1."""
    flat = images.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)


@hookimpl
def targets() -> list[type]:
    return [ClassIn, ClassOut]
