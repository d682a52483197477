"""What a stranger meets at the door: the module, the platform, completion, and the files of the repository's host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import harness
from harness.cli import bench, call, main, pages
from harness.cli.common import columns
from harness.cli.completion import Named, Spec
from harness.cli.run import FRONT, LABEL, REASON, _widths
from harness.registry import KINDS
from harness.runs.suite import suites

ROOT = Path(__file__).parents[1]


def completed(line: str) -> list[str]:
    """What bash is told for a command line whose last word is incomplete."""
    words = line.split(" ")
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_BENCH_COMPLETE": "bash_complete"}
    told = CliRunner().invoke(bench, [], prog_name="bench", env=env)
    return [word.partition(",")[2] for word in told.output.split()]


def test_the_module_is_the_command() -> None:
    told = subprocess.run([sys.executable, "-m", "harness", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0 and told.stdout.startswith("bench, version ")


def test_a_platform_that_cannot_work_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value) == "bench: Windows is not supported; use Linux, or the Windows Subsystem for Linux"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("bench run qui", ["quick"]),
        ("bench plan smo", ["smoke"]),
        ("bench report quic", ["quick"]),
        ("bench show skd-", ["skd-cag", "skd-text", "skd-cag-text"]),
        ("bench list att", ["attacks"]),
        ("bench list sui", ["suites"]),
        ("bench build digits-d", ["digits-ddpm"]),
        ("bench scan somewhere --like digits-n", ["digits-ncsn"]),
        ("bench plugin check ter", ["terd"]),
        ("bench run quick --only defen", ["defense="]),
        ("bench run quick --only defense=eli", ["defense=elijah", "defense=elijah-noise"]),
        ("bench run quick --only seed=1", []),
    ],
)
def test_a_shell_completes_the_names_of_suites_and_plugins(line: str, wanted: list[str]) -> None:
    assert completed(line) == wanted


def test_a_completion_that_fails_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise OSError("no cache")

    monkeypatch.setattr("harness.registry.index", broken)
    assert completed("bench show eli") == []


def test_what_is_completed_is_not_checked() -> None:
    """A name that nobody knows reaches the command, which says what is wrong with it."""
    for kind in (Named("models"), Named(suites=True), Spec()):
        assert kind.convert("nothing", None, None) == "nothing"


def test_completion_knows_every_suite_and_every_kind() -> None:
    assert set(completed("bench run ")) == set(suites())
    assert set(completed("bench list ")) == {*KINDS, "presets", "suites", "adaptive"}


def schema(name: str, *files: Path) -> None:
    """Raises AssertionError with what check-jsonschema says of the files."""
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", *map(str, files)]
    told = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert told.returncode == 0, told.stdout + told.stderr


def test_workflows_and_forms_have_the_hosts_schemas() -> None:
    host = ROOT / ".github"
    schema("github-workflows", *sorted((host / "workflows").glob("*.yml")))
    forms = sorted((host / "ISSUE_TEMPLATE").glob("*.yml"))
    schema("github-issue-config", *[form for form in forms if form.stem == "config"])
    schema("github-issue-forms", *[form for form in forms if form.stem != "config"])


def test_a_wrong_workflow_does_not_pass(tmp_path: Path) -> None:
    wrong = tmp_path / "ci.yml"
    wrong.write_text("name: ci\non: [push]\njobs:\n  check:\n    runs-on: ubuntu-latest\n    step: []\n")
    with pytest.raises(AssertionError, match="step"):
        schema("github-workflows", wrong)


def test_versions_are_the_same_wherever_they_stand() -> None:
    """The pre-commit hooks have the versions of constraints.txt, and workflows the Pythons of the classifiers."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{pinned['ruff']}\n" in hooks and f"rev: {pinned['check-jsonschema']}\n" in hooks
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" ")[2] for c in about["classifiers"] if c.startswith("Programming Language :: Python :: 3.")]
    assert f"python: {named}".replace("'", '"') in (ROOT / ".github/workflows/ci.yml").read_text()


def test_every_dependency_has_a_lower_bound() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = about["optional-dependencies"]
    for need in (*about["dependencies"], *(need for extra in extras.values() for need in extra)):
        assert ">=" in need or "==" in need, need


WIDTHS = (80, 100)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", [["list"], ["list", "defenses"], ["show", "none"], ["show", "finetune"]])
def test_lists_fit_the_terminal(words: list[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert call(words) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not re.match(r" {4}\S|from ", line)]  # formulas and paths are not broken
    assert lines and max(map(len, lines)) <= width


def test_a_plan_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert call(["plan", "smoke", "--only", "model=digits-ddpm", "--store", str(tmp_path)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].startswith("key") and max(map(len, table)) <= width


def test_labels_of_a_plan_take_the_room_that_its_reasons_leave() -> None:
    room = 80 - FRONT
    assert _widths(80, len("hit"))[0] == room - len("hit")
    assert _widths(80, 500) == (room // 2, room - room // 2)
    assert _widths(None, 500) == (LABEL, REASON)


def test_what_goes_into_a_pipe_is_not_broken_into_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("a", "word " * 60), ("bb", "short")]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns(rows).splitlines() == [f"a   {'word ' * 59}word", "bb  short"]
    monkeypatch.setenv("COLUMNS", "40")
    broken = columns(rows, "  ").splitlines()
    assert max(map(len, broken)) <= 40 and all(line.startswith("      word") for line in broken[1:-1])
    assert " ".join(" ".join(broken).split()) == f"a {'word ' * 60}bb short"


def test_the_api_page_has_every_public_name() -> None:
    page = pages.api(harness.homes())
    for name, module in harness.homes().items():
        assert f"'{name}'" in page or f"::: {module}.{name}\n" in page, name
