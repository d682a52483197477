"""One unit of work and the ways it can fail: data that plan, engine and records share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

Kind = Literal["attack", "defend", "sample", "measure"]


class Failure(StrEnum):
    """Why an attempt, or a job, has no result. What follows from each: harness/engine/failures.py."""

    plugin = "plugin error"  # the job's code raised, or left without a result
    nan = "nan"  # a loss or an image became NaN or infinite
    killed = "killed"  # ended by a signal that was not ours, or its machine was lost
    timeout = "timeout"  # longer than the wall limit
    stall = "stall"  # no event for too long
    memory = "memory"  # over the limit of main memory
    oom = "oom"  # CUDA out of memory
    environment = "environment"  # disk, driver, network or a library: nothing that the job did
    data = "data"  # something it reads is damaged, missing or refused
    skipped = "skipped"  # something it needs failed
    interrupted = "interrupted"  # stopped by the user or by --max-hours, or its driver died


@dataclass(frozen=True)
class Job:
    """What a process does: it publishes one artifact under `key`.

    needs: keys of artifacts that must exist first. spec: plain JSON, all that the process is told.
    estimate: seconds, for the order of work and for `bench plan`. shares: a name for what the job loads and only reads;
    a process that has done a job of that name may be given this one next. None: a process of its own.
    """

    key: str
    kind: Kind
    label: str
    needs: tuple[str, ...]
    spec: Mapping[str, Any]
    estimate: float = 10.0
    shares: str | None = None
