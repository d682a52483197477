"""Who may import whom, read from the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A harness module imports from the rows above its own; `engine` and `cli` are packages, free inside.
LAYERS = (
    {"types", "events", "seeds", "images", "hookspecs", "attention", "roc", "points", "prompts", "editing", ""},
    {"samplers", "training", "shapes", "stamping", "pasting", "imagedata"},
    {"diffusion", "trojan"},
    {"features", "inversion", "noise_backdoor", "distillation"},
    {"pruning"},
    {"checkpoint", "digits", "recipes", "guidance", "text_detection"},
    {"clip", "evidence", "embedded", "hub"},
    {"public"},
    {"published", "scan", "scanpage", "sources"},
    {"registry"},
    {"grid", "store", "job", "doubts", "estimate"},
    {"planning"},
    {"jobs", "records"},
    {"engine"},
    {"testing"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LIGHT = (
    "types", "events", "hookspecs", "points", "sources", "registry", "grid", "store", "job", "planning", "jobs",
    "records", "engine", "cli", "",
)  # fmt: skip
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "open_clip",
    "torch_fidelity",
    "torch_pruning",
    "scipy",
    "sklearn",
    "numpy",
)


def sources(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST, top_only: bool = False) -> Iterator[str]:
    """Modules that are imported (a.b for `from a import b` too), those under TYPE_CHECKING aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from imports(node, top_only)


def module_of(path: Path) -> str:
    """First name below `harness`; "" is the package itself."""
    return path.relative_to(ROOT / "harness").with_suffix("").parts[0].replace("__init__", "")


def test_every_harness_module_has_its_place() -> None:
    missing = {module_of(path) for path, _ in sources("harness")} - set(LEVEL)
    assert not missing, f"give {', '.join(sorted(missing))} a row in LAYERS, below what they import"


def test_a_harness_module_imports_lower_ones_only() -> None:
    wrong = []
    for path, tree in sources("harness"):
        mine = module_of(path)
        for name in imports(tree):
            parts = name.split(".")
            other = parts[1] if parts[0] == "harness" and len(parts) > 1 else None
            if other in LEVEL and other != mine and LEVEL[other] >= LEVEL[mine]:
                wrong.append(f"{path.relative_to(ROOT)} imports harness.{other}")
    assert not wrong, wrong


def test_the_harness_never_imports_plugins() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("harness")
        for name in imports(tree)
        if name.split(".")[0] == "plugins" or (name.split(".")[0] == "leaderboard" and module_of(path) != "cli")
    ]
    assert not wrong, wrong


def test_a_plugin_imports_no_other_plugin() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("plugins")
        for name in imports(tree)
        if name.split(".")[0] in ("plugins", "leaderboard")
    ]
    assert not wrong, wrong


def test_the_leaderboard_reads_records_only() -> None:
    allowed = ("harness.types", "harness.store", "harness.roc")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("leaderboard")
        for name in imports(tree)
        if name.split(".")[0] == "plugins" or (name.startswith("harness") and not name.startswith(allowed))
    ]
    assert not wrong, wrong


def test_light_modules_import_heavy_libraries_only_where_they_use_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, tree in sources("harness")
        if module_of(path) in LIGHT
        for name in imports(tree, top_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, wrong
