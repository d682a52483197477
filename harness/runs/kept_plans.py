"""The plan of a suite, kept for the next `bench plan`, which then imports no plugin and no torch.

A plan stands under a digest of all that it follows from: the suite and the filters, every file of the harness, of the
built-in plugins and of the presets (their code and their weights), the names of the installed distributions, and
Python. So a file of the cache directory can be missing or damaged, but not out of date. Plans that follow from more
are not kept: those with plugins of other distributions or files, those of models whose weights or data lie elsewhere,
and those with warnings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.capabilities import MeasuredWork, offers
from harness.registry import OWN, Registry, installed
from harness.registry.code_digest import HARNESS
from harness.registry.index import distributions, fatal
from harness.registry.kept import cache_file, write_atomically
from harness.runs.job import Job
from harness.runs.jsonable import key_of, to_jsonable
from harness.runs.planning import Plan
from harness.runs.record import Dropped
from harness.runs.suite import Draft, Suite
from harness.types import Cell


@dataclass(frozen=True)
class Outline:
    """What `bench plan` shows. The specs of the jobs are mappings."""

    suite: Suite
    jobs: Mapping[str, Job]


def name_of(draft: Draft, only: Sequence[str], threads: int) -> str | None:
    """The digest under which the plan stands; None where it follows from more than the digest holds."""
    points = installed()
    if fatal() or any(point.dist is None or point.dist.name != OWN for point in points):
        return None
    asked = to_jsonable({"draft": draft, "only": list(only), "threads": threads})
    environment = [sys.version, str(HARNESS), *(point.value for point in points), *sorted(distributions())]
    return key_of({"asked": asked, "environment": environment, "files": _files_digest()})


def find(draft: Draft, name: str | None) -> Outline | None:
    """The plan that stands under `name`; None where there is none."""
    place = _place(draft)
    if name is None or place is None:
        return None
    try:
        head, _, text = place.read_bytes().partition(b"\n")
    except OSError:
        return None
    return _read(json.loads(text), draft) if head == _head(name, text) else None


def keep(draft: Draft, name: str | None, suite: Suite, plan: Plan, registry: Registry) -> None:
    """Keep a plan that was made while `name` was its digest, in the place of the last one of the suite's name. Plans
    that follow from more than the digest holds are passed over."""
    place = _place(draft)
    if name is None or place is None or registry.files or registry.warnings:
        return
    if all(_is_packaged(registry.build("models", spec)) for spec in {cell.model for cell in suite.cells}):
        text = json.dumps(_written(suite, plan))
        write_atomically(place, f"{_head(name, text.encode()).decode()}\n{text}")


def _is_packaged(model: Any) -> bool:
    """Whether the digest of a built-in model follows from files of the package, and no estimate for GPUs is shown."""
    from harness.models.captioned_shapes import CaptionedShapes
    from harness.models.embedded_models import Embedded
    from harness.models.real_data import RealData

    elsewhere = isinstance(model, RealData) and model.data_path
    return isinstance(model, Embedded | CaptionedShapes) and not elsewhere and not offers(model, MeasuredWork)


def _place(draft: Draft) -> Path | None:
    return cache_file(f"plan-{draft.name}")


def _head(name: str, text: bytes) -> bytes:
    """The first line of the file: whose plan the rest is, and the digest of the rest."""
    return f"{name} {hashlib.sha256(text).hexdigest()}".encode()


# ---- files ----------------------------------------------------------------------------------------------------------


def _files_digest() -> str:
    """Of the name and the content of every file that a plan may follow from, compiled ones aside."""
    found = hashlib.sha256()
    for root in _roots():
        for path in _below(root):
            content = hashlib.sha256(path.read_bytes()).digest()
            found.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode() + content)
    return found.hexdigest()


def _roots() -> Iterator[Path]:
    yield from (HARNESS, HARNESS.with_name("plugins"))
    spec = importlib.util.find_spec("leaderboard")
    yield from (Path(place) / "presets" for place in (spec.submodule_search_locations if spec else None) or ())


def _below(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(place, name) for name in sorted(files))


# ---- form -----------------------------------------------------------------------------------------------------------


def _written(suite: Suite, plan: Plan) -> dict[str, Any]:
    """The plan as JSON. Jobs share the digests of their code, which are the most of it."""
    codes: dict[str, Any] = {}
    jobs = []
    for job in plan.jobs.values():
        code = key_of(job.ingredients["code"])
        codes[code] = job.ingredients["code"]
        jobs.append(to_jsonable(replace(job, ingredients={**job.ingredients, "code": code})))
    return to_jsonable({
        "title": suite.title, "cells": suite.cells, "dropped": suite.dropped, "metrics": suite.metrics,
        "jobs": jobs, "codes": codes,
    })  # fmt: skip


def _read(document: Mapping[str, Any], draft: Draft) -> Outline:
    dropped = tuple(Dropped(Cell(**each["cell"]), each["reason"]) for each in document["dropped"])
    cells = tuple(Cell(**each) for each in document["cells"])
    suite = Suite(draft.name, document["title"], cells, dropped, tuple(document["metrics"]), draft.path)
    jobs: dict[str, Job] = {}
    for each in document["jobs"]:
        ingredients = {**each["ingredients"], "code": document["codes"][each["ingredients"]["code"]]}
        jobs[each["key"]] = Job(**{**each, "needs": tuple(each["needs"]), "ingredients": ingredients})
    return Outline(suite, jobs)
