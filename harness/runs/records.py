"""From jobs to records: what a cell came to, with everything that its numbers depend on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.registry import OWN
from harness.runs.execution import FINDINGS, SCORES, SHEET, control_of, versions
from harness.runs.job import Job, condensed
from harness.runs.jsonable import to_jsonable
from harness.runs.planning import Origin, Plan, PlannedCell
from harness.runs.record import Attempt, Control, JobFacts, Provenance, Record, Sampled, Source
from harness.runs.store import Store

if TYPE_CHECKING:
    from harness.engine.driver import JobResult

GIT_S = 120.0  # for an answer of git, which reads a whole checkout beside jobs that use every processor


def collect(plan: Plan, results: Mapping[str, JobResult], store: Store) -> list[Record]:
    """One record per cell, written to the store: its scores, or why there are none."""
    here = _here()
    return [_record(planned, plan, results, store, here) for planned in plan.cells]


def _record(
    planned: PlannedCell, plan: Plan, results: Mapping[str, JobResult], store: Store, here: Mapping[str, Any]
) -> Record:
    result = results[planned.key]
    failed = None if result.ok else _first_failure(planned, results) or result.error
    scores: dict[str, Any] = {}
    sheet = None
    if result.ok:
        folder = store.open_artifact(planned.key)
        scores, sheet = json.loads((folder / SCORES).read_text()), str(folder / SHEET)
    spec = plan.measured(planned.key)
    facts = {key: store.manifest(key)["facts"] for key in planned.upstream if store.has(key)}
    sampled = {
        name: Sampled(sampler=facts[key].get("sampler"), nfe=facts[key]["nfe"])
        for name, key in spec.samples.items()
        if key in facts
    }
    record = Record.model_validate({
        "key": planned.key,
        "cell": planned.cell,
        "scores": scores,
        "warnings": sorted({f"{name}: {s['warning']}" for name, s in scores.items() if s["warning"]}),
        "error": failed,
        "attempts": [
            Attempt(job=key, **dict(each)) for key in planned.upstream for each in results[key].attempts
        ],
        "knowledge": planned.needs,
        "provenance": Provenance(
            **here,
            versions=_versions(facts),
            jobs={key: _facts(plan.jobs[key]) for key in planned.upstream},
            short=dict(planned.short),
            track=planned.track,
            delivers=planned.delivers,
            metrics=spec.metrics,
            nfe=next((facts[key]["nfe"] for key in planned.upstream if "nfe" in facts.get(key, ())), None),
            sampled=sampled,
            accelerators=tuple(sorted({f["accelerator"] for f in facts.values() if f.get("accelerator")})),
            **_said(spec.defended if result.ok else None, store),
            control=_control(plan, planned, store, result.ok),
            unchanged=result.ok and _unchanged(spec.attacked, spec.defended, store),
            sources={
                part: _source(origin) for part, origin in planned.origins.items()
            },
        ),
        "sheet": sheet,
    })  # fmt: skip
    store.write_record(planned.key, record)
    return record


def _facts(job: Job) -> JobFacts:
    return JobFacts(kind=job.kind, label=job.label, ingredients=to_jsonable(condensed(job.ingredients)))


def _first_failure(planned: PlannedCell, results: Mapping[str, JobResult]) -> str | None:
    """The error of the earliest upstream job that itself failed."""
    return next((results[k].error for k in planned.upstream if results[k].status == "failed"), None)


def _versions(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Of the libraries when the jobs ran; where several versions took part, all of them."""
    found: dict[str, dict[str, None]] = {}
    for each in facts.values():
        for name, version in (each.get("versions") or {}).items():
            found.setdefault(name, {})[str(version)] = None
    return {name: ", ".join(said) for name, said in sorted(found.items())} or dict(versions())


def _said(defended: str | None, store: Store) -> dict[str, Any]:
    """What the defense says of its own work: notes (losses, norms, realised shares, seconds; six digits, curves
    thinned), and found_trigger where it names a text."""
    path = None if defended is None else store.open_artifact(defended) / FINDINGS
    if path is None or not path.is_file():
        return {"notes": {}}
    document = json.loads(path.read_text())
    found = document["trigger"]
    text = found["text"] if isinstance(found, dict) else found
    named = {"found_trigger": text} if isinstance(text, str) else {}
    return {"notes": _thinned(document["notes"]), **named}


def _thinned(value: Any, most: int = 50) -> Any:
    if isinstance(value, Mapping):
        return {name: _thinned(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_thinned(inner) for inner in value[:: math.ceil(len(value) / most) or 1]]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _control(plan: Plan, planned: PlannedCell, store: Store, finished: bool) -> Control | None:
    """What the cell's control job chose, None where it has none."""
    keys = [key for key in planned.upstream if plan.jobs[key].kind == "control"]
    return Control.model_validate(control_of(store, keys[0])) if keys and finished else None


def _unchanged(attacked: str | None, defended: str | None, store: Store) -> bool:
    """Whether the defense returned the very weights it was given (by the files' digests)."""
    if defended is None or attacked is None:
        return False

    def weights(key: str) -> dict[str, str]:
        files = store.manifest(key)["files"]
        return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}

    mine = weights(defended)
    return bool(mine) and mine == weights(attacked)


@cache
def _source(origin: Origin) -> Source:
    name = origin.distribution
    own = {} if name == OWN else _commit(Path(origin.file).parent, ".")
    return Source(distribution=name, version=_version(name), code=origin.code, **own)


@cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a plugin file
        return None


def _here() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "platform": sys.platform,
        **_commit(Path(__file__).parents[2], "harness", "plugins"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit(folder: Path, *paths: str) -> dict[str, Any]:
    """Commit of the checkout that a folder lies in, and whether what lies at `paths` has changes; None for a folder in
    none. The checkout is only read: git writes no index, so that a commit beside it finds no lock."""
    command = ["git", "--no-optional-locks", "-C", str(folder)]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=GIT_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", *paths) if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}
