"""Detects inputs with a trigger by generating from perturbed copies of an input and comparing the images.

UFID, its form for unconditional models. Guan, Hu, Li & Vullikanti, "UFID: A Unified Framework for Black-box Input-level
Backdoor Detection on Diffusion Models", AAAI 2025, arXiv:2404.01101.

The model generates from a query x and from M perturbed copies of it. A trigger survives the perturbation, so all images
are the target. Clean noises give different images.

    x_i = x + λ ε_i,  i = 1..M        s(x) = mean cosine of the features of all pairs of the M+1 images

s is the weighted density of the similarity graph of the images, in [-1, 1]. An input is flagged if its score is above
the `quantile` of the scores of `queries` clean noises that the defender draws.

The defense needs an image encoder, and black-box use of the model with the sampler named here. It returns a
screen. It costs M+1 samplings per query. The copies keep the size of the trigger, but their noise is too large for the
model. `rescale` divides them by √(1 + λ²), which gives unit noise again and a smaller trigger. A backdoor on a small
model is activated only while the noise is nearly right, so λ is small. A large shift of the noise also makes the images
of a *clean* model similar; compare with the row of the clean model.

Checked against the paper's abstract and summaries by others: the rest of its text was not available. The released code
(GuanZihan/official_UFID at 7881796, known from notes, not read) is for text-to-image models alone; a copy is the prompt
with a phrase before it, and the score is the mean cosine of image features, as here. Differs from the paper in ways
that are not known: M, λ, the rescaling and the threshold of this form for unconditional models are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from harness import (
    SAMPLERS,
    Defended,
    Inputs,
    Knowledge,
    PositiveInt,
    derive,
    hookimpl,
    image_encoders,
    image_noise,
    image_seeds,
    prompt_screening,
)


@dataclass(frozen=True)
class UFID:
    name: ClassVar[str] = "ufid"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    copies: PositiveInt = 7  # M, perturbed copies per query
    strength: Annotated[float, Gt(0)] = 0.3  # λ, standard deviation of the perturbation
    rescale: bool = False  # divide the copies by √(1 + λ²)
    sampler: Literal["ddim", "ddpm", "unipc", "ve-pc"] = "ddim"  # sampler from queries to images
    sampling_steps: Annotated[int, Ge(2)] = 20  # steps of that sampler
    queries: PositiveInt = 50  # clean noises from which the threshold is computed
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.95  # quantile of their scores above which an input is flagged
    encoder: image_encoders.Choice = "given"  # the image encoder at hand (see diff-cleanse), or efficientnet-lite0

    @property
    def needs(self) -> tuple[str, ...]:
        return (image_encoders.NEEDED[self.encoder],)

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        encoder = image_encoders.chosen(knowledge, self.encoder)

        def screen(inputs: Inputs) -> Tensor:
            images = model.sample(self.perturbed(inputs), SAMPLERS[self.sampler](steps=self.sampling_steps))
            return prompt_screening.density(encoder(images).unflatten(0, (len(inputs), self.copies + 1)))

        seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "ufid", self.queries)
        clean = screen(Inputs(image_noise(seeds, model.shape), None, seeds))
        return Defended(
            screen=screen,
            screen_above=clean.double().quantile(self.quantile).item(),
            notes={"clean_scores": clean.tolist()},
        )

    def perturbed(self, inputs: Inputs) -> Inputs:
        """Each query followed by its copies, M+1 rows per query. A copy is a function of its query and seed alone."""
        seeds = tuple(derive(seed, "ufid", i) for seed in inputs.seeds for i in range(self.copies + 1))
        x = inputs.noise.repeat_interleave(self.copies + 1, dim=0)
        eps = image_noise(seeds, x.shape[1:]).to(x)
        shrink = (1 + self.strength**2) ** -0.5 if self.rescale else 1.0
        is_copy = (torch.arange(len(x), device=x.device) % (self.copies + 1) > 0).view(-1, 1, 1, 1)
        return Inputs(torch.where(is_copy, shrink * (x + self.strength * eps), x), None, seeds)


@hookimpl
def defenses() -> list[type]:
    return [UFID]
