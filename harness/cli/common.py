"""What several commands share: options, JSON output, the plugin index."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.store import plain

if TYPE_CHECKING:
    from harness.registry import Index, PluginWarning, Registry
    from harness.store import Store

Decorator = Callable[[Any], Any]

as_json: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
store_option: Decorator = click.option(
    "--store", type=click.Path(path_type=Path), envvar="BENCH_STORE", help="Where artifacts and records are kept."
)
plugin_files: Decorator = click.option(
    "--plugin-file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Also load this plugin file; repeatable.",
)
strict_option: Decorator = click.option("--strict", is_flag=True, help="A plugin that cannot be loaded is an error.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(plain(value), indent=1, ensure_ascii=False))


def note(text: str) -> None:
    """A line for the person at the terminal; stdout holds results only."""
    click.echo(text, err=True)


def warn(warnings: Sequence[PluginWarning]) -> None:
    for warning in warnings:
        note(f"warning: {warning}")


def index_of(files: Sequence[Path], strict: bool = False) -> Index:
    """The plugin index; with plugin files, or strictly, from the imported plugins. Says what was left out."""
    from harness import registry

    if files or strict:
        found = registry.load(files, strict).index()
    else:
        found = registry.index(notice=note if sys.stderr.isatty() else None)
    warn(found.warnings)
    return found


def loaded(files: Sequence[Path], strict: bool) -> Registry:
    """The imported plugins. Says what was left out."""
    from harness import registry

    found = registry.load(files, strict)
    warn(found.warnings)
    return found


def opened(root: Path | None) -> Store:
    from harness.store import Store, default_root

    return Store(root.expanduser().absolute() if root is not None else default_root())


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned text; the last column runs free."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def seconds(value: float) -> str:
    """A duration for people: "40 s", "12 min", "3.5 h"."""
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
