"""What several commands share: options, JSON output, the plugin index."""

from __future__ import annotations

import json
import os
import sys
import tempfile
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


def check_device(device: str | None) -> None:
    """Raise click.UsageError for a device that this machine does not have; None is the default, which it has."""
    if device is None:
        return
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise click.UsageError(f"--device {device}: {reason}; name another, or leave --device out") from None


def writable(path: Path, option: str = "-o", file: bool = False) -> None:
    """Raise click.UsageError unless the folder `path`, or with `file` the file, can be written. Missing folders above
    it count as made; nothing is left behind."""
    place = path.expanduser().absolute()
    try:
        nearest = next(each for each in (place, *place.parents) if each.exists())
        if file and nearest == place:
            os.close(os.open(place, os.O_WRONLY))
        else:
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise click.UsageError(f"{path}: cannot be written ({reason}); name another with {option}") from None


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
