"""No attack: the clean model itself, the control of every grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness.hookspecs import hookimpl
from harness.types import Backdoor, Backdoored, Data


@dataclass(frozen=True)
class NoAttack:
    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    accepts_targets: ClassVar[tuple[str, ...]] = ("image", "patch", "class")
    biased_noise: ClassVar[bool] = True  # the clean model under a biased trigger is the control of such an attack

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        return Backdoored(model, backdoor)


@hookimpl
def attacks() -> list[type]:
    return [NoAttack]
