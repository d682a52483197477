"""`bench analyse`: drawings of what a backdoor does inside the models of one cell."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.common import (
    as_json,
    check_device,
    echo,
    loaded,
    opened,
    plugin_files,
    print_json,
    store_option,
    writable,
)
from harness.cli.leaderboard import read_results, results_option
from harness.cli.subject import listen
from harness.registry import RegistryError

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.runs.record import Record
    from harness.runs.store import Store
    from harness.stages.analyse import Analysis

MOST = 32  # inputs, so that a sampler takes them at once


@click.command(short_help="Draw what a backdoor does inside a cell's models.")
@click.argument("key")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write into.")
@click.option("-n", "n", type=click.IntRange(2, MOST), default=16, show_default=True, help="Inputs of the cell.")
@click.option("--prompts", type=click.IntRange(1, 8), default=2, show_default=True, help="Prompts with maps.")
@results_option
@store_option
@click.option("--device", default=None, metavar="NAME", help="Such as cuda; default: cuda if available.")
@plugin_files
@as_json
def analyse(
    key: str, out: Path, n: int, prompts: int, root: Path | None, store: Path | None, device: str | None,
    files: tuple[Path, ...], as_json: bool,
) -> None:  # fmt: skip
    """Draw norms of activations, attention by token and neurons of the cell whose record's key starts with KEY, from
    the models that the store holds: index.html with PNG and SVG pictures, and analysis.json with the numbers. After
    BackdoorDM (arXiv:2502.11798). `bench leaderboard build --analyses` links such folders from the pages of cells."""
    from leaderboard import analysis as drawing

    check_device(device)
    writable(out)
    registry, where = loaded(files, strict=False), opened(store)
    record = _record(where, root, key)
    listen(as_json)
    found = _analysed(record, registry, where, n, prompts, device)
    cell = {"key": record.key, **{name: value for name, value in asdict(record.cell).items() if value is not None}}
    written = drawing.write(found, cell, out)
    if as_json:
        print_json({"out": out, "key": record.key, "files": written, "missing": found.missing})
        return
    for name, why in found.missing.items():
        echo(f"no {name}: {why}")
    echo(f"{out / drawing.PAGE}: {len(written)} files")


def _record(store: Store, root: Path | None, key: str) -> Record:
    """The record, of the store's own or of the published ones. Raises StoreError for one that cannot be read."""
    from harness.runs.store import StoreError
    from leaderboard import results

    own = results.Results("store", store.root, tuple(store.records()))
    held = any(record.key.startswith(key) for record in own.records)
    if broken := [] if held else store.broken_records(key):
        raise StoreError(f"{broken[0]}: no record that can be read; remove it, or compute it again with bench run")
    return results.find([own] if held else read_results(root), key)[1]


def _analysed(record: Record, registry: Registry, store: Store, n: int, prompts: int, device: str | None) -> Analysis:
    from harness.diffusion import checkpoint
    from harness.runs import execution
    from harness.runs.store import Store
    from harness.stages import analyse as stage
    from harness.stages.inputs import avoiding, evaluation_inputs

    cell, jobs = record.cell, record.provenance.jobs
    if record.error:
        raise RegistryError(f"record {record.key[:12]} failed ({record.error}): there is no model to look into")
    by_kind = {facts.kind: job for job, facts in jobs.items() if facts.kind in ("attack", "defend")}
    if "attack" not in by_kind:
        raise RegistryError(f"record {record.key[:12]} is of a clean model: there is no backdoor to look for")
    stores = [store, Store(store.root / "reproduced")]
    held = {kind: next((each for each in stores if each.has(job)), None) for kind, job in by_kind.items()}
    absent = [kind for kind, each in held.items() if each is None]
    if absent:
        raise RegistryError(
            f"the store does not hold the model of the {' and the '.join(absent)} job of {record.key[:12]}: "
            f"bench reproduce {record.key[:12]} computes it with today's code"
        )
    attacked = held["attack"]
    assert attacked is not None, "absent models were refused"
    trigger = execution.trigger_of(cell.trigger, by_kind["attack"], registry, attacked)
    plugin = avoiding(registry.build("models", cell.model), trigger)
    place = device or execution.device()
    models: dict[str, Any] = {"clean": plugin.load().to(place)}
    missing: dict[str, str] = {}
    for kind, name in (("attack", "attacked"), ("defend", "defended")):
        artifact = held.get(kind)
        if artifact is None:
            continue
        folder = artifact.open_artifact(by_kind[kind]) / execution.MODEL
        if folder.is_dir():
            models[name] = checkpoint.load(folder).to(place)
        else:
            missing["defended model"] = "the defense returned none"
    inputs = evaluation_inputs(plugin, models["attacked"], min(n, cell.n), cell.evaluation_seed)
    found = stage.analyse(models, inputs, registry.build("samplers", cell.sampler), trigger, prompts)
    found.missing.update(missing)
    return found
