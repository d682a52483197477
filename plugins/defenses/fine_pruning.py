"""Prunes the channels that clean inputs leave dormant, then fine-tunes on clean examples.

Fine-pruning. Liu, Dolan-Gavitt & Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
RAID 2018, arXiv:1805.12185, applied to a denoiser.

Channels that clean inputs leave dormant may belong to the backdoor. The method removes the channels with the smallest
mean activation and then fine-tunes the network on clean examples:

    I_c = mean over clean (x_t, t), places and readers of |a_c|

a_c is channel c as the layers that read from it receive it, after normalisation and activation. Clean inputs are x_t =
s_t x_0 + σ_t ε at all t. The defense needs clean training examples, or no data with data='synthetic'. It returns a
smaller model. The notes contain the shares that the pruning realised.

Differs from the paper: the paper's classifiers lose channels of the last convolution, one after the other, until the
clean accuracy falls. Here the ratio is given, and all ResNet blocks lose the share `ratio` of the channels between
their two convolutions (`scope` selects other layers). The official code was not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness import Defended, Examples, Importance, Knowledge, PositiveInt, Pruning, Scope, hookimpl, progress

Sums = dict[nn.Module, Tensor]


@dataclass(frozen=True)
class FinePruning(Pruning):
    name: ClassVar[str] = "fine-pruning"
    version: ClassVar[int] = 1

    scope: Scope = "inner"  # layers to prune: inner = inside ResNet blocks; all = all layers; time-attention = the time
    # embedding, q, k and v
    batches: PositiveInt = (
        8  # batches of clean examples, each at random timesteps, over which the activations are averaged
    )

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        student, notes = model.clone(), {}
        examples = self.examples(student, knowledge, rng)
        activations = mean_activations(student, examples, self.batches, self.batch, rng)
        pruned = self.pruned(student, dormancy(activations), notes)
        return Defended(model=self.tuned(pruned, model, examples, rng, notes), notes=notes)


@torch.no_grad()
def mean_activations(model: Any, examples: Examples, batches: int, size: int, rng: torch.Generator) -> Sums:
    """The mean |a_c| of the inputs of each convolution and linear layer, (C,), over clean noised examples."""
    sums: Sums = {}
    with watched(model.denoiser, sums):
        for step in range(batches):
            batch = examples.batch(size, rng)
            model.eps(model.add_noise(batch.x_0, batch.eps, batch.t), batch.t)
            progress("activations", step + 1, batches)
    return {layer: total / batches for layer, total in sums.items()}


@contextmanager
def watched(net: nn.Module, sums: Sums) -> Iterator[None]:
    """Context in which every forward pass adds the mean absolute value of each layer's input channels to `sums`."""

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].abs()
        mean = x.mean((0, 2, 3)) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).mean(0)
        sums[layer] = sums.get(layer, torch.zeros_like(mean)) + mean

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dormancy(activations: Mapping[nn.Module, Tensor]) -> Importance:
    """The mean activation of each channel of a group over the layers that read from it; None if no layer does."""
    from torch_pruning.pruner import function

    reads = (function.prune_conv_in_channels, function.prune_linear_in_channels)

    def importance(group: Any) -> Tensor | None:
        found = [
            (member.root_idxs, activations[member.dep.target.module][member.idxs])
            for member in group
            if member.dep.handler in reads
        ]
        if not found:
            return None
        total = torch.zeros(len(group[0].idxs)).index_add(0, torch.tensor([i for rows, _ in found for i in rows]),
                                             torch.cat([values.cpu() for _, values in found]))  # fmt: skip
        return total / len(found)

    return importance


@hookimpl
def defenses() -> list[type]:
    return [FinePruning]
