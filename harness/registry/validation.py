"""Parameters checked against the types of a dataclass's fields, by pydantic."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from harness.registry.errors import InvalidSpec, UnknownName, did_you_mean


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields. Other annotations may name what only a type checker imports."""
    hints: dict[str, Any] = {}
    names = {f.name for f in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        scope = vars(sys.modules[base.__module__])
        for name, hint in inspect.get_annotations(base).items():
            if name in names:
                hints[name] = eval(hint, scope, dict(vars(base))) if isinstance(hint, str) else hint
    return hints


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True))


def checked(hint: Any, value: Any) -> tuple[Any, str | None]:
    """`value` as `hint` has it (an int given for a float becomes one), or what is wrong with it."""
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value), None
    except ValidationError as error:
        says = dict.fromkeys(
            f"{_place(fault['loc'])}{fault['msg'].removeprefix('Input ').removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        return value, f"{' or '.join(says)}, got {value!r}"


def _place(location: tuple[int | str, ...]) -> str:
    numbers = [str(part) for part in location if isinstance(part, int)]
    return f"item {'.'.join(numbers)} " if numbers else ""


def make(cls: Any, parameters: Mapping[str, Any]) -> Any:
    """An instance of plugin class `cls`. Raises InvalidSpec or UnknownName with all that is wrong, in one line."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    unknown = [
        f"no parameter '{key}'{did_you_mean(key, known)} parameters: {', '.join(known) or 'none'}"
        for key in parameters
        if key not in known
    ]
    hints, values, wrong = _hints(cls), {}, []
    for key in known:
        if key in parameters:
            values[key], fault = checked(hints[key], parameters[key])
            wrong += [f"{key}: {fault}"] if fault else []
    if unknown or wrong:
        raise (UnknownName if unknown else InvalidSpec)(f"{cls.name}: {'; '.join([*unknown, *wrong])}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise InvalidSpec(f"{cls.name}: {error}") from error
