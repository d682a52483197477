"""Pipelines as one file in the key layout of the original releases, written from our own small ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.diffusion.model import DiffusionModel
from harness.diffusion.original_names import original

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def write(model: DiffusionModel, path: Path, more: dict[str, Tensor] | None = None) -> None:
    """The model as one file. more: further tensors of it. A text encoder with OpenCLIP's activation is written as in
    Stable Diffusion 2: with its names, a last layer that diffusers does not use, a projection and a temperature."""
    unet: Any = model.denoiser
    tensors = {f"model.diffusion_model.{unet_name(k, unet.config)}": v for k, v in unet.state_dict().items()}
    vae: Any = model.vae
    for name, value in vae.state_dict().items():
        key = vae_name(name, len(vae.config.block_out_channels))
        whole = ".attn_1." in key and value.dim() == 2
        tensors[f"first_stage_model.{key}"] = value[:, :, None, None] if whole else value
    first: Any = model.text_encoder
    prefix = "cond_stage_model" if model.text_encoder_2 is None else "conditioner.embedders.0"
    if model.text_encoder_2 is None and first.config.hidden_act == "gelu":
        tensors |= {f"{prefix}.model.{name}": value for name, value in second_release(first).items()}
    else:
        for name, value in first.state_dict().items():
            tensors[f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if model.text_encoder_2 is not None:
        second: Any = model.text_encoder_2
        found = open_clip(second.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in found.items()}
    save_file({name: value.clone().contiguous() for name, value in (tensors | (more or {})).items()}, path)


DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm", "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm", "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
SINGLE = {
    "norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}  # fmt: skip
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
FLUX_TOP = {
    "time_text_embed.timestep_embedder": "time_in", "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in", "x_embedder": "img_in", "context_embedder": "txt_in",
    "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1", "linear_1": "in_layer",
    "linear_2": "out_layer",
}  # fmt: skip


def flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a FluxTransformer2DModel as the original release has them."""
    found: dict[str, Tensor] = {}
    blocks: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match:
            blocks.setdefault((f"{'single' if match[1] else 'double'}_blocks.{match[2]}", match[4]), {})[match[3]] = (
                value
            )
            continue
        layer, _, kind = name.rpartition(".")
        for ours, theirs in FLUX_TOP.items():
            layer = re.sub(rf"(^|\.){re.escape(ours)}$|^{re.escape(ours)}(?=\.)", rf"\1{theirs}", layer)
        if layer.startswith("final_layer.adaLN"):  # scale and shift are the other way round
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        found[f"{layer}.{kind}"] = value
    for (block, kind), layers in blocks.items():
        names = DOUBLE if block.startswith("double") else SINGLE
        for fused, parts in FUSED.items():
            if all(part in layers for part in parts) and fused.startswith("linear1") == (names is SINGLE):
                found[f"{block}.{fused}.{kind}"] = torch.cat([layers.pop(part) for part in parts])
        for layer, value in layers.items():
            ending = "scale" if "_norm" in names[layer] else kind
            found[f"{block}.{names[layer]}.{ending}"] = value
    return found


def write_flux(model: DiffusionModel, path: Path, whole: bool, more: dict[str, Tensor] | None = None) -> None:
    """The model as one file of FLUX. whole: with autoencoder and text encoders, as files that hold more than the
    denoiser have them."""
    tensors = flux(model.denoiser.state_dict())
    if whole:
        vae, text, t5 = (model.components()[part] for part in ("vae", "text_encoder", "text_encoder_2"))
        blocks = len(vae.config.block_out_channels)  # type: ignore[union-attr]
        tensors = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
        tensors |= {f"vae.{vae_name(name, blocks)}": value for name, value in vae.state_dict().items()}
        for name, value in text.state_dict().items():
            tensors[f"text_encoders.clip_l.transformer.text_model.{name.removeprefix('text_model.')}"] = value
        kept = {name: value for name, value in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
        tensors |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in kept.items()}
    save_file({name: value.clone().contiguous() for name, value in (tensors | (more or {})).items()}, path)


def second_release(encoder: Any) -> dict[str, Tensor]:
    """The tensors of Stable Diffusion 2's text encoder as its files have them."""
    projection = torch.randn((encoder.config.hidden_size,) * 2, generator=torch.Generator().manual_seed(0))
    found = open_clip({**encoder.state_dict(), "text_projection.weight": projection})
    layers = encoder.config.num_hidden_layers
    last = {n: v for n, v in found.items() if f".resblocks.{layers - 1}." in n}
    found |= {n.replace(f".{layers - 1}.", f".{layers}."): v + 1 for n, v in last.items()}
    return found | {"logit_scale": torch.tensor(4.6)}


def unet_name(name: str, config: Any) -> str:
    """The original name of a tensor."""
    layer, _, kind = name.rpartition(".")
    found = original(layer, config)
    assert found is not None, name
    return f"{found}.{kind}"


def vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0\.", "mid.attn_1.", name)
    if ".attn_1." in name:
        layer, kind = name.split(".attn_1.")[1].rsplit(".", 1)
        name = f"{name.split('.attn_1.')[0]}.attn_1.{ATTENTION[layer]}.{kind}"
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection's tensors as OpenCLIP has them."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }  # fmt: skip
    for i in range(len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")})):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            three = [state[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(three)
            for name, other in OPEN_CLIP.items():
                found[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{name}.{kind}"]
    return found
