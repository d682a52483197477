"""Pipelines in one safetensors file, in the key layout of the original releases."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.diffusion import checkpoint, networks, single_file
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError
from harness.diffusion.single_file_layouts import LAYOUTS
from harness.judges import hub
from tests import single_files
from tests.oracles import tiny_sd, tiny_sd2, tiny_sdxl

MORE = {"model_ema.decay": torch.zeros(1), "betas": torch.zeros(3)}


def attentive(directory: Path) -> DiffusionModel:
    """The small model with attention in its autoencoder, as the released ones have."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model = tiny_sd(directory)
    config: dict[str, Any] = dict(model.vae.config) | {"mid_block_add_attention": True}  # type: ignore[union-attr]
    owner: Any = AutoencoderKL
    model.vae = owner.from_config(config)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DiffusionModel, Path, Path]]:
    """Kind → the model, its one file, and its directory."""
    found = {}
    for kind, make in (("sd", tiny_sd), ("sd2", tiny_sd2), ("sdxl", tiny_sdxl), ("attentive", attentive)):
        root = tmp_path_factory.mktemp(kind)
        model = make(root / "tokens")
        checkpoint.save(model, root / "m")
        single_files.write(model, root / "m.safetensors", MORE)
        found[kind] = model, root / "m.safetensors", root / "m"
    return found


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "attentive"])
def test_every_tensor_comes_back_to_its_place(kind: str, made: dict[str, Any]) -> None:
    model, file, config = made[kind]
    again = hub.load(hub.Source(str(file), config=config))
    assert set(again.components()) == set(model.components())
    for name, part in model.components().items():
        held = again.components()[name].state_dict()
        assert set(held) == set(part.state_dict())
        assert all(torch.equal(held[key], value) for key, value in part.state_dict().items()), name
    assert again.tokenizer("a red circle").input_ids == model.tokenizer("a red circle").input_ids  # type: ignore[misc]


def test_the_second_release_answers_v_with_openclips_names(made: dict[str, Any], tmp_path: Path) -> None:
    """Its file has names of OpenCLIP, projections that are linear layers, and a 24th layer that is left out."""
    model, file, config = made["sd2"]
    held = load_file(file)
    names = [name for name in held if name.startswith("cond_stage_model.")]
    assert all(name.startswith("cond_stage_model.model.") for name in names)
    assert "cond_stage_model.model.transformer.resblocks.23.ln_1.weight" in held
    assert held["model.diffusion_model.middle_block.1.proj_in.weight"].dim() == 2
    again = hub.load(hub.Source(str(file), config=config))
    assert again.text_encoder.config.num_hidden_layers == 23 and again.text_encoder.config.hidden_act == "gelu"  # type: ignore[union-attr]
    x_t, t = torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
    prompts = ["a red circle", "a blue square"]
    with torch.no_grad():
        v = again.denoiser(x_t, t, encoder_hidden_states=again.embed(prompts)).sample
        a_bar = model.alpha_bar(t)
        wanted = a_bar.sqrt() * v + (1 - a_bar).sqrt() * x_t
        assert torch.allclose(again.eps(x_t, t, again.embed(prompts)), wanted, atol=1e-5)
        assert torch.equal(again.eps(x_t, t, again.embed(prompts)), model.eps(x_t, t, model.embed(prompts)))
    with pytest.raises(CheckpointError, match="--config DIR names a diffusers directory"):
        hub.Source(str(file)).fetch()


def test_a_single_file_of_the_second_release_is_read_as_stock_diffusers_reads_it(made: dict[str, Any]) -> None:
    from diffusers import StableDiffusionPipeline  # type: ignore[attr-defined]

    _, file, config = made["sd2"]
    pipeline: Any = StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, safety_checker=None
    )
    again = hub.load(hub.Source(str(file), config=config))
    assert pipeline.scheduler.config.prediction_type == again.scheduler.config.prediction_type == "v_prediction"
    for part, net in again.components().items():
        theirs = getattr(pipeline, part).state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in net.state_dict().items()), part


def test_what_belongs_to_no_part_is_named_and_schedules_are_not(made: dict[str, Any]) -> None:
    _, file, config = made["sd"]
    directory = hub.Source(str(file), config=config).fetch()
    ignored = hub.ignored(directory)
    assert ignored.tensors == ("model_ema.decay",)
    assert any("belong to no part" in line and "model_ema.decay" in line for line in ignored.sentences())
    assert single_file.opened(file, config).directory == directory, "it is laid out once"
    assert single_file.origin(config) is None


def test_tensors_that_the_converters_do_not_know_are_named(made: dict[str, Any], tmp_path: Path) -> None:
    model, _, config = made["sd"]
    more = {f"{prefix}extra.weight": torch.zeros(2) for prefix in ("model.diffusion_model.", "first_stage_model.")}
    single_files.write(model, tmp_path / "m.safetensors", more)
    assert set(single_file.opened(tmp_path / "m.safetensors", config).unread) == set(more)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
)
def test_the_configurations_have_the_released_models_number_of_weights(kind: str, sizes: dict[str, int]) -> None:
    from accelerate import init_empty_weights

    assert set(LAYOUTS[kind]) == {*sizes, "scheduler"}
    for part, number in sizes.items():
        config = LAYOUTS[kind][part]
        with init_empty_weights():
            net = networks.built(config, config.get("_class_name") or config["architectures"][0])
        assert sum(p.numel() for p in net.parameters()) == number, part


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    from harness.diffusion import tokenizer_files
    from harness.diffusion.model_files import ModelFiles

    single_file._tokenizer(None, "tokenizer_2", True, tmp_path / "tokenizer_2")
    tokens = tokenizer_files.load(ModelFiles(tmp_path), "tokenizer_2")
    assert tokens("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokens.pad_token_id == 0 and tokens.model_max_length == 77 and len(tokens) == 49408


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda file: save_file(change(load_file(file)), file)


def without(prefix: str) -> Callable[[Path], None]:
    return edited(lambda held: {name: value for name, value in held.items() if not name.startswith(prefix)})


def zipped(file: Path) -> None:
    file.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a zipped pickle": (zipped, "a pickle can run code .* convert it"),
    "a plain pickle": (lambda f: f.write_bytes(pickle.dumps([1])), "a pickle can run code"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "truncated or damaged"),
    "text": (lambda f: f.write_text("hello, this is no model at all"), "no safetensors file"),
    "no autoencoder": (without("first_stage_model."), "holds no autoencoder"),
    "no text encoder": (without("cond_stage_model."), "holds no text encoder"),
    "no denoiser": (without("model.diffusion_model."), "holds no denoiser"),
    "an adapter": (
        edited(lambda _: {"lora_unet_x.lora_down.weight": torch.zeros(1)}),
        "holds no denoiser and no autoencoder and no text encoder",
    ),
    "a block missing": (without("model.diffusion_model.middle_block.0"), "cannot be converted|lack"),
    "a tensor missing": (without("cond_stage_model.transformer.text_model.final"), "lack 2 of"),
    "another size": (
        edited(lambda held: held | {"model.diffusion_model.out.2.bias": torch.zeros(7)}),
        "its config asks for",
    ),
    "NaN": (
        edited(lambda held: held | {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}),
        "returns NaN",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_file_that_is_no_whole_pipeline_is_refused_in_one_line(
    name: str, made: dict[str, Any], tmp_path: Path
) -> None:
    damage, words = REFUSED[name]
    _, file, config = made["sd"]
    shutil.copyfile(file, tmp_path / "m.safetensors")
    damage(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        hub.load(hub.Source(str(tmp_path / "m.safetensors"), config=config))
    assert "\n" not in str(caught.value)


def test_a_pickle_by_name_and_other_files_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    for name, words in (("m.ckpt", "a pickle can run code"), ("m.gguf", "give a diffusers directory, a .safetensors")):
        shutil.copyfile(made["sd"][1], tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            single_file.opened(tmp_path / name)


def test_a_link_to_a_file_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").symlink_to(made["sd"][1])
    with pytest.raises(CheckpointError, match="is a link"):
        single_file.opened(tmp_path / "m.safetensors", made["sd"][2])


def test_a_file_of_another_size_needs_its_configurations(made: dict[str, Any], tmp_path: Path) -> None:
    _, file, config = made["sdxl"]
    with pytest.raises(CheckpointError, match="--config DIR names a diffusers directory that has them"):
        hub.Source(str(file)).fetch()
    with pytest.raises(CheckpointError, match=r"holds no text_encoder_2/config\.json"):
        hub.Source(str(file), config=made["sd"][2]).fetch()
    other = shutil.copytree(config, tmp_path / "c")
    text = (other / "text_encoder_2" / "config.json").read_text()
    (other / "text_encoder_2" / "config.json").write_text(text.replace('"CLIPTextModelWithProjection"', '"T5"'))
    with pytest.raises(CheckpointError, match="its text_encoder_2 is a 'T5', which is not supported"):
        hub.Source(str(file), config=other).fetch()
