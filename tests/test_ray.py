"""The Ray engine on two nodes on this machine; the second has a store of its own, as if nothing were shared.

The nodes are started here, with a token made for them, and ended by their processes' ids.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.engine.display import Silent
from harness.engine.driver import Interrupted, JobResult, run
from harness.engine.supervise import Limits
from harness.runs.job import Failure, Job
from harness.runs.store import Store
from tests import engine_tools, whole_runs
from tests.engine_tools import (
    TESTS,
    chain,
    digests,
    do,
    graph,
    held,
    held_chain,
    job,
    jumping_clock,
    marked,
    undisturbed as alone,
    value,
    wait_for,
)

MARK, TOKEN = secrets.token_hex(16), secrets.token_hex(16)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}  # read on import
ray = pytest.importorskip("ray", reason="the Ray engine is tested where ray is installed: pip install -e '.[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

from harness.engine.ray import ClusterError, RayEngine, pack, unpack  # noqa: E402

bodies, store = engine_tools.bodies, engine_tools.store
pytestmark = [pytest.mark.usefixtures("bodies", "orphans"), pytest.mark.slow]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second node's store."""
    return tmp_path_factory.mktemp("apart") / "store"


@pytest.fixture(scope="module")
def cluster(apart: Path) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_TEST_MARK", MARK)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        second(nodes, apart)
        nodes.wait_for_nodes(120)
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def second(cluster: Cluster, apart: Path) -> Any:
    return cluster.add_node(num_cpus=1, env_vars={"BENCH_NODE_STORE": str(apart)})


def on_ray(store: Store, cluster: Cluster, **options: Any) -> RayEngine:
    options = {"execute": "engine_jobs:execute", "preload": ("engine_jobs",), **options}
    return RayEngine(store, address=cluster.address, **options)


def do_on_ray(store: Store, cluster: Cluster, *jobs: Job, listener: Any = None, **options: Any) -> dict[str, JobResult]:
    with on_ray(store, cluster, **options) as engine:
        results = run(graph(*jobs), store, engine, listener=listener)
    return {job.label: results[job.key] for job in jobs}


def job_processes() -> list[psutil.Process]:
    """Fork servers, jobs and what they started, not Ray's own processes."""
    found = []
    for pid in marked(MARK):
        try:
            process = psutil.Process(pid)
            if not is_rays(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def is_rays(process: psutil.Process) -> bool:
    words = " ".join(process.cmdline())
    return words.startswith("ray::") or "/ray/" in words


def assert_no_job_is_left(within: float = 120.0) -> None:
    deadline = time.monotonic() + within
    while (left := job_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.fixture
def orphans() -> Iterator[None]:
    """After the test no job, fork server or child of theirs is left on the nodes."""
    yield
    assert_no_job_is_left()


def test_both_engines_give_the_same_results_and_failures(
    store: Store, cluster: Cluster, apart: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    good, flags = chain(tmp_path / "trace"), [tmp_path / "crashed", tmp_path / "killed"]
    bad = [
        job("failing", do="fail"),
        job("exit", do="leave"),
        job("hog", do="eat_memory"),
        job("crashed once", do="crash_once", flag=str(flags[0])),
        job("killed once", do="crash_once", flag=str(flags[1]), signal=9),
    ]
    seed = job("seed", value=5)
    do(store, seed)  # so that whatever node lacks the driver's store has to fetch it
    placed = [job(f"placed {i}", seed, do="where", told=str(told), stores=2, value=i, estimate=99.0) for i in range(2)]
    good += [seed, *placed, job("last", *placed)]
    limits = Limits(stall_s=200, rss_bytes=150 * 2**20)
    results = do_on_ray(store, cluster, *good, *bad, limits=limits)
    for flag in flags:
        flag.unlink()
    here = do(Store(tmp_path / "local"), *bad, limits=limits)
    assert all(results[each.label].ok for each in good)
    for each in bad:
        there = results[each.label]
        assert (there.status, there.failure) == (here[each.label].status, here[each.label].failure)
        assert [a["failure"] for a in there.attempts] == [a["failure"] for a in here[each.label].attempts]
    assert {path.name.replace("|", "/") for path in told.iterdir()} == {str(store.root), str(apart)}
    good += bad[-2:]
    assert digests(store, good) == alone(tmp_path, good)
    assert "box of side 14" in store.log_path(bad[0].key, 1).read_text()
    assert store.verify_all() == {} and Store(apart).verify_all() == {}
    written = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert TOKEN not in "".join(capfd.readouterr()) and TOKEN.encode() not in written


def test_a_suite_gives_the_same_records_on_two_nodes_as_here(
    cluster: Cluster, suite: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    there = whole_runs.run(
        tmp_path, str(suite), "--engine", "ray", "--address", str(cluster.address), env=os.environ | given
    )
    assert there["jobs"]["done"] > 10 and not there["failed_cells"]
    store, here = undisturbed
    assert whole_runs.unplaced(there) == whole_runs.unplaced(here)
    for ours in here["records"]:
        sheets = [Store(root).open_artifact(ours["key"]) / "sheet.png" for root in (store, tmp_path)]
        assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_after_kills_of_a_ray_worker_and_of_a_ray_node_the_results_are_the_same(
    store: Store, cluster: Cluster, apart: Path, tmp_path: Path
) -> None:
    """A worker whose node died ends what it started before itself, so it may still say that its job was killed."""
    go = tmp_path / "go"
    jobs = [job(f"held {i}", do="learn", value=i, until=str(go)) for i in range(4)]

    def lost() -> list[Any]:
        attempts = [attempt for job in jobs for attempt in store.attempts(job.key)]
        return [attempt for attempt in attempts if attempt["status"] == "failed"]

    def kill_both(engine: RayEngine) -> None:
        def both_nodes_are_at_work() -> bool:
            return len(engine.running) == 2 and all(handle.started for handle in engine.running)

        try:
            wait_for(both_nodes_are_at_work)
            next(process for process in job_processes()[0].parents() if is_rays(process)).kill()
            wait_for(lambda: len(lost()) == 1 and both_nodes_are_at_work())
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            wait_for(lambda: len(lost()) == 2)
        finally:
            go.touch()

    try:
        with on_ray(store, cluster) as engine:
            killer = threading.Thread(target=kill_both, args=[engine], daemon=True)
            killer.start()
            results = run(graph(*jobs), store, engine)
            killer.join(10)
        assert all(result.ok for result in results.values())
        assert [attempt["failure"] for attempt in lost()] == ["killed"] * 2
        lost_to = "its Ray worker or node was lost", "its process was killed by SIGKILL"
        errors = [attempt["error"] for attempt in lost()]
        assert all(any(way in error for way in lost_to) for error in errors), errors
        assert any(lost_to[0] in error for error in errors), errors
        assert digests(store, jobs) == alone(tmp_path, jobs)
        assert_no_job_is_left()
    finally:
        second(cluster, apart)
        cluster.wait_for_nodes()


def test_a_stubborn_job_a_clock_that_jumps_and_a_full_disk_harm_no_other_job(
    store: Store, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumping, full = tmp_path / "jumping", tmp_path / "full"
    jumping.touch()
    full.touch()
    stubborn = job("stubborn", do="ignore_sigterm", estimate=9)
    ticking = job("ticking", do="tick", jump=7200.0, flag=str(jumping), estimate=9)
    full_disks = ("write_to_a_full_disk", "lose_the_store")
    fillers = [job(body, do=body, value=i, flag=str(full)) for i, body in enumerate(full_disks)]
    good = [ticking, job("beside", ticking, value=2), *fillers, job("after", ticking, *fillers, value=3)]
    with on_ray(store, cluster, limits=Limits(stall_s=8, grace_s=0.3)) as engine, monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping_clock())
        results = run(graph(stubborn, *good), store, engine)
    assert [results[each.key].failure for each in (stubborn, *good)] == [
        Failure.stall, None, None, Failure.environment, Failure.environment, Failure.skipped,
    ]  # fmt: skip
    assert_no_job_is_left()  # the stubborn job had a stubborn child
    full.unlink()
    assert all(result.ok for result in do_on_ray(store, cluster, *good).values())
    jumping.unlink()
    assert digests(store, good) == alone(tmp_path, good)


def test_damaged_and_half_written_artifacts_are_built_again_wherever_they_are_found(
    store: Store, cluster: Cluster, apart: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    damaged, torn, both = job("damaged", value=6), job("torn", value=7), job("damaged everywhere", value=8)
    jobs = [damaged, torn, both]
    readers = [job(f"reader {i}", *jobs, do="where", told=str(told), stores=2, value=i) for i in range(2)]
    do(store, *jobs)
    do(Store(apart), torn, both)
    for each, key in ((store, damaged.key), (store, both.key), (Store(apart), both.key)):
        (each.artifact(key) / "value.json").write_text("9")
    for each in (store, Store(apart)):
        manifest = each.artifact(torn.key) / "manifest.json"
        manifest.write_text(manifest.read_text()[:99])
    results = do_on_ray(store, cluster, *jobs, *readers)
    assert [result.status for result in results.values()] == ["done"] * 5
    assert "value.json" in results["damaged"].warnings[0]
    assert [value(store, reader) for reader in readers] == [21, 22]
    assert {path.name.replace("|", "/") for path in told.iterdir()} == {str(store.root), str(apart)}
    assert digests(store, [*jobs, *readers]) == alone(tmp_path, [*jobs, *readers])
    assert store.verify_all() == {} and Store(apart).verify_all() == {}


def test_ctrl_c_twice_ends_the_jobs_on_the_nodes(store: Store, cluster: Cluster) -> None:
    class Pressing(Silent):
        def progress(self, job: Job, event: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), 2)

    hanging = job("hanging", do="hang")
    with pytest.raises(Interrupted) as caught:
        do_on_ray(store, cluster, hanging, listener=Pressing())
    assert caught.value.results[hanging.key].failure is Failure.interrupted


def test_demands_that_no_node_can_meet_are_refused_with_what_there_is(store: Store, cluster: Cluster) -> None:
    with pytest.raises(ValueError, match=r"a job needs 64 CPUs, which no node of the cluster has: .*1 CPUs, 0 GPUs"):
        on_ray(store, cluster, threads=64)
    with pytest.raises(ValueError, match=r"1 CPUs and 0.5 of a GPU"):
        on_ray(store, cluster, gpu_share=0.5)


DRIVER = """
    import os, sys, time
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    from harness.engine.driver import run
    from harness.engine.ray import RayEngine
    from harness.runs.store import Store
    from tests.engine_tools import graph, held, held_chain
    store, folder = Store(Path({store!r})), Path({folder!r})
    with RayEngine(store, address={address!r}, execute="engine_jobs:execute", preload=("engine_jobs",)) as engine:
        (folder / f"driver {{os.getpid()}}").touch()
        while len(list(folder.glob("driver *"))) < {drivers}:
            time.sleep(0.02)
        results = run(graph(*{jobs}), store, engine)
    sys.exit(0 if all(result.ok for result in results.values()) else 1)
"""


def start_driver(store: Store, cluster: Cluster, folder: Path, jobs: str, drivers: int = 1) -> subprocess.Popen[bytes]:
    """A driver of its own for the jobs that the expression `jobs` makes of `folder`; it begins when there are `drivers`
    of them."""
    where = {"tests": TESTS, "root": str(Path(TESTS).parent), "store": str(store.root), "address": cluster.address}
    code = textwrap.dedent(DRIVER.format(**where, folder=str(folder), jobs=jobs, drivers=drivers))
    return subprocess.Popen([sys.executable, "-c", code])


def test_after_a_kill_of_the_driver_no_job_is_left_and_the_next_run_completes_with_equal_results(
    store: Store, cluster: Cluster, tmp_path: Path
) -> None:
    quick, waits, last = jobs = held(tmp_path)
    driver = start_driver(store, cluster, tmp_path, "held(folder)")
    try:
        wait_for(lambda: store.has(quick.key) and store.attempts(waits.key))
    finally:
        driver.kill()
        driver.wait()
    assert not store.has(waits.key)
    assert_no_job_is_left()
    (tmp_path / "go").touch()
    results = do_on_ray(store, cluster, *jobs)
    assert [result.status for result in results.values()] == ["hit", "done", "done"]
    assert value(store, last) == 19
    assert digests(store, jobs) == alone(tmp_path, jobs)


def test_two_drivers_on_one_store_share_the_work(store: Store, cluster: Cluster, tmp_path: Path) -> None:
    trace, go = tmp_path / "trace", tmp_path / "go"
    jobs = held_chain(tmp_path)
    drivers = [start_driver(store, cluster, tmp_path, "held_chain(folder)", drivers=2) for _ in range(2)]

    def at_work() -> set[int]:
        return {attempt["driver"]["pid"] for job in jobs for attempt in store.attempts(job.key)}

    try:
        wait_for(lambda: at_work() == {driver.pid for driver in drivers})  # a driver has room for half of the heads
    finally:
        go.touch()
    assert [driver.wait(200) for driver in drivers] == [0, 0]
    assert sorted(trace.read_text().splitlines()) == sorted(job.label for job in jobs)
    assert digests(store, jobs) == alone(tmp_path, jobs)


@pytest.mark.parametrize("place", ["variable", "named file", "file at home"])
def test_an_address_without_a_cluster_is_one_clear_error_without_the_token(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"cannot reach it with token {TOKEN}\nand more")

    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    else:
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        file = tmp_path / (".ray/auth_token" if place == "file at home" else "token")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{TOKEN}\n")
    if place == "named file":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127.0.0.1:1: cannot reach it with token \*\*\*$"):
        RayEngine(store, address="127.0.0.1:1")


def test_an_artifact_that_was_damaged_on_its_way_is_refused(store: Store, tmp_path: Path) -> None:
    a = job("a", value=3)
    do(store, a)
    there, parcel = Store(tmp_path / "there"), pack(store, a.key)
    parcel.files["value.json"][0] ^= 1
    with pytest.raises(RuntimeError, match=r"damaged on its way \(value.json\)"):
        unpack(there, a.key, parcel)
    assert not there.has(a.key)
    unpack(there, a.key, pack(store, a.key))
    assert json.loads((there.open_artifact(a.key) / "value.json").read_text()) == 3
    assert there.manifest(a.key)["facts"] == store.manifest(a.key)["facts"]
