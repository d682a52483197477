"""Who may import whom, read from the syntax trees. DESIGN: what decides a number, and what only runs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import harness
from harness.registry.code_digest import DECIDING

ROOT = Path(__file__).parent.parent
DECIDES = {"types", "capabilities", "diffusion", "methods", "judges", "models", "stages"}
RUNS = {"registry", "runs", "engine", "scan", "testing", "cli"}
FACE = {"", "__main__", "_moved"}  # harness/__init__.py itself, `python -m harness`, and the import paths of before
DATA = {"templates"}  # no code of ours
RECORDS_ONLY = {
    "harness.types", "harness.capabilities", "harness.judges.statistics", "harness.methods.decoy_choice",
    "harness.runs.record", "harness.runs.records",
    "harness.runs.jsonable", "harness.runs.printable", "harness.runs.doubts", "harness.runs.suite",
    "harness.runs.declared", "harness.registry.kept", "harness.registry.presets",
}  # fmt: skip
HEAVY = {
    "torch", "diffusers", "transformers", "open_clip", "torch_fidelity", "torch_pruning", "timm", "ray", "scipy",
    "sklearn", "numpy",
}  # fmt: skip
LIGHT = (
    "registry",
    "runs",
    "engine",
    "cli",
    "types",
    "capabilities",
    "_moved",
    "",
    "judges.statistics",
    "diffusion.events",
    "methods.decoy_choice",
    "methods.learned_triggers",
)


def sources(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST, top_only: bool = False) -> Iterator[str]:
    """Modules that are imported (a.b for `from a import b` too), those under TYPE_CHECKING aside. top_only: those
    inside functions aside too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from imports(node, top_only)


def module_of(path: Path) -> str:
    """harness/judges/hub.py → judges.hub; "" is the package itself."""
    return ".".join(path.relative_to(ROOT / "harness").with_suffix("").parts).removesuffix("__init__").rstrip(".")


def room(name: str) -> str:
    """harness.judges.hub.Source → judges; a name of the public face → the room in which it lives."""
    first = name.split(".")[1] if "." in name else ""
    return room(harness.homes()[first]) if first in harness.homes() else first


def test_every_folder_below_the_harness_belongs_to_one_half() -> None:
    found = {
        path.stem if path.is_file() else path.name for path in (ROOT / "harness").iterdir() if path.suffix != ".typed"
    }
    found -= {"__pycache__", "__init__"} | DATA | FACE
    assert found == DECIDES | RUNS and not DECIDES & RUNS
    assert set(DECIDING) == DECIDES


def test_what_decides_a_number_never_imports_what_runs_it() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("harness")
        if module_of(path).partition(".")[0] in DECIDES
        for name in imports(tree)
        if name.split(".")[0] == "harness" and room(name) not in DECIDES | {"_moved"}
    ]
    assert not wrong, wrong


def test_a_plugin_imports_the_public_face_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("plugins")
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.split(".")[0] in ("harness", "plugins", "leaderboard") and name != "harness"
    ]
    assert not wrong, wrong
    faceless = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("plugins")
        for name in imports(tree)
        if name.startswith("harness.") and name.split(".")[1] not in harness.homes()
    ]
    assert not faceless, faceless


def test_the_harness_never_imports_plugins_and_only_its_command_line_shows_the_leaderboard() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("harness")
        for name in imports(tree)
        if name.split(".")[0] in ("plugins", "tests")
        or (name.split(".")[0] == "leaderboard" and module_of(path).partition(".")[0] != "cli")
    ]
    assert not wrong, wrong


def test_the_leaderboard_reads_records_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("leaderboard")
        for name in imports(tree)
        if name.split(".")[0] in ("plugins", "tests")
        or (name.split(".")[0] == "harness" and not any(f"{name}.".startswith(f"{each}.") for each in RECORDS_ONLY))
    ]
    assert not wrong, wrong


def is_light(name: str) -> bool:
    """Whether importing harness.a.b (or what a.b holds) loads no heavy library, by `LIGHT` and the test below."""
    rest = name.split(".")[1:]
    modules = [".".join(rest[:n]) for n in range(1, len(rest) + 1)]
    return name == "harness" or any(module in LIGHT for module in modules)


def test_light_modules_import_heavy_ones_only_where_they_use_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("harness")
        if is_light(f"harness.{module_of(path)}")
        for name in imports(tree, top_only=True)
        if name.split(".")[0] in HEAVY or (name.split(".")[0] == "harness" and not is_light(name))
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("name", sorted(harness.homes()))
def test_every_name_of_the_public_face_exists_and_lives_where_a_number_is_decided(name: str) -> None:
    assert getattr(harness, name) is not None and name in dir(harness)
    assert room(harness.homes()[name]) in DECIDES or name == "hookimpl"


def test_the_public_face_names_what_it_says_and_nothing_else() -> None:
    stub = ast.parse((ROOT / "harness/__init__.pyi").read_text(encoding="utf-8"))
    named = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    for node in named:
        assert node.module is not None and import_module(node.module)
        assert all(alias.asname == alias.name for alias in node.names), "write `name as name`, or checkers hide it"
    names = [alias.name for node in named for alias in node.names]
    assert len(names) == len(set(names)) and set(names) == set(harness.homes())
    with pytest.raises(AttributeError, match="no attribute 'minimise'; it offers ABSENT, "):
        _ = harness.minimise  # type: ignore[attr-defined]
