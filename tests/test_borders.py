"""What a plugin does wrong stays the plugin's: modules that end Python, samplers, metrics, triggers and targets that
return something else than they should."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from harness.judges.evidence import Evidence
from harness.runs.printable import one_line, printable, printable_json
from harness.runs.suite import impossible
from harness.stages import measure, sample
from harness.testing import tiny
from harness.types import Backdoor, Inputs, Score

HOSTILE = {
    "leaves": "import os\nos._exit(0)\n",
    "stops": "raise KeyboardInterrupt\n",
    "odd": "class Odd(BaseException): pass\nraise Odd('no')\n",
    "crashes": "import ctypes\nctypes.string_at(0)\n",
    "says": "raise ValueError('\\x1b[2J\\u202eall well\\x9b1m')\n",
    "stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()\n",
}


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """An environment in which a distribution of hostile plugin modules is installed."""
    site = tmp_path / "site"
    package, facts = site / "hostile_plugins", site / "hostile_plugins-1.0.dist-info"
    for folder in (package, facts):
        folder.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile-plugins\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[bench.plugins]\nall = hostile_plugins\n")
    (package / "__init__.py").touch()
    for name, text in HOSTILE.items():
        (package / f"{name}.py").write_text(text)
    root = str(Path(__file__).parents[1])
    kept = {name: value for name, value in os.environ.items() if name != "BENCH_FATAL_PLUGINS"}
    return kept | {"PYTHONPATH": os.pathsep.join([root, str(site)]), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def bench(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", "import harness.cli; harness.cli.main()", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)


@pytest.mark.slow
def test_modules_that_end_python_are_left_out_and_named(hostile: dict[str, str], tmp_path: Path) -> None:
    listed = bench(hostile, "list", "defenses")
    planned = bench(hostile, "plan", "smoke", "--store", str(tmp_path / "store"))
    for done in (listed, planned):
        assert done.returncode == 0, done.stderr
        for name in ("leaves", "stops", "odd", "crashes", "says"):
            assert f"plugin hostile_plugins.{name} of hostile-plugins left out" in done.stderr, name
        assert not set("\x1b\x9b\u202e") & set(done.stderr) and "\\u202e" in done.stderr
    assert "ends Python with status 0" in planned.stderr and "ends Python by signal 11" in planned.stderr
    assert "elijah" in listed.stdout and "17 jobs" in planned.stdout


def test_a_plugin_file_that_ends_python_is_an_error(tmp_path: Path) -> None:
    from harness import registry

    path = tmp_path / "leaves.py"
    path.write_text(HOSTILE["leaves"])
    with pytest.raises(registry.PluginError, match=r"os._exit\(0\)"):
        registry.Registry().load_file(path)
    assert os._exit.__module__ != "harness.registry.loading"


# ---- what they return -----------------------------------------------------------------------------------------------


def test_a_sampler_that_returns_one_image_for_four_is_refused() -> None:
    model = tiny.model("noise")
    one = SimpleNamespace(name="one", run=lambda model, inputs: inputs.noise[:1])
    with pytest.raises(ValueError, match=r"sampler 'one' returned \(1, 1, 16, 16\) for noise \(4, 1, 16, 16\)"):
        model.sample(tiny.inputs(model, 4), one)  # type: ignore[arg-type]


@pytest.mark.parametrize("nfe", ["ten", 0, None, 2.5])
def test_a_sampler_without_a_number_of_evaluations_makes_no_cell(nfe: Any) -> None:
    sampler = SimpleNamespace(name="odd", nfe=nfe, family="vp")
    everything = SimpleNamespace(
        name="x", modality="noise", kind="image", accepts_triggers=("noise",), accepts_targets=("any",), nfe=1
    )
    parts = dict.fromkeys(("model", "attack", "trigger", "target", "defense"), everything) | {"sampler": sampler}
    assert f"odd takes nfe = {nfe!r}" in str(impossible(parts))
    assert impossible(parts | {"sampler": SimpleNamespace(name="fine", nfe=3, family="vp")}) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda inputs: inputs[:2], "returned others"),
        (lambda inputs: inputs.with_noise(inputs.noise[:, :, :8]), "returned others"),
        (lambda inputs: inputs.noise, "returned others"),
        (lambda inputs: replace(inputs, prompts=("a",) * len(inputs)), "prompts for 3 inputs"),
        (lambda inputs: inputs.with_noise(inputs.noise * math.nan), "NaN or infinity"),
    ],
)
def test_a_trigger_returns_as_many_inputs_of_the_same_shape(change: Any, says: str) -> None:
    inputs = Inputs(torch.zeros(3, 1, 16, 16), None, (0, 1, 2))
    with pytest.raises((ValueError, ArithmeticError), match=says):
        sample.stamped(SimpleNamespace(name="odd", stamp=change), inputs)  # type: ignore[arg-type]


def test_a_target_gives_one_distance_for_each_image() -> None:
    target = SimpleNamespace(name="odd", distances=lambda images, context: images.flatten(1).mean(1)[:1])
    images = torch.zeros(4, 1, 16, 16)
    seen = Evidence(
        {("clean", "clean"): lambda: images, ("backdoored", "clean"): lambda: images},
        reference=images,
        model=tiny.Model("noise"),  # type: ignore[arg-type]
        backdoor=Backdoor(tiny.trigger("noise"), target),  # type: ignore[arg-type]
        attacked=True,
    )
    with pytest.raises(ValueError, match=r"target 'odd' gave distances \(1,\) for 4 images"):
        seen.distances("backdoored", "clean")


@dataclass(frozen=True)
class Says:
    """A metric that returns what it was told to."""

    scores: Any
    name: ClassVar[str] = "says"
    version: ClassVar[int] = 1

    def measure(self, evidence: Any) -> Any:
        return self.scores


def measured(**scores: Score) -> dict[str, Score]:
    return measure.measure({"says": Says(scores)}, SimpleNamespace())  # type: ignore[arg-type]


def test_a_score_that_another_metric_has_is_not_overwritten() -> None:
    score = Score(0.5, 4, True)
    with pytest.raises(ValueError, match="the metrics 'one' and 'two' both return a score 'asr'"):
        measure.measure({"one": Says({"asr": score}), "two": Says({"asr": score})}, SimpleNamespace())  # type: ignore[arg-type]


def test_an_infinite_score_is_unmeasured_with_the_reason() -> None:
    found = measured(x=Score(float("1e400"), 4, True))["x"]
    assert math.isnan(found.value) and found.warning == "metric 'says' returned infinity"


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (Score(0.5, -1, True), "says n = -1"),
        (Score(0.5, 4, True, (0.6, 0.4)), "the interval"),
        (Score(0.5, 4, True, (0.1, math.inf)), "the interval"),
    ],
)
def test_a_score_that_no_record_can_hold_is_refused(score: Score, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measured(x=score)


HIDDEN = ["\x1b[2J", "\x07", "\x9b1m", "\u202e", "\u200b", "\u2028", "\x7f", "\ue000", "\U000e0041"]

# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_a_terminal_obeys_or_hides_is_shown_by_its_number(hidden: str) -> None:
    shown = printable(f"a{hidden}b ä 漢 😀")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b ä 漢 😀")
    assert f"{ord(hidden[0]):04x}" in shown


def test_line_breaks_stay_only_where_they_are_asked_for() -> None:
    assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc" and printable("a\nb") == "a\\u000ab"
    assert one_line("a\nb\tc\rd") == "a b c d"


@pytest.mark.parametrize("hidden", HIDDEN)
def test_json_with_hidden_characters_stays_json(hidden: str) -> None:
    text = printable_json(json.dumps({f"a{hidden}": [f"{hidden}b", 1]}, indent=1, ensure_ascii=False))
    assert json.loads(text) == {f"a{hidden}": [f"{hidden}b", 1]}
    assert all(line.isprintable() for line in text.split("\n"))
