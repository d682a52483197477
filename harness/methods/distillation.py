"""Distillation of text-to-image models: prompts, latents for the distillation, and the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from harness.diffusion import gpu
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import usual
from harness.diffusion.seeds import image_noise, image_seeds
from harness.diffusion.training import Schedule, draw, minimize
from harness.types import Inputs

Latents = Literal["noise", "noised-clean", "trajectory"]


class LatentSource:
    """Latents (B, C, H, W) at timesteps t (B,) for prompts, on which student and teacher are compared.

    - noise: unit Gaussian at every t (as in the released code; out of distribution at low t).
    - noised-clean: noised latents of images that the model samples from the clean prompts.
    - trajectory: states x_t of the model's own denoising of the *triggered* prompts, on which the backdoor acts; t is
      then
      the timestep of the sampler.
    """

    def __init__(self, kind: Latents, model: DiffusionModel, clean: list[str], triggered: list[str], seed: int) -> None:
        self.kind, self.model = kind, model
        if kind == "noise":
            return
        seeds = image_seeds(seed, "latents", len(clean))
        prompts = clean if kind == "noised-clean" else triggered
        inputs = Inputs(image_noise(seeds, model.shape).to(model.device), tuple(prompts), seeds)
        self.times, self.states = trajectory(model, inputs)

    def draw(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(z_t, t) for the prompts at `rows` (B,)."""
        n, model = len(rows), self.model
        t, eps = model.draw_t(n, rng), model.draw_eps(n, rng)
        if self.kind == "noise":
            return eps, t
        if self.kind == "noised-clean":
            return model.add_noise(self.states[-1][gpu.sent(rows, self.states.device)], eps, t), t
        step = torch.randint(0, len(self.times), (n,), generator=rng)
        states, times = (gpu.sent(each, self.states.device) for each in (step, self.times[step]))
        return self.states[states, gpu.sent(rows, self.states.device)], times


@torch.no_grad()
def trajectory(model: DiffusionModel, inputs: Inputs, steps: int = 20, guidance: float = 3.0) -> tuple[Tensor, Tensor]:
    """(timesteps (S,), states (S+1, B, C, H, W)) of a deterministic sampler.

    State s belongs to timestep s (in a flow to the nearest one); the last state is x_0.
    """
    sampler = usual(model, steps, guidance=guidance)
    scheduler = sampler.scheduler(model.scheduler.config)
    predict = sampler.predictor(model, inputs)
    x_t, states = inputs.noise, [inputs.noise]
    for t in scheduler.timesteps:
        x_t = scheduler.step(predict(x_t, t), t, x_t).prev_sample
        states.append(x_t)
    return model.timestep(scheduler.timesteps), torch.stack(states)


def distil(
    student: DiffusionModel,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    source: LatentSource,
    prompts: int,
    rng: torch.Generator,
    *,
    steps: int,
    batch: int,
    lr: float,
    schedule: Schedule = "constant",
    bf16: bool,
) -> list[float]:
    """Trains the student's denoiser on loss(rows (B,), z_t, t (B,)) by AdamW with the released weight decay."""

    def step() -> Tensor:
        rows = draw(batch, prompts, rng)
        return loss(rows, *source.draw(rows, rng))

    return minimize(
        step, student.denoiser.parameters(), steps=steps, lr=lr, schedule=schedule, weight_decay=0.01, bf16=bf16,
        phase="distil",
    )  # fmt: skip
