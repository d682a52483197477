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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.engine.display import Silent
from harness.engine.driver import Interrupted, JobResult, run
from harness.engine.supervise import Limits
from harness.job import Failure, Job
from harness.store import Store
from tests import engine_tools, whole_runs
from tests.engine_tools import TESTS, chain, digests, do, graph, job, marked, value
from tests.engine_tools import undisturbed as alone

MARK, TOKEN = secrets.token_hex(16), secrets.token_hex(16)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}  # read on import
ray = pytest.importorskip("ray", reason="the Ray engine is tested where ray is installed: pip install -e '.[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402

from harness.engine.ray import ClusterError, RayEngine, pack, unpack  # noqa: E402

bodies, store = engine_tools.bodies, engine_tools.store
pytestmark = [pytest.mark.usefixtures("bodies"), pytest.mark.slow]


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
        nodes.wait_for_nodes()
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
    """Fork servers and jobs, not Ray's own processes."""
    found = []
    for pid in marked(MARK):
        try:
            process = psutil.Process(pid)
            if any("harness.engine." in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_no_job_is_left(within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while (left := job_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def when(condition: Callable[[], Any], act: Callable[[], object]) -> threading.Thread:
    """Act as soon as the condition holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_both_engines_give_the_same_results_and_failures(
    store: Store, cluster: Cluster, apart: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    good = chain(tmp_path / "trace")
    bad = [
        job("failing", do="fail"),
        job("exit", do="leave"),
        job("hog", do="eat_memory"),
        job("once", do="crash_once", flag=str(tmp_path / "crashed")),
    ]
    seed = job("seed", value=5)
    do(store, seed)  # so that whatever node lacks the driver's store has to fetch it
    placed = [job(f"placed {i}", seed, do="where", told=str(told), stores=2, value=i, estimate=99.0) for i in range(2)]
    good += [seed, *placed, job("last", *placed)]
    limits = Limits(stall_s=60, rss_bytes=150 * 2**20)
    results = do_on_ray(store, cluster, *good, *bad, limits=limits)
    here = do(Store(tmp_path / "local"), *bad, limits=limits)
    assert all(results[each.label].ok for each in good)
    for each in bad:
        there = results[each.label]
        assert (there.status, there.failure) == (here[each.label].status, here[each.label].failure)
        assert [a["failure"] for a in there.attempts] == [a["failure"] for a in here[each.label].attempts]
    assert {path.name.replace("|", "/") for path in told.iterdir()} == {str(store.root), str(apart)}
    assert digests(store, good) == alone(tmp_path, good)
    assert "box of side 14" in store.log_path(bad[0].key, 1).read_text()
    assert store.verify_all() == {} and Store(apart).verify_all() == {}
    assert_no_job_is_left()
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
    jobs = [job(f"slow {i}", value=i, seconds=1.5) for i in range(4)]

    def kill_a_worker() -> None:
        worker = psutil.Process(job_processes()[0].ppid())
        while "harness.engine." in " ".join(worker.cmdline()):
            worker = worker.parent() or worker
        worker.kill()

    def kill_the_node() -> None:
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    with on_ray(store, cluster) as engine:
        first = when(lambda: len(engine.running) == 2 and all(h.started for h in engine.running), kill_a_worker)
        second_act = when(lambda: store.has(jobs[0].key) or store.has(jobs[1].key), kill_the_node)
        results = run(graph(*jobs), store, engine)
        first.join(10)
        second_act.join(10)
    attempts = [attempt for result in results.values() for attempt in result.attempts]
    assert all(result.ok for result in results.values())
    lost = [attempt for attempt in attempts if attempt["status"] == "failed"]
    assert lost and {attempt["failure"] for attempt in lost} == {"killed"}
    assert "lost" in lost[0]["error"]
    assert digests(store, jobs) == alone(tmp_path, jobs)
    assert_no_job_is_left()
    second(cluster, apart)
    cluster.wait_for_nodes()


def test_a_damaged_artifact_is_built_again_wherever_it_is_found(store: Store, cluster: Cluster, tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.mkdir()
    seed = job("seed", value=6)
    readers = [job(f"reader {i}", seed, do="where", told=str(told), stores=2, value=i) for i in range(2)]
    do(store, seed)
    (store.artifact(seed.key) / "value.json").write_text("9")
    results = do_on_ray(store, cluster, seed, *readers)
    assert [result.status for result in results.values()] == ["done"] * 3
    assert "value.json" in results["seed"].warnings[0]
    assert [value(store, reader) for reader in readers] == [6, 7]


def test_ctrl_c_twice_ends_the_jobs_on_the_nodes(store: Store, cluster: Cluster) -> None:
    class Pressing(Silent):
        def progress(self, job: Job, event: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), 2)

    hanging = job("hanging", do="hang")
    with pytest.raises(Interrupted) as caught:
        do_on_ray(store, cluster, hanging, listener=Pressing())
    assert caught.value.results[hanging.key].failure is Failure.interrupted
    assert_no_job_is_left()


def test_demands_that_no_node_can_meet_are_refused_with_what_there_is(store: Store, cluster: Cluster) -> None:
    with pytest.raises(ValueError, match=r"a job wants 64 CPUs, which no node of the cluster has: .*1 CPUs, 0 GPUs"):
        on_ray(store, cluster, threads=64)
    with pytest.raises(ValueError, match=r"1 CPUs and 0.5 of a GPU"):
        on_ray(store, cluster, gpu_share=0.5)


DRIVER = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    from harness.engine.driver import run
    from harness.engine.ray import RayEngine
    from harness.store import Store
    from tests.engine_tools import graph, job
    store = Store(Path({store!r}))
    with RayEngine(store, address={address!r}, execute="engine_jobs:execute", preload=("engine_jobs",)) as engine:
        run(graph(job("hanging", do="hang"), job("quick", value=7)), store, engine)
"""


def test_after_a_kill_of_the_driver_no_job_is_left_and_the_next_run_goes_on(store: Store, cluster: Cluster) -> None:
    quick, hanging = job("quick", value=7), job("hanging", do="hang")
    where = {"tests": TESTS, "root": str(Path(TESTS).parent), "store": str(store.root), "address": cluster.address}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(DRIVER.format(**where))]) as driver:
        while not (store.has(quick.key) and store.attempts(hanging.key)) and driver.poll() is None:
            time.sleep(0.1)
        driver.kill()
    assert_no_job_is_left()
    results = do_on_ray(store, cluster, quick)
    assert results["quick"].status == "hit" and value(store, quick) == 7


def test_an_address_without_a_cluster_is_one_clear_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"cannot reach it with token {TOKEN}\nand more")

    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
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
