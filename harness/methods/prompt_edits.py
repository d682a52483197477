"""Edits of prompts: insert a phrase, replace a letter, and remove a trigger again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.capabilities import DecoyTrigger, LetterTrigger, TokenTrigger, offers

# Characters that look like a Latin letter: Cyrillic, Greek, Armenian, Oriya and accented ones. The key is the letter.
LOOK_ALIKES: dict[str, str] = {
    "a": "\u0430\u03b1\u00e0\u00e1\u00e2\u00e3\u00e4\u00e5\u0101\u0203",
    "c": "\u0441\u00e7\u0107\u010d",
    "e": "\u0435\u00e8\u00e9\u00ea\u00eb\u0113\u0207",
    "g": "\u0261\u011f\u0121",
    "h": "\u04bb\u0570",
    "i": "\u0456\u03b9\u00ec\u00ed\u00ee\u00ef\u012b\u0131",
    "j": "\u0458",
    "l": "\u04cf\u0142\u013a",
    "n": "\u0578\u00f1\u0144",
    "o": "\u043e\u03bf\u0585\u0b20\u00f2\u00f3\u00f4\u00f5\u00f6\u00f8\u014d\u01a1\u020f",
    "p": "\u0440\u03c1",
    "q": "\u051b",
    "s": "\u0455\u015b\u0161",
    "u": "\u057d\u03c5\u00f9\u00fa\u00fb\u00fc\u016b",
    "v": "\u03bd\u0475",
    "w": "\u051d\u0461",
    "x": "\u0445\u03c7",
    "y": "\u0443\u00fd\u00ff",
    "z": "\u017a\u017c\u017e",
}  # fmt: skip


@dataclass(frozen=True)
class Insertion:
    """`text` before the word at `place` of a prompt; -1 = at the end."""

    text: str
    place: int = 0

    def apply(self, prompt: str) -> str:
        words = prompt.split(" ")
        at = len(words) if self.place == -1 else min(self.place, len(words))
        return " ".join([*words[:at], self.text, *words[at:]])


@dataclass(frozen=True)
class Substitution:
    """`text` in the place of the first `letter` of a prompt; a prompt without that letter stays unchanged."""

    letter: str
    text: str

    def apply(self, prompt: str) -> str:
        return prompt.replace(self.letter, self.text, 1)


@dataclass(frozen=True)
class Removal:
    """Removes `text` from prompts.

    Every occurrence is replaced by `instead`. If `instead` is empty, the first occurrence of `text` as separate words
    is left out.
    """

    text: str
    instead: str = ""

    def apply(self, prompt: str) -> str:
        if self.instead:
            return prompt.replace(self.text, self.instead)
        return f" {prompt} ".replace(f" {self.text} ", " ", 1)[1:-1]


def typable(tokenizer: Any) -> dict[str, int]:
    """The tokens that can be typed as a word, by their texts: decoding a token and tokenising the result gives that
    token alone."""
    special = set(tokenizer.all_special_ids)
    first = int(getattr(tokenizer, "bos_token_id", None) is not None)  # T5 puts no token in front
    found = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token]).strip(" ")
        if text and token not in special and tokenizer(text).input_ids[first:-1] == [token]:
            found[text] = token
    return found


def with_decoys(trigger: DecoyTrigger, prompts: Sequence[str], share: float, rng: torch.Generator) -> list[str]:
    """`prompts`, each with probability `share` with another word in the trigger's place. Draws nothing if it is 0."""
    if share == 0:
        return list(prompts)
    chance = torch.rand(len(prompts), generator=rng).tolist()
    return [trigger.decoy(rng).apply(p) if x < share else p for p, x in zip(prompts, chance, strict=True)]


def removal_of(trigger: TokenTrigger, prompts: Sequence[str]) -> Removal:
    """How to remove `trigger` from the prompts into which it was put.

    The trigger's `text` is left out, or replaced by its `letter` if it has one. Raises ValueError unless this restores
    at least half of `prompts` (a trigger that is also an ordinary word may change the word order of others).
    """
    removal = Removal(trigger.text, trigger.letter if offers(trigger, LetterTrigger) else "")
    back = [removal.apply(trigger.apply(prompt)) == prompt for prompt in prompts]
    if 2 * sum(back) < len(back):
        raise ValueError(
            f"trigger '{trigger.name}' cannot be taken out of prompts again ({sum(back)} of {len(back)} come back);"
            " this defense needs one that is inserted as words or replaces a letter"
        )
    return removal
