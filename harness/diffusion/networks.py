"""Networks from a config and safetensors, strictly: all tensors that the config asks for and no others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from harness.diffusion import memory, pruned_shapes
from harness.diffusion.model_files import FLOATS, CheckpointError, Header, ModelFiles, short

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
MOST_VALUES = 10_000  # in all of a configuration
LEFT_OVER = ("embeddings.position_ids", "text_model.embeddings.position_ids")  # buffers that older releases saved
UNUSED = {"dtype", "torch_dtype", "output_attentions", "output_hidden_states", "return_dict"}  # of a text encoder:
# weights become fp32 whatever they were, and each call says what it wants to be returned
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
    config = files.configuration(place)
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
    except Exception as error:  # whatever a constructor says of arguments that do not fit together
        raise CheckpointError(f"{files.path(place)}: describes no {cls} that can be built: {short(error)}") from None
    if pruned is not None:
        try:
            with init_empty_weights(include_buffers=False):
                pruned_shapes.reshape(net, _shapes(pruned))
        except Exception as error:  # what torch says of shapes that do not fit together
            raise CheckpointError(
                f"{files.path(place).with_name(PRUNED)}: describes no pruned {cls}: {short(error)}"
            ) from None
    return net


def built(config: Mapping[str, Any], cls: str) -> Any:
    """A network of the class `cls` of diffusers or transformers, as the configuration has it, with new weights."""
    if cls.startswith("CLIPTextModel"):
        from transformers.models.clip import modeling_clip
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        usual = set(defaults(cls)) - UNUSED
        known = {key: value for key, value in dict(inner or {}).items() if key in usual}
        return getattr(modeling_clip, cls)(CLIPTextConfig(**known))
    if cls == "T5EncoderModel":
        from transformers.models.t5.configuration_t5 import T5Config
        from transformers.models.t5.modeling_t5 import T5EncoderModel

        usual = set(defaults(cls)) - UNUSED
        return T5EncoderModel(T5Config(**{key: value for key, value in config.items() if key in usual}))
    import diffusers

    owner: Any = getattr(diffusers, cls)
    return owner.from_config({key: value for key, value in config.items() if key != "_name_or_path"})


def defaults(cls: str) -> Mapping[str, Any]:
    """The settings of a class of networks and schedulers that its configuration may have, with their defaults."""
    if cls.startswith("CLIPTextModel"):
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        return CLIPTextConfig().to_dict()
    if cls == "T5EncoderModel":
        from transformers.models.t5.configuration_t5 import T5Config

        return T5Config().to_dict()
    import diffusers

    owner: Any = getattr(diffusers, cls)
    given = list(inspect.signature(owner.__init__).parameters.values())[1:]
    return {each.name: None if each.default is each.empty else each.default for each in given}


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
    for header in headers:
        for name, (kind, _) in header.tensors.items():
            if kind not in FLOATS and name not in LEFT_OVER:
                raise CheckpointError(
                    f"{where}: {name} is of type {kind}, as in quantised weights; give weights in fp32, fp16 or bf16"
                )
    needed, there = 4 * sum(map(prod, wanted.values())), memory.total()
    if needed > there:
        raise CheckpointError(
            f"{where}: its weights take {needed / 1e9:,.1f} GB in fp32, and {there / 1e9:,.1f} GB of memory are here; "
            "use a machine with more, or a container with a higher limit"
        )


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
    said = config.get("_class_name", cls)
    if said != cls:
        raise CheckpointError(f"{where}: describes a {said!r}, model_index.json a {cls}")
    for number, (name, value) in enumerate(_leaves(config)):
        if number >= MOST_VALUES:
            raise CheckpointError(f"{where}: holds more than {MOST_VALUES:,} values, which no network's does")
        if isinstance(value, list) and len(value) > MOST_ITEMS:
            raise CheckpointError(f"{where}: {name} lists {len(value):,} entries; at most {MOST_ITEMS} are read")
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = MOST_LAYERS if "layers" in name else MOST
            if abs(value) > most:
                raise CheckpointError(f"{where}: {name} = {value:,} is not a network's; at most {most:,} is read")
    for name, usual in defaults(cls).items():
        numbers = usual if isinstance(usual, list | tuple) else (usual,)
        given = config.get(name, usual)
        of_numbers = bool(numbers) and all(type(number) in (int, float) for number in numbers)
        if of_numbers and any(isinstance(value, str) for value in (given if isinstance(given, list) else (given,))):
            raise CheckpointError(f"{where}: {name} is {given!r}; give a number without quotes")
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


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each value of a configuration with the name under which it stands, also those inside lists and objects."""
    left = list(config.items())
    while left:
        name, value = left.pop()
        yield name, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list) and len(value) <= MOST_ITEMS:
            left += ((name, item) for item in value)


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
    plain = 2 * count * layers if isinstance(layers, int) else 0
    return max(plain, 8 * _transformers(config))


def _transformers(config: Mapping[str, Any]) -> int:
    """A lower bound of the transformer layers of a UNet with cross-attention: those of one attention in each of its
    blocks that have it."""
    total = 0
    for way, named in (("down", "transformer_layers_per_block"), ("up", "reverse_transformer_layers_per_block")):
        kinds, layers = config.get(f"{way}_block_types"), config.get(named)
        if not isinstance(kinds, list) or layers is None:
            continue
        each = layers if isinstance(layers, list) else [layers] * len(kinds)
        for kind, entry in zip(kinds, each, strict=False):
            numbers = (entry if isinstance(entry, list) else [entry]) if "CrossAttn" in str(kind) else []
            total += sum(number for number in numbers if type(number) is int)
    return total
