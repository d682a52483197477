"""One unit of work and the ways it can fail: data that plan, engine and records share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

Kind = Literal["attack", "defend", "sample", "measure"]


class Failure(StrEnum):
    """Why an attempt, or a job, has no result."""

    exception = "exception"  # the code of the job raised
    nan = "nan"  # the loss became NaN or infinite
    crash = "crash"  # ended by a signal; tried again
    exit = "exit"  # left by os._exit, without an outcome
    timeout = "timeout"  # longer than the wall limit
    stall = "stall"  # no event for too long
    memory = "memory"  # over the memory limit
    oom = "oom"  # CUDA out of memory; tried once more with the whole card
    corrupt = "corrupt"  # an artifact it needs is damaged or gone; that one is built again
    skipped = "skipped"  # something it needs failed
    interrupted = "interrupted"  # stopped by the user, or its driver died


@dataclass(frozen=True)
class Job:
    """What one process does: it publishes one artifact under `key`.

    needs: keys of artifacts that must exist first. spec: plain JSON, all that the process is told.
    estimate: seconds, for the order of work and for `bench plan`.
    """

    key: str
    kind: Kind
    label: str
    needs: tuple[str, ...]
    spec: Mapping[str, Any]
    estimate: float = 10.0
