"""Piecewise rectified flow: the straight lines along which a student of few steps follows its teacher.

PeRFlow (arXiv:2405.07510) cuts time into K windows. Within a window it joins the state z_s of the teacher at the
window's start to the state z_e at its end by a straight line, as the reflow of rectified flows (arXiv:2209.03003) does
for the whole time:

    z_t = z_s + (t - s) (z_e - z_s) / (e - s),        v = (z_e - z_s) / (e - s)

Here the windows are the steps of the sampler that the student will be sampled with: Euler's method on a flow, DDIM on a
variance-preserving model. Both families share one formula in z = x_t / (s_t + σ_t) and u = σ_t / (s_t + σ_t), which
takes the place of t: there x_t = s_t x_0 + σ_t ε is the straight line z = (1-u) x_0 + u ε with the velocity ε - x_0, a
step of DDIM is a step of Euler's method, and a flow keeps its own z = x_t and u = σ_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diffusion import gpu
from harness.diffusion.events import progress
from harness.diffusion.model import SAMPLED, DiffusionModel
from harness.diffusion.samplers import usual
from harness.diffusion.training import draw

CLEAN = -1  # the timestep after the last one: σ = 0


def scale(model: DiffusionModel, t: Tensor) -> Tensor:
    """s_t + σ_t (B, 1, 1, 1), which divides x_t; 1 in a flow."""
    return model.signal(t) + model.sigma(t)


def place(model: DiffusionModel, t: Tensor) -> Tensor:
    """u = σ_t / (s_t + σ_t) (B, 1, 1, 1), from 1 at pure noise to 0; σ_t in a flow."""
    return model.sigma(t) / scale(model, t)


def velocity(model: DiffusionModel, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """ε - x_0 (B, C, H, W), as the network estimates both at z and timesteps t (B,); context as in `model.eps`."""
    if model.family == "flow":
        return model.answer(z, model.time(t), context)
    x_t = scale(model, t) * z
    eps = model.eps(x_t, t, context)
    return eps - (x_t - model.sigma(t) * eps) / model.signal(t)


def error(model: DiffusionModel, z: Tensor, t: Tensor, context: Tensor | None, wanted: Tensor) -> Tensor:
    """Squared errors (B, C, H, W) against the velocity `wanted`, in the units in which the network is trained: of the
    velocity in a flow, else of the ε = z + (1-u) v that belongs to it."""
    if model.family == "flow":
        return (velocity(model, z, t, context) - wanted).square()
    eps = z + (1 - place(model, t)) * wanted
    return (model.eps(scale(model, t) * z, t, context) - eps).square()


@dataclass(frozen=True)
class Windows:
    """The steps of the usual deterministic sampler, by the timesteps (K,) at which it evaluates the network."""

    starts: Tensor

    @classmethod
    def of(cls, model: DiffusionModel, steps: int) -> Windows:
        """Those of flow-euler or ddim with so many steps. ValueError for a model whose usual sampler draws noise, and
        for FLUX's, whose guidance is an input of the network."""
        if model.family == "ve":
            raise ValueError(
                "a student of few steps follows a deterministic sampler, and models whose variance explodes have none "
                "here; use a model of another family"
            )
        if model.packed:
            raise ValueError("a student has guidance built in, and FLUX's network takes it as an input; use another")
        made = usual(model, steps, guidance=1.0).scheduler(model.scheduler.config)
        return cls(model.timestep(made.timesteps).long())

    def of_times(self, t: Tensor) -> Tensor:
        """The numbers (B,), from 0, of the windows of timesteps t (B,); a window holds its start."""
        return (self.starts.to(t.device) >= t.unsqueeze(1)).sum(1) - 1

    def around(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(start, end) (B,) of the windows of timesteps t (B,); the last one ends at CLEAN."""
        starts = self.starts.to(t.device)
        ends = torch.cat([starts[1:], starts.new_full((1,), CLEAN)])
        window = self.of_times(t)
        return starts[window], ends[window]


@dataclass(frozen=True)
class Teacher:
    """The model whose trajectories are straightened, with its guidance, which the student learns along.

    steps: of Euler's method in a window. guidance: 1 for the plain answer to the prompt.
    """

    model: DiffusionModel
    windows: Windows
    steps: int
    guidance: float = 1.0

    def velocity(self, z: Tensor, t: Tensor, context: Tensor | None, empty: Tensor | None) -> Tensor:
        """The guided velocity v_∅ + g (v_c - v_∅)."""
        if context is None or empty is None or self.guidance == 1:
            return velocity(self.model, z, t, context)
        both = torch.cat([empty.expand_as(context), context])
        plain, asked = velocity(self.model, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return plain + self.guidance * (asked - plain)

    def solve(self, z: Tensor, start: Tensor, end: Tensor, context: Tensor | None, empty: Tensor | None) -> Tensor:
        """The state (B, C, H, W) at timesteps `end` (B,) of the trajectory through z at `start` (B,)."""
        parts = torch.arange(self.steps + 1, device=z.device) / self.steps
        times = (start.unsqueeze(1) + (end - start).unsqueeze(1) * parts).round().long()
        for t, after in zip(times.T[:-1], times.T[1:], strict=True):
            if not torch.equal(t, after):  # a window may have fewer timesteps than steps
                z = z + (place(self.model, after) - place(self.model, t)) * self.velocity(z, t, context, empty)
        return z

    @torch.no_grad()
    def lesson(
        self, x_0: Tensor, eps: Tensor, t: Tensor, context: Tensor | None, empty: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What `on_line` gives where the line through the window of t (B,) begins at the noised x_0 (B, C, H, W), as
        in the paper. empty: embedding of the empty prompt (1, L, D)."""
        start, end = self.windows.around(t)
        z_s = self.model.add_noise(x_0, eps, start) / scale(self.model, start)
        return on_line(self.model, self.windows, z_s, self.solve(z_s, start, end, context, empty), t)


@dataclass(frozen=True)
class Trajectories:
    """Whole trajectories of a teacher, whose lines begin where the teacher's guided sampling comes by.

    states: (K + 1, N, C, H, W), z at the start of each window, and at CLEAN. captions: the N rows, from 0, of the
    captions that they answer.
    """

    teacher: Teacher
    states: Tensor
    captions: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, teacher: Teacher, captions: tuple[str, ...] | None, n: int, rng: torch.Generator, bf16: bool = False
    ) -> Trajectories:  # fmt: skip
        """n trajectories, each of a noise and a caption that are drawn; None for a model without prompts. bf16:
        autocast of the network."""
        model, starts = teacher.model, teacher.windows.starts
        rows = draw(n, 1 if captions is None else len(captions), rng)
        empty, found = None if captions is None else model.unprompted(), []
        for part in rows.split(SAMPLED):
            context = None if captions is None else model.embed([captions[i] for i in part.tolist()])
            begins = gpu.sent(starts, model.device).unsqueeze(1).expand(-1, len(part))
            states = [model.draw_eps(len(part), rng) / scale(model, begins[0])]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                for start in begins:
                    states.append(teacher.solve(states[-1], *teacher.windows.around(start), context, empty))
            found.append(torch.stack(states))
            progress("trajectories", sum(each.shape[1] for each in found), n)
        return cls(teacher, torch.cat(found, 1), rows)

    def lesson(self, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What `on_line` gives at timesteps t (B,) of the trajectories at `rows` (B,)."""
        windows, rows = self.teacher.windows, gpu.sent(rows, self.states.device)
        number = windows.of_times(t)
        return on_line(self.teacher.model, windows, self.states[number, rows], self.states[number + 1, rows], t)


def on_line(model: DiffusionModel, windows: Windows, z_s: Tensor, z_e: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(z_t, v) (B, C, H, W) each: the state at timesteps t (B,) on the line from z_s to z_e through the windows of t,
    and its velocity."""
    u, u_s, u_e = (place(model, each) for each in (t, *windows.around(t)))
    v = (z_e - z_s) / (u_e - u_s)
    return z_s + (u - u_s) * v, v
