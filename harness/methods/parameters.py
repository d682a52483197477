"""Types of hyperparameters: the values that a field of a plugin accepts, checked when a spec is parsed."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

PositiveInt = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]
LearningRate = Annotated[float, Gt(0), Le(1)]
Weight = Annotated[float, Ge(0)]
