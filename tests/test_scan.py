"""`bench scan`, `bench purify` and `bench calibrate` on models of one's own, hostile ones among them."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from harness import registry
from harness.cli import Exit, main
from harness.cli.common import writable
from harness.cli.scan import applicable
from harness.cli.subject import Subject, known
from harness.diffusion import adapters, checkpoint, events
from harness.diffusion.adapters import LowRank
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.judges import hub
from harness.methods import trigger_placement
from harness.scan import ahead, report, verdict
from harness.scan.verdict import LEAST, Finding, Population
from harness.testing import tiny
from harness.types import Data, Defended, Knowledge
from tests import scans
from tests.oracles import PlantedShift, scheduler, tiny_sd, tiny_sdxl, tiny_unet
from tests.scans import Run

DETECTORS = '''
"""Detectors whose answers are known."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from harness import Defended, hookimpl


@dataclass(frozen=True)
class Bias:
    """Suspicious of a large output bias."""

    name: ClassVar[str] = "bias"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    own: bool = True  # has a threshold of its own

    def defend(self, model, knowledge, rng):
        value = model.denoiser.conv_out.bias.mean().item()
        return Defended(suspicion=value, flag_above=1.0 if self.own else None, trigger=torch.full(model.shape, 0.5))


@dataclass(frozen=True)
class Broken(Bias):
    """Fails."""

    name: ClassVar[str] = "broken"

    def defend(self, model, knowledge, rng):
        raise ValueError("no such </td><script>alert(1)</script>")


@dataclass(frozen=True)
class Told(Bias):
    """Has to be told the trigger, and moves the weights by its mean."""

    name: ClassVar[str] = "told"
    needs: ClassVar[tuple[str, ...]] = ("trigger",)
    delivers: ClassVar[tuple[str, ...]] = ("model",)

    def defend(self, model, knowledge, rng):
        model = model.clone()
        model.denoiser.conv_out.bias.data += 0.01 * knowledge.trigger.delta(model.shape).mean()
        return Defended(model=model)


@dataclass(frozen=True)
class Pruner(Told):
    """Removes channels."""

    name: ClassVar[str] = "pruner"
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model, knowledge, rng):
        from harness.methods import pruning

        model = model.clone()
        pruning.prune(model, pruning.magnitude(), 0.25)
        return Defended(model=model)


@hookimpl
def defenses():
    return [Bias, Broken, Told, Pruner]
'''


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in three steps."""
    monkeypatch.setattr(verdict, "sampler_of", lambda model: DDIM(steps=3))


bench = scans.bench_with(DETECTORS)  # bench(command, *words)


def saved(directory: Path, bias: float = 0.0, labels: dict[str, str] | None = None) -> Path:
    model = tiny_unet()
    out: Any = model.denoiser.conv_out
    out.bias.data.fill_(bias)
    checkpoint.save(model, directory, labels)
    return directory


# ---- judging --------------------------------------------------------------------------------------------------------


def test_the_chance_of_a_clean_model_is_students_prediction() -> None:
    clean, s = (1.0, 2.0, 3.0, 4.0, 5.0), 10.0  # mean 3, variance 5/2
    t = (s - 3) / math.sqrt(2.5 * (1 + 1 / 5))
    w = 1 + t * t / 4  # the closed form of Student's distribution with four degrees of freedom
    expected = 0.5 - 3 / 8 * t / math.sqrt(w) * (1 - t * t / (12 * w))
    assert verdict.chance(s, clean) == pytest.approx(expected, rel=1e-9)
    assert verdict.chance(3.0, clean) == pytest.approx(0.5)
    assert math.isnan(verdict.chance(2.0, (1.0,) * 5))
    (unknown,) = verdict.judged([Finding("a", 2.0)], Population("m", {}, {"a": (1.0,) * 5}))
    assert (unknown.chance, unknown.flagged) == (None, None)


def test_the_level_is_shared_by_the_detectors_that_have_clean_models_to_compare_with() -> None:
    clean = (1.0, 2.0, 3.0, 4.0, 5.0)
    s = 3 + 2.5 * math.sqrt(2.5 * 1.2)  # a chance of 0.033: below 0.05, not below 0.05 / 2
    population = Population("m", {}, {"a": clean, "b": clean, "few": clean[:4]})
    (alone,) = verdict.judged([Finding("a", s)], population)
    both = verdict.judged([Finding("a", s), Finding("b", 3.0)], population)
    assert alone.flagged and [f.flagged for f in both] == [False, False]
    few, own, silent = verdict.judged(
        [Finding("few", s), Finding("c", 2.0, flag_above=1.0), Finding("d", 9.0)], population
    )
    assert (few.flagged, own.flagged, silent.flagged) == (None, True, None)
    assert verdict.verdict([alone, silent]) == "suspicious" and verdict.verdict(both) == "nothing found"
    failed = Finding("e", error="failed")
    assert verdict.verdict([silent, failed]) == verdict.verdict([*both, failed]) == "undecided"
    assert verdict.verdict([alone, failed]) == "suspicious"


def test_a_detector_is_given_what_it_needs_and_nothing_else() -> None:
    seen: list[Knowledge] = []

    def defend(model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        seen.append(knowledge)
        return Defended(suspicion=math.nan)

    detector = SimpleNamespace(needs=("words",), defend=defend)
    (found,) = verdict.examine({"x": detector}, tiny_unet(), Knowledge(words=("a",), prompts=("b",)), None, 0)
    assert seen == [Knowledge(words=("a",))]
    assert found.suspicion is None and found.error == "its suspicion is nan"


def test_how_far_images_are_from_usual_ones_is_counted_in_the_distances_of_those() -> None:
    plain = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert verdict.farness(torch.full((3, 1, 2, 2), 5.0), plain) == pytest.approx(2.0)
    assert verdict.farness(plain, plain) == 0.0
    assert math.isnan(verdict.farness(plain, torch.zeros(3, 1, 2, 2)))


def test_a_shuffled_pattern_has_the_same_pixels_at_other_places() -> None:
    pattern = torch.arange(32.0).view(2, 4, 4)
    other = verdict.shuffled(pattern)
    assert not torch.equal(other, pattern) and torch.equal(other.flatten(1).sort(1).values, pattern.flatten(1))
    assert torch.equal(other[1] - other[0], torch.full((4, 4), 16.0)), "a pixel keeps its colour"
    assert torch.equal(verdict.shuffled(pattern), other)


def test_images_from_a_trigger_that_fires_are_alike() -> None:
    r = torch.zeros(1, 16, 16)
    r[:, 8:, 8:] = 3.0
    model = DiffusionModel(PlantedShift(r, c=1.0), scheduler())
    inputs = verdict.inputs_of(model, 4, None)
    assert trigger_placement.usable(model, r) and not trigger_placement.usable(model, r[:, :8])
    same = torch.rand(1, 1, 16, 16).expand(4, -1, -1, -1)
    assert verdict.alikeness(same, inputs.noise) == 0.0
    assert verdict.alikeness(inputs.noise, inputs.noise) == 1.0
    assert not torch.equal(verdict.pictures(model, inputs, r), verdict.pictures(model, inputs))


# ---- the command ----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every tag and every attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def test_a_scan_ends_in_a_verdict_an_exit_code_and_a_page_that_a_hostile_model_cannot_write_into(
    bench: Run, tmp_path: Path
) -> None:
    evil = saved(tmp_path / "<img src=x onerror=alert(1)>", 2.0, {"backdoored": "</code><script>alert(2)</script>"})
    page = tmp_path / "page.html"
    found = bench("scan", evil, "--detector", "bias", "--detector", "broken", "--json", "-o", page)
    told = json.loads(found.out)
    assert found.code == 1 and told["verdict"] == "suspicious" and told["because"] == "Flagged by bias."
    bias, broken = told["findings"]
    assert (
        bias["suspicion"] == pytest.approx(2.0) and bias["alike"] > 0 and broken["says"].startswith("failed: no such")
    )
    assert any("may still be backdoored" in line for line in told["limits"])

    tags = Tags(page.read_text())
    assert not tags.tags & {"script", "iframe", "link", "object"} and "img" in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert all((value or "").startswith("data:image/png;base64,") for name, value in tags.attributes if name == "src")
    assert "default-src &#39;none&#39;" in page.read_text() and "alert(2)" in page.read_text()

    clean = bench("scan", saved(tmp_path / "clean"), "--detector", "bias")
    assert clean.code == 0 and "nothing found" in clean.out and "not suspicious" in clean.out
    alone = bench("scan", tmp_path / "clean", "--detector", "bias(own=False)")
    assert alone.code == 6 and "undecided" in alone.out


def test_what_cannot_be_loaded_or_asked_is_one_line_and_its_exit_code(bench: Run, tmp_path: Path) -> None:
    saved(tmp_path / "m")
    weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "empty").mkdir()
    whole = weights.read_bytes()

    def fails(code: int, says: str, *words: str) -> None:
        found = bench("scan", *words)
        lines = [line for line in found.err.splitlines() if line.startswith("bench:")]
        assert (found.code, len(lines)) == (code, 1) and says in lines[0], found.err

    fails(4, "is empty", str(tmp_path / "empty"))
    fails(4, "no such directory", str(tmp_path / "a" / "b"))
    fails(2, "returns no suspicion", str(tmp_path / "m"), "--detector", "finetune")
    fails(2, "no defense named 'biass'", str(tmp_path / "m"), "--detector", "biass")
    weights.write_bytes(whole[:-9])
    fails(4, "truncated or damaged", str(tmp_path / "m"))
    tensors = load_file(saved(tmp_path / "n") / "unet" / weights.name)
    save_file({k: v[:1].clone() if k == "conv_in.weight" else v for k, v in tensors.items()}, weights)
    fails(4, "conv_in.weight", str(tmp_path / "m"))
    weights.rename(weights.with_suffix(".bin"))
    fails(4, "a pickle can run code", str(tmp_path / "m"))
    (tmp_path / "m" / "model_index.json").write_text("[]")
    fails(4, "a JSON list, not an object", str(tmp_path / "m"))


@pytest.mark.parametrize("words", [("nodir/x",), ("m", "--base", "nodir/x")])
def test_a_mistyped_path_is_named_before_the_hub(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    import huggingface_hub

    def gone(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    monkeypatch.chdir(saved(tmp_path / "m").parent)
    found = bench("scan", *words, "--detector", "bias")
    says = "nodir/x: no such directory, and as a hub id: model nodir/x at main cannot be had from the hub (no network)"
    assert found.code == 4 and says in found.err and "Traceback" not in found.err


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(bench: Run, tmp_path: Path, device: str) -> None:
    for command, *words in (
        ("scan", tmp_path),
        ("purify", tmp_path, "--defense", "finetune", "-o", tmp_path / "out"),
        ("build", "digits-ddpm", "-o", tmp_path / "out"),
    ):
        found = bench(command, *words, "--device", device)
        (line,) = found.err.splitlines()
        assert found.code == 2 and line.startswith(f"bench: --device {device}: ") and "name another" in line


def test_a_crash_is_told_with_its_command_and_never_exits_as_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(source: hub.Source) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(hub, "load", crash)
    monkeypatch.setattr(sys, "argv", ["bench", "scan", str(saved(tmp_path / "a model"))])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == Exit.bug == 70
    assert "Traceback" in said and said.splitlines()[-1].endswith(f"command: bench scan '{tmp_path / 'a model'}'")
    monkeypatch.setenv("BENCH_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["bench", "scan", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == Exit.missing and "Traceback" in capsys.readouterr().err


# ---- what is said before any work ------------------------------------------------------------------------------------


class Ticks:
    """The clock of these tests: only what sleeps by it takes time."""

    now = 0.0

    @classmethod
    def sleep(cls, seconds: float) -> None:
        cls.now += seconds


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> type[Ticks]:
    monkeypatch.setattr(ahead, "time", SimpleNamespace(monotonic=lambda: Ticks.now))
    return Ticks


@dataclass(frozen=True)
class Slow:
    """Takes 10 ms for each pass, and 20 ms for itself. Its suspicion is 0."""

    needs: ClassVar[tuple[str, ...]] = ()
    loops: ClassVar[tuple[str, ...]] = ("passes", "more")
    passes: int = 100
    more: int = 0
    flag_above: float | None = 0.5
    broken: bool = False

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Any:
        if self.broken:
            raise ValueError("no")
        Ticks.sleep(0.02 + 0.01 * (self.passes + self.more))
        events.progress("slow", 1, 1)
        return Defended(suspicion=0.0, flag_above=self.flag_above)


def test_the_time_of_a_detector_follows_from_a_few_passes_of_its_loops(ticks: type[Ticks]) -> None:
    heard: list[Any] = []
    events.listen(heard.append)
    try:
        seconds = ahead.expected_seconds(Slow(), tiny_unet(), Knowledge(), 0)
    finally:
        events.listen(None)
    assert seconds == pytest.approx(0.02 + 100 * 0.01) and not heard
    assert ahead.expected_seconds(Slow(broken=True), tiny_unet(), Knowledge(), 0) is None
    assert ahead.expected_seconds(object(), tiny_unet(), Knowledge(), 0) is None


@dataclass(frozen=True)
class SlowInside(Slow):
    """Takes 10 ms for each pass, of which each has a hundred passes of a loop that the field does not name."""

    passes: int = 3

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Any:
        for _ in range(self.passes):
            for _ in events.loop("inside", range(100)):
                Ticks.sleep(0.01)
        return Defended(suspicion=0.0, flag_above=self.flag_above)


def test_loops_that_no_field_names_are_cut_short_and_count_in_full(ticks: type[Ticks]) -> None:
    began = ticks.now
    seconds = ahead.expected_seconds(SlowInside(), tiny_unet(), Knowledge(), 0)
    assert ticks.now - began == pytest.approx((1 + 1 + 3) * 2 * 0.01), "two passes in each of one, one and three"
    assert seconds == pytest.approx(3 * 100 * 0.01)
    assert list(events.loop("later", range(5))) == list(range(5))


def test_it_is_said_ahead_by_what_each_detector_judges_and_whether_a_verdict_is_possible() -> None:
    known = Population("m", {}, {"compared": (0.0,) * LEAST}, {})
    own, none, unknown = Slow(), Slow(flag_above=None), SimpleNamespace()
    detectors = {"compared": none, "own(a=1)": own, "none": none, "unknown": unknown}
    asked = ahead.asks(detectors, tiny_unet(), Knowledge(), known, 0)
    assert [ask.able for ask in asked] == [True, True, False, None]
    said = [str(ask) for ask in asked]
    assert said[0].startswith(f"compared: compared with {LEAST} clean models, about ")
    assert said[1].startswith("own: suspicious above 0.5, its own threshold, about ")
    assert "bench calibrate, --population FILE" in said[2] and said[3] == "unknown: by its own threshold, if it has one"
    assert ahead.outlook(asked) == "A verdict is possible."
    assert ahead.outlook(asked[2:3]).startswith("No verdict is possible") and "only if" in ahead.outlook(asked[2:])


def test_a_scan_says_ahead_what_it_asks_unless_it_is_quiet(bench: Run, tmp_path: Path) -> None:
    directory = saved(tmp_path / "m")
    told = bench("scan", directory, "--detector", "bias")
    assert "bias: by its own threshold, if it has one\nA verdict is possible only if" in told.err
    assert "verdict is possible" not in bench("scan", directory, "--detector", "bias", "--quiet").err
    assert "verdict is possible" not in bench("scan", directory, "--detector", "bias", "--json").err


# ---- what is asked, and with what -----------------------------------------------------------------------------------


def test_a_bare_name_stands_for_how_the_default_scan_asks_the_detector(bench: Run, tmp_path: Path) -> None:
    directory, file = saved(tmp_path / "m"), tmp_path / "population.json"
    clean = Population(
        "digits-ddpm", verdict.signature(tiny_unet()), {"bias(own=False)": (0.0, 0.1, 0.2, 0.3, 0.4)}, {"given": 5}
    )
    verdict.write_population(clean, file)
    words = ("scan", directory, "--population", file, "--json", "--detector")
    bare, explicit = bench(*words, "bias"), bench(*words, "bias()")
    told = [json.loads(each.out)["findings"][0] for each in (bare, explicit)]
    assert [each["detector"] for each in told] == ["bias(own=False)", "bias(own=True)"]
    assert told[0]["clean"] and not told[1]["clean"]
    note = "bias() has no clean models to compare with; they were asked bias(own=False): give --detector bias\n"
    assert note in explicit.err and "clean models" not in bare.err


def test_a_population_made_before_a_parameter_existed_is_still_compared_with(bench: Run, tmp_path: Path) -> None:
    directory, file = saved(tmp_path / "m"), tmp_path / "population.json"
    values = {"bias()": (0.0, 0.1, 0.2, 0.3, 0.4), "gone(a=1)": (1.0,)}
    verdict.write_population(Population("digits-ddpm", verdict.signature(tiny_unet()), values, {}), file)
    told = json.loads(bench("scan", directory, "--population", file, "--json", "--detector", "bias").out)
    (found,) = told["findings"]
    assert found["detector"] == "bias(own=True)" and found["clean"] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_an_adapter_is_asked_by_specs_of_its_own(tmp_path: Path) -> None:
    from harness.cli.scan import default_detectors

    plain = tiny_sd(tmp_path)
    adapted = plain.clone()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    adapters.attach(adapted, {layer: LowRank(torch.ones(1, 16), torch.ones(16, 1))})
    usual, own = default_detectors(plain), default_detectors(adapted)
    names = [[spec.partition("(")[0] for spec in each] for each in (usual, own)]
    assert names[0] == names[1] and usual != own
    plugins = registry.load()
    (scan,) = (plugins.build("defenses", spec) for spec in own if spec.startswith("vocabulary-scan"))
    assert scan.without_a_word and scan.keep < 1 and scan.flag_above == plugins.build("defenses", usual[0]).flag_above


def test_without_clean_models_a_bare_name_stands_for_the_spec_of_scan_toml() -> None:
    from harness.cli.scan import default_detectors

    subject, plugins = Subject("m", Path(), tiny_unet(), None, None), registry.load()
    asked, _ = applicable(subject, plugins, ["terd"], {})
    assert list(asked) == [plugins.canonical("defenses", default_detectors(subject.model)[0])]
    asked, _ = applicable(subject, plugins, ["terd()"], {})
    assert list(asked) == [plugins.canonical("defenses", "terd")]


def test_pictures_in_colour_become_grey_for_a_model_of_one_channel(bench: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (16, 16), 51).save(folder / "1.png")
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "2.png")
    data = known(Subject("m", Path(), tiny_unet(), None, None), folder, None, 0, {"data"}).data
    assert data is not None and data.images.shape == (2, 1, 16, 16)
    means = data.images.mean((1, 2, 3)).tolist()
    assert means == pytest.approx([2 * 0.2 - 1, 2 * 0.299 - 1], abs=1e-5)
    words = ("--defense", "finetune(steps=1, batch=2)", "--data", folder, "-o", tmp_path / "out")
    assert bench("purify", saved(tmp_path / "m"), *words).code == 0
    assert bench("scan", tmp_path / "m", "--detector", "bias", "--data", folder).code == 0


def test_data_that_cannot_fit_is_refused_with_both_shapes(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 51).save(tmp_path / "1.png")
    model = SimpleNamespace(shape=(4, 16, 16), vae=None, conditional=False)
    with pytest.raises(
        click.UsageError, match="images of 3×16×16 do not fit a model of 4×16×16; give others with --li"
    ):
        known(Subject("m", Path(), model, None, None), tmp_path, None, 0, {"data"})
    like: Any = SimpleNamespace(name="other", data=lambda: Data(torch.zeros(2, 1, 8, 8)))
    with pytest.raises(click.UsageError, match="data of other: images of 1×8×8 do not fit a model of 1×16×16"):
        known(Subject("m", Path(), tiny_unet(), like, None), None, None, 0, {"data"})


def test_a_plugin_of_another_kind_of_model_is_refused_and_those_that_fit_are_named(bench: Run, tmp_path: Path) -> None:
    directory = saved(tmp_path / "m")
    for command in (["scan", directory, "--detector", "bias"], ["purify", directory, "--defense", "finetune"]):
        words = ["-o", tmp_path / "out"] if command[0] == "purify" else []
        found = bench(*command, "--like", "shapes-sd", *words)
        line = found.err.splitlines()[-1]
        assert found.code == 2 and line.startswith(f"bench: --like shapes-sd takes prompts, {directory} no prompts; ")
        assert "digits-ddpm" in line and "sd-v1-4" not in line
    assert bench("scan", directory, "--detector", "bias", "--like", "digits-ncsn").code == 0


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(bench: Run, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    nowhere = tmp_path / "no such model"
    for out in (tmp_path, tmp_path / "afile" / "x.html", Path("/proc/x.html"), tmp_path / ("x" * 300)):
        found = bench("scan", nowhere, "-o", out)
        assert found.code == 2 and f"{out}: cannot be written (" in found.err and "name another with -o" in found.err
    for out in (tmp_path / "afile" / "x", Path("/proc/x")):
        found = bench("purify", nowhere, "--defense", "finetune", "-o", out)
        assert found.code == 2 and f"{out}: cannot be written (" in found.err


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("kept")
    writable(tmp_path)
    writable(tmp_path / "a" / "b")
    writable(tmp_path / "a" / "b.html", file=True)
    writable(tmp_path / "afile", file=True)
    assert [each.name for each in tmp_path.iterdir()] == ["afile"] and (tmp_path / "afile").read_text() == "kept"
    with pytest.raises(click.UsageError, match="name another with --store"):
        writable(tmp_path / "afile", "--store")


def test_the_verdict_is_said_before_the_page_is_written(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("scan", saved(tmp_path / "m"), "--detector", "bias", "-o", tmp_path / "a" / "b" / "page.html")
    found = bench(*words)
    assert found.code == 0 and (tmp_path / "a" / "b" / "page.html").is_file()
    assert found.out.endswith("page.html\n") and "report: " in found.out

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", full)
    found = bench(*words)
    assert found.code == 4 and "nothing found" in found.out and "report: " not in found.out


def test_code_beside_the_weights_is_named_and_left_alone(bench: Run, tmp_path: Path) -> None:
    directory = saved(tmp_path / "m")
    for name in ("pipeline.py", "unet/extra.bin"):
        (directory / name).write_text("raise SystemExit('this ran')")
    found = bench("scan", directory, "--detector", "bias")
    assert found.code == 0 and "were not opened: pipeline.py, unet/extra.bin" in found.out


def test_weights_beside_the_model_are_said_not_to_be_examined_in_terminal_json_and_page(
    bench: Run, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    directory, out = saved(tmp_path / "m"), tmp_path / "out.html"
    assert json.loads(bench("scan", directory, "--detector", "bias", "--json").out)["not_examined"] == []
    names = ["pytorch_lora_weights.safetensors", "unet_ema/diffusion_pytorch_model.safetensors"]
    (directory / "unet_ema").mkdir()
    for name in names:
        save_file({"x": torch.zeros(1)}, directory / name)
    line = f"were not examined, so nothing is known of the model with them: {', '.join(names)}."
    found = bench("scan", directory, "--detector", "bias", "-o", out)
    assert found.code == 0 and sum(line in said for said in found.out.splitlines()) == 1
    assert line in out.read_text()
    document = json.loads(bench("scan", directory, "--detector", "bias", "--json").out)
    assert document["not_examined"] == names and any(line in limit for limit in document["limits"])


def test_a_purified_model_loads_with_stock_diffusers_says_so_and_shows_what_changed(bench: Run, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline  # type: ignore[attr-defined]

    directory, out = saved(tmp_path / "m"), tmp_path / "out"
    words = (directory, "--defense", "told", "-o", out)
    missing = bench("purify", *words)
    assert missing.code == 2 and "it needs trigger: give --trigger SPEC" in missing.err and not out.exists()
    learned = bench("purify", *words, "--trigger", "learned")
    assert learned.code == 2 and "the pattern of learned is known to the run whose attack learned it" in learned.err
    found = bench("purify", *words, "--trigger", "box", "--json")
    told = json.loads(found.out)
    assert found.code == 0 and told["stock"] and told["drift"] > 0
    assert DDPMPipeline.from_pretrained(out, local_files_only=True).unet.config.in_channels == 1
    label = json.loads((out / "bench.json").read_text())
    assert label["purified_by"].startswith("told(") and label["purified_from"] == "m" and "may remain" in label["note"]
    assert (out / "before-and-after.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert f"It was loaded with diffusers {metadata.version('diffusers')}." in card and told["defense"] in card
    again = bench("purify", *words, "--trigger", "box")
    assert again.code == 2 and "is not empty" in again.err
    assert bench("purify", directory, "--defense", "bias", "-o", tmp_path / "x").code == 2


def test_the_docs_name_the_diffusers_that_purified_models_are_loaded_with() -> None:
    root = Path(__file__).parent.parent
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (least,) = (each.partition(">=")[2] for each in wanted if each.startswith("diffusers>="))
    said = " ".join((root / "docs/scan.md").read_text().split())
    assert f"The package diffusers {least} or later loads the directory" in said


def test_a_model_of_images_that_are_not_square_is_purified_with_data_of_its_shape(bench: Run, tmp_path: Path) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from PIL import Image

    model, data, out = tiny_unet(), tmp_path / "data", tmp_path / "out"
    config: Any = model.denoiser.config
    wide: Any = UNet2DModel.from_config(config, sample_size=(16, 24))
    checkpoint.save(DiffusionModel(wide, model.scheduler), tmp_path / "m")
    data.mkdir()
    for i in range(8):
        Image.new("L", (48, 32), 30 * i).save(data / f"{i}.png")
    words = ("--data", data, "--defense", "finetune(steps=2, batch=4)", "-o", out)
    found = bench("purify", tmp_path / "m", *words, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["stock"] and checkpoint.load(out).shape == (1, 16, 24)


def test_a_purified_model_keeps_the_pipeline_and_the_schedule_that_it_had(bench: Run, tmp_path: Path) -> None:
    directory, out = saved(tmp_path / "m"), tmp_path / "out"
    index = json.loads((directory / "model_index.json").read_text())
    index |= {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    schedule = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_end": 0.02}
    (directory / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    found = bench("purify", directory, "--defense", "pruner", "-o", out, "--json")
    assert found.code == 0, found.err
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    written = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "_diffusers_version"} == schedule


def test_a_pruned_denoiser_is_not_said_to_load_with_stock_diffusers_and_can_be_scanned(
    bench: Run, tmp_path: Path
) -> None:
    directory, out = saved(tmp_path / "m"), tmp_path / "out"
    told = json.loads(bench("purify", directory, "--defense", "pruner", "-o", out, "--json").out)
    assert not told["stock"] and "harness.diffusion.checkpoint.load, not stock diffusers" in told["loads"]
    assert bench("scan", out, "--detector", "bias").code == 0
    sizes = [sum(p.numel() for p in checkpoint.load(each).denoiser.parameters()) for each in (directory, out)]
    assert sizes[1] < sizes[0]


def test_calibrate_takes_clean_models_that_one_has(bench: Run, tmp_path: Path) -> None:
    from plugins.models.digits_ddpm import DigitsDDPM

    model = DigitsDDPM().load()
    out: Any = model.denoiser.conv_out
    for k in range(verdict.LEAST):
        out.bias.data += 0.01 * k
        checkpoint.save(model, tmp_path / f"m{k}")
    words = [word for k in range(verdict.LEAST) for word in ("--of", tmp_path / f"m{k}")]
    file, detector = tmp_path / "population.json", ("--detector", "bias(own=False)")
    assert bench("calibrate", "digits-ddpm", *words, *detector, "-o", file).code == 0
    (values,) = verdict.read_population(file).suspicion.values()
    assert len(set(values)) == verdict.LEAST and list(values) == sorted(values)
    assert "give at least 5" in bench("calibrate", "digits-ddpm", *words[2:], *detector, "-o", file).err
    other = bench("calibrate", "digits-ddpm", *words[2:], "--of", saved(tmp_path / "other"), *detector, "-o", file)
    assert other.code == 2 and "another kind of model" in other.err


def test_a_scan_compares_with_the_clean_models_that_calibrate_made(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.cli import scan as scan_command, subject
    from plugins.models.digits_ddpm import DigitsDDPM

    file = tmp_path / "population.json"
    made = bench(
        "calibrate", "digits-ddpm", "--models", 5, "--clean", "none(steps=1, batch=2, lr=1e-2)", "--detector",
        "bias(own=False)", "-o", file,
    )  # fmt: skip
    population = verdict.read_population(file)
    (spec,) = population.suspicion
    assert made.code == 0 and population.model == "digits-ddpm" and len(set(population.suspicion[spec])) > 1
    monkeypatch.setattr(subject, "known_populations", lambda registry: iter([population]))
    usual = [spec, "bias(own=True)", "none"]  # the first in the population's way, the last delivers no suspicion
    monkeypatch.setattr(scan_command, "default_detectors", lambda model: usual)
    model = DigitsDDPM().load()
    found = []
    for extra in (0.0, 1.0):
        out: Any = model.denoiser.conv_out
        out.bias.data += extra
        checkpoint.save(model, tmp_path / f"m{extra}")
        found.append(bench("scan", tmp_path / f"m{extra}", "--json"))
    told = [json.loads(each.out) for each in found]
    assert [each["facts"]["compared with"] for each in told] == ["clean models of digits-ddpm"] * 2
    assert [each.code for each in found] == [0, 1], told
    assert told[1]["findings"][0]["clean"] == list(population.suspicion[spec])
    file.write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="no population of clean models"):
        verdict.read_population(file)


def test_a_model_of_few_timesteps_is_sampled_with_as_many_steps_as_it_has() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    model = tiny.model("noise")
    short = DiffusionModel(model.denoiser, DDPMScheduler(num_train_timesteps=20, clip_sample=False))
    images = verdict.pictures(short, verdict.inputs_of(short, 2, None))
    assert images.shape == (2, 1, 16, 16) and bool(images.isfinite().all())


def test_a_model_whose_samples_are_nan_is_undecided_and_no_detector_is_asked(
    bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "m")
    pictures = verdict.pictures
    monkeypatch.setattr(verdict, "pictures", lambda *words: pictures(*words) * float("nan"))
    monkeypatch.setattr(verdict, "examine", lambda *words: pytest.fail("a detector was asked"))
    found = bench("scan", directory, "--detector", "bias", "--json")
    told = json.loads(found.out)
    assert found.code == 6 and told["verdict"] == "undecided" and "NaN" in told["because"] and told["findings"] == []
    assert any("no numbers" in step for step in told["next_steps"])


def test_a_model_of_sdxl_that_no_detector_can_be_asked_about_is_undecided_for_that_reason(
    bench: Run, tmp_path: Path
) -> None:
    checkpoint.save(tiny_sdxl(tmp_path / "tokens"), tmp_path / "m")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    found = bench("scan", tmp_path / "m", "--prompts", tmp_path / "prompts.txt", "--json")
    told = json.loads(found.out)
    assert found.code == 6 and told["because"] == "No detector could be asked." and told["findings"] == []
    assert any("vocabulary-scan was not asked: it needs data" in line for line in told["limits"])
    assert not any("no numbers" in step for step in told["next_steps"])
