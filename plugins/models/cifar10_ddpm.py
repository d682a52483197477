"""cifar10-ddpm: a small DDPM of CIFAR-10, 3×32×32.

The data are the 50,000 images of CIFAR-10's split train (uoft-cs/cifar10 on the hub) and their mirror images. Distances
are to the 10,000 images of its split test. Betas are linear from 1e-4 to 0.02 and T = 1000, as in Ho, Jain & Abbeel,
arXiv:2006.11239. The recipe has two networks: 9.0 M parameters, half as wide as google/ddpm-cifar10-32 and with
attention at 16×16, for a GPU, and 3.2 M parameters without attention for a CPU. The provenance of the weights says
which network it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness import (
    Data,
    DiffusionModel,
    Examples,
    RealData,
    generator,
    hookimpl,
    real_data,
)


@dataclass(frozen=True)
class Cifar10DDPM(RealData):
    name: ClassVar[str] = "cifar10-ddpm"
    version: ClassVar[int] = 1
    hub_data: ClassVar[str] = "uoft-cs/cifar10"
    side: ClassVar[int] = 32
    channels: ClassVar[int] = 3
    encoders: ClassVar[tuple[str, ...]] = ("efficientnet-lite0",)

    def build(
        self, out: Path, device: str = "cpu", minutes: float | None = None, start: Path | None = None, batch: int = 0,
        judge_steps: int = 4000,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains model and judge, writes them below `out`, and returns the measured facts for provenance.json.

        minutes: of the model's training; None is 8 hours on a CPU and 6 minutes on a GPU. The number of steps follows
        from the pace of the first ones. start: folder of an earlier version, whose network is trained further and whose
        judge is kept. batch: 0 is 64 on a CPU and 256 on a GPU. Raises CheckpointError for a `start` that is none.
        """
        gpu = not device.startswith("cpu")
        recipe = real_data.Recipe(self, out)
        if start is None:
            recipe.train_judge("cifar10-cnn", "class", steps=judge_steps, width=48, flips=True)
            model, before = _untrained(large=gpu).to(device), {}
        else:
            model, before = recipe.earlier(start)
            model = model.to(device)
        mirrored = Data(real_data.with_mirrored(recipe.train.images))
        trained = real_data.train_denoiser(
            model, Examples(model, mirrored), generator(self.name, "build"), recipe.state,
            batch=batch or (256 if gpu else 64), lr=6e-4 if gpu else 1e-3, ema=0.999 if gpu else 0.995,
            minutes=minutes or (6.0 if gpu else 480.0),
        )  # fmt: skip
        size = sum(p.numel() for p in model.denoiser.parameters())
        return recipe.finished(model, {**before, **trained, "parameters": size})


def _untrained(large: bool) -> DiffusionModel:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only recipes seed it
    if large:
        network = UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(64, 128, 128, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=64,
            norm_num_groups=32,
        )  # fmt: skip
    else:
        network = UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(48, 96, 128),
            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=16,
            add_attention=False,
        )  # fmt: skip
    return DiffusionModel(network, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False))


@hookimpl
def models() -> list[type]:
    return [Cifar10DDPM]
