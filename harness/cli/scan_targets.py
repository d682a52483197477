"""Which models `bench scan` is asked about: names of the command line, lines of a file, and published models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from harness.scan.known import KnownModel


@dataclass(frozen=True)
class Target:
    """A model to scan: its name, where it is, and its entry in the list of known models."""

    name: str
    where: str
    revision: str = "main"
    entry: KnownModel | None = None


def targets_of(models: Sequence[str], revision: str, listed: str | None, known: bool, only: str | None) -> list[Target]:
    """The models of the command line, each once. Raises click.UsageError if there are none."""
    from harness.scan.known import known_models

    if only is not None and not known:
        raise click.UsageError("--only selects entries of --known; give both")
    names = [*models, *(() if listed is None else _listed(listed))]
    targets = [Target(where, where, revision) for where in map(pipeline_of, names)]
    if known:
        entries = [e for e in known_models() if only is None or only.lower() in f"{e.name} {e.attack}".lower()]
        if not entries:
            raise click.UsageError(f"--only {only}: no entry of known_backdoored.toml has this in its name or attack")
        targets += [Target(entry.name, entry.repository, entry.revision or "main", entry) for entry in entries]
    if not targets:
        raise click.UsageError("no model is named; give MODEL, --list FILE or --known")
    return list({(target.where, target.entry): target for target in targets}.values())


def _listed(file: str) -> list[str]:
    """The lines of a file of models, without blank lines and those that begin with #."""
    if file == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--list {file}: cannot be read ({error})") from None
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise click.UsageError(f"--list {file}: names no model")
    return found


def pipeline_of(name: str) -> str:
    """The pipeline directory to which a file belongs: a model_index.json, or weights in the folder of a part. Any other
    name stays as it is."""
    from harness.diffusion.model_files import local

    path = local(name)
    if path.is_file():
        if path.name == "model_index.json":
            return str(path.parent)
        if (path.parent.parent / "model_index.json").is_file() and path.parent.name != "..":
            return str(path.parent.parent)
    return name
