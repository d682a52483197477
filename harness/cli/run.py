"""`bench run` and `bench plan`: a suite from its file to its leaderboard."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import (
    as_json,
    columns,
    loaded,
    opened,
    plugin_files,
    print_json,
    seconds,
    store_option,
    strict_option,
    writable,
)
from harness.store import plain

if TYPE_CHECKING:
    from harness.engine.local import LocalEngine
    from harness.engine.ray import RayEngine
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
    """A suite that has met plugins and store. `plan` is that of harness.planning: `.jobs` by key, `.cells`."""

    suite: Suite
    plan: Any
    store: Store
    registry: Any = None
    absent: Sequence[str] = ()  # models whose weights or data are not here, and why


def prepare(
    suite: str, only: Sequence[str], sets: Sequence[str], threads: int, store: Path | None, strict: bool, files: Any,
    planned: bool = False,
) -> Prepared:  # fmt: skip
    """Cheap checks first: the suite's form is read before any plugin is imported. planned: nothing will be run, so that
    weights and data need not be here."""
    from harness import grid

    draft = grid.read(grid.find_suite(suite), sets)
    registry = loaded(files, strict)
    expanded = grid.expand(draft, registry, only)
    if not expanded.cells:
        reasons = "; ".join(dict.fromkeys(dropped.reason for dropped in expanded.dropped))
        raise grid.SuiteError(f"{draft.path}: no cell can be run: {reasons}")
    from harness import estimate, planning

    opened_store, absent = opened(store), estimate.tolerant(registry) if planned else []
    made = planning.plan(expanded, registry, threads)
    return Prepared(expanded, made, opened_store, registry, absent)


def engine_options(command: Any) -> Any:
    """The options by which `run` and `retry` say where jobs run and how long."""
    options = [
        click.option(
            "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
            help="What places the jobs: this machine or a Ray cluster.",
        ),
        click.option(
            "--address", metavar="ADDRESS",
            help="Ray: HOST:PORT, 'auto' for a cluster that runs here; default: RAY_ADDRESS, else its own.",
        ),
        click.option(
            "--gpus", default="", metavar="0,1",
            help="GPUs: numbers, UUIDs or 'all' (under Ray only 'all'); none by default.",
        ),
        click.option(
            "--gpu-share", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
            help="What a job gets of a GPU and of its memory: 0.25 puts four jobs on a card.",
        ),
        click.option("--cpus", type=click.IntRange(1), help="Processors to use; all by default."),
        click.option(
            "--timeout", type=click.FloatRange(1), default=14400, show_default=True, help="Seconds for one job."
        ),
        click.option(
            "--stall", type=click.FloatRange(1), default=1800, show_default=True, help="Seconds without progress."
        ),
        click.option(
            "--max-hours", type=click.FloatRange(0, min_open=True), help="Stop then; the same command goes on later."
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Settings:
    """Where jobs run and how long. None of it changes a number, but for `threads`."""

    engine: str
    address: str | None
    gpus: str
    gpu_share: float
    cpus: int | None
    timeout: float
    stall: float
    max_hours: float | None
    threads: int


@click.command(short_help="Compute a suite and print its leaderboard.")
@suite_options
@engine_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Where the report goes, in place of an earlier one; in the store by default.",
)
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
    out: Path | None,
    dry_run: bool,
    **where: Any,
) -> int:
    """Compute SUITE (a name or a .toml file; default: quick) and print its leaderboard. Run again, it resumes."""
    folder = None if dry_run else places(opened(store), out)
    ready = prepare(suite, only, sets, threads, store, strict, files)
    if dry_run:
        show_plan(ready, as_json)
        return Exit.ok
    settings = Settings(**where, threads=threads)
    told = {
        "suite": _lasting(suite), "only": only, "sets": sets, "files": [str(file.absolute()) for file in files],
        "out": folder,
    }  # fmt: skip
    results = compute(ready, settings, told, quiet=as_json)
    return publish(ready, results, folder, as_json)


def places(store: Store, out: Path | None) -> Path | None:
    """`out` as it is to be found from everywhere. Before anything is computed: raises StoreError for a store that
    cannot be written, click.UsageError for such a folder, and for one in which the records of a store lie."""
    from harness.store import Store, StoreError

    try:
        writable(store.root, "--store or BENCH_STORE")
    except click.UsageError as error:
        raise StoreError(error.message) from None
    if out is None:
        return None
    for place in (out, out / "records", out / "sheets"):
        writable(place)
    folder = out.expanduser().absolute()
    if folder == store.root or any(Store(folder).keys()):
        raise click.UsageError(f"{out}: a store, whose records a report would replace; name another with -o")
    if any((folder / "records").glob("*.json.gz")) or any((folder / "reproduced").glob("*.json")):
        raise click.UsageError(
            f"{out}: published results, which a report would replace; name another with -o, then bench leaderboard add"
        )
    return folder


def _lasting(suite: str) -> str:
    """The name of a suite, or its file as it is to be found from everywhere."""
    return str(Path(suite).absolute()) if suite.endswith(".toml") else suite


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
    show_plan(prepare(suite, only, sets, threads, store, strict, files, planned=True), as_json)


def compute(
    ready: Prepared, settings: Settings, told: Mapping[str, Any], quiet: bool, keys: set[str] | None = None
) -> Mapping[str, Any]:
    """Run the plan's jobs (those in `keys`, by default all); results by key. told: what `retry` is to tell again."""
    from harness.engine import display, driver

    jobs = {key: job for key, job in ready.plan.jobs.items() if keys is None or key in keys}
    most = None if settings.max_hours is None else settings.max_hours * 3600
    with engine_of(ready.store, settings) as engine:
        _remember(ready, settings, told)
        events = display.EventFile(ready.store.run_events(ready.suite.name))
        listener = events if quiet else display.Both(events, display.pick())
        try:
            return driver.run(jobs, ready.store, engine, listener=listener, max_seconds=most)
        finally:
            listener.close()


def _remember(ready: Prepared, settings: Settings, told: Mapping[str, Any]) -> None:
    jobs = [
        {"key": job.key, "kind": job.kind, "label": job.label, "needs": job.needs, "estimate": job.estimate}
        for job in ready.plan.jobs.values()
    ]
    driver = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    run = {"driver": driver, "told": told, "settings": asdict(settings), "jobs": jobs}
    ready.store.write_run(ready.suite.name, plain(run))


def engine_of(store: Store, settings: Settings) -> LocalEngine | RayEngine:
    """The engine that the settings ask for; UsageError for demands that can never be met."""
    from harness.engine import gpus
    from harness.engine.local import LocalEngine, most_memory
    from harness.engine.supervise import Limits

    limits = Limits(settings.timeout, settings.stall)
    names = [part.strip() for part in settings.gpus.split(",") if part.strip()]
    try:
        if settings.engine == "ray":
            if names and names != ["all"]:
                raise ValueError(
                    f"--gpus {settings.gpus}: Ray itself chooses the cards; give --gpus all, and leave cards out by "
                    "CUDA_VISIBLE_DEVICES where the nodes are started"
                )
            from harness.engine.ray import RayEngine

            return RayEngine(
                store, address=settings.address, threads=settings.threads, cpus=settings.cpus,
                gpu_share=settings.gpu_share if names else 0.0, limits=limits,
            )  # fmt: skip
        slots = None if settings.cpus is None else max(1, settings.cpus // settings.threads)
        cards = gpus.find(names) if names else []
        limits = replace(limits, rss_bytes=most_memory())
        return LocalEngine(
            store, cpu_slots=slots, threads=settings.threads, gpus=cards, gpu_share=settings.gpu_share, limits=limits
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def publish(ready: Prepared, results: Mapping[str, Any], out: Path | None, as_json: bool) -> int:
    """Records, report in folder `out` (by default in the store) and the closing lines; the exit code."""
    from harness import doubts
    from harness.records import collect
    from leaderboard import report

    records = doubts.annotate(collect(ready.plan, results, ready.store))
    dropped = [plain(each) for each in ready.suite.dropped]
    folder = ready.store.run_dir(ready.suite.name) if out is None else out
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
    from leaderboard.results import keep_sheet

    told = []
    for record in records:
        sheet = record.get("sheet")
        told.append({**record, "sheet": keep_sheet(Path(sheet), folder) if sheet else None})
    return told


def summary_line(counts: Mapping[str, int], cells: int, failed: int) -> str:
    words = {"hit": "in the store", "done": "computed", "failed": "failed", "skipped": "skipped"}
    said = ", ".join(f"{counts.get(status, 0)} {word}" for status, word in words.items())
    return f"{cells} cells, {failed} failed; jobs: {said}"


def show_plan(ready: Prepared, as_json: bool) -> None:
    """The jobs in order, each a hit or a miss with the reason, and the time that the misses may take."""
    from harness import estimate

    jobs = ready.plan.jobs
    states = {key: _state(job, jobs, ready.store) for key, job in jobs.items()}
    missing = sum(job.estimate for key, job in jobs.items() if states[key] != "hit")
    absent = [key for key in jobs if states[key] != "hit"]
    if as_json:
        rows = [
            {"key": key, "kind": job.kind, "label": job.label, "state": states[key], "estimate_s": job.estimate}
            for key, job in jobs.items()
        ]
        suite = ready.suite
        gpu = {} if ready.registry is None else estimate.total(jobs, absent, ready.registry)
        told = {"jobs": rows, "cells": suite.cells, "dropped": suite.dropped, "missing_s": missing}
        print_json({**told, "gpu": gpu, "absent": ready.absent})
        return
    rows = [(key[:10], job.label, states[key], seconds(job.estimate)) for key, job in jobs.items()]
    click.echo(columns([("key", "job", "state", "estimate"), *rows]))
    for reason, cells in Counter(dropped.reason for dropped in ready.suite.dropped).items():
        click.echo(f"n/a, {cells} cells: {reason}")
    hits = sum(state == "hit" for state in states.values())
    click.echo(
        f"{len(jobs)} jobs, {hits} in the store, {len(jobs) - hits} to compute, about {seconds(missing)} of work"
    )
    for line in [] if ready.registry is None else estimate.lines(jobs, absent, ready.registry):
        click.echo(line)
    for reason in ready.absent:
        click.echo(reason)


def _state(job: Any, jobs: Mapping[str, Any], store: Store) -> str:
    if store.has(job.key):
        return "hit"
    waiting = [jobs[key].label if key in jobs else key[:10] for key in job.needs if not store.has(key)]
    if waiting:
        return f"miss: needs {waiting[0]}" + (f" and {len(waiting) - 1} more" if len(waiting) > 1 else "")
    attempts = store.attempts(job.key)
    return f"miss: failed before ({attempts[-1].get('error')})" if attempts else "miss: never computed"
