"""`bench build`: train an embedded model from its recipe."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from harness.capabilities import BuildableModel, PublishedArchitecture, offers
from harness.cli.common import (
    as_json,
    check_device,
    echo,
    loaded,
    note,
    plugin_files,
    print_json,
    seconds,
    strict_option,
)
from harness.cli.completion import Named
from harness.registry import InvalidSpec, spec_of
from harness.runs.jsonable import to_jsonable

LIBRARIES = ("torch", "diffusers", "transformers", "diffusion-defense-bench")


@click.command(short_help="Train an embedded model from its recipe.")
@click.argument("model", type=Named("models"))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory to write; default: next to the plugin.")
@click.option("--device", metavar="NAME", help="Where the networks are trained, such as cuda; default: the recipe's.")
@click.option(
    "--from",
    "start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of an earlier version whose networks the training starts from; only recipes that can take it over.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="How long the networks are trained; only recipes that follow the clock; default: the recipe's.",
)
@plugin_files
@strict_option
@as_json
def build(
    model: str,
    out: Path | None,
    device: str | None,
    start: Path | None,
    minutes: float | None,
    files: tuple[Path, ...],
    strict: bool,
    as_json: bool,
) -> None:
    """Train MODEL from its recipe and write weights, judges and provenance. May take hours."""
    plugin = loaded(files, strict).build("models", model)
    if not offers(plugin, BuildableModel):
        raise InvalidSpec(f"{plugin.name} has no recipe: its weights are published by others")
    folder = _place(plugin, out)
    facts = built(plugin, folder, device=device, start=start, minutes=minutes)
    if as_json:
        print_json({"model": spec_of(plugin), "directory": folder, **facts})
    else:
        echo(f"{plugin.name} is in {folder} ({seconds(facts['seconds'])})")


def _place(plugin: Any, out: Path | None) -> Path:
    """The directory to write. Raises click.UsageError rather than replace what is no model of ours."""
    from harness.models import provenance

    if out is None and offers(plugin, PublishedArchitecture):
        raise click.UsageError(f"{plugin.name} has no place in the package; name a directory with -o")
    if out is None:
        return Path(str(sys.modules[type(plugin).__module__].__file__)).absolute().parent / "weights" / plugin.name
    folder = out.expanduser().absolute()
    if folder.exists() and not (folder / provenance.FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and was not made by bench build; name another directory")
    return folder


def built(plugin: Any, folder: Path, **choices: Any) -> dict[str, Any]:
    """Run the recipe in a sibling of `folder` that takes its place when it is complete; the provenance.

    A recipe that keeps the states of its trainings in the sibling goes on from them when it is run again. choices:
    device, start, minutes; None leaves one to the recipe."""
    options = {name: value for name, value in choices.items() if value is not None}
    _check_recipe(plugin, options)
    check_device(options.get("device"))
    from harness.diffusion import events
    from harness.diffusion.interrupted import UNFINISHED
    from harness.models.provenance import FILE

    draft = folder.with_name(f".{folder.name}.building")
    _emptied(draft)
    started = time.monotonic()
    events.listen(progress_lines())
    try:
        facts = plugin.build(draft, **options)
    finally:
        events.listen(None)
    versions = {name: metadata.version(name) for name in LIBRARIES}
    took = time.monotonic() - started
    provenance = {
        "model": spec_of(plugin),
        "version": plugin.version,
        "facts": facts,
        "versions": versions,
        "seconds": took,
        "device": options.get("device", "cpu"),
    }
    (draft / FILE).write_text(json.dumps(to_jsonable(provenance), indent=1, sort_keys=True) + "\n")
    shutil.rmtree(draft / UNFINISHED, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    return provenance


def _emptied(draft: Path) -> None:
    """The folder of an unfinished build, with nothing in it but the states of its trainings."""
    from harness.diffusion.interrupted import UNFINISHED

    draft.mkdir(parents=True, exist_ok=True)
    for path in draft.iterdir():
        if path.name != UNFINISHED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (draft / UNFINISHED).is_dir():
        note(f"an unfinished build is continued; remove {draft} to begin anew")


WAYS = {
    "device": "the recipe of {} does not choose a device; leave --device out",
    "minutes": "the recipe of {} has a number of steps; leave --minutes out",
    "start": "the recipe of {} starts from random weights; leave --from out",
}


def _check_recipe(plugin: Any, options: Mapping[str, Any]) -> None:
    """Raise click.UsageError for a recipe that does not take one of `options`."""
    import inspect

    known = inspect.signature(plugin.build).parameters
    for name in options:
        if name not in known:
            raise click.UsageError(WAYS[name].format(plugin.name))


def progress_lines(every: float = 10.0) -> Callable[[dict[str, Any]], None]:
    """A sink of progress events that says at most one line each `every` seconds, and each phase's last."""
    last = 0.0

    def sink(event: dict[str, Any]) -> None:
        nonlocal last
        if event["ts"] - last < every and event["step"] < event["total"]:
            return
        last = event["ts"]
        numbers = "".join(f" {k} {v:.4g}" for k, v in event.items() if k not in ("ts", "phase", "step", "total"))
        note(f"{event['phase']} {event['step']}/{event['total']}{numbers}")

    return sink
