"""Attention processors for denoisers: mixed precision that is fast, and maps of the attention on request.

Under bf16 autocast the projections run in bf16 and the attention itself runs in fp32. On CPUs the backward pass of bf16
scaled-dot-product attention costs several times the fp32 one. On a GPU the attention runs in bf16 too, for which torch
has flash attention, unless its maps are captured or it is scaled. In fp32 the result equals that of diffusers'
AttnProcessor2_0 and JointAttnProcessor2_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Maps = dict[str, Tensor]
FLASH = ("cuda",)  # types of devices whose attention in half precision is faster than in fp32


@dataclass(frozen=True)
class Scaling:
    """What `scaled` does to attention. chosen: from a layer's name, whether it is cross-attention and its number of
    queries. outputs: of the chosen layers, by name."""

    factor: float
    chosen: Callable[[str, bool, int], bool]
    outputs: Maps = field(default_factory=dict)


class AttentionProcessor:
    """Plain multi-head attention of transformer blocks (no masks, no norms inside).

    While `maps` is a dict, cross-attention writes its probabilities to it under the name of the layer: (B, heads,
    queries, tokens), in the graph, rows summing to 1. While there is a `scaling`, the layers that it chooses multiply
    what they give to the softmax by its factor, and write their outputs to it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.maps: Maps | None = None
        self.scaling: Scaling | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (_heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        cross = encoder_hidden_states is not None
        scaling = self.scaling
        if scaling is not None and not scaling.chosen(self.name, cross, q.shape[2]):
            scaling = None
        scale = attn.scale if scaling is None else attn.scale * scaling.factor
        captured = self.maps is not None and cross
        if captured or scaling is not None or q.device.type not in FLASH:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=False):
            if self.maps is not None and captured:
                probabilities = (q @ k.transpose(-1, -2) * scale).softmax(-1)
                self.maps[self.name] = probabilities
                out = probabilities @ v
            else:
                out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        if scaling is not None:
            scaling.outputs[self.name] = out
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class JointAttentionProcessor:
    """Attention of an SD3 transformer's block, in which the tokens of image and text are queries and keys together.

    While `maps` is a dict, the joint attention writes its probabilities to it under the name of the layer: those with
    which the image's queries attend to the text, (B, heads, queries, tokens), in the graph. Their rows sum to less
    than 1, as the image's tokens have the rest. With `whole` the keys are those of the text and then those of the
    image, and rows sum to 1.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.maps: Maps | None = None
        self.whole = False

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Any:
        n = hidden_states.shape[1]
        projected = [(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, hidden_states)]
        if encoder_hidden_states is not None:
            norms = attn.norm_added_q, attn.norm_added_k
            projected += [(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, *norms, encoder_hidden_states)]
        parts = [
            (
                _normed(q_norm, _heads(q(x), attn.heads).float()),
                _normed(k_norm, _heads(k(x), attn.heads).float()),
                _heads(v(x), attn.heads),
            )
            for q, k, v, q_norm, k_norm, x in projected
        ]
        q, k, v = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        captured = self.maps is not None and encoder_hidden_states is not None
        if captured or q.device.type not in FLASH:
            v = v.float()
        q, k = q.to(v.dtype), k.to(v.dtype)
        with torch.autocast(q.device.type, enabled=False):
            if self.maps is not None and captured:
                probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
                to_image, to_text = probabilities[:, :, :n].split((n, k.shape[2] - n), -1)
                self.maps[self.name] = torch.cat([to_text, to_image], -1) if self.whole else to_text
                out = probabilities @ v
            else:
                out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        image, text = out.transpose(1, 2).flatten(2).split((n, q.shape[2] - n), 1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x).float()


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def install(denoiser: nn.Module) -> None:
    """Gives every attention of an SD3 transformer, and every transformer attention of a text-to-image UNet, the
    processor for it. Other denoisers are not changed."""
    from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0

    found = getattr(denoiser, "attn_processors", None)
    if not found:
        return
    if all(isinstance(processor, (JointAttnProcessor2_0, JointAttentionProcessor)) for processor in found.values()):
        joint = {name: JointAttentionProcessor(name.removesuffix(".processor")) for name in found}
        denoiser.set_attn_processor(joint)  # type: ignore[operator]
        return
    if getattr(denoiser.config, "cross_attention_dim", None) is None:
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
def capture(denoiser: nn.Module, whole: bool = False) -> Iterator[Maps]:
    """Collects the denoiser's cross-attention maps while the block runs; each forward pass overwrites the last.

    Where text and image share their attention, these are the maps of the text for the image's queries. whole: with the
    keys of the image behind those of the text.

    The store belongs to the block and the denoiser, so a teacher's maps cannot be mistaken for a student's. Copy
    (`dict(maps)`) the maps of one forward pass before the next. Gradient checkpointing is off meanwhile: the backward
    pass would compute attention again after the block, without maps. Raises TypeError for a denoiser without
    cross-attention.
    """
    ours = (AttentionProcessor, JointAttentionProcessor)
    processors: list[Any] = [p for p in getattr(denoiser, "attn_processors", {}).values() if isinstance(p, ours)]
    if not processors:
        raise TypeError(f"{type(denoiser).__name__} has no cross-attention whose maps could be captured")
    maps: Maps = {}
    checkpointed: list[Any] = [block for block in denoiser.modules() if getattr(block, "gradient_checkpointing", False)]
    for processor in processors:
        processor.maps, processor.whole = maps, whole
    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        yield maps
    finally:
        for processor in processors:
            processor.maps = None
        for block in checkpointed:
            block.gradient_checkpointing = True


@contextmanager
def scaled(denoiser: nn.Module, factor: float, chosen: Callable[[str, bool, int], bool]) -> Iterator[Maps]:
    """Multiplies QKᵀ/√d by `factor` before the softmax of the chosen layers of a UNet while the block runs.

    chosen: from a layer's name, whether it is cross-attention and its number of queries. Yields the outputs P V of
    these layers by name, (B, heads, queries, channels) each; each forward pass overwrites the last. Raises TypeError
    for a denoiser whose text does not enter by cross-attention.
    """
    found: list[Any] = [
        p for p in getattr(denoiser, "attn_processors", {}).values() if isinstance(p, AttentionProcessor)
    ]
    if not found:
        raise TypeError(
            f"{type(denoiser).__name__} has no attention that could be scaled; it must be a text-to-image UNet"
        )
    scaling = Scaling(factor, chosen)
    for processor in found:
        processor.scaling = scaling
    try:
        yield scaling.outputs
    finally:
        for processor in found:
            processor.scaling = None
