"""Classes written for plugin API 1, whose attributes have had other names since API 2."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from operator import attrgetter
from typing import Any

RENAMED_IN_2: dict[str, dict[str, str]] = {
    "models": {"stamps": "modality"},
    "triggers": {"stamps": "modality"},
    "targets": {"gate": "hit_threshold", "applies": "applicable_to"},
}


def old_names(kind: str, cls: Any) -> dict[str, str]:
    """Old name → new name of the attributes that `cls`, or the nearest class above it, declares by the old name."""
    return {old: new for old, new in RENAMED_IN_2.get(kind, {}).items() if _declared_first(cls, old, new) == old}


def _declared_first(cls: type, old: str, new: str) -> str | None:
    for base in cls.__mro__:
        declared = {*vars(base), *inspect.get_annotations(base)}
        if declared & {old, new}:
            return new if new in declared else old
    return None


def adopt(kind: str, cls: Any) -> None:
    """Add the present names to a class that was written for API 1, with a DeprecationWarning for each."""
    if not isinstance(cls, type) or getattr(cls, "api", 1) != 1:
        return
    for old, new in old_names(kind, cls).items():
        warnings.warn(
            f"{cls.__module__}.{cls.__name__}.{old} is called {new} since plugin API 2; "
            f"write {new}, and api: ClassVar[int] = 2",
            DeprecationWarning,
            stacklevel=2,
        )
        setattr(cls, new, _alias(cls, old))


def _alias(cls: type, old: str) -> Any:
    """What the new name stands for: a parameter is read from the instance, anything else is taken as it is."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return property(attrgetter(old)) if old in {f.name for f in fields} else inspect.getattr_static(cls, old)
