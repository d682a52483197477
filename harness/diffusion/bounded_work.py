"""A bound on what one evaluation of a stranger's network computes, checked before each operation.

A small file can describe a network that takes hours: attention over a million pixels has few weights. In a network of
images each weight is used about once per place of the sample, and attention adds less than a few times that. What is
above four uses of each weight per place, and takes more than seconds of a processor, is no such network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from harness.diffusion.model_files import CheckpointError

ALWAYS = 3 * 10**11  # operations that any network may take: seconds of a processor
USES = 4  # of a weight per place of the sample
MOST_NUMBERS = 2**30  # of one result
_ON_CPUS: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class TooMuchWork(CheckpointError):
    """An evaluation that takes more than its network and its sample account for."""


class Bounded(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention, and raises TooMuchWork before the one that
    exceeds `most`, or whose result has more than MOST_NUMBERS numbers."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.done = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _formula(func._overloadpacket)
        if formula is not None:
            shapes = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, kwargs))
            out = func(*shapes[0], **shapes[1])
            self.done += formula(*shapes[0], **shapes[1], out_val=out)
            first = out if isinstance(out, Tensor) else out[0]
            if self.done > self.most or first.numel() > MOST_NUMBERS:
                raise TooMuchWork("one evaluation takes more work than its weights and its size account for")
        return func(*args, **kwargs)


def _formula(packet: Any) -> Callable[..., int] | None:
    if packet is _ON_CPUS:
        return flop_counter.flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    return flop_counter.flop_registry.get(packet)


def most_for(net: nn.Module, places: int, batch: int) -> int:
    """Operations that an evaluation of `net` may take, for `batch` samples of `places` pixels or latents each."""
    weights = sum(weight.numel() for weight in net.parameters())
    return max(ALWAYS, 2 * USES * weights * places * batch)
