"""Edits the latents of a prompt with the trigger during sampling: masked regions are replaced by clean latents.

SAU, spatial attention unlearning. "Backdoor Defense in Diffusion Models via Spatial Attention Unlearning",
arXiv:2504.18563. The 2024 text of "Sealing the Backdoor", section 3.2, calls it "feature unlearning guided by spatial
attention". It edits latents at inference and changes no weight.

Two generations from the same noise give latents h_poi (triggered prompt) and h_clean (prompt without the trigger). The
method has five steps:

    1. h_trig = h_poi - h_clean
    2. s = cos(h_poi, h_trig) over the channels, at each location
    3. m_p = [s > threshold], m_s = [blur(activation) > secondary threshold], blur is Gaussian
    4. both masks are smoothed by a sigmoid: σ((s - threshold) / softness)
    5. h = h_poi (1-m_p)(1-m_s) + a h_clean m_p + a/2 h_clean m_s      (equation 1), then blurred and decoded

The defense needs the trigger. It needs clean prompts to check that the trigger can be removed from a prompt again. It
returns a sampler that wraps the sampler of the cell. A prompt without the trigger is sampled without any edit. The
triggered part of the image is replaced by that of the prompt without the trigger. Removal therefore depends on how well
the masks cover the target, and works only for targets with a location. The paper does not ask whether generating from
h_clean alone would do as well.

Differs from the paper: the paper gives no threshold, slope, blur, a, step or layer, and there is no public code. All
are fields here, and the defaults are ours. The activation map is assumed to be ‖h_trig‖ over the channels, divided by
its largest value. The weights of equation 1 sum to 1.5 where both masks are 1; `normalise` divides by their sum (not in
the paper). `last_steps` edits the latents after each of the last steps instead of only the final latents (the paper
does not specify which).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness import (
    AroundAnother,
    Defended,
    Fraction,
    Inputs,
    Knowledge,
    Removal,
    ScheduledSampler,
    hookimpl,
    offers,
    prompt_edits,
)


@dataclass(frozen=True)
class SpatialMasks:
    """The parameters of equation 1."""

    threshold: Annotated[float, Ge(-1), Le(1)] = 0.5  # threshold of the similarity s; the paper gives none
    secondary: Fraction = (
        0.25  # threshold of the blurred activation, a share of its largest value; the paper gives none
    )
    softness: Annotated[float, Gt(0)] = 0.05  # scale of both sigmoids; the paper gives none
    a: Annotated[float, Ge(0)] = 1.0  # weight of h_clean; the paper gives none
    spread: Fraction = 1 / 16  # σ of the activation's blur over the latents' side; the paper gives none
    blur: Fraction = 1 / 64  # σ of the last blur over the latents' side, 0 = none; the paper gives none
    normalise: bool = False  # divide equation 1 by the sum of its weights; not in the paper
    last_steps: Annotated[int, Ge(0)] = 0  # number of last sampling steps after each of which latents are edited; 0 =
    # only the final latents


@dataclass(frozen=True)
class SAU(SpatialMasks):
    name: ClassVar[str] = "sau"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("trigger", "prompts")
    requires_trigger: ClassVar[tuple[str, ...]] = ("text",)
    delivers: ClassVar[tuple[str, ...]] = ("sampler",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        removal = prompt_edits.removal_of(trigger, knowledge.prompts or ())
        return Defended(sampler=SAUSampler(**vars(self), text=removal.text, instead=removal.instead))


@dataclass(frozen=True)
class SAUSampler(AroundAnother, SpatialMasks):
    """Spatial attention unlearning around the cell's sampler (around ddim if it is used alone); see the defense sau."""

    name: ClassVar[str] = "sau"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    text: str = "\u200b"  # the trigger to search for in prompts
    instead: str = ""  # the text that the trigger replaced; "" = none, the trigger is a separate word

    def around(self, inner: Any) -> Around:
        return Around(self, inner)


@dataclass(frozen=True)
class Around:
    """The inner sampler with equation 1 after it, or after each of its last steps."""

    spec: SAUSampler
    inner: Any

    @property
    def nfe(self) -> int:
        """For a prompt with the trigger; a prompt without it takes half."""
        return 2 * self.inner.nfe

    def run(self, model: Any, inputs: Inputs) -> Tensor:
        assert inputs.prompts is not None, "sau is for models that take prompts"
        removal = Removal(self.spec.text, self.spec.instead)
        without = [removal.apply(prompt) for prompt in inputs.prompts]
        found = [i for i, (a, b) in enumerate(zip(inputs.prompts, without, strict=True)) if a != b]
        both = Inputs(
            torch.cat([inputs.noise, inputs.noise[found]]),
            (*inputs.prompts, *(without[i] for i in found)),
            (*inputs.seeds, *(inputs.seeds[i] for i in found)),
        )

        def edited(h: Tensor) -> Tensor:
            h, clean = h[: len(inputs)].clone(), h[len(inputs) :]
            h[found] = unlearned(self.spec, h[found], clean)
            return torch.cat([h, clean])

        if self.spec.last_steps:
            h = type(self.inner).run(_Steered(self.inner, edited, self.spec.last_steps), model, both)
        else:
            h = edited(self.inner.run(model, both))
        return h[: len(inputs)]


class _Steered:
    """A sampler whose scheduler edits the latents after each of its last steps."""

    def __init__(self, inner: Any, edit: Any, last: int) -> None:
        if not offers(inner, ScheduledSampler):
            raise ValueError(f"sau edits along the steps of a scheduler, and {inner!r} has none; use last_steps=0")
        self.inner, self.edit, self.last = inner, edit, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def scheduler(self, config: Any) -> Any:
        made = self.inner.scheduler(config)
        step, total, done = made.step, len(made.timesteps), 0

        def edited_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            out, done = step(*args, **kwargs), done + 1
            if done > total - self.last:
                out.prev_sample = self.edit(out.prev_sample)
            return out

        made.step = edited_step
        return made


def unlearned(spec: SpatialMasks, h_poi: Tensor, h_clean: Tensor) -> Tensor:
    """Equation 1, then blurred: latents (B, C, H, W)."""
    m_p, m_s = (mask.unsqueeze(1) for mask in masks(spec, h_poi, h_clean))
    weights = (1 - m_p) * (1 - m_s), spec.a * m_p, spec.a / 2 * m_s
    h = weights[0] * h_poi + (weights[1] + weights[2]) * h_clean
    if spec.normalise:
        h = h / (weights[0] + weights[1] + weights[2]).clamp_min(1e-6)
    return blurred(h, spec.blur)


def masks(spec: SpatialMasks, h_poi: Tensor, h_clean: Tensor) -> tuple[Tensor, Tensor]:
    """m_p and m_s (B, H, W), smoothed, in [0, 1]."""
    h_trig = h_poi - h_clean
    s = torch.nn.functional.cosine_similarity(h_poi, h_trig, dim=1)
    strength = h_trig.norm(dim=1)
    strength = strength / strength.amax((1, 2), keepdim=True).clamp_min(1e-6)
    spread = blurred(strength.unsqueeze(1), spec.spread).squeeze(1)
    return ((s - spec.threshold) / spec.softness).sigmoid(), ((spread - spec.secondary) / spec.softness).sigmoid()


def blurred(x: Tensor, share: float) -> Tensor:
    """x (B, C, H, W) blurred by a Gaussian whose σ is `share` of the side; 0 returns x unchanged."""
    from torchvision.transforms.v2.functional import gaussian_blur

    side = x.shape[-1]
    reach = min(round(4 * share * side + 0.5), side - 1)
    return gaussian_blur(x, [2 * reach + 1] * 2, [share * side] * 2) if share and len(x) else x


@hookimpl
def defenses() -> list[type]:
    return [SAU]


@hookimpl
def samplers() -> list[type]:
    return [SAUSampler]
