"""bench purify of a low-rank adapter: what is written is an adapter of the same base, and carries the purification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.cli import call
from harness.diffusion import adapters, checkpoint
from harness.diffusion.adapters import LowRank
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import ModelFiles
from harness.scan import adapter_change
from harness.scan.adapter_change import change_from, decomposed, left_over, onto, padded, sufficient
from tests import scans
from tests.oracles import tiny_mmdit, tiny_sd, tiny_sdxl
from tests.test_adapter_files import NAME, drawn, kohya

FACTORS = ".lora_A.weight"
PLUGIN = '''
"""Defenses whose effect is known."""

from dataclasses import dataclass
from typing import ClassVar

from harness import Defended, hookimpl


@dataclass(frozen=True)
class Halved:
    """Halves a few weights: of layers with and without an adapter, and of a bias if `bias` is set."""

    name: ClassVar[str] = "halved"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ()
    bias: bool = False
    all: bool = False

    def defend(self, model, knowledge, rng):
        made = model.clone()
        for name, weight in made.denoiser.named_parameters():
            chosen = "conv_out" in name or "ff.net.0" in name or self.all
            if chosen and (weight.dim() > 1 or self.bias):
                weight.data *= 0.5
        return Defended(model=made)


@dataclass(frozen=True)
class Bare:
    """Takes the adapter away."""

    name: ClassVar[str] = "bare"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model, knowledge, rng):
        made = model.clone()
        for name, weight in made.adapter.base.items():
            part, _, path = name.partition(".")
            made.components()[part].get_submodule(path).weight.data.copy_(weight)
        return Defended(model=made)


@dataclass(frozen=True)
class Smaller:
    """A denoiser with fewer channels."""

    name: ClassVar[str] = "smaller"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model, knowledge, rng):
        import torch

        made = model.clone()
        net = made.denoiser.mid_block.attentions[0].transformer_blocks[0].ff.net
        net[2].weight = torch.nn.Parameter(net[2].weight[:, :-4].clone(), requires_grad=False)
        net[2].in_features -= 4
        net[0].proj.weight = torch.nn.Parameter(net[0].proj.weight[:-8].clone(), requires_grad=False)
        net[0].proj.bias = torch.nn.Parameter(net[0].proj.bias[:-8].clone(), requires_grad=False)
        net[0].proj.out_features -= 8
        return Defended(model=made)


@hookimpl
def defenses():
    return [Halved, Bare, Smaller]
'''


quick = scans.quick


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, Path]:
    """A model and its directory, with an adapter of kohya's names beside it."""
    root = tmp_path_factory.mktemp(request.param)
    model = (tiny_sd if request.param == "sd" else tiny_sdxl)(root / "tokens")
    save_file(kohya(model, False), root / NAME)
    (root / "plugin.py").write_text(PLUGIN)
    return scans.saved(model, root)


def purified(
    base: Path, out: Path, capsys: pytest.CaptureFixture[str], defense: str, *words: str
) -> tuple[int, dict[str, Any], str]:
    root = base.parent
    capsys.readouterr()
    given = [root / NAME, "--base", base, "--defense", defense, "--prompts", root / "prompts.txt", "-o", out]
    code = call(["purify", *map(str, given), "--plugin-file", str(root / "plugin.py"), "--json", *words])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def adapted(model: DiffusionModel, root: Path) -> DiffusionModel:
    made = model.clone()
    adapters.attach_file(ModelFiles.of_file(root / NAME), NAME, made)
    return made


def stock_answer(model: DiffusionModel, directory: Path, adapter: Path | None) -> Tensor:
    """ε of stock diffusers' networks, with the adapter put on by its own loader."""
    import diffusers

    library: Any = diffusers
    cls = library.StableDiffusionPipeline if model.text_encoder_2 is None else library.StableDiffusionXLPipeline
    pipeline = cls.from_pretrained(directory, local_files_only=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    made = DiffusionModel(
        pipeline.unet, model.scheduler, pipeline.vae, pipeline.text_encoder, model.tokenizer,
        getattr(pipeline, "text_encoder_2", None), model.tokenizer_2,
    )  # fmt: skip
    return answer(made)


@torch.no_grad()
def answer(model: DiffusionModel) -> Tensor:
    rng = torch.Generator().manual_seed(4)
    x_t = torch.randn((2, *model.shape), generator=rng)
    return model.eps(x_t, torch.tensor([200, 700]), model.embed(["a red circle", "a blue square"]))


@pytest.mark.parametrize("defense", ["halved", "clp(u=1.0)"])
def test_stock_diffusers_gets_the_purified_models_answers_from_base_and_written_adapter(
    defense: str, base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """halved: of known effect. clp zeroes filters and their biases, and biases have no place in an adapter."""
    from harness.registry import load
    from harness.types import Knowledge

    model, directory = base
    code, told, _ = purified(directory, tmp_path / "out", capsys, defense, "--rank", "full")
    assert code == 0 and told["stock"] is True
    cleaner = load([directory.parent / "plugin.py"]).build("defenses", defense)
    wanted = cleaner.defend(adapted(model, directory.parent), Knowledge(), torch.Generator()).model
    assert wanted is not None
    biases = {each["tensor"] for each in told["lost"]}
    assert (defense == "halved") == (not biases) and all(name.endswith(".bias") for name in biases)
    for name in biases:
        part, _, path = name.partition(".")
        wanted.components()[part].get_parameter(path).data.copy_(model.components()[part].get_parameter(path))
    theirs, given = (stock_answer(model, directory, each) for each in (tmp_path / "out", None))
    assert torch.allclose(theirs, answer(wanted), atol=1e-4)
    before = answer(adapted(model, directory.parent))
    assert not torch.allclose(before, answer(wanted), atol=1e-2) and not torch.allclose(given, theirs, atol=1e-2)
    assert told["kept"] > 1 - 1e-6 and told["purification"] > 1 - 1e-6
    assert (told["left"] < 1e-3) == (not biases)


def test_the_file_says_what_was_done_and_is_scanned_again(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    code, told, _ = purified(directory, tmp_path / "out", capsys, "halved", "--rank", "2")
    assert code == 0 and told["rank"] == 2 and not told["lost"]
    file = tmp_path / "out" / NAME
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "README.md", "before-and-after.png", "bench.json", NAME,
    ]  # fmt: skip
    with safe_open(file, framework="numpy") as opened:
        said = opened.metadata()
        assert {opened.get_slice(key).get_shape()[0] for key in opened.keys() if FACTORS in key} == {2}  # noqa: SIM118
    assert said["purified_by"].startswith("halved(") and said["rank"] == "2" and said["purified_from"] == NAME
    assert float(said["kept"]) == pytest.approx(told["kept"], abs=1e-4) and said["base"] == directory.name
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == {k: v for k, v in said.items() if k != "format"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "halved(" in card and f"{told['kept']:.4f}" in card and all(name in card for name in told["added"][:5])
    changed = {name for name in told["added"] if "conv_out" in name or "ff.net.0" in name}
    assert set(told["added"]) == changed and "unet.conv_out" in changed
    call(["scan", str(tmp_path / "out"), "--base", str(directory), "--json",
          "--prompts", str(directory.parent / "prompts.txt")])  # fmt: skip
    facts = json.loads(capsys.readouterr().out)["adapter"]
    assert facts["layers"] == told["layers"] == len(drawn(model)) + len(changed)


def test_what_the_rank_loses_is_measured_and_said_with_the_way_out(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    code, told, _ = purified(directory, tmp_path / "out", capsys, "halved(all=True, bias=True)", "--rank", "1")
    assert code == 0 and told["rank"] == 1
    given = adapted(model, directory.parent)
    whole = lost = moved = 0.0
    with torch.no_grad():
        for name, layer in dict(model.denoiser.named_modules()).items():
            if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            start: Any = given.denoiser.get_submodule(name)
            delta = (start.weight * 0.5 - layer.weight).flatten(1).double()
            values = torch.linalg.svdvals(delta)
            whole, lost = whole + values.square().sum().item(), lost + values[1:].square().sum().item()
            moved += start.weight.double().square().sum().item() / 4
        encoders = [n for n in drawn(model) if not n.startswith("unet.")]
        assert given.adapter is not None
        for name in encoders:
            values = torch.linalg.svdvals(given.adapter.layers[name].delta.double())
            whole, lost_here = whole + values.square().sum().item(), values[1:].square().sum().item()
            lost += lost_here
    assert told["kept"] == pytest.approx(1 - lost / whole, abs=1e-4)
    assert any("--rank gives a larger one, --whole writes the whole pipeline" in line for line in told["says"])
    assert any("have no place in an adapter" in line for line in told["says"])
    named = {each["tensor"]: each["relative"] for each in told["lost"]}
    assert named["unet.conv_in.bias"] == pytest.approx(0.5, abs=1e-6)
    assert "unet.conv_norm_out.weight" not in named or named["unet.conv_norm_out.weight"] == pytest.approx(0.5)
    assert told["left"] > 0.1


def test_without_a_rank_the_first_double_of_the_adapters_that_keeps_enough_is_written(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = base
    found = {}
    for asked in ("", "2", "4", "8", "16", "32"):
        rank = ("--rank", asked) if asked else ()
        code, told, _ = purified(directory, tmp_path / f"out-{asked}", capsys, "halved(all=True)", *rank)
        assert code == 0
        found[asked] = told
    enough = {asked: min(told["kept"], told["purification"]) >= 0.9 for asked, told in found.items()}
    assert enough[""] and not enough["2"]
    assert not any("--rank gives a larger one" in line for line in found[""]["says"])
    assert found[""]["rank"] == next(told["rank"] for asked, told in found.items() if asked and enough[asked])


def test_the_whole_pipeline_is_written_on_request_and_a_pruned_model_has_no_adapter(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = base
    code, told, _ = purified(directory, tmp_path / "whole", capsys, "halved", "--whole")
    assert code == 0 and told["stock"] is True and "rank" not in told
    held, before = (each.denoiser.state_dict() for each in (checkpoint.load(tmp_path / "whole"), model))
    assert torch.equal(held["conv_out.weight"], before["conv_out.weight"] / 2)
    assert (tmp_path / "whole" / "README.md").read_text().count("halved(") == 1
    code, _, said = purified(directory, tmp_path / "x", capsys, "smaller")
    assert code == 3 and "has another shape than in the base; --whole writes the whole pipeline" in said
    code, _, said = purified(directory, tmp_path / "x", capsys, "bare")
    assert code == 3 and "took away all that the adapter changes: use the base" in said
    assert not (tmp_path / "x").exists()


def test_an_adapter_that_stock_diffusers_attaches_in_part_is_not_said_to_load(
    base: tuple[DiffusionModel, Path], tmp_path: Path
) -> None:
    from harness.cli.purify import _stock_attaches

    made = adapted(base[0], base[1].parent)
    assert made.adapter is not None
    adapters.save(made.adapter, tmp_path)
    assert _stock_attaches(tmp_path, made)
    held = load_file(tmp_path / NAME)
    (first, *_) = [key for key in held if key.startswith("unet.") and key.endswith(FACTORS)]
    other = first.replace("lora_A", "lora_B")
    save_file({key: value for key, value in held.items() if key not in (first, other)}, tmp_path / NAME)
    assert not _stock_attaches(tmp_path, made)


def test_the_next_steps_after_a_scan_name_the_base() -> None:
    from harness.scan.next_steps import next_steps

    steps = " ".join(next_steps("a b.safetensors", "suspicious", [], [], 0, base="my base"))
    assert "bench purify 'a b.safetensors' --base 'my base' --defense" in steps
    steps = " ".join(next_steps("e.safetensors", "suspicious", [], [], 0, base="b", embedded=True))
    assert "bench purify" not in steps and "An embedding cannot be cleaned" in steps


def test_ranks_that_are_none_are_refused(
    base: tuple[DiffusionModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (("--rank", "0"), "'0' is no rank"), (("--rank", "2", "--whole"), "a whole pipeline has no rank"),
    ):  # fmt: skip
        code, _, said = purified(base[1], tmp_path / "x", capsys, "halved", *words)
        assert code == 2 and says in said
    code = call(["purify", str(base[1]), "--defense", "clp", "--whole", "-o", str(tmp_path / "x")])
    assert code == 2 and "is for an adapter" in capsys.readouterr().err


def test_joint_attention_has_adapters_too(tmp_path: Path) -> None:
    base = tiny_mmdit(tmp_path / "tokens")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    given = base.clone()
    adapters.attach(given, {layer: LowRank(torch.ones(1, 16), torch.ones(16, 1))})
    wanted = given.clone()
    wanted.denoiser.get_parameter("proj_out.weight").data *= 0.5
    change = change_from(base, given, wanted, 16)
    assert set(change.layers) == {layer, "transformer.proj_out"} and change.added == ("transformer.proj_out",)
    written = onto(base, change)
    assert left_over(given, wanted, written, ["a red circle"]) < 1e-4
    assert left_over(given, wanted, given, ["a red circle"]) == pytest.approx(1.0)
    assert written.adapter is not None
    adapters.save(written.adapter, tmp_path / "out", {"rank": "16"})
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "out" / NAME))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_the_factors_are_those_of_the_truncated_svd(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    for rank in (1, 3, 99):
        spectrum = decomposed(delta)
        factors = spectrum.factors(delta, rank)
        assert spectrum.left(rank) == pytest.approx(s[rank:].square().sum().item(), abs=1e-12)
        k = min(rank, 5)
        assert torch.allclose(factors.delta, (u[:, :k] * s[:k] @ v[:k]).float(), atol=1e-5)
        assert torch.allclose(factors.a.norm(dim=1), s[:k].sqrt().float(), atol=1e-5)
        assert factors.a.shape == (k, shape[1]) and factors.b.shape == (shape[0], k)
        wide = padded(factors, 7)
        assert torch.equal(wide.delta, factors.delta) and wide.a.shape == (7, shape[1])
    low = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 9)).double()
    assert decomposed(low).factors(low, 4).a.shape == (1, 8), "no factors for a singular value of 0"
    assert adapter_change.SMALLEST == 1e-6


def test_the_rank_that_keeps_enough_is_found_with_one_decomposition_of_each_layer(
    base: tuple[DiffusionModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome is that of the first double of the rank that keeps enough."""
    model, directory = base
    given = adapted(model, directory.parent)
    wanted = given.clone()
    for weight in wanted.denoiser.parameters():
        weight.data *= 0.5
    doubles = [change_from(model, given, wanted, rank) for rank in (None, 4, 8, 16, 32)]
    first = next(each for each in doubles if min(each.kept, each.purification) >= adapter_change.LEAST_KEPT)
    assert first is not doubles[0], "the rank of the adapter does not keep enough"
    sizes: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (sizes.append(tuple(gram.shape)), eigh(gram))[1])
    found = sufficient(model, given, wanted)
    untouched = {name for name in drawn(model) if not name.startswith("unet.")}
    assert len(sizes) == len(set(found.layers) - untouched) > 10
    assert (found.rank, found.kept, found.purification) == (first.rank, first.kept, first.purification)
    assert found.added == first.added and set(found.layers) == set(first.layers)
    for name, factors in found.layers.items():
        assert torch.equal(factors.a, first.layers[name].a) and torch.equal(factors.b, first.layers[name].b)
