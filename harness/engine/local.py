"""Places jobs on this machine: so many on the CPU, or so many to a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

from harness.engine.supervise import Handle, Limits, Outcome, Supervisor
from harness.job import Failure, Job
from harness.store import Store

EXECUTE = "harness.jobs:execute"
PRELOAD = (  # modules by their own names: `import diffusers` alone imports next to nothing
    "torch",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.training_utils",
    "diffusers.optimization",
    "transformers.models.clip.modeling_clip",
    "open_clip",
    "torch_fidelity",
    "torchmetrics.functional.image",
    "sklearn.datasets",
    "harness.jobs",
)


class LocalEngine:
    """CPU slots or GPU slots on one machine.

    cpu_slots: jobs at once; default: processors // threads. threads: of each CPU job; it does not follow the number
    of slots, because sums in another order are other numbers. gpus: ids as CUDA_VISIBLE_DEVICES takes them; with any,
    every job gets `gpu_share` of one. execute, preload: what a job's process calls and imports.
    Raises ValueError for demands that can never be met.
    """

    def __init__(
        self,
        store: Store,
        *,
        cpu_slots: int | None = None,
        threads: int = 1,
        gpus: Sequence[str | int] = (),
        gpu_share: float = 1.0,
        limits: Limits | None = None,
        execute: str = EXECUTE,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        if threads < 1 or (cpu_slots is not None and cpu_slots < 1):
            raise ValueError(f"{cpu_slots} parallel jobs of {threads} threads: give at least 1 of each")
        if not 0 < gpu_share <= 1:
            raise ValueError(f"a share of {gpu_share} of a GPU: give more than 0 and at most 1")
        names = [str(gpu) for gpu in gpus]
        if len(set(names)) < len(names):
            raise ValueError(f"GPUs {', '.join(names)}: name each one once")
        self.cpu_slots = cpu_slots or max(1, _processors() // threads)
        self.per_gpu = int(1 / gpu_share + 1e-9)
        self.gpu_share = gpu_share
        self._used = dict.fromkeys(names, 0)
        self._supervisor = Supervisor(store, execute, preload, threads, limits or Limits(rss_bytes=most_memory()))

    @property
    def slots(self) -> int:
        """The number of jobs that can run at once."""
        return len(self._used) * self.per_gpu if self._used else self.cpu_slots

    @property
    def shares_gpus(self) -> bool:
        return bool(self._used) and self.per_gpu > 1

    @property
    def running(self) -> list[Handle]:
        return list(self._supervisor.running.values())

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None:
        """Start the job, or None while there is no room. whole_gpu: on a card with nothing else on it."""
        if not self._used:
            return self._supervisor.start(job, attempt, None) if len(self.running) < self.cpu_slots else None
        most = 0 if whole_gpu else self.per_gpu - 1
        gpu = next((name for name, used in self._used.items() if used <= most), None)
        if gpu is None:
            return None
        self._used[gpu] += self.per_gpu if whole_gpu else 1
        return self._supervisor.start(job, attempt, {"id": gpu, "share": 1.0 if whole_gpu else self.gpu_share})

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        """The jobs that ended, after at most `timeout` seconds."""
        ended = self._supervisor.poll(timeout)
        for handle, _ in ended:
            self._free(handle.gpu)
        return ended

    def cancel(self, handle: Handle, grace: float | None = None) -> None:
        """End a job and all it started; it comes out of `wait` as interrupted."""
        self._supervisor.cancel(handle, Failure.interrupted, "interrupted", grace)

    def close(self) -> None:
        """Kill what runs and end the fork server."""
        self._supervisor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self, gpu: dict[str, Any] | None) -> None:
        if gpu is not None:
            self._used[gpu["id"]] -= self.per_gpu if gpu["share"] == 1.0 else 1


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total * 0.9)
