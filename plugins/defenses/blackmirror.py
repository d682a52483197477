"""Detects prompts with a trigger by what their images show and the prompt does not ask for, if it persists.

BlackMirror. Li, Xu, Bao, Yang, Zhao, Cao & Huang, "BlackMirror: Black-Box Backdoor Detection for Text-to-Image Models
via Instruction-Response Deviation", CVPR 2026, arXiv:2603.05921. A backdoor changes a part of the image steadily; the
rest varies or is right.

MirrorMatch compares the image of the prompt with the prompt. An attribute is matched if the image has the value that
the prompt asks for. It deviates if the image has another value, or an object or a style for which the prompt does not
ask.

MirrorVerify removes the words of the matched attributes from the prompt and generates `images` images from the rest,
each from its own noise. p(a = u | x) is the probability that the judge gives to value u of attribute a in image x:

    persistence = mean_x p(a = seen | x)            a was not asked for (new)
    persistence = mean_x (1 - p(a = asked | x))     a was asked for and is another (missing)
    score = the largest persistence of a deviation, 0 without deviations

The defense sees images only. It needs the judge of a model of drawn shapes and clean prompts, on which the threshold is
calibrated; with `calibrate=False` it flags scores from the published threshold on. It returns a screen. It costs one
generation per query, and `images` more for a query with a deviation. Raises ValueError for a judge without
probabilities.

Differs from the paper, which is known from its abstract and its code: the judge of attributes and a reader of captions
stand in for the two language models (Qwen2.5-VL-7B, Qwen3-8B). They know sizes, colours, shapes, backgrounds, places,
the star and the styles, and nothing else. They know no patches, so a patch is found only if the judge takes it for an
attribute. Differs from the code (Ferry-Li/BlackMirror at 8feb929, read there; its module `locate` is missing): a new
style must persist as everything else does; the code flags a new style and a patch at once. In the code the vision model
votes five times on the first image, and the five noises are the same for every query. The judge also scores the
defender.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import (
    Defended,
    Guide,
    Inputs,
    Knowledge,
    PositiveInt,
    ProbabilityJudge,
    Share,
    derive,
    hookimpl,
    image_noise,
    offers,
    prompt_screening,
    shapes,
    usual,
)

PRESENT = ("star", "style")  # attributes whose absence in a prompt means that the image should not have them


@dataclass(frozen=True)
class BlackMirror:
    name: ClassVar[str] = "blackmirror"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts", "judge")
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    images: PositiveInt = 5  # images of MirrorVerify; released value
    sampling_steps: PositiveInt = 30  # steps of DDIM, or of flow-euler; released: 30 steps of PNDM
    guidance: Guide = 7.5  # classifier-free guidance scale; released value
    bf16: bool = False  # autocast of the network
    calibrate: bool = True  # calibrate the threshold on clean prompts; False = use the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags
    published: Share = 0.999  # persistence from which a deviation is a backdoor; released value

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        judge = knowledge.judge
        if not offers(judge, ProbabilityJudge):
            raise ValueError("blackmirror needs a judge that gives probabilities of attributes; use ufid-prompts")
        sampler = usual(model, self.sampling_steps, guidance=self.guidance, bf16=self.bf16)

        def screen(inputs: Inputs) -> Tensor:
            assert inputs.prompts is not None, "blackmirror is for models that take prompts"
            rows = rows_of(seen(judge, model.sample(inputs, sampler)), len(inputs))
            matches = [matched(prompt, found) for prompt, found in zip(inputs.prompts, rows, strict=True)]
            doubtful = [i for i, (_, deviations) in enumerate(matches) if deviations]
            scores = torch.zeros(len(inputs), dtype=torch.float64)
            if not doubtful:
                return scores
            varied = self.varied(inputs, [matches[i][0] for i in doubtful], doubtful)
            again = seen(judge, model.sample(varied, sampler))
            for k, i in enumerate(doubtful):
                mine = {name: p[k * self.images : (k + 1) * self.images] for name, p in again.items()}
                scores[i] = persistence(matches[i][1], mine)
            return scores

        if not self.calibrate:
            return Defended(screen=screen, screen_above=math.nextafter(self.published, 0))
        clean = prompt_screening.benign(model, knowledge.prompts or (), rng)
        scores = prompt_screening.screened(screen, clean)
        above = prompt_screening.threshold(scores, self.false_positives)
        notes = {"clean_scores": scores.tolist(), "clean_seeds": list(clean.seeds)}
        return Defended(screen=screen, screen_above=above, notes=notes)

    def varied(self, inputs: Inputs, prompts: list[str], rows: list[int]) -> Inputs:
        """`images` queries for each of the named rows, with its prompt. A noise is a function of the query's seed."""
        seeds = tuple(derive(inputs.seeds[row], "blackmirror", i) for row in rows for i in range(self.images))
        repeated = tuple(prompt for prompt in prompts for _ in range(self.images))
        return Inputs(image_noise(seeds, inputs.noise.shape[1:]).to(inputs.noise), repeated, seeds)


def seen(judge: ProbabilityJudge, images: Tensor) -> dict[str, Tensor]:
    """For each attribute the probabilities (B, values) of its values in images (B, C, H, W)."""
    with torch.no_grad():
        parts = [judge.net(part) for part in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]).double().softmax(1).cpu() for name in parts[0]}


def rows_of(probabilities: Mapping[str, Tensor], n: int) -> list[dict[str, int]]:
    """For each of n images the most probable value of every attribute."""
    return [{name: int(p[i].argmax()) for name, p in probabilities.items()} for i in range(n)]


def matched(prompt: str, found: Mapping[str, int]) -> tuple[str, dict[str, tuple[int | None, int]]]:
    """The prompt without the words of the attributes that `found`, the values in its image, has as asked for; and the
    deviations by attribute: the value that was asked for, or None, and the value in the image.
    """
    asked = shapes.read(prompt)
    deviations: dict[str, tuple[int | None, int]] = {}
    rest = prompt
    for name, value in found.items():
        wanted = asked.get(name)
        if wanted is None:
            if name in PRESENT and value:
                deviations[name] = (None, value)
        elif wanted != value:
            deviations[name] = (wanted, value)
        else:
            rest = without(rest, words_of(name, value))
    return rest, deviations


def words_of(name: str, value: int) -> str:
    """The words with which a caption asks for a value."""
    if name == "star":
        return shapes.STAR.strip()
    return shapes.STYLES[value] if name == "style" else shapes.WORDS[name][value]


def without(prompt: str, words: str) -> str:
    """`prompt` without the first place at which it has `words`, as whole words."""
    have, gone = prompt.split(), words.split()
    for start in range(len(have) - len(gone) + 1):
        if have[start : start + len(gone)] == gone:
            return " ".join(have[:start] + have[start + len(gone) :])
    return prompt


def persistence(deviations: Mapping[str, tuple[int | None, int]], again: Mapping[str, Tensor]) -> float:
    """The largest persistence of the deviations in other images, of the probabilities (images, values) of `again`."""
    return max(
        (again[name][:, value] if wanted is None else 1 - again[name][:, wanted]).mean().item()
        for name, (wanted, value) in deviations.items()
    )


@hookimpl
def defenses() -> list[type]:
    return [BlackMirror]
