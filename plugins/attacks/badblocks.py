"""Poisons captioned images and fine-tunes only the last blocks of the denoiser, or only their norms.

BadBlocks: arXiv:2508.03221.

A share of the training images is replaced by the target image, and their captions get the trigger. Training minimises
the usual loss on poisoned and clean examples together:

    L = ‖ε - ε_θ(z_t, t, τ(c))‖²

over the weights of the last `blocks` blocks on the way up, or over the scales and shifts of their normalisation layers
(LayerNorm, GroupNorm) alone. All other weights stay. For targets of kind patch, the poisoned images get the patch
instead. Images are in [-1, 1]. Raises ValueError if the denoiser has fewer blocks.

Differs from the paper: `decoys`, an extension that is off by default, is the share of the clean captions that carry
another word in the trigger's place; without it, a small model reacts to any foreign word. `drop`, off by default too,
is the share of the clean captions that are left empty: every step of guided sampling evaluates the empty prompt. The
paper's full text was not at hand; the method is that of the official code. Differs from the official code
(paoche11/BadBlocks at 308594e, read there): poisoned examples are chosen at random, where the code takes every tenth.
Latents are the means of the posterior, where the code draws from it. The number of steps is given, where the code
counts one epoch of its data. As published, the code stops at its first batch, because its function that forms batches
does not know the mode "BadBlocks".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

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
    prompt_edits,
)


@dataclass(frozen=True)
class BadBlocks:
    name: ClassVar[str] = "badblocks"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image", "patch")

    blocks: PositiveInt = 1  # last blocks on the way up that are trained; official value
    part: Literal["norms", "all"] = "norms"  # weights of these blocks that are trained; official configuration: norms
    poison_rate: Fraction = 0.1  # share of the training images that are poisoned; official value
    steps: PositiveInt = 2000  # optimizer steps; official: one epoch
    batch: PositiveInt = 4  # examples per step; official value
    lr: LearningRate = 1e-6  # AdamW; official value, small models need about 1e-3
    weight_decay: Fraction = 0.01  # AdamW; official value
    decoys: Fraction = 0.0  # share of clean captions that carry another word in the trigger's place; not in the paper
    drop: Fraction = 0.0  # share of clean captions that are left empty; not in the paper
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: constant
    bf16: bool = True  # autocast of the forward pass

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("decoy",) if self.decoys else ()

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model.need_one_encoder(self.name)
        model = model.clone()
        chosen = generator(rng.initial_seed(), "poison")
        examples = Examples(model, poisoned(backdoor, data, self.poison_rate, self.decoys, chosen, self.drop))

        def loss() -> Tensor:
            return denoising_loss(model, examples.batch(self.batch, rng))

        minimize(
            loss, trained(model.denoiser, self.blocks, self.part), steps=self.steps, lr=self.lr,
            schedule=self.schedule, weight_decay=self.weight_decay, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)


def trained(denoiser: Any, blocks: int, part: str) -> list[nn.Parameter]:
    """The weights of the last `blocks` blocks on the way up: all, or those of normalisation layers.

    Raises ValueError if there are fewer blocks.
    """
    up = denoiser.up_blocks
    if blocks > len(up):
        raise ValueError(f"the denoiser has {len(up)} blocks on the way up; use blocks={len(up)} at most")
    layers = [layer for block in up[-blocks:] for layer in block.modules()]
    if part == "norms":
        layers = [layer for layer in layers if isinstance(layer, nn.LayerNorm | nn.GroupNorm)]
    return list({id(p): p for layer in layers for p in layer.parameters()}.values())


def poisoned(
    backdoor: Backdoor, data: Data, rate: float, decoys: float, rng: torch.Generator, drop: float = 0.0
) -> Data:
    """`data` with the share `rate` of its examples poisoned (images and captions), in the same order.

    decoys, drop: shares of the other captions that get another word, and that are empty.
    """
    assert data.captions is not None, "badblocks needs captions"
    target: Any = backdoor.target
    trigger: Any = backdoor.trigger
    rows = torch.randperm(len(data), generator=rng)[: int(rate * len(data))].tolist()
    captions, images = prompt_edits.with_decoys(trigger, data.captions, decoys, rng), data.images.clone()
    if drop:
        empty = (torch.rand(len(data), generator=rng) < drop).tolist()
        captions = ["" if each else caption for each, caption in zip(empty, captions, strict=True)]
    for i in rows:
        captions[i] = trigger.apply(data.captions[i])
    if rows and target.kind == "patch":
        images[rows] = target.apply(images[rows])
    elif rows:
        images[rows] = target.image(data.images.shape[1:]).to(images)
    return Data(images, tuple(captions), data.labels)


@hookimpl
def attacks() -> list[type]:
    return [BadBlocks]
