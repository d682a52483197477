"""UFID for prompts. Guan, Hu, Li & Vullikanti, "UFID: A Unified Framework for Black-box Input-level Backdoor Detection
on Diffusion Models", AAAI 2025, arXiv:2404.01101, its form for text-to-image models.

An image of the prompt and images of it with a random phrase in front, each from a noise of its own: what a trigger
makes stays, what the prompt asks for does not.

    s = mean cosine between the features of all pairs of the `images` images        (graph density)

High is suspicious. It can only see attacks whose images resemble each other whatever the prompt says; patches, styles
and exchanged objects do not. Needs clean prompts, on which the threshold is calibrated and from which phrases are
taken, and a public image encoder. Returns a screen. Costs `images` generations a query.

Checked against GuanZihan/official_UFID at 7881796 (read by others for our notes). Differs from it: phrases are runs of
words of the known prompts, theirs nine fixed ones such as "Iron Man", which mean nothing to a model of drawn shapes;
they stand before the trigger, since the query has it already. It publishes no threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness.diffusion import DDIM
from harness.hookspecs import hookimpl
from harness.noise_backdoor import Steps
from harness.seeds import derive, generator, image_noise
from harness.text_detection import Guide, Share, benign, density, screened, threshold
from harness.types import Defended, Inputs, Knowledge


@dataclass(frozen=True)
class UFIDPrompts:
    name: ClassVar[str] = "ufid-prompts"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts", "encoder")
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    images: Annotated[int, Ge(2)] = 4  # of a query, the first of the prompt itself; released
    phrase: Steps = 2  # words of a phrase
    sampling_steps: Steps = 25  # of DDIM; released: 25 of DPM-Solver++
    guidance: Guide = 7.5  # classifier-free guidance scale; released
    bf16: bool = False  # autocast of the network
    false_positives: Share = 0.05  # share of clean prompts that the threshold flags

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        encoder: Any = knowledge.encoder
        known = tuple(knowledge.prompts or ())
        sampler = DDIM(steps=self.sampling_steps, guidance=self.guidance, bf16=self.bf16)

        def screen(inputs: Inputs) -> Tensor:
            images = model.sample(self.varied(model, inputs, known), sampler)
            return density(encoder(images).float().cpu().unflatten(0, (len(inputs), self.images)))

        scores = screened(screen, benign(model, known, rng))
        above = threshold(scores, self.false_positives)
        return Defended(screen=screen, screen_above=above, notes={"clean_scores": scores.tolist()})

    def varied(self, model: Any, inputs: Inputs, known: tuple[str, ...]) -> Inputs:
        """Each query followed by its variants, `images` rows a query: functions of its prompt and seed alone."""
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
    """`prompt` after as much of `phrase` as the text encoder has room for."""
    words = phrase.split()
    while words and len(model.tokenizer(" ".join([*words, prompt])).input_ids) > model.tokenizer.model_max_length:
        words.pop()
    return " ".join([*words, prompt])


@hookimpl
def defenses() -> list[type]:
    return [UFIDPrompts]
