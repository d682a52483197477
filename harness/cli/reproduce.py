"""`bench reproduce`: one row of the leaderboard, run again from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.again import suite_of
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
    store_option,
)
from harness.cli.leaderboard import read_results, results_option
from harness.registry import RegistryError

if TYPE_CHECKING:
    from harness.cli.run import Prepared
    from harness.runs.record import Record
    from leaderboard.attestation import Again, Attestation
    from leaderboard.results import Results

HOST = {"commit", "dirty", "python", "processor", "accelerators", "platform", "versions"}


@click.command(short_help="Run one row of the leaderboard again.")
@click.argument("key")
@results_option
@store_option
@plugin_files
@click.option("--keep", is_flag=True, help="Write the outcome beside the record, as an attestation to hand in.")
@click.option("--dry-run", is_flag=True, help="Say what would be computed, and stop (bench plan).")
@click.option("--gpus", default="", metavar="0,1", help="GPUs to use; none by default.")
@click.option("--timeout", type=Finite(1), default=14400, show_default=True, help="Seconds for one job.")
@as_json
def reproduce(
    key: str, root: Path | None, store: Path | None, files: tuple[Path, ...], keep: bool, dry_run: bool, gpus: str,
    timeout: float, as_json: bool,
) -> int:  # fmt: skip
    """Run the row whose record's key starts with KEY again, and say whether each new value lies within the recorded
    interval. What the store holds of the row is not used: it is computed in a folder of its own."""
    from harness.cli.run import Settings, compute, show_plan
    from leaderboard import results

    suite, record = results.find(read_results(root), key)
    if record.error:
        raise RegistryError(f"record {record.key[:12]} failed ({record.error}): there is no number to reproduce")
    ready = prepared(record, store, files)
    if dry_run:
        show_plan(ready, as_json)
        return Exit.ok
    if ready.plan.cells[0].key != record.key and not as_json:
        note("code, weights or plugins differ from those of the record: its key would be another one now")
    settings = Settings("local", None, gpus, 1.0, None, timeout, timeout, None, 1)
    told = {"suite": ready.suite.name, "only": [], "sets": [], "files": [str(file.absolute()) for file in files]}
    done = compute(ready, settings, told, quiet=as_json)
    return publish(ready, record, done, suite if keep else None, as_json)


def prepared(record: Record, store: Path | None, files: tuple[Path, ...]) -> Prepared:
    """A suite of the record's one cell, planned in a part of the store that is for reproductions only."""
    from harness.cli.run import Prepared
    from harness.runs import planning
    from harness.runs.store import Store

    registry = loaded(files, strict=False)
    suite = suite_of([record], registry, f"reproduce-{record.key[:12]}")
    own = Store(opened(store).root / "reproduced")
    return Prepared(suite, planning.plan(suite, registry), own)


def publish(ready: Prepared, record: Record, done: Mapping[str, Any], into: Results | None, as_json: bool) -> int:
    """The verdict, printed; and kept beside the record if `into` is its suite's results."""
    from harness.runs.record import Provenance
    from harness.runs.records import collect
    from leaderboard.attestation import Attestation, compared

    (new,) = collect(ready.plan, done, ready.store)
    if new.error:
        raise click.ClickException(f"the row could not be run again: {new.error}")
    lines = compared(record.scores, {name: score.value for name, score in new.scores.items()})
    within = all(line.within for line in lines)
    made = Provenance(**new.provenance.model_dump(include=HOST))
    attestation = Attestation(
        key=record.key, within=within, same_key=new.key == record.key, scores=tuple(lines), provenance=made
    )
    if into is not None:
        _keep(into.folder, attestation)
    if as_json:
        print_json(attestation)
    else:
        echo(columns([("score", "recorded", "interval", "again", "within"), *map(_row, lines)]))
        outside = [line.score for line in lines if not line.within]
        verdict = "reproduced" if within else f"NOT reproduced: {', '.join(outside)}"
        echo(f"{record.key[:12]}: {verdict}; {len(lines) - len(outside)} of {len(lines)} scores within")
    return Exit.ok if within else Exit.mismatch


def _row(line: Again) -> tuple[str, ...]:
    interval = "none (1 %)" if line.low is None else f"{line.low:.4g} to {line.high:.4g}"
    again = "unmeasured" if line.again is None else f"{line.again:.6g}"
    return line.score, f"{line.recorded:.6g}", interval, again, "yes" if line.within else "NO"


def _keep(folder: Path, attestation: Attestation) -> None:
    from leaderboard import results

    path = folder / "reproduced" / f"{attestation.key}.json"
    results.write_text(path, json.dumps(attestation.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
    note(f"kept in {path}")
