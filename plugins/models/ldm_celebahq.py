"""ldm-celebahq: a latent diffusion model of CelebA-HQ with 274 M parameters, scaled-linear betas 0.0015..0.0195.

The latents 3×64×64 are those of a VQ autoencoder, the images are 3×256×256. VillanDiffusion (arXiv:2306.06874)
attacks this model. It is that of Rombach et al., arXiv:2112.10752, published as CompVis/ldm-celebahq-256. Its latents
are not scaled: if the configuration of the autoencoder names no factor, the factor is 1. diffusers assumes Stable
Diffusion's 0.18215 instead, which gives meaningless images. The data are CelebA-HQ, published as jxie/celeba-hq,
30,000 images; distances are to those of its split validation, on which nobody trains here; set `images` to read
fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class LDMCelebAHQ(Published):
    name: ClassVar[str] = "ldm-celebahq"
    latent: ClassVar[bool] = True
    side: ClassVar[int] = 256
    work: ClassVar[Work] = Work(gmacs=101.2, parameters=274_056_163, activations=100_270_880)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
            "block_out_channels": (224, 448, 672, 896), "attention_head_dim": 32,
            "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        },
        "vqvae": {
            "_class_name": "VQModel", "sample_size": 256, "in_channels": 3, "out_channels": 3, "latent_channels": 3,
            "layers_per_block": 2, "block_out_channels": (128, 256, 512), "num_vq_embeddings": 8192,
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
            "scaling_factor": 1.0,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler", "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear",
            "clip_sample": False,
        },
    }  # fmt: skip

    path: str = "CompVis/ldm-celebahq-256"  # diffusers directory, or hub id of the model
    data_path: str = "jxie/celeba-hq"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [LDMCelebAHQ]
