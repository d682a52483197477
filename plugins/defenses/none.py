"""No defense: the attacked model without any change, which is the control of every grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness import Defended, Knowledge, hookimpl


@dataclass(frozen=True)
class NoDefense:
    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ()

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        return Defended()


@hookimpl
def defenses() -> list[type]:
    return [NoDefense]
