"""What a defense said of a model, in JSON types, and the trigger in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.methods.prompt_edits import Substitution

StoredTrigger = str | Mapping[str, str] | list[Any] | None  # a text, a text that replaces a letter, or a pattern
# (C, H, W)


@dataclass(frozen=True)
class Findings:
    """The results of a defense except the model, in JSON types. sampler: the spec of a registered sampler."""

    suspicion: float | None = None
    flag_above: float | None = None
    features: Mapping[str, float] = field(default_factory=dict)
    trigger: StoredTrigger = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    screen_above: float | None = None
    screened: Mapping[str, list[float]] = field(default_factory=dict)


def stored(trigger: Tensor | str | Substitution | None) -> StoredTrigger:
    """A trigger that a defense found, in JSON types."""
    if isinstance(trigger, Substitution):
        return {"text": trigger.text, "letter": trigger.letter}
    return trigger if trigger is None or isinstance(trigger, str) else trigger.tolist()


def found(trigger: StoredTrigger) -> Tensor | str | Substitution | None:
    """The reverse of `stored`; values of a pattern that were not finite are NaN."""
    import numpy as np

    if isinstance(trigger, Mapping):
        return Substitution(**trigger)
    return torch.from_numpy(np.array(trigger, dtype=np.float32)) if isinstance(trigger, list) else trigger
