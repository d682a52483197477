"""ddpm-cifar10: a DDPM of CIFAR-10, 3×32×32, 35.7 M parameters, linear betas.

BadDiffusion (arXiv:2212.05400), VillanDiffusion (arXiv:2306.06874), Elijah (arXiv:2312.00050) and Diff-Cleanse
(arXiv:2407.21316) attack or defend this model. It is that of Ho, Jain & Abbeel, arXiv:2006.11239, published as
google/ddpm-cifar10-32. The data are CIFAR-10, published as uoft-cs/cifar10: attacks and defenses train on the 50,000
images of the split train, and distances are to the 10,000 of the split test. The papers' code trains on the images of
both splits and measures FID against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Trainable, Work, hookimpl


@dataclass(frozen=True)
class DDPMCifar10(Trainable):
    name: ClassVar[str] = "ddpm-cifar10"
    side: ClassVar[int] = 32
    work: ClassVar[Work] = Work(gmacs=6.2, parameters=35_746_307, activations=12_608_000)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None, "norm_eps": 1e-6,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
            "flip_sin_to_cos": False, "freq_shift": 1,
        },
        "scheduler": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    }  # fmt: skip

    path: str = "google/ddpm-cifar10-32"  # diffusers directory, or hub id of the model
    data_path: str = "uoft-cs/cifar10"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [DDPMCifar10]
