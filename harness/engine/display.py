"""What a run shows while it runs, on stderr: bars on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from harness.job import Job


class Listener(Protocol):
    """Hears of a run. A rebuilt artifact's job can finish more than once."""

    def planned(self, total: int, hits: int) -> None: ...

    def started(self, job: Job, attempt: int) -> None: ...

    def progress(self, job: Job, event: Mapping[str, Any]) -> None: ...

    def finished(self, job: Job, status: str, error: str | None, seconds: float) -> None: ...

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

    def finished(self, job: Job, status: str, error: str | None, seconds: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """One line per event; progress of a job at most every `every` seconds."""

    def __init__(self, stream: TextIO | None = None, every: float = 30.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self.total = self.done = 0
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

    def finished(self, job: Job, status: str, error: str | None, seconds: float) -> None:
        self._finished.add(job.key)
        if status != "hit":
            count = f"[{len(self._finished)}/{self.total}]"
            took = f" in {seconds:.1f} s" if status == "done" else ""
            self._say(f"{status:<7} {count} {job.label}{took}" + (f": {first_line(error)}" if error else ""))

    def note(self, text: str) -> None:
        self._say(f"note    {first_line(text)}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class Bars:
    """An overall bar and one bar for each running job; failures and notes stay above them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=Console(file=stream or sys.stderr), transient=True)
        self.overall = self.bars.add_task("all jobs", total=None)
        self._tasks: dict[str, Any] = {}
        self._finished: set[str] = set()
        self.bars.start()

    def planned(self, total: int, hits: int) -> None:
        self.bars.update(self.overall, total=total, completed=hits)

    def started(self, job: Job, attempt: int) -> None:
        again = f" (attempt {attempt})" if attempt > 1 else ""
        self._tasks[job.key] = self.bars.add_task(job.label + again, total=None)

    def progress(self, job: Job, event: Mapping[str, Any]) -> None:
        if job.key in self._tasks:
            text = f"{job.label}: {event.get('phase', '')}"
            done, total = event.get("step"), event.get("total")
            self.bars.update(self._tasks[job.key], description=text, completed=done, total=total)

    def finished(self, job: Job, status: str, error: str | None, seconds: float) -> None:
        self._finished.add(job.key)
        if job.key in self._tasks:
            self.bars.remove_task(self._tasks.pop(job.key))
        self.bars.update(self.overall, completed=len(self._finished))
        if error:
            self._say(f"{status}: {job.label}: {first_line(error)}")

    def note(self, text: str) -> None:
        self._say(first_line(text))

    def close(self) -> None:
        self.bars.stop()

    def _say(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)


def pick(stream: TextIO | None = None) -> Listener:
    """Bars on a terminal, lines elsewhere."""
    target: TextIO = stream or sys.stderr
    return Bars(target) if target.isatty() else Lines(target)


def describe(event: Mapping[str, Any]) -> str:
    """ "train 120/600, loss 0.031" of a progress event."""
    numbers = [f"{name} {value:.4g}" for name, value in event.items() if _is_extra(name, value)]
    return ", ".join([f"{event.get('phase', '')} {event.get('step', '?')}/{event.get('total', '?')}", *numbers])


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _is_extra(name: str, value: object) -> bool:
    return name not in ("ts", "phase", "step", "total") and isinstance(value, (int, float))
