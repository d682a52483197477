"""ddpm-mnist: a DDPM of MNIST, 1×28×28, 25.8 M parameters, with the widths of the papers' DDPM of CIFAR-10.

Diff-Cleanse (arXiv:2407.21316) attacks and defends a DDPM of MNIST at 28×28; neither its weights nor its network are
published. Here the network is that of Ho, Jain & Abbeel, arXiv:2006.11239, for CIFAR-10 without its fourth resolution,
which 28 pixels do not have. `bench build ddpm-mnist -o DIRECTORY --device cuda` trains it, and
`ddpm-mnist(path='DIRECTORY/model')` names it. The data are MNIST, published as ylecun/mnist: the split train for
training, the split test as reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Data, Trainable, Work, hookimpl


@dataclass(frozen=True)
class DDPMMnist(Trainable):
    name: ClassVar[str] = "ddpm-mnist"
    side: ClassVar[int] = 28
    mirrored: ClassVar[bool] = False  # digits have a direction
    encoders: ClassVar[tuple[str, ...]] = ()
    work: ClassVar[Work] = Work(gmacs=4.7, parameters=25_833_985, activations=9_686_288)
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 28, "in_channels": 1, "out_channels": 1, "layers_per_block": 2,
            "block_out_channels": (128, 256, 256), "attention_head_dim": None, "norm_eps": 1e-6,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
            "flip_sin_to_cos": False, "freq_shift": 1,
        },
        "scheduler": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    }  # fmt: skip

    data_path: str = "ylecun/mnist"  # directory of parquet files or images, or hub id of the data set

    def _read(self, most: int, reference: bool) -> Data:
        found = super()._read(most, reference)
        return Data(found.images[:, :1].contiguous(), labels=found.labels)  # grey: its channels are equal


@hookimpl
def models() -> list[type]:
    return [DDPMMnist]
