"""Reports the progress of the running computation by one call; the job's process decides where it is sent.

A training or sampling loop calls `progress(...)` at each step. In a job each call becomes a line of `events.jsonl` (at
most five per second). The driver displays these lines, and they show that the job is alive. Outside a job progress is
not recorded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]
_sink: Sink | None = None


def listen(sink: Sink | None) -> None:
    """Sends every later event of this process to `sink` (None = nowhere)."""
    global _sink
    _sink = sink


def progress(phase: str, step: int, total: int, **numbers: float) -> None:
    """Reports that `step` of `total` steps of `phase` are done, with any numbers worth displaying (loss=...)."""
    if _sink is not None:
        _sink({"ts": time.time(), "phase": phase, "step": step, "total": total, **numbers})


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
