"""The consequences of each way to fail: how often a job is retried, and the message to the user."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass

from harness.runs.job import Failure
from harness.runs.store import CorruptArtifact, MissingArtifact, StoreError

STORE_LOST = 122  # exit status of a job that could not even write how it ended
_OUTSIDE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES,
        errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAGAIN,
    }
)  # fmt: skip
_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub", "urllib", "http")
_OWN_FAULT = ("device-side assert", "illegal memory access")  # CUDA errors that the job's own kernels cause


@dataclass(frozen=True)
class Rule:
    """retries: how often a job that failed in this way is retried in the same run.

    says: the message to the user if the job still fails; `{key}` stands for its key.
    """

    retries: int
    says: str


RULES = {
    Failure.plugin: Rule(0, "the code of a plugin raised: `bench logs {key}` shows where; fix it and run again"),
    Failure.nan: Rule(0, "the numbers left the finite range: a retry would fail again; lower lr or steps"),
    Failure.killed: Rule(2, "killed three times: memory ran out (fewer --cpus), or a crash: see `bench logs {key}`"),
    Failure.timeout: Rule(0, "a retry would take as long: raise --timeout, then `bench retry`"),
    Failure.stall: Rule(0, "no progress was reported: `bench logs {key}` shows where; raise --stall if it was working"),
    Failure.memory: Rule(0, "it exceeds the main memory of a job here: use a smaller batch or a larger machine"),
    Failure.oom: Rule(1, "the GPU is too small, even for this job alone: use a smaller batch or a larger GPU"),
    Failure.environment: Rule(1, "caused by the environment: fix what the message names, then `bench retry`"),
    Failure.data: Rule(0, "its input is damaged, missing or not permitted: restore what the message names"),
    Failure.skipped: Rule(0, "it depends on a failed job: fix that one"),
    Failure.interrupted: Rule(0, "stopped: the same command resumes the run"),
}  # fmt: skip


def retries(failure: Failure | None, shares_gpus: bool) -> int:
    """How often a job is tried again after `failure`. A second try after `oom` makes sense only where a card was
    shared: it gets one to itself. (Damaged artifacts are another matter: they are rebuilt, see the driver.)"""
    if failure is None or (failure is Failure.oom and not shares_gpus):
        return 0
    return RULES[failure].retries


def known(failure: str | None) -> Failure | None:
    """The failure of that name; None for one that another version of the store knew."""
    return Failure(failure) if failure in set(Failure) else None


def advice(failure: str | None, key: str) -> str | None:
    """The sentence for the user; None for an unknown failure."""
    found = known(failure)
    return None if found is None else RULES[found].says.format(key=key[:12])


def classify(error: BaseException) -> Failure:
    """The failure that an exception stands for; called in the job's process, where the libraries are loaded."""
    if isinstance(error, (CorruptArtifact, MissingArtifact)):
        return Failure.data
    if _is(error, "torch", "OutOfMemoryError"):
        return Failure.oom
    if _is(error, "harness.diffusion.training", "Diverged") or type(error) in (ArithmeticError, FloatingPointError):
        return Failure.nan
    if isinstance(error, MemoryError):
        return Failure.memory
    if isinstance(error, FileNotFoundError) or _is(error, "harness.diffusion.checkpoint", "CheckpointError"):
        return Failure.data
    if _is(error, "safetensors", "SafetensorError"):
        return Failure.data
    return Failure.environment if _outside(error) else Failure.plugin


def _outside(error: BaseException) -> bool:
    """Whether disk, driver, network or installation are to blame."""
    if isinstance(error, (StoreError, ImportError, ConnectionError, TimeoutError, NoDevice)):
        return True
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return True
    if isinstance(error, OSError):
        return error.errno in _OUTSIDE
    text = str(error)
    cuda = isinstance(error, RuntimeError) and text.startswith(("CUDA error", "CUDA driver", "No CUDA GPUs"))
    return cuda and not any(fault in text for fault in _OWN_FAULT)


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether `error` is of a class of a module that need not be loaded: if it is not, nobody raised its errors."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(error, cls)


class NoDevice(RuntimeError):
    """The GPU of the job is not visible."""
