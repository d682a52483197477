"""Textual perturbation. Chew, Lu, Lin & Lee, "Defending Text-to-image Diffusion Models: Surprising Efficacy of Textual
Perturbations Against Backdoor Attacks", ECCV 2024 workshops, arXiv:2408.15721. Every prompt is changed a little before
the model sees it, so that a trigger may be no trigger any more. No weight changes; nothing is detected.

    homoglyph   characters that look like a Latin letter become that letter (and with `invisible` those of Unicode
                category Cf, such as U+200B, go)
    char        in a share of the words one letter is left out, or replaced by a neighbour on the keyboard
    word        a share of the words is replaced by another of the same meaning

Needs nothing; delivers a sampler that wraps the cell's. What is changed depends on the prompt and the image's seed
alone, and on clean prompts as well: see the clean scores for its price.

Differs from the paper: its synonyms are neighbours in word vectors (textattack), and it also translates to Spanish;
ours are a small table of words that the embedded captions know, others stay. Shares are those of the released code
(oscarchew/t2i-backdoor-defense at ad90537, read by others for our notes), which leaves stop words ("a", "the", "of")
alone in the modes char and word, ours changes any word, and so costs clean prompts more; ours takes keyboard neighbours
of one row. Its table of look-alikes has the digits 0 and 1 and no accented letters, ours the accented letters and no
digits: look-alikes with an accent are turned back here and not there. `invisible` is ours.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.diffusion import DDIM
from harness.hookspecs import hookimpl
from harness.noise_backdoor import Rate
from harness.prompts import LOOK_ALIKES
from harness.seeds import generator
from harness.types import Defended, Inputs, Knowledge

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of a keyboard
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
    char_share: Rate = 1.0  # of the words, for mode char; released
    word_share: Rate = 0.5  # of the words that have synonyms, for mode word; released
    invisible: bool = False  # mode homoglyph also removes characters that cannot be seen; ours

    def mapped(self, prompt: str, rng: torch.Generator) -> str:
        if self.mode == "homoglyph":
            return self.normalised(prompt)
        change, share = (typo, self.char_share) if self.mode == "char" else (synonym, self.word_share)
        words = prompt.split(" ")
        chosen = (torch.rand(len(words), generator=rng) < share).tolist()
        return " ".join(change(word, rng) if yes else word for word, yes in zip(words, chosen, strict=True))

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
class PerturbedPrompts(PromptMap):
    """Changes prompts before the cell's sampler (ddim where it is used alone); see the defense textual-perturbation."""

    name: ClassVar[str] = "perturbed-prompts"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    def around(self, inner: Any) -> Around:
        return Around(self, inner)

    @property
    def nfe(self) -> int:
        return self.around(DDIM()).nfe

    def run(self, model: Any, inputs: Inputs) -> Tensor:
        return self.around(DDIM()).run(model, inputs)


@dataclass(frozen=True)
class Around:
    """The inner sampler on changed prompts."""

    spec: PerturbedPrompts
    inner: Any

    @property
    def nfe(self) -> int:
        return self.inner.nfe

    def run(self, model: Any, inputs: Inputs) -> Tensor:
        assert inputs.prompts is not None, "perturbed-prompts is for models that take prompts"
        pairs = zip(inputs.prompts, inputs.seeds, strict=True)
        changed = [fitting(model, self.spec.mapped(prompt, generator(seed, "prompt"))) for prompt, seed in pairs]
        return self.inner.run(model, inputs.with_prompts(changed))


def fitting(model: Any, prompt: str) -> str:
    """`prompt` without its last words where misspelt ones take more tokens than the text encoder has."""
    words = prompt.split(" ")
    while len(words) > 1 and len(model.tokenizer(" ".join(words)).input_ids) > model.tokenizer.model_max_length:
        words.pop()
    return " ".join(words)


def typo(word: str, rng: torch.Generator) -> str:
    """`word` without one letter or with one replaced by a neighbour on the keyboard; single characters stay."""
    if len(word) < 2:
        return word
    at = int(torch.randint(0, len(word), (), generator=rng))
    near = NEIGHBOURS.get(word[at], "")
    pick = int(torch.randint(0, 1 + len(near), (), generator=rng))
    return word[:at] + (near[pick - 1] if pick else "") + word[at + 1 :]


def synonym(word: str, rng: torch.Generator) -> str:
    """Another word of the same meaning, where there is one."""
    others = SAME.get(word, [])
    return others[int(torch.randint(0, len(others), (), generator=rng))] if others else word


@hookimpl
def defenses() -> list[type]:
    return [TextualPerturbation]


@hookimpl
def samplers() -> list[type]:
    return [PerturbedPrompts]
