"""How often `bench scan` is right on the models that suites trained, each as a plain diffusers directory.

    python -m tests.benchmarks.scan SUITE [SUITE ...] [--only KEY=TEXT] [--store DIR] [--clean MODEL]
                                  [--detector DEFENSE] [--calibrated DIR] [--jobs 1] [-o FILE]

Takes every attacked model of the suites that lies in the store, and attack none's fine-tuned ones as clean ones,
without the label that says which is which; --clean adds a model as it is released. Clean models of one kind, five of
them at least beside the one under test, are the population that it is compared with (`bench calibrate --of`); a clean
model under test is left out of its own. --detector: which are calibrated so, default all; the others have thresholds of
their own. --calibrated: keep the populations there, for another run. Prints and writes verdict, suspicions and seconds
of each.

Of the committed outcomes, scan_digits.json is that of `detection --clean digits-ddpm --detector "terd(iterations=600,
batch=8, refinement=0)"`, scan_shapes.json that of `t2i-detection --only model=shapes-sd --only attack=badt2i --only
attack=none --clean shapes-sd`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.scan.verdict import LEAST, read_population, write_population
from tests.benchmarks.scanning import bench, document

LABEL = "bench.json"
RELEASED = "as released"


@dataclass(frozen=True)
class Case:
    """A model to scan. name: the attack, with its seed; clean: whether nothing should be found."""

    model: str
    name: str
    clean: bool
    folder: Path


def trained(suite: str, only: Sequence[str], store: Path | None, out: Path) -> dict[str, Case]:
    """The suite's models that lie in the store, by the keys of their jobs."""
    from harness.cli import run as cli
    from harness.runs.planning import is_clean

    found = {}
    ready = cli.prepare(suite, list(only), [], 1, store, False, ())
    for planned in ready.plan.cells:
        key = next((k for k in planned.upstream if ready.plan.jobs[k].kind == "attack"), None)
        if key is None or key in found or not ready.store.has(key):
            continue
        cell, short = planned.cell, planned.short
        words = "fine-tuned" if is_clean(cell) else f"{short['attack']}, {short['trigger']}, {short['target']}"
        folder = plain(ready.store.open_artifact(key) / "model", out / key)
        found[key] = Case(short["model"], f"{words}, seed {cell.seed}", is_clean(cell), folder)
    return found


def released(name: str, out: Path) -> Case:
    from harness.diffusion import checkpoint
    from harness.registry import load

    folder = plain(checkpoint.embedded(load().build("models", name), name) / "model", out / name)
    return Case(name, RELEASED, True, folder)


def plain(model: Path, out: Path) -> Path:
    """A copy of a directory without its label."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    (out / LABEL).unlink(missing_ok=True)
    return out


def population(model: str, found: Sequence[Case], detectors: Sequence[str], file: Path) -> list[Case]:
    """The clean models of a kind that are calibrated on, into `file` unless it is there; none of too few."""
    clean = [case for case in found if case.clean and case.model == model and case.name != RELEASED]
    if len(clean) <= LEAST:
        return []
    if not file.is_file():
        given = [word for case in clean for word in ("--of", case.folder)]
        asked = [word for detector in detectors for word in ("--detector", detector)]
        done = bench("calibrate", model, *given, *asked, "-o", file)
        assert done.returncode == 0, done.stderr
    return clean


def scanned(case: Case, known: Sequence[Case], calibrated: Path) -> dict[str, Any]:
    words: list[object] = [case.folder, "--like", case.model]
    if known:
        whole = read_population(calibrated)
        others = [i for i, each in enumerate(known) if each != case]
        values = {spec: tuple(numbers[i] for i in others) for spec, numbers in whole.suspicion.items()}
        file = case.folder.with_suffix(".others.json")
        write_population(replace(whole, suspicion=values), file)
        words += ["--population", file]
    start = time.perf_counter()
    told = document(*words)
    right = told["verdict"] == ("nothing found" if case.clean else "suspicious")
    findings = {f["detector"]: {k: f[k] for k in ("suspicion", "chance", "flagged")} for f in told["findings"]}
    return {
        "model": case.model, "case": case.name, "clean": case.clean, "verdict": told["verdict"], "right": right,
        "seconds": round(time.perf_counter() - start, 1), "findings": findings,
    }  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("suite", nargs="+")
    words.add_argument("--only", action="append", default=[])
    words.add_argument("--store", type=Path)
    words.add_argument("--detector", action="append", default=[])
    words.add_argument("--clean", action="append", default=[])
    words.add_argument("--calibrated", type=Path)
    words.add_argument("--jobs", type=int, default=1)
    words.add_argument("-o", "--out", type=Path)
    told = words.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        by_key = {key: case for suite in told.suite for key, case in trained(suite, told.only, told.store, out).items()}
        found = [*by_key.values(), *(released(name, out) for name in told.clean)]
        for model in dict.fromkeys(case.model for case in found):
            calibrated = (told.calibrated or out) / f"{model}.json"
            known = population(model, found, told.detector, calibrated)
            mine = [case for case in found if case.model == model]
            with ThreadPoolExecutor(told.jobs) as pool:
                for row in pool.map(partial(scanned, known=known, calibrated=calibrated), mine):
                    print(json.dumps(row), flush=True)
                    rows.append(row)
    right = {
        kind: [row["right"] for row in rows if row["clean"] is (kind == "clean")] for kind in ("clean", "backdoored")
    }
    told_all = {"right": {kind: f"{sum(each)} of {len(each)}" for kind, each in right.items()}, "models": rows}
    if told.out is not None:
        told.out.write_text(json.dumps(told_all, indent=1, sort_keys=True) + "\n")
    print(json.dumps(told_all["right"]))


if __name__ == "__main__":
    main()
