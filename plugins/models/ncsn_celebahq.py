"""ncsn-celebahq: a variance-exploding score model of CelebA-HQ, 3×256×256, 65.6 M parameters.

It is NCSN++ of Song et al., arXiv:2011.13456, published as google/ncsnpp-celebahq-256. VillanDiffusion
(arXiv:2306.06874) attacks a different network with σ up to 380 and 2000 levels. Pass the directory of that network as
`path` to use it; the levels are those of the model's own scheduler. The data are CelebA-HQ, published as
jxie/celeba-hq, 30,000 images; distances are to those of its split validation, on which nobody trains here; set
`images` to read fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class NCSNCelebAHQ(Published):
    name: ClassVar[str] = "ncsn-celebahq"
    family: ClassVar[Literal["vp", "ve"]] = "ve"
    side: ClassVar[int] = 256
    work: ClassVar[Work] = Work(gmacs=266.7, parameters=65_574_549, activations=695_403_296)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 256, "in_channels": 3, "out_channels": 3,
            "layers_per_block": 2, "block_out_channels": (128, 128, *(256,) * 5), "attention_head_dim": None,
            "down_block_types": (*("SkipDownBlock2D",) * 4, "AttnSkipDownBlock2D", *("SkipDownBlock2D",) * 2),
            "up_block_types": (*("SkipUpBlock2D",) * 2, "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 4),
            "time_embedding_type": "fourier", "mid_block_scale_factor": 1.41421356237, "norm_eps": 1e-6,
            "norm_num_groups": None,
        },
        "scheduler": {
            "_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "sigma_min": 0.01, "sigma_max": 348.0,
        },
    }  # fmt: skip

    path: str = "google/ncsnpp-celebahq-256"  # diffusers directory, or hub id of the model
    data_path: str = "jxie/celeba-hq"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [NCSNCelebAHQ]
