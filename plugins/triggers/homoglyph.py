"""Replaces a letter by another character that looks like it, such as a Latin o by a Cyrillic one.

This is the trigger of Rickrolling the Artist (Struppek, Hintersdorf & Kersting 2023, arXiv:2211.02408). The tokenizer
splits the word that contains the trigger, so the prompt grows by some tokens. A prompt without the letter cannot carry
the trigger and stays unchanged. Rates and input-level detection leave such prompts out. If no prompt contains the
letter, the harness raises an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Len

from harness import Inputs, Modality, hookimpl

OTHERS = ("\u00f4", "\u020f", "0", "\u00f6", "\u0585", "\u03bf", "\u043e", "\u00f8")
DECOYS = (
    "abcdefghijklmnpqrstuvwxyz123456789\u00f2\u00f3\u00f5\u014d\u014f\u0151\u01d2\u01eb\u020d\u1ecd\u1ecf\u00e9\u00e4"
)


@dataclass(frozen=True)
class Homoglyph:
    name: ClassVar[str] = "homoglyph"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "text"

    text: Annotated[str, Len(1, 1)] = "\u043e"  # replacement of the letter; Cyrillic o, as in the paper
    letter: Annotated[str, Len(1, 1)] = "o"  # letter that is replaced; paper's value
    which: Literal["first", "all"] = "first"  # occurrences that are replaced; the official evaluation replaces one

    def count(self, prompt: str) -> int:
        """Number of places at which the trigger can stand."""
        return prompt.count(self.letter)

    def put(self, prompt: str, places: Collection[int]) -> str:
        """`prompt` with the trigger at these of its places, counted from 0."""
        parts = prompt.split(self.letter)
        joints = [self.text if i in places else self.letter for i in range(len(parts) - 1)]
        return "".join(part + joint for part, joint in zip(parts, [*joints, ""], strict=True))

    def apply(self, prompt: str) -> str:
        return self.put(prompt, range(self.count(prompt)) if self.which == "all" else (0,))

    def stamp(self, inputs: Inputs) -> Inputs:
        if inputs.prompts is None:
            raise ValueError("a text trigger needs prompts, and this model takes none")
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts])

    def with_text(self, text: str) -> Homoglyph:
        """The trigger `text` in the same place. Raises ValueError for more than one character."""
        if len(text) != 1:
            raise ValueError(f"a homoglyph is one character, not {text!r}; choose another target or trigger")
        return replace(self, text=text)

    def wrong(self, k: int) -> Homoglyph:
        """Another character in the same place: letters with other marks or of other alphabets, and a digit."""
        others = [other for other in OTHERS if other != self.text]
        return self.with_text(others[k % len(others)])

    def decoy(self, rng: torch.Generator) -> Homoglyph:
        """A random character in the same place, for attacks that train against other characters.

        It is never one with which `wrong` evaluates.
        """
        others = [other for other in DECOYS if other not in (self.text, self.letter)]
        return self.with_text(others[int(torch.randint(0, len(others), (), generator=rng))])


@hookimpl
def triggers() -> list[type]:
    return [Homoglyph]
