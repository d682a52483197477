"""The engine with trivial jobs: each way a job can end, what its end does to others, and what a kill leaves behind.
After each test no process is left."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.engine.display import Bars, Lines, Silent
from harness.engine.driver import Interrupted, run
from harness.engine.gpus import PARTS, Card, Leases
from harness.engine.local import LocalEngine
from harness.engine.supervise import Limits
from harness.runs.job import Failure, Job
from harness.runs.store import Store
from tests import engine_tools
from tests.engine_tools import (
    assert_all_gone,
    assert_left,
    chain,
    digests,
    do,
    graph,
    job,
    kill_when_running,
    local,
    manifest_bytes,
    start_driver,
    undisturbed,
    value,
    wait_for,
)

bodies, mark, orphans, store = engine_tools.bodies, engine_tools.mark, engine_tools.orphans, engine_tools.store
pytestmark = pytest.mark.usefixtures("bodies", "orphans")


def test_results_flow_along_the_graph_and_a_second_run_hits(store: Store) -> None:
    a, b = job("a", value=1), job("b", value=2)
    c = job("c", a, b, value=10)
    first = do(store, c, b, a)
    assert [result.status for result in first.values()] == ["done"] * 3
    assert value(store, c) == 13
    cost = store.manifest(c.key)["facts"]["cost"]
    assert cost["wall_s"] > 0 and cost["peak_rss_bytes"] > 2**20 and cost["cuda_peak_bytes"] is None
    second = do(store, c, b, a)
    assert [result.status for result in second.values()] == ["hit"] * 3
    assert [attempt["status"] for attempt in second["c"].attempts] == ["done"]


@pytest.mark.slow
def test_each_way_to_fail_is_named_and_the_other_jobs_finish(store: Store, tmp_path: Path) -> None:
    once, failing = job("once", do="crash_once", flag=str(tmp_path / "crashed")), job("failing", do="fail")
    dependent = job("dependent", failing)
    beside = job("beside", value=2, seconds=1.0, estimate=5)
    jobs = [
        once,
        failing,
        dependent,
        job("grandchild", dependent),
        job("after once", once),
        beside,
        job("after beside", beside, value=3),
        job("hang", do="hang"),
        job("stall", do="stall"),
        job("exit", do="leave"),
        job("quit", do="quit_interpreter"),
        job("hog", do="eat_memory", estimate=5),
        job("stubborn", do="ignore_sigterm", estimate=5),
        job("memory error", do="out_of_memory"),
        job("always", do="crash"),
    ]
    limits = Limits(wall_s=20, stall_s=8, rss_bytes=100 * 2**20, grace_s=0.3)
    results = do(store, *jobs, cpu_slots=6, limits=limits)
    failures = {label: result.failure for label, result in results.items()}
    assert failures == {
        "once": None,
        "failing": Failure.plugin,
        "dependent": Failure.skipped,
        "grandchild": Failure.skipped,
        "after once": None,
        "beside": None,
        "after beside": None,
        "hang": Failure.timeout,
        "stall": Failure.stall,
        "exit": Failure.plugin,
        "quit": Failure.plugin,
        "hog": Failure.memory,
        "stubborn": Failure.stall,
        "memory error": Failure.memory,
        "always": Failure.killed,
    }
    assert len(results["once"].attempts) == 2
    assert "SIGSEGV" in results["once"].attempts[0]["error"]
    assert "SIGSEGV" in results["once"].warnings[0]
    assert len(results["always"].attempts) == 3
    assert all(len(results[label].attempts) == 1 for label in ("failing", "hang", "stall", "exit", "hog", "stubborn"))
    assert results["failing"].error == "ValueError: box of side 14 does not fit"
    assert "engine_jobs.py" in results["failing"].attempts[0]["traceback"]
    assert results["grandchild"].error == "skipped: failing failed: ValueError: box of side 14 does not fit"
    assert "status 7" in (results["exit"].error or "")
    assert not list(store.root.glob("artifacts/??/*/.tmp*"))
    good = [job for job in jobs if failures[job.label] is None]
    assert digests(store, good) == undisturbed(tmp_path, good)


def test_a_failed_job_is_tried_again_by_the_next_run_and_its_attempts_stay(store: Store) -> None:
    failing = job("failing", do="fail")
    do(store, failing)
    result = do(store, failing)["failing"]
    assert [attempt["attempt"] for attempt in result.attempts] == [1, 2]
    assert "box of side 14" in store.log_path(failing.key, 1).read_text()


def test_what_a_job_leaves_running_ends_with_it(store: Store, mark: str) -> None:
    with local(store) as engine:
        leaver = job("leaver", do="leave_a_child")
        assert run(graph(leaver), store, engine)[leaver.key].ok
        assert_left(mark, 1)  # the fork server


def test_jobs_see_fixed_threads_no_gpu_and_a_log_of_their_own(store: Store) -> None:
    shown = job("shown", do="show_environment", cuda="")
    assert do(store, shown, cpu_slots=7, threads=3)["shown"].ok
    assert store.log_path(shown.key, 1).read_text().startswith("to the log 3")


def test_a_job_with_a_gpu_gets_a_fresh_interpreter_that_sees_only_that_card(store: Store) -> None:
    jobs = [job(f"job {i}", do="show_environment", cuda="1") for i in range(2)]
    results = do(store, *jobs, gpus=[1], gpu_share=0.5, leases=Leases(store.root))
    assert [result.error for result in results.values()] == [None, None]


def test_gpu_slots_are_counted_by_share_and_a_whole_card_waits_for_an_empty_one(store: Store) -> None:
    with local(store, gpus=["0", "1"], gpu_share=0.5, leases=Leases(store.root)) as engine:
        assert engine.slots == 4
        handles = [engine.try_submit(job(f"{i}", do="stall"), 1) for i in range(3)]
        assert [handle.gpu["id"] for handle in handles if handle and handle.gpu] == ["0", "0", "1"]
        assert engine.try_submit(job("whole"), 1, whole_gpu=True) is None
        for handle in handles[:2]:
            assert handle is not None
            engine.cancel(handle, grace=0)
        ended: list[Any] = []
        while len(ended) < 2:
            ended += engine.wait(0.1)
        assert [outcome.failure for _, outcome in ended] == [Failure.interrupted] * 2
        whole = engine.try_submit(job("whole"), 1, whole_gpu=True)
        assert whole is not None and whole.gpu == {"id": "0", "share": 1.0}


@pytest.mark.parametrize("options", [{"gpu_share": 1.5}, {"gpu_share": 0}, {"cpu_slots": 0}, {"gpus": ["0", 0]}])
def test_demands_that_can_never_be_met_are_refused(store: Store, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give|once"):
        LocalEngine(store, **options)


def test_a_circle_of_jobs_is_refused_by_its_labels(store: Store) -> None:
    a = Job("aa" * 32, "attack", "a", ("bb" * 32,), {})
    b = Job("bb" * 32, "attack", "b", ("aa" * 32,), {})
    with local(store) as engine, pytest.raises(ValueError, match=r"circle: . needs . needs ."):
        run(graph(a, b), store, engine)


def test_a_need_that_is_nowhere_skips_the_job(store: Store) -> None:
    result = do(store, Job("cc" * 32, "sample", "c", ("dd" * 32,), {}))["c"]
    assert result.status == "skipped" and "neither in the store nor among the jobs" in (result.error or "")


def test_a_damaged_artifact_is_built_again_and_said_so(store: Store, tmp_path: Path) -> None:
    a = job("a", value=1)
    middle = job("middle", a, value=1)
    do(store, a, middle)
    (store.artifact(a.key) / "value.json").write_text("9")
    last = job("last", a, middle, value=10)
    results = do(store, a, middle, last)
    assert {label: result.status for label, result in results.items()} == {"a": "done", "middle": "hit", "last": "done"}
    assert value(store, last) == 13
    assert "value.json" in results["a"].warnings[0]
    assert digests(store, [a, middle, last]) == undisturbed(tmp_path, [a, middle, last])


def test_a_damaged_final_artifact_is_found_by_the_next_run(store: Store, tmp_path: Path) -> None:
    a = job("a", value=1)
    do(store, a)
    (store.artifact(a.key) / "value.json").write_text("9")
    result = do(store, a)["a"]
    assert result.status == "done" and value(store, a) == 1 and result.warnings
    assert digests(store, [a]) == undisturbed(tmp_path, [a])


class Order(Lines):
    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.labels: list[str] = []

    def started(self, job: Job, attempt: int) -> None:
        self.labels.append(job.label)


def test_the_job_with_the_longest_work_behind_it_starts_first(store: Store) -> None:
    short, long, head = job("short"), job("long", estimate=5), job("head", estimate=2)
    order = Order()
    do(store, short, long, head, job("tail", head, estimate=9), cpu_slots=1, listener=order)
    assert order.labels == ["head", "tail", "long", "short"]


def test_the_row_that_takes_the_least_work_comes_first_unless_the_store_has_one(store: Store) -> None:
    def row(name: str, *needs: Job, estimate: float) -> Job:
        return replace(job(name, *needs, estimate=estimate), kind="measure")

    attack, clean, shared = job("attack", estimate=9), job("clean", estimate=3), job("shared", estimate=1)
    jobs = [attack, clean, shared, row("dear row", attack, shared, estimate=1), row("row", clean, shared, estimate=2)]
    order = Order()
    do(store, *jobs, cpu_slots=1, listener=order)
    assert order.labels == ["clean", "shared", "row", "attack", "dear row"]
    more = [job("attack 2", estimate=9e6), job("clean 2", estimate=3)]  # far apart: what jobs took is learned
    order = Order()
    do(store, *jobs, *more, row("row 2", more[1], estimate=1), cpu_slots=1, listener=order)
    assert order.labels == ["attack 2", "clean 2", "row 2"], "there are rows to look at"


def test_lines_and_bars_tell_of_failures_and_only_count_what_is_skipped(store: Store) -> None:
    said, barred, bad = io.StringIO(), io.StringIO(), job("bad", do="fail")
    jobs = [job("fine"), bad, *(job(f"after {i}", bad) for i in range(3))]
    do(store, *jobs, listener=Lines(said))
    assert "5 jobs, 0 of them in the store" in said.getvalue()
    bars = Bars(barred)
    do(store, *jobs, listener=bars)
    assert [task.completed for task in bars.bars.tasks] == [5]
    bars.close()
    for text in (said.getvalue(), barred.getvalue()):
        assert text.count("bad: ValueError: box of side 14") == 1
        assert "after" not in text


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_lets_jobs_finish_and_twice_stops_them(store: Store, presses: int) -> None:
    class Pressing(Silent):
        def started(self, job: Job, attempt: int) -> None:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    slow, later = job("slow", estimate=9, seconds=1.0 if presses == 1 else 600), job("later")
    with pytest.raises(Interrupted) as caught:
        do(store, slow, later, cpu_slots=1, listener=Pressing())
    results = caught.value.results
    assert results[later.key].status == "skipped"
    assert results[slow.key].ok == (presses == 1)
    if presses == 2:
        assert results[slow.key].failure is Failure.interrupted


def test_jobs_can_be_stopped_while_the_fork_server_still_imports(store: Store) -> None:
    class Pressing(Silent):
        def started(self, job: Job, attempt: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        do(store, job("any"), preload=("slow_import",), listener=Pressing())


def test_a_killed_fork_server_costs_one_attempt_of_the_running_jobs(store: Store, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with local(store) as engine:
        slow = job("slow", do="learn", until=str(go))
        killer = kill_when_running(engine, slow, lambda pid: psutil.Process(pid).parent(), go)
        result = run(graph(slow), store, engine)[slow.key]
        killer.join()
    assert result.status == "done" and len(result.attempts) == 2
    assert digests(store, [slow]) == undisturbed(tmp_path, [slow])


@pytest.mark.slow
def test_after_kills_of_the_driver_the_next_run_completes_with_equal_results(
    store: Store, mark: str, tmp_path: Path
) -> None:
    trace, dice = tmp_path / "trace", random.Random()
    jobs = chain(trace)
    finished: dict[str, bytes] = {}
    for _ in range(4):
        started = trace.stat().st_size if trace.exists() else 0
        driver = start_driver(store, trace)
        while driver.poll() is None and not (trace.exists() and trace.stat().st_size > started):
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 0.6))
        driver.kill()
        driver.wait()
        assert_all_gone(mark)
        assert store.verify_all() == {}
        finished |= {job.key: manifest_bytes(store, job.key) for job in jobs if store.has(job.key)}
    last = start_driver(store, trace)
    assert last.wait(200) == 0
    assert [value(store, job) for job in jobs] == [0, 1, 0, 11, 20, 31, 120, 142]
    assert {key: manifest_bytes(store, key) for key in finished} == finished
    assert digests(store, jobs) == undisturbed(tmp_path, jobs)


def test_after_a_kill_of_a_job_only_that_job_is_tried_again(store: Store, tmp_path: Path) -> None:
    go = tmp_path / "go"
    slow, beside = (job(name, do="learn", until=str(go)) for name in ("slow", "beside"))
    after = job("after", slow, beside, value=4)
    with local(store) as engine:
        killer = kill_when_running(engine, slow, psutil.Process, go)
        results = run(graph(slow, beside, after), store, engine)
        killer.join()
    assert [len(results[j.key].attempts) for j in (slow, beside, after)] == [2, 1, 1]
    assert all(result.ok for result in results.values())
    assert digests(store, [slow, beside, after]) == undisturbed(tmp_path, [slow, beside, after])


@pytest.mark.slow
def test_two_drivers_on_one_store_share_the_work(store: Store, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    jobs = chain(trace)
    drivers = [start_driver(store, trace) for _ in range(2)]
    assert [driver.wait(200) for driver in drivers] == [0, 0]
    assert sorted(trace.read_text().splitlines()) == sorted(job.label for job in jobs)
    assert digests(store, jobs) == undisturbed(tmp_path, jobs)


@pytest.mark.slow
def test_torch_numbers_do_not_depend_on_the_jobs_beside_them(store: Store) -> None:
    alone = job("alone", do="matmul")
    beside = [job(f"beside {i}", do="matmul") for i in range(3)]
    with local(store, cpu_slots=3, preload=("torch", "engine_jobs")) as engine:
        for group in ([alone], beside):
            assert all(result.ok for result in run(graph(*group), store, engine).values())
    assert {value(store, one) for one in beside} == {value(store, alone)}


# ---- jobs that share a model


def users(notes: Path, *names: str, model: str = "m", start: float = 9.0, **spec: Any) -> list[Job]:
    """Jobs that use one model, in this order."""
    return [
        job(name, do="use", estimate=start - i, shares=model, model=model, notes=str(notes), **spec)
        for i, name in enumerate(names)
    ]


def noted(notes: Path) -> list[list[str]]:
    """[job, process, "loads" or "has"] for each use, in order."""
    return [line.split(",") for line in notes.read_text().splitlines()]


def apart(jobs: list[Job]) -> list[Job]:
    """The same jobs, each in a process of its own."""
    return [replace(job, reuse_key=None) for job in jobs]


def test_jobs_that_share_a_model_are_done_by_one_process_that_loads_it_once(store: Store, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    jobs = [*users(notes, "a", "b", "c"), *users(notes, "other", model="n"), *apart(users(notes, "alone"))]
    results = do(store, *jobs, cpu_slots=1)
    assert all(result.ok and len(result.attempts) == 1 for result in results.values())
    done = {name: (pid, how) for name, pid, how in noted(notes)}
    assert [done[name][1] for name in ("a", "b", "c", "other", "alone")] == ["loads", "has", "has", "loads", "loads"]
    assert len({done[name][0] for name in ("a", "b", "c")}) == 1
    assert len({pid for pid, _ in done.values()}) == 3
    for one in jobs:
        assert store.log_path(one.key, 1).read_text() == f"this is {one.label}\n"
        assert (store.outcome(one.key, 1) or {})["ok"]
    notes.unlink()
    assert digests(store, jobs) == undisturbed(tmp_path, apart(jobs))
    assert {how for *_, how in noted(notes)} == {"loads"} and len({pid for _, pid, _ in noted(notes)}) == 5


def test_a_process_with_a_model_prefers_its_users_and_is_ended_where_there_are_none(
    store: Store, mark: str, tmp_path: Path
) -> None:
    first, second = users(tmp_path / "notes", "first", "second")
    between = job("between", estimate=8.5)
    order = Order()
    with local(store, cpu_slots=1) as engine:
        run(graph(between, second, first), store, engine, listener=order)
        assert order.labels == ["first", "second", "between"]
        assert_left(mark, 1)  # the fork server
        (third,) = users(tmp_path / "notes", "third")
        run(graph(third), store, engine)
        assert_left(mark, 1)
    assert [how for *_, how in noted(tmp_path / "notes")] == ["loads", "has", "loads"]


def test_users_of_one_model_run_beside_each_other_rather_than_wait(store: Store, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    jobs = users(tmp_path / "notes", "a", "b", then="meet", folder=str(tmp_path / "here"), of=2)
    results = do(store, *jobs, limits=Limits(wall_s=120))
    assert all(result.ok for result in results.values())
    assert len({pid for _, pid, _ in noted(tmp_path / "notes")}) == 2


def test_a_kill_in_the_second_job_of_a_process_costs_that_job_one_attempt(store: Store, tmp_path: Path) -> None:
    notes, flag = tmp_path / "notes", str(tmp_path / "killed")
    first, third = users(notes, "first", "third")
    (second,) = users(notes, "second", start=8.5, then="crash_once", flag=flag, signal=int(signal.SIGKILL))
    results = do(store, first, second, third, cpu_slots=1)
    assert {label: len(result.attempts) for label, result in results.items()} == {"first": 1, "second": 2, "third": 1}
    assert all(result.ok for result in results.values())
    assert "SIGKILL" in results["second"].attempts[0]["error"]
    uses = noted(notes)
    assert [use[0] for use in uses] == ["first", "second", "second", "third"]
    assert [use[2] for use in uses] == ["loads", "has", "loads", "has"]
    assert digests(store, [first, second, third]) == undisturbed(tmp_path, apart([first, second, third]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "failure"),
    [
        ("hang", Failure.timeout), ("stall", Failure.stall), ("fail", Failure.plugin), ("eat_memory", Failure.memory),
        ("leave", Failure.plugin), ("ignore_sigterm", Failure.stall),
    ],
)  # fmt: skip
def test_after_a_failure_in_the_second_job_of_a_process_the_next_gets_another(
    store: Store, tmp_path: Path, then: str, failure: Failure
) -> None:
    notes = tmp_path / "notes"
    first, third = users(notes, "first", "third")
    (second,) = users(notes, "second", start=8.5, then=then)
    limits = Limits(wall_s=12, stall_s=6, rss_bytes=100 * 2**20, grace_s=0.3)
    results = do(store, first, second, third, cpu_slots=1, limits=limits)
    assert [result.failure for result in results.values()] == [None, failure, None]
    assert [len(result.attempts) for result in results.values()] == [1, 1, 1]
    assert [how for *_, how in noted(notes)] == ["loads", "has", "loads"]
    assert value(store, first) == value(store, third) == 1


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_reaches_the_second_job_of_a_process(store: Store, mark: str, tmp_path: Path, presses: int) -> None:
    class Heard(Silent):
        def note(self, text: str) -> None:
            if presses == 2 and "again to stop now" in text:
                os.kill(os.getpid(), signal.SIGINT)
            elif presses == 1:
                go.touch()

    def press() -> None:
        wait_for(lambda: notes.exists() and len(noted(notes)) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    notes, go = tmp_path / "notes", tmp_path / "go"
    first, third = users(notes, "first", "third")
    (second,) = users(notes, "second", start=8.5, then="learn", until=str(go))
    pressing = threading.Thread(target=press, daemon=True)
    with local(store, cpu_slots=1) as engine:
        pressing.start()
        with pytest.raises(Interrupted) as caught:
            run(graph(first, second, third), store, engine, listener=Heard())
        assert_left(mark, 1)
    pressing.join()
    results = caught.value.results
    assert [results[one.key].ok for one in (first, second, third)] == [True, presses == 1, False]
    assert results[second.key].failure is (None if presses == 1 else Failure.interrupted)
    assert [how for *_, how in noted(notes)] == ["loads", "has"]


@pytest.mark.parametrize("then", ["change_the_environment", "leave_a_child"])
def test_a_process_that_a_job_has_changed_does_no_other(store: Store, mark: str, tmp_path: Path, then: str) -> None:
    jobs = users(tmp_path / "notes", "a", "b", then=then)
    with local(store, cpu_slots=1) as engine:
        assert all(result.ok for result in run(graph(*jobs), store, engine).values())
        assert_left(mark, 1)
    assert [how for *_, how in noted(tmp_path / "notes")] == ["loads", "loads"]


def test_a_process_that_dies_while_it_waits_costs_nothing(store: Store, tmp_path: Path) -> None:
    first, second = users(tmp_path / "notes", "first", "second")
    with local(store, cpu_slots=1) as engine:
        handle = engine.try_submit(first, 1)
        while not engine.wait(0.1):
            pass
        assert handle is not None and handle.pid is not None and engine.kept == {"m"}
        waiting = psutil.Process(handle.pid)
        waiting.kill()
        waiting.wait(60)  # until the fork server has taken note
        assert engine.try_submit(second, 1) is not None
        ended: list[Any] = []
        while not ended:
            ended = engine.wait(0.1)
        assert [outcome.ok for _, outcome in ended] == [True]
    assert [how for *_, how in noted(tmp_path / "notes")] == ["loads", "loads"]


def test_a_lease_stays_with_the_process_and_ends_with_it(store: Store, tmp_path: Path) -> None:
    card, leases = Card("1"), Leases(tmp_path / "leases")
    jobs = users(tmp_path / "notes", "a", "b", then="show_environment", cuda="1")
    with local(store, gpus=[card], leases=leases) as engine:
        assert [result.error for result in run(graph(*jobs), store, engine).values()] == [None, None]
        deadline = time.monotonic() + 60
        while (lease := leases.take(card, PARTS)) is None and time.monotonic() < deadline:
            engine.wait(0.1)
        assert lease is not None
        lease.release()
    assert [how for *_, how in noted(tmp_path / "notes")] == ["loads", "has"]


def test_the_driver_does_not_import_torch() -> None:
    code = "import sys, harness.engine.driver, harness.engine.local; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
