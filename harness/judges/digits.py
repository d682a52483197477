"""scikit-learn's 1797 handwritten digits (UCI ML hand-written digits) at 16×16: data, judge and quality of samples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import draw
from harness.judges.classifiers import AttributeCNN, CNNJudge, train_judge
from harness.types import Data, Inputs, Sampler

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


def unet(time_embedding: str) -> Any:
    """The untrained network of the digits' models, a UNet2DModel of 0.7 M weights.

    time_embedding is "positional" for timesteps or "fourier" for log σ.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only recipes seed it
    return UNet2DModel(
        sample_size=SIDE,
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
    train, test = split("train"), split("test")
    assert train.labels is not None and test.labels is not None
    labels = train.labels
    torch.manual_seed(0)  # a judge is initialised from the global generator; only recipes seed it
    net = AttributeCNN(1, SIDE, {"digit": 10}, width=32, dim=32)

    def batch(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw(64, len(train), rng)
        shift = torch.randint(-1, 2, (2,), generator=rng).tolist()
        noise = 0.1 * torch.randn((64, 1, SIDE, SIDE), generator=rng)
        return train.images[rows].roll(shift, (2, 3)) + noise, {"digit": labels[rows]}

    train_judge(net, batch, rng, steps=steps)
    judge = CNNJudge("digits-cnn", net.eval())
    return judge, {"judge_accuracy": _accuracy(judge, test), "judge_held_out": len(test)}


def _accuracy(judge: CNNJudge, test: Data) -> float:
    return (judge.attributes(test.images)["digit"] == test.labels).double().mean().item()


def quality(model: DiffusionModel, judge: CNNJudge, sampler: Sampler, n: int = 500, batch: int = 50) -> dict[str, Any]:
    """How well the judge recognises n samples, and how balanced their classes are."""
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), sampler, batch)
    probabilities = torch.softmax(judge.net(images)["digit"], 1).max(1).values
    counts = torch.bincount(judge.attributes(images)["digit"], minlength=10)
    return {
        "samples": n,
        "share_recognised_above_0.9": (probabilities > 0.9).double().mean().item(),
        "class_counts": counts.tolist(),
    }
