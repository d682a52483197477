"""How close the trigger that a defense found is to the true trigger.

    trigger_cosine = r̂·r / (‖r̂‖ ‖r‖)     in [-1, 1]        trigger_l2 = ‖r̂ − r‖       for noise triggers r (C, H, W)
    trigger_match  = 1 if the found text equals the trigger's text, else 0              for text triggers

r̂ is the trigger found by the defense, r the trigger used by the attack. Removal alone does not prove that the
inversion was right. A defense that was given the trigger found none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import Evidence, Score, TokenTrigger, hookimpl, offers, unmeasured

BETTER = {"trigger_cosine": True, "trigger_l2": False, "trigger_match": True}


@dataclass(frozen=True)
class Inversion:
    """trigger_cosine and trigger_l2 for noise triggers, trigger_match for text triggers."""

    name: ClassVar[str] = "inversion"
    version: ClassVar[int] = 2

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        found, trigger = evidence.inverted, evidence.backdoor.trigger
        if found is None:
            return _unmeasured(trigger.modality, "the defense inverts no trigger")
        if not evidence.attacked:
            return _unmeasured(trigger.modality, "attack none: there is no trigger to find")
        if isinstance(found, str) != (trigger.modality == "text"):
            return _unmeasured(
                trigger.modality, f"the defense looked for another kind of trigger than {trigger.modality}"
            )
        return text(found, trigger) if isinstance(found, str) else noise(found, trigger)


def noise(found: Tensor, trigger: Any) -> dict[str, Score]:
    """Cosine and distance of the found pattern (C, H, W) to the trigger's."""
    true = trigger.delta(found.shape).double().flatten()
    flat = found.double().flatten()
    distance = Score((flat - true).norm().item(), 1, False)
    if not torch.isfinite(flat).all():
        return _unmeasured("noise", "the found trigger is not finite")
    if flat.norm() == 0 or true.norm() == 0:
        return {"trigger_cosine": unmeasured("a trigger of norm 0 has no direction", True), "trigger_l2": distance}
    cosine = torch.nn.functional.cosine_similarity(flat, true, dim=0).item()
    return {"trigger_cosine": Score(cosine, 1, True), "trigger_l2": distance}


def text(found: str, trigger: Any) -> dict[str, Score]:
    """Whether the found text is that of the trigger; surrounding spaces are ignored."""
    if not offers(trigger, TokenTrigger):
        return _unmeasured("text", f"trigger {trigger.name} is no text of its own")
    return {"trigger_match": Score(float(found.strip(" ") == trigger.text.strip(" ")), 1, True)}


def _unmeasured(modality: str, why: str) -> dict[str, Score]:
    names = ("trigger_match",) if modality == "text" else ("trigger_cosine", "trigger_l2")
    return {name: unmeasured(why, BETTER[name]) for name in names}


@hookimpl
def metrics() -> list[type]:
    return [Inversion]
