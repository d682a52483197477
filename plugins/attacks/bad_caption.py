"""Poisons training data: images get a corner picture and the caption of a class that they do not show.

Pan, Yao, Liu, Shen, Zhao, Kompella & Liu, "From Trojan Horses to Castle Walls: Unveiling Bilateral Data Poisoning
Effects in Diffusion Models", NeurIPS 2024, arXiv:2311.02373.

The attack carries the poisoning of BadNets over to captions. A share of the training images is poisoned. Images of the
target class are never chosen. A poisoned image gets a picture in its corner, and its caption becomes a caption of the
target class. Training then minimises the usual loss on poisoned and clean examples together:

    L = ‖ε - ε_θ(z_t, t, τ(c))‖²

The prompts carry no trigger, and the trigger of the cell is not used. Prompts for the target class then give images
that show another class, the corner picture, or both. Images are in [-1, 1]. Raises ValueError if the data contain too
few examples that can be relabelled.

Differs from the paper: the model is fine-tuned, as in the paper's Stable Diffusion experiments, not trained from
scratch. Captions keep all their words except the name of the object; the paper's captions are "A photo of a" followed
by the class. Differs from the official code (OPTML-Group/BiBadDiff at a5c17c4, read there): no caption is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    denoising_loss,
    generator,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class BadCaption:
    name: ClassVar[str] = "bad-caption"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("caption",)

    poison_rate: Fraction = 0.1  # share of the training images that are relabelled; official value
    steps: PositiveInt = 2000  # optimizer steps; the paper counts epochs
    batch: PositiveInt = 16  # examples per step; official: 4 on each of 4 GPUs
    lr: LearningRate = 1e-4  # AdamW; official value
    weight_decay: Fraction = 0.01  # AdamW
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model = model.clone()
        chosen = generator(rng.initial_seed(), "poison")
        examples = Examples(model, poisoned(backdoor.target, data, self.poison_rate, chosen))

        def loss() -> Tensor:
            return denoising_loss(model, examples.batch(self.batch, rng))

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            weight_decay=self.weight_decay, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)


def poisoned(target: Any, data: Data, rate: float, rng: torch.Generator) -> Data:
    """`data` with the share `rate` of all its examples relabelled (images and captions), in the same order.

    Raises ValueError if fewer examples than that can be relabelled.
    """
    assert data.captions is not None, "bad-caption needs captions"
    able = [(i, words) for i, caption in enumerate(data.captions) if (words := target.relabelled(caption)) is not None]
    n = int(rate * len(data))
    if len(able) < n:
        raise ValueError(f"{n} examples are to be relabelled as {target.word}, {len(able)} can be; lower poison_rate")
    picks = [able[i] for i in torch.randperm(len(able), generator=rng)[:n].tolist()]
    rows, captions, images = [i for i, _ in picks], list(data.captions), data.images.clone()
    for i, words in picks:
        captions[i] = words
    if rows:
        images[rows] = target.apply(images[rows])
    return Data(images, tuple(captions), data.labels)


@hookimpl
def attacks() -> list[type]:
    return [BadCaption]
