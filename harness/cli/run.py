"""`bench run` and `bench plan`: a suite from its file to its leaderboard."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import (
    Finite,
    as_json,
    columns,
    echo,
    loaded,
    note,
    opened,
    plugin_files,
    print_json,
    seconds,
    store_option,
    strict_option,
    terminal_width,
    writable,
)
from harness.cli.completion import Named, Spec
from harness.runs.jsonable import to_jsonable
from harness.runs.printable import clipped

if TYPE_CHECKING:
    from harness.engine.local import LocalEngine
    from harness.engine.ray import RayEngine
    from harness.runs.record import Record
    from harness.runs.store import Store
    from harness.runs.suite import Suite

LABEL, REASON = 64, 84  # characters of a job's label and of the reason of a miss in the table of a plan
FRONT = 10 + 8 + 3 * 2  # characters of the key, the estimate and the gaps in that table


Again = Callable[[], Mapping[str, Any]]


def suite_options(command: Any) -> Any:
    """The options by which `run` and `plan` agree on what is to be computed."""
    options = [
        click.argument("suite", default="quick", type=Named(suites=True)),
        click.option(
            "--only", multiple=True, type=Spec(), metavar="KEY=TEXT", help="Keep cells that match; repeatable."
        ),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change the suite: n=16, grid.0.n=16."),
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads per CPU job."),
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
    """A suite that has met plugins and store. `plan` is that of harness.runs.planning: `.jobs` by key, `.cells`."""

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
    from harness.runs import suite as suites

    draft = suites.read(suites.find_suite(suite), sets)
    registry = loaded(files, strict)
    expanded = suites.expand(draft, registry, only)
    for name, package in expanded.absent.items():
        note(f"left out: the cells of {name}, whose package is not installed (pip install {package})")
    if not expanded.cells:
        reasons = "; ".join(dict.fromkeys(dropped.reason for dropped in expanded.dropped))
        raise suites.SuiteError(f"{draft.path}: no cell can be run: {reasons}")
    from harness.runs import estimates, planning

    opened_store, absent = opened(store), estimates.tolerant(registry) if planned else []
    made = planning.plan(expanded, registry, threads)
    return Prepared(expanded, made, opened_store, registry, absent)


def engine_options(command: Any) -> Any:
    """The options by which `run` and `retry` say where jobs run and how long."""
    options = [
        click.option(
            "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
            help="Where jobs run: on this machine or on a Ray cluster.",
        ),
        click.option(
            "--address", metavar="ADDRESS",
            help="Ray: HOST:PORT, 'auto' for a cluster on this machine; default: RAY_ADDRESS, else a new one.",
        ),
        click.option(
            "--gpus", default="", metavar="0,1",
            help="GPUs: numbers, UUIDs or 'all' (under Ray only 'all'); none by default.",
        ),
        click.option(
            "--gpu-share", type=Finite(0, 1, min_open=True), default=1.0, show_default=True,
            help="Share of a GPU and of its memory per job; with 0.25 four jobs share a GPU.",
        ),
        click.option(
            "--cpus", type=click.IntRange(1),
            help="Processors to use; all by default. With --gpus: for jobs that use no GPU.",
        ),
        click.option(
            "--timeout", type=Finite(1), default=14400, show_default=True, help="Seconds per job, at most."
        ),
        click.option(
            "--stall", type=Finite(1), default=1800, show_default=True, help="Seconds without progress."
        ),
        click.option(
            "--max-hours", type=Finite(0, min_open=True), help="Stop after this; the same command resumes."
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
    help="Directory of the report; an earlier report is replaced; default: in the store.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be computed (bench plan).")
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
    return publish(ready, results, folder, as_json, lambda: compute(ready, settings, told, quiet=as_json))


def places(store: Store, out: Path | None) -> Path | None:
    """`out` as it is to be found from everywhere. Before anything is computed: raises StoreError for a store that
    cannot be written, click.UsageError for such a folder, and for one in which the records of a store lie."""
    from harness.runs.store import Store, StoreError

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
    show_plan(_planned(suite, only, sets, threads, store, strict, files), as_json)


def _planned(
    suite: str, only: Sequence[str], sets: Sequence[str], threads: int, store: Path | None, strict: bool, files: Any
) -> Prepared:
    """`prepare` for a plan alone. One that an earlier process has kept needs no plugin, unless figures of a rehearsal
    have to be matched with its jobs."""
    from harness.runs import kept_plans, suite as suites

    draft, opened_store = suites.read(suites.find_suite(suite), sets), opened(store)
    own = not (files or opened_store.rehearsals())
    name = kept_plans.name_of(draft, only, threads) if own else None
    kept = kept_plans.find(draft, name)
    if kept is not None:
        return Prepared(kept.suite, kept, opened_store)
    ready = prepare(suite, only, sets, threads, store, strict, files, planned=True)
    if not ready.absent and name == kept_plans.name_of(draft, only, threads):  # no file has changed meanwhile
        kept_plans.keep(draft, name, ready.suite, ready.plan, ready.registry)
    return ready


def compute(
    ready: Prepared, settings: Settings, told: Mapping[str, Any], quiet: bool, keys: set[str] | None = None
) -> Mapping[str, Any]:
    """Run the plan's jobs (those in `keys`, by default all); results by key. told: what `retry` is to tell again."""
    from harness.cli.row_lines import RowLines
    from harness.engine import display, driver

    jobs = {key: job for key, job in ready.plan.jobs.items() if keys is None or key in keys}
    most = None if settings.max_hours is None else settings.max_hours * 3600
    with engine_of(ready.store, settings) as engine:
        _remember(ready, settings, told)
        events = display.EventFile(ready.store.run_events(ready.suite.name))
        shown = display.Unharmed(display.pick())
        rows = RowLines(ready.plan, ready.store, shown.note)
        listener = events if quiet else display.Both(events, shown, rows)
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
    ready.store.write_run(ready.suite.name, to_jsonable(run))


def local_engine(store: Store, settings: Settings, memory: int | None = None, **options: Any) -> LocalEngine:
    """The engine of this machine that the settings ask for. memory: bytes of main memory that a job may use. options:
    of LocalEngine. Raises ValueError for demands that can never be met."""
    from harness.engine import gpus
    from harness.engine.local import LocalEngine, most_memory
    from harness.engine.supervise import Limits

    names = named_gpus(settings)
    slots = None if settings.cpus is None else max(1, settings.cpus // settings.threads)
    limits = Limits(settings.timeout, settings.stall, most_memory() if memory is None else memory)
    return LocalEngine(
        store, cpu_slots=slots, threads=settings.threads, gpus=gpus.find(names) if names else [],
        gpu_share=settings.gpu_share, limits=limits, **options,
    )  # fmt: skip


def named_gpus(settings: Settings) -> list[str]:
    """The GPUs that the settings name. Raises ValueError where they name none."""
    names = [part.strip() for part in settings.gpus.split(",") if part.strip()]
    if settings.gpus and not names:
        raise ValueError(f"--gpus {settings.gpus!r}: names no card; give numbers such as 0,1, or all")
    return names


def engine_of(store: Store, settings: Settings) -> LocalEngine | RayEngine:
    """The engine that the settings ask for; UsageError for demands that can never be met."""
    try:
        names = named_gpus(settings)
        if settings.engine == "ray":
            from harness.engine.supervise import Limits

            if names and names != ["all"]:
                raise ValueError(
                    f"--gpus {settings.gpus}: Ray itself chooses the cards; give --gpus all, and leave cards out by "
                    "CUDA_VISIBLE_DEVICES where the nodes are started"
                )
            from harness.engine.ray import RayEngine

            return RayEngine(
                store, address=settings.address, threads=settings.threads, cpus=settings.cpus,
                gpu_share=settings.gpu_share if names else 0.0, limits=Limits(settings.timeout, settings.stall),
            )  # fmt: skip
        return local_engine(store, settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def collected(ready: Prepared, results: Mapping[str, Any], again: Again) -> tuple[list[Record], Mapping[str, Any]]:
    """The records of a run, and its results. An artifact that turns out to be damaged when a record is made of it has
    been set aside: `again` builds it. One that is damaged again after that is an error."""
    from harness.runs.records import collect
    from harness.runs.store import CorruptArtifact, MissingArtifact

    built: set[str] = set()
    while True:
        try:
            return collect(ready.plan, results, ready.store), results
        except (CorruptArtifact, MissingArtifact) as error:
            if error.key in built:
                raise
            what = f"was damaged ({error.file})" if isinstance(error, CorruptArtifact) else "is gone"
            note(f"artifact {error.key[:12]} {what}; building it again")
            built.add(error.key)
        results = again()


def publish(ready: Prepared, results: Mapping[str, Any], out: Path | None, as_json: bool, again: Again) -> int:
    """Records, report in folder `out` (by default in the store) and the closing lines; the exit code. again: run the
    plan's missing jobs; their results."""
    from leaderboard import report

    dropped = ready.suite.dropped
    folder = ready.store.run_dir(ready.suite.name) if out is None else out
    made, results = collected(ready, results, again)
    records = _with_sheets(made, folder)
    paths = report.write(records, dropped, folder)
    counts = Counter(result.status for result in results.values())
    failed = [record for record in records if record.error]
    if as_json:
        summary = {"suite": ready.suite.name, "jobs": counts, "failed_cells": len(failed), "paths": paths}
        print_json({**summary, "records": records, "dropped": dropped})
    else:
        echo(report.terminal(records, dropped, terminal_width() or report.WIDTH))
        echo("\n" + columns([(name, str(path)) for name, path in paths.items()]))
        echo(summary_line(counts, len(records), len(failed)))
    return Exit.failed if failed else Exit.ok


def _with_sheets(records: Sequence[Record], folder: Path) -> list[Record]:
    """The records with copies of their contact sheets below `folder`, named relative to it: a record is to be read
    elsewhere, where the store is not."""
    from leaderboard.results import keep_sheet

    kept = {record.key: keep_sheet(Path(record.sheet), folder) for record in records if record.sheet}
    return [record.model_copy(update={"sheet": kept.get(record.key)}) for record in records]


def summary_line(counts: Mapping[str, int], cells: int, failed: int) -> str:
    words = {"hit": "in the store", "done": "computed", "failed": "failed", "skipped": "skipped"}
    said = ", ".join(f"{counts.get(status, 0)} {word}" for status, word in words.items())
    return f"{cells} cells, {failed} failed; jobs: {said}"


def _widths(width: int | None, longest: int) -> tuple[int, int]:
    """Characters of a label and of a reason in lines of `width`: reasons, the longest of which is given, may take half
    of the room, and labels take what they leave."""
    if width is None:
        return LABEL, REASON
    label = max(20, min(LABEL, width - FRONT - min(longest, (width - FRONT) // 2)))
    return label, max(20, width - FRONT - label)


def show_plan(ready: Prepared, as_json: bool) -> None:
    """The jobs in order, each a hit or a miss with the reason, and the time that the misses may take: as rehearsed,
    where the store has figures of a rehearsal."""
    from dataclasses import replace

    from harness.runs import estimates, rehearsal
    from harness.runs.explain import Explainer

    jobs = ready.plan.jobs
    said = {} if ready.registry is None else rehearsal.predicted(jobs, ready.registry, ready.store)
    jobs = {key: replace(job, estimate=said[key].seconds[1]) if key in said else job for key, job in jobs.items()}
    explainer = Explainer(ready.store, jobs)
    found = {key: explainer.why(key) for key in jobs}
    states = {key: "hit" if why.reason == "in the store" else f"miss: {why.text}" for key, why in found.items()}
    absent = [key for key in jobs if states[key] != "hit"]
    missing = sum(jobs[key].estimate for key in absent)
    if as_json:
        rows = [
            {"key": key, "kind": job.kind, "label": job.label, "state": states[key], "estimate_s": job.estimate,
             "rehearsed": {"device": said[key].device, "seconds": said[key].seconds} if key in said else None,
             "why": found[key]}
            for key, job in jobs.items()
        ]  # fmt: skip
        suite = ready.suite
        gpu = {} if ready.registry is None else estimates.total(jobs, absent, ready.registry)
        told = {"jobs": rows, "cells": suite.cells, "dropped": suite.dropped, "missing_s": missing}
        print_json({**told, "gpu": gpu, "absent": ready.absent})
        return
    label, reason = _widths(terminal_width(), max(map(len, states.values()), default=0))
    rows = [
        (key[:10], seconds(job.estimate) + "*" * (key in said), clipped(job.label, label), clipped(states[key], reason))
        for key, job in jobs.items()
    ]
    echo(columns([("key", "estimate", "job", "state"), *rows]))
    for reason, cells in Counter(dropped.reason for dropped in ready.suite.dropped).items():
        echo(f"n/a, {cells} cells: {reason}")
    hits = len(jobs) - len(absent)
    echo(f"{len(jobs)} jobs, {hits} in the store, {len(absent)} to compute, about {seconds(missing)} of work")
    for line in rehearsal.lines(said, absent):
        echo(line)
    for line in [] if ready.registry is None else estimates.lines(jobs, absent, ready.registry):
        echo(line)
    for reason in ready.absent:
        echo(reason)
