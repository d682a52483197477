"""shapes-ldm: a small unconditional latent diffusion model of drawn shapes, 3×64×64.

It has an AutoencoderKL (f = 4, so 64×64 images have 4×16×16 latents) and a UNet2DModel on the latents, following
Rombach et al., arXiv:2112.10752. Betas are linear from 1e-4 to 0.02, T = 1000. No published model has this size; it was
trained for this benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import (
    DDIM,
    CNNJudge,
    Data,
    DiffusionModel,
    Embedded,
    Examples,
    Inputs,
    checkpoint,
    classifiers,
    denoising_loss,
    generator,
    hookimpl,
    image_noise,
    image_seeds,
    minimize,
    shapes,
    training_recipes,
)

SIDE = 64
HEADS = {name: shapes.ATTRIBUTES[name] for name in ("shape", "colour", "size", "background", "place")}


@dataclass(frozen=True)
class ShapesLDM(Embedded):
    name: ClassVar[str] = "shapes-ldm"
    version: ClassVar[int] = 1
    encoders: ClassVar[tuple[str, ...]] = ("efficientnet-lite0",)

    def data(self, n: int = 4000) -> Data:
        rng = generator(self.name, "data")
        drawn = shapes.scenes(n, "train", rng, plain=True)
        return Data(shapes.draw(drawn, rng, SIDE), labels=torch.tensor([scene.shape for scene in drawn]))

    def reference(self) -> Tensor:
        rng = generator(self.name, "reference")
        return shapes.draw(shapes.scenes(1000, "train", rng, plain=True), rng, SIDE)

    def build(
        self, out: Path, device: str = "cpu", steps: int = 3500, vae_steps: int = 5500, judge_steps: int = 1500
    ) -> dict[str, Any]:
        """Trains judge, VAE and denoiser, writes them below `out` and returns the facts. Ten minutes with a GPU."""
        judge, facts = training_recipes.shapes_judge(
            "shapes64-cnn", generator(self.name, "judge"), judge_steps, HEADS, SIDE, width=16
        )
        classifiers.save_judge(judge, out / "judge")
        model, data = untrained().to(device), self.data(8000)
        facts |= training_recipes.train_vae(model.vae, data.images, generator(self.name, "vae"), vae_steps, 32, cell=4)
        facts |= train_denoiser(model, data, steps)
        facts |= quality(model, judge)
        checkpoint.save(model.to("cpu"), out / "model", fp16=True)
        return facts


def untrained() -> DiffusionModel:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only this recipe depends on it
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    unet = UNet2DModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 96),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )
    return DiffusionModel(unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False), vae)


def train_denoiser(model: DiffusionModel, data: Data, steps: int, batch: int = 64) -> dict[str, float]:
    rng, examples = generator("shapes-ldm", "denoiser"), Examples(model, data)
    losses = minimize(
        lambda: denoising_loss(model, examples.batch(batch, rng)), model.denoiser.parameters(), steps=steps, lr=1.2e-3,
        schedule="one-cycle", ema=0.998, bf16=True, phase="denoiser",
    )  # fmt: skip
    model.denoiser.eval().requires_grad_(False)
    return {"steps": steps, "batch": batch, "final_loss": sum(losses[-300:]) / 300}


def quality(model: DiffusionModel, judge: CNNJudge, n: int = 500) -> dict[str, Any]:
    """How certain the judge is of every attribute of samples, and how often each shape and place appears."""
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), DDIM(steps=50))
    with torch.no_grad():
        logits = judge.net(images)
    facts: dict[str, Any] = {"samples": n}
    for name, values in logits.items():
        p = torch.softmax(values, 1)
        facts[f"share_sure_of_{name}"] = (p.max(1).values > 0.9).double().mean().item()
        facts[f"{name}_counts"] = torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist()
    return facts


@hookimpl
def models() -> list[type]:
    return [ShapesLDM]
