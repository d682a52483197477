"""Inference-time clipping, the mitigation of BadDiffusion's own authors. Chou, Chen & Ho, "How to Backdoor Diffusion
Models?", CVPR 2023, arXiv:2212.05400.

    x_t:  after every sampling step, x_{t-1} ← clamp(x_{t-1}, -1, 1)
    x_0:  within every sampling step, the predicted x_0 ← clamp(x̂_0, -1, 1)

A trigger moves the states of the sampling process out of the images' range, BadDiffusion's predicted x_0 by up to 77 r;
clipping keeps it from getting there. The paper clips x_t, which costs the images of many samplers much; clipping
x_0 costs next to nothing, and is what the official code's option does under DDPM and DDIM. Where a scheduler's state is
x_t / √ᾱ_t (Heun), it is x_t that is clipped. Needs nothing; returns a sampler that wraps the cell's. For
variance-preserving models in pixels: ValueError where the cell's sampler has nothing to clip, and in latents, which
have no range. An attacker's own reverse process is not the defender's to clip.

Differs from the paper: `x_0` is beside it, as a field. Differs from the official code (IBM/BadDiffusion at 717b321,
known from our notes on it): one option does either, by the pipeline (x_0 under DDPM and DDIM, x_t under PNDM).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.diffusion import DDIM, Family
from harness.hookspecs import hookimpl
from harness.samplers import SchedulerSampler
from harness.types import Defended, Inputs, Knowledge


@dataclass(frozen=True)
class Clipping:
    """A sampler around another that clips x_t after every step, the predicted x_0 within it, or both."""

    name: ClassVar[str] = "clipping"
    version: ClassVar[int] = 1
    family: ClassVar[Family] = "vp"

    x_t: bool = True  # clamp the state to [-1, 1] after every step
    x_0: bool = False  # clamp the predicted x_0 to [-1, 1] in every step

    def __post_init__(self) -> None:
        if not (self.x_t or self.x_0):
            raise ValueError("nothing to clip; use x_t=True, x_0=True or both")

    def around(self, inner: Any) -> Any:
        """`inner` with clipping. ValueError unless it is a diffusers scheduler on a variance-preserving model."""
        if not isinstance(inner, SchedulerSampler):
            raise ValueError(
                f"clipping wraps samplers of variance-preserving models, not {getattr(inner, 'name', inner)}; use "
                "ddim, ddpm, pndm, unipc, ..."
            )
        return bounded(replace(inner, clip=True) if self.x_0 else inner, self.x_t)

    @property
    def nfe(self) -> int:
        return DDIM().nfe

    def run(self, model: Any, inputs: Inputs) -> Tensor:
        """x_0 (B, C, H, W) by DDIM, for whoever names this sampler alone."""
        return self.around(DDIM()).run(model, inputs)


def bounded(inner: SchedulerSampler, x_t: bool) -> SchedulerSampler:
    """`inner` for models of pixels only; with x_t, its scheduler's every step ends with x_t in [-1, 1]."""

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
                bound = 1 / made.scale_model_input(torch.ones_like(done.prev_sample), t)  # 1 where the state is x_t
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

    x_t: bool = True  # clamp the state to [-1, 1] after every sampling step; the paper's
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
