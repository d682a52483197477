"""From jobs to records: what a cell came to, with everything that its numbers depend on."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.planning import Plan, PlannedCell
from harness.store import Store, plain


def collect(plan: Plan, results: Mapping[str, Any], store: Store) -> list[dict[str, Any]]:
    """One record a cell, written to the store: its scores, or why there are none."""
    provenance = _provenance()
    return [_record(planned, plan, results, store, provenance) for planned in plan.cells]


def _record(
    planned: PlannedCell, plan: Plan, results: Mapping[str, Any], store: Store, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    result = results[planned.key]
    failed = None if result.ok else _first_failure(planned, results) or result.error
    scores: dict[str, Any] = {}
    sheet = None
    if result.ok:
        folder = store.open_artifact(planned.key)
        scores, sheet = json.loads((folder / "scores.json").read_text()), str(folder / "sheet.png")
    behind = {
        key: {"kind": plan.jobs[key].kind, "label": plan.jobs[key].label, "attempts": results[key].attempts}
        for key in planned.behind
    }
    defended = next((key for key in planned.behind if plan.jobs[key].kind == "defend"), None)
    record = {
        "key": planned.key,
        "cell": asdict(planned.cell),
        "scores": scores,
        "warnings": sorted({f"{name}: {s['warning']}" for name, s in scores.items() if s["warning"]}),
        "error": failed,
        "attempts": [{"job": key, **dict(each)} for key, job in behind.items() for each in job["attempts"]],
        "knowledge": list(planned.needs),
        "provenance": {
            **provenance,
            "jobs": {key: {"kind": job["kind"], "label": job["label"]} for key, job in behind.items()},
            "short": planned.short,
            "track": planned.track,
            "delivers": list(planned.delivers),
            "metrics": list(plan.jobs[planned.key].spec["metrics"]),
            "nfe": _nfe(planned, plan, store),
            "sampled": _sampled(planned, plan, store),
            "accelerators": _accelerators(planned, store),
            **_said(plan.jobs[planned.key].spec["defended"] if result.ok else None, store),
            "unchanged": result.ok and defended is not None and _unchanged(planned, plan, store),
        },
        "sheet": sheet,
    }
    record = plain(record)
    store.write_record(planned.key, record)
    return record


def _first_failure(planned: PlannedCell, results: Mapping[str, Any]) -> str | None:
    """The error of the earliest job behind the cell that itself failed."""
    return next((results[k].error for k in planned.behind if results[k].status == "failed"), None)


def _nfe(planned: PlannedCell, plan: Plan, store: Store) -> int | None:
    """Network evaluations for one image."""
    for key in planned.behind:
        if plan.jobs[key].kind == "sample" and store.has(key):
            return store.manifest(key)["facts"]["nfe"]
    return None


def _said(defended: str | None, store: Store) -> dict[str, Any]:
    """What the defense says of its own work: notes (losses, norms, realised shares, seconds; six digits, curves
    thinned), and found_trigger where it names a text."""
    path = None if defended is None else store.open_artifact(defended) / "defended.json"
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


def _accelerators(planned: PlannedCell, store: Store) -> list[str]:
    """Names of the GPUs that the cell's jobs computed on; none where all ran on a CPU."""
    keys = [key for key in planned.behind if store.has(key)]
    return sorted({name for key in keys if (name := store.manifest(key)["facts"].get("accelerator"))})


def _sampled(planned: PlannedCell, plan: Plan, store: Store) -> dict[str, Any]:
    """For each image set the sampler that made it and its network evaluations for one image."""
    sets: Mapping[str, str] = plan.jobs[planned.key].spec["samples"]
    facts = {name: store.manifest(key)["facts"] for name, key in sets.items() if store.has(key)}
    return {name: {"sampler": fact.get("sampler"), "nfe": fact["nfe"]} for name, fact in facts.items()}


def _unchanged(planned: PlannedCell, plan: Plan, store: Store) -> bool:
    """Whether the defense returned the very weights it was given (by the files' digests)."""
    spec = plan.jobs[planned.key].spec
    defended, attacked = spec["defended"], spec["attacked"]
    if defended is None or attacked is None:
        return False

    def weights(key: str) -> dict[str, str]:
        files = store.manifest(key)["files"]
        return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}

    mine = weights(defended)
    return bool(mine) and mine == weights(attacked)


def _provenance() -> dict[str, Any]:
    names = ("diffusion-defense-bench", "torch", "diffusers", "transformers", "torch-fidelity", "open_clip_torch")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": platform.machine(),
        "processor": _processor(),
        "platform": sys.platform,
        **_commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> dict[str, Any]:
    """Commit and cleanness of the checkout that the harness runs from; None for an installed copy."""
    import subprocess

    def git(*words: str) -> str | None:
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", "harness", "plugins") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}
