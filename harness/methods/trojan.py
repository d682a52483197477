"""The reverse processes of TrojDiff, which only the attacker runs: samplers that use the trigger at every step.

    x_t = √ᾱ_t x_0 + σ_t (γ ε + μ),    σ_t = √(1-ᾱ_t)              Chen, Song & Li, CVPR 2023, arXiv:2303.05762

With s the sampled timestep after t (σ_{-1} = 0), α = ᾱ_t / ᾱ_s, β = 1 - α and k_t = σ_t - √α σ_s:

    x̂_0 = (x_t - σ_t (γ ε_θ + μ)) / √ᾱ_t
    DDPM: x_s = [√ᾱ_s β x̂_0 + √α σ_s² x_t + (σ_s β - √α σ_s² k_t) μ] / σ_t² + γ (σ_s / σ_t) √β z
    DDIM: x_s = √ᾱ_s x̂_0 + σ_s μ + γ (√(σ_s² - c²) ε_θ + c z),    c = η (σ_s / σ_t) √β

γ and μ are images. Where γ = 1 and μ = 0 (outside a patch) the steps are the vanilla ones. Clean inputs are sampled by
the vanilla sampler, as in the paper: `vanilla()`. Inputs with a trigger are sampled by `with_trigger(trigger)`, for
every model and every trigger (a decoy included), because a user who wants to activate the backdoor controls the
sampling.

Differs from the official code (chenweixin107/TrojDiff at 680e7f1, known from notes, not read): z has the variance of
the posterior. The timesteps are evenly spaced from T-1 on; the official ones are quadratic from 0.8 T, a timestep to
which x_T does not belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from harness.diffusion.events import loop, progress
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, DDPM, SchedulerSampler, check_family, step_noise
from harness.diffusion.seeds import generator
from harness.methods.trigger_placement import scale_of
from harness.types import Family, Inputs


@dataclass(frozen=True)
class Step:
    """The terms of a step from t to s: ᾱ of both as scalars, μ and γ as images (C, H, W)."""

    a_bar: Tensor
    a_bar_next: Tensor
    mu: Tensor
    gamma: Tensor

    @property
    def sigma(self) -> Tensor:
        return (1 - self.a_bar).sqrt()

    @property
    def sigma_next(self) -> Tensor:
        return (1 - self.a_bar_next).sqrt()

    @property
    def alpha(self) -> Tensor:
        return self.a_bar / self.a_bar_next

    @property
    def k(self) -> Tensor:
        """k_t: the share of μ that the forward step from s to t adds."""
        return self.sigma - self.alpha.sqrt() * self.sigma_next

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the posterior of x_s for γ = 1."""
        return self.sigma_next / self.sigma * (1 - self.alpha).sqrt()

    def x_0(self, x_t: Tensor, eps: Tensor) -> Tensor:
        return (x_t - self.sigma * (self.gamma * eps + self.mu)) / self.a_bar.sqrt()

    def posterior(self, x_t: Tensor, x_0: Tensor) -> Tensor:
        """The mean of q(x_s | x_t, x_0)."""
        beta, alpha, variance = 1 - self.alpha, self.alpha, 1 - self.a_bar_next
        kept = self.a_bar_next.sqrt() * beta * x_0 + alpha.sqrt() * variance * x_t
        shift = (self.sigma_next * beta - alpha.sqrt() * variance * self.k) * self.mu
        return (kept + shift) / (1 - self.a_bar)


@dataclass(frozen=True)
class Trojan:
    """A sampler together with the trigger that its inputs carry."""

    sampler: Any
    trigger: Any

    @property
    def nfe(self) -> int:
        return self.sampler.nfe

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        """x_0 (B, C, H, W) from `inputs.noise` = γ ε + μ, which already carries the trigger."""
        check_family(self.sampler, model)
        sampler, x_t = self.sampler, inputs.noise
        shape = x_t.shape[1:]
        mu, gamma = (f.to(x_t) for f in (self.trigger.delta(shape), scale_of(self.trigger, shape)))
        rngs = [generator(seed, "steps") for seed in inputs.seeds]
        for now, (t, s) in enumerate(loop("sampling", list(self._pairs(model)))):
            ts = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
            a_bar, a_bar_next = (model.alpha_bar(at).to(x_t) for at in (ts[:1], torch.full_like(ts[:1], s)))
            step = Step(a_bar, a_bar_next, mu, gamma)
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=sampler.bf16):
                eps = model.eps(x_t, ts)
            x_0 = step.x_0(x_t, eps)
            x_0 = x_0.clamp(-1, 1) if sampler.clip else x_0
            x_t = sampler.step(step, x_t, x_0, eps, step_noise(x_t, rngs))
            if now % 20 == 19:
                progress("sampling", now + 1, sampler.steps)
        return x_t

    def _pairs(self, model: DiffusionModel) -> Iterator[tuple[int, int]]:
        """(t, s) of every step: the timesteps of the vanilla sampler, then -1."""
        timesteps = self.sampler.vanilla().scheduler(model.scheduler.config).timesteps.tolist()
        yield from zip(timesteps, [*timesteps[1:], -1], strict=True)


class _OnBiasedNoise:
    """Base of both reverse processes: inputs with a trigger use `with_trigger`, others use the vanilla sampler."""

    family: ClassVar[Family] = "vp"
    biased_noise: ClassVar[bool] = True
    steps: int

    def vanilla(self) -> SchedulerSampler:
        raise NotImplementedError

    @property
    def nfe(self) -> int:
        return self.steps

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        return self.vanilla().run(model, inputs)

    def with_trigger(self, trigger: Any) -> Trojan:
        return Trojan(self, trigger)


@dataclass(frozen=True)
class TrojanDDIM(_OnBiasedNoise):
    """TrojDiff's DDIM for inputs with a trigger, the vanilla DDIM for others. Chen, Song & Li, arXiv:2303.05762."""

    name: ClassVar[str] = "trojan-ddim"
    version: ClassVar[int] = 1

    steps: Annotated[int, Ge(1), Le(1000)] = 50  # sampling steps
    clip: bool = False  # clip the predicted x_0 to [-1, 1] each step; official: no
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"  # timestep spacing; trailing starts at T-1
    eta: Annotated[float, Ge(0), Le(1)] = 0.0  # share of DDPM's noise added back each step
    bf16: bool = False  # autocast of the network: faster, and other numbers

    def vanilla(self) -> DDIM:
        return DDIM(steps=self.steps, clip=self.clip, spacing=self.spacing, eta=self.eta, bf16=self.bf16)

    def step(self, step: Step, x_t: Tensor, x_0: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        c = self.eta * step.deviation
        noise = (1 - step.a_bar_next - c.square()).clamp_min(0).sqrt() * eps + c * z
        return step.a_bar_next.sqrt() * x_0 + step.sigma_next * step.mu + step.gamma * noise


@dataclass(frozen=True)
class TrojanDDPM(_OnBiasedNoise):
    """TrojDiff's DDPM for inputs with a trigger, the vanilla DDPM for others. Chen, Song & Li, arXiv:2303.05762."""

    name: ClassVar[str] = "trojan-ddpm"
    version: ClassVar[int] = 1

    steps: Annotated[int, Ge(1), Le(1000)] = 1000  # sampling steps
    clip: bool = True  # clip the predicted x_0 to [-1, 1] each step; official: yes
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"  # timestep spacing; trailing starts at T-1
    bf16: bool = False  # autocast of the network: faster, and other numbers

    def vanilla(self) -> DDPM:
        return DDPM(steps=self.steps, clip=self.clip, spacing=self.spacing, bf16=self.bf16)

    def step(self, step: Step, x_t: Tensor, x_0: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        return step.posterior(x_t, x_0) + step.gamma * step.deviation * z


TROJAN_SAMPLERS: dict[str, Any] = {cls.name: cls for cls in (TrojanDDIM, TrojanDDPM)}
