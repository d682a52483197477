"""bench scan of a low-rank adapter with its base, and of a single file with its configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.cli import call
from harness.diffusion import adapters, checkpoint
from harness.diffusion.adapters import Adapter, LowRank
from harness.diffusion.model import DiffusionModel
from harness.scan.lowrank import described, singular
from tests import single_files
from tests.oracles import tiny_sd
from tests.scans import saved
from tests.test_adapter_files import NAME, kohya

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    root = tmp_path_factory.mktemp("base")
    return saved(tiny_sd(root / "tokens"), root)


def scanned(base: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and messages of a scan whose detectors all lack something."""
    capsys.readouterr()
    code = call(["scan", *words, "--prompts", str(base.parent / "prompts.txt"), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


@pytest.mark.parametrize("alone", ["file", "folder"])
def test_an_adapter_is_scanned_with_its_base(
    alone: str, base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    save_file(kohya(model, False), tmp_path / NAME)
    where = tmp_path / NAME if alone == "file" else tmp_path
    code, told, _ = scanned(directory, capsys, str(where), "--base", str(directory))
    assert code == 6 and told["verdict"] == "undecided"
    assert list(told["digests"]) == [NAME] and told["facts"]["directory"] == str(tmp_path / NAME)
    facts = told["adapter"]
    assert facts["layers"] == len(kohya(model, False)) // 3 and facts["ranks"] == [2, 2]
    assert set(facts["parts"]) == {"text_encoder", "unet"} and facts["says"]
    changed = {part["part"]: part["changed"] for part in told["base"]["parts"]}
    assert changed["unet"] > 0 and changed["text_encoder"] > 0 and changed["vae"] == 0
    assert told["not_examined"] == []


def test_an_adapter_without_its_base_is_refused_with_the_way_out(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(kohya(base[0], False), tmp_path / NAME)
    code, _, said = scanned(base[1], capsys, str(tmp_path / NAME))
    assert code == 4 and "a low-rank adapter, which is a model only with its base; --base DIR names that" in said
    save_file({f"{LAYER}.lora_A.weight": torch.ones(1, 3)}, tmp_path / NAME)
    code, _, said = scanned(base[1], capsys, str(tmp_path / NAME), "--base", str(base[1]))
    assert code == 4 and "no two factors" in said


def test_an_adapter_that_makes_nan_is_refused(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {f"{LAYER}.lora_A.weight": torch.full((1, 16), torch.nan), f"{LAYER}.lora_B.weight": torch.ones(16, 1)}
    save_file(held, tmp_path / NAME)
    code, _, said = scanned(base[1], capsys, str(tmp_path / NAME), "--base", str(base[1]))
    assert code == 4 and f"{NAME}: the factors of the layer " in said and "hold NaN or infinity" in said


def test_a_base_with_an_adapter_of_its_own_is_refused(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(kohya(base[0], False), tmp_path / NAME)
    adapted = base[0].clone()
    adapters.attach(adapted, {LAYER: LowRank(torch.ones(1, 16), torch.ones(16, 1))})
    checkpoint.save(adapted, tmp_path / "adapted")
    code, _, said = scanned(base[1], capsys, str(tmp_path / NAME), "--base", str(tmp_path / "adapted"))
    assert code == 4 and "has an adapter of its own; give the base without one" in said


def test_a_single_file_is_scanned_with_the_configurations_of_its_kind(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    single_files.write(model, tmp_path / "m.safetensors", {"model_ema.decay": torch.zeros(1)})
    code, told, _ = scanned(directory, capsys, str(tmp_path / "m.safetensors"), "--config", str(directory))
    assert code == 6 and list(told["digests"]) == ["m.safetensors"] and told["adapter"] is None
    assert told["facts"]["directory"] == str(tmp_path / "m.safetensors")
    assert told["not_examined"] == ["model_ema.decay"]
    assert any("belong to no part of the pipeline" in line for line in told["limits"])
    code, _, said = scanned(directory, capsys, str(tmp_path / "m.safetensors"))
    assert code == 4 and "--config DIR names a diffusers directory that has them" in said


def test_the_facts_of_an_adapter_are_those_of_its_matrices() -> None:
    rng = torch.Generator().manual_seed(0)
    layers, weights = {}, {}
    for i in range(9):
        size = 40.0 if i == 4 else 1.0 + 0.1 * i
        a, b = torch.randn(2, 6, generator=rng), torch.randn(5, 2, generator=rng)
        layers[f"unet.l{i}"] = LowRank(a, b * size / (b @ a).norm())
        weights[f"unet.l{i}"] = torch.full((5, 6), 1.0)
    layers["text_encoder.one"] = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]))
    weights["text_encoder.one"] = torch.full((2, 2), 5.0)
    found = described(Adapter(layers, weights), "x")
    assert found.layers == 10 and found.parts == {"text_encoder": 1, "unet": 9} and found.ranks == (1, 2)
    first, *rest = found.largest
    assert first.layer == "unet.l4" and first.z > 6 and all(layer.z < 6 for layer in rest)
    assert first.norm == pytest.approx(40.0, rel=1e-4) and first.relative == pytest.approx(40 / 30**0.5, rel=1e-4)
    one = next(layer for layer in found.largest if layer.layer == "text_encoder.one")
    assert (one.norm, one.spectral, one.rank) == (pytest.approx(10.0), pytest.approx(10.0), 1)
    assert any("stand out from the others" in line and "unet.l4" in line for line in found.says)


@pytest.mark.parametrize(("out", "rank", "inside"), [(5, 2, 8), (8, 2, 5), (4, 7, 6)])
def test_the_singular_values_of_a_change_follow_from_its_factors(out: int, rank: int, inside: int) -> None:
    rng = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(rank, inside, generator=rng), torch.randn(out, rank, generator=rng))
    wanted = torch.linalg.svdvals(factors.b.double() @ factors.a.double())
    found = singular(factors)
    assert len(found) == min(out, rank, inside)
    assert torch.allclose(found, wanted[: len(found)], atol=1e-12) and bool((wanted[len(found) :] < 1e-12).all())
