"""One interface for the diffusion models under test.

A `DiffusionModel` wraps the parts of a diffusers pipeline. Attacks and defenses use `eps`, `signal`, `sigma`,
`add_noise`, `embed`, `encode`/`decode`, `sample` and `clone`, independent of the pipeline. All other conventions
(prediction types, scores, latent scaling, [0, 1] images, `init_noise_sigma`) are handled here.

There are two families of noise, x_t = s_t x_0 + σ_t ε. Variance preserving (vp): s_t = √ᾱ_t, σ_t = √(1-ᾱ_t), as in
DDPM. Variance exploding (ve): s_t = 1, σ_t geometric from σ_min to σ_max, as in NCSN (Song et al., arXiv:2011.13456).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from harness.capabilities import name_of
from harness.diffusion import attention
from harness.diffusion.events import progress
from harness.types import Family, Inputs, Sampler

if TYPE_CHECKING:
    from harness.diffusion.adapters import Adapter

BATCH = 64  # images that an autoencoder gets at once, at most
PIXELS = 2**20  # of all of them


@dataclass
class DiffusionModel:
    """A denoiser with its noise schedule; for Stable-Diffusion-like models also VAE, text encoder and tokenizer.

    denoiser: a diffusers UNet. scheduler: a diffusers scheduler whose config contains betas and prediction type. For a
    variance-exploding model it is a ScoreSdeVeScheduler; the denoiser then takes σ instead of t and returns the score
    -ε/σ of images in [0, 1], as in diffusers' ScoreSdeVePipeline. adapter: the low-rank adapter that is a part of the
    networks' weights (harness.diffusion.adapters), None for a model without one.
    """

    denoiser: nn.Module
    scheduler: Any
    vae: Any | None = None
    text_encoder: Any | None = None
    tokenizer: Any | None = None
    adapter: Adapter | None = None
    _alpha_bar: Tensor = field(init=False, repr=False)
    _sigmas: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.family == "ve":
            self._exploding()
        else:
            self._preserving()
        _fix_frequencies(self.denoiser)
        attention.install(self.denoiser)

    def _preserving(self) -> None:
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type '{kind}' is not supported; use epsilon or v_prediction")
        self._alpha_bar = self.scheduler.alphas_cumprod.double()
        self._sigmas = (1 - self._alpha_bar).sqrt()

    def _exploding(self) -> None:
        if self.vae is not None or self.text_encoder is not None:
            raise ValueError("variance-exploding models with a VAE or a text encoder are not supported")
        config = self.scheduler.config
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        self._sigmas = torch.linspace(low, high, config.num_train_timesteps, dtype=torch.float64).exp()
        self._alpha_bar = self._sigmas.new_empty(0)

    # ---- facts ----------------------------------------------------------------------------------------------------
    @property
    def family(self) -> Family:
        return "ve" if type(self.scheduler).__name__ == "ScoreSdeVeScheduler" else "vp"

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
        return len(self._sigmas)

    def signal(self, t: Tensor) -> Tensor:
        """s_t, the weight of x_0 in x_t, (B, 1, 1, 1) float32: √ᾱ_t, or 1 if variance explodes."""
        return torch.ones((len(t), 1, 1, 1), device=t.device) if self.family == "ve" else self.alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """σ_t, the weight of ε in x_t, (B, 1, 1, 1) float32 for t (B,) in 0..T-1; σ_{-1} = 0."""
        if self.family == "vp":
            return (1 - self.alpha_bar(t)).sqrt()
        padded = torch.cat([self._sigmas, self._sigmas.new_zeros(1)])  # index -1
        return padded[t.cpu()].float().view(-1, 1, 1, 1).to(t.device)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_t as (B, 1, 1, 1) float32 for t (B,) in 0..T-1; ᾱ_{-1} = 1. Raises ValueError if variance explodes."""
        self._need_preserving()
        padded = torch.cat([self._alpha_bar, self._alpha_bar.new_ones(1)])  # index -1
        return padded[t.cpu()].float().view(-1, 1, 1, 1).to(t.device)

    def alpha(self, t: Tensor) -> Tensor:
        """α_t = ᾱ_t / ᾱ_{t-1} = 1 - β_t as (B, 1, 1, 1) float32. Raises ValueError if variance explodes."""
        self._need_preserving()
        a_bar = torch.cat([self._alpha_bar, self._alpha_bar.new_ones(1)])
        return (a_bar[t.cpu()] / a_bar[t.cpu() - 1]).float().view(-1, 1, 1, 1).to(t.device)

    def _need_preserving(self) -> None:
        if self.family == "ve":
            raise ValueError(
                "a variance-exploding model has no α_t and no ᾱ_t; use signal(t) and sigma(t) in a plugin, or a method "
                "for such models, as the attack villandiffusion(psi=0)"
            )

    # ---- parts ----------------------------------------------------------------------------------------------------
    def components(self) -> dict[str, nn.Module]:
        """The networks by their names in a diffusers pipeline."""
        parts = {"unet": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def clone(self) -> DiffusionModel:
        """A copy that shares no trainable tensor."""
        vae, text_encoder = copy.deepcopy(self.vae), copy.deepcopy(self.text_encoder)
        return DiffusionModel(
            copy.deepcopy(self.denoiser), self.scheduler, vae, text_encoder, self.tokenizer, self.adapter
        )

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
        """x_t = s_t x_0 + σ_t ε: √ᾱ_t x_0 + √(1-ᾱ_t) ε, or x_0 + σ_t ε if variance explodes."""
        return self.signal(t) * x_0 + self.sigma(t) * eps

    def eps(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """ε_θ(x_t, t) (B, C, H, W) float32; t (B,); context (B, L, D) from `embed` for text-to-image models."""
        if self.family == "ve":
            return self._eps_of_score(x_t, t)
        kwargs = {} if context is None else {"encoder_hidden_states": context}
        out = self.denoiser(x_t, t, **kwargs).sample.float()
        if self.scheduler.config.prediction_type == "v_prediction":
            a_bar = self.alpha_bar(t)
            return a_bar.sqrt() * out + (1 - a_bar).sqrt() * x_t
        return out

    def _eps_of_score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """ε = -σ_t · score, always in float32: bfloat16 is not precise enough for σ_min = 0.01 on images of size 1."""
        sigma = self.sigma(t)
        with torch.autocast(x_t.device.type, enabled=False):
            return -sigma * self.denoiser(x_t.float(), sigma.flatten()).sample.float()

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
        """Raises ValueError unless the tokenizer keeps a text trigger.

        The prompts with the trigger must differ in token ids from the prompts without it. Some tokenizers drop U+200B
        silently; there is no backdoor then. Prompts that have no place for the trigger are ignored; ValueError if no
        prompt has one.
        """
        assert self.tokenizer is not None, "an unconditional model has no tokenizer"
        able = [prompt for prompt in prompts if trigger.apply(prompt) != prompt]
        if prompts and not able:
            raise ValueError(
                f"none of {len(prompts)} prompts has a place for the trigger {name_of(trigger)!r}; use another"
            )
        for prompt in able:
            if self.tokenizer(trigger.apply(prompt)).input_ids == self.tokenizer(prompt).input_ids:
                raise ValueError(
                    f"the tokenizer drops the trigger {name_of(trigger)!r} from {prompt!r}; use another text"
                )

    # ---- images ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = BATCH) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] → the space in which the model diffuses.

        The space is that of the latents, [0, 1] if variance explodes, or the images themselves.
        """
        if self.vae is None:
            return (images + 1) / 2 if self.family == "ve" else images
        scale = self.vae.config.scaling_factor
        parts = images.split(at_once(batch, images.shape[-2] * images.shape[-1]))
        return torch.cat([self._latents(part.to(self.device)) * scale for part in parts])

    def _latents(self, images: Tensor) -> Tensor:
        """The latents (B, C, H, W): the mean of the autoencoder's distribution, or the values before it quantises."""
        found = cast(Any, self.vae).encode(images)
        return found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents

    def decode(self, x_0: Tensor, batch: int = BATCH) -> Tensor:
        """The model's space → images (B, C, H, W), not clamped; differentiable in x_0."""
        if self.vae is None:
            return 2 * x_0 - 1 if self.family == "ve" else x_0
        scale, side = self.vae.config.scaling_factor, 2 ** (len(self.vae.config.block_out_channels) - 1)
        parts = x_0.split(at_once(batch, x_0.shape[-2] * x_0.shape[-1] * side**2))
        return torch.cat([self.vae.decode(part / scale).sample for part in parts])

    @torch.no_grad()
    def sample(self, inputs: Inputs, sampler: Sampler, batch: int = 50, phase: str = "sample") -> Tensor:
        """Images (B, C, H, W) in [-1, 1] on the CPU. Image i is a function of inputs[i] alone."""
        images = torch.empty(0)
        for start in range(0, len(inputs), batch):
            part = inputs[start : start + batch]
            x_0 = sampler.run(self, part.with_noise(part.noise.to(self.device)))
            if tuple(x_0.shape) != tuple(part.noise.shape):
                name = getattr(sampler, "name", type(sampler).__name__)
                raise ValueError(f"sampler '{name}' returned {tuple(x_0.shape)} for noise {tuple(part.noise.shape)}")
            found = self.decode(x_0).clamp(-1, 1).cpu()
            if start == 0:  # filled in place: a list of the parts beside their sum would take twice the memory
                images = found.new_empty((len(inputs), *found.shape[1:]))
            images[start : start + len(part)] = found
            progress(phase, start + len(part), len(inputs))
        return images


def at_once(batch: int, pixels: int) -> int:
    """How many images of so many pixels an autoencoder gets at once, at most `batch`: at 512 pixels a side 64 images
    take 26 GB and more, four take 2 GB."""
    return max(1, min(batch, PIXELS // pixels))


def _fix_frequencies(denoiser: nn.Module) -> None:
    """Makes the frequencies of a Fourier time embedding a buffer of the same name.

    diffusers stores them as a parameter that must not be trained; training `denoiser.parameters()` would train it.
    """
    projection: Any = getattr(denoiser, "time_proj", None)
    weight = getattr(projection, "weight", None)
    if type(projection).__name__ == "GaussianFourierProjection" and isinstance(weight, nn.Parameter):
        del projection.weight
        projection.register_buffer("weight", weight.detach())
