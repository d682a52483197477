"""Formats of models that people download × what the bench does with each: it loads, is scanned and is purified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import call
from harness.diffusion import adapters, checkpoint
from harness.diffusion.adapters import LowRank
from harness.diffusion.model import DiffusionModel
from harness.judges import hub
from tests import single_files
from tests.oracles import tiny_flux, tiny_mmdit, tiny_sd, tiny_sd2, tiny_sd3_with_t5, tiny_sdxl, tiny_unet
from tests.test_adapter_files import NAME, kohya

Words = list[str]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def directory(make: Callable[[Path], DiffusionModel]) -> Callable[[Path], Words]:
    def made(root: Path) -> Words:
        checkpoint.save(make(root / "tokens"), root / "m")
        return [str(root / "m")]

    return made


def half(root: Path) -> Words:
    checkpoint.save(tiny_sd(root / "tokens"), root / "m", fp16=True)
    for file in (root / "m").glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return [str(root / "m")]


def sharded(root: Path) -> Words:
    checkpoint.save(tiny_sd(root / "tokens"), root / "m")
    (file,) = (root / "m" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {f"{file.stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, mine in parts.items():
        save_file({key: tensors[key] for key in mine}, file.with_name(name))
    file.unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, mine in parts.items() for key in mine}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    return [str(root / "m")]


def one_file(make: Callable[[Path], DiffusionModel]) -> Callable[[Path], Words]:
    def made(root: Path) -> Words:
        model = make(root / "tokens")
        checkpoint.save(model, root / "config")
        single_files.write(model, root / "m.safetensors")
        return [str(root / "m.safetensors"), "--config", str(root / "config")]

    return made


def one_file_of_flux(whole: bool) -> Callable[[Path], Words]:
    def made(root: Path) -> Words:
        model = tiny_flux(root / "tokens")
        checkpoint.save(model, root / "config")
        single_files.write_flux(model, root / "flux.safetensors", whole)
        return [str(root / "flux.safetensors"), "--config", str(root / "config")]

    return made


def adapter(names: str, make: Callable[[Path], DiffusionModel] = tiny_sd) -> Callable[[Path], Words]:
    def made(root: Path) -> Words:
        base = make(root / "tokens")
        checkpoint.save(base, root / "base")
        held = kohya(base, originals=names == "original")
        if names == "diffusers":
            held = {f"{LAYER}.lora_A.weight": torch.ones(1, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 1)}
        save_file(held, root / NAME)
        return [str(root / NAME), "--base", str(root / "base")]

    return made


def embedding(
    held: dict[str, torch.Tensor], make: Callable[[Path], DiffusionModel] = tiny_sd
) -> Callable[[Path], Words]:
    def made(root: Path) -> Words:
        checkpoint.save(make(root / "tokens"), root / "base")
        save_file(held, root / "hat-style.safetensors")
        return [str(root / "hat-style.safetensors"), "--base", str(root / "base")]

    return made


def beside(root: Path) -> Words:
    model = tiny_sd(root / "tokens")
    adapters.attach(model, {LAYER: LowRank(torch.ones(1, 16), torch.ones(16, 1))})
    checkpoint.save(model, root / "m")
    return [str(root / "m")]


FORMATS: dict[str, Callable[[Path], Words]] = {
    "unconditional": directory(lambda _: tiny_unet()),
    "stable diffusion": directory(tiny_sd),
    "stable diffusion, variant fp16": half,
    "stable diffusion, shards": sharded,
    "stable diffusion, single file": one_file(tiny_sd),
    "stable diffusion 2": directory(tiny_sd2),
    "stable diffusion 2, single file": one_file(tiny_sd2),
    "sdxl": directory(tiny_sdxl),
    "sdxl, single file": one_file(tiny_sdxl),
    "stable diffusion 3 without T5": directory(tiny_mmdit),
    "stable diffusion 3 with T5": directory(tiny_sd3_with_t5),
    "flux": directory(tiny_flux),
    "flux, single file of the denoiser": one_file_of_flux(False),
    "flux, single file with all parts": one_file_of_flux(True),
    "adapter, names of diffusers": adapter("diffusers"),
    "adapter, names of kohya": adapter("kohya"),
    "adapter, names of kohya and of the original blocks": adapter("original", tiny_sdxl),
    "embedding of diffusers": embedding({"<hat>": torch.ones(16)}),
    "embedding of AUTOMATIC1111": embedding({"emb_params": torch.ones(2, 16)}),
    "embedding of SDXL": embedding({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 8)}, tiny_sdxl),
    "model with its adapter beside it": beside,
}


@pytest.fixture(scope="module", params=list(FORMATS))
def words(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Words:
    return FORMATS[request.param](tmp_path_factory.mktemp("format"))


@pytest.fixture
def prompts(tmp_path: Path) -> Words:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    return ["--prompts", str(tmp_path / "prompts.txt")]


@pytest.mark.slow
def test_a_scan_ends_with_a_verdict(words: Words, prompts: Words, capsys: pytest.CaptureFixture[str]) -> None:
    """Unconditional models are asked by one detector; of the others the default ones are asked that need no data."""
    capsys.readouterr()
    conditional = len(words) > 1 or (Path(words[0]) / "tokenizer").is_dir()
    asked = prompts if conditional else ["--detector", "bias-scan"]
    code = call(["scan", *words, *asked, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == {"nothing found": 0, "suspicious": 1, "undecided": 6}[told["verdict"]]
    assert told["error"] is None and told["digests"] and told["limits"]
    adapted, embedded = (told[kind] is not None and "--base" in words for kind in ("adapter", "embedding"))
    assert adapted or embedded or "--base" not in words
    assert bool(told["findings"]) == (not conditional or adapted)
    assert (told["base"] is not None) == adapted


@pytest.mark.slow
def test_a_purification_is_of_the_kind_that_was_given_and_loads(
    words: Words, prompts: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter becomes an adapter of the same base, everything else a pipeline. An embedding is refused."""
    capsys.readouterr()
    if "hat-style" in words[0]:
        assert call(["purify", *words, *prompts, "--defense", "clp", "-o", str(tmp_path / "out")]) == 2
        assert "a textual-inversion embedding is a few vectors and no network" in capsys.readouterr().err
        return
    asked = ["--defense", "clp"]
    index = Path(words[0]) / "model_index.json"
    if "flux.safetensors" in words[0] or (index.is_file() and "FluxTransformer2DModel" in index.read_text()):
        asked = ["--defense", "skd(steps=1)", "--trigger", "text(text='now')"]  # clp prunes convolutions
    assert call(["purify", *words, *prompts, *asked, "-o", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stock"] is True
    out = tmp_path / "out"
    if "--base" in words:
        found = hub.adapter_in(str(out))
        assert found is not None
        model = hub.with_adapter(hub.Source(words[words.index("--base") + 1]), found)
        assert model.adapter is not None and len(model.adapter.layers) == told["layers"]
    else:
        model = hub.load(hub.Source(str(out)))
        assert model.adapter is None or (out / "adapter").is_dir()
    name = f"{asked[1].partition('(')[0]}("
    assert json.loads((out / "bench.json").read_text())["purified_by"].startswith(name)
    assert name in (out / "README.md").read_text()
