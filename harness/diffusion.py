"""One face for the diffusion models under test, and the samplers by name.

A `DiffusionModel` wraps the parts of a real diffusers pipeline. Attacks and defenses see `eps`, `alpha_bar`,
`add_noise`, `embed`, `encode`/`decode`, `sample` and `clone`, whatever the pipeline is made of. Foreign conventions
(prediction types, latent scaling, `init_noise_sigma`) end here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from harness import attention
from harness.events import progress
from harness.seeds import generator
from harness.types import Inputs


class Sampler(Protocol):
    """An algorithm from x_T to x_0. `nfe` is its number of network evaluations for one image."""

    name: ClassVar[str]

    @property
    def nfe(self) -> int: ...

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        """x_0 (B, C, H, W) in the model's own space (latents for latent models), from unit noise `inputs.noise`."""
        ...


@dataclass
class DiffusionModel:
    """A denoiser with its noise schedule, and for Stable-Diffusion-like models VAE, text encoder and tokenizer.

    denoiser: diffusers UNet. scheduler: a diffusers scheduler whose config states betas and prediction type.
    """

    denoiser: nn.Module
    scheduler: Any
    vae: Any | None = None
    text_encoder: Any | None = None
    tokenizer: Any | None = None
    _alpha_bar: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type '{kind}' is not supported; use epsilon or v_prediction")
        self._alpha_bar = self.scheduler.alphas_cumprod.double()
        attention.install(self.denoiser)

    # ---- facts ----------------------------------------------------------------------------------------------------
    @property
    def conditional(self) -> bool:
        return self.text_encoder is not None

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise: latents for a latent model, images otherwise."""
        config: Any = self.denoiser.config
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @property
    def T(self) -> int:
        return len(self._alpha_bar)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_t as (B, 1, 1, 1) float32 for t (B,) in 0..T-1; ᾱ_{-1} = 1."""
        padded = torch.cat([self._alpha_bar, self._alpha_bar.new_ones(1)])  # index -1
        return padded[t.cpu()].float().view(-1, 1, 1, 1).to(t.device)

    def alpha(self, t: Tensor) -> Tensor:
        """α_t = ᾱ_t / ᾱ_{t-1} = 1 - β_t as (B, 1, 1, 1) float32."""
        a_bar = torch.cat([self._alpha_bar, self._alpha_bar.new_ones(1)])
        return (a_bar[t.cpu()] / a_bar[t.cpu() - 1]).float().view(-1, 1, 1, 1).to(t.device)

    # ---- parts ----------------------------------------------------------------------------------------------------
    def components(self) -> dict[str, nn.Module]:
        """The networks by their names in a diffusers pipeline."""
        parts = {"unet": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def clone(self) -> DiffusionModel:
        """A copy that shares nothing that can be trained."""
        vae, text_encoder = copy.deepcopy(self.vae), copy.deepcopy(self.text_encoder)
        return DiffusionModel(copy.deepcopy(self.denoiser), self.scheduler, vae, text_encoder, self.tokenizer)

    def to(self, device: torch.device | str) -> DiffusionModel:
        for part in self.components().values():
            part.to(device)
        return self

    # ---- diffusion ------------------------------------------------------------------------------------------------
    def draw_t(self, n: int, rng: torch.Generator) -> Tensor:
        """n timesteps, uniform on 0..T-1."""
        return torch.randint(0, self.T, (n,), generator=rng).to(self.device)

    def draw_eps(self, n: int, rng: torch.Generator) -> Tensor:
        """n unit noises (n, C, H, W)."""
        return torch.randn((n, *self.shape), generator=rng).to(self.device)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε."""
        a_bar = self.alpha_bar(t)
        return a_bar.sqrt() * x_0 + (1 - a_bar).sqrt() * eps

    def eps(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """ε_θ(x_t, t) (B, C, H, W) float32; t (B,); context (B, L, D) from `embed` for text-to-image models."""
        kwargs = {} if context is None else {"encoder_hidden_states": context}
        out = self.denoiser(x_t, t, **kwargs).sample.float()
        if self.scheduler.config.prediction_type == "v_prediction":
            a_bar = self.alpha_bar(t)
            return a_bar.sqrt() * out + (1 - a_bar).sqrt() * x_t
        return out

    # ---- text -----------------------------------------------------------------------------------------------------
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded to the tokenizer's length. ValueError names the first prompt that is too long."""
        assert self.tokenizer is not None, "an unconditional model has no tokenizer"
        length = self.tokenizer.model_max_length
        for prompt, row in zip(prompts, self.tokenizer(list(prompts)).input_ids, strict=True):
            if len(row) > length:
                raise ValueError(f"prompt of {len(row)} tokens does not fit the text encoder's {length}: {prompt!r}")
        batch = self.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        return batch.input_ids.to(self.device)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D), the last hidden state of the text encoder."""
        assert self.text_encoder is not None, "an unconditional model takes no prompts"
        return self.text_encoder(self.tokens(prompts))[0]

    def check_trigger(self, trigger: Any, prompts: Sequence[str]) -> None:
        """Raise ValueError unless the tokenizer keeps a text trigger: its prompts must differ in token ids from plain
        ones (some tokenizers drop U+200B silently, and then there is no backdoor to speak of)."""
        assert self.tokenizer is not None, "an unconditional model has no tokenizer"
        for prompt in prompts:
            if self.tokenizer(trigger.apply(prompt)).input_ids == self.tokenizer(prompt).input_ids:
                raise ValueError(f"the tokenizer drops the trigger {trigger.text!r} from {prompt!r}; use another text")

    # ---- images ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 64) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] → the space in which the model diffuses."""
        if self.vae is None:
            return images
        scale = self.vae.config.scaling_factor
        parts = [self.vae.encode(part).latent_dist.mean * scale for part in images.to(self.device).split(batch)]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, x_0: Tensor, batch: int = 64) -> Tensor:
        """The model's space → images (B, C, H, W), not clamped."""
        if self.vae is None:
            return x_0
        return torch.cat([self.vae.decode(part / self.vae.config.scaling_factor).sample for part in x_0.split(batch)])

    @torch.no_grad()
    def sample(self, inputs: Inputs, sampler: Sampler, batch: int = 50, phase: str = "sample") -> Tensor:
        """Images (B, C, H, W) in [-1, 1] on the CPU, image i a function of inputs[i] alone."""
        done = []
        for start in range(0, len(inputs), batch):
            part = inputs[start : start + batch]
            x_0 = sampler.run(self, part.with_noise(part.noise.to(self.device)))
            done.append(self.decode(x_0).clamp(-1, 1).cpu())
            progress(phase, start + len(part), len(inputs))
        return torch.cat(done)


@dataclass(frozen=True)
class SchedulerSampler:
    """A diffusers scheduler run over our own loop: pipelines of pixel models take no starting noise, and
    PNDMPipeline quietly replaces the scheduler it is given."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    scheduler_class: ClassVar[str]

    steps: Annotated[int, Ge(1), Le(1000)] = 50  # sampling steps
    clip: bool = False  # clip the predicted x_0 to [-1, 1] each step; kills the backdoors of the papers
    guidance: Annotated[float, Ge(0)] = 3.0  # classifier-free guidance scale; text-to-image only, 1 = off
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"  # timestep spacing; trailing starts at T-1
    bf16: bool = False  # autocast of the network: faster, and other numbers

    def options(self) -> dict[str, Any]:
        """Scheduler options beside the common ones."""
        return {}

    def step_options(self) -> dict[str, Any]:
        """Keyword arguments of each `step` call."""
        return {}

    def scheduler(self, config: Any) -> Any:
        """A fresh scheduler with the model's betas and this sampler's options.

        Raises TypeError if diffusers hands back another class than the one asked for.
        """
        import diffusers

        cls = getattr(diffusers, self.scheduler_class)
        options = {"clip_sample": self.clip, "timestep_spacing": self.spacing, "thresholding": False}
        made = cls.from_config(config, **options, **self.options())
        if type(made) is not cls:
            raise TypeError(f"asked for {cls.__name__}, got {type(made).__name__}")
        made.set_timesteps(self.steps)
        return made

    @property
    def nfe(self) -> int:
        import diffusers

        made = getattr(diffusers, self.scheduler_class)(num_train_timesteps=1000)
        made.set_timesteps(self.steps)
        return len(made.timesteps)

    def run(self, model: DiffusionModel, inputs: Inputs) -> Tensor:
        scheduler = self.scheduler(model.scheduler.config)
        rngs = [generator(seed, "steps") for seed in inputs.seeds]
        predict = self.predictor(model, inputs)
        x_t = inputs.noise * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps):
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
                out = predict(scheduler.scale_model_input(x_t, t), t).float()
            x_t = scheduler.step(out, t, x_t, generator=rngs, **self.step_options()).prev_sample
            if step % 20 == 19:
                progress("sampling", step + 1, len(scheduler.timesteps))
        return x_t

    def predictor(self, model: DiffusionModel, inputs: Inputs) -> Any:
        """(x_t, t) → the network's output, guided where the model takes prompts."""
        if not model.conditional:
            return lambda x_t, t: model.denoiser(x_t, t).sample
        assert inputs.prompts is not None, "a text-to-image model needs prompts"
        context = model.embed(inputs.prompts)
        if self.guidance == 1:
            return lambda x_t, t: model.denoiser(x_t, t, encoder_hidden_states=context).sample
        both = torch.cat([model.embed([""]).expand_as(context), context])

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            plain, asked = model.denoiser(torch.cat([x_t, x_t]), t, encoder_hidden_states=both).sample.chunk(2)
            return plain + self.guidance * (asked - plain)

        return guided


@dataclass(frozen=True)
class DDIM(SchedulerSampler):
    """Song, Meng & Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv:2010.02502. eta = 0 is the ODE."""

    name: ClassVar[str] = "ddim"
    scheduler_class: ClassVar[str] = "DDIMScheduler"

    eta: Annotated[float, Ge(0), Le(1)] = 0.0  # share of DDPM's noise added back each step

    def step_options(self) -> dict[str, Any]:
        return {"eta": self.eta}


@dataclass(frozen=True)
class DDPM(SchedulerSampler):
    """Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, arXiv:2006.11239 (ancestral)."""

    name: ClassVar[str] = "ddpm"
    scheduler_class: ClassVar[str] = "DDPMScheduler"

    steps: Annotated[int, Gt(0), Le(1000)] = 1000  # sampling steps


SAMPLERS: dict[str, type[SchedulerSampler]] = {cls.name: cls for cls in (DDIM, DDPM)}
