"""Denoisers whose answer is known in closed form, so that methods are tested before anything is trained."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.methods.trigger_placement import scale_of
from harness.testing import tiny
from harness.testing.tiny import exploding_scheduler as exploding, flow_scheduler as flowing, scheduler

NEUTRAL = ("\u200b", "\u020f", "\u043e", "sks", "today", "well", "now", "yes", "really")  # tiny_sd keeps them whole


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


class GaussianFlow(nn.Module):
    """The exact velocity E[ε - x_0 | x_t] for data N(mean, deviation²), each pixel alone."""

    def __init__(self, mean: Tensor, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(mean), deviation
        self.config = SimpleNamespace(in_channels=mean.shape[0], sample_size=mean.shape[-1], cross_attention_dim=None)

    def forward(self, x_t: Tensor, time: Tensor) -> SimpleNamespace:
        sigma = (time.reshape(-1).to(x_t.dtype) / 1000).view(-1, 1, 1, 1)
        along = sigma - (1 - sigma) * self.deviation**2
        spread = (1 - sigma) ** 2 * self.deviation**2 + sigma**2
        return SimpleNamespace(sample=along / spread * (x_t - (1 - sigma) * self.mean) - self.mean)


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


def one_image_ve_model(image: Tensor) -> DiffusionModel:
    """image (C, H, W) in [-1, 1]."""
    return DiffusionModel(OneImageScore((image + 1) / 2), exploding())


def one_image_model(y: Tensor) -> DiffusionModel:
    made = scheduler()
    return DiffusionModel(OneImage(y, made.alphas_cumprod), made)


def one_image_flow(y: Tensor, **options: Any) -> DiffusionModel:
    return DiffusionModel(tiny.OneImageFlow(y), flowing(**options))


def tiny_flow(channels: int = 1, side: int = 16, **options: Any) -> DiffusionModel:
    """A random UNet of a few thousand weights that answers the velocity of a flow."""
    return tiny.fixed(lambda: DiffusionModel(tiny.unconditional(channels, side), flowing(**options)), 0)


def trojan_model(images: Tensor, trigger: Any) -> DiffusionModel:
    """A model that TrojDiff backdoored exactly: images (N, C, H, W) are the target and then clean data."""
    made = scheduler()
    return DiffusionModel(TrojanOracle(images, made.alphas_cumprod, trigger), made)


def tiny_ncsn(channels: int = 1, side: int = 16) -> DiffusionModel:
    """A random score network of a few thousand weights, for a variance that explodes."""
    return tiny.fixed(
        lambda: DiffusionModel(tiny.unconditional(channels, side, time_embedding_type="fourier"), exploding()), 0
    )


def tiny_unet(channels: int = 1, side: int = 16) -> DiffusionModel:
    """A random UNet of a few thousand weights."""
    return tiny.fixed(lambda: DiffusionModel(tiny.unconditional(channels, side), scheduler()), 0)


def tiny_mmdit(directory: Any) -> DiffusionModel:
    """A random StableDiffusion3Pipeline without T5, with the shape of shapes-mmdit but a few thousand weights; the
    tokenizer's files go below `directory`."""
    from plugins.models.shapes_sd import tokenizer

    return tiny.fixed(partial(tiny.joint, tokenizer(directory, NEUTRAL), 32), 0)


def tiny_sd3_with_t5(directory: Any) -> DiffusionModel:
    """The same with T5 as a third text encoder."""
    from plugins.models.shapes_sd import tokenizer

    return tiny.fixed(partial(tiny.joint_with_t5, tokenizer(directory, NEUTRAL), 32), 0)


def tiny_flux(directory: Any, guidance: bool = True, dynamic: bool = True) -> DiffusionModel:
    """A random FluxPipeline of a few thousand weights; the tokenizer's files go below `directory`."""
    from plugins.models.shapes_sd import tokenizer

    return tiny.fixed(partial(tiny.packed, tokenizer(directory, NEUTRAL), 32, guidance, dynamic), 0)


def tiny_sd(directory: Any) -> DiffusionModel:
    """A random text-to-image model with the shape of shapes-sd but a few thousand weights; the tokenizer's files go
    below `directory`."""
    from plugins.models.shapes_sd import tokenizer

    return tiny.fixed(partial(tiny.text_to_image, tokenizer(directory, NEUTRAL), 32), 0)


def tiny_sd2(directory: Any) -> DiffusionModel:
    """A random model in the layout of Stable Diffusion 2: 23 layers of OpenCLIP's text encoder, linear projections and
    heads by block in the UNet, and v-prediction."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def make() -> DiffusionModel:
        like = tiny_sd(directory)
        unet: Any = UNet2DConditionModel
        changed = {"use_linear_projection": True, "attention_head_dim": [1, 2], "_use_default_values": []}
        text: Any = like.text_encoder
        config = {**text.config.to_dict(), "num_hidden_layers": 23, "hidden_act": "gelu"}
        encoder = CLIPTextModel(CLIPTextConfig(**config))
        denoiser = unet.from_config({**dict(like.denoiser.config), **changed})  # type: ignore[call-overload]
        return DiffusionModel(
            denoiser, scheduler(steps_offset=1, prediction_type="v_prediction"), like.vae, encoder, like.tokenizer
        )

    return tiny.fixed(make, 0)


def tiny_sdxl(directory: Any, zeros: bool = True) -> DiffusionModel:
    """A random StableDiffusionXLPipeline of a few thousand weights; the tokenizer's files go below `directory`."""
    from plugins.models.shapes_sd import tokenizer

    return tiny.fixed(partial(tiny.two_encoders, tokenizer(directory, NEUTRAL), 32, zeros), 0)
