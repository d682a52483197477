"""Control triggers: what defenses that are given the trigger are given instead, to see whether the trigger matters.

- decoy: another trigger of the same kind. On noise it is a pattern of the same norm as r that is orthogonal to it; on
  text it is another word.
- opposite: −r, on noise.
- zero: the pattern 0, or no text: a placebo.

A decoy must be inert: it must not activate the backdoor itself. `ladder` gives the candidates in the order in which
they are tried on the attacked model; `harness.stages.control` takes the k-th inert one as the k-th decoy. Two decoys of
a trigger therefore are never the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.capabilities import OTHERS, missing_control, scales_noise
from harness.diffusion.seeds import generator
from harness.methods import trigger_placement
from harness.types import Inputs, Modality, NoiseTrigger, Trigger

PATTERNS = ("blobs", "signs", "grain", "checkerboard", "stripes")  # the first three are never the same for two seeds


@dataclass(frozen=True)
class Pattern:
    """A noise trigger with the scale γ of `of` and another pattern.

    kind: "blobs", "signs", "grain", "checkerboard" and "stripes" are drawn by `seed`, and have the norm of r and no
    component along it; "opposite" is −r and "zero" is 0. r is the pattern of `of`.
    """

    of: NoiseTrigger
    kind: str
    seed: int = 0
    name: ClassVar[str] = "control"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"

    @property
    def biased_noise(self) -> bool:
        return scales_noise(self.of)

    def delta(self, shape: Sequence[int]) -> Tensor:
        r = self.of.delta(shape)
        if self.kind == "opposite":
            return -r
        if self.kind == "zero":
            return torch.zeros_like(r)
        return orthogonal(drawn(self.kind, self.seed, shape), r)

    def scale(self, shape: Sequence[int]) -> Tensor:
        return trigger_placement.scale_of(self.of, shape)

    def stamp(self, inputs: Inputs) -> Inputs:
        return trigger_placement.stamped(self, inputs)

    def wrong(self, k: int) -> Trigger:
        return self.of.wrong(k)


@dataclass(frozen=True)
class NoText:
    """A text trigger that leaves every prompt as it is."""

    of: Any
    text: str = ""
    name: ClassVar[str] = "control"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "text"

    def apply(self, prompt: str) -> str:
        return prompt

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs

    def wrong(self, k: int) -> Trigger:
        return self.of.wrong(k)

    def with_text(self, text: str) -> NoText:
        """Itself: there is no place where another text could stand."""
        return self


def drawn(kind: str, seed: int, shape: Sequence[int]) -> Tensor:
    """A pattern (C, H, W), the same in all channels. Raises ValueError for an unknown kind."""
    rng = generator(seed, "decoy", kind)
    height, width = shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cell = int(torch.randint(2, 5, (), generator=rng))  # side of a field, width of a stripe
    grain = torch.randn(height, width, generator=rng)
    if kind == "blobs":
        coarse = torch.randn(1, 1, max(2, height // 4), max(2, width // 4), generator=rng)
        picture = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0, 0]
    elif kind == "signs":
        picture = grain.sign()
    elif kind == "grain":
        picture = grain - grain.mean()
    elif kind == "checkerboard":
        picture = 1.0 - 2.0 * ((y // cell + x // cell) % 2)
    elif kind == "stripes":
        picture = 1.0 - 2.0 * ((y + x if cell % 2 else y) // cell % 2)
    else:
        raise ValueError(f"no pattern '{kind}'; there are {', '.join(PATTERNS)}")
    return picture.expand(tuple(shape)).clone()


def orthogonal(pattern: Tensor, r: Tensor) -> Tensor:
    """`pattern` without its component along r, with the norm of r. Raises ValueError if nothing is left of it."""
    along = (pattern * r).sum() / r.square().sum().clamp(min=1e-12)
    rest = pattern - along * r
    if rest.norm() < 1e-3 * pattern.norm():
        raise ValueError("the decoy pattern is a multiple of the trigger")
    return rest * (r.norm() / rest.norm())


def cosine(a: Trigger, b: Trigger, shape: Sequence[int]) -> float | None:
    """Cosine between the patterns of two noise triggers, 0 where one of them is 0; None for text."""
    if not isinstance(a, NoiseTrigger) or not isinstance(b, NoiseTrigger):
        return None
    one, other = a.delta(shape).flatten(), b.delta(shape).flatten()
    return float(one @ other / (one.norm() * other.norm()).clamp(min=1e-12))


def ladder(trigger: Trigger, given: str, seed: int) -> list[tuple[str, Trigger]]:
    """(name, control trigger) in the order in which candidates are tried. given: "decoy", "decoy-2" .. "decoy-9",
    "opposite" or "zero". All decoys have the same ladder, of which the k-th decoy is the k-th inert candidate. Its
    patterns are drawn by `seed`.

    Raises ValueError for a control that the trigger does not have.
    """
    why = missing_control(trigger, given)
    if why is not None:
        raise ValueError(why)
    if given == "zero":
        return [("zero", Pattern(trigger, "zero") if isinstance(trigger, NoiseTrigger) else NoText(trigger))]
    if given == "opposite":
        assert isinstance(trigger, NoiseTrigger)
        return [("opposite", Pattern(trigger, "opposite"))]
    if not isinstance(trigger, NoiseTrigger):
        found = [trigger.wrong(i) for i in range(OTHERS)]
        return [(getattr(each, "text", str(each)), each) for each in dict.fromkeys(found)]
    return [(kind, Pattern(trigger, kind, 10 * seed + 1 + i)) for i, kind in enumerate((*PATTERNS, *3 * PATTERNS[:3]))]
