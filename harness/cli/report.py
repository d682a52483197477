"""`bench report`: the tables of a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli import Exit
from harness.cli.common import as_json, echo, opened, print_json, store_option, terminal_width
from harness.cli.completion import Named
from harness.cli.status import run_of
from harness.registry import RegistryError

if TYPE_CHECKING:
    from harness.runs.store import Store
    from leaderboard.results import Results


@click.command(short_help="The tables of a run that is over.")
@click.argument("run", default="quick", type=Named(suites=True))
@store_option
@as_json
def report(run: str, store: Path | None, as_json: bool) -> int:
    """Print the tables of RUN: a suite's name, or the directory that `bench run -o` wrote."""
    from leaderboard.report import WIDTH, brief, terminal

    done = read_run(Path(run)) if Path(run).is_dir() else _last(run, opened(store))
    if as_json:
        print_json({"records": [brief(record) for record in done.records], "dropped": done.dropped})
    else:
        echo(terminal(done.records, done.dropped, terminal_width() or WIDTH))
    return Exit.failed if any(record.error for record in done.records) else Exit.ok


def _last(suite: str, store: Store) -> Results:
    """The report of a suite's last run, wherever it was to go. Raises RegistryError where another run's lies there."""
    name, run = run_of(store, suite)
    out = run["told"].get("out")
    folder = store.run_dir(name) if out is None else Path(out)
    done = read_run(folder)
    if not {record.key for record in done.records} <= {job["key"] for job in run["jobs"]}:
        raise RegistryError(f"{folder}: not the report of the last run of {name}; bench retry {name} writes it")
    return done


def read_run(folder: Path) -> Results:
    """What a run left in its folder. Raises RegistryError where there is no report, ResultsError for one of another
    form, and for one whose records are not those that lie beside it."""
    from leaderboard.results import of_one_run, read_suite

    if not (folder / "report.json").is_file():
        raise RegistryError(f"{folder}: no report.json; compute it with bench run")
    found = read_suite(folder)
    of_one_run(found)
    return found
