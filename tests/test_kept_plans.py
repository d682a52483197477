"""A plan that an earlier process has kept: it is the plan that would be made, it needs no plugin, and it is gone as
soon as anything that it follows from changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import registry
from harness.cli import call, run
from harness.runs import kept_plans, planning, suite
from harness.runs.jsonable import to_jsonable
from harness.runs.suite import Draft

HEAVY = {
    "torch", "numpy", "scipy", "sklearn", "pandas", "diffusers", "transformers", "open_clip", "timm", "torchvision",
    "torchmetrics", "plugins",
}  # fmt: skip
PLAN = "import sys; from harness.cli import call; code = call(sys.argv[1:])"
WATCHED = f"{PLAN}; print(sorted({{m.partition('.')[0] for m in sys.modules}}), file=sys.stderr); sys.exit(code)"
SUITE = """
[[grid]]
model = ["digits-ddpm"]
attack = ["none", "baddiffusion(steps=2)"]
trigger = ["box"]
target = ["hat", "prompt"]
defense = ["none", "elijah(steps=1)"]
sampler = ["ddim(steps=2)"]
controls = ["decoy"]
n = 4
"""


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite file, beside the empty cache directory and the empty store of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BENCH_STORE", str(tmp_path / "store"))
    file = tmp_path / "mine.toml"
    file.write_text(SUITE)
    return file


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, plugins: registry.Registry) -> list[str]:
    """One entry for each time that a command asks for the plugins."""
    asked: list[str] = []

    def loaded(files: Any = (), strict: bool = False) -> registry.Registry:
        asked.append("load")
        return registry.load(files, strict) if files else plugins

    monkeypatch.setattr(run, "loaded", loaded)
    return asked


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert call(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def kept_files(place: Path) -> list[Path]:
    return sorted(place.parent.rglob("plan-*.json"))


def test_the_next_process_plans_the_same_without_a_plugin_or_a_numeric_library(
    place: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = plan(capsys, place)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "plan", str(place), "--json"], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert json.loads(done.stdout) == first and len(first["jobs"]) > 10 and first["dropped"]
    imported = set(eval(done.stderr.strip().splitlines()[-1]))
    assert not imported & HEAVY and "harness" in imported
    assert loads == ["load"]


@pytest.mark.parametrize("named", ["quick", "few-steps", "detection"])
def test_a_kept_plan_is_the_plan(named: str, plugins: registry.Registry, place: Path) -> None:
    draft = suite.read(suite.find_suite(named))
    expanded = suite.expand(draft, plugins)
    made = planning.plan(expanded, plugins)
    kept_plans.keep(draft, "0" * 64, expanded, made, plugins)
    found = kept_plans.find(draft, "0" * 64)
    assert found is not None and found.suite == expanded and list(found.jobs) == list(made.jobs)
    for key, job in made.jobs.items():
        assert to_jsonable(found.jobs[key]) == to_jsonable(job)
        assert found.jobs[key].needs == job.needs


def test_text_and_reasons_of_a_kept_plan_are_those_of_the_plan(
    place: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for _ in range(2):
        assert call(["plan", str(place)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "n/a, " in texts[0] and len(loads) == 1


def test_what_a_plan_is_asked_for_is_in_its_name(place: Path) -> None:
    draft = suite.read(place)
    names = {kept_plans.name_of(draft, only, threads) for only in ((), ("seed=0",)) for threads in (1, 2)}
    place.write_text(SUITE.replace("n = 4", "n = 5"))
    names |= {kept_plans.name_of(each, (), 1) for each in (suite.read(place), suite.read(place, ["grid.0.seed=3"]))}
    assert len(names) == 6 and None not in names


@pytest.mark.parametrize(
    "changed", ["harness/cli/run.py", "plugins/models/weights/a/model.safetensors", "presets/a.toml", "plugins/new.py"]
)
def test_every_file_of_the_package_is_in_the_name_of_a_plan_by_its_content(
    changed: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = suite.read(place)
    for name in ("harness/cli/run.py", "plugins/models/weights/a/model.safetensors", "presets/a.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(kept_plans, "HARNESS", tmp_path / "harness")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(kept_plans.importlib.util, "find_spec", lambda name: spec)
    before, file = kept_plans.name_of(draft, (), 1), tmp_path / changed
    assert kept_plans.name_of(draft, (), 1) == before
    (tmp_path / "harness" / "__pycache__").mkdir()
    (tmp_path / "harness" / "__pycache__" / "run.pyc").write_text("x")
    assert kept_plans.name_of(draft, (), 1) == before
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns) if file.exists() else (1, 1)
    file.write_text("two")
    os.utime(file, ns=times)
    assert kept_plans.name_of(draft, (), 1) != before, "of the same size and time, but of another content"


def test_an_installed_distribution_and_python_are_in_the_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = suite.read(place)
    names = [kept_plans.name_of(draft, (), 1)]
    monkeypatch.setattr(kept_plans, "distributions", lambda: {"diffusers-99.dist-info"})
    names.append(kept_plans.name_of(draft, (), 1))
    monkeypatch.setattr(kept_plans.sys, "version", "3.99")
    names.append(kept_plans.name_of(draft, (), 1))
    monkeypatch.setattr(kept_plans, "installed", list)
    names.append(kept_plans.name_of(draft, (), 1))
    assert len(set(names)) == 4


def test_with_plugins_of_others_no_plan_has_a_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, other = suite.read(place), SimpleNamespace(dist=SimpleNamespace(name="bench-hush"))
    monkeypatch.setattr(kept_plans, "installed", lambda: [other])
    assert kept_plans.name_of(draft, (), 1) is None
    monkeypatch.setattr(kept_plans, "installed", list)
    assert kept_plans.name_of(draft, (), 1) is not None
    monkeypatch.setattr(kept_plans, "fatal", lambda: {"plugins.attacks.ends": "importing it ends Python"})
    assert kept_plans.name_of(draft, (), 1) is None


@pytest.mark.parametrize("model", ["mnist-ddpm(data_path='DIR')", "ddpm-cifar10(path='DIR', data_path='DIR')"])
def test_a_plan_whose_weights_or_data_lie_elsewhere_is_not_kept(
    model: str, place: Path, tmp_path: Path, plugins: registry.Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = model.replace("DIR", str(tmp_path / "elsewhere"))
    place.write_text(SUITE.replace("digits-ddpm", spec))
    assert plan(capsys, place)["absent"] and not kept_files(place)
    assert not kept_plans._is_packaged(plugins.build("models", spec)), "also where they are there"


def test_models_whose_weights_are_in_the_package_have_plans_that_are_kept(plugins: registry.Registry) -> None:
    packaged = {name for name in plugins.classes("models") if kept_plans._is_packaged(plugins.build("models", name))}
    assert packaged == {
        "digits-ddpm", "digits-ncsn", "shapes-ldm", "shapes-sd", "shapes-mmdit", "shapes-mmdit-4", "mnist-ddpm",
        "cifar10-ddpm",
    }  # fmt: skip


def test_files_and_figures_of_a_rehearsal_ask_for_the_plugins(
    place: Path, tmp_path: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan(capsys, place)
    assert plan(capsys, place) and loads == ["load"]
    (tmp_path / "store" / "rehearsals").mkdir(parents=True)
    (tmp_path / "store" / "rehearsals" / "a-machine.json").write_text("{}")
    plan(capsys, place)
    assert len(loads) == 2
    (tmp_path / "store" / "rehearsals" / "a-machine.json").unlink()
    hush = tmp_path / "hush.py"
    hush.write_text("from harness import hookimpl\n\n\n@hookimpl\ndef defenses():\n    return []\n")
    kept = kept_files(place)[0].read_bytes()
    plan(capsys, place, "--plugin-file", hush)
    assert len(loads) == 3 and kept_files(place)[0].read_bytes() == kept


@pytest.mark.parametrize("damage", [b"", b"x", b"{}\n{}"])
def test_a_damaged_file_only_costs_time(
    damage: bytes, place: Path, loads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = plan(capsys, place)
    (file,) = kept_files(place)
    whole = file.read_bytes()
    for bad in (damage, whole[:-10], whole.replace(b"box", b"bux")):
        file.write_bytes(bad)
        assert plan(capsys, place) == first
        assert file.read_bytes() == whole
    assert len(loads) == 4


def test_a_plan_made_while_a_file_changed_is_not_kept(
    place: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = iter("abcc")
    monkeypatch.setattr(kept_plans, "_files_digest", lambda: next(digests))
    plan(capsys, place)
    assert not kept_files(place)
    plan(capsys, place)
    assert len(kept_files(place)) == 1


def test_a_plan_of_plugins_with_warnings_is_not_kept(place: Path, plugins: registry.Registry) -> None:
    draft: Draft = suite.read(place)
    expanded = suite.expand(draft, plugins)
    said: Mapping[str, Any] = {"files": [], "warnings": ["a plugin could not be loaded"], "build": plugins.build}
    kept_plans.keep(draft, "0" * 64, expanded, planning.plan(expanded, plugins), SimpleNamespace(**said))  # type: ignore[arg-type]
    assert not kept_files(place)
