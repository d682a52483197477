"""What one file of FLUX.1 holds, in the key layout of the original release, and the names that diffusers gives it.

Most files hold the denoiser alone. Files that hold more put `model.diffusion_model.` before its names, and have the
autoencoder under `vae.` and the text encoders under `text_encoders.`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.diffusion.model_files import CheckpointError

BLOCKS, SINGLE = "double_blocks.", "single_blocks."
TOP = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
NEEDED = ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "vector_in.in_layer.weight",
          "final_layer.linear.weight", "single_blocks.0.linear1.weight")  # fmt: skip
INSIDE = "model.diffusion_model."
TEXT = "text_model."
CLIP, T5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
HELD = {"vae": "vae.", "text_encoder": CLIP + TEXT, "text_encoder_2": T5}  # part → how its names begin, if it is there
WORDS = {"vae": "autoencoder", "text_encoder": "CLIP text encoder", "text_encoder_2": "T5 text encoder"}
CONVERTED = 3072  # width for which diffusers' converter splits the fused layers


def is_flux(names: Collection[str]) -> bool:
    return any(name.removeprefix(INSIDE).startswith(BLOCKS) for name in names)


def of_part(part: str, names: Collection[str]) -> list[str]:
    """The names of the tensors of a part, [] for one that the file does not hold."""
    if part != "transformer":
        return [name for name in names if name.startswith(HELD[part])]
    return [name for name in names if name.removeprefix(INSIDE).startswith((BLOCKS, SINGLE, *TOP))]


def check(names: Collection[str], where: object) -> None:
    """Raise CheckpointError, naming the file `where`, unless its denoiser is one of FLUX.1."""
    bare = {name.removeprefix(INSIDE) for name in names}
    lacks = next((name for name in NEEDED if name not in bare), None)
    if lacks is not None:
        raise CheckpointError(
            f"{where}: has the blocks of FLUX but no {lacks}; it is another release, which is not supported, or not "
            "whole: fetch it again, or give a diffusers directory"
        )


def converted(part: str, held: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by their names in diffusers, names of tensors that the converter does not know) of a part.

    Raises what the converter raises, most of the time KeyError, where the file lacks a tensor.
    """
    from diffusers.loaders import single_file_utils as converters

    if part == "vae":
        return converters.convert_ldm_vae_checkpoint(dict(held), config=config), []
    if part == "text_encoder":
        return converters.convert_ldm_clip_checkpoint(dict(held), remove_prefix=CLIP), []
    if part == "text_encoder_2":
        return converters.convert_sd3_t5_checkpoint_to_diffusers(dict(held)), []
    left = {name.removeprefix(INSIDE): value for name, value in held.items()}
    fused = {name: left[name] for name in left if name.startswith(SINGLE) and ".linear1." in name}
    rows = 7 * CONVERTED  # the converter splits layers of this width alone, so these are split here
    left |= {name: value.new_empty((1,)).expand(rows, *[1] * (value.dim() - 1)) for name, value in fused.items()}
    found = converters.convert_flux_transformer_checkpoint_to_diffusers(left)
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    for name, value in fused.items():
        _, block, _, kind = name.split(".")
        parts = torch.split(value, [width, width, width, value.shape[0] - 3 * width])
        layers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        found |= {f"single_transformer_blocks.{block}.{x}.{kind}": y for x, y in zip(layers, parts, strict=True)}
    return found, [next(name for name in held if name.removeprefix(INSIDE) == key) for key in left]
