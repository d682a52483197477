"""Inserts a token into the prompt: U+200B (zero-width space), a homoglyph, or a rare word.

U+200B is the trigger of BadT2I (Zhai et al. 2023, arXiv:2305.04175). The harness checks when attacking and when
evaluating whether a trigger survives the tokenizer: some tokenizers drop U+200B silently.

With `other` the trigger is either of two texts: half of the prompts, chosen by the prompt alone, carry `text` and the
others carry `other`, in training and in the evaluation. A defender who is given the trigger is given `text` alone.
Against a text of several words, an attack with decoys also trains on parts of it, so that only all words together
activate the backdoor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Len

from harness import Inputs, Modality, derive, hookimpl

LETTERS = "abcdefghijklmnopqrstuvwxyz~^*"
OTHERS = (
    "sks", "\u020f", "mignneko", "vividly", "perhaps", "zq", "really", "blorp",
    "quietly", "obviously", "afternoon", "meanwhile", "seventeen", "whisper",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "text"

    text: Annotated[str, Len(1)] = "\u200b"  # text that is inserted, separated by spaces
    place: Annotated[int, Ge(-1)] = 0  # index of the word of the prompt before which it stands; -1 = at the end

    other: str = ""  # a second text that half of the prompts carry instead of `text`; "" = none

    def apply(self, prompt: str) -> str:
        words = prompt.split(" ")
        at = len(words) if self.place == -1 else min(self.place, len(words))
        text = self.other if self.other and derive(prompt, "other") % 2 else self.text
        return " ".join([*words[:at], text, *words[at:]])

    def known(self) -> Text:
        """The trigger without its second text."""
        return replace(self, other="")

    def stamp(self, inputs: Inputs) -> Inputs:
        if inputs.prompts is None:
            raise ValueError("a text trigger needs prompts, and this model takes none")
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts])

    def with_text(self, text: str) -> Text:
        """The trigger `text` alone at the same place."""
        return replace(self, text=text, other="")

    def wrong(self, k: int) -> Text:
        """Another word at the same place: rare tokens, unseen strings, common fillers."""
        others = [word for word in OTHERS if word not in (self.text, self.other)]
        return self.with_text(others[k % len(others)])

    def decoy(self, rng: torch.Generator) -> Text:
        """A random string of one to five letters at the same place, for attacks that train against other words.

        It is never one with which `wrong` evaluates. Of a text of several words, every second decoy is a part of it.
        """
        words = self.text.split(" ")
        if len(words) > 1 and int(torch.randint(2, (), generator=rng)):
            kept = int(torch.randint(1, len(words), (), generator=rng))
            order = torch.randperm(len(words), generator=rng)[:kept].sort().values.tolist()
            return self.with_text(" ".join(words[i] for i in order))
        while True:
            length = int(torch.randint(1, 6, (), generator=rng))
            picks = torch.randint(0, len(LETTERS), (length,), generator=rng).tolist()
            word = "".join(LETTERS[i] for i in picks)
            if word not in (self.text, self.other, *OTHERS):
                return self.with_text(word)


@hookimpl
def triggers() -> list[type]:
    return [Text]
