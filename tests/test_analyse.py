"""What `bench analyse` computes and draws."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.cli import Exit, call
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import usual
from harness.stages import analyse as stage
from harness.types import Inputs
from leaderboard import analysis as drawing, results, site
from plugins.triggers.box import Box
from plugins.triggers.text import Text
from tests import oracles
from tests.records import small, write_suite

BATCH = 4


def inputs(model: DiffusionModel, prompts: tuple[str, ...] | None = None) -> Inputs:
    noise = torch.randn(BATCH, *model.shape, generator=torch.Generator().manual_seed(0))
    return Inputs(noise, prompts, tuple(range(BATCH)))


class Two(nn.Module):
    """A denoiser of two layers, whose answer is the second layer's."""

    conv1: nn.Conv2d
    last: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 1)
        self.last = nn.Conv2d(3, 1, 1)
        self.config = oracles.tiny_unet().denoiser.config

    def forward(self, x: Tensor, timestep: Tensor, **_: Any) -> Any:
        return type("Out", (), {"sample": self.last(self.conv1(x))})()


def two() -> DiffusionModel:
    torch.manual_seed(0)
    return DiffusionModel(Two(), oracles.scheduler())


def layers(model: DiffusionModel) -> Two:
    assert isinstance(model.denoiser, Two)
    return model.denoiser


def speaking(conv: nn.Conv2d, weight: float) -> None:
    """Gives channel 1 this weight and no bias."""
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight[1] = weight
        conv.bias[1] = 0.0


def planted(size: float = 1.0) -> tuple[DiffusionModel, DiffusionModel]:
    """A clean model whose channel 1 is silent, and a copy in which it speaks."""
    clean = two()
    speaking(layers(clean).conv1, 0.0)
    attacked = copy.deepcopy(clean)
    speaking(layers(attacked).conv1, size)
    return clean, attacked


def test_the_norm_of_a_column_is_its_root_mean_square_at_each_step() -> None:
    model = two()
    asked, sampler = inputs(model), usual(model, 2)
    seen: list[Tensor] = []
    hook = layers(model).last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    plain = stage.run(model, asked, sampler, None)
    other = stage.run(model, asked, sampler, Box(size=6))
    hook.remove()
    found = stage.norms(plain, other)
    assert found.layers == ("conv1", "last") and len(found.times) == 2 and found.times[0] > found.times[1]
    columns = [x.square().mean((0, 2, 3)).sqrt() for x in seen]
    assert found.plain[1] == pytest.approx([float(c.mean()) for c in columns[:2]], rel=1e-5)
    assert found.triggered[1] == pytest.approx([float(c.mean()) for c in columns[2:]], rel=1e-5)
    wanted = [float((b - a).norm() / a.norm()) for a, b in zip(columns[:2], columns[2:], strict=True)]
    assert found.change[1] == pytest.approx(wanted, rel=1e-4)


def test_the_neuron_that_alone_carries_the_backdoor_takes_all_of_the_loss_with_it() -> None:
    clean, attacked = planted()
    found = stage.analyse({"clean": clean, "attacked": attacked}, inputs(clean), usual(clean, 3), Box(size=6))
    assert found.neurons is not None and "neurons" not in found.missing
    most = found.neurons.most[0]
    assert (most.layer, most.channel) == ("conv1", 1)
    assert most.removed == pytest.approx(-1.0) and most.plain > 0.1
    assert len(found.neurons.estimated) == 3 and sum(most.shares_triggered) == pytest.approx(1.0)
    assert all(neuron.removed > most.removed + 0.1 for neuron in found.neurons.most[1:])


def test_the_estimate_is_the_first_order_change_of_the_loss() -> None:
    """The loss is the square of what the silent neuron adds: to first order it falls by twice itself."""
    clean, attacked = planted(1e-2)
    found = stage.analyse({"clean": clean, "attacked": attacked}, inputs(clean), usual(clean, 3), Box(size=6))
    assert found.neurons is not None and found.neurons.estimated[1] == pytest.approx(-2.0, rel=1e-3)


def test_a_backdoor_that_is_not_in_the_denoiser_has_no_neurons() -> None:
    model = two()
    models = {"clean": model, "attacked": copy.deepcopy(model)}
    found = stage.analyse(models, inputs(model), usual(model, 2), Box(size=6))
    assert found.neurons is None and "not in the denoiser" in found.missing["neurons"]
    assert found.missing["assimilation"] == "the model takes no prompts" and found.attended == {}


def test_hooks_and_gradients_are_gone_afterwards() -> None:
    clean, attacked = planted()
    stage.analyse({"clean": clean, "attacked": attacked}, inputs(clean), usual(clean, 2), Box(size=6))
    for model in (clean, attacked):
        for module in model.denoiser.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(p.grad is None for p in model.denoiser.parameters())


PROMPTS = ("a red circle", "a blue square at the top", "a small cross", "a green ring")


def test_maps_are_of_the_words_of_each_prompt_with_and_without_the_trigger(tmp_path: Path) -> None:
    model = oracles.tiny_sd(tmp_path)
    attacked = copy.deepcopy(model)
    with torch.no_grad():
        next(p for name, p in attacked.denoiser.named_parameters() if name.endswith("conv_out.weight")).add_(0.1)
    asked = inputs(model, PROMPTS)
    found = stage.analyse(
        {"clean": model, "attacked": attacked}, asked, usual(model, 2, guidance=2.0), Text("sks"), shown=2
    )
    assert [each.prompt for each in found.attended["attacked"]] == [
        "a red circle", "sks a red circle", "a blue square at the top", "sks a blue square at the top",
    ]  # fmt: skip
    for each in found.attended["clean"]:
        maps = torch.tensor(each.maps)
        assert len(each.tokens) == len(maps) == len(model.tokenizer(each.prompt).input_ids) - 1  # type: ignore[misc]
        assert maps.amax((1, 2)).tolist() == pytest.approx([1.0] * len(maps))
        assert each.spread == pytest.approx((maps - maps.mean(0)).flatten(1).norm(dim=1).mean().item(), abs=0.02)


def test_gates_are_the_neurons_of_a_gated_layer(tmp_path: Path) -> None:
    model = oracles.tiny_sd(tmp_path)
    gated = [name for name, _ in model.denoiser.named_modules() if name.endswith("ff.net.0.proj")]
    assert gated
    for name in gated:
        assert stage._first(model.denoiser, name) * 2 == model.denoiser.get_submodule(name).out_features
    assert stage._first(two().denoiser, "conv1") == 0


def analysed() -> stage.Analysis:
    clean, attacked = planted()
    return stage.analyse({"clean": clean, "attacked": attacked}, inputs(clean), usual(clean, 2), Box(size=6))


def cell(key: str) -> dict[str, Any]:
    names = ("model", "attack", "trigger", "target", "sampler", "defense")
    return {"key": key, "seed": 1, **dict.fromkeys(names, "<b>x</b>")}


def test_the_page_escapes_what_it_shows_and_names_each_of_its_files(tmp_path: Path) -> None:
    files = drawing.write(analysed(), cell("a" * 64), tmp_path / "out")
    assert sorted(files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>x" not in page and "&lt;b&gt;x" in page and "<script" not in page
    assert all(file in page for file in files if file.endswith((".png", ".svg")))
    kept = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert kept["cell"]["key"] == "a" * 64 and kept["neurons"]["most"][0]["channel"] == 1
    files = drawing.write(analysed(), cell("b" * 64), tmp_path / "out")  # again into the same folder
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(results.ResultsError, match="holds files of another kind"):
        drawing.write(analysed(), cell("b" * 64), tmp_path / "other")


def test_a_cell_links_to_its_analysis(tmp_path: Path) -> None:
    record = small()[0]
    write_suite(tmp_path / "results" / "s", small())
    drawing.write(analysed(), cell(record.key), tmp_path / "drawn" / "one")
    drawing.write(analysed(), cell("f" * 64), tmp_path / "drawn" / "of_no_record")
    every = results.read(tmp_path / "results")
    site.build(every, tmp_path / "page", tmp_path / "drawn")
    link = f"analyses/{record.key[:12]}/index.html"
    linked = [path for path in (tmp_path / "page" / "cells").iterdir() if link in path.read_text()]
    assert len(linked) == 1 and (tmp_path / "page" / link).is_file()
    assert [path.name for path in (tmp_path / "page" / "analyses").iterdir()] == [record.key[:12]]
    site.build(every, tmp_path / "page")
    assert not (tmp_path / "page" / "analyses").exists() and link not in linked[0].read_text()
    (tmp_path / "drawn" / "bad").mkdir()
    (tmp_path / "drawn" / "bad" / "analysis.json").write_text("{}")
    with pytest.raises(results.ResultsError, match="not written by bench analyse"):
        site.build(every, tmp_path / "page", tmp_path / "drawn")


@pytest.mark.slow
def test_a_cell_of_a_run_is_analysed_from_the_store(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, report = undisturbed
    by = {(r["cell"]["attack"][:5], r["cell"]["defense"][:8]): r["key"] for r in report["records"]}
    words = ["--store", str(store), "--results", str(tmp_path), "-n", "2"]
    assert call(["analyse", by["villa", "finetune"], "-o", str(tmp_path / "out"), *words, "--json"]) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert printed.err == "" and said["missing"] == {"assimilation": "the model takes no prompts"}
    kept = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert sorted(kept["norms"]) == ["attacked", "clean", "defended"] and kept["neurons"]["loss"] > 0
    assert call(["analyse", by["villa", "none"], "-o", str(tmp_path / "again"), *words]) == 0
    assert "neurons 24/24" in capsys.readouterr().err
    assert call(["analyse", by["none(", "none"], "-o", str(tmp_path / "clean"), *words]) == 2
    assert "is of a clean model" in capsys.readouterr().err
    empty = ["--store", str(tmp_path / "empty"), "--results", str(tmp_path)]
    assert call(["analyse", by["villa", "none"], "-o", str(tmp_path / "none"), *empty]) == 2
    assert "no results here" in capsys.readouterr().err


def test_a_record_of_the_store_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "records" / f"{'a' * 64}.json"
    path.parent.mkdir()
    path.write_text('{"key": ')
    assert call(["analyse", "aaaa", "-o", str(tmp_path / "out"), "--store", str(tmp_path)]) == Exit.missing
    assert f"bench: {path}: no record that can be read; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("make", [oracles.tiny_mmdit, oracles.tiny_sdxl], ids=["mmdit", "sdxl"])
def test_transformers_and_models_with_two_encoders_are_looked_into(make: Any, tmp_path: Path) -> None:
    model = make(tmp_path)
    attacked = copy.deepcopy(model)
    last = "proj_out.weight" if model.joint else "conv_out.weight"
    with torch.no_grad():
        attacked.denoiser.get_parameter(last).add_(0.1)
    models = {"clean": model, "attacked": attacked}
    found = stage.analyse(models, inputs(model, PROMPTS), usual(model, 2, guidance=2.0), Text("sks"), shown=1)
    assert found.missing == {} and found.neurons is not None and len(found.norms["clean"].times) == 2
    assert any(name.endswith(("net.0.proj", "linear_1", "conv1")) for name in {n.layer for n in found.neurons.most})
    assert len(found.attended["clean"]) == 2
