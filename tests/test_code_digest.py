"""Which changes of which source files are changes of a plugin's code, and so of its keys."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from harness import registry
from harness.registry import code_digest
from harness.registry.code_digest import Tree, closure

ROOT = Path(__file__).parent.parent
Install = Callable[[str, str, Mapping[str, str]], Path]

CODE = '''"""What it is.

# not a comment
"""

import os  # for nothing


class Rinse:
    """A class."""  # noqa

    amount = 3  # spoons; paper
    # of soap

    def rinse(self) -> str:
        """Rinses."""
        text = """# kept

            kept, too"""  # é
        return text + "é"; "left in"
'''
BARE = '''import os
class Rinse:
    amount = 3
    def rinse(self) -> str:
        text = """# kept

            kept, too"""
        return text + "é"; "left in"
'''


def test_comments_and_docstrings_are_no_code() -> None:
    assert code_digest.code_of(CODE.encode()) == BARE


def test_a_docstring_beside_code_is_cut_out_of_its_line() -> None:
    assert code_digest.code_of('def f(): "é"; return 1  # one\n'.encode()) == "def f():; return 1\n"


def test_line_ends_and_the_encoding_do_not_matter() -> None:
    assert code_digest.code_of(CODE.replace("\n", "\r\n").encode("utf-8-sig")) == BARE
    assert code_digest.code_of(CODE.replace("\n", "\r").encode()) == BARE
    latin = CODE.replace('"""What', '# coding: latin-1\n"""What', 1).encode("latin-1")
    assert code_digest.code_of(latin) == BARE


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"def f(:\n", b"'''"], ids=["binary", "syntax", "open string"])
def test_what_is_not_python_goes_by_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(content)
    assert code_digest.digest(path.read_bytes()) == hashlib.sha256(content).hexdigest()[:16]


# ---- what a plugin's closure holds


@pytest.fixture
def fresh() -> Callable[..., dict[str, str]]:
    """`closure` in a process that has read no source yet."""

    def read(*classes: type) -> dict[str, str]:
        code_digest._closure.cache_clear()
        code_digest._relatives.cache_clear()
        return closure(classes)

    return read


FILES = {
    "__init__.py": "",
    "helper.py": "def gain():\n    return 2\n",
    "deep/__init__.py": "",
    "deep/lower.py": "from ..helper import gain\n",
    "deep/er/__init__.py": "",
    "bare/part.py": "",  # a folder without __init__.py
}


def closure_of(tmp_path: Path, source: str, module: str = "plugin") -> set[str]:
    """The labels in the closure of a module of a package called `pkg`."""
    place = tmp_path / "pkg"
    for name, content in {**FILES, f"{module.replace('.', '/')}.py": source}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    tree = Tree({"harness": [ROOT / "harness"], "pkg": [place]}, own="pkg")
    return set(tree.closure(f"pkg.{module}"))


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("from .helper import gain", ".helper"),
        ("from . import helper", ".helper"),
        ("from pkg import helper", ".helper"),
        ("import pkg.helper", ".helper"),
        ("import pkg.helper as h", ".helper"),
        ("import pkg\nx = pkg.helper.gain()", ".helper"),
        ("import pkg as p\ndef f():\n    return p.deep.lower.x", ".helper"),
        ("from .deep import lower", ".helper"),
        ("from pkg.bare import part", ".bare.part"),
        ("def f():\n    from .helper import gain", ".helper"),
        ("try:\n    import nothing\nexcept ImportError:\n    from .helper import gain", ".helper"),
        ("import importlib\nimportlib.import_module('pkg.helper')", ".helper"),
        ("from importlib import import_module\nimport_module('.helper', __package__)", ".helper"),
        ("from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    from .helper import gain", ".helper"),
        ("import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    from .helper import gain", ".helper"),
        ("from harness import minimize", "harness.diffusion.training"),
        ("from harness import pruning", "harness.methods.pruning"),
        ("import harness\ndef f():\n    return harness.minimize()", "harness.diffusion.training"),
        ("import harness as h\ndef f():\n    return h.pruning.taylor", "harness.methods.pruning"),
        ("from harness.training import minimize", "harness.diffusion.training"),
        ("import harness.guidance", "harness.methods.attention_guidance"),
        ("from harness import guidance", "harness.methods.attention_guidance"),
        ("from harness.evidence import unmeasured", "harness.judges.statistics"),
        ("from harness.diffusion import DDIM", "harness.diffusion.samplers"),
        ("from harness.methods import trojan", "harness.methods.trigger_placement"),
    ],
)
def test_whatever_way_a_module_is_imported_it_counts(tmp_path: Path, source: str, wanted: str) -> None:
    assert wanted in closure_of(tmp_path, source)


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .helper import gain",
        "import typing\nif typing.TYPE_CHECKING:\n    from .helper import gain",
        "from harness.registry.hookspecs import hookimpl\nfrom harness import hookimpl as h\nimport torch, json",
        "import pkg\nhelper = 3",
    ],
)
def test_what_is_only_for_a_type_checker_or_decides_no_number_does_not_count(tmp_path: Path, source: str) -> None:
    assert closure_of(tmp_path, source) == {".", ".plugin"}


def test_relative_imports_are_counted_from_the_package_they_stand_in(tmp_path: Path) -> None:
    assert closure_of(tmp_path, "from ..lower import x", "deep.er.plugin") == {
        ".", ".deep", ".deep.er", ".deep.er.plugin", ".deep.lower", ".helper",
    }  # fmt: skip


def test_a_compiled_module_goes_by_its_bytes(tmp_path: Path) -> None:
    place = tmp_path / "pkg"
    place.mkdir()
    (place / "__init__.py").write_text("from . import fast")
    tree, seen = Tree({"pkg": [place]}, own="pkg"), set()
    for content in (b"\x7fELF\0one", b"\x7fELF\0two"):
        (place / f"fast{EXTENSION_SUFFIXES[0]}").write_bytes(content)
        seen.add(tree.closure("pkg")[".fast"])
    assert len(seen) == 2


def test_a_package_over_several_folders_is_read_in_all_of_them(tmp_path: Path) -> None:
    for name, source in {"one/pkg/plugin.py": "from pkg.other import x", "two/pkg/other.py": "x = 1"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
    tree = Tree({"pkg": [tmp_path / "one/pkg", tmp_path / "two/pkg"]}, own="pkg")
    assert set(tree.closure("pkg.plugin")) == {".plugin", ".other"}


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from harness import hookimpl
IMPORTS

@dataclass(frozen=True)
class Rinse(BASE):
    name: ClassVar[str] = "NAME"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model, knowledge, rng):
        raise NotImplementedError

@hookimpl
def defenses():
    return [Rinse]
"""


def plugin(name: str, imports: str, base: str = "object") -> str:
    return PLUGIN.replace("IMPORTS", imports).replace("BASE", base).replace("NAME", name)


def loaded(name: str) -> type:
    found = registry.load()
    assert not found.warnings
    return found.find("defenses", name)


@pytest.mark.parametrize(
    ("name", "imports", "helper"),
    [
        ("inside", "from .helper import gain", "inside_pkg/helper.py"),
        ("absolute", "from absolute_pkg.helper import gain", "absolute_pkg/helper.py"),
        ("beside", "from beside_helper import gain", "beside_helper.py"),
    ],
)
def test_a_helper_of_somebody_elses_plugin_is_part_of_its_code(
    distribution: Install, fresh, name: str, imports: str, helper: str
) -> None:
    files = {f"{name}_pkg/__init__.py": "", f"{name}_pkg/rinse.py": plugin(name, imports)}
    root = distribution(name, f"{name}_pkg", files | {helper: FILES["helper.py"]})
    before = fresh(cls := loaded(name))
    (root / helper).write_text('"""Says more."""\n\n' + FILES["helper.py"] + "\n# and more\n")
    assert fresh(cls) == before
    (root / helper).write_text(FILES["helper.py"].replace("2", "3"))
    after = fresh(cls)
    assert {label for label in before if before[label] != after[label]} == {
        "beside_helper" if name == "beside" else ".helper"
    }
    assert set(before) == set(after) and ".rinse" in before


def test_a_base_class_counts_wherever_it_comes_from(distribution: Install, fresh) -> None:
    """Also where no import statement leads to it."""
    imports = "import importlib\nBase = importlib.import_module(f'{__package__}.ba' + 'se').Base"
    base = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Base:\n    pass\n"
    files = {"based/__init__.py": "", "based/rinse.py": plugin("based", imports, "Base"), "based/base.py": base}
    root = distribution("based", "based", files)
    before = fresh(cls := loaded("based"))
    (root / "based/base.py").write_text(base.replace("pass", "x = 1"))
    after = fresh(cls)
    assert before.pop(".base") != after.pop(".base") and before == after


def test_a_plugin_file_takes_the_helpers_beside_it_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "near_helper.py").write_text(FILES["helper.py"])
    (tmp_path / "rinse.py").write_text(plugin("near", "from near_helper import gain"))
    found = registry.Registry(strict=True)
    found.load_file(tmp_path / "rinse.py")
    cls = found.find("defenses", "near")
    before = fresh(cls)
    assert set(before) == {".", "near_helper"}
    (tmp_path / "near_helper.py").write_text(FILES["helper.py"].replace("2", "3"))
    assert fresh(cls)["near_helper"] != before["near_helper"]


def test_two_packages_with_modules_of_one_name_both_count(distribution: Install, fresh) -> None:
    roots = {}
    for name in ("left", "right"):
        files = {
            "__init__.py": "",
            "rinse.py": plugin(name, "from .helper import gain"),
            "helper.py": f"gain = '{name}'",
        }
        roots[name] = distribution(name, f"{name}_twin", {f"{name}_twin/{file}": text for file, text in files.items()})
    classes = loaded("left"), loaded("right")
    seen = {tuple(fresh(*classes).items()), tuple(fresh(*reversed(classes)).items())}
    assert len(seen) == 1
    for name, root in roots.items():
        (root / f"{name}_twin/helper.py").write_text("gain = 3")
        seen.add(tuple(fresh(*classes).items()))
    assert len(seen) == 3


def test_libraries_are_no_code_of_a_plugin(fresh) -> None:
    from collections import OrderedDict

    import torch

    assert fresh(OrderedDict, torch.nn.Module) == {}


# ---- our own plugins, in a copy of the tree


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the harness, the plugins and the leaderboard; weights are links, results stay behind."""
    skipped = shutil.ignore_patterns("__pycache__", "weights", "results", "assets")
    for package in ("harness", "plugins", "leaderboard"):
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=skipped)
    (tmp_path / "tree/plugins/models/weights").symlink_to(ROOT / "plugins/models/weights")
    return tmp_path / "tree"


def edit(root: Path, *files: str, line: str = "EDITED = 1") -> None:
    for file in files:
        path = root / file
        path.write_text(f"{path.read_text()}\n\n{line}\n")


RUNS_IT = (
    "harness/engine/driver.py", "harness/engine/display.py", "harness/cli/run.py", "harness/runs/store.py",
    "harness/runs/planning.py", "harness/scan/verdict.py", "harness/testing/checks.py", "harness/registry/loading.py",
    "leaderboard/report.py", "leaderboard/site.py",
)  # fmt: skip


def test_an_edit_reaches_the_plugins_that_import_it_and_no_other(copied: Path) -> None:
    names = ("skd_cag", "vocabulary_scan", "elijah")

    def codes() -> dict[str, dict[str, str]]:
        tree = Tree({"harness": [copied / "harness"], "plugins": [copied / "plugins"]})
        return {name: tree.closure(f"plugins.defenses.{name}") for name in names}

    before = codes()
    edit(copied, *RUNS_IT)
    edit(copied, "harness/methods/attention_guidance.py", line='# it is clear\n"a text that does nothing"')
    after = codes()
    assert {name for name in names if before[name] != after[name]} == {"skd_cag", "vocabulary_scan"}


@pytest.mark.slow
def test_keys_follow_the_code_that_decides_and_no_other(copied: Path, tmp_path: Path) -> None:
    def keys() -> dict[str, str]:
        """Label → key of every job of `quick`, planned by the copy."""
        code = "import harness.cli; print(harness.__file__); harness.cli.main()"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "plan", "quick", "--json"],
            env={**os.environ, "PYTHONPATH": str(copied), "BENCH_STORE": str(tmp_path / "store")},
            capture_output=True, text=True, timeout=800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        place, _, document = done.stdout.partition("\n")
        assert Path(place) == copied / "harness/__init__.py"
        return {f"{job['kind']}: {job['label']}": job["key"] for job in json.loads(document)["jobs"]}

    def differing(a: Mapping[str, str], b: Mapping[str, str], of: str) -> set[str]:
        assert set(a) == set(b)
        return {label for label in a if label.startswith("defend") and of in label and a[label] != b[label]}

    first = keys()
    edit(copied, *RUNS_IT)
    edit(copied, "harness/methods/attention_guidance.py", line="# it is clear")
    assert keys() == first
    edit(copied, "harness/methods/attention_guidance.py")
    second = keys()
    ours = {label for label in first if label.startswith("defend") and "skd-cag" in label}
    assert ours and differing(first, second, "skd-cag") == ours
    assert any("elijah" in label for label in first) and not differing(first, second, "elijah")
    attacks = [label for label in first if label.startswith("attack")]
    assert attacks and all(first[label] == second[label] for label in attacks)
