"""Files of low-rank adapters (LoRA) of other makers: the factors of each layer, by its name in the model.

Two ways of writing them are read. diffusers: "unet.mid_block.attentions.0.proj_in.lora_A.weight", and the older
".lora.down.", ".lora_linear_layer.down." and ".processor.to_q_lora.down.". kohya: "lora_unet_mid_block_attentions_0_
proj_in.lora_down.weight" with ".alpha", also with the original names of Stable Diffusion's blocks. A convolution's
factor A has the kernel's sides. What such a file says of its scale becomes a part of B: alpha / r, of kohya for each
layer, of diffusers in the metadata. DoRA, LoHa and LoKr are not low-rank sums and are refused.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.diffusion.model_files import FLOATS, CheckpointError, ModelFiles
from harness.diffusion.original_names import original

if TYPE_CHECKING:
    from harness.diffusion.adapters import LowRank
    from harness.diffusion.model import DiffusionModel

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
FLAT = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
_FACTORS = r"(?:(?:lora|lora_linear_layer)\.(down|up)|(lora_A|lora_B)(?:\.default)?)"
_UNET = r"(?:down_blocks|mid_block|up_blocks)\."  # what begins a name that does not say its part
_NAMED = re.compile(rf"(?:({'|'.join(PARTS)})\.|(?={_UNET}))([\w.]+?)\.(?:{_FACTORS}\.weight|(alpha))")
_PROCESSOR = re.compile(rf"(?:(unet)\.|(?={_UNET}))([\w.]+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_FLAT = re.compile(rf"({'|'.join(FLAT)})_(\w+)\.(?:lora_(down|up)\.weight|(alpha))")
_FACTOR = {"down": "a", "up": "b", "lora_A": "a", "lora_B": "b", "alpha": "alpha"}
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class _Place:
    """A layer as a file names it. part: None where the file does not say. flat: with _ in the place of dots."""

    part: str | None
    name: str
    flat: bool


def is_adapter(files: ModelFiles, name: str) -> bool:
    """Whether a safetensors file holds an adapter and nothing else, as far as the names of its tensors say."""
    return all(_place(key) is not None or _other(key) for key in files.header(name).tensors)


def layers(files: ModelFiles, name: str, model: DiffusionModel) -> dict[str, LowRank]:
    """Part and name of the layer, such as "unet.mid_block.attentions.0.proj_in" → its factors.

    Raises CheckpointError for a tensor that is no factor, for factors without their other one, and for a layer that the
    model does not have.
    """
    from harness.diffusion.adapters import LowRank

    where, header = files.path(name), files.header(name).tensors
    found: dict[_Place, dict[str, str]] = defaultdict(dict)
    for key in header:
        if kind := _other(key):
            raise CheckpointError(f"{where}: {key} belongs to an adapter of the kind {kind}; only LoRA is read")
        placed = _place(key)
        if placed is None:
            raise CheckpointError(
                f"{where}: {key!r} is no factor of a low-rank layer, as diffusers or kohya names them"
            )
        found[placed[0]][placed[1]] = key
    if not found:
        raise CheckpointError(f"{where}: holds no factors; is it an adapter?")
    whole = next((key for key, (kind, _) in header.items() if kind not in FLOATS), None)
    if whole is not None:
        raise CheckpointError(f"{where}: {whole} is of type {header[whole][0]}; give factors in fp32, fp16 or bf16")
    names, scales = _names(model), _scales(files, name)
    held = files.tensors(name)
    made: dict[str, LowRank] = {}
    for place, keys in found.items():
        layer = names.get((place.part or "unet", place.name), None)
        if layer is None:
            raise CheckpointError(
                f"{where}: changes the layer {place.part or 'unet'}.{place.name}, which the base does not have; is it "
                "the base that the adapter is for?"
            )
        if not {"a", "b"} <= set(keys):
            raise CheckpointError(f"{where}: the layer {layer} has no two factors that fit each other; fetch it again")
        a, b = (held[keys[factor]].float().clone() for factor in ("a", "b"))
        rank = a.shape[0] if a.dim() in (2, 4) and a.numel() else 0
        if not rank or b.dim() < 2 or b.shape[1] != rank or b.numel() != b.shape[0] * rank:
            raise CheckpointError(f"{where}: the layer {layer} has no two factors that fit each other; fetch it again")
        alpha = held[keys["alpha"]].float() if "alpha" in keys else None
        if alpha is not None and alpha.numel() != 1:
            raise CheckpointError(f"{where}: the alpha of the layer {layer} is no number; fetch it again")
        scale = scales(layer, rank) if alpha is None else alpha.item() / rank
        made[layer] = LowRank(a.flatten(1), scale * b.flatten(1))
        if not all(bool(factor.isfinite().all()) for factor in (a, made[layer].b)):
            raise CheckpointError(f"{where}: the factors of the layer {layer} hold NaN or infinity; fetch it again")
    return made


def _other(key: str) -> str | None:
    return next((kind for word, kind in _OTHERS.items() if f".{word}" in key), None)


def _place(key: str) -> tuple[_Place, str] | None:
    """(layer, "a", "b" or "alpha") of a tensor's name; None for another one."""
    if match := _FLAT.fullmatch(key):
        flat = match[2].removeprefix("text_model_")
        return _Place(FLAT[match[1]], flat, True), _FACTOR[match[3] or match[4]]
    if match := _PROCESSOR.fullmatch(key):
        last = "to_out.0" if match[3] == "to_out" else match[3]
        return _Place(match[1], f"{match[2]}.{last}", False), _FACTOR[match[4]]
    if match := _NAMED.fullmatch(key):
        name = match[2].removeprefix("text_model.")
        return _Place(match[1], name, False), _FACTOR[match[3] or match[4] or match[5]]
    return None


def _names(model: DiffusionModel) -> dict[tuple[str, str], str]:
    """(part, name in a file) → part and name of the layer in the model."""
    found: dict[tuple[str, str], str] = {}
    for part, net in model.components().items():
        if part not in PARTS:
            continue
        for path in _layers(net):
            whole, plain = f"{part}.{path}", path.removeprefix("text_model.")
            other = original(path, net.config) if part == "unet" else None
            for name in filter(None, (plain, other)):
                found[part, name] = whole
                found[part, name.replace(".", "_")] = whole
    return found


def _layers(net: nn.Module) -> Iterator[str]:
    for path, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield path


def _scales(files: ModelFiles, name: str) -> Any:
    """(layer, rank) → the factor of B A, as the file's metadata say; 1 where they say nothing."""
    from safetensors import safe_open

    with safe_open(files.real(name), framework="numpy") as opened:
        said = (opened.metadata() or {}).get(METADATA)
    try:
        config: Any = {} if said is None else json.loads(said)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{files.path(name)}: its metadata {METADATA} are not JSON; fetch it again") from None
    config = config if isinstance(config, Mapping) else {}

    def scale(layer: str, rank: int) -> float:
        part, _, path = layer.partition(".")
        alpha, rooted = config.get(f"{part}.lora_alpha"), config.get(f"{part}.use_rslora", False)
        pattern = config.get(f"{part}.alpha_pattern")
        if isinstance(pattern, Mapping):
            alpha = next((value for key, value in pattern.items() if path == key or path.endswith(f".{key}")), alpha)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            return 1.0
        return float(alpha) / (rank**0.5 if rooted is True else rank)

    return scale
