"""What a plugin author imports. Nothing heavy is loaded before it is asked for.

`__init__.pyi` beside this file is the list of names and of the modules in which they live. It is what a type checker
reads, what a key's digest follows, and what this module reads when a name is asked for.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path

from harness import _moved

_moved.install()


@cache
def homes() -> dict[str, str]:
    """Name → the module that holds it, or that it is a module of."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }


def __dir__() -> list[str]:
    return sorted(homes())


def __getattr__(name: str) -> object:
    if name.startswith("__") or name not in homes():
        raise AttributeError(f"module 'harness' has no attribute '{name}'; it offers {', '.join(sorted(homes()))}")
    home = import_module(homes()[name])
    try:
        return getattr(home, name)
    except AttributeError:
        return import_module(f"{home.__name__}.{name}")
