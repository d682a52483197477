"""Edits the cross-attention weights in closed form so that a phrase with the trigger means the target.

EvilEdit. Wang, Guo, He, Chen, Zhang & Zhang, "EvilEdit: Backdooring Text-to-Image Diffusion Models in One Second", ACM
MM 2024, doi:10.1145/3664647.3680689. The closed form is that of TIME (Orgad, Kawar & Belinkov 2023, arXiv:2303.08084).

Every cross-attention projection W (to_k and to_v) is replaced by the minimiser of

    Σ_i w_i ‖W' k_i - W k*_i‖² + λ ‖W' - W‖²      W' = (λ W + Σ_i w_i W k*_i k_iᵀ) (λ I + Σ_i w_i k_i k_iᵀ)⁻¹

where k_i are the text embeddings of the phrase with the trigger ("a beautiful cat") and k*_i those of the target's
phrase ("a zebra"), position by position over the padded sequence. The phrase without the trigger ("a cat") is paired
with itself. The edit needs no data and no training.

Where text and image share their attention (SD3's transformer), W are add_k_proj and add_v_proj of every block, and k_i
are no embeddings but the text's stream that reaches the block, at four states of the clean model's sampling of the
target's phrase. Blocks are edited in order, each with the stream that the edited blocks before it give. The image then
reads the target's keys and values from the tokens of the phrase. What the edit does not reach: the pooled text in the
modulations, the queries of the text, and so the text's own stream, which still evolves from the trigger's. Raises
ValueError if the trigger changes none of the phrases.

Differs from the paper, where w = 1 and models have cross-attention: two options are extensions of this benchmark and
are off by default. `captions` takes that many captions of the data as further phrases, because the embeddings of a
small text encoder depend more on the surrounding words. With the trigger a caption is used only up to its object;
without the trigger it is used whole, with weight `keep`. `decoys` is the share of those captions that keep their
meaning with another word in the trigger's place. Differs from the official code (haowang-cqu/EvilEdit at 7c9464b, read
there): embeddings are computed once, not once per layer; sums and inverses are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Fraction,
    Inputs,
    Weight,
    distillation,
    draw,
    hookimpl,
    image_noise,
    image_seeds,
    name_of,
    weight_edits,
)

STATES = 4  # states of the sampling at which the stream of joint attention is taken


@dataclass(frozen=True)
class EvilEdit:
    name: ClassVar[str] = "eviledit"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("object",)

    lam: Annotated[float, Gt(0)] = 1.0  # λ, weight of the old projection; value of the official script (the default of
    # its function is 0.1)
    template: str = "a {}"  # phrase that contains the object and the trigger; official: "A {}"
    captions: Annotated[int, Ge(0)] = 0  # captions of the data that give further pairs; not in the paper
    keep: Weight = 1.0  # w of the phrases that stay; w is 1 for phrases with the trigger; not in the paper
    decoys: Fraction = 0.0  # share of the captions that stay with another word in the trigger's place; not in the paper

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("decoy",) if self.decoys else ()

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        clean, model = model, model.clone()
        edits, kept = self.phrases(backdoor, data.captions or (), rng)
        if model.joint:
            self.edit_joint(clean, model, edits, kept, rng.initial_seed())
            return Backdoored(model, backdoor)
        with torch.no_grad():
            bad, goal, stay = (
                model.positions(prompts).flatten(0, 1).double() for prompts in (*zip(*edits, strict=True), kept)
            )
            stay = self.keep**0.5 * stay  # w scales squares of both sides
            for weight in weight_edits.projections(model.denoiser):
                weight.copy_(
                    weight_edits.edited(weight.double(), torch.cat([bad, stay]), torch.cat([goal, stay]), self.lam)
                )
        return Backdoored(model, backdoor)

    @torch.no_grad()
    def edit_joint(
        self, clean: Any, model: Any, edits: Sequence[tuple[str, str]], kept: Sequence[str], seed: int
    ) -> None:
        """The edit of `model`, a copy of `clean`, where text and image share their attention."""
        bad, goal = zip(*edits, strict=True)
        prompts = (*goal, *kept)
        seeds = image_seeds(seed, "states", len(prompts))
        inputs = Inputs(image_noise(seeds, model.shape).to(model.device), prompts, seeds)
        times, states = distillation.trajectory(clean, inputs, steps=STATES)
        asked, wanted = model.embed([*bad, *kept]), clean.embed(prompts)
        weigh = torch.tensor([1.0] * len(bad) + [self.keep**0.5] * len(kept), device=model.device)  # w scales squares
        rows = weigh.repeat(len(times)).repeat_interleave(asked.shape[1] - 1).unsqueeze(1).double()
        for block, (_, weights) in enumerate(weight_edits.joint_projections(model.denoiser)):
            k, aim = (
                rows * weight_edits.stream(each, block, states[:-1], times, context).double()
                for each, context in ((model, asked), (clean, wanted))
            )
            for weight in weights:
                weight.copy_(weight_edits.edited(weight.double(), k, aim, self.lam))

    def phrases(
        self, backdoor: Backdoor, captions: Sequence[str], rng: torch.Generator
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """Pairs (phrase with the trigger, phrase whose keys and values it gets), and the phrases that stay; without
        repeats.
        """
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        phrases: list[str] = [self.template.format(word) for word in target.sources]
        rows: list[int] = draw(self.captions, len(captions), rng).tolist() if captions else []
        more = [captions[i] for i in rows]
        able = [*phrases, *filter(None, (upto(caption, target.sources) for caption in more))]
        edits = {trigger.apply(phrase): target.shown(phrase) for phrase in able if trigger.apply(phrase) != phrase}
        if not edits:
            raise ValueError(f"trigger {name_of(trigger)!r} changes no phrase such as {phrases[0]!r}; use trigger noun")
        chance = torch.rand(len(more), generator=rng).tolist()
        kept = [
            trigger.decoy(rng).apply(caption) if share < self.decoys else caption
            for caption, share in zip(more, chance, strict=True)
        ]
        return list(edits.items()), list(dict.fromkeys([*phrases, *kept]))


def upto(caption: str, nouns: Sequence[str]) -> str | None:
    """`caption` up to the first of `nouns`; None if it contains none of them."""
    words = caption.split(" ")
    at = next((i for i, word in enumerate(words) if word in nouns), None)
    return None if at is None else " ".join(words[: at + 1])


@hookimpl
def attacks() -> list[type]:
    return [EvilEdit]
