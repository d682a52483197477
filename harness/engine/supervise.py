"""Job processes as the driver sees them: start, watch against limits, kill, and say how each one ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.engine.failures import STORE_LOST
from harness.runs.job import Failure, Job
from harness.runs.jsonable import to_jsonable
from harness.runs.store import Store

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
BUSY_S = 3.0  # how long a kill may wait for a fork server that is importing
MEMORY_S = 0.25  # between two looks at a job's memory: each reads the whole process table


@dataclass(frozen=True)
class Limits:
    """What one job may use. None: no limit."""

    wall_s: float | None = 4 * 3600.0  # from its start
    stall_s: float | None = 1800.0  # without any progress event
    rss_bytes: int | None = None  # resident memory of the process tree, shared pages counted in each process
    grace_s: float = 5.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. cost: {wall_s, cpu_s, peak_rss_bytes, cuda_peak_bytes}, None for what nobody measured."""

    ok: bool
    failure: Failure | None = None
    error: str | None = None
    traceback: str | None = None
    corrupt: str | None = None  # key of a damaged or missing artifact that the job needed
    signal: int | None = None  # what killed it, unless we did
    cost: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Handle:
    """A running job."""

    job: Job
    attempt: int
    number: int
    gpu: dict[str, Any] | None = None  # {"id", "share"}
    pid: int | None = None
    started: float | None = None  # monotonic; None until its process exists
    verdict: tuple[Failure, str] | None = None  # why we are killing it
    kill_at: float | None = None
    seen: tuple[int, int] = (0, 0)  # time and size of the event file as last looked at
    heard: float = 0.0  # monotonic time of its newest sign of life: clocks of disks and days may jump
    event: Mapping[str, Any] | None = None  # the newest progress event
    peak_rss: int = 0
    weigh_at: float = 0.0  # when to look at its memory next
    keep: bool = False  # whether its process may be kept for another job


class Supervisor:
    """Runs jobs in processes through one fork server, which starts with the first job: each in one of its own, or on
    request in that of another job that ended well.

    execute: "module:function" with (spec, store, out) -> facts. preload: modules imported once in the fork server.
    threads: of every job, whatever else runs, so that numbers never depend on the load.
    """

    def __init__(self, store: Store, execute: str, preload: Sequence[str], threads: int, limits: Limits) -> None:
        self.store = store
        self.execute = execute
        self.preload = list(preload)
        self.threads = threads
        self.limits = limits
        self.running: dict[int, Handle] = {}
        self.kept: dict[int, Handle] = {}  # jobs that are done, whose processes wait for others
        self._released: dict[int, Handle] = {}  # jobs that are done, whose processes are being killed
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lifeline: int | None = None
        self._unread = b""
        self._count = 0
        self._lost: list[int] = []

    @property
    def held(self) -> set[int]:
        """Numbers of the jobs whose processes may be alive."""
        return {*self.running, *self.kept, *self._released}

    def start(self, job: Job, attempt: int, gpu: dict[str, Any] | None, keep: bool = False) -> Handle:
        """Start a process for `job`. gpu: {"id": "0", "share": 0.5}, or None for the CPU. keep: when the job has ended
        well its process is in `kept`, until another job goes on in it or `release` ends it."""
        return self._start(job, attempt, gpu, keep, None)

    def go_on(self, kept: Handle, job: Job, attempt: int) -> Handle:
        """Start `job` in the process that did the job of `kept`."""
        del self.kept[kept.number]
        return self._start(job, attempt, kept.gpu, True, kept.number)

    def release(self) -> None:
        """End the processes that are kept."""
        while self.kept:
            self._end(self.kept.popitem()[1])

    def _end(self, done: Handle) -> None:
        self._released[done.number] = done
        self._kill(done, signal.SIGKILL)  # it has written all that it had to

    def _start(self, job: Job, attempt: int, gpu: dict[str, Any] | None, keep: bool, after: int | None) -> Handle:
        self._count += 1
        handle = Handle(job, attempt, self._count, gpu, keep=keep)
        self.store.events_path(job.key).unlink(missing_ok=True)
        self.store.outcome_path(job.key, attempt).unlink(missing_ok=True)
        self.running[handle.number] = handle
        self._send({"run": handle.number, "request": self._request(handle), "after": after})
        return handle

    def poll(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        """Wait at most `timeout` seconds for jobs to end; enforce the limits."""
        ended: list[tuple[Handle, Outcome]] = []
        for message in self._receive(timeout):
            (number,) = (message[name] for name in ("started", "done", "exit") if name in message)
            handle = self.running.get(number)
            if handle is None:
                self.kept.pop(number, None)
                self._released.pop(number, None)
            elif "started" in message:
                handle.pid, handle.started = message["pid"], time.monotonic()
                handle.heard = handle.started
                handle.weigh_at = handle.started + MEMORY_S
            else:
                del self.running[number]
                ended.append((handle, self._outcome(handle, message.get("code", 0))))
                if "done" in message:
                    self._keep(handle)
        for handle in self.running.values():
            self._check(handle)
        return ended

    def _keep(self, done: Handle) -> None:
        if done.verdict is None:
            self.kept[done.number] = done
        else:
            self._end(done)

    def cancel(self, handle: Handle, failure: Failure, reason: str, grace: float | None = None) -> None:
        """Ask the job's process group to end, and kill it after `grace` seconds (default: the limits' grace)."""
        if handle.verdict is None:
            handle.verdict = failure, reason
            handle.kill_at = time.monotonic() + (self.limits.grace_s if grace is None else grace)
            self._kill(handle, signal.SIGTERM if grace != 0 else signal.SIGKILL)

    def close(self) -> None:
        """Kill whatever runs and end the fork server."""
        self._hang_up()
        if self._server is not None:
            try:
                self._server.wait(2)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._server = None
        for jobs in (self.running, self.kept, self._released):
            jobs.clear()

    # ---- limits

    def _check(self, handle: Handle) -> None:
        now = time.monotonic()
        if handle.started is None:
            if handle.kill_at is not None and now >= handle.kill_at + BUSY_S:
                self._server_died()  # it is still importing and hears nothing
            return
        if handle.kill_at is not None:
            if now >= handle.kill_at:
                handle.kill_at = now + 1
                self._kill(handle, signal.SIGKILL)
            return
        self._look_at_events(handle)
        limits, ran = self.limits, now - handle.started
        quiet = now - handle.heard
        if limits.wall_s is not None and ran > limits.wall_s:
            self.cancel(handle, Failure.timeout, f"stopped after {limits.wall_s:g} s, the limit for one job")
        elif limits.stall_s is not None and quiet > limits.stall_s:
            self.cancel(handle, Failure.stall, f"stopped because it reported no progress for {limits.stall_s:g} s")
        elif limits.rss_bytes is not None and now >= handle.weigh_at:
            handle.weigh_at = now + MEMORY_S
            self._check_memory(handle, limits.rss_bytes)

    def _check_memory(self, handle: Handle, cap: int) -> None:
        used = _tree_rss(handle.pid or 0)
        handle.peak_rss = max(handle.peak_rss, used)
        if used > cap:
            text = f"stopped because it used {used / 2**20:.0f} MiB of memory; the limit is {cap / 2**20:.0f} MiB"
            self.cancel(handle, Failure.memory, text, grace=0)

    def _look_at_events(self, handle: Handle) -> None:
        path = self.store.events_path(handle.job.key)
        try:
            stat = path.stat()
        except OSError:
            return
        if (stat.st_mtime_ns, stat.st_size) != handle.seen:
            handle.seen = stat.st_mtime_ns, stat.st_size
            handle.heard = time.monotonic()
            handle.event = last_event(path) or handle.event

    # ---- the end of a job

    def _outcome(self, handle: Handle, code: int) -> Outcome:
        written = self.store.outcome(handle.job.key, handle.attempt) or {}
        cost = written.get("cost") or self._rough_cost(handle)
        if handle.verdict is not None and not written.get("ok"):
            failure, reason = handle.verdict
            return Outcome(False, failure, reason, cost=cost)
        if written:
            failure = Failure(written["failure"]) if written["failure"] else None
            return Outcome(
                written["ok"], failure, written["error"], written["traceback"], written["corrupt"], cost=cost
            )
        if code == STORE_LOST:
            text = f"{self.store.root}: the job could not write its result; is the disk full?"
            return Outcome(False, Failure.environment, text, cost=cost)
        log = self.store.log_path(handle.job.key, handle.attempt)
        if not log.exists():
            log = self.store.engine_log()
        if code < 0:
            text = f"its process was killed by {_signal_name(-code)}; see {log}"
            return Outcome(False, Failure.killed, text, signal=-code, cost=cost)
        text = f"its process exited with status {code} and no result; see {log}"
        return Outcome(False, Failure.plugin, text, cost=cost)

    def _rough_cost(self, handle: Handle) -> dict[str, Any]:
        wall = None if handle.started is None else time.monotonic() - handle.started
        peak = handle.peak_rss or None
        return {"wall_s": wall, "cpu_s": None, "peak_rss_bytes": peak, "cuda_peak_bytes": None}

    # ---- the fork server

    def _request(self, handle: Handle) -> dict[str, Any]:
        job = handle.job
        return {
            "job": {
                "key": job.key,
                "kind": job.kind,
                "label": job.label,
                "spec": to_jsonable(job.spec),
                "ingredients": to_jsonable(job.ingredients),
            },
            "attempt": handle.attempt,
            "store": str(self.store.root),
            "log": str(self.store.log_path(job.key, handle.attempt)),
            "events": str(self.store.events_path(job.key)),
            "execute": self.execute,
            "preload": self.preload,
            "threads": self.threads,
            "gpu": handle.gpu,
            "keep": handle.keep,
            "environment": {} if handle.gpu is None else {"CUDA_VISIBLE_DEVICES": handle.gpu["id"]},
        }

    def _boot(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        reader, writer = os.pipe()
        command = [sys.executable, "-P", "-m", "harness.engine.forkserver", str(theirs.fileno()), str(reader)]
        with self.store.engine_log().open("ab") as log:
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                pass_fds=(theirs.fileno(), reader),
                start_new_session=True,
            )
        theirs.close()
        os.close(reader)
        self._control, self._lifeline, self._unread = ours, writer, b""
        return ours

    def _environment(self) -> dict[str, str]:
        fixed = dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | {
            "CUDA_VISIBLE_DEVICES": "",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it some CUDA products differ from run to run
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return os.environ | fixed

    def _send(self, message: Mapping[str, Any]) -> None:
        control = self._control or self._boot()
        try:
            control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._server_died()

    def _kill(self, handle: Handle, number: int) -> None:
        if self._control is not None:
            self._send({"kill": handle.number, "signal": int(number)})

    def _receive(self, timeout: float) -> list[dict[str, Any]]:
        if self._lost:
            lost, self._lost = self._lost, []
            return [{"exit": number, "code": -int(signal.SIGKILL)} for number in lost]
        if self._control is None:
            time.sleep(timeout)
            return []
        if not select.select([self._control], [], [], timeout)[0]:
            return []
        data = b""
        with contextlib.suppress(OSError):
            data = self._control.recv(65536)
        if not data:
            self._server_died()
            return self._receive(0)
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _server_died(self) -> None:
        """Its jobs died with it. Each counts as killed, and the next start boots another server."""
        self._hang_up()
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        self._lost = list(self.held)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._control = self._lifeline = None


def _tree_rss(pid: int) -> int:
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def last_event(path: Path) -> dict[str, Any] | None:
    """The last complete line of an event file."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = [line for line in file.read().split(b"\n")[:-1] if line]
        event = json.loads(lines[-1]) if lines else None
        return event if isinstance(event, dict) else None
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
