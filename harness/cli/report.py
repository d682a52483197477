"""`bench report`: the tables of a run that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import as_json, opened, print_json, store_option
from harness.cli.status import run_of
from harness.registry import RegistryError

if TYPE_CHECKING:
    from harness.store import Store


@click.command(short_help="The tables of a run that is over.")
@click.argument("run", default="quick")
@store_option
@as_json
def report(run: str, store: Path | None, as_json: bool) -> int:
    """Print the tables of RUN: a suite's name, or the directory that `bench run -o` wrote."""
    from leaderboard.report import terminal

    document = read_run(Path(run)) if Path(run).is_dir() else _last(run, opened(store))
    if as_json:
        print_json(document)
    else:
        click.echo(terminal(document["records"], document["dropped"]))
    return Exit.failed if any(record.get("error") for record in document["records"]) else Exit.ok


def _last(suite: str, store: Store) -> dict[str, Any]:
    """The report of a suite's last run, wherever it was to go. Raises RegistryError where another run's lies there."""
    name, run = run_of(store, suite)
    out = run["told"].get("out")
    folder = store.run_dir(name) if out is None else Path(out)
    document = read_run(folder)
    if not {record["key"] for record in document["records"]} <= {job["key"] for job in run["jobs"]}:
        raise RegistryError(f"{folder}: not the report of the last run of {name}; bench retry {name} writes it")
    return document


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
