"""What several commands share: options, JSON output, the plugin index."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.runs.jsonable import to_jsonable
from harness.runs.printable import printable, printable_json

if TYPE_CHECKING:
    from harness.registry import Index, PluginWarning, Registry
    from harness.runs.store import Store

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


def echo(text: object = "", err: bool = False, nl: bool = True) -> None:
    """Print a text in which names of others may stand: what a terminal would obey is shown by its number. A notice that
    cannot be written to stderr ends nothing."""
    try:
        click.echo(printable(text, keep="\n\t"), err=err, nl=nl)
    except OSError:
        if not err:
            raise


class Finite(click.FloatRange):
    """A number in a range. NaN, which lies in none but compares with nothing, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return found


def print_json(value: Any) -> None:
    """Print JSON. Characters that are not printable are escaped, as JSON may have them."""
    click.echo(printable_json(json.dumps(to_jsonable(value), indent=1, ensure_ascii=False)))


def note(text: str) -> None:
    """A line for the person at the terminal; stdout holds results only."""
    echo(text, err=True)


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
    from harness.runs.store import Store, default_root

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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system in writing `path`, such as a full disk, names it and the way out. Raises OSError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OSError(f"{path}: cannot be written ({reason}); make room, or name another with -o") from None


def outside(path: Path, models: Sequence[str | Path | None], option: str = "-o", file: bool = False) -> None:
    """Raise click.UsageError where an output would change a model: a directory inside one, and with `file` a file that
    is or may be one of the model's."""
    from harness.diffusion.model_files import is_of_a_model, local

    place = Path(os.path.realpath(path.expanduser()))
    for model in (local(each) for each in models if each is not None):
        whole = Path(os.path.realpath(model))
        if not whole.exists() or not place.is_relative_to(whole):
            continue
        if place == whole or not file or (place.exists() and is_of_a_model(place.name)):
            raise click.UsageError(f"{path}: is in the model {model}, which stays as it is; name another with {option}")


def empty_folder(out: Path) -> Path:
    """The directory to write, which is missing or empty. Raises click.UsageError for any other."""
    folder = out.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty; name another directory")
    return folder


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Remove what was written into `folder`, which is missing or empty before, if not all of it can be written. Raises
    CheckpointError for a full disk and the like."""
    from safetensors import SafetensorError

    from harness.diffusion.model_files import CheckpointError, short

    there = folder.exists()
    try:
        yield
    except BaseException as error:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if folder.is_dir() and not there:
            folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or short(error)
            raise CheckpointError(
                f"{folder}: cannot be written ({why}); nothing was written, make room or name another with -o"
            ) from None
        raise


def hush_libraries() -> None:
    """No warnings and progress bars of diffusers and transformers: they quote configurations at any length."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


NARROW = 24  # characters of a last column below which it is not broken into lines


def terminal_width() -> int | None:
    """The characters of a line of the terminal that reads stdout, or those that COLUMNS names; None for a file or a
    pipe."""
    named = os.environ.get("COLUMNS", "")
    try:
        return shutil.get_terminal_size().columns if named.isdigit() or sys.stdout.isatty() else None
    except (ValueError, AttributeError):  # a stream that is closed, or none
        return None


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as aligned text. The last column is broken into lines where stdout is a terminal, else it runs free."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    before, width = len(indent) + sum(widths) + 2 * len(widths), terminal_width()
    room = None if width is None or width - before < NARROW else width - before
    lines = []
    for *front, last in rows:
        parts = [last] if room is None else textwrap.wrap(last, room) or [""]
        lines.append("  ".join([*map(str.ljust, front, widths), parts[0]]))
        lines += [" " * (before - len(indent)) + part for part in parts[1:]]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def size(value: float) -> str:
    """A number of bytes for people: "812 B", "4.2 kB", "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds(value: float) -> str:
    """A duration for people: "40 s", "12 min", "3.5 h"."""
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def words_of(value: object) -> str:
    """A fact about a plugin, for people: yes and no, and the items of a list."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, (list, tuple)) else str(value)
