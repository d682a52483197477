"""Names of a UNet's layers in the original releases of Stable Diffusion, from their names in diffusers."""

from __future__ import annotations

from typing import Any

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def original(name: str, config: Any) -> str | None:
    """The original name of a layer of a UNet2DConditionModel of this configuration; None for a layer that the original
    does not have.

    "down_blocks.0.resnets.1.conv1" is "input_blocks.2.0.in_layers.2" where a block has two layers.
    """
    if name in TOP:
        return TOP[name]
    words = name.split(".")
    each = config.layers_per_block + 1
    if words[0] == "mid_block" and len(words) > 3:
        place = 1 if words[1] == "attentions" else 2 * int(words[2])
        return _joined(f"middle_block.{place}", words[1], words[3:])
    if words[0] not in ("down_blocks", "up_blocks") or len(words) < 5:
        return None
    block, part, layer, rest = int(words[1]), words[2], int(words[3]), words[4:]
    if words[0] == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * each}.0.op"
        return _joined(f"input_blocks.{1 + block * each + layer}.{int(part == 'attentions')}", part, rest)
    if part == "upsamplers":
        place = 1 + config.up_block_types[block].startswith("CrossAttn")
        return f"output_blocks.{block * each + each - 1}.{place}.conv"
    return _joined(f"output_blocks.{block * each + layer}.{int(part == 'attentions')}", part, rest)


def _joined(place: str, part: str, rest: list[str]) -> str | None:
    if part == "attentions":
        return ".".join([place, *rest])
    inner = RESNET.get(".".join(rest))
    return None if inner is None else f"{place}.{inner}"
