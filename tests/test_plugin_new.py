"""`bench plugin new` and `bench plugin check`; packages called `plugins`, and folders that would hide ours."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import registry
from harness.cli import call
from harness.registry import Registry, code_digest, entry_points
from harness.registry.hookspecs import API_VERSION
from harness.runs.suite import load_suite
from harness.testing import checks, kind_by_methods
from harness.types import KNOWLEDGE

KINDS = ("defense", "attack", "metric", "trigger", "target", "sampler", "model")
SHAPES = {"detector": "defense", "screen": "defense", "prompt-filter": "defense", "text-attack": "attack"}
Result = SimpleNamespace
OURS = str(Path(registry.__file__).resolve().parent.parent.parent)


@pytest.fixture(scope="module")
def plugins() -> Registry:
    return registry.load()


@pytest.fixture
def bench(
    plugins: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """bench(*words) → code, out, err, in a folder of its own and without reading the plugins again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "index", lambda **_: plugins.index())

    def run(*words: str) -> Result:
        code = call(words)
        printed = capsys.readouterr()
        return Result(code=code, out=printed.out, err=printed.err)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *SHAPES])
def test_a_new_plugin_keeps_the_contract_and_runs_in_its_suite(kind: str, bench, plugins: Registry) -> None:
    found = bench("plugin", "new", "my-thing", "--kind", kind)
    assert found.code == 0, found.err
    folder = Path("bench-my-thing")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "pyproject.toml", "README.md", "bench_my_thing.py", "tests/test_contract.py", "try.toml",
    }  # fmt: skip
    assert len(Path(folder, "tests/test_contract.py").read_text().strip().replace("\n\n", "\n").splitlines()) == 3
    code, suite = (Path(folder, name).read_text() for name in ("bench_my_thing.py", "try.toml"))
    assert ("    needs: " in code) == (f"    # out of: {', '.join(KNOWLEDGE)}\n" in code)
    assert 'defense = ["none", "finetune(' in suite, "the controls that bench leaderboard check requires"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["bench.plugins"] == {"bench_my_thing": "bench_my_thing"}
    both = Registry()
    both._classes = {each: dict(classes) for each, classes in plugins._classes.items()}
    both.load_file(folder / "bench_my_thing.py")
    kinds = registry.kind_of(SHAPES.get(kind, kind))
    cls = both.find(kinds, "my-thing")
    assert cls.__name__ == "MyThing" and kind_by_methods(cls) == kinds
    assert registry.describe(kinds, cls, "mine", alone=True).facts["api"] == API_VERSION
    planned = load_suite(folder / "try.toml", both)
    assert len(planned.cells) >= 2 and not planned.dropped
    broken = [
        law for law in checks.examine_all(checks.case_of(kinds, cls, {}, both)) if law.state in ("broken", "open")
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["9lives", "--kind", "defense"], "'9lives' cannot be a plugin's name"),
        (["a b", "--kind", "defense"], "cannot be a plugin's name; use letters"),
        (["elijah", "--kind", "defense"], "has a defense 'elijah' already"),
        (["fresh", "--kind", "defence"], "no kind 'defence'; did you mean 'defense'"),
        (["fresh"], "--kind"),
        (["fresh", "--kind", "metric", "-o", "full"], "full exists and is not empty; name another directory with -o"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_writes_nothing(bench, words: list[str], says: str) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    found = bench("plugin", "new", *words)
    assert found.code == 2 and says in found.err and len(found.err.strip().splitlines()) == 1
    assert sorted(path.name for path in Path().rglob("*")) == ["full", "letter.txt"]


BRIEF = """
from dataclasses import dataclass
from typing import ClassVar
from harness import Inputs, hookimpl

@dataclass(frozen=True)
class Shift:
    name: ClassVar[str] = "shift"
    version: ClassVar[int] = 3
    modality: ClassVar[str] = "noise"
    by: float = 1.0  # added to every pixel

    def delta(self, shape):
        raise NotImplementedError

    def stamp(self, inputs: Inputs) -> Inputs:
        EXTRA
        return inputs.with_noise(inputs.noise + self.by)

    def wrong(self, k: int):
        return Shift(self.by + 1 + k)

@hookimpl
def triggers():
    return [Shift]
"""


@pytest.fixture
def quick_load(monkeypatch: pytest.MonkeyPatch, plugins: Registry) -> None:
    """Load plugin files beside plugins that are loaded already."""

    def load(files: Any, strict: bool = False) -> Registry:
        both = Registry(strict)
        both._classes = {kind: dict(classes) for kind, classes in plugins._classes.items()}
        for file in files:
            both.load_file(Path(file))
        return both

    monkeypatch.setattr(registry, "load", load)


def test_check_tells_law_by_law_and_writes_a_report(bench, quick_load: None) -> None:
    Path("shift.py").write_text(BRIEF.replace("EXTRA", "pass"))
    found = bench("plugin", "check", "shift.py", "-o", "report.md")
    assert found.code == 0, found.out
    first, *laws = found.out.strip().splitlines()
    assert first.startswith("trigger 'shift' (") and "broken" not in first
    known = list(checks.LAWS["triggers"])
    assert [line.split("  ")[1] for line in laws] == ["kept"] * len(known)
    told = [f"checking trigger shift, law {i} of {len(known)}: {law} ..." for i, law in enumerate(known, 1)]
    assert found.err.splitlines()[-len(known) :] == told
    report = Path("report.md").read_text()
    assert "## trigger shift, version 3" in report and "`shift(by=1.0)`" in report
    assert "| batch invariance" in report and "written for plugin API 1" in report


def test_check_fails_with_exit_code_3_where_a_law_is_broken(bench, quick_load: None) -> None:
    Path("shift.py").write_text(BRIEF.replace("EXTRA", "inputs.noise.add_(1)"))
    found = bench("plugin", "check", "shift(by=2.0)", "--plugin-file", "shift.py", "--json", "-o", "report.json")
    assert found.code == 3
    (report,) = json.loads(found.out)
    assert (report["kind"], report["name"], report["spec"]) == ("trigger", "shift", "shift(by=2.0)")
    laws = {law["law"]: law for law in report["laws"]}
    assert laws["inputs untouched"]["state"] == "broken"
    assert "changes the noise; work on a copy" in laws["inputs untouched"]["says"]
    assert json.loads(Path("report.json").read_text()) == [report]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["elijha"], "no plugin named 'elijha'; did you mean 'elijah'"),
        (["elijah", "--kind", "attack"], "no attack named 'elijah'"),
        (["elijah(stepz=3)"], "no parameter 'stepz'; did you mean 'steps'"),
        ([], "no plugin to check: name one, or give a plugin file"),
        (["elijah", "-o", "report.pdf"], "a report is .md or .json"),
    ],
)
def test_what_cannot_be_checked_is_one_line(bench, quick_load: None, words: list[str], says: str) -> None:
    found = bench("plugin", "check", *words)
    assert found.code in (2, 4) and found.out == ""
    assert says in found.err and len(found.err.strip().splitlines()) == 1


# ---- packages of one name -------------------------------------------------------------------------------------------


def distribution(root: Path, name: str, entry: str, files: dict[str, str]) -> Path:
    """A distribution as `pip install --target` leaves it."""
    for file, source in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(source)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bench.plugins]\nmain = {entry}\n")
    return root


TWIN = BRIEF.replace("EXTRA", "assert RIGHT").replace("from dataclasses", "from .helper import RIGHT\nfrom dataclasses")
STRANGER = {"plugins/__init__.py": "", "plugins/helper.py": "RIGHT = True\n", "plugins/twin.py": TWIN}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No module called `plugins` is imported while this lasts; those that were are put back."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "plugins"}
    for name in kept:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if "plugins" in name.partition(".")[0]]:
        del sys.modules[name]
    sys.modules.update(kept)


def twin_code(found: Registry) -> dict[str, str]:
    code_digest._closure.cache_clear()
    return code_digest.closure([found.find("triggers", "shift")])


@pytest.mark.parametrize("first", [True, False], ids=["before ours on the path", "behind ours"])
def test_a_package_called_plugins_and_ours_are_both_found(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    root = distribution(tmp_path / "site", "stranger", "plugins.twin", STRANGER)
    monkeypatch.setattr(sys, "path", [str(root), *sys.path] if first else [OURS, *sys.path, str(root)])
    found = registry.load()
    assert found.distribution_of("triggers", "shift") == "stranger"
    assert Path(str(sys.modules[found.find("triggers", "shift").__module__].__file__)) == root / "plugins/twin.py"
    assert "elijah" in found.classes("defenses") and not found.warnings
    before = twin_code(found)
    assert {".twin", ".helper"} <= set(before)
    (root / "plugins/helper.py").write_text("RIGHT = 1\n")
    assert {name for name, digest in twin_code(found).items() if digest != before[name]} == {".helper"}
    assert "plugins.defenses.elijah" in code_digest.closure([found.find("defenses", "elijah")])
    files = {file for point in registry.installed() for file in entry_points.files(point)}
    assert {root / "plugins/twin.py", Path(OURS, "plugins/defenses/elijah.py")} <= files


def test_a_folder_called_plugins_where_one_works_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    (tmp_path / "plugins").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    found = registry.load()
    assert "elijah" in found.classes("defenses") and not found.warnings
