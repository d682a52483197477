"""How long jobs are likely to take: the plan's estimates, corrected by what their like took before."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable

from harness.runs.job import Job


class Pace:
    """Learns from jobs that are done. Seeds of one method on one model are of a kind and expected to take what they
    took; of another method it knows only by how much the estimates of such jobs (attack, defend, ...) were wrong."""

    def __init__(self) -> None:
        # sorted, as the estimate of the time left asks for the median of each waiting job's
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._ratios: dict[str, list[float]] = defaultdict(list)

    def learn(self, job: Job, seconds: float | None) -> None:
        if seconds:
            insort(self._seconds[job.method], seconds)
            insort(self._ratios[job.kind], seconds / max(job.estimate, 1e-3))

    def knows(self, job: Job) -> bool:
        """Whether a job of the same method was measured."""
        return job.method in self._seconds

    def expect(self, job: Job) -> float:
        """Seconds that the job is likely to take, more than 0."""
        if self.knows(job):
            return _median(self._seconds[job.method])
        ratios = self._ratios.get(job.kind)
        return max(job.estimate, 1e-3) * (_median(ratios) if ratios else 1.0)

    def left(self, jobs: Iterable[tuple[Job, float]], slots: int) -> float:
        """Seconds until (job, seconds it has run so far) are done, placed one after another on the first free of
        `slots`, the longest first; what they need from each other is not looked at."""
        rest = sorted((max(self.expect(job) - ran, 0.0) for job, ran in jobs), reverse=True)
        busy = [0.0] * max(slots, 1)
        for seconds in rest:
            heapq.heapreplace(busy, busy[0] + seconds)
        return max(busy)


def _median(ordered: list[float]) -> float:
    """Of a sorted list; `statistics.median` would sort it each time."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
