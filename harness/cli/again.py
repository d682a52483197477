"""Cells of records, planned with the code, weights and plugins of today."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.grid import Suite
    from harness.registry import Registry

Record = Mapping[str, Any]


def suite_of(records: Sequence[Record], registry: Registry, name: str) -> Suite:
    """A suite of the records' cells and of the metrics of the first. Raises RegistryError for a plugin or a field that
    is no longer there."""
    from harness import grid
    from harness.types import Cell

    cells = []
    for record in records:
        cell = dict(record["cell"])
        for axis, kind in grid.AXES.items():
            cell[axis] = registry.canonical(kind, cell[axis])
        cells.append(Cell(**cell))
    measured = _metrics(records[0]) or grid.standard(registry)
    metrics = tuple(registry.canonical("metrics", metric) for metric in measured)
    return grid.Suite(name, name, tuple(cells), (), metrics, Path(f"{name}.toml"))


def renewed(records: Iterable[Record], registry: Registry) -> list[str]:
    """Keys of those records whose cell would have another key now, at one thread a job, or cannot be planned here."""
    from harness import planning
    from harness.checkpoint import CheckpointError
    from harness.registry import RegistryError

    weights = cache(lambda spec: registry.build("models", spec).digest())
    known = []
    records = sorted(records, key=_metrics)
    for record in records:
        with suppress(RegistryError, CheckpointError, TypeError, ValueError):
            weights(suite_of([record], registry, "again").cells[0].model)
            known.append(record)
    same = set()
    for _, alike in groupby(known, key=_metrics):
        plan = planning.plan(suite_of(list(alike), registry, "again"), registry)
        same |= {cell.key for cell in plan.cells}
    return [str(record["key"]) for record in records if record["key"] not in same]


def _metrics(record: Record) -> tuple[str, ...]:
    return tuple((record.get("provenance") or {}).get("metrics") or ())
