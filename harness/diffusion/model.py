"""One interface for the diffusion models under test.

A `DiffusionModel` wraps the parts of a diffusers pipeline. Attacks and defenses use `eps`, `signal`, `sigma`,
`add_noise`, `embed`, `encode`/`decode`, `sample` and `clone`, independent of the pipeline. All other conventions
(prediction types, scores, velocities, latent scaling, [0, 1] images, `init_noise_sigma`) are handled here.

There are three families of noise, x_t = s_t x_0 + σ_t ε. Variance preserving (vp): s_t = √ᾱ_t, σ_t = √(1-ᾱ_t), as in
DDPM. Variance exploding (ve): s_t = 1, σ_t geometric from σ_min to σ_max, as in NCSN (Song et al., arXiv:2011.13456).
Flow matching (flow): s_t = 1 - σ_t, σ_t from 1/T to 1, as in rectified flows (Esser et al., arXiv:2403.03206). The
network of a flow answers the velocity v = ε - x_0; then ε = x_t + s_t v, and at the last timestep, where s_t = 0, ε is
x_t itself.
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
from harness.diffusion import attention, gpu
from harness.diffusion.events import progress
from harness.types import Family, Inputs, Sampler

if TYPE_CHECKING:
    from harness.diffusion.adapters import Adapter

GUIDANCE = 3.5  # that a network takes as an input; the default of diffusers' FluxPipeline
T5_OF_FLUX, T5_OF_SD3 = 512, 256  # tokens that diffusers' pipelines give T5
BATCH = 64  # images that an autoencoder gets at once, at most
PIXELS = 2**20  # of all of them
SAMPLED = 50  # images that are sampled at once


@dataclass
class DiffusionModel:
    """A denoiser with its noise schedule; for Stable-Diffusion-like models also VAE, text encoder and tokenizer.

    denoiser: a diffusers UNet, or an SD3Transformer2DModel. scheduler: a diffusers scheduler whose config contains
    betas and prediction type. For a variance-exploding model it is a ScoreSdeVeScheduler; the denoiser then takes σ
    instead of t and returns the score -ε/σ of images in [0, 1], as in diffusers' ScoreSdeVePipeline. For a flow it is a
    FlowMatchEulerDiscreteScheduler; the denoiser then takes T σ instead of t. A transformer has two CLIP text encoders
    with projection, as in diffusers' StableDiffusion3Pipeline, and may have T5's encoder as a third one; all read the
    same prompt. FLUX's transformer (`packed`) has a CLIP text encoder, whose pooled state it gets, and T5's encoder as
    the second, whose states are the context; it takes patches of 2×2 latents. A UNet with two text encoders is SDXL's:
    the second one has a projection, and the UNet also takes the image's size. adapter: the
    low-rank adapter that is a part of the networks' weights (harness.diffusion.adapters), None for a model without one.
    empty_is_zero: guidance compares with a context of zeros instead of an empty prompt, as SDXL's pipelines do.
    dynamic_shift: for a flow whose shift depends on the number of patches, which is fixed here, the unused `shift` of
    its scheduler's config; `scheduler` then has the shift of this number (harness.diffusion.schedules.at_size).
    """

    denoiser: nn.Module
    scheduler: Any
    vae: Any | None = None
    text_encoder: Any | None = None
    tokenizer: Any | None = None
    text_encoder_2: Any | None = None
    tokenizer_2: Any | None = None
    adapter: Adapter | None = None
    empty_is_zero: bool = False
    text_encoder_3: Any | None = None
    tokenizer_3: Any | None = None
    dynamic_shift: float | None = None
    _sigmas: Tensor = field(init=False, repr=False)
    _tables: dict[str, Tensor] = field(init=False, repr=False)  # functions of t, on the networks' device after `to`

    def __post_init__(self) -> None:
        {"vp": self._preserving, "ve": self._exploding, "flow": self._matching}[self.family]()
        _fix_frequencies(self.denoiser)
        attention.install(self.denoiser)

    def _preserving(self) -> None:
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type '{kind}' is not supported; use epsilon or v_prediction")
        a_bar = self.scheduler.alphas_cumprod.double()
        self._sigmas, padded = (1 - a_bar).sqrt(), _padded(a_bar, 1.0)
        self._tables = {"alpha_bar": padded.float(), "alpha": (padded / padded.roll(1)).float()}

    def _exploding(self) -> None:
        if self.vae is not None or self.text_encoder is not None:
            raise ValueError("variance-exploding models with a VAE or a text encoder are not supported")
        config = self.scheduler.config
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        self._sigmas = torch.linspace(low, high, config.num_train_timesteps, dtype=torch.float64).exp()
        self._tabulate(torch.ones_like(self._sigmas), self._sigmas)

    def _matching(self) -> None:
        config = self.scheduler.config
        of_time = torch.arange(1, config.num_train_timesteps + 1, dtype=torch.float64) / config.num_train_timesteps
        self._sigmas = config.shift * of_time / (1 + (config.shift - 1) * of_time)
        self._tabulate(1 - self._sigmas, self._sigmas * config.num_train_timesteps)

    def _tabulate(self, signal: Tensor, time: Tensor) -> None:
        of_t = {"signal": _padded(signal, 1.0), "sigma": _padded(self._sigmas, 0.0), "time": time}
        self._tables = {name: values.float() for name, values in of_t.items()}

    # ---- facts ----------------------------------------------------------------------------------------------------
    @property
    def family(self) -> Family:
        kind = type(self.scheduler).__name__
        return "ve" if kind == "ScoreSdeVeScheduler" else "flow" if kind.startswith("FlowMatch") else "vp"

    @property
    def conditional(self) -> bool:
        return self.text_encoder is not None

    @property
    def joint(self) -> bool:
        """Whether text and image share their attention, as in the transformers of SD3 and FLUX."""
        return getattr(self.denoiser.config, "joint_attention_dim", None) is not None

    @property
    def packed(self) -> bool:
        """Whether the denoiser is FLUX's transformer. Its guidance is an input of the network, or it has none."""
        return getattr(self.denoiser.config, "axes_dims_rope", None) is not None

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise: latents for a latent model, images otherwise."""
        config: Any = self.denoiser.config
        if self.packed:
            side = 2 * (cast(Any, self.vae).config.sample_size // (2 * self._factor))
            return config.in_channels // 4, side, side
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return config.in_channels, height, width

    @property
    def T(self) -> int:
        return len(self._sigmas)

    def signal(self, t: Tensor) -> Tensor:
        """s_t, the weight of x_0 in x_t, (B, 1, 1, 1) float32: √ᾱ_t, 1 if variance explodes, 1 - σ_t in a flow."""
        if self.family == "vp":
            return self.alpha_bar(t).sqrt()
        return self._at("signal", t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ_t, the weight of ε in x_t, (B, 1, 1, 1) float32 for t (B,) in 0..T-1; σ_{-1} = 0."""
        if self.family == "vp":
            return (1 - self.alpha_bar(t)).sqrt()
        return self._at("sigma", t)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """The values of a table at timesteps t (B,) as (B, 1, 1, 1) float32."""
        return self._looked_up(name, t).view(-1, 1, 1, 1)

    def _looked_up(self, name: str, t: Tensor) -> Tensor:
        table = self._tables[name]
        return table[t.to(table.device)].to(t.device)

    def time(self, t: Tensor) -> Tensor:
        """What the network is given for timesteps t (B,): t itself, σ_t if variance explodes, T σ_t in a flow."""
        if self.family == "vp":
            return t
        return self._looked_up("time", t)

    def timestep(self, time: Tensor) -> Tensor:
        """The timesteps int64 that are nearest to the times of a flow's scheduler (any shape); others are t itself."""
        if self.family != "flow":
            return time
        middles = (self._sigmas[1:] + self._sigmas[:-1]) / 2
        return torch.bucketize(time.cpu().double() / self.T, middles).to(time.device)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ_t as (B, 1, 1, 1) float32 for t (B,) in 0..T-1; ᾱ_{-1} = 1. Raises ValueError outside vp."""
        self._need_preserving()
        return self._at("alpha_bar", t)

    def alpha(self, t: Tensor) -> Tensor:
        """α_t = ᾱ_t / ᾱ_{t-1} = 1 - β_t as (B, 1, 1, 1) float32. Raises ValueError outside vp."""
        self._need_preserving()
        return self._at("alpha", t)

    def _need_preserving(self) -> None:
        if self.family != "vp":
            model, attack = {
                "ve": ("a variance-exploding model", "villandiffusion(psi=0)"),
                "flow": ("a flow", "villandiffusion(solver='ode')"),
            }[self.family]
            raise ValueError(
                f"{model} has no α_t and no ᾱ_t; use signal(t) and sigma(t) in a plugin, or a method for such models, "
                f"as the attack {attack}"
            )

    # ---- parts ----------------------------------------------------------------------------------------------------
    def components(self) -> dict[str, nn.Module]:
        """The networks by their names in a diffusers pipeline."""
        parts = {
            "transformer" if self.joint else "unet": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2, "text_encoder_3": self.text_encoder_3,
        }  # fmt: skip
        return {name: part for name, part in parts.items() if part is not None}

    def clone(self) -> DiffusionModel:
        """A copy that shares no trainable tensor."""
        parts = (self.vae, self.text_encoder, self.text_encoder_2, self.text_encoder_3)
        vae, first, second, third = (copy.deepcopy(part) for part in parts)
        copied = DiffusionModel(
            copy.deepcopy(self.denoiser), self.scheduler, vae, first, self.tokenizer, second, self.tokenizer_2,
            self.adapter, self.empty_is_zero, third, self.tokenizer_3, self.dynamic_shift,
        )  # fmt: skip
        copied._tables = dict(self._tables)
        return copied

    def to(self, device: torch.device | str) -> DiffusionModel:
        for part in self.components().values():
            part.to(device)
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self

    # ---- diffusion ------------------------------------------------------------------------------------------------
    def draw_t(self, n: int, rng: torch.Generator) -> Tensor:
        """n timesteps, uniform on 0..T-1."""
        return gpu.sent(torch.randint(0, self.T, (n,), generator=rng), self.device)

    def draw_eps(self, n: int, rng: torch.Generator) -> Tensor:
        """n unit noises (n, C, H, W)."""
        return gpu.sent(torch.randn((n, *self.shape), generator=rng), self.device)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = s_t x_0 + σ_t ε: √ᾱ_t x_0 + √(1-ᾱ_t) ε, or another line with σ_t in the other families."""
        return self.signal(t) * x_0 + self.sigma(t) * eps

    def eps(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """ε_θ(x_t, t) (B, C, H, W) float32; t (B,); context (B, L, D) from `embed` for text-to-image models."""
        if self.family == "ve":
            return self._eps_of_score(x_t, t)
        out = self.answer(x_t, self.time(t), context)
        if self.family == "flow":
            return x_t + self.signal(t) * out
        if self.scheduler.config.prediction_type == "v_prediction":
            a_bar = self.alpha_bar(t)
            return a_bar.sqrt() * out + (1 - a_bar).sqrt() * x_t
        return out

    def error(self, found: Tensor, wanted: Tensor, t: Tensor) -> Tensor:
        """Squared errors (B, C, H, W) of ε at timesteps t (B,), in the units in which the network is trained.

        Those of ε itself; in a flow those of v, which are 1/s_t² as large for the same x_t. At a flow's last timestep ε
        says nothing about v, and the error is 0.
        """
        error = (found - wanted).square()
        if self.family != "flow":
            return error
        signal = self.signal(t)
        return error * torch.where(signal > 0, signal, torch.inf) ** -2

    def answer(
        self, x_t: Tensor, time: Tensor, context: Tensor | None = None, guidance: float = GUIDANCE
    ) -> Tensor:  # fmt: skip
        """The network's own answer (B, C, H, W) float32 (ε, v or the score) at `time` (B,) or one number, in its own
        units: those of `time(t)` and of the schedulers. context as in `eps`. guidance: for a network that takes it as
        an input, as FLUX.1-dev's."""
        if self.packed and context is not None:
            return self._answer_of_patches(x_t, time, context, guidance)
        if self.joint and context is not None:
            sequence, pooled = self.parted(context)
            return self.denoiser(
                hidden_states=x_t, timestep=time.to(x_t.device).expand(len(x_t)), encoder_hidden_states=sequence,
                pooled_projections=pooled,
            ).sample.float()  # fmt: skip
        if self.text_encoder_2 is not None and context is not None:
            sequence, pooled = self.parted(context)
            added = {"text_embeds": pooled, "time_ids": self._sizes().expand(len(x_t), -1)}
            return self.denoiser(x_t, time, encoder_hidden_states=sequence, added_cond_kwargs=added).sample.float()
        kwargs = {} if context is None else {"encoder_hidden_states": context}
        return self.denoiser(x_t, time, **kwargs).sample.float()

    def _answer_of_patches(self, x_t: Tensor, time: Tensor, context: Tensor, guidance: float) -> Tensor:
        """The answer of FLUX's transformer, as diffusers' FluxPipeline asks for it: patches of 2×2 latents in rows,
        their places as (0, y, x), text at (0, 0, 0), and time over 1000."""
        sequence, pooled = self.parted(context)
        height, width = (side // 2 for side in x_t.shape[2:])
        patches = x_t.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros(height, width), *grid], 2).flatten(0, 1).to(x_t.device)
        given = torch.full((len(x_t),), float(guidance), device=x_t.device)
        out = self.denoiser(
            hidden_states=patches.flatten(3).flatten(1, 2), timestep=time.to(x_t.device).expand(len(x_t)) / 1000,
            guidance=given if cast(Any, self.denoiser.config).guidance_embeds else None, pooled_projections=pooled,
            encoder_hidden_states=sequence, txt_ids=torch.zeros(sequence.shape[1], 3, device=x_t.device),
            img_ids=places,
        ).sample.float()  # fmt: skip
        back = out.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width)).permute(0, 3, 1, 4, 2, 5)
        return back.flatten(4, 5).flatten(2, 3)

    @property
    def _factor(self) -> int:
        """Pixels on a side of a latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _sizes(self) -> Tensor:
        """(1, 6) SDXL's conditions on size: of the original, where it was cut, of the image; here one size, uncut."""
        height, width = (float(side * self._factor) for side in self.shape[1:])
        return torch.tensor([[height, width, 0.0, 0.0, height, width]], device=self.device)

    def _eps_of_score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """ε = -σ_t · score, always in float32: bfloat16 is not precise enough for σ_min = 0.01 on images of size 1."""
        sigma = self.sigma(t)
        with torch.autocast(x_t.device.type, enabled=False):
            return -sigma * self.denoiser(x_t.float(), sigma.flatten()).sample.float()

    # ---- text -----------------------------------------------------------------------------------------------------
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded to the tokenizer's length. ValueError names the first prompt that is too long."""
        assert self.tokenizer is not None, "an unconditional model has no tokenizer"
        return self._tokens(self.tokenizer, prompts)

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], longest: int | None = None) -> Tensor:
        """longest: of T5's tokens, as many as diffusers' pipelines give it; else the length of the first tokenizer."""
        length = cast(Any, self.tokenizer if longest is None else tokenizer).model_max_length
        length = length if longest is None else min(length, longest)
        for prompt, row in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
            if len(row) > length:
                raise ValueError(f"prompt of {len(row)} tokens does not fit the text encoder's {length}: {prompt!r}")
        batch = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        return gpu.sent(batch.input_ids, self.device)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, L, D), the last hidden state of the text encoder.

        With two text encoders they are (B, L + 1, D): at L positions the last hidden states but one of both, side by
        side, and in the last row the pooled projections of those that have one, side by side; zeros fill what is left
        of D. `parted` takes them apart again. T5's last hidden states follow at positions of their own; of FLUX they
        are all positions, and the pooled state is CLIP's.
        """
        assert self.text_encoder is not None, "an unconditional model takes no prompts"
        if self.text_encoder_2 is None:
            return self.text_encoder(self.tokens(prompts))[0]
        second = self._tokens(self.tokenizer_2, prompts, T5_OF_FLUX if self.packed else None)
        third = None if self.text_encoder_3 is None else self._tokens(self.tokenizer_3, prompts, T5_OF_SD3)
        return self.embed_tokens(self.tokens(prompts), second, third)

    def embed_tokens(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor | None = None) -> Tensor:
        """The embeddings of `embed` for the tokens (B, L) of the tokenizers of a model with several text encoders."""
        if self.packed:
            pooled = cast(Any, self.text_encoder)(ids).pooler_output.unsqueeze(1)
            sequence = cast(Any, self.text_encoder_2)(ids_2)[0]
            return torch.cat([sequence, nn.functional.pad(pooled, (0, sequence.shape[2] - pooled.shape[2]))], 1)
        pairs: Any = ((self.text_encoder, ids), (self.text_encoder_2, ids_2))
        found = [encoder(rows, output_hidden_states=True) for encoder, rows in pairs]
        config = cast(Any, self.denoiser.config)
        width = config.joint_attention_dim if self.joint else config.cross_attention_dim
        sequence = torch.cat([each.hidden_states[-2] for each in found], -1)
        projected = [each.text_embeds for each in found if getattr(each, "text_embeds", None) is not None]
        parts = [sequence, torch.cat(projected, -1).unsqueeze(1)]
        if ids_3 is not None:
            parts.insert(1, cast(Any, self.text_encoder_3)(ids_3)[0])
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts], 1)

    def parted(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings by position (B, L, D), pooled (B, P)) of what `embed` gives with two text encoders."""
        if self.joint:
            width = cast(Any, self.denoiser.config).pooled_projection_dim
        else:
            width = cast(Any, self.text_encoder_2).config.projection_dim
        return context[:, :-1], context[:, -1, :width]

    def positions(self, prompts: Sequence[str]) -> Tensor:
        """What cross-attention gets of each prompt: (B, L, D), of `embed` without the pooled row."""
        found = self.embed(prompts)
        return found if self.text_encoder_2 is None else self.parted(found)[0]

    def unprompted(self) -> Tensor:
        """What guidance sets against a prompt, (1, L, D) as of `embed`: the empty prompt, or zeros."""
        found = self.embed([""])
        return torch.zeros_like(found) if self.empty_is_zero else found

    def need_one_encoder(self, method: str) -> None:
        """Raises ValueError, naming the method, for a model with two text encoders."""
        if self.text_encoder_2 is not None:
            raise ValueError(
                f"{method} works on models with one text encoder and a UNet with cross-attention, and this one has two "
                f"encoders{' and joint attention' if self.joint else ''}; use one of badt2i, rickrolling, eviledit, "
                "skd, skd-cag, sau and finetune-reversal"
            )

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
        scale, shift = self._scaling
        parts = images.split(at_once(batch, images.shape[-2] * images.shape[-1]))
        return torch.cat([(self._latents(part.to(self.device)) - shift) * scale for part in parts])

    def _latents(self, images: Tensor) -> Tensor:
        """The latents (B, C, H, W): the mean of the autoencoder's distribution, or the values before it quantises."""
        found = cast(Any, self.vae).encode(images)
        return found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents

    def decode(self, x_0: Tensor, batch: int = BATCH) -> Tensor:
        """The model's space → images (B, C, H, W), not clamped; differentiable in x_0."""
        if self.vae is None:
            return 2 * x_0 - 1 if self.family == "ve" else x_0
        (scale, shift), side = self._scaling, self._factor
        parts = x_0.split(at_once(batch, x_0.shape[-2] * x_0.shape[-1] * side**2))
        return torch.cat([self.vae.decode(part / scale + shift).sample for part in parts])

    @property
    def _scaling(self) -> tuple[float, float]:
        """(scale, shift) of the autoencoder's latents z: the model diffuses (z - shift) scale."""
        config = cast(Any, self.vae).config
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def sample(
        self, inputs: Inputs, sampler: Sampler, batch: int | None = None, phase: str = "sample"
    ) -> Tensor:  # fmt: skip
        """Images (B, C, H, W) in [-1, 1] on the CPU. Image i is a function of inputs[i] alone.

        batch: images that are sampled at once; None for SAMPLED, and on a GPU for as many as its memory takes.
        """
        images, start = torch.empty(0), 0
        for size in gpu.batches(len(inputs), self.device, SAMPLED) if batch is None else gpu.parts(len(inputs), batch):
            part = inputs[start : start + size]
            x_0 = sampler.run(self, part.with_noise(part.noise.to(self.device)))
            if tuple(x_0.shape) != tuple(part.noise.shape):
                name = getattr(sampler, "name", type(sampler).__name__)
                raise ValueError(f"sampler '{name}' returned {tuple(x_0.shape)} for noise {tuple(part.noise.shape)}")
            found = self.decode(x_0).clamp(-1, 1).cpu()
            if start == 0:  # filled in place: a list of the parts beside their sum would take twice the memory
                images = found.new_empty((len(inputs), *found.shape[1:]))
            images[start : start + size] = found
            start += size
            progress(phase, start, len(inputs))
        return images


def at_once(batch: int, pixels: int) -> int:
    """How many images of so many pixels an autoencoder gets at once, at most `batch`: at 512 pixels a side 64 images
    take 26 GB and more, four take 2 GB."""
    return max(1, min(batch, PIXELS // pixels))


def _padded(values: Tensor, before: float) -> Tensor:
    """(T + 1,) of values (T,): `before` follows them, so that it is at index -1."""
    return torch.cat([values, values.new_full((1,), before)])


def _fix_frequencies(denoiser: nn.Module) -> None:
    """Makes the frequencies of a Fourier time embedding a buffer of the same name.

    diffusers stores them as a parameter that must not be trained; training `denoiser.parameters()` would train it.
    """
    projection: Any = getattr(denoiser, "time_proj", None)
    weight = getattr(projection, "weight", None)
    if type(projection).__name__ == "GaussianFourierProjection" and isinstance(weight, nn.Parameter):
        del projection.weight
        projection.register_buffer("weight", weight.detach())
