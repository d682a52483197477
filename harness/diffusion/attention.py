"""One attention processor for denoisers: mixed precision that is fast on CPUs, and cross-attention maps on request.

Under bf16 autocast the projections run in bf16 and the attention itself runs in fp32. On CPUs the backward pass of bf16
scaled-dot-product attention costs several times the fp32 one. In fp32 the result equals that of diffusers'
AttnProcessor2_0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Maps = dict[str, Tensor]


class AttentionProcessor:
    """Plain multi-head attention of transformer blocks (no masks, no norms inside).

    While `maps` is a dict, cross-attention writes its probabilities to it under the name of the layer: (B, heads,
    queries, tokens), in the graph, rows summing to 1.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.maps: Maps | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        with torch.autocast(q.device.type, enabled=False):
            if self.maps is not None and encoder_hidden_states is not None:
                probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
                self.maps[self.name] = probabilities
                out = probabilities @ v
            else:
                out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2).float()


def install(denoiser: nn.Module) -> None:
    """Gives every transformer attention of a text-to-image UNet this processor. Other UNets are not changed."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    found = getattr(denoiser, "attn_processors", None)
    if not found or getattr(denoiser.config, "cross_attention_dim", None) is None:
        return
    plain = (AttnProcessor2_0, AttentionProcessor)
    kept = {
        name: AttentionProcessor(name.removesuffix(".processor")) if ".transformer_blocks." in name else processor
        for name, processor in found.items()
        if isinstance(processor, plain) or ".transformer_blocks." not in name
    }
    if len(kept) == len(found):
        denoiser.set_attn_processor(kept)  # type: ignore[operator]


@contextmanager
def capture(denoiser: nn.Module) -> Iterator[Maps]:
    """Collects the denoiser's cross-attention maps while the block runs; each forward pass overwrites the last.

    The store belongs to the block and the denoiser, so a teacher's maps cannot be mistaken for a student's. Copy
    (`dict(maps)`) the maps of one forward pass before the next. Gradient checkpointing is off meanwhile: the backward
    pass would compute attention again after the block, without maps. Raises TypeError for a denoiser without
    cross-attention.
    """
    processors = [p for p in getattr(denoiser, "attn_processors", {}).values() if isinstance(p, AttentionProcessor)]
    if not processors:
        raise TypeError(f"{type(denoiser).__name__} has no cross-attention whose maps could be captured")
    maps: Maps = {}
    checkpointed: list[Any] = [block for block in denoiser.modules() if getattr(block, "gradient_checkpointing", False)]
    for processor in processors:
        processor.maps = maps
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield maps
    finally:
        for processor in processors:
            processor.maps = None
        for block in checkpointed:
            block.gradient_checkpointing = True
