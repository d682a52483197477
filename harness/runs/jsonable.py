"""Values as JSON has them, and the one text of a value that keys are made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ATOMS = frozenset({str, bool, int, float, type(None)})


def canonical(obj: Any) -> str:
    """The one JSON text of `obj`: sorted keys, no spaces, tuples as lists.

    Raises TypeError for what is not JSON, ValueError for NaN and infinity.
    """
    plain = obj if _is_plain(obj) else _plain(obj, "")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_jsonable(value: Any) -> Any:
    """`value` as JSON has it: dataclasses and pydantic models as objects, tuples as lists, paths as text, NaN and
    infinities as null."""
    if type(value) in _ATOMS:
        return None if type(value) is float and not math.isfinite(value) else value
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


def _is_plain(obj: Any) -> bool:
    """Whether `obj` is made of JSON's own types alone, as almost everything is: `_plain` would only copy it."""
    kind = type(obj)
    if kind is dict:
        return all(type(name) is str and (type(item) in _ATOMS or _is_plain(item)) for name, item in obj.items())
    if kind is list or kind is tuple:
        return all(type(item) in _ATOMS or _is_plain(item) for item in obj)
    return kind in _ATOMS


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
