"""Changes every prompt a little before the model reads it, so that a trigger may no longer be a trigger.

Textual perturbation. Chew, Lu, Lin & Lee, "Defending Text-to-image Diffusion Models: Surprising Efficacy of Textual
Perturbations Against Backdoor Attacks", ECCV 2024 workshops, arXiv:2408.15721. No weights change, and nothing is
detected.

    homoglyph   characters that look like a Latin letter become that letter (with `invisible`, characters of Unicode
                category Cf, such as U+200B, are removed too)
    char        in a share of the words one letter is left out, or replaced by a neighbour on the keyboard
    word        a share of the words is replaced by another word of the same meaning

The defense needs nothing. It returns a sampler that wraps the sampler of the cell. The change depends only on the
prompt and the image's seed. Clean prompts are changed as well; the clean scores show the cost.

Differs from the paper: the paper takes synonyms from neighbours in word vectors (textattack) and also translates to
Spanish. Here synonyms come from a small table, of which those count that the model's tokenizer keeps whole; other words
stay unchanged. A model of few words does not know the synonyms that its tokenizer splits: the one of shapes-sd knows
"large" and no "big".
Shares are those of the released code (oscarchew/t2i-backdoor-defense at ad90537, known from notes, not read). The
released code leaves stop words ("a", "the", "of") unchanged in the modes char and word; here any word may change, so
clean prompts suffer more. Keyboard neighbours are those of one row here. The released table of look-alikes has the
digits 0 and 1 and no accented letters; the table here has accented letters and no digits, so accented look-alikes are
turned back only here. `invisible` is not in the paper.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from harness import (
    LOOK_ALIKES,
    AroundAnother,
    Defended,
    Fraction,
    Inputs,
    Knowledge,
    OnChangedPrompts,
    generator,
    hookimpl,
)

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # rows of a keyboard
NEIGHBOURS = {letter: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in ROWS for i, letter in enumerate(row)}
LETTER = {other: letter for letter, others in LOOK_ALIKES.items() for other in others}
SYNONYMS = (
    ("photo", "picture", "image", "drawing"), ("surely", "indeed", "truly"), ("perhaps", "maybe"), ("really", "quite"),
    ("simply", "just"), ("now", "today"), ("large", "big"), ("small", "little"), ("gray", "grey"),
    ("background", "scene"),
)  # fmt: skip
SAME = {word: [other for other in group if other != word] for group in SYNONYMS for word in group}


@dataclass(frozen=True)
class PromptMap:
    """A rule that changes prompts."""

    mode: Literal["homoglyph", "char", "word"] = "homoglyph"  # what is changed
    char_share: Fraction = 1.0  # share of the words that are changed in mode char; released value
    word_share: Fraction = 0.5  # share of the words that are replaced, if they have synonyms that the model knows, in
    # mode word; released value
    invisible: bool = False  # mode homoglyph also removes invisible characters; not in the paper

    def mapped(self, prompt: str, rng: torch.Generator, known: Callable[[str], bool]) -> str:
        """The changed prompt. known: whether the model knows a word, which mode word asks of a synonym."""
        if self.mode == "homoglyph":
            return self.normalised(prompt)
        words, by_letter = prompt.split(" "), self.mode == "char"
        share = self.char_share if by_letter else self.word_share
        chosen = (torch.rand(len(words), generator=rng) < share).tolist()
        pairs = zip(words, chosen, strict=True)
        return " ".join((typo(w, rng) if by_letter else synonym(w, rng, known)) if yes else w for w, yes in pairs)

    def normalised(self, prompt: str) -> str:
        seen = [c for c in prompt if not (self.invisible and unicodedata.category(c) == "Cf")]
        plain = "".join(LETTER.get(c, c) for c in seen)
        return " ".join(plain.split()) if self.invisible else plain


@dataclass(frozen=True)
class TextualPerturbation(PromptMap):
    name: ClassVar[str] = "textual-perturbation"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("sampler",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        return Defended(sampler=PerturbedPrompts(**vars(self)))


@dataclass(frozen=True)
class PerturbedPrompts(AroundAnother, PromptMap):
    """Changes prompts before the cell's sampler (before ddim if it is used alone); see the defense
    textual-perturbation.
    """

    name: ClassVar[str] = "perturbed-prompts"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    def around(self, inner: Any) -> OnChangedPrompts:
        return OnChangedPrompts(inner, self.changed, self.name)

    def changed(self, model: Any, inputs: Inputs) -> list[str]:
        pairs, known = zip(inputs.prompts or (), inputs.seeds, strict=True), partial(whole, model.tokenizer)
        return [fitting(model, self.mapped(prompt, generator(seed, "prompt"), known)) for prompt, seed in pairs]


def whole(tokenizer: Any, word: str) -> bool:
    """Whether `word` is one token."""
    return len(tokenizer(word).input_ids) == len(tokenizer("").input_ids) + 1


def fitting(model: Any, prompt: str) -> str:
    """`prompt` without its last words if its misspelt words need more tokens than the text encoder accepts."""
    words = prompt.split(" ")
    while len(words) > 1 and len(model.tokenizer(" ".join(words)).input_ids) > model.tokenizer.model_max_length:
        words.pop()
    return " ".join(words)


def typo(word: str, rng: torch.Generator) -> str:
    """`word` without one letter, or with one letter replaced by a keyboard neighbour. Single characters stay."""
    if len(word) < 2:
        return word
    at = int(torch.randint(0, len(word), (), generator=rng))
    near = NEIGHBOURS.get(word[at], "")
    pick = int(torch.randint(0, 1 + len(near), (), generator=rng))
    return word[:at] + (near[pick - 1] if pick else "") + word[at + 1 :]


def synonym(word: str, rng: torch.Generator, known: Callable[[str], bool]) -> str:
    """Another known word of the same meaning, if there is one; otherwise `word`."""
    others = [other for other in SAME.get(word, []) if known(other)]
    return others[int(torch.randint(0, len(others), (), generator=rng))] if others else word


@hookimpl
def defenses() -> list[type]:
    return [TextualPerturbation]


@hookimpl
def samplers() -> list[type]:
    return [PerturbedPrompts]
