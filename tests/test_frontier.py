"""The order of work: what is kept up to date job by job is what a look at the whole graph would find."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from harness.engine import driver, pace
from harness.engine.driver import JobResult
from harness.engine.frontier import Frontier, Ranked
from harness.engine.supervise import Handle, Outcome
from harness.runs.job import Failure, Job, SampleSpec
from harness.runs.store import Store
from tests.benchmarks.driver import Within, chains
from tests.engine_tools import graph, job

OUTSIDE = "outside"


class Whole:
    """The definition: everything is counted anew whenever somebody asks."""

    def __init__(self, needs: dict[str, set[str]]) -> None:
        self.needs = {key: set(found) for key, found in needs.items()}
        self.waiting, self.ended = set(needs), set[str]()
        self.times = dict.fromkeys(needs, 0)  # a part of the rank that changes

    def rank(self, key: str) -> tuple[Any, ...]:
        return -self.times[key], sorted(self.needs[key]), key

    def in_order(self, groups: Iterable[str] | None = None) -> list[str]:
        pending = set(self.needs) - self.ended
        ready = [key for key in self.waiting if pending.isdisjoint(self.needs[key])]
        return sorted((key for key in ready if groups is None or str(group(key)) in groups), key=self.rank)


def group(key: str) -> str | None:
    return f"group {int(key) % 3}" if int(key) % 4 else None


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, set[str]]:
    """Acyclic needs: job i needs some of the jobs before it, and now and then what no job makes."""
    size = draw(st.integers(1, 12))
    needs: dict[str, set[str]] = {}
    for i in range(size):
        needs[str(i)] = {str(k) for k in draw(st.sets(st.integers(0, i - 1), max_size=4))} if i else set()
        needs[str(i)] |= {OUTSIDE} if draw(st.booleans()) else set()
    return needs


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_after_any_history_the_ready_jobs_and_their_order_are_those_of_the_definition(
    needs: dict[str, set[str]], data: st.DataObject
) -> None:
    whole = Whole(needs)
    frontier = Frontier(needs, whole.rank, group)
    for _ in range(data.draw(st.integers(0, 30))):
        key = data.draw(st.sampled_from(sorted(needs, key=int)))
        act = data.draw(st.sampled_from(["begin", "end", "again", "need"]))
        if act == "begin" and key in whole.waiting:
            frontier.begin(key)
            whole.waiting.discard(key)
        elif act == "end" and key not in whole.ended:
            frontier.end(key)
            whole.waiting.discard(key)
            whole.ended.add(key)
        elif act == "again" and key not in whole.waiting:
            whole.times[key] += 1
            frontier.wait(key)
            whole.waiting.add(key)
            whole.ended.discard(key)
        elif act == "need" and key not in whole.waiting and key != "0":
            other = str(data.draw(st.integers(0, int(key) - 1)))
            frontier.need(key, other)
            whole.needs[key].add(other)
        if data.draw(st.booleans()):
            frontier.update()
            assert list(frontier.in_order()) == whole.in_order()
    frontier.update()
    assert list(frontier.in_order()) == whole.in_order()
    assert frontier.waiting == whole.waiting
    groups = data.draw(st.sets(st.sampled_from(["group 0", "group 1", "group 2"])))
    assert list(frontier.sharing(groups)) == whole.in_order(groups)
    assert list(frontier.in_order()) == whole.in_order(), "looking changes nothing"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_a_walk_that_is_left_early_loses_only_what_was_dropped_on_the_way(
    ranks: list[int], data: st.DataObject
) -> None:
    ranked = Ranked()
    for i, rank in enumerate(ranks):
        ranked.put(str(i), (rank, str(i)))
    left = sorted(map(str, range(len(ranks))), key=lambda key: (ranks[int(key)], key))
    for _ in range(3):
        stop, dropped = data.draw(st.integers(0, len(left))), data.draw(st.sets(st.sampled_from(left or ["0"])))
        seen = []
        with closing(ranked.walk()) as walk:
            for key in itertools.islice(walk, stop):
                seen.append(key)
                if key in dropped:
                    ranked.drop(key)
        assert seen == left[:stop]
        left = [key for key in left if key not in dropped or key not in seen]
        assert list(ranked.walk()) == left


# ---- the whole driver against the definition


class Trace(Within):
    """Notes in which order jobs are handed over; jobs whose label is in `failing` fail."""

    def __init__(self, store: Store, failing: set[str]) -> None:
        super().__init__(store, slots=1)
        self.failing, self.order = failing, list[str]()

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None:
        if job.label not in self.failing:
            handle = super().try_submit(job, attempt, whole_gpu=whole_gpu)
        elif self.running:
            return None
        else:
            handle = Handle(job, attempt, attempt)
            self.running.append(handle)
        if handle is not None:
            self.order.append(job.label)
        return handle

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        return [
            (handle, Outcome(False, Failure.plugin, "no") if handle.job.label in self.failing else outcome)
            for handle, outcome in super().wait(timeout)
        ]


def expected(jobs: dict[str, Job], failing: set[str]) -> tuple[list[str], dict[str, str]]:
    """The order of work with one slot and the reason of each skipped job, found by scanning the graph after each."""
    chain = driver._chains(jobs, pace.Pace())
    order: list[str] = []
    error: dict[str, str | None] = {}  # key → None where the job is done
    reasons: dict[str, str] = {}
    while len(error) < len(jobs):
        for key in sorted(set(jobs) - set(error), key=lambda key: -chain[key]):
            for need in jobs[key].needs:
                if need not in jobs:
                    reasons[key] = f"artifact {need[:12]} is neither in the store nor among the jobs"
                elif error.get(need) is not None:
                    reasons[key] = reasons.get(need) or f"{jobs[need].label} failed: {error[need]}"
                else:
                    continue
                error[key] = f"skipped: {reasons[key]}"
                break
        ready = [key for key in jobs if key not in error and all(need in error for need in jobs[key].needs)]
        if ready:
            key = min(ready, key=lambda key: (-chain[key], sorted(jobs[key].needs), key))
            order.append(jobs[key].label)
            error[key] = "no" if jobs[key].label in failing else None
    return order, {jobs[key].label: reason for key, reason in reasons.items()}


@settings(max_examples=25, deadline=None)
@given(graphs(), st.data())
def test_the_driver_works_and_skips_in_the_order_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, needs: dict[str, set[str]], data: st.DataObject
) -> None:
    nowhere = Job("dd" * 32, "sample", "nowhere", (), {})
    made: dict[str, Job] = {}
    for name, found in needs.items():
        lost = [nowhere] if OUTSIDE in found and data.draw(st.integers(0, 4)) == 0 else []
        inner = [made[need] for need in sorted(found - {OUTSIDE}, key=int)]
        made[name] = job(f"job {name}", *inner, *lost, estimate=data.draw(st.sampled_from([1.0, 2.0, 5.0])))
    failing = {f"job {name}" for name in data.draw(st.sets(st.sampled_from(sorted(needs)), max_size=3))}
    store = Store(tmp_path_factory.mktemp("store"))
    engine, jobs = Trace(store, failing), graph(*made.values())
    results = driver.run(jobs, store, engine)
    order, reasons = expected(jobs, failing)
    assert engine.order == order
    assert {each.label: results[each.key].reason for each in made.values() if results[each.key].reason} == reasons


def test_a_job_that_is_tried_again_is_skipped_if_what_it_needs_has_failed_meanwhile(tmp_path: Path) -> None:
    """The need was damaged, another job had it built again, and that failed while the first job ran."""
    store = Store(tmp_path)
    need, user = job("need"), job("user", job("need"))
    run = driver._Run(graph(need, user), store, Within(store), driver.Silent(), None)
    run._settle(need.key, JobResult(need.key, "done"))
    run.frontier.begin(user.key)
    run._settle(need.key, JobResult(need.key, "failed", "no"))
    run._skip()
    assert user.key not in run.results
    run._wait(user.key)
    run._skip()
    assert run.results[user.key].reason == "need failed: no"


def test_a_set_that_may_become_a_copy_waits_for_the_set_that_it_would_copy(tmp_path: Path) -> None:
    """However long it takes by its estimate; once the other is there it has its usual place, and it never waits for one
    that is not part of the run."""
    other, usual = job("other", estimate=10.0), job("usual", estimate=20.0)
    spec = SampleSpec(model="m", sampler="s", n=1, beside=((other.key, (None,)), ("f" * 64, (None,))))
    maybe = replace(job("maybe", estimate=99.0), spec=spec)
    run = driver._Run(graph(maybe, usual, other), Store(tmp_path), Within(Store(tmp_path)), driver.Silent(), None)

    def order() -> list[str]:
        return [run.jobs[key].label for key in sorted(run.jobs, key=run._rank)]

    assert order() == ["usual", "other", "maybe"]
    run._settle(other.key, JobResult(other.key, "done"))
    assert order() == ["maybe", "usual", "other"]


def test_the_drivers_work_for_the_order_grows_with_the_jobs_and_not_with_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"ranks": 0, "needs": 0}
    rank, why_not = driver._Run._rank, driver._Run._why_not

    def ranked(self: Any, key: str) -> Any:
        counts["ranks"] += 1
        return rank(self, key)

    def asked(self: Any, need: str) -> Any:
        counts["needs"] += 1
        return why_not(self, need)

    monkeypatch.setattr(driver._Run, "_rank", ranked)
    monkeypatch.setattr(driver._Run, "_why_not", asked)
    for size in (50, 200):
        store = Store(tmp_path / str(size))
        counts.update(ranks=0, needs=0)
        results = driver.run(graph(*chains(size)), store, Within(store))
        assert all(result.status == "done" for result in results.values())
        assert counts == {"ranks": size, "needs": 0}, "one place in the order for each job, nothing asked twice"


def test_estimates_of_the_time_left_take_a_small_share_of_the_drivers_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(driver.time, "monotonic", lambda: now[0])
    told: list[float] = []

    class Telling(driver.Silent):
        def remaining(self, seconds: float) -> None:
            told.append(now[0])
            now[0] += 0.5  # what an estimate takes where many jobs wait

    store = Store(tmp_path)
    run = driver._Run(graph(job("a")), store, Within(store), Telling(), None)
    for _ in range(1000):
        run._tell()
        now[0] += 0.1
    assert told[:2] == [0.0, pytest.approx(0.5 + 0.5 / driver.TELL_SHARE, abs=0.2)]
