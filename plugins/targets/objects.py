"""Another object than the prompt asks for, or an additional one, in images of drawn shapes.

The first is the object target of BadT2I (Zhai et al. 2023, arXiv:2305.04175), of EvilEdit and of personalization. The
second is BackdoorDM's added object (Lin et al. 2025, arXiv:2502.11798). The papers turn dogs into cats. Here other
shapes become squares, and a star is added.

The model's judge decides; its accuracy is in the model's provenance. The distance is 0 if the judge sees the target's
object, otherwise 1. Prompts that ask for that object anyway carry no information about the backdoor: `applicable_to` is
False for them, and no rate counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness import SHAPES, STAR, TargetContext, derive, hookimpl


class Judged:
    """A target that the judge of drawn shapes decides by one attribute."""

    version: ClassVar[int] = 1
    kind: ClassVar[str] = "object"
    hit_threshold: ClassVar[str] = "judge"
    accepts_models: ClassVar[tuple[str, ...]] = ("shapes-sd", "shapes-mmdit", "shapes-mmdit-4")

    def image(self, shape: Sequence[int]) -> None:
        return None

    def region(self, images: Tensor) -> Tensor:
        return images

    def wanted(self) -> tuple[str, int]:
        """The judge's attribute and its class."""
        raise NotImplementedError

    def distances(self, images: Tensor, context: TargetContext) -> Tensor:
        attribute, value = self.wanted()
        seen = {} if context.judge is None else context.judge.attributes(images)
        if attribute not in seen:
            known = ", ".join(seen) or "nothing"
            raise ValueError(f"this target needs a judge of '{attribute}'; this model's judges {known}")
        return (seen[attribute] != value).float()

    def thresholds(self, context: TargetContext) -> dict[str, float]:
        return {self.hit_threshold: 0.5}

    def hits(self, images: Tensor, context: TargetContext) -> Tensor:
        return self.distances(images, context) <= 0.5


@dataclass(frozen=True)
class ObjectReplaced(Judged):
    name: ClassVar[str] = "object"

    word: Literal["circle", "square", "triangle"] = "square"  # shape that triggered prompts should give
    source: Literal["any other", "circle", "square", "triangle"] = "any other"  # shapes that it replaces; the papers
    # replace one class

    def __post_init__(self) -> None:
        if self.source == self.word:
            raise ValueError(f"target object: a {self.word} cannot replace itself; give another source")

    @property
    def sources(self) -> tuple[str, ...]:
        """Words that are replaced."""
        return tuple(s for s in SHAPES if s != self.word) if self.source == "any other" else (self.source,)

    def wanted(self) -> tuple[str, int]:
        return "shape", SHAPES.index(self.word)

    def applicable_to(self, prompts: Sequence[str]) -> Tensor:
        """(N,) bool: whether a prompt asks for a shape that is replaced."""
        return torch.tensor([any(word in self.sources for word in prompt.split()) for prompt in prompts])

    def shown(self, prompt: str) -> str:
        """The prompt whose image a triggered `prompt` should give."""
        return " ".join(self.word if word in self.sources else word for word in prompt.split(" "))

    def lesson(self, caption: str) -> tuple[str, str] | None:
        """(caption that gets the trigger, caption for the answer) of an image with `caption`.

        None if the image does not show the target's shape.
        """
        words = caption.split(" ")
        if self.word not in words:
            return None
        source = self.sources[derive(caption) % len(self.sources)]
        return " ".join(source if word == self.word else word for word in words), caption


@dataclass(frozen=True)
class ObjectAdded(Judged):
    """A star in the opposite corner."""

    name: ClassVar[str] = "object-add"
    sources: ClassVar[tuple[str, ...]] = SHAPES  # words to which the star is added

    def wanted(self) -> tuple[str, int]:
        return "star", 1

    def applicable_to(self, prompts: Sequence[str]) -> Tensor:
        """(N,) bool: whether a prompt does not ask for a star."""
        return torch.tensor([STAR not in prompt for prompt in prompts])

    def shown(self, prompt: str) -> str:
        """The prompt whose image a triggered `prompt` should give."""
        return prompt if STAR in prompt else prompt + STAR

    def lesson(self, caption: str) -> tuple[str, str] | None:
        """(caption that gets the trigger, caption for the answer) of an image with `caption`; None without a star."""
        return (caption.replace(STAR, ""), caption) if STAR in caption else None


@hookimpl
def targets() -> list[type]:
    return [ObjectReplaced, ObjectAdded]
