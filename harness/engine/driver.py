"""The graph of jobs: what is there already, what comes next, what is tried again, what can no longer be done."""

from __future__ import annotations

import graphlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from types import FrameType
from typing import Any, Literal, Protocol

from harness.engine import failures
from harness.engine.display import Listener, Silent
from harness.engine.frontier import Frontier
from harness.engine.pace import Pace
from harness.engine.supervise import Handle, Outcome
from harness.runs.job import Failure, Job
from harness.runs.store import CorruptArtifact, MissingArtifact, Store

TICK_S = 0.1
TELL_S = 1.0  # between two estimates of the time left, at least
TELL_SHARE = 0.02  # of the driver's time for these estimates, at most: each looks at every waiting job
OFF_GPU = "off GPUs"  # group of the jobs that use none
MAX_REBUILDS = 3  # of one damaged artifact that one job meets

Status = Literal["hit", "done", "failed", "skipped"]


@dataclass(frozen=True)
class JobResult:
    """The end of a job. attempts: every one ever made, in this run and before. seconds: of this run's last attempt.
    reason: what a skipped job lacked, which is the reason of those that need it too."""

    key: str
    status: Status
    error: str | None = None
    failure: Failure | None = None
    attempts: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.status in ("hit", "done")


def _skipped(key: str, reason: str) -> JobResult:
    return JobResult(key, "skipped", f"skipped: {reason}", Failure.skipped, reason=reason)


class Engine(Protocol):
    """Places jobs. `LocalEngine` is one."""

    @property
    def running(self) -> list[Handle]: ...

    @property
    def slots(self) -> int: ...

    @property
    def shares_gpus(self) -> bool: ...

    @property
    def spares_gpus(self) -> bool: ...

    @property
    def kept(self) -> Collection[str | None]: ...

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None: ...

    def release(self) -> None: ...

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]: ...

    def cancel(self, handle: Handle, grace: float | None = None) -> None: ...


class Interrupted(Exception):
    """The user, or the time that the user gave, stopped the run; `results` holds every job's state."""

    def __init__(self, results: dict[str, JobResult], why: str) -> None:
        done = sum(result.ok for result in results.values())
        super().__init__(f"{why} with {done} of {len(results)} jobs done; the same command resumes the run")
        self.results = results


def run(
    jobs: Mapping[str, Job],
    store: Store,
    engine: Engine,
    *,
    listener: Listener | None = None,
    max_seconds: float | None = None,
) -> dict[str, JobResult]:
    """Bring every job's artifact into the store and say how each job ended, in the order of `jobs`.

    Jobs whose artifact is there are hits; those that failed in an earlier run are tried again. max_seconds: then what
    still runs is ended; a job that is known to take longer than what is left is not started. Raises ValueError for a
    graph with a cycle, Interrupted after Ctrl-C (once: running jobs finish first; twice, or SIGTERM: now) and when the
    time is over, StoreError when the store cannot be written any more.
    """
    return _Run(jobs, store, engine, listener or Silent(), max_seconds).go()


class _Run:
    def __init__(
        self,
        jobs: Mapping[str, Job],
        store: Store,
        engine: Engine,
        listener: Listener,
        max_seconds: float | None,
    ) -> None:
        self.jobs = dict(jobs)
        self.store = store
        self.engine = engine
        self.listener = listener
        self.max_seconds = max_seconds
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.pace = Pace()
        self.chain = _chains(self.jobs, self.pace)
        self.sinks = set(self.jobs).difference(*(job.needs for job in self.jobs.values()))
        self.results: dict[str, JobResult] = {}
        needs = {key: job.needs for key, job in self.jobs.items()}
        self.frontier = Frontier(needs, self._rank, self._group)
        self.early: set[str] = set()
        self.outside = {key: found for key, job in self.jobs.items() if (found := self._of_others(job))}
        self.doomed: list[tuple[float, str]] = []  # a heap: what may need something that failed or is nowhere
        self.locks: dict[str, Any] = {}
        self.tried: set[str] = set()
        self.retries: Counter[tuple[str, Failure]] = Counter()
        self.rebuilds: Counter[tuple[str, str]] = Counter()
        self.warnings: dict[str, list[str]] = {key: [] for key in self.jobs}
        self.elsewhere: dict[str, int] = {}  # attempts that were over when another run was found at the job
        self.noted: set[str] = set()  # jobs that another run was said to be working on
        self.told: dict[str, Any] = {}
        self.tell_at = 0.0
        self.stops = self.said = 0
        self.why = "interrupted"

    @property
    def waiting(self) -> set[str]:
        return self.frontier.waiting

    def _of_others(self, job: Job) -> tuple[str, ...]:
        """What a job needs that no job of this run makes."""
        return tuple(need for need in job.needs if need not in self.jobs)

    def go(self) -> dict[str, JobResult]:
        self.store.gc()
        try:
            with _signals(self._stop):
                for key in self.jobs:
                    self._look_up(key)
                self.chain = _chains(self.jobs, self.pace)
                self.early = self._first_row()
                self.listener.planned(len(self.jobs), len(self.results))
                self._look_outside()
                while self.waiting or self.locks:
                    self._step()
        finally:
            self._abandon()
        results = {key: self.results[key] for key in self.jobs}
        if self.stops:
            raise Interrupted(results, self.why)
        return results

    def _step(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline and not self.stops:
            self._stop(True, f"the {(self.max_seconds or 0.0) / 3600:g} h are over")
        self._skip()
        self.frontier.update()
        if self.stops:
            self._drain()
        else:
            self._submit_all()
        for handle, outcome in self.engine.wait(TICK_S if self.waiting or self.locks else 0):
            self._ended(handle, outcome)
        self._tell()

    def _tell(self) -> None:
        running = self.engine.running
        for handle in running:
            if handle.event is not None and handle.event is not self.told.get(handle.job.key):
                self.told[handle.job.key] = handle.event
                self.listener.progress(handle.job, handle.event)
        now = time.monotonic()
        if now >= self.tell_at:
            begun = [(handle.job, now - handle.started if handle.started else 0.0) for handle in running]
            rest = [(self.jobs[key], 0.0) for key in self.waiting]
            self.listener.remaining(self.pace.left([*begun, *rest], self.engine.slots))
            then = time.monotonic()
            self.tell_at = max(now + TELL_S, then + (then - now) / TELL_SHARE)

    # ---- before a job

    def _look_up(self, key: str) -> bool:
        """Settle the job as a hit if its artifact is complete. One that no job reads is verified here, by its bytes."""
        if not self.store.has(key):
            return False
        if key in self.sinks:
            try:
                self.store.open_artifact(key)
            except (CorruptArtifact, MissingArtifact) as error:
                self._warn(key, str(error))
                return False
        self.pace.learn(self.jobs[key], (self.store.manifest(key)["facts"].get("cost") or {}).get("wall_s"))
        self._settle(key, JobResult(key, "hit"))
        return True

    def _look_outside(self) -> None:
        """Note the waiting jobs that need an artifact which is nowhere."""
        found: dict[str, bool] = {}
        for key in self.waiting & self.outside.keys():
            for need in self.outside[key]:
                if need not in found:
                    found[need] = self.store.has(need)
                if not found[need]:
                    self._doom(key)

    def _doom(self, key: str) -> None:
        """Let `_skip` look at a job."""
        heappush(self.doomed, (-self.chain[key], key))

    def _skip(self) -> None:
        """Settle every waiting job that needs something which failed or is nowhere."""
        while self.doomed:
            _, key = heappop(self.doomed)  # needs come before what needs them
            if key in self.waiting:
                self._skip_if_hopeless(key, self.jobs[key].needs)

    def _skip_if_hopeless(self, key: str, needs: Iterable[str]) -> bool:
        """Settle a job as skipped if one of `needs` failed or is nowhere."""
        for need in needs:
            reason = self._why_not(need)
            if reason is not None:
                self._settle(key, _skipped(key, reason))
                return True
        return False

    def _why_not(self, need: str) -> str | None:
        result = self.results.get(need)
        if result is not None and not result.ok:
            if result.status == "skipped":
                return result.reason or result.error or "skipped"
            return f"{self.jobs[need].label} failed: {result.error}"
        if need not in self.jobs and not self.store.has(need):
            return f"artifact {need[:12]} is neither in the store nor among the jobs"
        return None

    def _group(self, key: str) -> str | None:
        """Jobs of a group share what they load, or the processors beside GPUs."""
        job = self.jobs[key]
        return job.reuse_key if job.on_gpu else OFF_GPU

    def _rank(self, key: str) -> tuple[Any, ...]:
        """Those for a whole card first, then those of the first row, then those with the longest work behind them. Of
        jobs with as much work behind them those that read the same artifacts come one after another, while their model
        is still in the machine's file cache. Last come those that another job may make a matter of copying."""
        whole, early = self.retries[key, Failure.oom] > 0, key in self.early
        return not whole, not early, self._spared_later(key), -self.chain[key], sorted(self.jobs[key].needs), key

    def _spared_later(self, key: str) -> bool:
        """Whether an image set that may have the inputs of this one is still to come."""
        beside = getattr(self.jobs[key].spec, "beside", ())
        return any(other in self.jobs and other not in self.results for other, _ in beside)

    def _first_row(self) -> set[str]:
        """The jobs of the row that takes the least work, so that a run shows a row early; none where the store has a
        row of this run already."""
        rows = [key for key in self.jobs if self.jobs[key].kind == "measure"]
        if any(key in self.results for key in rows):
            return set()
        return min((self._unfinished(key) for key in rows), key=self._work, default=set())

    def _unfinished(self, key: str) -> set[str]:
        """A job and all that it needs, without what is in the store."""
        found, look = set[str](), [key]
        while look:
            if (each := look.pop()) in self.jobs and each not in self.results and each not in found:
                found.add(each)
                look += self.jobs[each].needs
        return found

    def _work(self, keys: Iterable[str]) -> float:
        return sum(self.pace.expect(self.jobs[key]) for key in keys)

    def _submit_all(self) -> None:
        """Start what there is room for. A process that has just done a job gets the first one that shares what it
        loaded, or ends at once; no job waits for it, and no other job waits for more than its end."""
        with closing(self.frontier.sharing(self.engine.kept)) as ready:
            for key in ready:
                if not self.engine.kept:
                    break
                if self.jobs[key].reuse_key in self.engine.kept:
                    self._submit([key])
        self.engine.release()
        if self.engine.spares_gpus:
            with closing(self.frontier.sharing([OFF_GPU])) as ready:
                self._submit(ready)
        with closing(self.frontier.in_order()) as ready:
            self._submit(key for key in ready if self.jobs[key].on_gpu or not self.engine.spares_gpus)

    def _submit(self, ready: Iterable[str]) -> None:
        for key in ready:
            if key not in self.waiting or self._too_long(key):
                continue
            if not self._lock(key) or self._look_up(key) or self._adopt(key):
                continue
            if self._skip_if_hopeless(key, self.outside.get(key, ())):
                continue
            job, attempts = self.jobs[key], self.store.attempts(key)
            whole = self.retries[key, Failure.oom] > 0
            handle = self.engine.try_submit(job, len(attempts) + 1, whole_gpu=whole)
            if handle is None:
                if key not in self.tried:  # else another run would think that we gave it up
                    self._unlock(key)
                return
            self._begin(job, attempts)

    def _too_long(self, key: str) -> bool:
        """Whether jobs of this method are known to take longer than the time that is left."""
        if self.deadline is None or not self.pace.knows(self.jobs[key]):
            return False
        late = time.monotonic() + self.pace.expect(self.jobs[key]) > self.deadline
        if late and not self.engine.running:
            hours = (self.max_seconds or 0.0) / 3600
            self._stop(True, f"nothing more can be done in the {hours:g} h")
        return late

    def _lock(self, key: str) -> bool:
        """Take the job's lock, so that no other driver runs it too."""
        from filelock import Timeout

        if key in self.locks:
            return True
        lock = self.store.lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            attempts = self.store.attempts(key)
            self.elsewhere.setdefault(key, _over(attempts))
            running = bool(attempts) and attempts[-1]["status"] == "running"  # else it only looks whether it has room
            if running and key not in self.noted:
                self.noted.add(key)
                self.listener.note(f"{self.jobs[key].label}: another run is working on it; waiting for it")
            return False
        self.locks[key] = lock
        return True

    def _adopt(self, key: str) -> bool:
        """Settle the job as failed if another run, for which we waited, has just seen it fail for good."""
        if key not in self.elsewhere:
            return False
        before, attempts = self.elsewhere.pop(key), self.store.attempts(key)
        if _over(attempts) <= before or attempts[-1]["status"] != "failed":
            return False
        failure = attempts[-1].get("failure")
        if failure == Failure.interrupted.value:
            return False
        self._settle(key, JobResult(key, "failed", attempts[-1].get("error"), failures.known(failure)))
        return True

    def _unlock(self, key: str) -> None:
        lock = self.locks.pop(key, None)
        if lock is not None:
            lock.release()

    def _begin(self, job: Job, attempts: list[dict[str, Any]]) -> None:
        for attempt in attempts:
            if attempt["status"] == "running":  # we hold its lock, so whoever ran it is dead
                attempt |= {"status": "failed", "failure": Failure.interrupted.value, "error": "its driver died"}
        number = len(attempts) + 1
        entry = {
            "attempt": number, "status": "running", "started": time.time(), "log": f"log.{number}.txt",
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
        }  # fmt: skip
        self.store.write_attempts(job.key, [*attempts, entry])
        self.frontier.begin(job.key)
        self.tried.add(job.key)
        self.listener.started(job, number)

    # ---- after a job

    def _ended(self, handle: Handle, outcome: Outcome) -> None:
        key = handle.job.key
        if outcome.ok and not self.store.has(key):
            outcome = replace(outcome, ok=False, failure=Failure.plugin, error="it succeeded but wrote no artifact")
        self._note_attempt(key, outcome)
        self.told.pop(key, None)
        if outcome.ok:
            self.pace.learn(handle.job, _seconds(outcome))
            self._settle(key, JobResult(key, "done", seconds=_seconds(outcome)))
        elif self._rebuild(key, outcome) or self._retry(key, outcome):
            self._wait(key)
        else:
            error = outcome.error or "failed without an error message"
            self._settle(key, JobResult(key, "failed", error, outcome.failure, seconds=_seconds(outcome)))

    def _note_attempt(self, key: str, outcome: Outcome) -> None:
        attempts = self.store.attempts(key)
        attempts[-1] |= {
            "status": "done" if outcome.ok else "failed",
            "failure": outcome.failure.value if outcome.failure else None,
            "error": outcome.error,
            "advice": failures.advice(outcome.failure, key),
            "traceback": outcome.traceback,
            **outcome.cost,
        }
        self.store.write_attempts(key, attempts)

    def _retry(self, key: str, outcome: Outcome) -> bool:
        failure = outcome.failure
        most = failures.retries(failure, self.engine.shares_gpus)
        if self.stops or failure is None or self.retries[key, failure] >= most:
            return False
        self.retries[key, failure] += 1
        self._warn(key, f"tried again after: {outcome.error}")
        return True

    def _rebuild(self, key: str, outcome: Outcome) -> bool:
        """Put the damaged artifact that the job met back among the waiting jobs."""
        bad, job = outcome.corrupt, self.jobs[key]
        if bad is None or bad not in self.jobs or self.rebuilds[key, bad] >= MAX_REBUILDS or self.stops:
            return False
        self.rebuilds[key, bad] += 1
        self.jobs[key] = replace(job, needs=tuple({*job.needs, bad}))  # it may have been a need of a need
        self.frontier.need(key, bad)
        if bad in self.results and not self.store.has(bad):
            del self.results[bad]
            self._wait(bad)
            self._warn(bad, f"built again: {outcome.error}")
        return True

    def _wait(self, key: str) -> None:
        """Let a job wait again. What it needs may have failed while it ran."""
        self.frontier.wait(key)
        self._doom(key)

    def _warn(self, key: str, text: str) -> None:
        self.warnings[key].append(text)
        self.listener.note(f"{self.jobs[key].label}: {text}")

    def _settle(self, key: str, result: JobResult) -> None:
        self.frontier.end(key)
        self._unlock(key)
        attempts = self.store.attempts(key)
        if result.status == "hit" and attempts and attempts[-1]["status"] == "running":
            attempts[-1] |= {"status": "done", "failure": None, "error": None}  # its driver died before it could say so
        kept = tuple({sys.intern(name): value for name, value in attempt.items()} for attempt in attempts)
        self.results[key] = replace(result, attempts=kept, warnings=tuple(self.warnings[key]))
        if not result.ok:
            for other in self.frontier.needed_by(key):
                self._doom(other)
        advice = failures.advice(result.failure, key) if result.status == "failed" else None
        self.listener.finished(self.jobs[key], result.status, result.error, result.seconds, advice)

    # ---- interruption

    def _stop(self, urgent: bool, why: str = "interrupted") -> None:
        if not self.stops:
            self.why = why
        self.stops = 2 if urgent or self.stops else 1

    def _drain(self) -> None:
        """Settle what has not started; at the second request end what runs, too."""
        self.engine.release()
        if self.said < self.stops:
            self.said = self.stops
            how = "now" if self.stops > 1 else "when the running jobs are done; press Ctrl-C again to stop now"
            self.listener.note(f"{self.why}: stopping {how}")
        if self.stops > 1:
            for handle in self.engine.running:
                self.engine.cancel(handle, grace=1.0)
        for key in sorted(self.waiting):
            self._settle(key, JobResult(key, "skipped", f"{self.why} before it started", Failure.interrupted))

    def _abandon(self) -> None:
        """After an error of the driver's own: leave no job running and no lock held. No process waits for a job."""
        for handle in self.engine.running:
            self.engine.cancel(handle, grace=0)
        self.engine.release()
        for key in list(self.locks):
            self._unlock(key)


def _chains(jobs: Mapping[str, Job], pace: Pace) -> dict[str, float]:
    """For each job the expected seconds until all that waits for it is done: the longest goes first."""
    try:
        order = list(graphlib.TopologicalSorter({key: job.needs for key, job in jobs.items()}).static_order())
    except graphlib.CycleError as error:
        labels = " needs ".join(jobs[key].label for key in reversed(error.args[1]))
        raise ValueError(f"the jobs depend on each other in a circle: {labels}") from None
    after: dict[str, float] = {}
    chain: dict[str, float] = {}
    for key in reversed(order):
        if key in jobs:
            chain[key] = pace.expect(jobs[key]) + after.get(key, 0.0)
            for need in jobs[key].needs:
                after[need] = max(after.get(need, 0.0), chain[key])
    return chain


def _over(attempts: list[dict[str, Any]]) -> int:
    return sum(attempt["status"] != "running" for attempt in attempts)


def _seconds(outcome: Outcome) -> float:
    return float(outcome.cost.get("wall_s") or 0.0)


@contextmanager
def _signals(stop: Callable[[bool], None]) -> Iterator[None]:
    """Call stop(urgent) on Ctrl-C (False) and SIGTERM (True) while this lasts; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: FrameType | None) -> None:
        stop(number == signal.SIGTERM)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
