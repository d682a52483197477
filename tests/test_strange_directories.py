"""bench scan, purify and calibrate on directories of strangers: the exit code, one line, and nothing else happens."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.cli import call
from harness.diffusion import events
from harness.diffusion.samplers import usual
from harness.registry import Registry, load
from harness.scan import verdict
from tests import strange_directories as strange
from tests.strange_directories import CASES, JUDGED, REFUSED, UNDECIDED, USAGE, Case

SECONDS, MEGABYTES = 10.0, 300  # of a processor, of which it takes less than one, and of memory, to refuse a model

PLUGINS = '''
"""A detector, a defense and models that take no time."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from harness import Defended, hookimpl
from harness.testing import tiny
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.models.shapes_sd import ShapesSD

model = cache(tiny.model)


@dataclass(frozen=True)
class Quick:
    """Suspicious of a large output bias."""

    name: ClassVar[str] = "quick"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)

    def defend(self, model, knowledge, rng):
        trigger = None if model.conditional else torch.full(model.shape, 0.5)
        return Defended(suspicion=model.denoiser.conv_out.bias.mean().item(), flag_above=10.0, trigger=trigger)


@dataclass(frozen=True)
class Mover(Quick):
    """Moves the output bias."""

    name: ClassVar[str] = "mover"
    delivers: ClassVar[tuple[str, ...]] = ("model",)

    def defend(self, model, knowledge, rng):
        model = model.clone()
        model.denoiser.conv_out.bias.data += 0.01
        return Defended(model=model)


@dataclass(frozen=True)
class TinyNoise(DigitsDDPM):
    """The unconditional base of the cases."""

    name: ClassVar[str] = "tiny-noise"

    def load(self):
        return model("noise")


@dataclass(frozen=True)
class TinyText(ShapesSD):
    """The text-to-image base of the cases."""

    name: ClassVar[str] = "tiny-text"

    def load(self):
        return model("text")


@hookimpl
def defenses():
    return [Quick, Mover]


@hookimpl
def models():
    return [TinyNoise, TinyText]
'''


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return strange.bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plugins") / "quick.py"
    file.write_text(PLUGINS)
    return file


@pytest.fixture(scope="module", autouse=True)
def imported(saved: dict[str, Path], plugins: Path) -> None:
    """What the libraries import counts for no case."""
    for kind in ("noise", "text"):
        call(["scan", str(saved[kind]), "--detector", "quick", "--plugin-file", str(plugins), "-q"])


@pytest.fixture(scope="module")
def registry(plugins: Path) -> Registry:
    return load([plugins])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    """Two pictures in two steps, one model for a population, plugins that are loaded once, and no second reader of what
    purify wrote."""
    monkeypatch.setattr("harness.cli.purify._stock_loads", lambda folder: True)
    events.listen(None)
    monkeypatch.setattr(verdict, "sampler_of", lambda model: usual(model, 2))
    for command in ("scan", "purify", "calibrate"):
        monkeypatch.setattr(f"harness.cli.{command}.loaded", lambda files, strict: registry)
    for command in ("scan", "purify"):
        monkeypatch.setattr(f"harness.cli.{command}.SHOWN", 1)
    monkeypatch.setattr(verdict, "LEAST", 1)


def state(root: Path) -> list[tuple[str, int, int, int]]:
    """Name, size, time and mode of all that is below `root`."""
    return sorted((str(p), s.st_size, s.st_mtime_ns, s.st_mode) for p in root.rglob("*") for s in [p.lstat()])


def words(command: str, case: Case, where: Path, base: Path, out: Path, plugins: Path) -> list[str]:
    """The command line for a case. A name that begins with a dash is given as users give it."""
    named = ["--", case.where] if case.where.startswith("-") else [str(where)]
    based = ["--base", str(base)] if case.based else []
    if command == "scan":
        given = [
            "--detector",
            "quick",
            *based,
            *(word for kind in ("html", "sarif") for word in ("-o", f"{out}.{kind}")),
        ]
    elif command == "purify":
        given = ["--defense", "mover", *based, "-o", str(out)]
    else:
        given, named = ["--detector", "quick", "--of", str(where), "-o", f"{out}.json"], [f"tiny-{case.base}"]
    return [command, *given, "--plugin-file", str(plugins), *named]


@pytest.mark.parametrize("name", CASES)
def test_a_directory_of_a_stranger(
    name: str, saved: dict[str, Path], plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    case, root, outputs = CASES[name], tmp_path / "theirs", tmp_path / "ours"
    root.mkdir()
    outputs.mkdir()
    where = strange.made(case, saved, root)
    monkeypatch.chdir(root)
    before = state(root)
    for command in ("scan", "purify", "calibrate"):
        out = outputs / command
        capfd.readouterr()
        started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = call(words(command, case, where, saved[case.base], out, plugins))
        took = time.process_time() - started
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        said, told = capfd.readouterr()
        assert state(root) == before, "nothing outside the output was written, and no code of the model ran"
        assert "Traceback" not in told and "\x1b" not in said + told
        assert took < SECONDS * (1 if case.code == REFUSED else 2) and more < MEGABYTES, (took, more)
        if command == "scan":
            assert code == case.code, told
            assert re.search(case.says, told if code == REFUSED else said), (case.says, said, told)
        elif case.code == REFUSED:
            assert code == REFUSED, told
        elif command == "purify":
            assert code == (REFUSED if case.code == UNDECIDED else 0), told
        else:
            assert code in (0, USAGE), told
        if code == REFUSED:
            lines = told.splitlines()
            assert lines[-1].startswith("bench: ") and (len(lines) == 1 or case.code == UNDECIDED), told
            assert not out.exists(), "nothing is left of what could not be done"
        shutil.rmtree(out, ignore_errors=True)


# ---- outputs, and places that cannot be read ------------------------------------------------------------------------


@pytest.fixture
def bench(plugins: Path, capfd: Any) -> Any:
    """bench(*words) → code, stdout, stderr."""

    def run(*words: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = call([*map(str, words), "--plugin-file", str(plugins)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["noise"], tmp_path / "theirs" / "model"))


def test_no_output_is_written_into_a_model(bench: Any, model: Path, tmp_path: Path) -> None:
    before = state(model)
    (tmp_path / "alias").symlink_to(model)
    for out in (model / "out", model / "unet", tmp_path / "alias" / "out"):
        code, _, told = bench("purify", model, "--defense", "mover", "-o", out)
        assert code == USAGE and ("is in the model" in told or "is not empty" in told), told
    for out in (
        model / "model_index.json",
        model / f"unet/{strange.STEM}.safetensors",
        tmp_path / "alias" / strange.UNET,
    ):
        for words in (["scan", model], ["calibrate", "tiny-noise", "--of", model]):
            code, _, told = bench(*words, "--detector", "quick", "-o", out)
            assert code == USAGE and "is in the model" in told and "name another with -o" in told
    assert state(model) == before
    for name in ("scan.html", "scan.json", "scan.html", "scan.json"):
        assert bench("scan", model, "--detector", "quick", "-o", model / name)[0] == JUDGED


def test_a_full_disk_leaves_nothing_and_is_named(bench: Any, model: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, usual[1]))
    try:
        found = [bench("purify", model, "--defense", "mover", "-o", folder) for folder in (out, empty)]
        page = bench("scan", model, "--detector", "quick", "-o", tmp_path / "scan.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    for folder, (code, _, told) in zip((out, empty), found, strict=True):
        assert code == REFUSED and f"{folder}: cannot be written (" in told.splitlines()[-1]
        assert "nothing was written" in told
    assert not out.exists() and list(empty.iterdir()) == []
    assert page[0] == REFUSED and f"{tmp_path / 'scan.html'}: cannot be written (File too large)" in page[2]


def test_calibrate_makes_the_folder_of_its_file(bench: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "population.json"
    assert bench("calibrate", "tiny-noise", "--of", model, "--detector", "quick", "-o", file)[0] == 0
    assert verdict.read_population(file).model == "tiny-noise"


def test_calibrate_of_a_directory_says_how_clean_models_are_given(bench: Any, model: Path) -> None:
    code, _, told = bench("calibrate", model)
    assert code == USAGE and f"{model}: MODEL is a model plugin" in told and "--of" in told


def test_what_may_not_be_read_is_named(bench: Any, model: Path, plugins: Path, tmp_path: Path) -> None:
    """As another user where the tests run as root, whom nothing is forbidden."""
    files = (strange.UNET, f"unet/{strange.STEM}.safetensors", "unet")
    for folder in (plugins.parent, tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o755)
    for name in files:
        path = model / name
        mode = path.stat().st_mode
        path.chmod(0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            code, _, told = bench("scan", model, "--detector", "quick")
        finally:
            if root:
                os.seteuid(0)
            path.chmod(mode)
        assert code == REFUSED and f"{path}: cannot be " in told and "Permission denied" in told, told
        assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["nothing", "~nobody-of-this-name", "a/b/c", "-x"])
def test_a_model_that_is_not_there_is_one_line_in_every_format(
    name: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for form in ("text", "json", "sarif", "html"):
        code, _, told = bench("scan", "--format", form, "--detector", "quick", "./-x" if name == "-x" else name)
        assert code == REFUSED and told.startswith("bench: ") and told.count("\n") == 1, (form, told)


def test_the_next_command_names_a_directory_that_looks_like_an_option() -> None:
    from harness.scan.next_steps import next_steps

    (step,) = [each for each in next_steps("-o", "suspicious", [], [], 0) if each.startswith("Ask again")]
    assert "bench scan ./-o --seed 1" in step


def test_weights_that_the_memory_does_not_hold_are_refused_before_they_are_read(
    bench: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**4))
    monkeypatch.setattr("harness.diffusion.model_files.ModelFiles.tensors", lambda *_: pytest.fail("weights were read"))
    code, _, told = bench("scan", model, "--detector", "quick")
    assert code == REFUSED and f"{model / 'unet'}: its weights take 0.0 GB in fp32" in told and "memory" in told
