"""Cells of records, planned with the code, weights and plugins of today."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.runs.record import Record
    from harness.runs.suite import Suite


def suite_of(records: Sequence[Record], registry: Registry, name: str) -> Suite:
    """A suite of the records' cells and of the metrics of the first. Raises RegistryError for a plugin or a field that
    is no longer there."""
    from harness.runs import suite as suites

    cells = []
    for record in records:
        specs = {axis: registry.canonical(kind, getattr(record.cell, axis)) for axis, kind in suites.AXES.items()}
        cells.append(replace(record.cell, **specs))
    measured = records[0].provenance.metrics or suites.standard(registry)
    metrics = tuple(registry.canonical("metrics", metric) for metric in measured)
    return suites.Suite(name, name, tuple(cells), (), metrics, Path(f"{name}.toml"))


def renewed(records: Iterable[Record], registry: Registry) -> list[str]:
    """Keys of those records whose cell would have another key now, at one thread a job, or cannot be planned here."""
    from harness.diffusion.checkpoint import CheckpointError
    from harness.registry import RegistryError
    from harness.runs import planning

    weights = cache(lambda spec: registry.build("models", spec).digest())
    known: list[Record] = []
    records = sorted(records, key=lambda record: record.provenance.metrics)
    for record in records:
        with suppress(RegistryError, CheckpointError, TypeError, ValueError):
            weights(suite_of([record], registry, "again").cells[0].model)
            known.append(record)
    same = set()
    for _, alike in groupby(known, key=lambda record: record.provenance.metrics):
        plan = planning.plan(suite_of(list(alike), registry, "again"), registry)
        same |= {cell.key for cell in plan.cells}
    return [record.key for record in records if record.key not in same]
