"""The text of specs, `name` or `name(key=literal, ...)`, and their short forms for tables."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from harness.registry import presets
from harness.runs.record import Dropped, Record, bare
from harness.runs.suite import AXES
from harness.types import Cell

PARTS = ("model", "attack", "trigger", "target", "sampler", "defense")
SPECS = (*AXES, "utility_sampler")  # fields of a cell that are specs


def as_written(spec: str) -> str:
    """A spec as it is: for who does not ask the plugins how it is written today."""
    return spec


def today(cell: Cell, current: Callable[[str], str]) -> Cell:
    """A cell with its specs as they are written today. current: spec → that text (`Declared.current`)."""
    return replace(cell, **{name: current(getattr(cell, name)) for name in SPECS})


def since(old: Cell, record: Record) -> bool:
    """Whether a record is of a cell that was written down before its plugins gained parameters: the parameters of the
    cell have their values in the record, and all others have their defaults. The
    record does not say that of the utility's sampler."""
    new, short = record.cell, record.provenance.short
    if replace(new, **{name: getattr(old, name) for name in SPECS}) != old:
        return False
    return all(
        getattr(old, name) == getattr(new, name) or _gained(getattr(old, name), getattr(new, name), short.get(name))
        for name in SPECS
    )


def _gained(old: str, new: str, short: str | None) -> bool:
    """short: the newer spec without its defaults; None where no record says it (the utility's sampler)."""
    before, after = arguments(old).items(), arguments(new).items()
    return bare(old) == bare(new) and before <= after and arguments(short or "").items() <= before


def newest(records: Sequence[Record], dropped: Sequence[Dropped] = ()) -> Callable[[Cell], Cell]:
    """Cell → the same cell as the newest of these records write it.

    A spec that was written before its plugin gained parameters is the longer one that has them, if these have their
    defaults in it, as the record of the longer one says (`provenance.short`). Where several longer ones qualify that
    are not the same, it stays as it is. No plugin is asked, so that records are read alike everywhere.
    """
    short: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in SPECS}
    for record in records:
        for name, text in record.provenance.short.items():
            if name in AXES:
                short[name][getattr(record.cell, name)].add(text)
    short["utility_sampler"] = short["sampler"]
    cells = [entry.cell for entry in (*records, *dropped)]
    words = {name: _longest({getattr(cell, name) for cell in cells}, short[name]) for name in SPECS}

    def written(cell: Cell) -> Cell:
        return replace(cell, **{name: words[name].get(spec := getattr(cell, name), spec) for name in SPECS})

    return written


def _longest(specs: Iterable[str], short: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Each spec → itself as it was written last. short: spec → what records say of it without its defaults."""
    found: dict[str, str] = {}
    given = {spec: arguments(spec).items() for spec in specs}
    without = {spec: [arguments(text).items() for text in short.get(spec, ())] for spec in given}
    for spec in sorted(given, key=lambda spec: (-len(given[spec]), spec)):
        mine = given[spec]
        later = {
            last
            for other, last in found.items()
            if bare(other) == bare(spec) and mine < given[other] and any(known <= mine for known in without[other])
        }
        found[spec] = later.pop() if len(later) == 1 else spec
    return found


def inside(spec: str) -> str:
    """What stands between the brackets of a spec."""
    return spec.partition("(")[2].removesuffix(")")


@cache  # the cells of a page have the same few specs
def arguments(spec: str) -> Mapping[str, str]:
    """The parameters of a spec as source text; {} if there are none or if it does not parse."""
    _, opening, rest = spec.partition("(")
    try:
        call = ast.parse(f"f({rest}" if opening else "f()", mode="eval").body
    except SyntaxError:
        return MappingProxyType({})
    words = call.keywords if isinstance(call, ast.Call) else []
    return MappingProxyType({word.arg: ast.unparse(word.value) for word in words if word.arg})


def shortener(records: Sequence[Record], dropped: Sequence[Dropped] = ()) -> Callable[[Cell], Cell]:
    """Cell → the same cell with short specs.

    A short spec is the preset that the record's own (`provenance.short`: only what differs from the defaults) means,
    else that one itself. Where a record has none, it has the parameters in which the specs of that name differ.
    """
    cells = [entry.cell for entry in (*records, *dropped)]
    words = {part: short_of(sorted({getattr(cell, part) for cell in cells})) for part in PARTS}
    for record in records:
        for part, short in record.provenance.short.items():
            if part in PARTS:
                words[part][getattr(record.cell, part)] = presets.named(AXES[part], short)

    def shortened(cell: Cell) -> Cell:
        return replace(cell, **{part: words[part].get(spec := getattr(cell, part), spec) for part in PARTS})

    return shortened


def short_of(specs: Iterable[str]) -> dict[str, str]:
    """Each spec → its name with only the parameters in which the specs of that name differ."""
    given = {spec: arguments(spec) for spec in specs}
    return {spec: _shortened(spec, given) for spec in given}


def _shortened(spec: str, specs: Mapping[str, Mapping[str, str]]) -> str:
    given = specs[spec]
    if not given:
        return spec.removesuffix("()")
    rivals = [other for name, other in specs.items() if bare(name) == bare(spec)]
    kept = [f"{key}={value}" for key, value in given.items() if any(other.get(key) != value for other in rivals)]
    return f"{bare(spec)}({', '.join(kept)})" if kept else bare(spec)
