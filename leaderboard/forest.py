"""A random forest that tells two classes of a few models apart (Breiman, Machine Learning 45, 2001).

A forest of TREES trees without a limit of their depth. Each tree draws as many models as there are, with replacement,
each class with the same probability, and tries ⌊√features⌋ features in a node.

scikit-learn 1.9 gives the same shares with `RandomForestClassifier(100, class_weight="balanced", random_state=0)`, to
the last digit: the random numbers are drawn in its order. It spends about 1.5 ms around each tree, which has a dozen
leaves here, and its versions differ in how they draw models. A page needs dozens of forests, and has to be the same
with every version.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

TREES = 100
LEAST = np.float32(1e-7)  # values of a feature that differ by no more are equal
LARGEST = 2**31 - 1  # of the random numbers
TOO_LARGE = 1e38  # features from here on are refused: they are kept in single precision

Table = Sequence[Sequence[float]]  # one row of features per model


def shares(negatives: Table, positives: Table, unseen: Table) -> list[tuple[float, float]]:
    """For each of `unseen` the shares of negatives and of positives in the leaves that it reaches, means over the
    trees. `negatives` and `positives` hold a model or more each; every model has the same number of features. Raises
    ValueError where a feature is NaN or TOO_LARGE."""
    if not all(abs(value) < TOO_LARGE for row in (*negatives, *positives, *unseen) for value in row):
        raise ValueError(f"a forest takes features between -{TOO_LARGE:g} and {TOO_LARGE:g}")
    known = np.asarray([*negatives, *positives], dtype=np.float32)
    columns = [_Feature(column.tolist(), (column + LEAST).tolist()) for column in known.T]
    labels = [False] * len(negatives) + [True] * len(positives)
    asked = np.asarray(unseen, dtype=np.float32).tolist()
    sums = [[0.0, 0.0] for _ in asked]
    for weights, seed in _bootstraps(len(negatives), len(positives)):
        for i, leaf in _Tree(columns, labels, weights, seed).leaves(asked):
            for side in (0, 1):
                sums[i][side] += leaf[side] / (leaf[0] + leaf[1])
    return [(negative / TREES, positive / TREES) for negative, positive in sums]


@cache
def _draws(n: int) -> list[tuple[Any, int]]:
    """For each tree n numbers in [0, 1) and the seed of its features."""
    found: list[tuple[Any, int]] = []
    seeds = np.random.RandomState(0).randint(LARGEST, size=TREES)
    random = np.random.RandomState()
    for seed in seeds.tolist():
        random.seed(seed)
        features = int(random.randint(0, LARGEST))
        random.seed(seed)
        found.append((random.random_sample(n), features))
    return found


def _bootstraps(negatives: int, positives: int) -> Iterator[tuple[list[int], int]]:
    """For each tree how often it draws each model, and the seed of its features."""
    n = negatives + positives
    balanced = np.repeat([n / (2 * negatives), n / (2 * positives)], [negatives, positives])
    bounds = (balanced / balanced.sum()).cumsum()
    bounds /= bounds[-1]
    for numbers, seed in _draws(n):
        yield np.bincount(bounds.searchsorted(numbers, side="right"), minlength=n).tolist(), seed


@dataclass(frozen=True)
class _Feature:
    """values: of the models that the forest knows. beyond: each with what a larger value has to exceed."""

    values: list[float]
    beyond: list[float]


@dataclass(frozen=True)
class _Node:
    """rows: the models in it that the tree has drawn. asked: the unseen ones that reach it. constant: how many of the
    first features of `_Tree.constant` are equal in all rows."""

    rows: list[int]
    asked: list[int]
    constant: int


@dataclass(frozen=True)
class _Split:
    quality: float
    feature: int
    threshold: float


class _Tree:
    """A tree that is grown as far as the unseen models need it.

    The order of its features lives on from node to node: random numbers permute it, and features that are equal in all
    rows of a node come first, in an order of their own that the nodes below keep."""

    def __init__(self, columns: Sequence[_Feature], labels: Sequence[bool], weights: Sequence[int], seed: int) -> None:
        self.columns, self.labels, self.weights, self.state = columns, labels, weights, seed
        self.most = max(1, int(np.sqrt(len(columns))))
        self.order, self.constant = list(range(len(columns))), [0] * len(columns)

    def leaves(self, asked: Table) -> Iterator[tuple[int, list[int]]]:
        """(index of an unseen model, weights of the negatives and of the positives in its leaf)."""
        drawn = [row for row, weight in enumerate(self.weights) if weight]
        waiting, left = [_Node(drawn, list(range(len(asked))), 0)], len(asked)
        while left:
            node = waiting.pop()
            total = self.counted(node.rows)
            split, constant = (None, 0) if 0 in total else self.split(node, total)
            if split is None:
                yield from ((i, total) for i in node.asked)
                left -= len(node.asked)
                continue
            values, f = self.columns[split.feature].values, split.feature
            below = [row for row in node.rows if values[row] <= split.threshold]
            above = [row for row in node.rows if values[row] > split.threshold]
            waiting.append(_Node(above, [i for i in node.asked if asked[i][f] > split.threshold], constant))
            waiting.append(_Node(below, [i for i in node.asked if asked[i][f] <= split.threshold], constant))

    def counted(self, rows: Sequence[int]) -> list[int]:
        total = [0, 0]
        for row in rows:
            total[self.labels[row]] += self.weights[row]
        return total

    def split(self, node: _Node, total: Sequence[int]) -> tuple[_Split | None, int]:
        """The best split of a node by `most` features that are not equal in all its rows, None where there is none; and
        how many features are equal."""
        order, best = self.order, None
        end, tried, drawn, found = len(order), 0, 0, 0  # drawn, found: features known before, and here, to be equal
        while end > node.constant + found and (tried < self.most or tried <= drawn + found):
            tried += 1
            at = drawn + self.number(end - found - drawn)
            if at < node.constant:
                order[drawn], order[at] = order[at], order[drawn]
                drawn += 1
                continue
            at += found
            feature = self.columns[order[at]]
            rows = sorted(node.rows, key=feature.values.__getitem__)
            if feature.values[rows[-1]] <= feature.beyond[rows[0]]:
                place = node.constant + found
                order[at], order[place] = order[place], order[at]
                found += 1
                continue
            made = self.best(order[at], rows, total)
            end -= 1
            order[end], order[at] = order[at], order[end]
            if made is not None and (best is None or made.quality > best.quality):
                best = made
        order[: node.constant] = self.constant[: node.constant]
        self.constant[node.constant : node.constant + found] = order[node.constant : node.constant + found]
        return best, node.constant + found

    def best(self, feature: int, rows: Sequence[int], total: Sequence[int]) -> _Split | None:
        """The split by a feature, whose values ascend with `rows`, with the least Gini impurity, weighted by the sides;
        None where each value is equal to the next."""
        values, beyond = self.columns[feature].values, self.columns[feature].beyond
        best, below = None, [0, 0]
        for row, after in itertools.pairwise(rows):
            below[self.labels[row]] += self.weights[row]
            if values[after] > beyond[row]:
                quality = -_impurity(total[0] - below[0], total[1] - below[1]) - _impurity(*below)
                if best is None or quality > best.quality:
                    best = _Split(quality, feature, values[row] / 2 + values[after] / 2)
        return best

    def number(self, below: int) -> int:
        """A number in [0, below): xorshift of 32 bits (Marsaglia, Journal of Statistical Software 8, 2003)."""
        state = self.state or 1
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        self.state = state ^ (state << 5 & 0xFFFFFFFF)
        return (self.state & LARGEST) % below


def _impurity(negatives: int, positives: int) -> float:
    """Gini's impurity of a side times its weight."""
    n = negatives + positives
    return n * (1 - (negatives * negatives + positives * positives) / (n * n))
