"""From an entry point to its module, also where another package of the same name stands in front of it on the path.

Packages are often called `plugins`, and so is ours. Where a distribution's own package is not the one that Python would
import under its name, it is imported from its own folder, under a name made of the distribution's.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

OWN = "diffusion-defense-bench"
GROUP = "bench.plugins"


def imported(point: metadata.EntryPoint) -> ModuleType:
    """The module that the entry point names. Raises whatever importing it raises."""
    top, dot, rest = point.module.partition(".")
    home = _home(point, top)
    if home is None or home in places(top):
        return importlib.import_module(point.module)
    alias = alias_of(point)
    if alias not in sys.modules:
        _import_from(home, alias)
    return importlib.import_module(f"{alias}{dot}{rest}")


def alias_of(point: metadata.EntryPoint) -> str:
    """The name under which the entry point's package is imported where another package has its own."""
    return re.sub(r"\W", "_", f"{point.dist.name if point.dist else ''}_{point.module.partition('.')[0]}")


def files(point: metadata.EntryPoint) -> list[Path]:
    """The source files of the entry point's top package or module, found without importing it."""
    top = point.module.partition(".")[0]
    home = _home(point, top)
    homes = places(top) if home is None else [home]
    return [file for place in homes for file in (place.rglob("*.py") if place.is_dir() else [place])]


def _home(point: metadata.EntryPoint, top: str) -> Path | None:
    """Folder or file of the distribution's own `top`; None where its metadata lie elsewhere (an editable install)."""
    if point.dist is None:
        return None
    ours = Path(__file__).resolve().parent.parent.parent
    root = ours if point.dist.name == OWN else Path(str(point.dist.locate_file(""))).resolve()
    candidates = (root / top, root / f"{top}.py")
    return next((path for path in candidates if (path / "__init__.py").is_file() or path.is_file()), None)


def places(top: str) -> list[Path]:
    """Folders or file of what Python has imported, or would import, under this name."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    folders = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    return folders or ([Path(spec.origin).resolve()] if spec.origin else [])


def _import_from(home: Path, alias: str) -> None:
    package = home.is_dir()
    spec = importlib.util.spec_from_file_location(
        alias, home / "__init__.py" if package else home, submodule_search_locations=[str(home)] if package else None
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{home} is not a Python module")
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise


def installed() -> list[metadata.EntryPoint]:
    """The entry points of the group, in an order that does not depend on the file system."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name, p.value))


def file_of(module: str) -> str:
    """The file of an imported module; "" where it has none."""
    return str(getattr(sys.modules.get(module), "__file__", None) or "")


def source_of(module: str) -> str:
    """The file of a module that may have failed to import, or "no file"."""
    try:
        spec = locate(module.partition(":")[0])
    except (ImportError, ValueError, AttributeError):
        spec = None
    return file_of(module) or (spec.origin if spec is not None and spec.origin else "no file")


def locate(module: str) -> Any:
    """The import spec of a module; importlib.util.find_spec would import its parents."""
    top, *rest = module.split(".")
    spec, name = importlib.util.find_spec(top), top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec
