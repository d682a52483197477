"""`bench store`: what the store holds, why something is not in it, whether it is whole, and what may go."""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from harness.cli import Exit
from harness.cli.common import (
    Finite,
    as_json,
    columns,
    echo,
    note,
    opened,
    plugin_files,
    print_json,
    size,
    store_option,
)
from harness.runs.job import Kind
from harness.runs.printable import one_line

if TYPE_CHECKING:
    from harness.cli.run import Prepared
    from harness.runs.explain import Explainer, Why
    from harness.runs.inventory import Entry, Total
    from harness.runs.store import Store

DAY = 86400.0
DIGITS, LISTED, WIDTH = 10, 20, 100


@click.group(invoke_without_command=True, short_help="What the store holds; verify it, clear it.")
@store_option
@as_json
@click.pass_context
def store(ctx: click.Context, store: Path | None, as_json: bool) -> None:
    """The store keeps the result of every job, so that nothing is computed twice.

    Without a subcommand: the kinds of artifacts, their number, bytes and last use (bench store ls).
    """
    if ctx.invoked_subcommand is None:
        _list(opened(store), as_json)
        return
    for name in ("store", "as_json"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = "--json" if name == "as_json" else "--store"
            raise click.UsageError(f"give {option} after {ctx.invoked_subcommand}", ctx)


# ---- ls -------------------------------------------------------------------------------------------------------------


@store.command(short_help="Artifacts by kind, bytes, last use.")
@store_option
@as_json
def ls(store: Path | None, as_json: bool) -> None:
    """List the kinds of artifacts with their number, their bytes and when they were used last."""
    _list(opened(store), as_json)


def _list(where: Store, as_json: bool) -> None:
    from harness.runs.inventory import entries, leftovers, totals

    kinds, other = totals(entries(where)), leftovers(where)
    if as_json:
        print_json({"store": where.root, "kinds": kinds, "leftovers": other})
        return
    echo(where.root)
    if not kinds and not other:
        echo("no artifacts; bench run makes some")
        return
    rows = [(t.kind, str(t.number), size(t.size), _day(t.oldest), _day(t.newest)) for t in [*kinds, *other]]
    echo(columns([("kind", "number", "size", "oldest use", "newest use"), *rows]))
    echo(f"{sum(t.number for t in kinds)} artifacts, {size(sum(t.size for t in kinds))}")
    if other:
        echo(f"bench store gc removes drafts and damaged artifacts: {size(sum(t.size for t in other))}")


def _day(when: float | None) -> str:
    return "" if when is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


# ---- explain --------------------------------------------------------------------------------------------------------


@store.command(short_help="What an artifact is made of, or why it is not there.")
@click.argument("key")
@click.option("--suite", help="Where to look for a job that is not in the store; by default the newest run.")
@plugin_files
@store_option
@as_json
def explain(key: str, suite: str | None, files: tuple[Path, ...], store: Path | None, as_json: bool) -> None:
    """Say what went into the artifact whose key begins with KEY, and what uses it.

    If it is not in the store, KEY is looked up in the plan of a suite, and the nearest artifact that is in the store
    is named with all that differs: code, parameters, weights, inputs. (bench plan and bench status show keys.)
    """
    where = opened(store)
    _check_beginning(key)
    whole = _one(key, [found for found in where.folders() if found.startswith(key) and where.has(found)])
    if whole is not None:
        _show_artifact(where, whole, as_json)
        return
    from harness.runs.explain import Explainer

    ready = _planned(where, suite, files)
    jobs = ready.plan.jobs
    missing = _one(key, [found for found in jobs if found.startswith(key)])
    if missing is None:
        raise click.UsageError(
            f"no artifact in {where.root} and no job of {ready.suite.name} has a key that begins with {key!r}; "
            "bench plan shows keys, --suite names another suite"
        )
    _show_miss(Explainer(where, jobs), missing, as_json)


def _check_beginning(key: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{1,64}", key):
        raise click.UsageError(f"{key!r} is no beginning of a key: lower-case hex digits, as bench plan shows them")


def _one(beginning: str, fits: Sequence[str]) -> str | None:
    """The one key that fits; None if there is none. Raises click.UsageError for several."""
    if len(fits) > 1:
        shown = ", ".join(found[: max(DIGITS, len(beginning) + 4)] for found in fits[:5])
        raise click.UsageError(f"{len(fits)} keys begin with {beginning!r} ({shown}); give more digits")
    return fits[0] if fits else None


def _planned(where: Store, suite: str | None, files: tuple[Path, ...]) -> Prepared:
    """The plan of a suite; by default that of the newest run, as it was asked for."""
    from harness.cli.run import prepare
    from harness.cli.status import run_of

    if suite is not None:
        return prepare(suite, (), (), 1, where.root, False, files, planned=True)
    if not where.runs():
        raise click.UsageError(f"{where.root} holds no such artifact and no run; name a suite by --suite")
    _, run = run_of(where, None)
    told = run["told"]
    files = (*map(Path, told["files"]), *files)
    return prepare(
        told["suite"], told["only"], told["sets"], run["settings"]["threads"], where.root, False, files, planned=True
    )


def _show_artifact(where: Store, key: str, as_json: bool) -> None:
    from harness.runs.inventory import entries

    found = {entry.key: entry for entry in entries(where)}
    entry = found[key]
    users = [other for other in found.values() if key in other.inputs]
    if as_json:
        print_json({
            "key": key, "in_store": True, "kind": entry.kind, "label": entry.label, "bytes": entry.size,
            "created": entry.created, "used": entry.used, "path": where.artifact(key),
            "ingredients": entry.ingredients, "used_by": [{"key": e.key, "label": e.label} for e in users],
        })  # fmt: skip
        return
    echo(f"{key[:DIGITS]} {entry.label}")
    echo(
        f"in the store: {size(entry.size)} in {entry.files} files, made {_day(entry.created)}, "
        f"last used {_day(entry.used)}\n{where.artifact(key)}"
    )
    echo("went into it:")
    echo(columns(list(_went_in(entry, found)), "  ") or "  unknown; it was made before this was kept")
    echo("used by:" if users else "used by no other artifact")
    rows = [(each.key[:DIGITS], each.label) for each in users[:LISTED]]
    if rows:
        echo(columns(rows, "  "))
    if users[LISTED:]:
        echo(f"  and {len(users) - LISTED} more")


def _went_in(entry: Entry, found: Mapping[str, Entry]) -> Iterable[tuple[str, str]]:
    """The ingredients by name, in words; code last."""
    from harness.runs.explain import INPUTS

    for name, value in entry.ingredients.items():
        if name not in (*INPUTS, "code", "kind", "metrics") and value is not None:
            yield name, _words(value)
    metrics = entry.ingredients.get("metrics")
    if isinstance(metrics, Mapping):
        yield from _wrapped("metrics", metrics)
    for key in entry.inputs:
        yield "input", f"{key[:DIGITS]} {found[key].label if key in found else '(no longer in the store)'}"
    code = entry.ingredients.get("code")
    if isinstance(code, Mapping):
        yield from _wrapped("code", code)


def _wrapped(name: str, of: Iterable[str]) -> Iterable[tuple[str, str]]:
    for i, line in enumerate(textwrap.wrap(", ".join(map(str, of)), WIDTH, break_on_hyphens=False)):
        yield name if i == 0 else "", line


def _words(value: Any) -> str:
    """`{"spec": "box", "version": 1}` → "box, version 1"."""
    if isinstance(value, Mapping):
        return ", ".join(_words(v) if k == "spec" else f"{k} {_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "; ".join("none" if part is None else _words(part) for part in value)
    text = one_line(value)
    return text[:DIGITS] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _show_miss(explainer: Explainer, key: str, as_json: bool) -> None:
    why, jobs = explainer.why(key), explainer.jobs
    roots = _roots(explainer, key) if why.reason == "needs" else {}
    if as_json:
        job = jobs[key]
        missing = [{"key": root, "label": jobs[root].label, "why": each} for root, each in roots.items()]
        print_json({
            "key": key, "in_store": False, "kind": job.kind, "label": job.label, "why": why, "missing": missing,
        })  # fmt: skip
        return
    echo(f"{key[:DIGITS]} {jobs[key].label}")
    echo(f"not in the store: {why.text}")
    _show_differences(why)
    for root, each in roots.items():
        echo(f"{root[:DIGITS]} {jobs[root].label}: {each.text}")
        _show_differences(each, "  ")


def _show_differences(why: Why, indent: str = "") -> None:
    if why.nearest is not None:
        echo(f"{indent}what differs from {why.nearest[:DIGITS]}:")
        for each in why.differences:
            echo(f"{indent}  {each.text}")


def _roots(explainer: Explainer, key: str) -> dict[str, Why]:
    """The missing jobs upstream of `key` that wait for nothing themselves, and why they are missing."""
    found: dict[str, Why] = {}
    left, seen = [key], {key}
    while left:
        current = left.pop()
        why = explainer.why(current)
        if why.reason != "needs":
            found[current] = why
        new = [need for need in why.needs if need in explainer.jobs and need not in seen]
        seen.update(new)
        left += new
    return found


# ---- verify ---------------------------------------------------------------------------------------------------------


@store.command(short_help="Check the digests of all artifacts.")
@click.argument("keys", nargs=-1)
@click.option("--set-aside", is_flag=True, help="Move damaged artifacts away, so that the next run builds them again.")
@store_option
@as_json
def verify(keys: tuple[str, ...], set_aside: bool, store: Path | None, as_json: bool) -> int:
    """Read every file of all artifacts, or of those whose keys begin with KEYS, and compare its digest.

    The exit code is 5 if any is damaged.
    """
    where = opened(store)
    wanted = _fitting(where, keys)
    damaged: dict[str, list[str]] = {}
    with click.progressbar(wanted, label="verifying", file=sys.stderr) as bar:
        for key in bar:
            files = where.verify(key)
            if files:
                damaged[key] = files
    for key in damaged if set_aside else ():
        where.set_aside(key)
    if as_json:
        print_json({"store": where.root, "verified": len(wanted), "damaged": damaged, "set_aside": set_aside})
    else:
        for key, files in damaged.items():
            echo(f"{key[:DIGITS]} damaged: {', '.join(files)}")
        echo(f"{len(wanted)} artifacts, {len(damaged)} damaged")
        if damaged:
            echo(
                "set aside; bench run builds them again, bench store gc removes them"
                if set_aside
                else "bench store verify --set-aside moves them away, so that bench run builds them again"
            )
    return Exit.mismatch if damaged else Exit.ok


def _fitting(where: Store, beginnings: tuple[str, ...]) -> list[str]:
    folders = where.folders()
    if not beginnings:
        return folders
    for beginning in beginnings:
        _check_beginning(beginning)
        if not any(key.startswith(beginning) for key in folders):
            raise click.UsageError(f"no artifact in {where.root} has a key that begins with {beginning!r}")
    return [key for key in folders if key.startswith(beginnings)]


# ---- gc -------------------------------------------------------------------------------------------------------------


@store.command(short_help="Remove what is left over, and what is old.")
@click.option(
    "--older-than",
    "days",
    type=Finite(0),
    metavar="DAYS",
    help="Also remove artifacts that nobody used for so many days.",
)
@click.option("--keep", multiple=True, metavar="SUITE", help="But none that this suite needs; repeatable.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(get_args(Kind)), help="Only of this kind; repeatable."
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@plugin_files
@store_option
@as_json
def gc(
    days: float | None,
    keep: tuple[str, ...],
    kinds: tuple[str, ...],
    dry_run: bool,
    files: tuple[Path, ...],
    store: Path | None,
    as_json: bool,
) -> None:
    """Remove drafts of dead processes and artifacts that were set aside as damaged.

    With --older-than also whole artifacts, which a later run computes again if it needs them. What a run that is
    going on holds or needs always stays. Records and reports stay, too.
    """
    if days is None and (keep or kinds):
        raise click.UsageError("--keep and --kind choose among old artifacts; give --older-than DAYS with them")
    from harness.runs.inventory import leftovers, totals

    where = opened(store)
    old = [] if days is None else _old(where, days, _needed(where, keep, files) | _busy(where), kinds)
    removed = [*leftovers(where), *totals(old)]
    if not dry_run:
        where.gc()
        for entry in old:
            where.remove(entry.key)
    if as_json:
        print_json({
            "store": where.root, "dry_run": dry_run, "bytes": sum(t.size for t in removed), "removed": removed,
            "keys": [entry.key for entry in old],
        })  # fmt: skip
        return
    _show_removed(removed, dry_run)


def _show_removed(removed: Sequence[Total], dry_run: bool) -> None:
    if removed:
        rows = [(t.kind, str(t.number), size(t.size)) for t in removed]
        echo(columns([("kind", "number", "size"), *rows]))
    number, total = sum(t.number for t in removed), size(sum(t.size for t in removed))
    echo(f"would remove {number}, {total}" if dry_run else f"removed {number}, {total}")


def _old(where: Store, days: float, protected: set[str], kinds: Sequence[str]) -> list[Entry]:
    from harness.runs.inventory import entries

    before = time.time() - days * DAY
    return [
        entry
        for entry in entries(where)
        if entry.used <= before and entry.key not in protected and (not kinds or entry.kind in kinds)
    ]


def _needed(where: Store, suites: Sequence[str], files: tuple[Path, ...]) -> set[str]:
    """The keys of all jobs of these suites as planned now, and as their last runs planned them."""
    from harness.cli.run import prepare

    found: set[str] = set()
    for suite in suites:
        ready = prepare(suite, (), (), 1, where.root, False, files, planned=True)
        if ready.absent:
            note(f"warning: {suite}: {'; '.join(ready.absent)}")
        found.update(ready.plan.jobs)
        found.update(_jobs_of(where.run(ready.suite.name)))
    return found


def _busy(where: Store) -> set[str]:
    """What runs that go on may still read: all jobs of theirs, and what jobs that are held anywhere need."""
    from harness.engine.state import is_held

    held = {key for key in where.lock_keys() if is_held(where, key)}
    found = set(held)
    for name in where.runs():
        run = where.run(name)
        jobs = _jobs_of(run)
        if run is not None and _goes_on(run["driver"]):
            found.update(jobs)
        for key in held.intersection(jobs):
            found.update(jobs[key])
    return found


def _goes_on(driver: Mapping[str, Any]) -> bool:
    """Whether a run's driver lives. On another machine that cannot be seen: only a young one counts there."""
    from harness.cli.status import lives
    from harness.runs.store import FOREIGN_S

    living = lives(driver)
    return driver["started"] > time.time() - FOREIGN_S if living is None else living


def _jobs_of(run: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Key → keys that it needs, of the jobs of a run that the store remembers."""
    return {} if run is None else {job["key"]: list(job["needs"]) for job in run["jobs"]}
