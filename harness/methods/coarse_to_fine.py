"""The highest scores among many candidates at a bounded number of evaluations: by clusters, coarse to fine.

Each candidate has a vector, and like vectors are expected to have like scores. The whole score of a candidate takes
`rows` evaluations, a rough one takes `rough`:

    coarse    the members of each cluster of vectors that are nearest to its centre, roughly
    middle    the other members, clusters with the highest coarse score first, roughly, up to 3/4 of the budget
    fine      the best of all these, wholly, up to the budget

A candidate is missed if its cluster does not score and the budget ends before its turn; `Outcome.judged` says how many
were judged at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

MEMBERS = 32  # of a cluster, on average
PROBES = 4  # members that stand for their cluster
ROUNDS = 5  # of k-means
PART = 4096  # vectors that are compared with the centres at once

Scoring = Callable[[list[int], bool], Tensor]


@dataclass(frozen=True)
class Outcome:
    """best: places of the candidates that were judged wholly, by their rough score. scores: their whole scores (M,).
    judged: candidates that were judged at all. evaluations: how many were made, at most the budget."""

    best: list[int]
    scores: Tensor
    judged: int
    evaluations: int


def least(rows: int, rough: int = 1) -> int:
    """The smallest budget with which `searched` judges a candidate wholly."""
    return 4 * max(rows, rough * PROBES)


def enough(n: int, rows: int, rough: int, share: float) -> int:
    """The smallest budget with which `searched` judges all of n candidates roughly and `share` of them wholly."""
    whole = max(1, math.ceil(share * n))
    return max(least(rows, rough), math.ceil(4 * rough * n / 3), rough * n + rows * whole)


def searched(
    vectors: Tensor, score: Scoring, rows: int, budget: int, rng: torch.Generator, rough: int = 1
) -> Outcome:  # fmt: skip
    """vectors (N, D). score(places, whole) → (len(places),), whole or rough scores of candidates.

    budget: evaluations, at least `least(rows, rough)`. rough: evaluations of a rough score.
    """
    n = max(1, min(len(vectors) // MEMBERS, budget // (4 * rough * PROBES)))
    clusters = clustered(vectors, n, rng)
    probes = [i for members in clusters for i in members[:PROBES]]
    found = dict(zip(probes, score(probes, False).tolist(), strict=True))
    clusters.sort(key=lambda members: -max(found[i] for i in members[:PROBES]))
    others = [i for members in clusters for i in members[PROBES:]][: max(0, 3 * budget // (4 * rough) - len(probes))]
    found |= dict(zip(others, score(others, False).tolist(), strict=True))
    spent = rough * len(found)
    best = sorted(found, key=lambda i: -found[i])[: (budget - spent) // rows]
    return Outcome(best, score(best, True), len(found), spent + rows * len(best))


def clustered(vectors: Tensor, n: int, rng: torch.Generator) -> list[list[int]]:
    """The places of vectors (N, D) in at most n clusters by k-means of their directions from the mean, nearest to the
    centre first."""
    x = normalize(vectors.float() - vectors.float().mean(0), dim=1)
    centres = x[torch.randperm(len(x), generator=rng)[:n].to(x.device)]
    for _ in range(ROUNDS):
        _, nearest = _nearest(x, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    near, nearest = (each.cpu() for each in _nearest(x, centres))
    members: list[list[int]] = [[] for _ in range(n)]
    for i in near.argsort(descending=True, stable=True).tolist():
        members[nearest[i]].append(i)
    return [each for each in members if each]


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine (N,), place (N,)) of the nearest centre."""
    found = [(part @ centres.T).max(1) for part in x.split(PART)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
