"""The samplers: diffusers schedulers, run by a loop of this harness.

The loop replaces diffusers' pipelines, because pipelines of pixel models accept no starting noise, and PNDMPipeline
silently replaces the scheduler that it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from harness.diffusion import gpu, schedules
from harness.diffusion.events import loop, progress
from harness.diffusion.seeds import generator
from harness.types import Family, Inputs, Sampler

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

# The entries of a scheduler's config that belong to the model. They are passed explicitly: diffusers' from_config
# replaces defaults of the model's scheduler by the defaults of the new class, and Heun's default betas differ.
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


class Scheduled:
    """The loop of a sampler that steps a diffusers scheduler. A subclass has the fields and the scheduler's options."""

    name: ClassVar[str]
    family: ClassVar[Family]
    scheduler_class: ClassVar[str]
    noise: ClassVar[tuple[str, ...]]  # the entries of the model's scheduler config that are passed on
    clips: ClassVar[bool] = False  # whether diffusers' scheduler clips the predicted x_0 itself

    steps: int
    clip: bool
    guidance: float
    bf16: bool

    def options(self) -> dict[str, Any]:
        """Scheduler options in addition to the common ones."""
        return {"clip_sample": self.clip} if self.clips else {}

    def step_options(self, rngs: list[torch.Generator]) -> dict[str, Any]:
        """Keyword arguments of each `step` call. rngs: one generator per image."""
        return {}

    def scheduler(self, config: Any) -> Any:
        """A new scheduler with the model's noise and this sampler's options.

        Raises TypeError if diffusers returns another class than the requested one.
        """
        facts = {name: config[name] for name in self.noise if name in config}
        made = made_as_asked(self.scheduler_class, config, **facts, **self.options())
        made.set_timesteps(self.steps)
        return made

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        check_family(self, model)
        scheduler = self.scheduler(model.scheduler.config)
        rngs = [generator(seed, "steps") for seed in inputs.seeds]
        predict = self.predictor(model, inputs)
        x_t = inputs.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        # diffusers' schedulers look a timestep up on the host, and the network takes it on its device
        times = list(zip(scheduler.timesteps, scheduler.timesteps.to(x_t.device), strict=True))
        for step, (t, time) in enumerate(loop("sampling", times)):
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
                scaled = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
                out = predict(scaled, time).float()
            if self.clip and not self.clips:
                out = clipped(model, scaled, time, out)
            x_t = scheduler.step(out, t, x_t, **self.step_options(rngs)).prev_sample
            if step % 20 == 19:
                progress("sampling", step + 1, len(times))
        return x_t

    def predictor(self, model: DiffusionModel, inputs: Inputs) -> Any:
        """(x_t, t) → the network's output, with guidance if the model takes prompts."""
        if not model.conditional:
            return model.answer
        assert inputs.prompts is not None, "a text-to-image model needs prompts"
        context = model.embed(inputs.prompts)
        if model.packed:
            return lambda x_t, t: model.answer(x_t, t, context, self.guidance)
        if self.guidance == 1:
            return lambda x_t, t: model.answer(x_t, t, context)
        both = torch.cat([model.unprompted().expand_as(context), context])

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            plain, asked = model.answer(torch.cat([x_t, x_t]), t, both).chunk(2)
            return plain + self.guidance * (asked - plain)

        return guided


@dataclass(frozen=True)
class SchedulerSampler(Scheduled):
    """A diffusers scheduler on a variance-preserving model.

    x_T is the unit noise times the scheduler's `init_noise_sigma` (1, but 157 for Heun). Every batch gets its own
    scheduler, because multistep schedulers keep a memory. Steps that divide T are spaced evenly; diffusers' ddim and
    pndm assume this.
    """

    version: ClassVar[int] = 1
    family: ClassVar[Family] = "vp"
    noise: ClassVar[tuple[str, ...]] = NOISE

    steps: Annotated[int, Ge(1), Le(1000)] = 50  # sampling steps
    clip: bool = False  # clip the predicted x_0 to [-1, 1] at each step; disables the backdoors of the papers
    guidance: Annotated[float, Ge(0)] = 3.0  # classifier-free guidance scale; text-to-image only, 1 = off
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"  # timestep spacing; trailing starts at T-1
    bf16: bool = False  # autocast of the network: faster, and other numbers

    def options(self) -> dict[str, Any]:
        return {**super().options(), "timestep_spacing": self.spacing}

    @property
    def nfe(self) -> int:
        return len(self.scheduler({"num_train_timesteps": 1000, "beta_schedule": "linear"}).timesteps)


@dataclass(frozen=True)
class DDIM(SchedulerSampler):
    """Song, Meng & Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502. eta = 0 is the ODE."""

    name: ClassVar[str] = "ddim"
    scheduler_class: ClassVar[str] = "DDIMScheduler"
    clips: ClassVar[bool] = True

    eta: Annotated[float, Ge(0), Le(1)] = 0.0  # share of DDPM's noise added back each step

    def options(self) -> dict[str, Any]:
        return {**super().options(), "thresholding": False}

    def step_options(self, rngs: list[torch.Generator]) -> dict[str, Any]:
        return {"eta": self.eta, "generator": rngs}


@dataclass(frozen=True)
class DDPM(SchedulerSampler):
    """Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (ancestral)."""

    name: ClassVar[str] = "ddpm"
    scheduler_class: ClassVar[str] = "DDPMScheduler"
    clips: ClassVar[bool] = True

    steps: Annotated[int, Gt(0), Le(1000)] = 1000  # sampling steps

    def options(self) -> dict[str, Any]:
        return {**super().options(), "thresholding": False}

    def step_options(self, rngs: list[torch.Generator]) -> dict[str, Any]:
        return {"generator": rngs}


@dataclass(frozen=True)
class PNDM(SchedulerSampler):
    """Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", ICLR 2022, arXiv:2202.09778.

    Three Runge-Kutta steps of four evaluations each, then linear multistep.
    """

    name: ClassVar[str] = "pndm"
    scheduler_class: ClassVar[str] = "PNDMScheduler"

    steps: Annotated[int, Ge(4), Le(500)] = 50  # sampling steps; network evaluations are 9 more

    def options(self) -> dict[str, Any]:
        # ᾱ_{-1} = 1: end at x_0, not one step before
        return {**super().options(), "skip_prk_steps": False, "set_alpha_to_one": True}


@dataclass(frozen=True)
class DEIS(SchedulerSampler):
    """Zhang & Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", ICLR 2023, arXiv:2204.13902.

    It ends at t = 0, where noise of size √(1-ᾱ_0) remains, as in diffusers' scheduler.
    """

    name: ClassVar[str] = "deis"
    scheduler_class: ClassVar[str] = "DEISMultistepScheduler"

    steps: Annotated[int, Ge(1), Le(1000)] = 20  # sampling steps
    order: Annotated[int, Ge(1), Le(3)] = 2  # of the multistep method

    def options(self) -> dict[str, Any]:
        return {**super().options(), "solver_order": self.order, "thresholding": False}


@dataclass(frozen=True)
class DPMSolver(SchedulerSampler):
    """Lu et al., "DPM-Solver", NeurIPS 2022, arXiv:2206.00927, multistep.

    It ends at t = 0, where noise of size √(1-ᾱ_0) remains: its steps are in the predicted noise and cannot reach σ = 0.
    """

    name: ClassVar[str] = "dpm-solver"
    scheduler_class: ClassVar[str] = "DPMSolverMultistepScheduler"
    algorithm: ClassVar[str] = "dpmsolver"
    last: ClassVar[str] = "sigma_min"

    steps: Annotated[int, Ge(1), Le(1000)] = 20  # sampling steps
    order: Annotated[int, Ge(1), Le(3)] = (
        2  # order of the multistep method; with fewer than 15 steps the last ones are of lower order
    )

    def options(self) -> dict[str, Any]:
        return {
            **super().options(), "algorithm_type": self.algorithm, "final_sigmas_type": self.last,
            "solver_order": self.order, "thresholding": False,
        }  # fmt: skip


@dataclass(frozen=True)
class DPMSolverPP(DPMSolver):
    """Lu et al., "DPM-Solver++", arXiv:2211.01095, multistep (2M is order 2). Order 1 is DDIM."""

    name: ClassVar[str] = "dpm-solver-pp"
    algorithm: ClassVar[str] = "dpmsolver++"
    last: ClassVar[str] = "zero"


@dataclass(frozen=True)
class UniPC(SchedulerSampler):
    """Zhao et al., "UniPC", NeurIPS 2023, arXiv:2302.04867, in x_0 with B_2(h).

    The corrector reuses the evaluation of the next step.
    """

    name: ClassVar[str] = "unipc"
    scheduler_class: ClassVar[str] = "UniPCMultistepScheduler"

    steps: Annotated[int, Ge(1), Le(1000)] = 20  # sampling steps
    order: Annotated[int, Ge(1), Le(3)] = 2  # order of the predictor; the corrector has one order more

    def options(self) -> dict[str, Any]:
        return {
            **super().options(), "solver_order": self.order, "final_sigmas_type": "zero", "thresholding": False,
        }  # fmt: skip


@dataclass(frozen=True)
class Heun(SchedulerSampler):
    """Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022,
    arXiv:2206.00364.

    Algorithm 1: two evaluations per step, one in the last step.
    """

    name: ClassVar[str] = "heun"
    scheduler_class: ClassVar[str] = "HeunDiscreteScheduler"
    clips: ClassVar[bool] = True


@dataclass(frozen=True)
class FlowSampler(Scheduled):
    """A diffusers scheduler on a flow: dx/dσ = v from σ = 1, where x is the unit noise, to σ = 0.

    The levels σ are those that diffusers gives StableDiffusion3Pipeline: evenly spaced from 1 to that of the first
    timestep, shifted by the model's `shift`, and 0. With a shift of 1 the last step is therefore of length 1/T. Of FLUX
    they are those of FluxPipeline: evenly spaced from 1 to 1/steps, shifted, and 0. Its `guidance` is an input of the
    network, which is evaluated once per step; networks without that input ignore it.
    """

    version: ClassVar[int] = 1
    family: ClassVar[Family] = "flow"
    noise: ClassVar[tuple[str, ...]] = ("num_train_timesteps", "shift")

    steps: Annotated[int, Ge(1), Le(1000)] = 28  # sampling steps; the default of StableDiffusion3Pipeline
    clip: bool = False  # clip the predicted x_0 to [-1, 1] at each step; disables the backdoors of the papers
    guidance: Annotated[float, Ge(0)] = 3.0  # classifier-free guidance scale; text-to-image only, 1 = off
    bf16: bool = False  # autocast of the network: faster, and other numbers

    @property
    def nfe(self) -> int:
        return len(self.scheduler({"num_train_timesteps": 1000, "shift": 1.0}).timesteps)


@dataclass(frozen=True)
class FlowEuler(FlowSampler):
    """Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", ICML 2024,
    arXiv:2403.03206. Euler's method."""

    name: ClassVar[str] = "flow-euler"
    scheduler_class: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    def scheduler(self, config: Any) -> Any:
        made = super().scheduler(config)
        if config.get(schedules.EVEN):
            made.set_timesteps(sigmas=[1 - i / self.steps for i in range(self.steps)])
        return made


@dataclass(frozen=True)
class FlowHeun(FlowSampler):
    """Heun's method on a flow (Karras et al., NeurIPS 2022, arXiv:2206.00364, Algorithm 1, as diffusers has it for
    flows).

    Two evaluations per step, one in the last step. Of FLUX it has the levels of StableDiffusion3Pipeline, because
    diffusers' scheduler takes no others.
    """

    name: ClassVar[str] = "flow-heun"
    scheduler_class: ClassVar[str] = "FlowMatchHeunDiscreteScheduler"

    steps: Annotated[int, Ge(1), Le(500)] = 14  # sampling steps; network evaluations are nearly twice as many


@dataclass(frozen=True)
class PredictorCorrector:
    """Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    arXiv:2011.13456.

    Algorithm 2 for variance-exploding models: Langevin steps, then one reverse-diffusion step.

    Differs from diffusers' scheduler: the length of a Langevin step follows from the norms of the image itself, not
    from their mean over the batch, so that an image does not depend on its batch. Each correction shrinks a trigger by
    about snr² of its size. Many small steps with a large snr therefore lose the backdoors of VillanDiffusion; without
    corrections they are kept.
    """

    name: ClassVar[str] = "ve-pc"
    version: ClassVar[int] = 1
    family: ClassVar[Family] = "ve"

    steps: Annotated[int, Ge(2), Le(2000)] = 100  # noise levels; enough at 16 pixels, the papers use 2000 at 256
    corrections: Annotated[int, Ge(0), Le(10)] = 1  # Langevin steps per level; 0 = ancestral sampling
    snr: Annotated[float, Gt(0), Le(1)] = 0.075  # signal-to-noise ratio of a Langevin step; VillanDiffusion's value

    @property
    def nfe(self) -> int:
        return self.steps * (1 + self.corrections)

    def scheduler(self, config: Any) -> Any:
        """A new scheduler with the model's noise levels. Raises TypeError if diffusers returns another class."""
        made = made_as_asked("ScoreSdeVeScheduler", config, snr=self.snr, correct_steps=self.corrections)
        made.set_timesteps(self.steps)
        made.set_sigmas(self.steps)
        return made

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        check_family(self, model)
        scheduler = self.scheduler(model.scheduler.config)
        rngs = [generator(seed, "steps") for seed in inputs.seeds]
        x_t = mean = inputs.noise * scheduler.init_noise_sigma
        levels = list(zip(scheduler.timesteps, scheduler.sigmas.to(x_t), strict=True))
        for step, (t, sigma) in enumerate(loop("sampling", levels)):
            level = sigma.expand(len(x_t))
            for _ in range(self.corrections):
                score = model.denoiser(x_t, level).sample
                x_t = self.correct(x_t, score, step_noise(x_t, rngs))
            out = scheduler.step_pred(model.denoiser(x_t, level).sample, t, x_t, generator=rngs)
            x_t, mean = out.prev_sample, out.prev_sample_mean
            if step % 20 == 19:
                progress("sampling", step + 1, self.steps)
        return mean

    def correct(self, x_t: Tensor, score: Tensor, noise: Tensor) -> Tensor:
        """One Langevin step; each row equals the result of diffusers' `step_correct` for a batch of one."""
        norms = [v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (noise, score)]
        length = 2 * (self.snr * norms[0] / norms[1]) ** 2
        return x_t + length * score + (2 * length).sqrt() * noise


def step_noise(x_t: Tensor, rngs: list[torch.Generator]) -> Tensor:
    """Unit noise of the shape of x_t (B, C, H, W), row i from the i-th generator."""
    drawn = torch.stack([torch.randn(x_t.shape[1:], generator=rng) for rng in rngs])
    return gpu.sent(drawn, x_t.device).to(x_t.dtype)


def clipped(model: DiffusionModel, x_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """The network's output (B, C, H, W) at x_t and t (scalar), changed so that the predicted x_0 is in [-1, 1]."""
    if model.family == "flow":
        level = t / model.T
        return (x_t - (x_t - level * out).clamp(-1, 1)) / level
    signal, sigma = (f(t.reshape(1).to(x_t.device)) for f in (model.signal, model.sigma))
    velocity = model.scheduler.config.prediction_type == "v_prediction"
    x_0 = (signal * x_t - sigma * out if velocity else (x_t - sigma * out) / signal).clamp(-1, 1)
    eps = (x_t - signal * x_0) / sigma
    return signal * eps - sigma * x_0 if velocity else eps


def made_as_asked(name: str, config: Any, **options: Any) -> Any:
    """A new diffusers scheduler of the class `name`. Raises TypeError if diffusers returns another class."""
    import diffusers

    cls = getattr(diffusers, name)
    config = {key: value for key, value in config.items() if key != schedules.EVEN}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dpmsolver", category=FutureWarning)  # deprecated there, not here
        made = cls.from_config(config, **options)
    if type(made) is not cls:
        raise TypeError(f"asked for {cls.__name__}, got {type(made).__name__}")
    return made


class AroundAnother:
    """Base of a registered sampler that a defense delivers around the cell's (a WrappingSampler): a subclass defines
    `around`. A cell that names it alone samples around ddim."""

    def around(self, inner: Sampler) -> Any:
        raise NotImplementedError

    @property
    def nfe(self) -> int:
        return self.around(DDIM()).nfe

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        return self.around(DDIM()).run(model, inputs)


@dataclass(frozen=True)
class OnChangedPrompts:
    """The sampler `inner` on the prompts that `change` makes of (model, inputs), as many as before. name: of the
    sampler that changes them, for messages."""

    inner: Any
    change: Callable[[Any, Inputs], Sequence[str]]
    name: str

    @property
    def nfe(self) -> int:
        return self.inner.nfe

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        assert inputs.prompts is not None, f"{self.name} is for models that take prompts"
        return self.inner.run(model, inputs.with_prompts(self.change(model, inputs)))


def check_family(sampler: Any, model: DiffusionModel) -> None:
    """Raises ValueError if the sampler integrates another process than that of the model."""
    if sampler.family != model.family:
        words = {"vp": "variance-preserving", "ve": "variance-exploding", "flow": "flow-matching"}
        fit = ", ".join(name for name, cls in SAMPLERS.items() if cls.family == model.family)
        raise ValueError(
            f"{sampler.name} samples {words[sampler.family]} models, this one is {words[model.family]}; use {fit}"
        )


def usual(model: DiffusionModel, steps: int, **options: Any) -> Any:
    """The sampler with which methods sample a model themselves: ddim, flow-euler for a flow, or predictor and corrector
    with twice the steps if variance explodes. options: guidance and bf16, which the last of them does not have."""
    if model.family == "ve":
        return PredictorCorrector(steps=2 * steps)
    return FlowEuler(steps=steps, **options) if model.family == "flow" else DDIM(steps=steps, **options)


SAMPLERS: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (
        DDIM,
        DDPM,
        PNDM,
        DEIS,
        DPMSolver,
        DPMSolverPP,
        UniPC,
        Heun,
        PredictorCorrector,
        FlowEuler,
        FlowHeun,
    )
}
