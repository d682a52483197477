"""Values as JSON has them, and the one text of a value that keys are made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical(obj: Any) -> str:
    """The one JSON text of `obj`: sorted keys, no spaces, tuples as lists.

    Raises TypeError for what is not JSON, ValueError for NaN and infinity.
    """
    return json.dumps(_plain(obj, ""), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_jsonable(value: Any) -> Any:
    """`value` as JSON has it: dataclasses and pydantic models as objects, tuples as lists, paths as text, NaN and
    infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    dump = getattr(type(value), "model_dump", None)
    if dump is not None:  # a pydantic model, of a library that is not imported for this
        return to_jsonable(dump(value))
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def key_of(ingredients: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) of the canonical JSON of what determines a result."""
    return hashlib.sha256(canonical(ingredients).encode()).hexdigest()


def _plain(obj: Any, where: str) -> Any:
    if isinstance(obj, Mapping):
        for name in obj:
            if not isinstance(name, str):
                raise TypeError(f"key {name!r} at '{where or '.'}' is not a text; JSON keys are")
        return {name: _plain(value, f"{where}.{name}") for name, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(obj)]
    if obj is None or isinstance(obj, (str, bool, int, float)):
        return obj
    raise TypeError(f"{type(obj).__name__} at '{where or '.'}' is not JSON; give numbers, texts, lists and mappings")
