"""`bench report`: the tables of a run that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.cli import Exit
from harness.cli.common import as_json, opened, print_json, store_option
from harness.registry import RegistryError


@click.command(short_help="The tables of a run that is over.")
@click.argument("run", default="quick")
@store_option
@as_json
def report(run: str, store: Path | None, as_json: bool) -> int:
    """Print the tables of RUN: a suite's name, or the directory that `bench run -o` wrote."""
    from leaderboard.report import terminal

    document = read_run(Path(run) if Path(run).is_dir() else _folder(run, store))
    if as_json:
        print_json(document)
    else:
        click.echo(terminal(document["records"], document["dropped"]))
    return Exit.failed if any(record.get("error") for record in document["records"]) else Exit.ok


def _folder(run: str, store: Path | None) -> Path:
    try:
        return opened(store).run_dir(run)
    except ValueError:
        raise RegistryError(f"no run '{run}': give a suite's name, or a directory that bench run wrote") from None


def read_run(folder: Path) -> dict[str, Any]:
    """{"records": [...], "dropped": [...]} of a run's report.json. Raises RegistryError where there is none."""
    path = folder / "report.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {"records": document["records"], "dropped": document["dropped"]}
    except OSError:
        raise RegistryError(f"{folder}: no report.json; compute it with bench run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{path}: not a report of ours ({error})") from None
