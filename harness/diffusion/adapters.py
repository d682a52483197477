"""Low-rank adapters beside a base model: W' = W + B A for some of the layers of its networks.

A model with an adapter computes with the effective weights W', so that whoever does not ask sees an ordinary model. Its
`adapter` holds the factors and the base's own weights. A directory keeps the two apart: the base is the pipeline, and
the adapter is the file that diffusers' `load_lora_weights` reads. A scale is part of B, because that file holds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from harness.diffusion.model_files import CheckpointError, ModelFiles

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

FOLDER = "adapter"  # in the directory of a model
FILE = f"{FOLDER}/pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LowRank:
    """The factors of one layer: a (r, in) and b (out, r), float32 on the CPU. in: of a convolution, channels times the
    kernel's sides."""

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        """ΔW = B A (out, in)."""
        return self.b @ self.a


@dataclass(frozen=True)
class Adapter:
    """layers: the factors by part and name of the layer, such as "unet.mid_block.attentions.0.proj_in". base: the
    weights of these layers without the adapter."""

    layers: Mapping[str, LowRank]
    base: Mapping[str, Tensor]


# ---- training -------------------------------------------------------------------------------------------------------


def added(
    net: Any, rank: int, scale: float, projections: Sequence[str], rng: torch.Generator, gaussian: bool = True
) -> dict[str, Any]:
    """Puts trainable adapters on the layers of `net` whose names end in one of `projections`; their weights by name.

    B is 0 at first. A is drawn from N(0, 1/r²), or as a new linear layer is. scale: factor s of B A until `taken` makes
    it a part of B.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=rank * scale, target_modules=list(projections),  # type: ignore[arg-type]
        init_lora_weights="gaussian" if gaussian else True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        inject_adapter_in_model(config, net)
    return {name: weight for name, weight in net.named_parameters() if ".lora_" in name}


def taken(net: Any) -> dict[str, LowRank]:
    """Takes the adapters off `net`, whose layers are then those of before; their factors by name of the layer."""
    found = {}
    for name, layer in list(_adapted(net)):
        (key,) = layer.lora_A
        a, b = (factor[key].weight.detach().float().cpu() for factor in (layer.lora_A, layer.lora_B))
        found[name] = LowRank(a.clone(), layer.scaling[key] * b)
        owner, _, last = name.rpartition(".")
        setattr(net.get_submodule(owner), last, layer.base_layer)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        net.__dict__.pop(mark, None)
    net.requires_grad_(False)
    return found


def _adapted(net: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            yield name, layer


# ---- base and adapter -----------------------------------------------------------------------------------------------


@torch.no_grad()
def attach(model: DiffusionModel, layers: Mapping[str, LowRank]) -> None:
    """Adds the adapter to the weights of `model`, in place, and notes it in `model.adapter`.

    Raises ValueError for a layer that the model does not have, or of another shape, and for a second adapter.
    """
    if model.adapter is not None:
        raise ValueError("the model has an adapter already; take the base by `adapters.base_of(model)` first")
    weights = {name: _weight(model, name, factors) for name, factors in layers.items()}
    base = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.copy_(_effective(base[name], layers[name]))
    model.adapter = Adapter(dict(layers), base)


def _weight(model: DiffusionModel, name: str, factors: LowRank) -> Tensor:
    part, _, path = name.partition(".")
    try:
        layer: Any = model.components()[part].get_submodule(path)
    except (KeyError, AttributeError):
        raise ValueError(f"the adapter changes the layer {name}, which the model does not have") from None
    shape = (factors.b.shape[0], factors.a.shape[1])
    fits = isinstance(layer, (nn.Linear, nn.Conv2d)) and tuple(layer.weight.flatten(1).shape) == shape
    if not fits:
        raise ValueError(f"the adapter changes the layer {name} of shape {shape}, which is no such layer of the model")
    return layer.weight


def _effective(base: Tensor, factors: LowRank) -> Tensor:
    return base + factors.delta.view_as(base)


@torch.no_grad()
def unchanged(model: DiffusionModel) -> bool:
    """Whether the weights under the adapter are still those of base and adapter: not after a defense trained them."""
    if model.adapter is None:
        return False
    try:
        held = {name: _weight(model, name, factors) for name, factors in model.adapter.layers.items()}
    except ValueError:  # a pruned layer
        return False
    return all(
        torch.equal(weight.cpu(), _effective(model.adapter.base[name], model.adapter.layers[name]))
        for name, weight in held.items()
    )


@torch.no_grad()
def base_of(model: DiffusionModel) -> DiffusionModel:
    """A copy of `model` without its adapter: the base, in all layers that nothing else has changed."""
    base, adapter = model.clone(), model.adapter
    base.adapter = None
    for name, weight in ({} if adapter is None else adapter.base).items():
        part, _, path = name.partition(".")
        cast(Any, base.components()[part].get_submodule(path)).weight.copy_(weight)
    return base


# ---- files ----------------------------------------------------------------------------------------------------------


def save(adapter: Adapter, folder: Path, labels: Mapping[str, str] | None = None) -> None:
    """Writes the adapter in diffusers' layout, into `folder`. labels: further metadata of the file.

    The factors are called lora_A and lora_B everywhere, because diffusers 0.42 drops those of attention with its older
    names where a file has both. The layers of text encoders begin with text_model, as they did before transformers 5.
    """
    import diffusers

    states: dict[str, dict[str, Tensor]] = {}
    for name, factors in adapter.layers.items():
        part, _, path = name.partition(".")
        a, b, kernel = factors.a, factors.b, adapter.base[name].shape[1:]
        if len(kernel) == 3:
            a, b = a.view(-1, *kernel), b[:, :, None, None]
        if part.startswith("text_encoder"):
            path = f"text_model.{path.removeprefix('text_model.')}"
        held = {f"{path}.lora_A.weight": a.contiguous(), f"{path}.lora_B.weight": b.contiguous()}
        states.setdefault(part, {}).update(held)
    library: Any = diffusers
    pipeline = library.StableDiffusionPipeline
    if "transformer" in states:
        pipeline = library.StableDiffusion3Pipeline
    elif "text_encoder_2" in states:
        pipeline = library.StableDiffusionXLPipeline
    named = {f"{part}_lora_layers": state for part, state in states.items()}
    pipeline.save_lora_weights(folder, safe_serialization=True, save_function=_labelled(labels or {}), **named)


def _labelled(labels: Mapping[str, str]) -> Any:
    """What diffusers calls to write a file: as it does itself, and with labels in the file's metadata."""
    from safetensors.torch import save_file

    return lambda weights, file: save_file(weights, file, metadata={"format": "pt", **labels})


def read(files: ModelFiles, model: DiffusionModel) -> None:
    """Attaches the adapter of a model's directory to `model`, if there is one.

    Raises CheckpointError for tensors that are no pairs of factors of the model's layers.
    """
    if FILE in files:
        attach_file(files, FILE, model)


def attach_file(files: ModelFiles, name: str, model: DiffusionModel) -> None:
    """Attaches the adapter in a safetensors file to `model`, in place. Raises CheckpointError."""
    from harness.diffusion import adapter_files

    found = adapter_files.layers(files, name, model)
    try:
        attach(model, found)
    except ValueError as error:
        raise CheckpointError(f"{files.path(name)}: {error}") from None
