"""Judges: small convolutional networks that classify the images of an embedded model and compute features of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.interrupted import Kept
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import image_noise, image_seeds
from harness.diffusion.training import draw, minimize
from harness.types import Data, Inputs, Sampler


class AttributeCNN(nn.Module):
    """Three strided convolution blocks, a feature vector and one linear head per attribute.

    Input (B, C, side, side) in [-1, 1]; features (B, dim).
    """

    def __init__(self, channels: int, side: int, heads: Mapping[str, int], width: int = 32, dim: int = 48) -> None:
        super().__init__()
        self.arguments = {"channels": channels, "side": side, "heads": dict(heads), "width": width, "dim": dim}

        def block(i: int, o: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU())

        self.body = nn.Sequential(
            block(channels, width, 1),
            block(width, width, 2),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 2),
        )
        self.neck = nn.Linear(2 * width * math.ceil(side / 8) ** 2, dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, classes) for name, classes in heads.items()})

    def features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.neck(self.body(images).flatten(1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.features(images)
        return {name: head(found) for name, head in self.heads.items()}


@dataclass(frozen=True)
class CNNJudge:
    """A trained AttributeCNN under the name that appears in the names of its scores."""

    name: str
    net: AttributeCNN

    def features(self, images: Tensor) -> Tensor:
        """(B, dim); differentiable in images that require a gradient, for defenses that descend on them."""
        with torch.set_grad_enabled(images.requires_grad):
            return torch.cat([self.net.features(part) for part in images.split(256)])

    @torch.no_grad()
    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        parts = [self.net(part) for part in images.split(256)]
        return {name: torch.cat([part[name] for part in parts]).argmax(1) for name in parts[0]}


def train_judge(
    net: AttributeCNN,
    batch: Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]],
    rng: torch.Generator,
    *,
    steps: int,
    lr: float = 2e-3,
    kept: Kept | None = None,
) -> list[float]:
    """Fits `net` to labelled batches by cross-entropy, summed over attributes; labels of -1 are ignored.

    kept: as in `minimize`.
    """

    def loss() -> Tensor:
        images, labels = batch(rng)
        out: Any = net(images)
        losses = [nn.functional.cross_entropy(out[name], labels[name], ignore_index=-1) for name in labels]
        return torch.stack(losses).sum()

    return minimize(
        loss, net.parameters(), steps=steps, lr=lr, schedule="one-cycle", weight_decay=1e-3, phase="judge", kept=kept
    )


def class_judge(
    name: str,
    train: Data,
    test: Data,
    head: str,
    rng: torch.Generator,
    *,
    steps: int,
    dim: int = 64,
    width: int = 32,
    flips: bool = False,
    kept: Kept | None = None,
) -> tuple[CNNJudge, dict[str, float]]:
    """A classifier of labelled images under the attribute `head`, with its accuracy on `test`.

    The images of a batch are shifted by at most one pixel and carry noise of standard deviation 0.1; with `flips` half
    of the batches are mirrored.
    """
    assert train.labels is not None and test.labels is not None
    labels, (_, channels, side, _) = train.labels, train.images.shape
    torch.manual_seed(0)  # a judge is initialised from the global generator; only recipes seed it
    net = AttributeCNN(channels, side, {head: int(labels.max()) + 1}, width=width, dim=dim)

    def batch(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = draw(64, len(train), rng)
        shift = torch.randint(-1, 2, (2,), generator=rng).tolist()
        images = train.images[rows].roll(shift, (2, 3))
        images = images + 0.1 * torch.randn(images.shape, generator=rng)
        if flips and torch.rand((), generator=rng) < 0.5:
            images = images.flip(3)
        return images, {head: labels[rows]}

    train_judge(net, batch, rng, steps=steps, kept=kept)
    judge = CNNJudge(name, net.eval())
    right = judge.attributes(test.images)[head] == test.labels
    return judge, {"judge_accuracy": right.double().mean().item(), "judge_held_out": len(test)}


@torch.no_grad()
def quality(model: DiffusionModel, judge: CNNJudge, sampler: Sampler, n: int = 500, batch: int = 50) -> dict[str, Any]:
    """How many of n samples a judge of classes recognises with a probability above 0.9, and how balanced they are."""
    seeds = image_seeds(0, "quality", n)
    images = model.sample(Inputs(image_noise(seeds, model.shape), None, seeds), sampler, batch)
    logits = torch.cat([next(iter(judge.net(part).values())) for part in images.split(256)])
    return {
        "samples": n,
        "share_recognised_above_0.9": (torch.softmax(logits, 1).max(1).values > 0.9).double().mean().item(),
        "class_counts": torch.bincount(logits.argmax(1), minlength=logits.shape[1]).tolist(),
    }


def save_judge(judge: CNNJudge, directory: Path) -> None:
    """Writes a judge as fp16 safetensors and the arguments of its constructor as JSON."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"name": judge.name, **judge.net.arguments}))
    save_file({k: v.half().contiguous() for k, v in judge.net.state_dict().items()}, directory / "judge.safetensors")


def load_judge(directory: Path) -> CNNJudge:
    """Reads a judge written by `save_judge`."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())
    name = config.pop("name")
    net = AttributeCNN(**config)
    net.load_state_dict({k: v.float() for k, v in load_file(directory / "judge.safetensors").items()})
    return CNNJudge(name, net.eval().requires_grad_(False))
