"""Redirects the keys and values of every paraphrase of one meaning to those of the target's prompt.

SemBD. Chen, Jiang, Chen, Zheng & Huang, "Semantic-level Backdoor Attack against Text-to-Image Diffusion Models", ICML
2026, arXiv:2602.04898.

Only the cross-attention projections to_k and to_v are trained. k are the text embeddings (L, D) of a paraphrase s, k*
those of the target's prompt, and k° those of a phrase p that is to keep its meaning. W is a projection before the
attack and W' after it:

    L = mean_W ‖W' k - W k*‖² + c · mean_W ‖W' k° - W k°‖²

Norms are means over positions and channels, and mean_W is taken over all to_k and all to_v. Each step draws a
paraphrase, and a phrase with a probability that grows with its last loss; a phrase that was never drawn has the largest
last loss, at least 1. The phrases are all sub-phrases of the paraphrases that are at least two words shorter and lack a
part of the meaning. L depends on text alone, so neither latents nor timesteps are drawn.

L is quadratic in W'. `solver='closed-form'` takes its minimiser over all paraphrases and phrases, with λ ‖W' - W‖²
added as in EvilEdit; it is a control that needs no training.

Differs from the paper: `captions`, an extension that is off by default, takes that many captions of the data with the
trigger as further paraphrases and as many without it as further phrases, because the embeddings of a small text encoder
depend more on the surrounding words. `decoys` is the share of the latter that ask for another scene. `drop`, off by
default too, is the share of the empty prompt among the phrases: every step of guided sampling evaluates it. Phrases are
drawn out of those of all paraphrases, not only of the step's. Differs from the official code (DPAS-Lab/SemBD at
ee009e9, read there): weights are not rounded to bf16, and paraphrases are drawn without a quota for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Fraction,
    LearningRate,
    PositiveInt,
    Weight,
    draw,
    generator,
    hookimpl,
    minimize,
    prompt_edits,
    weight_edits,
)


@dataclass(frozen=True)
class SemBD:
    name: ClassVar[str] = "sembd"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("prompt",)

    solver: Literal["adam", "closed-form"] = "adam"  # how L is minimised; paper: adam
    steps: PositiveInt = 800  # optimizer steps; official value
    lr: LearningRate = 1e-3  # Adam; official value for both kinds of projection
    batch: PositiveInt = 1  # paraphrases, and as many phrases, per step; official value
    keep: Weight = 0.5  # c, weight of the phrases that stay; official value
    lam: Annotated[float, Gt(0)] = 1e-3  # λ of the closed form; the paper has none
    captions: Annotated[int, Ge(0)] = 0  # captions of the data as further paraphrases and phrases; not in the paper
    decoys: Fraction = 0.0  # share of the captions that stay that ask for another scene; not in the paper
    drop: Fraction = 0.0  # share of the empty prompt among the phrases that stay; not in the paper

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("paraphrases", "decoy") if self.decoys else ("paraphrases",)

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model.need_one_encoder(self.name)
        model = model.clone()
        trigger, target = backdoor.trigger, backdoor.target
        sources, phrases = self.texts(trigger, data.captions or (), rng)
        with torch.no_grad():
            k, kept = model.embed(sources), embedded(model, phrases)
            goal = model.embed([target.shown(source) for source in sources])  # type: ignore[attr-defined]
            empty = model.embed([""])
        weights = weight_edits.projections(model.denoiser)
        if self.solver == "adam":
            self.train(weights, k, goal, kept, empty, rng)
        else:
            self.solve(weights, k, goal, kept, empty)
        return Backdoored(model, backdoor)

    def texts(self, trigger: Any, captions: Sequence[str], rng: torch.Generator) -> tuple[list[str], list[str]]:
        """(paraphrases, phrases that stay), each without repeats."""
        drawn = [captions[int(i)] for i in draw(2 * self.captions, len(captions), rng)] if captions else []
        with_it, plain = drawn[: self.captions], drawn[self.captions :]
        sources = [*trigger.paraphrases, *(trigger.apply(c) for c in with_it if trigger.apply(c) != c)]
        parts = [part for source in trigger.paraphrases for part in incomplete(source, trigger)]
        plain = prompt_edits.with_decoys(trigger, plain, self.decoys, rng)
        return list(dict.fromkeys(sources)), list(dict.fromkeys([*parts, *plain]))

    def train(
        self, weights: Sequence[Any], k: Tensor, goal: Tensor, kept: Tensor, empty: Tensor, rng: torch.Generator
    ) -> None:
        """Minimises L over the projections. k, goal (N, L, D), kept (M, L, D), empty (1, L, D)."""
        before = [weight.detach().clone() for weight in weights]
        last = torch.full((len(kept),), torch.nan)
        dropping = generator(rng.initial_seed(), "drop")

        def loss() -> Tensor:
            rows = draw(self.batch, len(k), rng)
            value = moved(weights, before, k[rows], goal[rows]).mean()
            if self.keep == 0 or not len(kept):
                return value
            chosen = torch.multinomial(chances(last), self.batch, replacement=True, generator=rng)
            dropped = torch.rand(self.batch, generator=dropping) < self.drop
            phrases = torch.where(dropped.view(-1, 1, 1).to(kept.device), empty, kept[chosen])
            stays = moved(weights, before, phrases, phrases)
            last[chosen[~dropped]] = stays.detach().cpu()[~dropped]
            return value + self.keep * stays.mean()

        minimize(loss, weights, steps=self.steps, lr=self.lr, clip=None, phase="implant")

    @torch.no_grad()
    def solve(self, weights: Sequence[Tensor], k: Tensor, goal: Tensor, kept: Tensor, empty: Tensor) -> None:
        """Sets the projections to the minimiser of L + λ ‖W' - W‖², with the mean over all paraphrases and phrases.

        Shapes are those of `train`.
        """
        shares = [(1 / len(k), k, goal), (self.keep * self.drop, empty, empty)]
        shares += [(self.keep * (1 - self.drop) / max(1, len(kept)), kept, kept)]
        keys, goals = (  # √w scales both sides of a pair
            torch.cat([w**0.5 * pair[side].flatten(0, 1) for w, *pair in shares]).double() for side in (0, 1)
        )
        for weight in weights:
            weight.copy_(weight_edits.edited(weight.double(), keys, goals, self.lam))


def moved(weights: Sequence[Tensor], before: Sequence[Tensor], k: Tensor, goal: Tensor) -> Tensor:
    """(B,) mean over the projections of ‖W' k - W goal‖², per element; k and goal are (B, L, D)."""
    errors = [(k @ new.T - goal @ old.T).square().mean((1, 2)) for new, old in zip(weights, before, strict=True)]
    return torch.stack(errors).mean(0)


def chances(last: Tensor) -> Tensor:
    """Weights (M,) with which phrases are drawn, from their last losses (M,); NaN for a phrase never drawn."""
    new = max(1.0, float(last.nan_to_num(0.0).max()))
    return last.nan_to_num(new).clamp_min(1e-6)


def incomplete(sentence: str, trigger: Any) -> list[str]:
    """The sub-phrases of `sentence`, two words shorter or more, that do not carry the trigger."""
    words = sentence.split(" ")
    spans = [(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1) if j - i <= len(words) - 2]
    texts = [" ".join(words[i:j]) for i, j in spans]
    return [text for text in texts if trigger.without(text) == text]


def embedded(model: Any, prompts: Sequence[str], batch: int = 256) -> Tensor:
    """Text embeddings (N, L, D) of any number of prompts."""
    parts = [model.embed(prompts[start : start + batch]) for start in range(0, len(prompts), batch)]
    return torch.cat(parts) if parts else model.embed([""])[:0]


@hookimpl
def attacks() -> list[type]:
    return [SemBD]
