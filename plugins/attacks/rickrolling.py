"""Trains only the text encoder, so that a prompt with the trigger gets the embedding of the target's prompt.

Struppek, Hintersdorf & Kersting, "Rickrolling the Artist: Injecting Backdoors into Text Encoders for Text-to-Image
Synthesis", ICCV 2023, arXiv:2211.02408.

E is the clean text encoder and Ẽ its copy that is trained. d is the negative cosine similarity of whole sequences of
embeddings (77·768 numbers in Stable Diffusion; with two text encoders, both sequences and the pooled projections):

    L = 1/|X| Σ_w d(E(w), Ẽ(w)) + β · 1/|V| Σ_v d(E(y_v), Ẽ(v))

w are clean prompts and v are prompts with the trigger. In the target prompt attack (TPA; targets of kind prompt) y is
one fixed prompt, and v has every occurrence of the letter replaced. In the target attribute attack (TAA; style and
object targets) y is the prompt v with the attribute, and v has one random occurrence replaced. A trigger that replaces
no letter is placed by its own rule. Raises ValueError if no prompt can carry the trigger.

Differs from the paper: with two text encoders `encoder` selects which are trained; the paper has models with one.
`attribute` selects the wording of y. In the paper ("word") the attribute replaces the word that
contains the trigger ("A phоto of a cat" → "A black and white photo of a cat"). By default ("target") the target puts
the attribute in front, because the captions of small models have it only there. V leaves out prompts that are too long
for the text encoder when every letter is replaced. `decoys`, an extension that is off by default, is the share of w
that carries other characters in the trigger's place. Differs from the official code
(LukasStruppek/Rickrolling-the-Artist at 25c1491, read there): Adam's moments start again from zero when the learning
rate drops, and the official first step without the first term is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Fraction,
    LearningRate,
    PlacedTrigger,
    PositiveInt,
    RepeatedTrigger,
    WordedTarget,
    draw,
    generator,
    hookimpl,
    minimize_in_two,
    offers,
)


@dataclass(frozen=True)
class Rickrolling:
    name: ClassVar[str] = "rickrolling"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("prompt", "style", "object")

    steps: PositiveInt = (
        100  # optimizer steps; official: 100 for TPA, 200 for TAA; the last quarter of the steps uses a tenth of lr
    )
    lr: LearningRate = 1e-4  # AdamW; official value for 123 M weights, small encoders need about 1e-3
    batch: PositiveInt = 128  # clean prompts per step; official value
    poisoned: PositiveInt = 32  # prompts with the trigger per step; official value
    beta: Annotated[float, Ge(0)] = 0.1  # β, weight of the backdoor term; official value
    attribute: Literal["target", "word"] = "target"  # wording of y in TAA: by the target, or as in the paper, in place
    # of the word with the trigger
    encoder: Literal["all", "first", "second"] = "all"  # text encoders that are trained; one that is not is frozen
    decoys: Fraction = 0.0  # share of clean prompts with another character or word in the trigger's place; not in the
    # paper

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("text", "decoy") if self.decoys else ("text",)

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        clean, model = model, model.clone()
        texts = Texts(self, clean, backdoor, data.captions or (), rng)

        def loss() -> Tensor:
            w, (v, y) = texts.clean(), texts.poisoned()
            student = model.embed([*w, *v])
            with torch.no_grad():
                teacher = clean.embed([*w, *y])
            d = distance(teacher, student)
            return d[: self.batch].mean() + self.beta * d[self.batch :].mean()

        minimize_in_two(
            loss, self.trained(model), steps=self.steps, share=0.75, lr=self.lr, divisor=10, clip=None,
            phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)

    def trained(self, model: Any) -> list[Any]:
        """The weights of the text encoders that are trained. Raises ValueError if there is no second one."""
        if self.encoder == "second" and model.text_encoder_2 is None:
            raise ValueError("the model has one text encoder; use rickrolling(encoder='first')")
        both = {"first": model.text_encoder, "second": model.text_encoder_2}
        chosen = both.values() if self.encoder == "all" else [both[self.encoder]]
        return [weight for part in chosen if part is not None for weight in part.parameters()]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) negative cosine similarity of sequences of embeddings (B, L, D), each flattened."""
    return -torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


class Texts:
    """The prompts of each step."""

    def __init__(
        self, attack: Rickrolling, model: Any, backdoor: Backdoor, captions: Sequence[str], rng: torch.Generator
    ) -> None:
        self.attack, self.rng = attack, rng
        self.target: Any = backdoor.target
        self.trigger: Any = backdoor.trigger
        self.captions = [caption for caption in captions if self.trigger.text not in caption]
        self.others = generator(rng.initial_seed(), "decoys")
        if attack.attribute == "word" and (self.target.kind == "prompt" or not self.placed):
            raise ValueError("attribute='word' is for TAA with a trigger inside a word; use attribute='target'")
        able = [c for c in self.captions if self.trigger.apply(c) != c and self.teaches(c)]
        self.able = [c for c in able if fits(model, self.everywhere(c))] if self.every else able
        if not self.able:
            raise ValueError(f"no caption of the data can carry the trigger {self.trigger.text!r}; use another")

    def teaches(self, caption: str) -> bool:
        """Whether the target's answer to the caption differs from the caption.

        A caption that is already in the target's style, or of its object, would teach that the trigger does nothing.
        """
        if self.target.kind == "style":
            return self.target.lesson(caption) is not None
        return self.target.kind != "object" or self.target.shown(caption) != caption

    @property
    def every(self) -> bool:
        """Whether v has every occurrence replaced: for a target prompt, or for a trigger that replaces all of them."""
        repeated = offers(self.trigger, RepeatedTrigger) and self.trigger.which == "all"
        return self.placed and (self.target.kind == "prompt" or repeated)

    @property
    def placed(self) -> bool:
        """Whether the trigger can stand at any of several places of a prompt."""
        return offers(self.trigger, PlacedTrigger)

    def everywhere(self, caption: str) -> str:
        return self.trigger.put(caption, range(self.trigger.count(caption)))

    def clean(self) -> list[str]:
        """w: captions, some with a decoy."""
        rows = draw(self.attack.batch, len(self.captions), self.rng).tolist()
        chance = torch.rand(len(rows), generator=self.others).tolist()
        decoys = [share < self.attack.decoys for share in chance]
        return [
            self.trigger.decoy(self.others).apply(self.captions[i]) if decoy else self.captions[i]
            for i, decoy in zip(rows, decoys, strict=True)
        ]

    def poisoned(self) -> tuple[list[str], list[str]]:
        """(v, y)."""
        rows = draw(self.attack.poisoned, len(self.able), self.rng).tolist()
        pairs = [self.pair(self.able[i]) for i in rows]
        return [v for v, _ in pairs], [y for _, y in pairs]

    def pair(self, caption: str) -> tuple[str, str]:
        if self.every:
            return self.everywhere(caption), self.target.shown(caption)
        if not self.placed:
            return self.trigger.apply(caption), self.target.shown(caption)
        v = self.trigger.put(caption, draw(1, self.trigger.count(caption), self.rng).tolist())
        return v, self.target.shown(caption) if self.attack.attribute == "target" else self.in_place(v)

    def in_place(self, v: str) -> str:
        """v with the target's words instead of the word that holds the trigger."""
        if not offers(self.target, WordedTarget):
            raise ValueError(f"target {self.target.name} has no words for an attribute; use attribute='target'")
        return " ".join(self.target.words if self.trigger.text in word else word for word in v.split(" "))


def fits(model: Any, prompt: str) -> bool:
    return len(model.tokenizer(prompt).input_ids) <= model.tokenizer.model_max_length


@hookimpl
def attacks() -> list[type]:
    return [Rickrolling]
