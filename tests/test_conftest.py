"""What every test can rely on."""

from __future__ import annotations

import hypothesis
import numpy
import pytest
import torch

DRAWN: list[tuple[float, float]] = []


@pytest.mark.parametrize("turn", range(2))
def test_each_test_begins_with_the_same_random_state(turn: int) -> None:
    DRAWN.append((torch.rand(()).item(), numpy.random.random()))
    assert len(set(DRAWN)) == 1


def test_examples_of_hypothesis_follow_from_the_test_and_have_all_the_time_they_take() -> None:
    used = hypothesis.settings()
    assert used.derandomize and used.deadline is None
