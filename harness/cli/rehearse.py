"""`bench rehearse`: every distinct job of a suite at its true size for two steps, before it is run for days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import Finite, columns, echo, note, opened, print_json, seconds, size
from harness.cli.run import local_engine, places, prepare, suite_options
from harness.runs.printable import clipped

if TYPE_CHECKING:
    from harness.cli.run import Prepared, Settings
    from harness.runs.rehearsal import Costs, Figure, Group, Room
    from harness.runs.store import Store

LABEL, TAIL = 60, 12  # characters of a job's label, lines of a failed job's log


@click.command(short_help="Run two steps of every distinct job of a suite at its true size.")
@suite_options
@click.option("--gpus", default="", metavar="0", help="GPU on which to rehearse; none by default.")
@click.option("--timeout", type=Finite(1), default=7200, show_default=True, help="Seconds per rehearsed job, at most.")
@click.option(
    "--memory",
    type=Finite(0, min_open=True),
    help="GB of main memory per job; default: 0.9 of the machine's or container's.",
)
@click.option(
    "--rows", type=click.IntRange(0), metavar="N",
    help="Rows that a network gets at once, 0 = all; default: all on a GPU, else few, by its size.",
)  # fmt: skip
@click.option("--again", is_flag=True, help="Also rehearse what has figures.")
def rehearse(
    suite: str, only: tuple[str, ...], sets: tuple[str, ...], threads: int, store: Path | None, strict: bool,
    files: tuple[Path, ...], as_json: bool, gpus: str, timeout: float, memory: float | None, rows: int | None,
    again: bool,
) -> int:  # fmt: skip
    """Rehearse SUITE: run one job of each cost for two steps, with random weights where the published ones are not on
    this machine, and say what each job takes. Run again, it resumes."""
    from harness.runs import rehearsal

    kept = opened(store)
    places(kept, None)
    ready = prepare(suite, only, sets, threads, store, strict, files, planned=True)
    costs = rehearsal.Costs(ready.plan.jobs, ready.registry)
    groups = costs.groups()
    name = rehearsal.device(bool(gpus), threads)
    figures = rehearsal.read_figures(kept, name)
    code = {group.signature: rehearsal.code_of(ready.plan.jobs[group.first]) for group in groups}
    done = {
        group.signature
        for group in groups
        if (found := figures.get(group.signature)) and found.error is None and found.code == code[group.signature]
    }
    left = groups if again else [group for group in groups if group.signature not in done]
    note(
        f"{len(ready.plan.jobs)} jobs of {len(groups)} costs; {len(groups) - len(left)} were rehearsed before on {name}"
    )
    settings = _settings(gpus, timeout, threads)
    if left:
        figures |= _run(ready, costs, groups, left, settings, memory, rows, kept, name, figures, quiet=as_json)
    told = _rows(ready, costs, groups, figures, memory)
    if as_json:
        print_json(_told(ready, name, told))
    else:
        _show(name, told)
    return Exit.failed if any(row["error"] for row in told) else Exit.ok


def _settings(gpus: str, timeout: float, threads: int) -> Settings:
    from harness.cli.run import Settings

    return Settings("local", None, gpus, 1.0, threads, timeout, timeout, None, threads)


def _run(
    ready: Prepared, costs: Costs, groups: Sequence[Group], left: Sequence[Group], settings: Settings,
    memory: float | None, rows: int | None, kept: Store, name: str, figures: dict[str, Figure], quiet: bool,
) -> dict[str, Figure]:  # fmt: skip
    """Rehearse the jobs of `left`, and those that they need. Figures are written whenever a job has ended."""
    from harness.engine import display, driver
    from harness.runs import rehearsal

    asked = 0 if rows is None else rows or -1
    short = rehearsal.short_jobs(ready.plan, costs, groups, bool(settings.gpus), asked)
    wanted = {group.signature for group in left}
    jobs = {key: job for key, (group, job) in short.items() if group.signature in wanted}
    for key, (_, job) in reversed(short.items()):  # what the wanted jobs need, too; needs come first
        if any(key in each.needs for each in jobs.values()):
            jobs[key] = job
    jobs = {key: job for key, (_, job) in short.items() if key in jobs}
    work = kept.rehearsal_store()

    def keep(key: str, error: str | None) -> None:
        group, _ = short[key]
        manifest = work.manifest(key) if error is None else None
        figures[group.signature] = rehearsal.figure(ready.plan.jobs[group.first], costs, manifest, error)
        rehearsal.write_figures(kept, name, figures)

    class Keeping(display.Silent):
        def finished(self, job: Any, status: str, error: str | None, seconds: float, advice: str | None) -> None:
            keep(job.key, error if status in ("failed", "skipped") else None)

    try:
        made = local_engine(work, settings, None if memory is None else int(memory * 1e9), execute=rehearsal.EXECUTE)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with made as engine:
        shown = [] if quiet else [display.Unharmed(display.pick())]
        listener = display.Both(Keeping(), *shown)
        try:
            results = driver.run(jobs, work, engine, listener=listener)
        finally:
            listener.close()
    for key, result in results.items():
        keep(key, None if result.ok else result.error or "failed")
    failed = [(short[key][1], result) for key, result in results.items() if result.status == "failed"]
    for job, result in failed:
        note(f"{job.label} failed: {result.error}\n{_tail(work, job.key, len(result.attempts))}")
    if not failed:
        for key in results:
            work.remove(key)
    return figures


def _tail(work: Store, key: str, attempt: int) -> str:
    """The last lines of a failed job's log."""
    path = work.log_path(key, max(1, attempt or len(work.attempts(key))))
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    except OSError:
        return f"  no log at {path}"
    return "\n".join([f"  {line}" for line in lines] + [f"  log: {path}"])


def _rows(
    ready: Prepared, costs: Costs, groups: Sequence[Group], figures: Mapping[str, Figure], memory: float | None
) -> list[dict[str, Any]]:
    """What is told of each group: its figure, the hours of its jobs, the memory that the first of them needs."""
    from harness.engine.local import most_memory
    from harness.runs import rehearsal

    host, gpu = memory * 1e9 if memory else float(most_memory()), rehearsal.gpu_memory()
    told = []
    for group in groups:
        found = figures.get(group.signature)
        label = ready.plan.jobs[group.first].label
        row: dict[str, Any] = {"label": label, "jobs": len(group.members), "members": group.members, "error": None}
        if found is None or found.error is not None:
            told.append({**row, "error": "not rehearsed" if found is None else found.error})
            continue
        every = [rehearsal.expected(found, costs.lengths(key)) for key in group.members]
        need: Room = rehearsal.room(found, group.first, costs, host, gpu)
        main = found.main
        told.append(
            {
                **row, "phase": main and main["phase"], "passes": main and main["total"], "pass_s": found.pass_s(),
                "host_bytes": found.host_bytes, "device_bytes": found.device_bytes, "rows": found.rows,
                "rehearsed_s": found.wall_s, "seconds": [sum(each[k] for each in every) for k in range(3)],
                "longest_s": max(each[1] for each in every), "needs_host_bytes": need.host,
                "needs_device_bytes": need.gpu, "fits": need.fits,
                "remedy": None if need.fits else rehearsal.remedy(group.first, costs),
            }
        )  # fmt: skip
    return told


def _told(ready: Prepared, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = [sum(row["seconds"][k] for row in rows if not row["error"]) for k in range(3)]
    return {"suite": ready.suite.name, "device": name, "seconds": total, "groups": rows}


def _show(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    header = ("jobs", "a pass", "passes", "peak", "needs", "all jobs", "job that is rehearsed")
    echo(columns([header, *(_line(row) for row in rows)]))
    good = [row for row in rows if not row["error"]]
    low, likely, high = (sum(row["seconds"][k] for row in good) for k in range(3))
    longest = max((row["longest_s"] for row in good), default=0.0)
    echo(
        f"{len(rows)} rehearsed jobs stand for {sum(row['jobs'] for row in rows)}, on {name}: {seconds(likely)} "
        f"({seconds(low)} to {seconds(high)}); the longest job: {seconds(longest)}"
    )
    if any(row["rows"] for row in good):
        echo("without a GPU: networks took few rows at once, in fp32; the time and the memory of the others are added")
    for row in good:
        if not row["fits"]:
            need = row["needs_device_bytes"] or row["needs_host_bytes"]
            echo(f"would not fit: {row['label']} needs about {size(need)}; {row['remedy']}")
    for row in rows:
        if row["error"]:
            echo(f"failed: {row['label']}: {row['error']}")


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    label = clipped(row["label"], LABEL)
    if row["error"]:
        return str(row["jobs"]), "", "", "", "", "failed", label
    low, likely, high = row["seconds"]
    held = row["device_bytes"] or row["host_bytes"]
    need = row["needs_device_bytes"] or row["needs_host_bytes"]
    one = "" if row["pass_s"] is None else f"{row['pass_s']:.3g} s {row['phase']}"
    return (
        str(row["jobs"]), one, "" if row["passes"] is None else f"{row['passes']}", size(held), size(need),
        f"{seconds(likely)} ({seconds(low)} to {seconds(high)})", label,
    )  # fmt: skip
