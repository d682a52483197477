"""The measurement of a scan at the true sizes of released models, on small networks; its record and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from harness.diffusion import checkpoint
from tests.benchmarks import true_size


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL pipeline in bf16."""
    place = tmp_path_factory.mktemp("true size") / "model"
    with torch.random.fork_rng():
        true_size.write(true_size.layout_of("sdxl", tiny=True), place)
    return place


def test_the_weights_are_written_in_bf16_and_read_as_fp32(written: Path) -> None:
    files = list(written.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder", "text_encoder_2"}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            assert {opened.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert torch.get_default_dtype() == torch.float32
    model = checkpoint.load(written)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32} and model.text_encoder_2 is not None


def test_each_phase_has_its_time_and_its_memory(written: Path) -> None:
    told = true_size.read(written)
    assert told["shape"] == [4, 8, 8]
    for phase in true_size.PHASES:
        figures = told[phase]
        assert figures["seconds"] >= 0 and figures["cpu_seconds"] >= 0
        assert 1e8 < figures["private_bytes"] < figures["peak_bytes"]


def test_memory_that_is_held_in_a_phase_is_counted_though_it_is_free_at_its_end() -> None:
    with true_size.measured() as before:
        pass
    with true_size.measured() as held:
        kept: Any = torch.ones(2**26)
        kept = [kept[0].item() for _ in range(200_000)][:1]
    assert kept and held["private_bytes"] > before["private_bytes"] + 2**27


@pytest.mark.parametrize(("name", "weights"), [("sd1", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_layouts_have_the_numbers_of_weights_of_the_released_models(name: str, weights: int) -> None:
    assert true_size.needs({"unet": true_size.layout_of(name, tiny=False)["unet"]}) == {"unet": weights}


def test_the_record_is_of_the_true_sizes_and_the_page_has_its_table() -> None:
    """If this fails after a change of the record: python -m tests.benchmarks.true_size --table"""
    record = json.loads(true_size.FILE.read_text())
    assert record["tiny"] is False and record["machine"]["threads"] == 1
    assert {name: told["shape"] for name, told in record["layouts"].items()} == {
        "sd1": [4, 64, 64], "sdxl": [4, 128, 128],
    }  # fmt: skip
    for told in record["layouts"].values():
        total = sum(told["weights"].values())
        assert told["file_bytes"] > 2 * total, "in bf16"
        assert told["load"]["private_bytes"] > 4 * total, "in fp32"
    flux = 4 * sum(record["not_measured"]["flux"].values())
    assert flux > record["machine"]["memory_bytes"], "what the page says of FLUX"
    assert 54_642 * record["layouts"]["sd1"]["prediction"]["cpu_seconds"] > 4 * 86_400, "what it says of a whole scan"
    assert true_size.PLACE.written() == true_size.table(record)
