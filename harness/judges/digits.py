"""scikit-learn's 1797 handwritten digits (UCI ML hand-written digits) at 16×16: data and judge."""

from __future__ import annotations

from typing import Any, Literal

import torch

from harness.diffusion.seeds import generator
from harness.judges.classifiers import CNNJudge, class_judge
from harness.types import Data

SIDE = 16


TEST = 597  # digits that are held out of all training: of models, judges, attacks and defenses


def data() -> Data:
    """The 8×8 scans enlarged to 16×16 bilinearly, (1797, 1, 16, 16) in [-1, 1], with their classes."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return Data(images, labels=torch.tensor(bunch.target, dtype=torch.int64))


def split(which: Literal["train", "test"]) -> Data:
    """1200 digits for training or the 597 that are held out, by a fixed permutation."""
    whole = data()
    order = torch.randperm(len(whole), generator=generator("digits", "split"))
    return whole.rows(order[TEST:] if which == "train" else order[:TEST])


def unet(time_embedding: str, side: int = SIDE) -> Any:
    """The untrained network of the digits' models, a UNet2DModel for images of `side` pixels.

    time_embedding is "positional" for timesteps or "fourier" for log σ.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only recipes seed it
    return UNet2DModel(
        sample_size=side,
        in_channels=1,
        out_channels=1,
        time_embedding_type=time_embedding,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )


def build_judge(steps: int, rng: torch.Generator) -> tuple[CNNJudge, dict[str, float]]:
    """A digit classifier trained on the digits for training, with its accuracy on those that are held out."""
    return class_judge("digits-cnn", split("train"), split("test"), "digit", rng, steps=steps, dim=32)
