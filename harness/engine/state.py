"""What is known of a run from its store alone: while it runs, after it ended, after it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.engine.failures import advice
from harness.engine.supervise import last_event
from harness.runs.store import Store

State = Literal["done", "running", "failed", "lost", "skipped", "waiting"]


@dataclass(frozen=True)
class JobState:
    """lost: it was running when its driver died; the next run tries it again. event: the newest of a running job."""

    key: str
    label: str
    state: State
    estimate: float
    attempts: int = 0
    started: float | None = None
    seconds: float | None = None
    failure: str | None = None
    error: str | None = None
    advice: str | None = None
    event: Mapping[str, Any] | None = None


def states(store: Store, run: Mapping[str, Any]) -> list[JobState]:
    """The jobs of a run (as `Store.write_run` has it), in its order."""
    found: dict[str, JobState] = {}
    for job in run["jobs"]:
        found[job["key"]] = _state(store, job, found)
    return list(found.values())


def _state(store: Store, job: Mapping[str, Any], before: Mapping[str, JobState]) -> JobState:
    key, attempts = job["key"], store.attempts(job["key"])
    last = attempts[-1] if attempts else {}
    facts: dict[str, Any] = {
        "attempts": len(attempts), "started": last.get("started"), "seconds": last.get("wall_s"),
    }  # fmt: skip
    state: State = "waiting"
    if store.has(key):
        state = "done"
    elif last.get("status") == "running":
        state = "running" if is_held(store, key) else "lost"
        facts["event"] = last_event(store.events_path(key)) if state == "running" else None
    elif last.get("status") == "failed" and last.get("failure") != "interrupted":
        state = "failed"
        told = last.get("advice") or advice(last.get("failure"), key)
        facts |= {"failure": last.get("failure"), "error": last.get("error"), "advice": told}
    elif any(before[need].state in ("failed", "skipped") for need in job["needs"] if need in before):
        state = "skipped"
    return JobState(key, job["label"], state, job["estimate"], **facts)


def is_held(store: Store, key: str) -> bool:
    """Whether a living driver holds the job."""
    from filelock import Timeout

    lock = store.lock(key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def newest_remaining(store: Store, suite: str) -> tuple[float, float] | None:
    """(when, seconds): the newest estimate of the time left that a driver wrote."""
    for event in _backwards(store, suite):
        if event.get("event") == "remaining":
            return float(event["ts"]), float(event["seconds"])
        if event.get("event") in ("planned", "closed"):
            return None
    return None


def _backwards(store: Store, suite: str) -> Iterator[dict[str, Any]]:
    """The newest events of a suite's runs, the last one first."""
    try:
        with store.run_events(suite).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return
    for line in reversed(lines):
        try:
            yield json.loads(line)
        except ValueError:  # the cut beginning of a line, or a killed writer's end of one
            continue
