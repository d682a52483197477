"""Adapters of other makers: read as stock diffusers reads them, in every way of writing that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.diffusion import adapter_files, adapters, checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError, ModelFiles
from harness.diffusion.original_names import original
from tests.oracles import tiny_sd, tiny_sdxl

RANK = 2
NAME = "pytorch_lora_weights.safetensors"
SHORT = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    """A model and its directory."""
    root = tmp_path_factory.mktemp(request.param)
    model = (tiny_sd if request.param == "sd" else tiny_sdxl)(root / "tokens")
    checkpoint.save(model, root / "m")
    return model, root / "m"


def changed_layers(model: DiffusionModel) -> list[str]:
    """Some layers of each part: linear ones, and a convolution of the UNet."""
    ends = ("attn2.to_q", "attn1.to_out.0", "ff.net.2", "self_attn.v_proj", "mlp.fc1", "conv1", "proj_in")
    return [
        f"{part}.{name}"
        for part, net in model.components().items()
        if part != "vae"
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.endswith(ends) and (part == "unet" or "layers.0" in name)
    ]


def drawn(model: DiffusionModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer → A, B as files hold them, and alpha."""
    rng, found = torch.Generator().manual_seed(0), {}
    for i, name in enumerate(changed_layers(model)):
        part, _, path = name.partition(".")
        weight: Any = model.components()[part].get_submodule(path).weight
        a = torch.randn((RANK, *weight.shape[1:]), generator=rng) * 0.3
        b = torch.randn((len(weight), RANK, *(1 for _ in weight.shape[2:])), generator=rng) * 0.3
        found[name] = a, b, 1.0 + i % 3
    return found


def stock(model: DiffusionModel, directory: Path, folder: Path) -> dict[str, Tensor]:
    """The weights that stock diffusers computes with, adapter fused."""
    import diffusers

    library: Any = diffusers
    cls = library.StableDiffusionPipeline if model.text_encoder_2 is None else library.StableDiffusionXLPipeline
    pipeline = cls.from_pretrained(directory, local_files_only=True)
    pipeline.load_lora_weights(folder, weight_name=NAME)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    parts = {part: getattr(pipeline, part) for part in model.components()}
    return {f"{part}.{name}": value for part, net in parts.items() for name, value in net.state_dict().items()}


def ours(model: DiffusionModel, folder: Path) -> dict[str, Tensor]:
    made = model.clone()
    adapters.attach_file(ModelFiles(folder), NAME, made)
    return {
        f"{part}.{name}": value for part, net in made.components().items() for name, value in net.state_dict().items()
    }


def check(model: DiffusionModel, directory: Path, folder: Path, lost: str = "nothing") -> None:
    """lost: in the names of layers of which stock diffusers drops the factors."""
    mine, theirs = ours(model, folder), stock(model, directory, folder)
    plain = {f"{p}.{k}": v for p, net in model.components().items() for k, v in net.state_dict().items()}
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine if lost not in name)
    moved = {name.removesuffix(".weight") for name in mine if not torch.equal(mine[name], plain[name])}
    assert moved == set(changed_layers(model)), "every layer is changed, and no other"


def named(model: DiffusionModel, name: str) -> str:
    """A layer's name with the text_model. that files of others have."""
    part, _, path = name.partition(".")
    wrapped = part != "unet" and not path.startswith("text_model.")
    return f"{part}.text_model.{path}" if wrapped else name


def test_peft_names_with_a_scale_in_the_metadata(base: tuple[DiffusionModel, Path], tmp_path: Path) -> None:
    model, directory = base
    held: dict[str, Tensor] = {}
    for name, (a, b, _) in drawn(model).items():
        held |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    parts = {name.partition(".")[0] for name in drawn(model)}
    said: dict[str, Any] = {}
    for part in parts:
        ends = sorted({n.partition(".")[2] for n in drawn(model) if n.startswith(f"{part}.")})
        said |= {f"{part}.r": RANK, f"{part}.lora_alpha": 3 * RANK, f"{part}.target_modules": ends}
    save_file(held, tmp_path / NAME, {"format": "pt", adapter_files.METADATA: json.dumps(said)})
    check(model, directory, tmp_path)
    factors = adapter_files.layers(ModelFiles(tmp_path), NAME, model)
    name, (a, b, _) = next(iter(drawn(model).items()))
    assert torch.allclose(factors[name].delta, 3 * b.flatten(1) @ a.flatten(1), atol=1e-5)


def kohya(model: DiffusionModel, originals: bool, scale: float | None = None) -> dict[str, Tensor]:
    """scale: alpha / r of each layer; by default they differ."""
    held: dict[str, Tensor] = {}
    config: Any = model.denoiser.config
    for name, (a, b, alpha) in drawn(model).items():
        part, _, path = named(model, name).partition(".")
        path = original(path, config) or path if originals and part == "unet" else path
        short = SHORT[part] if model.text_encoder_2 is None or part != "text_encoder" else "lora_te1"
        key = f"{short}_{path.replace('.', '_')}"
        held |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
        if scale is not None:
            held[f"{key}.alpha"] = torch.tensor(scale * RANK)
    return held


def test_kohya_names_are_read_as_stock_diffusers_reads_them(base: tuple[DiffusionModel, Path], tmp_path: Path) -> None:
    """But for the attention of text encoders, whose factors diffusers 0.42 drops, and for other scales than 1, which it
    drops for the attention of the UNet."""
    model, directory = base
    save_file(kohya(model, False, scale=1.0), tmp_path / NAME)
    check(model, directory, tmp_path, lost="self_attn")


@pytest.mark.parametrize("originals", [False, True], ids=["diffusers-blocks", "original-blocks"])
def test_alpha_over_rank_is_the_scale_of_each_layer_of_kohyas(
    originals: bool, base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    model, _ = base
    save_file(kohya(model, originals), tmp_path / NAME)
    found = adapter_files.layers(ModelFiles(tmp_path), NAME, model)
    assert found.keys() == drawn(model).keys()
    for name, (a, b, alpha) in drawn(model).items():
        assert torch.allclose(found[name].delta, alpha / RANK * b.flatten(1) @ a.flatten(1), atol=1e-5)


def test_the_older_names_of_attention_processors(tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "tokens")
    place = "mid_block.attentions.0.transformer_blocks.0.attn2"
    rng, held = torch.Generator().manual_seed(0), {}
    for layer, width in (("to_q", 16), ("to_out", 16), ("to_k", 16)):
        held[f"{place}.processor.{layer}_lora.down.weight"] = torch.randn(RANK, width, generator=rng)
        held[f"{place}.processor.{layer}_lora.up.weight"] = torch.randn(16, RANK, generator=rng)
    save_file(held, tmp_path / NAME)
    found = adapter_files.layers(ModelFiles(tmp_path), NAME, model)
    assert set(found) == {f"unet.{place}.{layer}" for layer in ("to_q", "to_k", "to_out.0")}
    assert torch.equal(found[f"unet.{place}.to_q"].a, held[f"{place}.processor.to_q_lora.down.weight"])


def test_an_adapter_with_convolutions_is_saved_and_read_again(
    base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    model, _ = base
    (tmp_path / "given").mkdir()
    save_file(kohya(model, False), tmp_path / "given" / NAME)
    made = model.clone()
    adapters.attach_file(ModelFiles(tmp_path / "given"), NAME, made)
    checkpoint.save(made, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert again.adapter is not None and made.adapter is not None
    assert again.adapter.layers.keys() == made.adapter.layers.keys()
    for part, net in made.components().items():
        held = again.components()[part].state_dict()
        assert all(torch.allclose(held[k], v, atol=1e-6) for k, v in net.state_dict().items())


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "DoRA": (lambda held: held | {"lora_unet_mid.dora_scale": torch.ones(1)}, "of the kind DoRA; only LoRA is read"),
    "LoHa": (lambda held: held | {"lora_unet_mid.hada_w1_a": torch.ones(1)}, "of the kind LoHa"),
    "another tensor": (lambda held: held | {"weight": torch.ones(1)}, "'weight' is no factor"),
    "another base": (
        lambda held: {k.replace("mid_block", "mid_block_2"): v for k, v in held.items()},
        "which the base does not have; is it the base that the adapter is for",
    ),
    "one factor": (
        lambda held: {k: v for k, v in held.items() if "mid_block" not in k or not k.endswith("lora_up.weight")},
        "no two factors that fit",
    ),
    "ranks": (
        lambda held: {k: v[:, :1] if k.endswith("lora_up.weight") else v for k, v in held.items()},
        "no two factors that fit",
    ),
    "shape": (
        lambda held: {k: v[:-1] if k.endswith("lora_up.weight") else v for k, v in held.items()},
        "no such layer of the model",
    ),
    "nothing": (lambda held: {"lora_unet_mid.alpha": torch.ones(())}, "which the base does not have"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_adapter_of_the_base_is_refused_in_one_line(
    name: str, base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    change, words = BAD[name]
    save_file({k: v.contiguous() for k, v in change(kohya(base[0], False)).items()}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=words) as caught:
        adapters.attach_file(ModelFiles(tmp_path), NAME, base[0].clone())
    assert "\n" not in str(caught.value)


def test_an_adapter_is_told_from_a_pipeline(base: tuple[DiffusionModel, Path], tmp_path: Path) -> None:
    save_file(kohya(base[0], False), tmp_path / NAME)
    assert adapter_files.is_adapter(ModelFiles(tmp_path), NAME)
    other = next((base[1] / "unet").glob("*.safetensors"))
    assert not adapter_files.is_adapter(ModelFiles.of_file(other), other.name)
    assert load_file(other)
