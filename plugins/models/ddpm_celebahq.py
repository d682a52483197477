"""ddpm-celebahq: a DDPM of CelebA-HQ, 3×256×256, 113.7 M parameters, linear betas.

BadDiffusion (arXiv:2212.05400) and VillanDiffusion (arXiv:2306.06874) attack this model. It is that of Ho, Jain &
Abbeel, arXiv:2006.11239, published as google/ddpm-ema-celebahq-256. The data are CelebA-HQ, published as
jxie/celeba-hq, 30,000 images; distances are to those of its split validation, on which nobody trains here. They are
for research use only and are therefore never shipped. They take 24 GB of memory; set `images` to read fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class DDPMCelebAHQ(Published):
    name: ClassVar[str] = "ddpm-celebahq"
    side: ClassVar[int] = 256
    work: ClassVar[Work] = Work(gmacs=248.5, parameters=113_673_219, activations=577_039_744)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 256, "in_channels": 3, "out_channels": 3,
            "layers_per_block": 2, "block_out_channels": (128, 128, 256, 256, 512, 512), "attention_head_dim": None,
            "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4), "downsample_padding": 0,
            "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        },
        "scheduler": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    }  # fmt: skip

    path: str = "google/ddpm-ema-celebahq-256"  # diffusers directory, or hub id of the model
    data_path: str = "jxie/celeba-hq"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [DDPMCelebAHQ]
