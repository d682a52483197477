"""What a run shows while it runs, on stderr: bars on a terminal, one line per event elsewhere; and its event file."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TextIO

from harness.runs.job import Job
from harness.runs.printable import clipped, printable


class Listener(Protocol):
    """Hears of a run. A rebuilt artifact's job can finish more than once."""

    def planned(self, total: int, hits: int) -> None: ...

    def started(self, job: Job, attempt: int) -> None: ...

    def progress(self, job: Job, event: Mapping[str, Any]) -> None: ...

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None: ...

    def remaining(self, seconds: float) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def planned(self, total: int, hits: int) -> None:
        pass

    def started(self, job: Job, attempt: int) -> None:
        pass

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        pass

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        pass

    def remaining(self, seconds: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Both:
    """Tells several listeners."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def planned(self, total: int, hits: int) -> None:
        for each in self.listeners:
            each.planned(total, hits)

    def started(self, job: Job, attempt: int) -> None:
        for each in self.listeners:
            each.started(job, attempt)

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        for each in self.listeners:
            each.progress(job, event)

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        for each in self.listeners:
            each.finished(job, status, error, seconds, advice)

    def remaining(self, seconds: float) -> None:
        for each in self.listeners:
            each.remaining(seconds)

    def note(self, text: str) -> None:
        for each in self.listeners:
            each.note(text)

    def close(self) -> None:
        for each in self.listeners:
            each.close()


class Unharmed:
    """Tells a listener until its stream fails: a terminal that is gone, or a full disk behind it, ends no run."""

    def __init__(self, listener: Listener) -> None:
        self.listener: Listener = listener

    def planned(self, total: int, hits: int) -> None:
        with self._lost():
            self.listener.planned(total, hits)

    def started(self, job: Job, attempt: int) -> None:
        with self._lost():
            self.listener.started(job, attempt)

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        with self._lost():
            self.listener.progress(job, event)

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        with self._lost():
            self.listener.finished(job, status, error, seconds, advice)

    def remaining(self, seconds: float) -> None:
        with self._lost():
            self.listener.remaining(seconds)

    def note(self, text: str) -> None:
        with self._lost():
            self.listener.note(text)

    def close(self) -> None:
        with self._lost():
            self.listener.close()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: a stream that is closed
            self.listener = Silent()


class EventFile:
    """One JSON object per line for machines: {ts, run, event, ...}, appended to `path`.

    event: planned (total, hits), started (job, label, attempt), progress (job and what the job says; a job's at most
    every `every` seconds), finished (job, label, status, error, advice, seconds), remaining (seconds; as rarely), note
    (text), closed. run: host and process of the driver and when it began, as two may write to one file.
    """

    def __init__(self, path: Path, every: float = 5.0) -> None:
        self.file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.every = every
        self.run = f"{socket.gethostname()}-{os.getpid()}-{time.time():.0f}"
        self._last: dict[str, float] = {}

    def planned(self, total: int, hits: int) -> None:
        self._write("planned", total=total, hits=hits)

    def started(self, job: Job, attempt: int) -> None:
        self._write("started", job=job.key, label=job.label, attempt=attempt)

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        if self._due(job.key):
            said = {name: value for name, value in event.items() if name != "ts"}
            self._write("progress", job=job.key, **said)

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        self._last.pop(job.key, None)
        told = {"status": status, "error": error, "advice": advice, "seconds": round(seconds, 3)}
        self._write("finished", job=job.key, label=job.label, **told)

    def remaining(self, seconds: float) -> None:
        if self._due(""):
            self._write("remaining", seconds=round(seconds, 1))

    def note(self, text: str) -> None:
        self._write("note", text=text)

    def close(self) -> None:
        if self.file is not None:
            self._write("closed")
            os.close(self.file)
            self.file = None

    def _due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, -self.every) < self.every:
            return False
        self._last[what] = now
        return True

    def _write(self, event: str, /, **facts: Any) -> None:
        line = json.dumps({"ts": time.time(), "run": self.run, "event": event, **facts}) + "\n"
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the run for what only tells of it
                os.write(self.file, line.encode())


class Lines:
    """One line per event; progress of a job at most every `every` seconds. Skipped jobs are counted only: one failure
    skips many, and a run that is stopped skips most."""

    def __init__(self, stream: TextIO | None = None, every: float = 30.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self.total = 0
        self._left = 0.0
        self._last: dict[str, float] = {}
        self._finished: set[str] = set()

    def planned(self, total: int, hits: int) -> None:
        self.total = total
        self._say(f"{total} jobs, {hits} of them in the store already")

    def started(self, job: Job, attempt: int) -> None:
        self._last[job.key] = time.monotonic()
        self._say(f"start   {job.label}" + (f" (attempt {attempt})" if attempt > 1 else ""))

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        if time.monotonic() - self._last.get(job.key, 0.0) >= self.every:
            self._last[job.key] = time.monotonic()
            self._say(f"        {job.label}: {describe(event)}")

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        self._finished.add(job.key)
        if status not in ("hit", "skipped"):
            count = f"[{len(self._finished)}/{self.total}]"
            took = f" in {seconds:.1f} s" if status == "done" else ""
            left = f", {clock(self._left)} left" if status == "done" and self._left else ""
            self._say(f"{status:<7} {count} {job.label}{took}{left}" + (f": {first_line(error)}" if error else ""))
            if advice:
                self._say(f"        {advice}")

    def remaining(self, seconds: float) -> None:
        self._left = seconds

    def note(self, text: str) -> None:
        self._say(f"note    {first_line(text)}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(printable(text, keep="\n"), file=self.stream, flush=True)


class Bars:
    """An overall bar with the time left, and for each running job a bar with its loss and the GPU memory it holds;
    failures and notes stay above them. Skipped jobs are counted only. Labels are clipped to what the numbers leave."""

    BAR, NUMBERS, LEAST = 20, 42, 16  # characters: of a bar, of the numbers beside it, of a label at least

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=stream or sys.stderr)
        wide = console.width >= self.NUMBERS + self.BAR + 2 * self.LEAST
        self.room = max(self.LEAST, console.width - self.NUMBERS - self.BAR * wide)
        columns = (
            TextColumn("{task.description}", markup=False),
            *([BarColumn(self.BAR)] if wide else []),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self.bars = Progress(*columns, console=console, transient=True)
        self.overall = self.bars.add_task("all jobs", total=None, facts="")
        self._tasks: dict[str, Any] = {}
        self._finished: set[str] = set()
        self.bars.start()

    def planned(self, total: int, hits: int) -> None:
        self.bars.update(self.overall, total=total, completed=hits)

    def started(self, job: Job, attempt: int) -> None:
        again = f" (attempt {attempt})" if attempt > 1 else ""
        self._tasks[job.key] = self.bars.add_task(self._label(job.label + again), total=None, facts="")

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        if job.key not in self._tasks:
            return
        phase = str(event.get("phase", ""))
        done, total = event.get("step"), event.get("total")
        self.bars.update(
            self._tasks[job.key],
            description=self._label(f"{job.label}: {phase}"),
            completed=done,
            total=total or None,
            facts=", ".join(extras(event)),
        )

    def finished(self, job: Job, status: str, error: str | None, seconds: float, advice: str | None) -> None:
        self._finished.add(job.key)
        if job.key in self._tasks:
            self.bars.remove_task(self._tasks.pop(job.key))
        self.bars.update(self.overall, completed=len(self._finished))
        if status == "failed":
            self._say(f"{status}: {job.label}: {first_line(error)}" + (f"\n  {advice}" if advice else ""))

    def remaining(self, seconds: float) -> None:
        self.bars.update(self.overall, facts=f"about {clock(seconds)} left")

    def note(self, text: str) -> None:
        self._say(first_line(text))

    def close(self) -> None:
        self.bars.stop()

    def _label(self, text: str) -> str:
        return clipped(printable(text), self.room)

    def _say(self, text: str) -> None:
        self.bars.console.print(printable(text, keep="\n"), markup=False, highlight=False)


def pick(stream: TextIO | None = None) -> Listener:
    """Bars on a terminal, lines elsewhere."""
    target: TextIO = stream or sys.stderr
    return Bars(target) if target.isatty() else Lines(target)


def describe(event: Mapping[str, Any]) -> str:
    """ "train 120/600, loss 0.031, GPU 2.1 GiB" of a progress event."""
    return ", ".join([f"{event.get('phase', '')} {event.get('step', '?')}/{event.get('total') or '?'}", *extras(event)])


def extras(event: Mapping[str, Any]) -> list[str]:
    """The numbers of an event besides its step: ["loss 0.031", "GPU 2.1 GiB"]."""
    said = [f"{name} {value:.4g}" for name, value in event.items() if _is_extra(name, value)]
    held = event.get("gpu_bytes")
    return [*said, f"GPU {held / 2**30:.1f} GiB"] if held is not None else said


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:12:05."""
    return str(timedelta(seconds=round(seconds)))


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _is_extra(name: str, value: object) -> bool:
    return name not in ("ts", "phase", "step", "total", "gpu_bytes") and isinstance(value, (int, float))
