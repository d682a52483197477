"""What the driver costs: many trivial jobs, in chains of ten. No test.

    python -m tests.benchmarks.driver [--jobs 1000 3000 10000 40000] [--engine within|local|ray] [-o FILE]

With `--engine within`, the default, a job is done by this process while the driver hands it over, so that 40,000 jobs
take minutes and what is left is the driver's own work. With `local` or `ray` each job has a process, a log and an
artifact, and the figures pay for the engine too; then the machine should do nothing else.

cpu: the driver's processor milliseconds per job; `within`: without those of the engine. busy: milliseconds per job in
which the driver works or writes; it waits for jobs the rest of the time. wall: milliseconds per job until all are done.
memory: MiB of this process at the tenth of the jobs and at the end. Aim: 4 ms flat from 1,000 jobs to 40,000, and no
more memory than results take, 3 KiB per job. Prints a line for each size; -o also writes them to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from harness.engine.display import Silent
from harness.engine.driver import Engine, run
from harness.engine.supervise import Handle, Outcome
from harness.runs.job import Job
from harness.runs.store import MANIFEST, Store
from tests.engine_tools import TESTS, graph, job, local

SIZES = (1000, 3000, 10000, 40000)


class Weighing(Silent):
    """The driver's memory after each job."""

    def __init__(self) -> None:
        self.process, self.bytes = psutil.Process(), []

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        self.bytes.append(self.process.memory_info().rss)


class Within:
    """Does each job at once, in this process: an artifact without files."""

    def __init__(self, store: Store, slots: int = 2) -> None:
        self.store, self.slots = store, slots
        self.shares_gpus, self.spares_gpus, self.kept, self.running = False, False, (), list[Handle]()

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None:
        if len(self.running) == self.slots:
            return None
        folder = self.store.artifact(job.key)
        folder.mkdir(parents=True)
        manifest = {"key": job.key, "kind": job.kind, "facts": {"cost": {"wall_s": 1.0}}, "files": {}}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        self.running.append(Handle(job, attempt, attempt, started=time.monotonic()))
        return self.running[-1]

    def release(self) -> None:
        pass

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        ended, self.running = self.running, []
        return [(handle, Outcome(True, cost={"wall_s": 1.0})) for handle in ended]

    def cancel(self, handle: Handle, grace: float | None = None) -> None:
        raise NotImplementedError("nothing is left running here")

    def __enter__(self) -> Within:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def chains(jobs: int, length: int = 10) -> list[Job]:
    made: list[Job] = []
    for i in range(jobs):
        needs = made[-1:] if i % length else []
        made.append(job(f"job {i}", *needs, value=1))
    return made


class Clock:
    """Seconds and processor seconds inside the methods that it wraps."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, used = time.perf_counter(), time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.wall += time.perf_counter() - start
                self.cpu += time.process_time() - used

        return timed


def measure(engine: Any, store: Store, jobs: list[Job]) -> dict[str, Any]:
    clock = Clock()
    within = isinstance(engine, Within)
    engine.wait = clock.around(engine.wait)
    if within:
        engine.try_submit = clock.around(engine.try_submit)
    placed: Engine = engine
    memory = Weighing()
    start, used = time.perf_counter(), time.process_time()
    results = run(graph(*jobs), store, placed, listener=memory)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    assert all(result.status == "done" for result in results.values())
    # an engine of processes works while it waits; what it takes of the processor there is not waiting
    busy, own = (wall - clock.wall, cpu - clock.cpu) if within else (wall - clock.wall + clock.cpu, cpu)
    n = len(jobs)
    return {
        "jobs": n, "cpu_ms": round(1000 * own / n, 3), "busy_ms": round(1000 * busy / n, 3),
        "wall_ms": round(1000 * wall / n, 3),
        "memory_mib": [round(memory.bytes[i] / 2**20, 1) for i in (n // 10, n - 1)],
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def engine_of(name: str, store: Store) -> Any:
    if name == "within":
        return Within(store)
    if name == "local":
        return local(store)
    from harness.engine.ray import RayEngine

    return RayEngine(store, address="local", execute="engine_jobs:execute", preload=("engine_jobs",))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--jobs", type=int, nargs="+", default=SIZES)
    words.add_argument("--engine", choices=["within", "local", "ray"], default="within")
    words.add_argument("-o", "--out", type=Path)
    told = words.parse_args()
    sys.path.insert(0, TESTS)
    rows: list[dict[str, Any]] = []
    for size in told.jobs:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "store")
            with engine_of(told.engine, store) as engine:
                measure(engine, store, [job("warm", value=0)])
            with engine_of(told.engine, store) as engine:
                rows.append({"engine": told.engine, **measure(engine, store, chains(size))})
        print(json.dumps(rows[-1]), flush=True)
        if told.out is not None:
            told.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
