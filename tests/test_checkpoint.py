"""Model directories: what comes back, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion import checkpoint
from harness.diffusion.samplers import DDIM, FlowEuler, PredictorCorrector
from harness.diffusion.seeds import image_noise, image_seeds
from harness.methods import pruning
from harness.types import Inputs
from tests.oracles import tiny_flow, tiny_mmdit, tiny_ncsn, tiny_sd, tiny_sdxl, tiny_unet


def test_a_saved_model_makes_the_same_images_again(tmp_path: Path) -> None:
    for name, model in (("one", tiny_unet()), ("two", tiny_sd(tmp_path / "tokens"))):
        checkpoint.save(model, tmp_path / name, labels={"backdoored": "true"})
        again = checkpoint.load(tmp_path / name)
        seeds = image_seeds(0, "x", 2)
        prompts = ("a red circle", "a blue square") if model.conditional else None
        inputs = Inputs(image_noise(seeds, model.shape), prompts, seeds)
        assert torch.equal(model.sample(inputs, DDIM(steps=3)), again.sample(inputs, DDIM(steps=3)))
        assert json.loads((tmp_path / name / "bench.json").read_text()) == {"backdoored": "true"}


def test_a_variance_exploding_model_comes_back_and_stock_diffusers_runs_it(tmp_path: Path) -> None:
    from diffusers import ScoreSdeVePipeline  # type: ignore[attr-defined]

    model, seeds = tiny_ncsn(channels=3), image_seeds(0, "x", 2)
    checkpoint.save(model, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    assert again.family == "ve" and torch.equal(again.sigma(torch.arange(1000)), model.sigma(torch.arange(1000)))
    assert torch.equal(*(m.sample(inputs, PredictorCorrector(steps=3)) for m in (model, again)))
    pipeline = ScoreSdeVePipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    done: Any = pipeline(
        batch_size=1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    )
    assert done.images.shape == (1, 16, 16, 3) and done.images.min() >= 0


def test_a_transformer_comes_back_and_stock_diffusers_makes_the_same_images(tmp_path: Path) -> None:
    """The stock pipeline puts 256 rows of zeros in the place of T5's text, unless it is asked for none."""
    from diffusers import StableDiffusion3Pipeline  # type: ignore[attr-defined]

    model, seeds = tiny_mmdit(tmp_path / "tokens"), image_seeds(0, "x", 2)
    checkpoint.save(model, tmp_path / "m")
    folders = {path.name for path in (tmp_path / "m").iterdir() if path.is_dir()}
    assert {"transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"} == folders
    again, prompts = checkpoint.load(tmp_path / "m"), ("a red circle", "a blue square")
    inputs = Inputs(image_noise(seeds, model.shape), prompts, seeds)
    made = model.sample(inputs, FlowEuler(steps=3))
    assert again.family == "flow" and torch.equal(made, again.sample(inputs, FlowEuler(steps=3)))
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "m", local_files_only=True, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs: Any = pipeline(
        list(prompts), num_inference_steps=3, guidance_scale=3.0, latents=inputs.noise, max_sequence_length=0,
        output_type="pt", height=32, width=32, negative_prompt=["", ""],
    )  # fmt: skip
    assert torch.allclose(2 * theirs.images - 1, made, atol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_comes_back_and_stock_diffusers_makes_the_same_images(zeros: bool, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline  # type: ignore[attr-defined]

    model, seeds = tiny_sdxl(tmp_path / "tokens", zeros), image_seeds(0, "x", 2)
    checkpoint.save(model, tmp_path / "m")
    folders = {path.name for path in (tmp_path / "m").iterdir() if path.is_dir()}
    assert {"unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"} == folders
    again, prompts = checkpoint.load(tmp_path / "m"), ("a red circle", "a blue square")
    inputs = Inputs(image_noise(seeds, model.shape), prompts, seeds)
    sampler = DDIM(steps=3, guidance=5.0)
    made = model.sample(inputs, sampler)
    assert again.empty_is_zero is zeros and torch.equal(made, again.sample(inputs, sampler))
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs: Any = pipeline(
        list(prompts), num_inference_steps=3, guidance_scale=5.0, latents=inputs.noise, output_type="pt", height=32,
        width=32,
    )  # fmt: skip
    assert torch.allclose(2 * theirs.images - 1, made, atol=1e-4)
    twin = model.clone()
    assert twin.empty_is_zero is zeros and torch.equal(made, twin.sample(inputs, sampler))


def test_half_of_the_weights_of_sdxl_is_written(tmp_path: Path) -> None:
    checkpoint.save(tiny_sdxl(tmp_path / "tokens"), tmp_path / "m", fp16=True)
    again, inputs = checkpoint.load(tmp_path / "m"), tiny_sdxl(tmp_path / "tokens")
    for name, part in again.components().items():
        for key, tensor in part.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, inputs.components()[name].state_dict()[key].half().float()), key


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: _edit(d / "unet/config.json", addition_embed_type=None), "hold 4 tensors that no UNet"),
        (lambda d: _edit(d / "unet/config.json", addition_embed_type="image"), "can be built|its weights"),
        (lambda d: _edit(d / "unet/config.json", addition_time_embed_dim=5), "addition_time_embed_dim 5 are wanted"),
        (lambda d: _edit(d / "text_encoder_2/config.json", num_hidden_layers=1), "its weights|tensors that no"),
        (lambda d: _edit(d / "model_index.json", force_zeros_for_empty_prompt="x"), "neither true nor false"),
        (
            lambda d: _edit(d / "model_index.json", text_encoder=[None, None], tokenizer=[None, None]),
            "without text_encoder and tokenizer is not supported",
        ),
        (
            lambda d: _edit(d / "model_index.json", text_encoder_2=[None, None], tokenizer_2=[None, None]),
            "if it has two text encoders, and only then",
        ),
        (
            lambda d: _edit(d / "model_index.json", tokenizer_2=[None, None]),
            "without tokenizer_2 is not supported",
        ),
    ],
    ids=["no-conditions", "others", "sizes", "layers", "zeros", "refiner", "one-encoder", "one-tokenizer"],
)
def test_a_damaged_sdxl_is_named(damage, words: str, sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(tmp_path / "m")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdxl")
    checkpoint.save(tiny_sdxl(root / "tokens"), root / "m")
    return root / "m"


def test_a_flow_without_text_comes_back(tmp_path: Path) -> None:
    model, seeds = tiny_flow(shift=3.0), image_seeds(0, "x", 2)
    checkpoint.save(model, tmp_path / "m")
    again, inputs = checkpoint.load(tmp_path / "m"), Inputs(image_noise(seeds, model.shape), None, seeds)
    assert torch.equal(again.sigma(torch.arange(1000)), model.sigma(torch.arange(1000)))
    assert torch.equal(*(m.sample(inputs, FlowEuler(steps=3)) for m in (model, again)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda d: _edit(d / "transformer/config.json", pos_embed_max_size=2**20),
            "positions of 16, which its weights",
        ),
        (lambda d: _edit(d / "transformer/config.json", num_layers=200), "asks for more layers than its weights hold"),
        (lambda d: _edit(d / "transformer/config.json", joint_attention_dim=20), "its config asks for"),
        (
            lambda d: _edit(d / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
            "use_dynamic_shifting gives",
        ),
        (lambda d: _edit(d / "scheduler/scheduler_config.json", shift=-1), "shift is -1"),
        (lambda d: _edit(d / "text_encoder_2/config.json", projection_dim=9), "its config asks for"),
        (
            lambda d: _edit(d / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"]),
            "text_encoder_3: missing, though model_index.json names it|without tokenizer_3 is not supported",
        ),
        (
            lambda d: _edit(d / "model_index.json", text_encoder_2=[None, None]),
            "without text_encoder_2 is not supported",
        ),
        (
            lambda d: _edit(d / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]),
            "text_encoder is a 'CLIPTextModel'; supported here: CLIPTextModelWithProjection",
        ),
        (lambda d: _edit(d / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]), "it is for flows"),
    ],
    ids=["positions", "layers", "width", "levels", "shift", "projection", "t5", "one-encoder", "class", "scheduler"],
)
def test_a_damaged_transformer_is_named(damage, words: str, mmdit: Path, tmp_path: Path) -> None:
    shutil.copytree(mmdit, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(tmp_path / "m")


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mmdit")
    checkpoint.save(tiny_mmdit(root / "tokens"), root / "m")
    return root / "m"


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    checkpoint.save(tiny_sd(tmp_path / "tokens"), tmp_path / "one")
    checkpoint.save(checkpoint.load(tmp_path / "one"), tmp_path / "two")
    written = [file for file in (tmp_path / "two").rglob("*.json") if str(tmp_path) in file.read_text()]
    assert not written


def test_stock_diffusers_loads_what_we_save(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    checkpoint.save(tiny_sd(tmp_path / "tokens"), tmp_path / "sd")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    done = pipeline("a red circle", num_inference_steps=2, output_type="np", height=32, width=32)
    assert done.images.shape == (1, 32, 32, 3)  # type: ignore[union-attr]


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "m")
    weights = next((tmp_path / "m" / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(checkpoint.CheckpointError, match="a pickle can run code"):
        checkpoint.load(tmp_path / "m")


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle at all")
    assert checkpoint.load(tmp_path / "m").shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "model_index.json").unlink(), "no model_index.json"),
        (lambda d: (d / "model_index.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model_index.json").write_text('{"unet": ["x", "Evil"]}'), "unet is a 'Evil'; supported"),
        (lambda d: (d / "model_index.json").write_text("[]"), "model_index.json: a JSON list, not an object"),
        (lambda d: (d / "model_index.json").write_text("[" * 100_000), "model_index.json: not JSON"),
        (lambda d: _edit(d / "model_index.json", unet=5), "unet is no pair of library and class"),
        (lambda d: _edit(d / "model_index.json", unet=["x", "UNet2DModel"]), "unet is of the library 'x'"),
        (lambda d: (d / "unet" / "config.json").write_text("5"), "config.json: a JSON int, not an object"),
        (lambda d: (d / "scheduler" / "scheduler_config.json").write_text("null"), "a JSON NoneType, not an object"),
        (lambda d: next((d / "unet").glob("*.safetensors")).write_bytes(b"short"), "truncated or damaged"),
        (lambda d: _edit(d / "unet" / "config.json", block_out_channels=[16, 16]), "its config asks for"),
    ],
    ids=[
        "no-index",
        "bad-index",
        "unknown-class",
        "list-index",
        "deep-index",
        "entry",
        "library",
        "config",
        "scheduler",
        "truncated",
        "lying-config",
    ],
)
def test_a_damaged_directory_is_named(damage, words: str, tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(tmp_path / "m")


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_digest_is_that_of_the_tensors_not_of_the_files(tmp_path: Path) -> None:
    model = tiny_unet()
    checkpoint.save(model, tmp_path / "a")
    checkpoint.save(model, tmp_path / "b")
    _edit(tmp_path / "b" / "unet" / "config.json", _diffusers_version="9")
    assert checkpoint.digest(tmp_path / "a") == checkpoint.digest(tmp_path / "b")
    next(model.denoiser.parameters()).data[0] += 1e-3
    checkpoint.save(model, tmp_path / "c")
    assert checkpoint.digest(tmp_path / "a") != checkpoint.digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("file", "changes", "counts"),
    [
        ("unet/config.json", {"norm_num_groups": 1}, True),  # the same tensors, used in another way
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, True),
        ("words.json", {"words": ["quaint"]}, True),
        ("scheduler/scheduler_config.json", {"_diffusers_version": "9"}, False),
        ("provenance.json", {"seconds": 9}, False),
    ],
)
def test_the_digest_follows_what_configs_say(file: str, changes: dict[str, Any], counts: bool, tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "m")
    path = tmp_path / "m" / file
    if not path.exists():
        path.write_text("{}")
    before = checkpoint.digest(tmp_path / "m")
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    assert checkpoint.digest(tmp_path / "m") == before, "the text changed, not what it says"
    _edit(path, **changes)
    assert (checkpoint.digest(tmp_path / "m") != before) is counts


def test_what_a_model_borrows_counts_as_its_own(tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "unet", tmp_path / "lender" / "judge")
    (tmp_path / "lender" / "words.json").write_text('["quaint"]')
    lent = {"judge": tmp_path / "lender" / "judge", "words.json": tmp_path / "lender" / "words.json"}
    borrowed = checkpoint.digest(tmp_path / "whole", lent)
    shutil.copytree(lent["judge"], tmp_path / "whole" / "judge")
    shutil.copy(lent["words.json"], tmp_path / "whole")
    assert checkpoint.digest(tmp_path / "whole") == borrowed
    lent["words.json"].write_text('["plain"]')
    assert checkpoint.digest(tmp_path / "whole", lent) != borrowed


def test_weights_that_a_directory_borrows_are_read_as_if_they_were_in_it(tmp_path: Path) -> None:
    checkpoint.save(tiny_unet(), tmp_path / "whole")
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / name).rename(tmp_path / "lent.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"no diffusion_pytorch_model\.safetensors"):
        checkpoint.load(tmp_path / "part")
    lent = {name: tmp_path / "lent.safetensors"}
    read, whole = checkpoint.load(tmp_path / "part", lent), checkpoint.load(tmp_path / "whole")
    for mine, theirs in zip(read.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert checkpoint.digest(tmp_path / "part", lent) == checkpoint.digest(tmp_path / "whole")


def test_a_pruned_model_saved_and_reloaded_makes_identical_images(tmp_path: Path) -> None:
    for name, model, sampler in (("vp", tiny_unet(), DDIM(steps=3)), ("ve", tiny_ncsn(), PredictorCorrector(steps=3))):
        pruning.prune(model, pruning.magnitude(), 0.25)
        checkpoint.save(model, tmp_path / name)
        again, seeds = checkpoint.load(tmp_path / name), image_seeds(0, "x", 2)
        inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
        assert torch.equal(model.sample(inputs, sampler), again.sample(inputs, sampler))
        checkpoint.save(again, tmp_path / "twice")
        assert checkpoint.digest(tmp_path / name) == checkpoint.digest(tmp_path / "twice")


def test_a_whole_model_saved_over_a_pruned_one_is_whole(tmp_path: Path) -> None:
    small = tiny_unet()
    pruning.prune(small, pruning.magnitude(), 0.25)
    checkpoint.save(small, tmp_path / "m")
    checkpoint.save(tiny_unet(), tmp_path / "m")
    assert not (tmp_path / "m" / "unet" / checkpoint.PRUNED).exists() and checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"conv_in.weight": [4096, 1, 3, 3]}, "is no pruned form"),
        ({"nowhere.weight": [1]}, "nowhere.weight of shape"),
        ({"conv_in.weight": [2, 1, 3, 3]}, "its config asks for"),
        ({}, "its config asks for"),
    ],
    ids=["larger", "unknown", "other", "missing"],
)
def test_shapes_that_do_not_fit_are_refused(lie: dict[str, list[int]], words: str, tmp_path: Path) -> None:
    model = tiny_unet()
    pruning.prune(model, pruning.magnitude(), 0.25)
    checkpoint.save(model, tmp_path / "m")
    (tmp_path / "m" / "unet" / checkpoint.PRUNED).write_text(json.dumps(lie))
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(tmp_path / "m")


def test_a_pruned_model_as_a_pickle_is_refused_too(tmp_path: Path) -> None:
    model = tiny_unet()
    pruning.prune(model, pruning.magnitude(), 0.25)
    checkpoint.save(model, tmp_path / "m")
    weights = next((tmp_path / "m" / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".pth"))
    with pytest.raises(checkpoint.CheckpointError, match="a pickle can run code"):
        checkpoint.load(tmp_path / "m")
