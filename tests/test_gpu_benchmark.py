"""The benchmark of a GPU, tiny and on the processor: its rows, and that both ways compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu as benchmark

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    benchmark.main(["--tiny", "--device", "cpu", "-o", str(out)])
    return json.loads(out.read_text())


def of(written: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in written["rows"] if row["part"] == part}


def test_every_part_has_its_ways_with_their_spread(written: dict[str, Any]) -> None:
    assert {part: set(of(written, part)) for part in benchmark.PARTS} == {
        "badt2i": {"ours", "ours, fp32", "script"},
        "skd-cag": {"ours", "ours, fp32", "script"},
        "ddpm": {"ours", "script"},
        "side-by-side": {"one after another", "side by side"},
    }
    units = {"badt2i": "seconds", "skd-cag": "seconds", "ddpm": "images_per_s", "side-by-side": "steps_per_s"}
    for row in written["rows"]:
        assert 0 < row["least"] <= row[units[row["part"]]] <= row["most"]
        assert row["repetitions"] == 2 and row["peak_bytes"] is None
    assert written["tiny"] is True and {"device", "torch", "diffusers", "python"} <= written["machine"].keys()


@pytest.mark.parametrize("part", ["badt2i", "skd-cag"])
def test_the_scripts_way_has_the_losses_of_ours(written: dict[str, Any], part: str) -> None:
    ways = of(written, part)
    script, full, half = (ways[way]["losses"] for way in ("script", "ours, fp32", "ours"))
    assert len(script) == benchmark.KEPT_LOSSES
    assert full == pytest.approx(script, rel=1e-5)
    assert half != full and half == pytest.approx(script, rel=0.02)


def test_a_pipeline_samples_the_images_of_ours(written: dict[str, Any]) -> None:
    found = of(written, "ddpm")["script"]
    assert found["difference"] < 1e-5 and found["extrapolated_from_steps"] == benchmark.TINY.stretch


def test_trainings_side_by_side_have_the_losses_of_those_one_after_another(written: dict[str, Any]) -> None:
    alone, together = (of(written, "side-by-side")[way]["losses"] for way in ("one after another", "side by side"))
    assert len(alone) == benchmark.TINY.trained and alone[0] != alone[1]
    assert alone == together


def test_attention_by_softmax_is_attention() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 3, n, 4), generator=rng) for n in (5, 5, 5))
    mask = torch.rand((5, 5), generator=rng) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    every: list[Any] = [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}]
    for options in every:
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(benchmark.softmax_attention(q, k, v, **options), wanted)


def test_a_part_that_is_late_or_fails_is_a_row_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def endless() -> Any:
        while True:
            pass

    def large() -> Any:
        raise MemoryError("too large")

    def parts(size: Any, device: Any, folder: Any) -> Any:
        yield "quick", True, lambda: {"seconds": 1.0}
        yield "large", True, large
        yield "endless", True, endless
        yield "never", True, endless

    def broken(size: Any, device: Any, folder: Any) -> Any:
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(benchmark, "PARTS", {"late": parts, "broken": broken})
    monkeypatch.setattr(benchmark.gc, "collect", lambda: 0)  # of a test process it takes long
    out = tmp_path / "gpu.json"
    benchmark.main(["--tiny", "--device", "cpu", "--limit", "2", "-o", str(out)])
    rows = json.loads(out.read_text())["rows"]
    ways = [(row["part"], row["way"]) for row in rows]
    assert ways == [*(("late", way) for way in ("quick", "large", "endless")), ("broken", "set-up")]
    assert [row.get("error") for row in rows] == [
        None, "MemoryError: too large", "TimeoutError: longer than the 2 s of a part", "RuntimeError: out of memory"
    ]  # fmt: skip
    assert 1.9 < rows[2]["after_s"] < 9
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_settings_of_torch_are_as_before() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with benchmark.job_settings(not before[0]):
        assert torch.are_deterministic_algorithms_enabled() is not before[0]
    assert (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ) == before


def test_without_a_card_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "torch sees no GPU here; --device cpu --tiny" in capsys.readouterr().err


def test_the_full_sizes_are_those_of_the_papers_models(tmp_path: Path) -> None:
    """On the device meta, where weights take no memory."""
    meta = torch.device("meta")
    t2i, pixels = benchmark.sd(benchmark.FULL, meta, tmp_path), benchmark.ddpm(benchmark.FULL, meta)
    assert (t2i.shape, pixels.shape) == ((4, 64, 64), (3, 32, 32))
    weights = [sum(p.numel() for p in model.denoiser.parameters()) for model in (t2i, pixels)]
    assert weights == [859_520_964, 35_746_307]
    assert (t2i.scheduler.alphas_cumprod.device.type, t2i._tables["alpha_bar"].device.type) == ("cpu", "meta")
    assert t2i.tokenizer is not None and t2i.tokenizer.model_max_length == 77
