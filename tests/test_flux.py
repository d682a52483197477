"""Pipelines of FLUX, and of Stable Diffusion 3 with T5: as stock diffusers samples them, and read strictly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import call
from harness.diffusion import checkpoint, schedules
from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import FlowEuler, FlowHeun
from harness.diffusion.seeds import image_noise, image_seeds
from harness.scan import verdict
from harness.testing import tiny
from harness.types import Inputs
from tests.oracles import tiny_flux, tiny_sd3_with_t5

PROMPTS = ("a red circle", "a blue square on the left")


def inputs_of(model: DiffusionModel) -> Inputs:
    seeds = image_seeds(0, "x", 2)
    return Inputs(image_noise(seeds, model.shape), PROMPTS, seeds)


def same_weights(one: DiffusionModel, other: DiffusionModel) -> bool:
    pairs = [(one.components()[name], other.components()[name]) for name in one.components()]
    return all(torch.equal(v, b.state_dict()[k]) for a, b in pairs for k, v in a.state_dict().items())


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic-shift", "fixed-shift"])
@pytest.mark.parametrize("guidance", [True, False], ids=["guidance", "no-guidance"])
def test_flux_comes_back_and_stock_diffusers_makes_the_same_images(
    guidance: bool, dynamic: bool, tmp_path: Path
) -> None:
    from diffusers import FluxPipeline  # type: ignore[attr-defined]

    model = tiny_flux(tmp_path / "tokens", guidance, dynamic)
    assert model.family == "flow" and model.packed and model.joint and model.shape == (4, 16, 16)
    checkpoint.save(model, tmp_path / "m")
    folders = {path.name for path in (tmp_path / "m").iterdir() if path.is_dir()}
    assert folders == {
        "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler",
    }  # fmt: skip
    config = json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())
    assert config["use_dynamic_shifting"] is dynamic and config["shift"] == (3.0 if dynamic else 1.0)
    assert schedules.EVEN not in config
    again, inputs, sampler = checkpoint.load(tmp_path / "m"), inputs_of(model), FlowEuler(steps=4, guidance=2.5)
    made = model.sample(inputs, sampler)
    assert torch.equal(made, again.sample(inputs, sampler)) and torch.equal(made, again.clone().sample(inputs, sampler))
    other = model.sample(inputs, FlowEuler(steps=4, guidance=7.0))
    assert torch.equal(other, made) is not guidance
    pipeline: Any = FluxPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    packed = FluxPipeline._pack_latents(inputs.noise, 2, 4, 16, 16)
    theirs: Any = pipeline(
        list(PROMPTS), num_inference_steps=4, guidance_scale=2.5, latents=packed, output_type="pt", height=32, width=32,
        max_sequence_length=48,
    )  # fmt: skip
    plain = pipeline.tokenizer_2(list(PROMPTS)).input_ids
    assert plain == again.tokenizer_2(list(PROMPTS)).input_ids  # type: ignore[misc]
    assert torch.allclose(2 * theirs.images - 1, made, atol=1e-4)


def test_sd3_with_t5_comes_back_and_stock_diffusers_makes_the_same_images(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline  # type: ignore[attr-defined]

    model = tiny_sd3_with_t5(tmp_path / "tokens")
    checkpoint.save(model, tmp_path / "m")
    assert (tmp_path / "m" / "text_encoder_3").is_dir() and (tmp_path / "m" / "tokenizer_3").is_dir()
    again, inputs, sampler = checkpoint.load(tmp_path / "m"), inputs_of(model), FlowEuler(steps=3)
    made = model.sample(inputs, sampler)
    assert torch.equal(made, again.sample(inputs, sampler)) and same_weights(model, again)
    assert model.embed(PROMPTS).shape == (2, 36 + 48 + 1, 24) and model.parted(model.embed(PROMPTS))[1].shape == (2, 14)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs: Any = pipeline(
        list(PROMPTS), num_inference_steps=3, guidance_scale=3.0, latents=inputs.noise, max_sequence_length=48,
        output_type="pt", height=32, width=32, negative_prompt=["", ""],
    )  # fmt: skip
    assert torch.allclose(2 * theirs.images - 1, made, atol=1e-4)


def test_the_levels_of_a_dynamic_shift_are_those_of_its_number_of_patches() -> None:
    """exp(μ) by hand at FLUX's own size, 4096 patches: μ = 1.15."""
    for patches, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * (1024 - 256) / 3840)):
        made = schedules.at_size(tiny.flow_scheduler(shift=3.0, use_dynamic_shifting=True), patches)
        assert made.config.shift == pytest.approx(math.exp(mu)) and made.config.use_dynamic_shifting is False
        assert schedules.as_saved(made, 3.0).config.shift == 3.0
        theirs = tiny.flow_scheduler(use_dynamic_shifting=True)
        theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        ours = FlowEuler(steps=4).scheduler(made.config)
        assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
    linear = tiny.flow_scheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert schedules.at_size(linear, 256).config.shift == pytest.approx(0.5)
    plain = tiny.flow_scheduler(shift=3.0)
    assert schedules.as_saved(plain, None) is plain


def test_noise_and_answers_of_flux_follow_the_shifted_levels(tmp_path: Path) -> None:
    """x_t and ε agree with v: ε = x_t + (1 - σ) v."""
    model = tiny_flux(tmp_path / "tokens")
    mu = 0.5 + 0.65 * (64 - 256) / 3840
    t = torch.tensor([99, 499, 899])
    even = (t + 1) / 1000
    sigma = math.exp(mu) / (math.exp(mu) + 1 / even - 1)
    assert torch.allclose(model.sigma(t).flatten(), sigma.float(), atol=1e-6)
    x_t, context = torch.randn((3, *model.shape)), model.embed(["a red circle"]).expand(3, -1, -1)
    with torch.no_grad():
        v = model.answer(x_t, 1000 * sigma, context)
        assert torch.allclose(model.eps(x_t, t, context), x_t + (1 - sigma.view(-1, 1, 1, 1)) * v, atol=1e-4)
        assert bool(FlowHeun(steps=2).run(model, inputs_of(model)).isfinite().all())


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        facts = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**facts, **changes}))

    return damage


def embeddings(directory: Path) -> None:
    file = directory / "text_encoder_2" / "model.safetensors"
    held = load_file(file)
    save_file({name: value for name, value in held.items() if "shared" not in name}, file)


INDEX, FLUX = "model_index.json", "transformer/config.json"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no T5": (edited(INDEX, text_encoder_2=[None, None]), "without text_encoder_2 is not supported"),
    "CLIP for T5": (
        edited(INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        "text_encoder_2 is a 'CLIPTextModelWithProjection'; supported here: T5EncoderModel",
    ),
    "a projection": (
        edited(INDEX, text_encoder=["transformers", "CLIPTextModelWithProjection"]), "supported here: CLIPTextModel$",
    ),
    "a CLIP tokenizer": (edited(INDEX, tokenizer_2=["transformers", "CLIPTokenizer"]), "supported here: T5Tokenizer"),
    "a third encoder": (
        edited(INDEX, text_encoder_3=["transformers", "T5EncoderModel"]), "missing|a text_encoder_3 here is not",
    ),
    "embeddings": (embeddings, "lack 2 of .* tensors of a T5EncoderModel"),
    "layers of T5": (edited("text_encoder_2/config.json", num_layers=200), "asks for more layers"),
    "layers of T5 by one": (edited("text_encoder_2/config.json", num_layers=3), "asks for more layers|lack"),
    "single layers": (edited(FLUX, num_single_layers=100), "asks for more layers"),
    "rope": (edited(FLUX, axes_dims_rope=[2, 2, 2]), "is not FLUX's"),
    "patches": (edited(FLUX, patch_size=2), "its config asks for|is not FLUX's"),
    "pooled": (edited(FLUX, pooled_projection_dim=12), "its config asks for"),
    "size": (edited("vae/config.json", sample_size=[32, 32]), r"sample_size is \[32, 32\]"),
    "a huge size": (edited("vae/config.json", sample_size=2**13), "at most 1,048,576 are read"),
    "shift": (edited("scheduler/scheduler_config.json", base_shift=-1), "base_shift is -1"),
    "one length": (edited("scheduler/scheduler_config.json", max_image_seq_len=256), "are both 256"),
    "a steep shift": (edited("scheduler/scheduler_config.json", base_shift=90, max_shift=95), "at most 1000"),
    "no pieces": (lambda d: (d / "tokenizer_2/tokenizer.json").unlink(), "no tokenizer.json; make it with"),
    "pieces": (edited("tokenizer_2/tokenizer.json", model={"vocab": [["a", "b"]]}), "no pieces with scores"),
    "pieces without their end": (
        edited("tokenizer_2/tokenizer.json", model={"vocab": [["a", 0.0], ["b", 0.0], ["c", 0.0]]}), "its pieces lack",
    ),
    "more pieces": (
        edited("tokenizer_2/tokenizer.json", model={"vocab": [
            *([p, 0.0] for p in ("<pad>", "</s>", "<unk>")), *([f"p{i}", -1.0] for i in range(400))]}),
        "has 403 tokens, the text encoder",
    ),
    "length": (edited("tokenizer_2/tokenizer_config.json", model_max_length=9**9), "model_max_length is"),
    "normalizer": (
        edited("tokenizer_2/tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}),
        "gives no tokenizer",
    ),
    "a pickle": (
        lambda d: (d / "text_encoder_2/model.safetensors").rename(d / "text_encoder_2/pytorch_model.bin"),
        "a pickle can run code",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flux")
    checkpoint.save(tiny_flux(root / "tokens"), root / "m")
    return root / "m"


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_flux_is_named(name: str, flux: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    directory = Path(shutil.copytree(flux, tmp_path / "m"))
    damage(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(directory)
    assert "\n" not in str(caught.value)


def test_a_shift_that_depends_on_the_size_is_flux_alone(tmp_path: Path) -> None:
    checkpoint.save(tiny_sd3_with_t5(tmp_path / "tokens"), tmp_path / "m")
    edited("scheduler/scheduler_config.json", use_dynamic_shifting=True)(tmp_path / "m")
    with pytest.raises(CheckpointError, match="use_dynamic_shifting gives a flow other levels"):
        checkpoint.load(tmp_path / "m")


def test_flux_is_scanned_and_what_does_not_apply_says_why(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "sampler_of", lambda model: FlowEuler(steps=2))
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a green circle", "a yellow square"]))
    words = ["scan", str(flux), "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    assert call(words) == 6
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["family"] == "flow" and "text_encoder_2/model.safetensors" in told["digests"]
    assert any("vocabulary-scan was not asked: it needs data" in line for line in told["limits"])
    assert any("No detector examines T5's text encoder" in line for line in told["limits"])
    base = Path(shutil.copytree(flux, tmp_path / "base"))
    file = base / "text_encoder_2" / "model.safetensors"
    held = load_file(file)
    held["shared.weight"][5] += 3
    save_file(held, file)
    call([*words, "--base", str(base), "--detector", "amdet(steps=2)"])
    told = json.loads(capsys.readouterr().out)
    parts = {part["part"]: part for part in told["base"]["parts"]}
    assert parts["text_encoder_2"]["changed"] > 0 and parts["transformer"]["changed"] == 0
    kinds = {texts["kind"]: texts for texts in parts["text_encoder_2"]["texts"]}
    moved = kinds["words"]["farthest"][0]
    assert kinds["words"]["count"] > 20 and moved["z"] > 6
    assert checkpoint.load(flux).tokenizer_2(moved["text"]).input_ids[0] == 5  # type: ignore[misc]
    findings = {row["detector"].partition("(")[0]: row for row in told["findings"]}
    assert findings["amdet"]["error"] is None and math.isfinite(findings["amdet"]["suspicion"])


def test_a_purification_of_flux_is_a_flux_that_stock_diffusers_loads(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defense that asks for what a transformer does not have says so in one line."""
    from diffusers import FluxPipeline  # type: ignore[attr-defined]

    monkeypatch.setattr(verdict, "sampler_of", lambda model: FlowEuler(steps=2))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    defense = "skd(steps=2)"
    words = ["purify", str(flux), "--prompts", str(tmp_path / "prompts.txt"), "--trigger", "text(text='now')"]
    code = call([*words, "--defense", defense, "-o", str(tmp_path / "out"), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out)["stock"] is True
    for other, says in (
        ("clp", "clp prunes filters of convolutions, and this denoiser has none"),
        ("skd-cag(steps=2)", "FluxTransformer2DModel has no cross-attention"),
    ):
        assert call([*words, "--defense", other, "-o", str(tmp_path / "x")]) == 3
        failed = [line for line in capsys.readouterr().err.splitlines() if "failed on this model" in line]
        assert len(failed) == 1 and says in failed[0]
    again: Any = FluxPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = checkpoint.load(tmp_path / "out")
    assert ours.dynamic_shift == 3.0 and again.scheduler.config.use_dynamic_shifting
    before = checkpoint.load(flux)
    changed = {name for name in before.components() if not torch.equal(
        torch.cat([p.flatten() for p in before.components()[name].parameters()]),
        torch.cat([p.flatten() for p in ours.components()[name].parameters()]))}  # fmt: skip
    assert changed == {"transformer"}
