"""Clips the states of the sampling process, so that the trigger cannot move them out of the range of images.

Inference-time clipping, the mitigation proposed by the authors of BadDiffusion. Chou, Chen & Ho, "How to Backdoor
Diffusion Models?", CVPR 2023, arXiv:2212.05400.

    x_t:  after every sampling step, x_{t-1} ← clamp(x_{t-1}, -1, 1)
    x_0:  within every sampling step, the predicted x_0 ← clamp(x̂_0, -1, 1)

A trigger moves the states of the sampling process out of the range of images; BadDiffusion moves the predicted x_0 by
up to 77 r. Clipping prevents this. The paper clips x_t, which degrades the images of many samplers strongly. Clipping
x_0 degrades them hardly at all; it is what the official code's option does under DDPM and DDIM. Where the state of a
scheduler is x_t / √ᾱ_t (Heun), x_t is clipped, not the state.

The defense needs nothing. It returns a sampler that wraps the sampler of the cell. It applies to variance-preserving
models in pixel space. Raises ValueError if the cell's sampler has nothing to clip, and for latent models, because
latents have no range. A defender cannot clip an attacker's own reverse process.

Differs from the paper: the field `x_0` is an additional option. Differs from the official code (IBM/BadDiffusion at
717b321, known from notes, not read): one option does either, depending on the pipeline (x_0 under DDPM and DDIM, x_t
under PNDM).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import AroundAnother, Defended, Family, Inputs, Knowledge, SchedulerSampler, hookimpl


@dataclass(frozen=True)
class Clipping(AroundAnother):
    """A sampler that wraps another one and clips x_t after every step, the predicted x_0 within it, or both."""

    name: ClassVar[str] = "clipping"
    version: ClassVar[int] = 1
    family: ClassVar[Family] = "vp"

    x_t: bool = True  # clamp the state to [-1, 1] after every step
    x_0: bool = False  # clamp the predicted x_0 to [-1, 1] in every step

    def __post_init__(self) -> None:
        if not (self.x_t or self.x_0):
            raise ValueError("nothing to clip; use x_t=True, x_0=True or both")

    def around(self, inner: Any) -> Any:
        """`inner` with clipping. Raises ValueError unless it is a diffusers scheduler for vp models."""
        if not isinstance(inner, SchedulerSampler):
            raise ValueError(
                f"clipping wraps samplers of variance-preserving models, not {getattr(inner, 'name', inner)}; use "
                "ddim, ddpm, pndm, unipc, ..."
            )
        return bounded(replace(inner, clip=True) if self.x_0 else inner, self.x_t)


def bounded(inner: SchedulerSampler, x_t: bool) -> SchedulerSampler:
    """`inner` for pixel models only; with x_t, every step of its scheduler ends with x_t in [-1, 1]."""

    class Bounded(type(inner)):
        def run(self, model: Any, inputs: Inputs) -> Tensor:
            if model.vae is not None:
                raise ValueError("clipping is for models that diffuse pixels: latents have no range to clip to")
            return super().run(model, inputs)

        def scheduler(self, config: Any) -> Any:
            made = super().scheduler(config)
            step = made.step

            def clamped(out: Tensor, t: Tensor, *args: Any, **options: Any) -> Any:
                done = step(out, t, *args, **options)
                bound = 1 / made.scale_model_input(torch.ones_like(done.prev_sample), t)  # 1 if the state is x_t
                done.prev_sample = done.prev_sample.clamp(-bound, bound)
                return done

            made.step = clamped if x_t else step
            return made

    return Bounded(**{f.name: getattr(inner, f.name) for f in fields(inner)})


@dataclass(frozen=True)
class Clip:
    name: ClassVar[str] = "clip"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("sampler",)

    x_t: bool = True  # clamp the state to [-1, 1] after every sampling step; the paper's method
    x_0: bool = False  # clamp the predicted x_0 to [-1, 1] in every step

    def __post_init__(self) -> None:
        Clipping(self.x_t, self.x_0)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        return Defended(sampler=Clipping(self.x_t, self.x_0))


@hookimpl
def defenses() -> list[type]:
    return [Clip]


@hookimpl
def samplers() -> list[type]:
    return [Clipping]
