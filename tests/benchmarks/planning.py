"""What planning costs: a suite of 10,000 cells, and `bench plan quick`. No test.

    python -m tests.benchmarks.planning [--cells 10000] [--only many|quick] [-o FILE]

expand, plan: processor milliseconds per cell for the suite's cells, and for their jobs and keys. memory: MiB of this
process, at most, plugins and libraries included. quick: processor seconds of `bench plan quick` in a process of its
own, the first time, when nothing is kept in the cache directory, and again, when the plan is. torch: the seconds that
importing torch takes alone, as the first one does. Aim: 10,000 cells in 15 s and under 1 GB, quick in 2 s. Prints a
line; -o also writes it to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import registry
from harness.runs import planning, suite

SUITE = """
[[grid]]
model = ["digits-ddpm"]
attack = ["none", "villandiffusion(solver='ode')", "baddiffusion"]
trigger = ["box", "box(size=4)", "glasses"]
target = ["corner", "hat"]
sampler = ["ddim(steps=50)", "dpm-solver-pp(steps=10)"]
defense = ["none", "finetune(steps=100)", "elijah", "anp", "clip", "elijah(invert=False)"]
controls = ["decoy", "zero"]
seed = {seeds}
"""
CELLS = 288  # of one seed
BENCH = "from harness.cli import main; main()"


def planned(cells: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "many.toml"
        file.write_text(SUITE.format(seeds=list(range(-(-cells // CELLS)))))
        plugins = registry.load()
        start = time.process_time()
        expanded = suite.load_suite(file, plugins)
        middle = time.process_time()
        made = planning.plan(expanded, plugins)
        end = time.process_time()
    n = len(expanded.cells)
    return {
        "cells": n, "jobs": len(made.jobs), "expand_ms": round(1000 * (middle - start) / n, 3),
        "plan_ms": round(1000 * (end - middle) / n, 3), "seconds": round(end - start, 2),
        "memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }  # fmt: skip


def seconds(code: str, *arguments: str, **environment: str) -> float:
    """Processor seconds of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command, env = [sys.executable, "-c", code, *arguments], os.environ | environment
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def quick(of: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        first, again = (seconds(BENCH, "plan", of, XDG_CACHE_HOME=folder) for _ in range(2))
    return {"first_s": first, "again_s": again, "torch_s": seconds("import torch")}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--cells", type=int, default=10000)
    words.add_argument("--only", choices=["many", "quick"])
    words.add_argument("--suite", default="quick", help="the suite, or a file, that `quick` plans")
    words.add_argument("-o", "--out", type=Path)
    told = words.parse_args()
    parts: dict[str, Any] = {"many": partial(planned, told.cells), "quick": partial(quick, told.suite)}
    found = {name: part() for name, part in parts.items() if told.only in (None, name)}
    found["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(found))
    if told.out is not None:
        told.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
