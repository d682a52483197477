"""`bench run` and `bench plan`: a suite from its file to its leaderboard."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import (
    as_json,
    columns,
    loaded,
    opened,
    plain,
    plugin_files,
    print_json,
    seconds,
    store_option,
    strict_option,
)

if TYPE_CHECKING:
    from harness.grid import Suite
    from harness.store import Store


def suite_options(command: Any) -> Any:
    """The options by which `run` and `plan` agree on what is to be computed."""
    options = [
        click.argument("suite", default="quick"),
        click.option("--only", multiple=True, metavar="KEY=TEXT", help="Keep cells that match; repeatable."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change the suite: n=16, grid.0.n=16."),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a CPU job."),
        store_option,
        strict_option,
        plugin_files,
        as_json,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Prepared:
    """A suite that has met plugins and store. `plan` is that of harness.jobs: `.jobs` by key, `.cells`."""

    suite: Suite
    plan: Any
    store: Store


def prepare(
    suite: str, only: Sequence[str], sets: Sequence[str], threads: int, store: Path | None, strict: bool, files: Any
) -> Prepared:
    """Cheap checks first: the suite's form is read before any plugin is imported."""
    from harness import grid

    draft = grid.read(grid.find_suite(suite), sets)
    registry = loaded(files, strict)
    expanded = grid.expand(draft, registry, only)
    if not expanded.cells:
        reasons = "; ".join(dict.fromkeys(dropped.reason for dropped in expanded.dropped))
        raise grid.SuiteError(f"{draft.path}: no cell can be run: {reasons}")
    from harness import jobs

    opened_store = opened(store)
    return Prepared(expanded, jobs.plan(expanded, registry, opened_store, threads=threads), opened_store)


@click.command(short_help="Compute a suite and print its leaderboard.")
@suite_options
@click.option(
    "--engine", type=click.Choice(["local"]), default="local", show_default=True, help="What places the jobs."
)
@click.option("--gpus", default="", metavar="0,1", help="GPUs to use; none by default.")
@click.option("--cpus", type=click.IntRange(1), help="Processors to use; all by default.")
@click.option("--timeout", type=click.FloatRange(1), default=14400, show_default=True, help="Seconds for one job.")
@click.option("--stall", type=click.FloatRange(1), default=1800, show_default=True, help="Seconds without progress.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where the report goes; in the store by default.")
@click.option("--dry-run", is_flag=True, help="Say what would be computed, and stop (bench plan).")
def run(
    suite: str,
    only: tuple[str, ...],
    sets: tuple[str, ...],
    threads: int,
    store: Path | None,
    strict: bool,
    files: tuple[Path, ...],
    as_json: bool,
    engine: str,
    gpus: str,
    cpus: int | None,
    timeout: float,
    stall: float,
    out: Path | None,
    dry_run: bool,
) -> int:
    """Compute SUITE (a name or a .toml file; default: quick) and print its leaderboard. Run again, it resumes."""
    ready = prepare(suite, only, sets, threads, store, strict, files)
    if dry_run:
        show_plan(ready, as_json)
        return Exit.ok
    results = compute(ready, gpus, cpus, threads, (timeout, stall), quiet=as_json)
    return publish(ready, results, out, as_json)


@click.command(short_help="What a run would compute, and how long it may take.")
@suite_options
def plan(
    suite: str,
    only: tuple[str, ...],
    sets: tuple[str, ...],
    threads: int,
    store: Path | None,
    strict: bool,
    files: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Say which jobs SUITE needs: in the store or not and why, and how long they may take."""
    show_plan(prepare(suite, only, sets, threads, store, strict, files), as_json)


def compute(
    ready: Prepared, gpus: str, cpus: int | None, threads: int, limits: tuple[float, float], quiet: bool
) -> Mapping[str, Any]:
    """Run the plan's jobs on this machine; job results by key. limits: seconds for one job, and without progress."""
    from harness.engine import display, driver
    from harness.engine.local import LocalEngine, most_memory
    from harness.engine.supervise import Limits

    ids = [part.strip() for part in gpus.split(",") if part.strip()]
    slots = None if cpus is None else max(1, cpus // threads)
    try:
        caps = Limits(*limits, most_memory())
        engine = LocalEngine(ready.store, cpu_slots=slots, threads=threads, gpus=ids, limits=caps)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with engine:
        return driver.run(ready.plan.jobs, ready.store, engine, listener=display.Silent() if quiet else display.pick())


def publish(ready: Prepared, results: Mapping[str, Any], out: Path | None, as_json: bool) -> int:
    """Records, report and the closing lines; the exit code."""
    from harness import doubts, jobs
    from leaderboard import report

    records = doubts.annotate(jobs.collect(ready.plan, results, ready.store))
    dropped = [plain(each) for each in ready.suite.dropped]
    folder = out.expanduser().absolute() if out is not None else ready.store.run_dir(ready.suite.name)
    records = _with_sheets(records, folder)
    paths = report.write(records, dropped, folder)
    counts = Counter(result.status for result in results.values())
    failed = [record for record in records if record.get("error")]
    if as_json:
        summary = {"suite": ready.suite.name, "jobs": counts, "failed_cells": len(failed), "paths": paths}
        print_json({**summary, "records": records, "dropped": dropped})
    else:
        click.echo(report.terminal(records, dropped))
        click.echo("\n" + columns([(name, str(path)) for name, path in paths.items()]))
        click.echo(summary_line(counts, len(records), len(failed)))
    return Exit.failed if failed else Exit.ok


def _with_sheets(records: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records with copies of their contact sheets below `folder`, named relative to it: a record is to be read
    elsewhere, where the store is not."""
    told = []
    for record in records:
        name = f"sheets/{record['key']}.png" if record.get("sheet") else None
        if name is not None:
            (folder / "sheets").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record["sheet"], folder / name)
        told.append({**record, "sheet": name})
    return told


def summary_line(counts: Mapping[str, int], cells: int, failed: int) -> str:
    words = {"hit": "in the store", "done": "computed", "failed": "failed", "skipped": "skipped"}
    said = ", ".join(f"{counts.get(status, 0)} {word}" for status, word in words.items())
    return f"{cells} cells, {failed} failed; jobs: {said}"


def show_plan(ready: Prepared, as_json: bool) -> None:
    """The jobs in order, each a hit or a miss with the reason, and the time that the misses may take."""
    jobs = ready.plan.jobs
    states = {key: _state(job, jobs, ready.store) for key, job in jobs.items()}
    missing = sum(job.estimate for key, job in jobs.items() if states[key] != "hit")
    if as_json:
        rows = [
            {"key": key, "kind": job.kind, "label": job.label, "state": states[key], "estimate_s": job.estimate}
            for key, job in jobs.items()
        ]
        suite = ready.suite
        print_json({"jobs": rows, "cells": suite.cells, "dropped": suite.dropped, "missing_s": missing})
        return
    rows = [(key[:10], job.label, states[key], seconds(job.estimate)) for key, job in jobs.items()]
    click.echo(columns([("key", "job", "state", "estimate"), *rows]))
    for reason, cells in Counter(dropped.reason for dropped in ready.suite.dropped).items():
        click.echo(f"n/a, {cells} cells: {reason}")
    hits = sum(state == "hit" for state in states.values())
    click.echo(
        f"{len(jobs)} jobs, {hits} in the store, {len(jobs) - hits} to compute, about {seconds(missing)} of work"
    )


def _state(job: Any, jobs: Mapping[str, Any], store: Store) -> str:
    if store.has(job.key):
        return "hit"
    waiting = [jobs[key].label if key in jobs else key[:10] for key in job.needs if not store.has(key)]
    if waiting:
        return f"miss: needs {waiting[0]}" + (f" and {len(waiting) - 1} more" if len(waiting) > 1 else "")
    attempts = store.attempts(job.key)
    return f"miss: failed before ({attempts[-1].get('error')})" if attempts else "miss: never computed"
