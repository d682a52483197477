"""Which jobs of a graph could start, and in which order. Changes update it; the graph is not searched again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from heapq import heappop, heappush
from operator import itemgetter
from typing import Any

Rank = tuple[Any, ...]  # what orders jobs; it ends with the job's key, so that no two are equal


class Ranked:
    """Keys by rank, over all and within groups. Each operation takes O(log n) for n keys, but for walking over them.

    A heap may hold ranks of keys that are gone or have another rank by now: they are passed over when they come up.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._all: list[Rank] = []
        self._groups: dict[Hashable, list[Rank]] = defaultdict(list)

    def put(self, key: str, rank: Rank, group: Hashable = None) -> None:
        """Take a key in, or give it another rank. group: None for no group."""
        self._ranks[key] = rank
        heappush(self._all, rank)
        if group is not None:
            heappush(self._groups[group], rank)

    def drop(self, key: str) -> None:
        """Leave a key out, if it is there."""
        self._ranks.pop(key, None)

    def walk(self) -> Generator[str, None, None]:
        """The keys in order. Those that are dropped on the way are passed over; none may be put on the way."""
        return self._walk([self._all])

    def walk_groups(self, groups: Iterable[Hashable]) -> Generator[str, None, None]:
        """The keys of several groups, as `walk` gives them."""
        return self._walk([self._groups[group] for group in set(groups) if group in self._groups])

    def _walk(self, heaps: list[list[Rank]]) -> Generator[str, None, None]:
        passed: list[tuple[list[Rank], Rank]] = []
        try:
            while left := [heap for heap in heaps if heap]:
                heap = min(left, key=itemgetter(0))
                rank = heappop(heap)
                if self._is_current(rank):
                    passed.append((heap, rank))
                    yield rank[-1]
        finally:
            for heap, rank in passed:
                if self._is_current(rank):
                    heappush(heap, rank)

    def _is_current(self, rank: Rank) -> bool:
        return self._ranks.get(rank[-1]) is rank


class Frontier:
    """The jobs of a graph that wait, and those of them that could start because all they need has ended.

    needs: of each job the keys that it needs; those that are no jobs are ignored. rank, group: of a job, asked when it
    becomes ready, which `update` notices. What changes costs time for the jobs that need it, not for all.
    """

    def __init__(
        self,
        needs: Mapping[str, Iterable[str]],
        rank: Callable[[str], Rank],
        group: Callable[[str], Hashable] = lambda key: None,
    ) -> None:
        self.waiting = set(needs)
        self._rank, self._group = rank, group
        self._needs = {key: {need for need in found if need in needs} for key, found in needs.items()}
        self._needed_by: dict[str, list[str]] = {key: [] for key in needs}
        for key, found in self._needs.items():
            for need in found:
                self._needed_by[need].append(key)
        self._unmet = {key: len(found) for key, found in self._needs.items()}
        self._ended: set[str] = set()
        self._fresh = [key for key, unmet in self._unmet.items() if not unmet]
        self._ready = Ranked()

    def needed_by(self, key: str) -> list[str]:
        """The jobs that need this one."""
        return self._needed_by[key]

    def begin(self, key: str) -> None:
        """The job waits no longer."""
        self.waiting.discard(key)
        self._ready.drop(key)

    def end(self, key: str) -> None:
        """The job has ended, begun or not, well or not."""
        self.begin(key)
        if key not in self._ended:
            self._ended.add(key)
            for other in self._needed_by[key]:
                self._unmet[other] -= 1
                self._note(other)

    def wait(self, key: str) -> None:
        """The job waits again. If it had ended, those that need it have to wait for it, too."""
        if key in self._ended:
            self._ended.discard(key)
            for other in self._needed_by[key]:
                self._unmet[other] += 1
                self._ready.drop(other)
        self.waiting.add(key)
        self._note(key)

    def need(self, key: str, other: str) -> None:
        """The job `key`, which does not wait, needs job `other` from now on."""
        if other not in self._needs[key]:
            self._needs[key].add(other)
            self._needed_by[other].append(key)
            self._unmet[key] += other not in self._ended

    def _note(self, key: str) -> None:
        if not self._unmet[key] and key in self.waiting:
            self._fresh.append(key)

    def update(self) -> None:
        """Give those that became ready since the last time their places in the order."""
        fresh, self._fresh = self._fresh, []
        for key in fresh:
            if not self._unmet[key] and key in self.waiting:
                self._ready.put(key, self._rank(key), self._group(key))

    def in_order(self) -> Generator[str, None, None]:
        """The jobs that could start, in order, as of the last `update`. Close it before the next one."""
        return self._ready.walk()

    def sharing(self, groups: Iterable[Hashable]) -> Generator[str, None, None]:
        """Those of some groups, as `in_order` gives them."""
        return self._ready.walk_groups(groups)
