"""The loops of the running computation: reports their progress, and names them so that a rehearsal can shorten them.

A training or sampling loop calls `progress(...)` at each step. In a job each call becomes a line of `events.jsonl` (at
most five per second). The driver displays these lines, and they show that the job is alive. Outside a job progress is
not recorded. A loop over `loop(phase, items)` is a loop over `items`, unless the job is rehearsed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")
Sink = Callable[[dict[str, Any]], None]
Shorten = Callable[[str, Iterable[Any], int], Iterable[Any]]
_sink: Sink | None = None
_shorten: Shorten | None = None


def listen(sink: Sink | None) -> None:
    """Sends every later event of this process to `sink` (None = nowhere)."""
    global _sink
    _sink = sink


def listener() -> Sink | None:
    """Where the events of this process are sent."""
    return _sink


def progress(phase: str, step: int, total: int, **numbers: float) -> None:
    """Reports that `step` of `total` steps of `phase` are done, with any numbers worth displaying (loss=...)."""
    if _sink is not None:
        _sink({"ts": time.time(), "phase": phase, "step": step, "total": total, **numbers})


def shorten(how: Shorten | None) -> None:
    """Has every later `loop` of this process call `how(phase, items, total)` for what it takes (None = everything)."""
    global _shorten
    _shorten = how


def loop(phase: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
    """`items`, one for each pass of a loop named `phase`. `bench rehearse` takes the first two of them alone.

    Passes are expected to take equally long. total: their number, where `items` has no length.
    """
    if _shorten is None:
        return items
    return _shorten(phase, items, len(cast(Any, items)) if total is None else total)


def file_sink(path: Path, every: float = 0.2) -> Sink:
    """A sink that appends JSON lines to `path`: first and last steps, and at most one more line per `every` seconds."""
    last = -every  # monotonic clock, which never jumps: a silent job is considered stalled

    def sink(event: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every and 0 < event["step"] < event["total"]:
            return
        last = now
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    return sink
