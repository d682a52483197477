"""Specs: `name` or `name(key=literal, ...)`, read and written."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from harness.registry.errors import InvalidSpec, PluginError

LONGEST = 20_000  # characters of a spec


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`name(key=literal, ...)` → (name, parameters); lists become tuples. Raises InvalidSpec."""
    if len(spec) > LONGEST:
        raise InvalidSpec(f"a spec of {len(spec):,} characters; at most {LONGEST:,} are read")
    match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\((.*)\))?\s*", spec, re.DOTALL | re.ASCII)
    if match is None:
        raise InvalidSpec(f"cannot read the spec {spec!r}; write name or name(key=value, ...)")
    name, arguments = match.groups()
    source = f"f({arguments or ''})"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidSpec(f"cannot read the spec {spec!r}: {getattr(error, 'msg', error)}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise InvalidSpec(f"cannot read the spec {spec!r}; write name or name(key=value, ...)")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise InvalidSpec(f"{spec!r}: give parameters by name, as in {name}(key=value)")
    parameters: dict[str, Any] = {}
    for keyword in call.keywords:
        key = str(keyword.arg)
        if key in parameters:
            raise InvalidSpec(f"{spec!r}: {key} is given twice")
        parameters[key] = _literal_of(keyword.value, key, source, spec)
    return name, parameters


def _literal_of(node: ast.expr, key: str, source: str, spec: str) -> Any:
    try:
        return _tupled(ast.literal_eval(node))
    except (ValueError, TypeError, RecursionError, MemoryError):
        text = shorten(ast.get_source_segment(source, node) or "", 60, placeholder="...")
        quoted = f"; a text needs quotes: {key}='{text}'" if isinstance(node, ast.Name) else ""
        raise InvalidSpec(f"{spec!r}: {key}={text} is not a literal{quoted}") from None


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (list, tuple)) else value


def literal(value: Any) -> str:
    """The text that `parse_spec` reads back as `value`. Raises PluginError for what has none."""
    if type(value) is float and not math.isfinite(value) and not math.isnan(value):
        return "1e999" if value > 0 else "-1e999"
    if type(value) is tuple:
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if value is None or (type(value) in (bool, int, float, str) and value == value):
        return repr(value)
    raise PluginError(f"{value!r} cannot be written in a spec; use numbers, texts, booleans, None and tuples of them")


def spec_of(instance: Any) -> str:
    """The canonical spec of a plugin instance, with every default filled in."""
    return write_spec(
        instance.name, {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}
    )


def write_spec(name: str, parameters: Mapping[str, Any]) -> str:
    """The text that `parse_spec` reads back as (name, parameters)."""
    given = ", ".join(f"{key}={literal(value)}" for key, value in parameters.items())
    return f"{name}({given})" if given else name
