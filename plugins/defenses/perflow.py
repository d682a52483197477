"""Distils a model to few sampling steps, with guidance built in: PeRFlow, piecewise rectified flow.

Yan, Liu, Pan, Liew, Liu & Feng, "PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator",
NeurIPS 2024, arXiv:2405.07510. It is not a defense. It asks whether a model that somebody distilled on clean prompts
keeps the backdoor of its teacher.

Time is cut into K windows. A clean image is noised to the start s of a window, z_s, and the frozen teacher φ, guided,
solves its ODE from there to the end e of the window. The student learns the straight line between the two states:

    z_e = Φ(z_s, s → e; φ),        z_t = z_s + (t - s) (z_e - z_s) / (e - s)
    L = ‖v_θ(z_t, t, τ(c)) - (z_e - z_s) / (e - s)‖²

The method needs clean examples (images, and captions for a text-to-image model). It returns a student that is sampled
with K steps and `guidance=1`, which is one network evaluation per step. Only the denoiser is trained, from the
teacher's weights. It works on flows and on variance-preserving models and refuses those whose variance explodes.

With `latents="trajectory"`, an extension that is off by default, no images are needed: the windows begin at the states
of the teacher's own guided sampling of noises and clean captions, of which `trajectories` are computed beforehand. Each
serves in many steps. Guidance pulls these states away from noised images, and the student is sampled on them.

Differs from the paper: the windows are the steps of flow-euler or ddim with K steps, instead of K windows of the same
length and a scheduler of their own, so that every program that samples the teacher samples the student. On a flow with
diffusers' levels, the last of the K windows has the length 1/T. Variance-preserving models are straightened in
z = x_t / (√ᾱ_t + √(1-ᾱ_t)) (harness.methods.piecewise_flow), in which a step of DDIM is straight; the paper
parameterises them by ε between two window ends. Differs from the official code (magic-research/piecewise-rectified-flow
at 3874a76, read there): latents are the means of the posterior. Its options `support_cfg` and `cfg_sync`, which leave
guidance out of the student, are not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    Defended,
    Examples,
    Fraction,
    Knowledge,
    LearningRate,
    PositiveInt,
    draw,
    hookimpl,
    minimize,
    piecewise_flow,
)

Lesson = tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]  # (z_t, v), t, context


@dataclass(frozen=True)
class PeRFlow:
    name: ClassVar[str] = "perflow"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ("data",)
    loops: ClassVar[tuple[str, ...]] = ("solving_steps", "trajectories")

    windows: PositiveInt = 4  # K, sampling steps of the student; released value
    solving_steps: PositiveInt = 8  # of the teacher in a window; released value
    guidance: Annotated[float, Ge(0)] = 7.5  # of the teacher, on models that take prompts; released value; 1 = off
    latents: Literal["noised-clean", "trajectory"] = "noised-clean"  # where the windows begin; the paper: noised-clean
    trajectories: PositiveInt = 1000  # of the teacher, for latents="trajectory"; not in the paper
    steps: PositiveInt = 4000  # optimizer steps; the released README's, for Stable Diffusion 1.5
    batch: PositiveInt = 16  # examples per step; released script: 16 per GPU; README: 1024 in all
    lr: LearningRate = 8e-5  # AdamW; released script, for 860 M weights, small models need about 3e-4
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; released: constant
    ema: Fraction = 0.9999  # decay of the weights' moving average; 0 = off; released: diffusers' default
    bf16: bool = True  # autocast of the forward passes

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        student = model.clone()
        windows = piecewise_flow.Windows.of(model, self.windows)
        teacher = piecewise_flow.Teacher(model, windows, self.solving_steps, self.guidance)
        lesson = self.on_trajectories if self.latents == "trajectory" else self.on_images
        draw_lesson = lesson(teacher, knowledge.data, rng)

        def loss() -> Tensor:
            (z_t, v), t, context = draw_lesson()
            return piecewise_flow.error(student, z_t, t, context, v).mean()

        losses = minimize(
            loss, student.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            weight_decay=1e-5, ema=self.ema, bf16=self.bf16, phase="distil",
        )  # fmt: skip
        return Defended(model=student, notes={"loss": losses[:: max(1, len(losses) // 50)]})

    def on_images(self, teacher: Any, data: Any, rng: torch.Generator) -> Callable[[], Lesson]:
        """Draws what the student learns where the windows begin at noised images."""
        model, examples = teacher.model, Examples(teacher.model, data)
        with torch.no_grad():
            empty = model.unprompted() if model.conditional else None

        def lesson() -> Lesson:
            batch = examples.batch(self.batch, rng)
            with torch.no_grad():
                context = model.embed(batch.captions) if model.conditional else None
            return teacher.lesson(batch.x_0, batch.eps, batch.t, context, empty), batch.t, context

        return lesson

    def on_trajectories(self, teacher: Any, data: Any, rng: torch.Generator) -> Callable[[], Lesson]:
        """The same where they begin at states of the teacher's sampling."""
        model, captions = teacher.model, data.captions if teacher.model.conditional else None
        rolled = piecewise_flow.Trajectories.of(teacher, captions, self.trajectories, rng, self.bf16)

        def lesson() -> Lesson:
            rows, t = draw(self.batch, self.trajectories, rng), model.draw_t(self.batch, rng)
            with torch.no_grad():
                asked = rolled.captions[rows].tolist()
                context = None if captions is None else model.embed([captions[i] for i in asked])
            return rolled.lesson(rows, t), t, context

        return lesson


@hookimpl
def defenses() -> list[type]:
    return [PeRFlow]
