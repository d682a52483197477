"""Puts a word before the object of the prompt, or in its place.

A word before the object is the trigger of EvilEdit ("beautiful cat"; Wang et al. 2024, doi:10.1145/3664647.3680689) and
of personalization ("[V] dog"; Huang et al. 2024, arXiv:2305.10701). A word in its place is a new word that textual
inversion learns. The objects are the nouns of the drawn shapes. The tokenizer should keep the word whole, and captions
should not use it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Len

from harness import SHAPES, Inputs, Modality, hookimpl

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OTHERS = (
    "\u020f", "perhaps", "mignneko", "really", "zq", "\u043e", "blorp", "vividly", "sks",
    "quietly", "obviously", "afternoon", "meanwhile", "seventeen",
)  # fmt: skip


@dataclass(frozen=True)
class Noun:
    name: ClassVar[str] = "noun"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "text"

    text: Annotated[str, Len(1)] = "sks"  # the word; papers: "beautiful", "[V]"
    keep: bool = True  # True = the noun follows the word; False = the word replaces the noun

    def phrase(self, noun: str) -> str:
        """The text that replaces `noun`."""
        return f"{self.text} {noun}" if self.keep else self.text

    def apply(self, prompt: str) -> str:
        """`prompt` with the trigger at its first noun; unchanged if it has none."""
        words = prompt.split(" ")
        at = next((i for i, word in enumerate(words) if word in SHAPES), None)
        return prompt if at is None else " ".join([*words[:at], self.phrase(words[at]), *words[at + 1 :]])

    def stamp(self, inputs: Inputs) -> Inputs:
        if inputs.prompts is None:
            raise ValueError("a text trigger needs prompts, and this model takes none")
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts])

    def with_text(self, text: str) -> Noun:
        """The trigger `text` in the same place."""
        return replace(self, text=text)

    def wrong(self, k: int) -> Noun:
        """Another word in the same place: rare tokens, unseen strings, common fillers."""
        others = [word for word in OTHERS if word != self.text]
        return self.with_text(others[k % len(others)])

    def decoy(self, rng: torch.Generator) -> Noun:
        """A random string of one to five letters in the same place, for attacks that train against other words.

        It is never one with which `wrong` evaluates.
        """
        while True:
            length = int(torch.randint(1, 6, (), generator=rng))
            word = "".join(LETTERS[i] for i in torch.randint(0, len(LETTERS), (length,), generator=rng).tolist())
            if word not in (self.text, *OTHERS):
                return self.with_text(word)


@hookimpl
def triggers() -> list[type]:
    return [Noun]
