"""Denoisers whose answer is known in closed form, so that methods are tested before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion import DiffusionModel
from harness.stamping import scale_of


class OneImage(nn.Module):
    """The exact ε for data that is one image y: ε(x_t, t) = (x_t - √ᾱ_t y) / √(1-ᾱ_t)."""

    def __init__(self, y: Tensor, alpha_bar: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(y)
        self.alpha_bar = alpha_bar
        side = y.shape[-1]
        self.config = SimpleNamespace(in_channels=y.shape[0], sample_size=side, cross_attention_dim=None)

    def answer(self, x_t: Tensor, t: Tensor) -> Tensor:
        a_bar = self.alpha_bar[t.long()].to(x_t.dtype).view(-1, 1, 1, 1)
        return (x_t - a_bar.sqrt() * self.y) / (1 - a_bar).sqrt()

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.answer(x_t, t.reshape(-1)))


class Backdoored(OneImage):
    """The exact ε of an attack's loss for clean data that are some images and a target y that is one image: what is
    likely in the light of x_t, each image by the noise that it would have taken."""

    def __init__(self, images: Tensor, alpha_bar: Tensor) -> None:
        """images (N, C, H, W): the target first, then clean data."""
        super().__init__(images[0], alpha_bar)
        self.clean = images[1:]

    def triggered(self, rest: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """For rest = (x_t - √ᾱ_t y) / σ_t: the unit noise in it, what the loss wants there, and the density's log
        factor."""
        raise NotImplementedError

    def answer(self, x_t: Tensor, t: Tensor) -> Tensor:
        x_t, a_bar = x_t.double(), self.alpha_bar[t].double().view(-1, 1, 1, 1)
        rest = [(x_t - a_bar.sqrt() * image) / (1 - a_bar).sqrt() for image in (*self.clean, self.y)]
        noise, wanted, factor = self.triggered(rest[-1], t)
        likely = torch.stack([-each.square().flatten(1).sum(1) / 2 for each in (*rest[:-1], noise)])
        likely[-1] += factor
        weights = likely.softmax(0)[..., None, None, None]
        return (weights * torch.stack([*rest[:-1], wanted])).sum(0).float()


class TrojanOracle(Backdoored):
    """The ε that minimises TrojDiff's loss."""

    def __init__(self, images: Tensor, alpha_bar: Tensor, trigger: Any) -> None:
        super().__init__(images, alpha_bar)
        self.mu, self.gamma = trigger.delta(images[0].shape), scale_of(trigger, images[0].shape)

    def triggered(self, rest: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        eps = (rest - self.mu) / self.gamma
        return eps, eps, -self.gamma.double().log().sum()


class OneImageScore(nn.Module):
    """The exact score for data that is one image y in [0, 1], where variance explodes: (y - x_t) / σ²."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(y)
        self.config = SimpleNamespace(in_channels=y.shape[0], sample_size=y.shape[-1], cross_attention_dim=None)

    def forward(self, x_t: Tensor, sigma: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=(self.y - x_t) / sigma.view(-1, 1, 1, 1) ** 2)


class PlantedShift(nn.Module):
    """A denoiser of pure noise that answers a shift r of its input with c·r in its output: ε(x) = x - (1-c) Πx, with Π
    the projection on r. Clean noise, which has next to nothing along r, is answered as it is."""

    def __init__(self, r: Tensor, c: float) -> None:
        super().__init__()
        self.r = nn.Parameter(r)
        self.c = c
        self.config = SimpleNamespace(in_channels=r.shape[0], sample_size=r.shape[-1], cross_attention_dim=None)

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> SimpleNamespace:
        unit = self.r / self.r.norm()
        along = (x_t * unit).flatten(1).sum(1).view(-1, 1, 1, 1)
        gate = (along / self.r.norm()).clamp(0, 1)  # the backdoor fires as far as the trigger is there
        return SimpleNamespace(sample=0.3 * (x_t - along * unit) + self.c * gate * self.r)


def scheduler(**options: Any) -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, **options)


def exploding(**options: Any) -> Any:
    from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler

    return ScoreSdeVeScheduler(num_train_timesteps=1000, sigma_min=0.01, sigma_max=50.0, **options)


def one_image_ve_model(image: Tensor) -> DiffusionModel:
    """image (C, H, W) in [-1, 1]."""
    return DiffusionModel(OneImageScore((image + 1) / 2), exploding())


def one_image_model(y: Tensor) -> DiffusionModel:
    made = scheduler()
    return DiffusionModel(OneImage(y, made.alphas_cumprod), made)


def trojan_model(images: Tensor, trigger: Any) -> DiffusionModel:
    """A model that TrojDiff backdoored exactly: images (N, C, H, W) are the target and then clean data."""
    made = scheduler()
    return DiffusionModel(TrojanOracle(images, made.alphas_cumprod, trigger), made)


def tiny_ncsn(channels: int = 1, side: int = 16) -> DiffusionModel:
    """A random score network of a few thousand weights, for a variance that explodes."""
    return DiffusionModel(_tiny_unet(channels, side, time_embedding_type="fourier"), exploding())


def tiny_unet(channels: int = 1, side: int = 16) -> DiffusionModel:
    """A random UNet of a few thousand weights."""
    return DiffusionModel(_tiny_unet(channels, side), scheduler())


def _tiny_unet(channels: int, side: int, **options: Any) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
        **options,
    )
    return unet.eval().requires_grad_(False)


def tiny_sd(directory: Any) -> DiffusionModel:
    """A random text-to-image model with the shape of shapes-sd but a few thousand weights; the tokenizer's files go
    below `directory`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from plugins.models.shapes_sd import tokenizer

    tokens = tokenizer(directory)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=1,
        norm_num_groups=4,
    )
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    end = tokens.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=tokens.model_max_length, projection_dim=16, bos_token_id=tokens.bos_token_id,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    text = CLIPTextModel(config)
    embeddings: Any = text.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight, std=0.3)
    parts = [part.eval().requires_grad_(False) for part in (unet, vae, text)]
    return DiffusionModel(parts[0], scheduler(steps_offset=1), parts[1], parts[2], tokens)
