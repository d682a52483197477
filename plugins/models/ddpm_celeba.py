"""ddpm-celeba: a DDPM of CelebA at 64×64, 78.7 M parameters.

TrojDiff (arXiv:2303.05762) and Diff-Cleanse (arXiv:2407.21316) attack or defend a DDPM of CelebA at 64×64. The network
is that of TrojDiff's code: 128 channels times 1, 2, 2, 2 and 4, with attention at 16×16 and dropout 0.1. No weights are
published in a format that is read here. `bench build "ddpm-celeba(data_path='FACES')" -o DIRECTORY --device cuda`
trains it, and `ddpm-celeba(path='DIRECTORY/model', data_path='FACES')` names it. FACES is a directory of images, or of
parquet files in the layout of the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Trainable, Work, hookimpl


@dataclass(frozen=True)
class DDPMCelebA(Trainable):
    name: ClassVar[str] = "ddpm-celeba"
    side: ClassVar[int] = 64
    work: ClassVar[Work] = Work(gmacs=24.1, parameters=78_700_803, activations=44_743_680)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256, 512), "attention_head_dim": None, "norm_eps": 1e-6,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "dropout": 0.1,
        },
        "scheduler": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    }  # fmt: skip


@hookimpl
def models() -> list[type]:
    return [DDPMCelebA]
