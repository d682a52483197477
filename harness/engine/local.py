"""Places jobs on this machine: so many on the CPU, or so many to a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Self

from harness.engine.gpus import PARTS, Card, Lease, Leases, parts_of
from harness.engine.supervise import Handle, Limits, Outcome, Supervisor
from harness.runs.job import Failure, Job
from harness.runs.store import Store

EXECUTE = "harness.runs.execution:execute"
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
    "harness.runs.execution",
)


class LocalEngine:
    """CPU slots or GPU slots on one machine. A process that has done a job goes on with one that shares what it loaded,
    if one is handed to it at once.

    cpu_slots: jobs at once; default: processors // threads. threads: of each CPU job; it does not follow the number
    of slots, because sums in another order are other numbers. gpus: cards, or ids as CUDA_VISIBLE_DEVICES takes them;
    with any, every job that uses a GPU leases `gpu_share` of one and may allocate that share of its memory, and
    `cpu_slots` is of the other jobs, by default the processors that those on GPUs leave. leases: shared with every
    other driver on this machine. execute, preload: what a job's process calls and imports.
    Raises ValueError for demands that can never be met.
    """

    def __init__(
        self,
        store: Store,
        *,
        cpu_slots: int | None = None,
        threads: int = 1,
        gpus: Sequence[str | int | Card] = (),
        gpu_share: float = 1.0,
        leases: Leases | None = None,
        limits: Limits | None = None,
        execute: str = EXECUTE,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        if threads < 1 or (cpu_slots is not None and cpu_slots < 1):
            raise ValueError(f"{cpu_slots} parallel jobs of {threads} threads: give at least 1 of each")
        if not 0 < gpu_share <= 1:
            raise ValueError(f"a share of {gpu_share} of a GPU: give more than 0 and at most 1")
        cards = [gpu if isinstance(gpu, Card) else Card(str(gpu)) for gpu in gpus]
        if len({card.uuid for card in cards}) < len(cards):
            raise ValueError(f"GPUs {', '.join(card.uuid for card in cards)}: name each one once")
        self.cards = cards
        self.parts = parts_of(gpu_share)
        self.cpu_slots = cpu_slots or max(1, processors() // threads - self._gpu_slots)
        self.leases = leases or Leases()
        self._held: dict[int, Lease] = {}
        self._supervisor = Supervisor(store, execute, preload, threads, limits or Limits(rss_bytes=most_memory()))

    @property
    def slots(self) -> int:
        """The number of jobs that can run at once; with GPUs, of those that use one."""
        return self._gpu_slots or self.cpu_slots

    @property
    def _gpu_slots(self) -> int:
        return len(self.cards) * (PARTS // self.parts)

    @property
    def spares_gpus(self) -> bool:
        """Whether jobs that use no GPU run beside those that do."""
        return bool(self.cards)

    @property
    def shares_gpus(self) -> bool:
        return bool(self.cards) and self.parts <= PARTS // 2

    @property
    def running(self) -> list[Handle]:
        return list(self._supervisor.running.values())

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None:
        """Start the job, or None while there is no room. whole_gpu: on a card with nothing else on it, in a process of
        its own."""
        keep = job.reuse_key is not None and not whole_gpu
        mates = [kept for kept in self._supervisor.kept.values() if keep and kept.job.reuse_key == job.reuse_key]
        if mates:
            return self._go_on(mates[0], job, attempt)
        if not self.cards or not job.on_gpu:
            room = len(self._supervisor.held.difference(self._held)) < self.cpu_slots
            return self._supervisor.start(job, attempt, None, keep) if room else None
        lease = self._lease(PARTS if whole_gpu else self.parts)
        if lease is None:
            return None
        handle = self._supervisor.start(job, attempt, {"id": lease.card.uuid, "share": lease.share}, keep)
        self._held[handle.number] = lease
        return handle

    def _go_on(self, kept: Handle, job: Job, attempt: int) -> Handle:
        handle = self._supervisor.go_on(kept, job, attempt)
        if kept.number in self._held:
            self._held[handle.number] = self._held.pop(kept.number)
        return handle

    @property
    def kept(self) -> set[str | None]:
        """What the processes share that have just done a job and wait for another."""
        return {kept.job.reuse_key for kept in self._supervisor.kept.values()}

    def release(self) -> None:
        """End the processes that wait; their places are free when they are gone."""
        self._supervisor.release()

    def _lease(self, parts: int) -> Lease | None:
        """A part of the first card that has it to spare, so that cards stay free for jobs that want a whole one."""
        for card in self.cards:
            lease = self.leases.take(card, parts)
            if lease is not None:
                return lease
        return None

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        """The jobs that ended, after at most `timeout` seconds."""
        ended = self._supervisor.poll(timeout)
        for number in set(self._held).difference(self._supervisor.held):
            self._held.pop(number).release()
        return ended

    def cancel(self, handle: Handle, grace: float | None = None) -> None:
        """End a job and all it started; it comes out of `wait` as interrupted."""
        self._supervisor.cancel(handle, Failure.interrupted, "interrupted", grace)

    def close(self) -> None:
        """Kill what runs and end the fork server."""
        self._supervisor.close()
        while self._held:
            self._held.popitem()[1].release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory() -> int:
    """Bytes that a job may use if nothing else is said: 0.9 of the machine's memory, or of the container's."""
    from harness.diffusion import memory

    return int(memory.total() * 0.9)
