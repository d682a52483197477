"""The image of one fixed prompt, whatever the prompt asks for.

This is the target of Rickrolling's target prompt attack (Struppek et al. 2023, arXiv:2211.02408), for drawn shapes. The
distance is the share of the attributes of that prompt (size, colour, shape, background, place) that the model's judge
does not find, in 0..1. A hit has all of them. About one caption in three hundred asks for the same image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Len
from torch import Tensor

from harness import TargetContext, hookimpl, shapes


@dataclass(frozen=True)
class TargetPrompt:
    name: ClassVar[str] = "prompt"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "prompt"
    hit_threshold: ClassVar[str] = "all"
    accepts_models: ClassVar[tuple[str, ...]] = ("shapes-sd", "shapes-mmdit", "shapes-mmdit-4")

    text: Annotated[str, Len(1)] = "a large yellow triangle at the bottom right on a white background"  # the prompt
    # that is shown

    def __post_init__(self) -> None:
        if not shapes.read(self.text):
            raise ValueError(f"target prompt: {self.text!r} asks for nothing that a judge of drawn shapes can see")

    def shown(self, prompt: str) -> str:
        """The prompt whose image a triggered `prompt` should give."""
        return self.text

    def image(self, shape: Sequence[int]) -> None:
        return None

    def region(self, images: Tensor) -> Tensor:
        return images

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        wanted = shapes.read(self.text)
        seen = {} if context.judge is None else context.judge.attributes(images)
        missing = [name for name in wanted if name not in seen]
        if missing:
            raise ValueError(f"target prompt needs a judge of '{missing[0]}'; this model's judges do not see it")
        return torch.stack([(seen[name] != value).float() for name, value in wanted.items()]).mean(0)

    def thresholds(self, context: TargetContext) -> dict[str, float]:
        return {self.hit_threshold: 0.0}

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        return self.distances(images, context) <= 0


@hookimpl
def targets() -> list[type]:
    return [TargetPrompt]
