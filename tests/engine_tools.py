"""What the tests of the engines share: jobs, graphs, engines, and a search for processes that were left.

A test module makes the fixtures its own by assigning them to names of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.engine.driver import JobResult, run
from harness.engine.local import LocalEngine
from harness.runs.job import Job
from harness.runs.jsonable import key_of
from harness.runs.store import Store

TESTS = str(Path(__file__).parent)


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs import their bodies, engine_jobs."""
    monkeypatch.syspath_prepend(TESTS)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable in the environment of every process that this test starts, to find them by."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("BENCH_TEST_MARK", value)
    return value


@pytest.fixture
def orphans(mark: str) -> Iterator[None]:
    """After the test no process that it started is left."""
    yield
    assert_all_gone(mark)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def job(
    name: str, *needs: Job, do: str = "add", estimate: float = 1.0, shares: str | None = None, method: str = "",
    **spec: Any,
) -> Job:  # fmt: skip
    keys = tuple(need.key for need in needs)
    key = key_of({"name": name, "needs": keys, "spec": spec})
    return Job(
        key, "attack", name, keys, {"name": name, "do": do, "needs": list(keys), **spec}, estimate, shares, method
    )


def graph(*jobs: Job) -> dict[str, Job]:
    return {job.key: job for job in jobs}


def local(store: Store, **options: Any) -> LocalEngine:
    options = {"cpu_slots": 2, "execute": "engine_jobs:execute", "preload": ("engine_jobs",), **options}
    return LocalEngine(store, **options)


def do(store: Store, *jobs: Job, listener: Any = None, **options: Any) -> dict[str, JobResult]:
    """Run the jobs and give the results by label."""
    with local(store, **options) as engine:
        results = run(graph(*jobs), store, engine, listener=listener)
    return {job.label: results[job.key] for job in jobs}


def marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get("BENCH_TEST_MARK") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], Any], within: float = 120.0) -> None:
    """Wait for an event. within: seconds after which it is said not to come, far above what a loaded machine takes."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def assert_left(mark: str, processes: int, within: float = 60.0) -> None:
    """Of the processes that the test started soon as many are left, and no more."""
    deadline = time.monotonic() + within
    while len(left := marked(mark)) != processes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(left) == processes, left


def assert_all_gone(mark: str) -> None:
    assert_left(mark, 0)


def value(store: Store, job: Job) -> Any:
    return json.loads((store.open_artifact(job.key) / "value.json").read_text())


def kill_when_running(
    engine: Any, job: Job, victim: Callable[[int], psutil.Process | None], go: Path
) -> threading.Thread:
    """Kill -9 the process `victim(pid)` when `job` runs as process `pid`. The job waits for the file `go`, which comes
    when its process is gone."""

    def kill() -> None:
        pids: list[int] = []
        while not pids:
            pids = [handle.pid for handle in engine.running if handle.job == job and handle.pid]
            time.sleep(0.05)
        process = victim(pids[0])
        assert process is not None
        process.kill()
        wait_for(lambda: is_gone(pids[0]))
        go.touch()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def jumping_clock() -> Callable[[], float]:
    """Like time.time, but a day late and a day early by turns."""
    clock, days = time.time, itertools.cycle([-86400.0, 86400.0])
    return lambda: clock() + next(days)


DRIVER = """
    import sys
    sys.path[:0] = [{tests!r}]
    from pathlib import Path
    from harness.engine.driver import run
    from harness.runs.store import Store
    from engine_tools import chain, graph, local
    if __name__ == "__main__":
        store = Store(Path({root!r}))
        with local(store) as engine:
            results = run(graph(*chain(Path({trace!r}))), store, engine)
        sys.exit(0 if all(result.ok for result in results.values()) else 1)
"""


def chain(trace: Path) -> list[Job]:
    """Eight jobs: two heads, four that need a head and may share a process, two that need two of those."""
    extra = {"trace": str(trace), "seconds": 0.25}
    heads = [job(f"head {i}", value=i, **extra) for i in range(2)]
    middle = [job(f"middle {i}", heads[i % 2], value=10 * i, shares="it", **extra) for i in range(4)]
    return [*heads, *middle, *(job(f"tail {i}", middle[i], middle[i + 2], value=100, **extra) for i in range(2))]


def held(folder: Path) -> list[Job]:
    """A quick job, one that is held until `folder`/go is there, and one that needs both."""
    jobs = [job("quick", value=7), job("held", do="learn", value=2, until=str(folder / "go"))]
    return [*jobs, job("last", *jobs, value=10)]


def held_chain(folder: Path) -> list[Job]:
    """Four jobs that are held until `folder`/go is there, and two that need two of those; `folder`/trace has each."""
    go, trace = str(folder / "go"), str(folder / "trace")
    heads = [job(f"held {i}", do="learn", value=i, until=go, trace=trace) for i in range(4)]
    return [*heads, *(job(f"tail {i}", heads[i], heads[i + 2], value=100, trace=trace) for i in range(2))]


def start_driver(store: Store, trace: Path) -> subprocess.Popen[bytes]:
    code = textwrap.dedent(DRIVER.format(tests=TESTS, root=str(store.root), trace=str(trace)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def manifest_bytes(store: Store, key: str) -> bytes:
    return (store.artifact(key) / "manifest.json").read_bytes()


def digests(store: Store, jobs: Iterable[Job]) -> dict[str, dict[str, str]]:
    """What of the artifacts may not depend on what befell the run: each file's sha256."""
    files = {job.label: store.manifest(job.key)["files"] for job in jobs}
    return {label: {name: entry["sha256"] for name, entry in listed.items()} for label, listed in files.items()}


def undisturbed(tmp_path: Path, jobs: list[Job]) -> dict[str, dict[str, str]]:
    """The digests of a run to which nothing happens."""
    store = Store(tmp_path / "undisturbed")
    assert all(result.ok for result in do(store, *jobs).values())
    return digests(store, jobs)
