"""What the harness costs: wall time of a suite over the time inside model calls, backward passes, optimizer steps.

    python -m tests.benchmarks.overhead [SUITE] [--only KEY=TEXT] [--set KEY=VALUE] [--engine local|ray] [--slots 1]
                                        [--store DIR]

overhead: wall · slots / inside - 1, from the first job's start to the last one's end, in a store of its own or in DIR;
what DIR holds already is not computed and counts for nothing. What is outside: starting processes, loading and saving,
hashing, drawing noise, the methods' own arithmetic between the calls, metrics. by_kind: the same within the jobs, so
without processes and waiting. Aim: at most 0.10 on `quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from harness.runs import execution
from harness.runs.store import Store


class Inside:
    """Seconds inside the outermost of the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.since = 0.0, 0, 0.0

    def enter(self, *_: object) -> None:
        self.depth += 1
        if self.depth == 1:
            self.since = time.perf_counter()

    def leave(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.since

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return timed


def execute(spec: dict[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """harness.runs.execution.execute, with what it did inside of models among its facts."""
    import torch
    import torch.optim.optimizer as optimizer

    inside = Inside()
    torch.nn.Module.__call__ = inside.around(torch.nn.Module.__call__)  # type: ignore[method-assign]
    torch.autograd.backward = inside.around(torch.autograd.backward)
    torch.autograd.grad = inside.around(torch.autograd.grad)
    optimizer.register_optimizer_step_pre_hook(inside.enter)
    optimizer.register_optimizer_step_post_hook(inside.leave)
    start = time.perf_counter()
    facts = execution.execute(spec, store, out)
    return {**facts, "inside_s": inside.seconds, "body_s": time.perf_counter() - start}


def main() -> None:
    from harness.cli import run as cli
    from harness.engine import display, driver
    from harness.engine.local import PRELOAD, LocalEngine
    from harness.engine.ray import RayEngine

    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("suite", nargs="?", default="quick")
    words.add_argument("--only", action="append", default=[])
    words.add_argument("--set", action="append", default=[])
    words.add_argument("--engine", choices=["local", "ray"], default="local")
    words.add_argument("--slots", type=int, default=1)
    words.add_argument("--store", type=Path)
    told = words.parse_args()
    how: dict[str, Any] = {"execute": f"{__spec__.name}:execute", "preload": (*PRELOAD, __spec__.name)}
    with tempfile.TemporaryDirectory() as folder:
        ready = cli.prepare(told.suite, told.only, told.set, 1, told.store or Path(folder), False, ())
        on_ray = told.engine == "ray"
        engine = (
            RayEngine(ready.store, address="local", cpus=told.slots, **how)
            if on_ray
            else LocalEngine(ready.store, cpu_slots=told.slots, **how)
        )
        with engine:
            start = time.perf_counter()
            results = driver.run(ready.plan.jobs, ready.store, engine, listener=display.pick())
            wall = time.perf_counter() - start
        bad = [ready.plan.jobs[key].label for key, result in results.items() if not result.ok]
        assert not bad, bad
        done = {key: ready.plan.jobs[key] for key, result in results.items() if result.status == "done"}
        print(
            json.dumps(summary(ready, done, wall, told.slots) | {"suite": told.suite, "engine": told.engine}, indent=1)
        )


def summary(ready: Any, done: Mapping[str, Any], wall: float, slots: int) -> dict[str, Any]:
    inside: dict[str, float] = defaultdict(float)
    body: dict[str, float] = defaultdict(float)
    for key, job in done.items():
        facts = ready.store.manifest(key)["facts"]
        inside[job.kind] += facts["inside_s"]
        body[job.kind] += facts["body_s"]
    cells = len(ready.plan.cells)
    return {
        "wall_s": round(wall, 1), "slots": slots, "inside_s": round(sum(inside.values()), 1),
        "overhead": round(wall * slots / sum(inside.values()) - 1, 3), "cells": cells, "jobs": len(done),
        "cells_per_hour": round(3600 * cells / wall, 1), "load": os.getloadavg()[0],
        "by_kind": {kind: round(body[kind] / max(inside[kind], 1e-9) - 1, 3) for kind in body},
    }  # fmt: skip


if __name__ == "__main__":
    main()
