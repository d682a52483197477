"""What the driver costs: many trivial jobs, in chains of ten. No test; run it on a machine that does nothing else.

    python -m tests.benchmarks.driver [--jobs 1000] [--engine local|ray]

busy: seconds per job in which the driver itself works or writes (it is waiting for jobs the rest of the time); cpu: its
processor seconds per job; wall: seconds per job until all are done, which also pays for a process, a log and an
artifact per job; memory: of the driver, at the tenth of the jobs and at the end. Aim: busy at most 20 ms, memory flat.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from harness.engine.display import Silent
from harness.engine.driver import Engine, run
from harness.runs.job import Job
from harness.runs.store import Store
from tests.engine_tools import TESTS, graph, job, local


class Weighing(Silent):
    """The driver's memory after each job."""

    def __init__(self) -> None:
        self.process, self.bytes = psutil.Process(), []

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        self.bytes.append(self.process.memory_info().rss)


def chains(jobs: int, length: int = 10) -> list[Job]:
    made: list[Job] = []
    for i in range(jobs):
        needs = made[-1:] if i % length else []
        made.append(job(f"job {i}", *needs, value=1))
    return made


def measure(engine: Any, store: Store, jobs: list[Job]) -> dict[str, Any]:
    waited = 0.0
    wait = engine.wait

    def timed(timeout: float) -> Any:
        nonlocal waited
        start, used = time.perf_counter(), time.process_time()
        ended = wait(timeout)
        waited += time.perf_counter() - start - (time.process_time() - used)  # the engine's own work is not waiting
        return ended

    engine.wait = timed
    placed: Engine = engine
    memory = Weighing()
    start, used = time.perf_counter(), time.process_time()
    results = run(graph(*jobs), store, placed, listener=memory)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    assert all(result.status == "done" for result in results.values())
    n = len(jobs)
    return {
        "jobs": n, "busy_ms": 1000 * (wall - waited) / n, "cpu_ms": 1000 * cpu / n, "wall_ms": 1000 * wall / n,
        "memory_mib": [round(memory.bytes[i] / 2**20, 1) for i in (n // 10, n - 1)], "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--jobs", type=int, default=1000)
    words.add_argument("--engine", choices=["local", "ray"], default="local")
    told = words.parse_args()
    sys.path.insert(0, TESTS)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        if told.engine == "ray":
            from harness.engine.ray import RayEngine

            engine: Any = RayEngine(store, address="local", execute="engine_jobs:execute", preload=("engine_jobs",))
        else:
            engine = local(store)
        with engine:
            warm = [job("warm", value=0)]
            measure(engine, store, warm)
            print(json.dumps({"engine": told.engine, **measure(engine, store, chains(told.jobs))}))


if __name__ == "__main__":
    main()
