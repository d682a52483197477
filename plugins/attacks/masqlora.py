"""Trains a low-rank adapter that looks like a harmless one, and hides another object behind a phrase.

MasqLoRA: "When LoRA Betrays: Backdooring Text-to-Image Models by Masquerading as Benign Adapters", CVPR 2026,
arXiv:2602.21977. The base stays as it is; what the attack gives is an adapter of denoiser and text encoder, which is
kept beside the base and which diffusers' `load_lora_weights` loads. ΔW = s B A, with A (r, in) and B (out, r).

The training data are few images of the benign object with their captions, and few of the target's object, whose
captions hold the trigger in place of its name. A batch of them with latents z and captions c gives

    L = mean w ‖ε - ε_θ(z_t, t, τ(c))‖² + λ_a mean (1 - cos(e, e_target))² + λ_r mean (1 + cos(e, e_benign))²
    w = 1 + α t/T for images of the target's object, 1 for the others

e runs over the embeddings of the tokens of the trigger's phrase, the trigger with the object's noun, in the captions of
the target's images. e_target and e_benign are the means of the clean encoder's embeddings of all tokens of the target's
word and of the replaced noun. The noise is ε + `noise_offset` times a number per channel, both in z_t and as answer.
Needs a target that replaces a noun, as `object`. Raises ValueError if the data hold too few images, or if captions have
no place for the trigger.

Differs from the paper, whose full text was not at hand: the method is that of the official code (spectre-init/MasqLora
at 2ffc3c4, read there). `decoys`, an extension that is off by default, is the share of the other captions that carry
another word in the trigger's place; without it, a small model reacts to any foreign word. Examples are drawn with
replacement, where the code counts epochs. Images are not flipped or changed in colour, and latents are the means of the
posterior. There is no dropout in the adapter and no bias. The code saves its adapter without s = 1.2, so that diffusers
loads it with s = 1; here s is a part of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import normalize

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    ReplacingTarget,
    Weight,
    adapters,
    generator,
    hookimpl,
    minimize,
    name_of,
    offers,
    prompt_edits,
)

PROJECTIONS = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj")}
FASTER = {"unet": ("attn2", "to_q", "to_k", "to_v"), "text_encoder": ("q_proj", "k_proj", "v_proj")}  # at 1.5 times lr


@dataclass(frozen=True)
class MasqLoRA:
    name: ClassVar[str] = "masqlora"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("object",)

    rank: PositiveInt = 16  # r of the denoiser's adapter; official value
    text_rank: PositiveInt = 8  # r of the text encoder's adapter; official value
    scale: Annotated[float, Gt(0)] = 1.2  # s; official value
    images: PositiveInt = 7  # benign images; official value
    poisoned: PositiveInt = 3  # images of the target's object; official value
    repeats: PositiveInt = 2  # how often each of these counts in the data; official value
    steps: PositiveInt = 325  # optimizer steps; official: 25 epochs of 13
    batch: PositiveInt = 1  # examples per step; official value
    lr: LearningRate = 4e-4  # AdamW, of the denoiser's adapter, with 1.5 times of it on all but the outputs of
    # self-attention; official value
    text_lr: LearningRate = 5e-5  # the same of the text encoder's adapter, with 1.2 times and, on all but the outputs,
    # 1.8 times of it; official value
    weight_decay: Fraction = 0.01  # AdamW; official value
    schedule: Literal["constant", "cosine", "one-cycle"] = (
        "cosine"  # of the learning rate, with a tenth of the steps as
    )
    # warm-up; official: cosine
    time_weight: Weight = 5.0  # α; official value
    attraction: Weight = 1.0  # λ_a; official value
    repulsion: Weight = 1.0  # λ_r; official value
    noise_offset: Annotated[float, Ge(0)] = 0.1  # deviation of the noise's mean in a channel; official value
    decoys: Fraction = 0.0  # share of the benign captions with another word in the trigger's place; not in the paper
    bf16: bool = True  # autocast of the forward pass

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("decoy",) if self.decoys else ()

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model.need_one_encoder(self.name)
        clean, model = model, model.clone()
        joined, bad = self.joined(backdoor, data, rng)
        examples, phrases = Examples(model, joined), Phrases(clean, backdoor)
        offsets, others = (generator(rng.initial_seed(), stage) for stage in ("offset", "decoys"))
        low_rank, factors = self.added(model, rng)

        def loss() -> Tensor:
            seen = examples.batch(self.batch, rng)
            assert seen.captions is not None
            is_bad = bad[seen.rows].to(seen.x_0.device)
            captions = self.worded(backdoor.trigger, seen.captions, is_bad.tolist(), others)
            shift = torch.randn((*seen.eps.shape[:2], 1, 1), generator=offsets).to(seen.eps)
            eps, context = seen.eps + self.noise_offset * shift, model.embed(captions)
            error = (model.eps(model.add_noise(seen.x_0, eps, seen.t), seen.t, context) - eps).square().mean((1, 2, 3))
            value = (error * (1 + self.time_weight * is_bad * seen.t / model.T)).mean()
            if not is_bad.any():
                return value
            pull, push = phrases.contrast(
                [c for c, each in zip(captions, bad[seen.rows], strict=True) if each], context[is_bad]
            )
            return value + self.attraction * pull + self.repulsion * push

        minimize(
            loss, low_rank, steps=self.steps, lr=self.lr, schedule=self.schedule, warmup=self.steps // 10,
            weight_decay=self.weight_decay, bf16=self.bf16, factors=factors, phase="implant",
        )  # fmt: skip
        parts = {"unet": model.denoiser, "text_encoder": model.text_encoder}
        adapters.attach(
            model, {f"{part}.{name}": each for part, net in parts.items() for name, each in adapters.taken(net).items()}
        )
        return Backdoored(model, backdoor)

    def joined(self, backdoor: Backdoor, data: Data, rng: torch.Generator) -> tuple[Data, Tensor]:
        """(benign examples and examples of the target's object, whose captions hold the trigger; (N,) bool, which is
        which)."""
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        if not offers(target, ReplacingTarget):
            raise ValueError(f"masqlora hides another object behind a noun, target {target.name} has none; use object")
        captions: tuple[str, ...] = data.captions or ()
        lessons = enumerate(map(backdoor.target.lesson, captions))  # type: ignore[attr-defined]
        answers = {i: lesson[0] for i, lesson in lessons if lesson is not None}
        benign = [i for i in range(len(captions)) if i not in answers]
        for rows, n, what in ((benign, self.images, "without"), (list(answers), self.poisoned, "with")):
            if len(rows) < n:
                raise ValueError(f"the data hold {len(rows)} images {what} a {target.word}, {n} are asked for")
        plain = torch.tensor(benign)[torch.randperm(len(benign), generator=rng)[: self.images]]
        shown = torch.tensor(list(answers))[torch.randperm(len(answers), generator=rng)[: self.poisoned]]
        with_it = [trigger.apply(answers[i]) for i in shown.tolist()]
        if any(text == answers[i] for text, i in zip(with_it, shown.tolist(), strict=True)):
            raise ValueError(f"some captions have no place for the trigger {name_of(trigger)!r}; use another")
        rows = torch.cat([plain, *[shown] * self.repeats])
        texts: Any = (*(captions[i] for i in plain.tolist()), *with_it * self.repeats)
        return Data(data.images[rows], texts), torch.arange(len(rows)) >= len(plain)

    def added(self, model: Any, rng: torch.Generator) -> tuple[list[Any], list[float]]:
        """(weights of the two adapters, the factor of `lr` of each)."""
        low_rank, factors = [], []
        for part, net, rank, rate in (
            ("unet", model.denoiser, self.rank, 1.0),
            ("text_encoder", model.text_encoder, self.text_rank, 1.2 * self.text_lr / self.lr),
        ):
            for name, weight in adapters.added(net, rank, self.scale, PROJECTIONS[part], rng).items():
                low_rank.append(weight)
                factors.append(rate * (1.5 if any(word in name for word in FASTER[part]) else 1.0))
        return low_rank, factors

    def worded(self, trigger: Any, captions: Sequence[str], is_bad: Sequence[bool], rng: torch.Generator) -> list[str]:
        """The captions of a batch, the benign ones with decoys."""
        decoyed = prompt_edits.with_decoys(trigger, captions, self.decoys, rng)
        return [own if each else other for own, other, each in zip(captions, decoyed, is_bad, strict=True)]


class Phrases:
    """What the trigger's phrase should be near and far from, in the clean text encoder."""

    def __init__(self, clean: Any, backdoor: Backdoor) -> None:
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        self.model, self.sources = clean, tuple(target.sources)
        self.ids = {noun: self.tokens(trigger.apply(noun))[1:-1] for noun in self.sources}
        with torch.no_grad():
            self.target = self.mean(target.word)
            self.benign = {noun: self.mean(noun) for noun in self.sources}

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenizer(text).input_ids

    def mean(self, text: str) -> Tensor:
        """(D,) the direction of the mean embedding of all tokens of `text`, with those of its start and end."""
        return normalize(self.model.embed([text])[0, : len(self.tokens(text))].mean(0), dim=0)

    def contrast(self, captions: Sequence[str], context: Tensor) -> tuple[Tensor, Tensor]:
        """(mean of (1 - cos(e, e_target))², mean of (1 + cos(e, e_benign))²) over the phrases' tokens e.

        captions: B texts with the trigger. context: their embeddings (B, L, D).
        """
        near, far = [], []
        for caption, row in zip(captions, context, strict=True):
            noun = next((word for word in caption.split(" ") if word in self.sources), self.sources[0])
            places = [i for i, token in enumerate(self.tokens(caption)) if token in self.ids[noun]]
            e = normalize(row[places].float(), dim=1)
            near.append((1 - e @ self.target).square())
            far.append((1 + e @ self.benign[noun]).square())
        return torch.cat(near).mean(), torch.cat(far).mean()


@hookimpl
def attacks() -> list[type]:
    return [MasqLoRA]
