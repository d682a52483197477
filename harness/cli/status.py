"""`bench status`, `bench logs` and `bench retry`: a run during and after its execution, from its store alone."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from harness.cli import Exit
from harness.cli.common import as_json, echo, note, opened, print_json, seconds, store_option
from harness.cli.completion import Named
from harness.cli.run import Settings, compute, engine_options, places, prepare, publish
from harness.cli.streams import lost
from harness.registry import did_you_mean

if TYPE_CHECKING:
    from harness.engine.state import JobState
    from harness.runs.store import Store

FOLLOW_S = 2.0
LOG_S = 0.3
LISTED = 40  # jobs up to which all are shown


@click.command(short_help="The state of a run, live or finished.")
@click.argument("suite", required=False, type=Named(suites=True))
@click.option("-f", "--follow", is_flag=True, help="Refresh until the run ends.")
@click.option("--all", "whole", is_flag=True, help=f"Show every job, also of more than {LISTED}.")
@store_option
@as_json
def status(suite: str | None, follow: bool, whole: bool, store: Path | None, as_json: bool) -> int:
    """Show for each job of SUITE's last run (default: the newest run) what it does or how it ended.

    If there are many jobs, only running and failed jobs are shown; --all shows every job.
    """
    where = opened(store)
    name, run = run_of(where, suite)
    while True:
        living = lives(run["driver"])
        found = _states(where, run)
        if as_json:
            print_json({"suite": name, "driver": run["driver"], "running": living, "jobs": found})
        else:
            if follow:
                click.clear()
            echo(_page(where, name, run, living, found, whole))
        goes_on = living is not False and any(job.state in ("running", "waiting") for job in found)
        if not (follow and goes_on) or lost(sys.stdout):
            return Exit.failed if any(job.state == "failed" for job in found) else Exit.ok
        time.sleep(FOLLOW_S)


def run_of(store: Store, suite: str | None) -> tuple[str, dict[str, Any]]:
    """Name and stored state of the last run of a suite (its name or its file), by default of the newest run.

    Raises click.UsageError if there is none, StoreError if it cannot be read.
    """
    runs = store.runs()
    name = Path(suite).name.removesuffix(".toml") if suite else runs[-1] if runs else None
    run = store.run(name) if name in runs else None
    if name is None or run is None:
        known = (
            f"{did_you_mean(name or '', runs)} there are {', '.join(runs)}" if runs else "; compute one with bench run"
        )
        raise click.UsageError(f"no run {name or ''} in {store.root}{known}")
    return name, run


def _states(store: Store, run: Mapping[str, Any]) -> list[JobState]:
    from harness.engine.state import states

    return states(store, run)


def lives(driver: Mapping[str, Any]) -> bool | None:
    """Whether the driver of the run is alive; None if it ran on another machine, where this cannot be determined."""
    if driver["host"] != socket.gethostname():
        return None
    import psutil

    try:
        return psutil.Process(driver["pid"]).create_time() <= driver["started"]
    except psutil.Error:
        return False


def _page(
    store: Store, name: str, run: Mapping[str, Any], living: bool | None, found: Sequence[JobState], whole: bool
) -> str:
    from harness.engine.state import newest_remaining

    counts = Counter(job.state for job in found)
    shown = _shown(found, whole)
    rest = "" if len(shown) == len(found) else "; --all shows each"
    driver = run["driver"]
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(driver["started"]))
    how = {True: "running", False: "over", None: "started"}[living]
    lines = [f"{name}: {how}, process {driver['pid']} on {driver['host']}, since {since}"]
    lines.append(f"{len(found)} jobs: " + ", ".join(f"{n} {state}" for state, n in counts.items()) + rest)
    left = newest_remaining(store, name) if living else None
    if left is not None:
        lines.append(f"about {seconds(max(left[1] - (time.time() - left[0]), 0.0))} left")
    for job in shown:
        lines.append(f"  {job.state:<7} {job.key[:10]} {job.label}{_story(job)}")
        lines += [f"          {job.advice}"] if job.advice else []
    if living is False and counts["waiting"] + counts["lost"]:
        lines.append(f"unfinished: bench retry {name} resumes it")
    return "\n".join(lines)


def _shown(found: Sequence[JobState], whole: bool) -> list[JobState]:
    """Every job; if there are many, those that run and then those that failed."""
    if whole or len(found) <= LISTED:
        return list(found)
    running = [job for job in found if job.state == "running"]
    return running + [job for job in found if job.state in ("failed", "lost")]


def _story(job: JobState) -> str:
    """What a job does, or why it failed."""
    from harness.engine.display import describe, first_line

    if job.state == "running":
        ran = seconds(time.time() - job.started) if job.started else "?"
        does = f" {describe(job.event)}," if job.event else ""
        return f":{does} for {ran}"
    if job.state in ("failed", "lost"):
        why = first_line(job.error) or "its driver died; the next run tries it again"
        return f": {job.failure} {why}" if job.failure else f": {why}"
    return ""


@click.command(short_help="The output of a job.")
@click.argument("key")
@click.option("-f", "--follow", is_flag=True, help="Follow the output while the job runs.")
@click.option("--attempt", type=click.IntRange(1), help="Which attempt; the newest by default.")
@store_option
def logs(key: str, follow: bool, attempt: int | None, store: Path | None) -> None:
    """Print the log of the job whose key begins with KEY (bench plan and bench status show keys)."""
    where = opened(store)
    whole = _job(where, key)
    number = attempt or max(len(where.attempts(whole)), 1)
    path = where.log_path(whole, number)
    if not path.exists() and not follow:
        raise click.UsageError(f"job {whole[:12]} has no log of attempt {number}")
    from harness.engine.state import is_held

    offset = 0
    while True:
        running = follow and is_held(where, whole)  # before reading: what it writes last is read, too
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                text = file.read()
            offset += len(text)
            echo(text.decode(errors="replace"), nl=False)
        if not running or lost(sys.stdout):
            break
        time.sleep(LOG_S)
    if not offset:
        note(f"job {whole[:12]} printed nothing in attempt {number}")


def _job(store: Store, beginning: str) -> str:
    fits = store.job_keys(beginning)
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise click.UsageError(f"no job's key begins with {beginning!r}; bench status shows them")
    raise click.UsageError(
        f"{len(fits)} jobs' keys begin with {beginning!r}: {', '.join(key[:12] for key in fits[:5])}"
    )


@click.command(short_help="Run failed jobs again with the same settings.")
@click.argument("suite", required=False, type=Named(suites=True))
@click.argument("keys", nargs=-1)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory of the report; default: that of the run.")
@engine_options
@store_option
@as_json
@click.pass_context
def retry(
    ctx: click.Context,
    suite: str | None,
    keys: tuple[str, ...],
    out: Path | None,
    store: Path | None,
    as_json: bool,
    **where: Any,
) -> int:
    """Run what SUITE's last run (default: the newest) did not finish, with the same options unless others are given.

    With KEYS (or their beginnings), run only these jobs, what they need and what needs them.
    """
    root = opened(store)
    name, run = run_of(root, suite)
    given = {
        name: value for name, value in where.items() if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if run["settings"].keys() != {field.name for field in fields(Settings)}:
        raise click.UsageError(f"{name} was run by another version, with other options; run it again with bench run")
    settings = Settings(**{**run["settings"], **given})
    told = run["told"]
    remembered = Path(told["out"]) if told.get("out") else None
    folder = places(root, out or remembered)
    told = {**told, "out": folder}
    files = tuple(Path(file) for file in told["files"])
    ready = prepare(told["suite"], told["only"], told["sets"], settings.threads, root.root, False, files)
    wanted = None if not keys else _around({_planned(ready.plan.jobs, key) for key in keys}, ready.plan.jobs)

    def again() -> dict[str, Any]:
        done = dict(compute(ready, settings, told, quiet=as_json, keys=wanted))
        return {key: done[key] if key in done else _left(ready.store, key) for key in ready.plan.jobs}

    return publish(ready, again(), folder, as_json, again)


def _planned(jobs: Mapping[str, Any], beginning: str) -> str:
    fits = [key for key in jobs if key.startswith(beginning)]
    if len(fits) != 1:
        raise click.UsageError(f"{len(fits)} jobs of the run have keys that begin with {beginning!r}; see bench status")
    return fits[0]


def _around(keys: set[str], jobs: Mapping[str, Any]) -> set[str]:
    """The keys, all that they need and all that needs them, with what that needs."""
    wanted = set(keys)
    while True:
        above = {key for key, job in jobs.items() if keys.intersection(job.needs)}
        if above <= keys:
            break
        keys = keys | above
    wanted |= keys
    while True:
        below = {need for key in wanted for need in jobs[key].needs if need in jobs}
        if below <= wanted:
            return wanted
        wanted |= below


def _left(store: Store, key: str) -> Any:
    """The state of a job that this run was not to run."""
    from harness.engine.driver import JobResult
    from harness.engine.failures import known
    from harness.runs.job import Failure

    attempts = tuple(store.attempts(key))
    if store.has(key):
        return JobResult(key, "hit", attempts=attempts)
    if attempts and attempts[-1]["status"] == "failed":
        return JobResult(key, "failed", attempts[-1].get("error"), known(attempts[-1].get("failure")), attempts)
    reason = "it was not asked for"
    return JobResult(key, "skipped", f"skipped: {reason}", Failure.skipped, attempts, reason=reason)
