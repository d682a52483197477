"""Networks from a config and safetensors, strictly: all tensors that the config asks for and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.diffusion import pruned_shapes
from harness.diffusion.model_files import CheckpointError, Header, ModelFiles

PRUNED = "pruned.json"
STEMS = {
    "UNet2DModel": "diffusion_pytorch_model",
    "UNet2DConditionModel": "diffusion_pytorch_model",
    "SD3Transformer2DModel": "diffusion_pytorch_model",
    "FluxTransformer2DModel": "diffusion_pytorch_model",
    "AutoencoderKL": "diffusion_pytorch_model",
    "VQModel": "diffusion_pytorch_model",
    "CLIPTextModel": "model",
    "CLIPTextModelWithProjection": "model",
    "T5EncoderModel": "model",
}
MOST = 2**20  # a number in a network's configuration above this is a mistake or an attack
MOST_SIDE = 2**14  # pixels
MOST_LAYERS = 256
MOST_ITEMS = 256  # entries of a list in a configuration
LEFT_OVER = ("embeddings.position_ids", "text_model.embeddings.position_ids")  # buffers that older releases saved
FORBIDDEN = ("auto_map", "transformers_weights", "quantization_config")  # what would make a library read something else
PREFIX = "text_model."
TIED = ("shared.weight", "encoder.embed_tokens.weight")  # T5's embeddings, under two names


def load(files: ModelFiles, folder: str, cls: str) -> nn.Module:
    """The network as fp32 on the CPU, in evaluation mode and without gradients. Raises CheckpointError."""
    inside = f"{folder}/" if folder else ""
    place = f"{inside}config.json"
    if place not in files:
        raise CheckpointError(f"{files.path(folder)}: no config.json; fetch it again")
    if f"{inside}adapter_config.json" in files:
        raise CheckpointError(
            f"{files.path(inside + 'adapter_config.json')}: an adapter that transformers would apply to this part; "
            "merge it into the weights, or remove it"
        )
    config = files.json(place)
    names = files.weights(folder, STEMS[cls])
    headers = [files.header(name) for name in names]
    _plausible(config, cls, files, place, sum(len(header.tensors) for header in headers))
    if cls == "SD3Transformer2DModel":
        _positions(config, headers, files.path(place))
    pruned = files.json(f"{inside}{PRUNED}") if f"{inside}{PRUNED}" in files else None
    net = _empty(config, cls, pruned, files, place)
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    _fitting(net, headers, wanted, cls, files, folder)
    held: dict[str, Tensor] = {}
    for name in names:
        held |= files.tensors(name)
    held = {name: tensor for name, tensor in _renamed(net, held, cls).items() if name not in LEFT_OVER}
    net.load_state_dict({name: tensor.to(torch.float32, copy=True) for name, tensor in held.items()}, assign=True)
    if cls == "T5EncoderModel":
        net.encoder.embed_tokens.weight = net.shared.weight
    if cls == "VQModel" and "scaling_factor" not in config:
        net.register_to_config(scaling_factor=1.0)  # latent diffusion's own; diffusers would put Stable Diffusion's
    return net.eval().requires_grad_(False)


def _empty(config: Mapping[str, Any], cls: str, pruned: Mapping[str, Any] | None, files: ModelFiles, place: str) -> Any:
    """The network that the configuration describes, its parameters without memory."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            net = built(config, cls)
            if pruned is not None:
                pruned_shapes.reshape(net, _shapes(pruned))
    except Exception as error:  # whatever a constructor says of arguments that do not fit together
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{files.path(place)}: describes no {cls} that can be built: {said}") from None
    return net


def built(config: Mapping[str, Any], cls: str) -> Any:
    """A network of the class `cls` of diffusers or transformers, as the configuration has it, with new weights."""
    if cls.startswith("CLIPTextModel"):
        from transformers.models.clip import modeling_clip
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        usual = set(CLIPTextConfig().to_dict()) - {"dtype", "torch_dtype"}  # weights become fp32 whatever they were
        known = {key: value for key, value in dict(inner or {}).items() if key in usual}
        return getattr(modeling_clip, cls)(CLIPTextConfig(**known))
    if cls == "T5EncoderModel":
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5EncoderModel

        usual = set(T5Config().to_dict()) - {"dtype", "torch_dtype"}
        return T5EncoderModel(T5Config(**{key: value for key, value in config.items() if key in usual}))
    import diffusers

    owner: Any = getattr(diffusers, cls)
    return owner.from_config({key: value for key, value in config.items() if key != "_name_or_path"})


def _shapes(pruned: Mapping[str, Any]) -> dict[str, list[int]]:
    for name, shape in pruned.items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n <= MOST for n in shape):
            raise ValueError(f"{PRUNED}: {name} is no shape")
    return dict(pruned)


def _fitting(
    net: Any, headers: list[Header], wanted: Mapping[str, tuple[int, ...]], cls: str, files: ModelFiles, folder: str
) -> None:
    """Raise CheckpointError unless the files hold exactly the tensors that the network has, in their shapes."""
    where, held = files.path(folder), {}
    for header in headers:
        held |= {name: shape for name, (_, shape) in header.tensors.items()}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in _renamed(net, {n: torch.empty(s, device="meta") for n, s in held.items()}, cls).items()
        if name not in LEFT_OVER
    }
    missing, more = sorted(set(wanted) - set(shapes)), sorted(set(shapes) - set(wanted))
    if missing:
        raise CheckpointError(
            f"{where}: its weights lack {len(missing)} of {len(wanted)} tensors of a {cls}, such as {missing[0]}; "
            "fetch them again"
        )
    if more:
        raise CheckpointError(
            f"{where}: its weights hold {len(more)} tensors that no {cls} of its config has: {more[0]}"
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{where}: {name} has the shape {shapes[name]}, its config asks for {shape}")


def _renamed(net: Any, tensors: dict[str, Tensor], cls: str) -> dict[str, Tensor]:
    """The tensors under the names that this release of the libraries gives them."""
    if cls.startswith("CLIPTextModel"):
        own = any(name.startswith(PREFIX) for name in net.state_dict())
        if not own and all(name.startswith(PREFIX) for name in tensors):
            return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        return tensors
    if cls == "T5EncoderModel":
        held = next((tensors[name] for name in TIED if name in tensors), None)
        return tensors if held is None else {**dict.fromkeys(TIED, held), **tensors}
    found: Any = dict(tensors)
    net._fix_state_dict_keys_on_load(found)  # names of attention layers before diffusers 0.18
    return found


def _plausible(config: Mapping[str, Any], cls: str, files: ModelFiles, place: str, tensors: int) -> None:
    """Raise CheckpointError for a configuration that no network has, before anything is built from it."""
    where = files.path(place)
    for name in FORBIDDEN:
        if config.get(name):
            raise CheckpointError(f"{where}: has {name}, which names code or files of its own; such models are refused")
    said = config.get("_class_name", cls)
    if said != cls:
        raise CheckpointError(f"{where}: describes a {said!r}, model_index.json a {cls}")
    for name, value in _leaves(config):
        if isinstance(value, list) and len(value) > MOST_ITEMS:
            raise CheckpointError(f"{where}: {name} lists {len(value):,} entries; at most {MOST_ITEMS} are read")
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = MOST_LAYERS if "layers" in name else MOST
            if abs(value) > most:
                raise CheckpointError(f"{where}: {name} = {value:,} is not a network's; at most {most:,} is read")
    if _least_tensors(config) > max(tensors, 1):
        raise CheckpointError(f"{where}: asks for more layers than its weights hold tensors ({tensors:,})")


def _positions(config: Mapping[str, Any], headers: list[Header], where: Path) -> None:
    """Raise CheckpointError unless the file holds the table of positions that would be computed from the config."""
    sizes = [config.get(name) for name in ("pos_embed_max_size", "num_attention_heads", "attention_head_dim")]
    held = [header.tensors["pos_embed.pos_embed"][1] for header in headers if "pos_embed.pos_embed" in header.tensors]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise CheckpointError(f"{where}: pos_embed_max_size, heads and their width are {sizes}; give whole numbers")
    side, heads, width = cast("list[int]", sizes)
    if held != [(1, side**2, heads * width)]:
        raise CheckpointError(
            f"{where}: asks for {side**2:,} positions of {heads * width}, which its weights do not hold"
        )


def _leaves(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict) and depth < 3:
            yield from _leaves(value, depth + 1)
        if isinstance(value, list) and len(value) <= MOST_ITEMS:
            for item in value:
                yield from _leaves({name: item}, depth + 1) if depth < 3 else ()


def _least_tensors(config: Mapping[str, Any]) -> int:
    """A lower bound of the tensors of the network that a configuration describes: two for each of its layers."""
    if "num_hidden_layers" in config:
        layers = config["num_hidden_layers"]
        return 8 * layers if isinstance(layers, int) else 0
    if "num_layers" in config:
        layers = [config["num_layers"], config.get("num_single_layers", 0)]  # the second of FLUX's transformer
        return 8 * sum(number for number in layers if isinstance(number, int))
    blocks, layers = config.get("block_out_channels"), config.get("layers_per_block", 1)
    count = len(blocks) if isinstance(blocks, list) else 1
    if isinstance(layers, list):
        return 2 * sum(n for n in layers if isinstance(n, int))
    return 2 * count * layers if isinstance(layers, int) else 0
