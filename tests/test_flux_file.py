"""FLUX in one safetensors file, in the key layout of the original release: the denoiser alone, or with other parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import call
from harness.diffusion import checkpoint, flux_file, single_file
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError
from harness.diffusion.samplers import FlowEuler
from harness.judges import hub
from harness.scan import verdict
from tests import single_files
from tests.oracles import tiny_flux
from tests.test_single_file import edited, without, zipped

Made = tuple[DiffusionModel, Path]
SETTINGS = {"num_attention_heads": 24, "attention_head_dim": 128}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The model, and a folder with bare.safetensors, whole.safetensors and the directory m."""
    root = tmp_path_factory.mktemp("flux")
    model = tiny_flux(root / "tokens")
    checkpoint.save(model, root / "m")
    for name, whole in (("bare", False), ("whole", True)):
        single_files.write_flux(model, root / f"{name}.safetensors", whole)
    return model, root


@pytest.mark.parametrize("kind", ["bare", "whole"])
def test_every_tensor_of_flux_comes_back_to_its_place(kind: str, made: Made) -> None:
    model, root = made
    again = hub.load(hub.Source(str(root / f"{kind}.safetensors"), config=root / "m"))
    assert set(again.components()) == set(model.components()) and again.packed
    for name, part in model.components().items():
        held = again.components()[name].state_dict()
        assert set(held) == set(part.state_dict())
        assert all(torch.equal(held[key], value) for key, value in part.state_dict().items()), name
    assert again.dynamic_shift == model.dynamic_shift
    for text in ("a red circle", "a blue square"):
        assert again.tokenizer_2(text).input_ids == model.tokenizer_2(text).input_ids  # type: ignore[misc]
    laid_out = single_file.opened(root / f"{kind}.safetensors", root / "m")
    beside = ["text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
    assert sorted(laid_out.beside) == ([*beside, "vae/diffusion_pytorch_model.safetensors"] if kind == "bare" else [])
    assert laid_out.unread == ()


def test_a_file_of_flux_without_guidance_is_read_too(tmp_path: Path) -> None:
    model = tiny_flux(tmp_path / "tokens", guidance=False)
    checkpoint.save(model, tmp_path / "m")
    single_files.write_flux(model, tmp_path / "m.safetensors", False)
    assert not any("guidance" in name for name in load_file(tmp_path / "m.safetensors"))
    again = hub.load(hub.Source(str(tmp_path / "m.safetensors"), config=tmp_path / "m"))
    assert all(torch.equal(again.denoiser.state_dict()[k], v) for k, v in model.denoiser.state_dict().items())


def test_the_parts_beside_the_file_are_those_of_the_directory(made: Made, tmp_path: Path) -> None:
    """The file's own parts count where it has them."""
    _, root = made
    config = Path(shutil.copytree(root / "m", tmp_path / "m"))
    file = config / "text_encoder_2" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    told = {}
    for kind in ("bare", "whole"):
        model = hub.load(hub.Source(str(root / f"{kind}.safetensors"), config=config))
        told[kind] = model.components()["text_encoder_2"].state_dict()["shared.weight"]
    before = made[0].components()["text_encoder_2"].state_dict()["shared.weight"]
    assert torch.equal(told["whole"], before) and torch.equal(told["bare"], before + 1)


def test_the_fused_layers_are_split_as_diffusers_splits_them_at_fluxs_own_width() -> None:
    """Rows are numbered, and all other tensors are of one number: the converter looks at no other size."""
    from diffusers.loaders import single_file_utils as converters

    state = tiny_flux_names()
    rows = torch.arange(7 * 3072.0)
    state |= {"single_blocks.0.linear1.weight": rows[:, None].clone(), "single_blocks.0.linear1.bias": rows.clone()}
    theirs: dict[str, Any] = converters.convert_flux_transformer_checkpoint_to_diffusers(dict(state))  # type: ignore[no-untyped-call]
    ours, unknown = flux_file.converted("transformer", state, SETTINGS)
    assert not unknown and set(ours) == set(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert ours["single_transformer_blocks.0.proj_mlp.bias"].tolist() == rows[3 * 3072 :].tolist()


def tiny_flux_names() -> dict[str, torch.Tensor]:
    """A tensor of three rows for each name in a file of FLUX of one block of each kind."""
    layers = {"img_in": "wb", "txt_in": "wb", "final_layer.linear": "wb"}
    layers |= {f"{x}_in.{y}_layer": "wb" for x in ("time", "vector", "guidance") for y in ("in", "out")}
    for stream in ("img", "txt"):
        layers |= {
            f"double_blocks.0.{stream}_{x}": "wb" for x in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
        }
        layers |= {f"double_blocks.0.{stream}_attn.norm.{x}_norm": "s" for x in ("query", "key")}
    layers |= {f"single_blocks.0.{x}": "wb" for x in ("modulation.lin", "linear2")}
    layers |= {f"single_blocks.0.norm.{x}_norm": "s" for x in ("query", "key")}
    kinds = {"w": "weight", "b": "bias", "s": "scale"}
    found = {f"{name}.{kinds[kind]}": torch.arange(3.0) for name, each in layers.items() for kind in each}
    return found | {f"final_layer.adaLN_modulation.1.{kind}": torch.arange(4.0) for kind in ("weight", "bias")}


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return edited(lambda held: {name.replace(old, new): value for name, value in held.items()})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a zipped pickle": (zipped, "a pickle can run code .* convert it"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "truncated or damaged"),
    "no entry for images": (without("img_in."), "no img_in.weight; it is another release"),
    "no vector": (without("vector_in."), "no vector_in.in_layer.weight; it is another release"),
    "no last layer": (without("final_layer."), "no final_layer.linear.weight; it is another release"),
    "no single blocks": (without("single_blocks."), r"no single_blocks\.0\.linear1\.weight; it is another release"),
    "no double blocks": (without("double_blocks."), "holds no denoiser"),
    "a tensor missing": (
        without("double_blocks.0.img_mlp.0.bias"), r"its transformer cannot be converted \(KeyError: .*mlp\.0\.bias",
    ),
    "guidance that the configuration does not have": (
        without("guidance_in."), "lack 4 of .* tensors of a FluxTransformer2DModel",
    ),
    "a block more": (
        edited(lambda h: h | {k.replace("e_blocks.0", "e_blocks.1"): v.clone() for k, v in h.items() if "single" in k}),
        "hold .* tensors that no FluxTransformer2DModel of its config has",
    ),
    "another size": (
        edited(lambda held: held | {"img_in.bias": torch.zeros(7)}), r"has the shape \(7,\), its config asks for",
    ),
    "a narrow fused layer": (
        edited(lambda held: held | {"single_blocks.0.linear1.bias": torch.zeros(7)}), "cannot be converted",
    ),
    "a fused layer of another height": (
        edited(lambda held: held | {"single_blocks.0.linear1.bias": torch.zeros(120)}), "its config asks for",
    ),
    "fp8": (
        edited(lambda held: held | {"img_in.bias": held["img_in.bias"].to(torch.float8_e4m3fn)}),
        "is of type F8_E4M3; give weights in fp32 or fp16",
    ),
    "NaN": (
        edited(lambda held: held | {"img_in.bias": torch.full_like(held["img_in.bias"], torch.nan)}), "returns NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_damaged_file_of_flux_is_refused_in_one_line(name: str, made: Made, tmp_path: Path) -> None:
    damage, words = REFUSED[name]
    shutil.copyfile(made[1] / "bare.safetensors", tmp_path / "m.safetensors")
    damage(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        hub.load(hub.Source(str(tmp_path / "m.safetensors"), config=made[1] / "m"))
    assert "\n" not in str(caught.value)


def removed(*names: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return damage


def other_class(directory: Path) -> None:
    place = directory / "transformer" / "config.json"
    place.write_text(place.read_text().replace("FluxTransformer2DModel", "SD3Transformer2DModel"))


VAE = "vae/diffusion_pytorch_model.safetensors"
DIRECTORY: dict[str, tuple[str, Callable[[Path], Any], str | None]] = {
    "no autoencoder": ("bare", removed(VAE), r"holds no autoencoder, and .*/vae no weights; --config DIR names a"),
    "no CLIP": ("bare", removed("text_encoder/model.safetensors"), "no CLIP text encoder, and .*/text_encoder no wei"),
    "no T5": ("bare", removed("text_encoder_2/model.safetensors"), "no T5 text encoder, and .*/text_encoder_2 no wei"),
    "a pickle for T5": (
        "bare", lambda d: (d / "text_encoder_2/model.safetensors").rename(d / "text_encoder_2/pytorch_model.bin"),
        "a pickle can run code",
    ),
    "no weights, but the file has them": (
        "whole", removed(VAE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
                         "transformer/diffusion_pytorch_model.safetensors"), None,
    ),
    "no configuration of T5": ("whole", removed("text_encoder_2/config.json"), r"holds no text_encoder_2/config\.json"),
    "no pieces": ("whole", removed("tokenizer_2/tokenizer.json"), r"holds no tokenizer_2/tokenizer\.json"),
    "no transformer": ("bare", removed("transformer/config.json"), r"holds no transformer/config\.json; give a"),
    "another transformer": ("bare", other_class, "its transformer is a 'SD3Transformer2DModel', FLUX's is a Flux"),
    "a link": (
        "bare", lambda d: ((d / VAE).rename(d / "vae/x"), (d / VAE).symlink_to("x")), "is a link; copy what it leads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DIRECTORY))
def test_what_the_directory_beside_a_file_of_flux_lacks_is_named(name: str, made: Made, tmp_path: Path) -> None:
    kind, damage, words = DIRECTORY[name]
    config = Path(shutil.copytree(made[1] / "m", tmp_path / "m"))
    damage(config)
    source = hub.Source(str(made[1] / f"{kind}.safetensors"), config=config)
    if words is None:
        assert hub.load(source).packed
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        hub.load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "lacks"), [("bare", ", no autoencoder, no CLIP text encoder, no T5 text encoder"), ("whole", "")]
)
def test_a_file_of_flux_alone_says_what_it_lacks_and_which_option_gives_it(kind: str, lacks: str, made: Made) -> None:
    with pytest.raises(CheckpointError) as caught:
        hub.Source(str(made[1] / f"{kind}.safetensors")).fetch()
    said = f"holds no configurations, no tokenizer of T5{lacks}; --config DIR names a diffusers directory of FLUX"
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_belong_to_no_part_of_a_file_of_flux_are_named(made: Made, tmp_path: Path) -> None:
    more = {
        "double_blocks.0.img_mod.lin.extra": torch.zeros(2), "vae.encoder.extra": torch.zeros(2),
        "text_encoders.clip_l.logit_scale": torch.zeros(1), "other": torch.zeros(1),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(4),
    }  # fmt: skip
    single_files.write_flux(made[0], tmp_path / "m.safetensors", True, more)
    found = single_file.opened(tmp_path / "m.safetensors", made[1] / "m")
    assert set(found.unread) == set(more)
    assert hub.load(hub.Source(str(tmp_path / "m.safetensors"), config=made[1] / "m")).packed


def test_a_file_of_flux_is_scanned_and_the_report_says_which_parts_are_from_elsewhere(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "sampler_of", lambda model: FlowEuler(steps=2))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    words = ["--config", str(made[1] / "m"), "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    told = {}
    for kind in ("bare", "whole"):
        assert call(["scan", str(made[1] / f"{kind}.safetensors"), *words]) == 6
        told[kind] = json.loads(capsys.readouterr().out)
    bare, whole = told["bare"], told["whole"]
    assert list(whole["digests"]) == ["whole.safetensors"]
    assert set(bare["digests"]) == {
        "bare.safetensors", VAE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
    }  # fmt: skip
    says = "The file does not hold these parts: text_encoder, text_encoder_2, vae."
    assert any(says in line for line in bare["limits"]) and not any(says in line for line in whole["limits"])
