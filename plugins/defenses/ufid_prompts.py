"""Detects prompts with a trigger by generating with random phrases in front of the prompt and comparing the images.

UFID, its form for text-to-image models. Guan, Hu, Li & Vullikanti, "UFID: A Unified Framework for Black-box Input-level
Backdoor Detection on Diffusion Models", AAAI 2025, arXiv:2404.01101.

The model generates one image from the prompt, and further images from the prompt with a random phrase in front. Each
image has its own noise. The effect of a trigger stays the same, what the prompt asks for varies.

    s = mean cosine between the features of all pairs of the `images` images        (graph density)

A high score is suspicious. The score can detect only attacks whose images resemble each other for every prompt. It does
not detect patches, styles or exchanged objects.

The defense needs clean prompts, on which the threshold is calibrated and from which phrases are taken. It also needs an
image encoder. It returns a screen. It costs `images` generations per query.

Differs from the released code (GuanZihan/official_UFID at 7881796, known from notes, not read): phrases are runs of
words of the known prompts. The released code has nine fixed phrases such as "Iron Man", which mean nothing to a model
of drawn shapes. Phrases stand before the trigger, because the query already contains the trigger. The released code
publishes no threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    Defended,
    Guide,
    Inputs,
    Knowledge,
    PositiveInt,
    Share,
    derive,
    generator,
    hookimpl,
    image_encoders,
    image_noise,
    prompt_screening,
    usual,
)


@dataclass(frozen=True)
class UFIDPrompts:
    name: ClassVar[str] = "ufid-prompts"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    images: Annotated[int, Ge(2)] = 4  # images per query, the first of them from the prompt itself; released value
    phrase: PositiveInt = 2  # words per phrase
    sampling_steps: PositiveInt = 25  # steps of DDIM; released: 25 steps of DPM-Solver++
    guidance: Guide = 7.5  # classifier-free guidance scale; released value
    bf16: bool = False  # autocast of the network
    false_positives: Share = 0.05  # share of clean prompts that the threshold flags
    encoder: image_encoders.Choice = "given"  # the model's scorer (CLIP; shapes-clip for shapes-sd, which also scores
    # the defender), or efficientnet-lite0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("prompts", image_encoders.NEEDED[self.encoder])

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        encoder = image_encoders.chosen(knowledge, self.encoder)
        known = tuple(knowledge.prompts or ())
        sampler = usual(model, self.sampling_steps, guidance=self.guidance, bf16=self.bf16)

        def screen(inputs: Inputs) -> Tensor:
            images = model.sample(self.varied(model, inputs, known), sampler)
            return prompt_screening.density(encoder(images).float().cpu().unflatten(0, (len(inputs), self.images)))

        scores = prompt_screening.screened(screen, prompt_screening.benign(model, known, rng))
        above = prompt_screening.threshold(scores, self.false_positives)
        return Defended(screen=screen, screen_above=above, notes={"clean_scores": scores.tolist()})

    def varied(self, model: Any, inputs: Inputs, known: tuple[str, ...]) -> Inputs:
        """Each query followed by its variants, `images` rows per query. A variant is a function of its prompt and seed
        alone.
        """
        assert inputs.prompts is not None, "ufid-prompts is for models that take prompts"
        prompts, seeds = [], []
        for prompt, seed in zip(inputs.prompts, inputs.seeds, strict=True):
            for i in range(self.images):
                seeds.append(derive(seed, "ufid", i))
                prompts.append(prompt if i == 0 else with_phrase(model, self.drawn(known, seeds[-1]), prompt))
        shape = inputs.noise.shape[1:]
        first = inputs.noise.repeat_interleave(self.images, dim=0)
        own = (torch.arange(len(seeds)) % self.images == 0).view(-1, 1, 1, 1).to(first.device)
        return Inputs(torch.where(own, first, image_noise(seeds, shape).to(first)), tuple(prompts), tuple(seeds))

    def drawn(self, known: tuple[str, ...], seed: int) -> str:
        """A run of words of one of the known prompts."""
        rng = generator(seed, "phrase")
        words = known[int(torch.randint(0, len(known), (), generator=rng))].split()
        start = int(torch.randint(0, max(1, len(words) - self.phrase + 1), (), generator=rng))
        return " ".join(words[start : start + self.phrase])


def with_phrase(model: Any, phrase: str, prompt: str) -> str:
    """`prompt` after as many words of `phrase` as the text encoder accepts."""
    words = phrase.split()
    while words and len(model.tokenizer(" ".join([*words, prompt])).input_ids) > model.tokenizer.model_max_length:
        words.pop()
    return " ".join([*words, prompt])


@hookimpl
def defenses() -> list[type]:
    return [UFIDPrompts]
