"""Presets: named specs, each with the reasons for what is not a default and the seeds on which it was chosen.

A file of `leaderboard/presets` holds tables by kind and name:

    [attacks.ode-mnist]
    spec = "villandiffusion(solver='ode', poison_rate=0.4, steps=1200)"
    seeds = [100, 101]
    chosen = "the first of three poison rates whose ASR is above 0.9 on both seeds"
    [attacks.ode-mnist.why]
    solver = "the attack on ODE samplers"
    poison_rate = "0.1, the paper's, opens nothing in a network of this size"
    steps = "15 minutes on one core"

Wherever a spec is read, `ode-mnist` stands for the whole spec, and `ode-mnist(steps=10)` changes a part of it.
"""

from __future__ import annotations

import functools
import importlib.util
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.registry.errors import KINDS, RegistryError
from harness.registry.specs import parse_spec

KEYS = ("spec", "seeds", "chosen", "why")
TEST_SEEDS = (10, 11, 12)  # seeds of the benchmark, on which nothing may be chosen


class PresetError(RegistryError):
    """A file of presets that cannot be used, in one line."""


@dataclass(frozen=True)
class Preset:
    """A named spec. kind: "attacks", "defenses" .. spec: only what is not a default. why: parameter → the reason for
    its value. seeds: the development seeds on which it was chosen. chosen: how it was chosen."""

    kind: str
    name: str
    spec: str
    seeds: tuple[int, ...]
    chosen: str
    why: Mapping[str, str]


def read(path: Path) -> tuple[Preset, ...]:
    """The presets of a file. Raises PresetError."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PresetError(f"{path}: not a file of presets: {error}") from None
    found: list[Preset] = []
    for kind, tables in document.items():
        if kind not in KINDS or not isinstance(tables, dict):
            raise PresetError(f"{path}: [{kind}] is no kind; write [KIND.NAME] with one of {', '.join(KINDS)}")
        found += [_preset(kind, name, table, f"{path}: [{kind}.{name}]") for name, table in tables.items()]
    return tuple(found)


def _preset(kind: str, name: str, table: Any, place: str) -> Preset:
    if not isinstance(table, dict) or set(table) != set(KEYS):
        raise PresetError(f"{place} should have exactly the keys {', '.join(KEYS)}")
    seeds, why = table["seeds"], table["why"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise PresetError(f"{place}: seeds should be a list of whole numbers")
    if tested := sorted(set(seeds) & set(TEST_SEEDS)):
        raise PresetError(f"{place}: nothing may be chosen on seed {tested[0]}, which is one of the benchmark's")
    if not isinstance(why, dict) or not all(isinstance(text, str) for text in (table["chosen"], *why.values())):
        raise PresetError(f"{place}: chosen should be a text, and why a table of texts")
    try:
        given = parse_spec(table["spec"])[1] if isinstance(table["spec"], str) else None
    except RegistryError as error:
        raise PresetError(f"{place}: {error}") from None
    if given is None or set(given) != set(why):
        raise PresetError(f"{place}: why should say a reason for each parameter of its spec and for nothing else")
    return Preset(kind, name, table["spec"], tuple(seeds), table["chosen"], why)


@functools.cache
def shipped() -> Mapping[tuple[str, str], Preset]:
    """(kind, name) → the presets that come with the leaderboard. Raises PresetError."""
    spec = importlib.util.find_spec("leaderboard")
    places = [Path(place) / "presets" for place in (spec.submodule_search_locations if spec else None) or ()]
    return by_name(preset for place in places for path in sorted(place.glob("*.toml")) for preset in read(path))


def by_name(presets: Iterable[Preset]) -> Mapping[tuple[str, str], Preset]:
    """(kind, name) → preset. Raises PresetError for two of one name."""
    found: dict[tuple[str, str], Preset] = {}
    for preset in presets:
        if (preset.kind, preset.name) in found:
            raise PresetError(f"there are two presets {preset.name} of kind {preset.kind}")
        found[preset.kind, preset.name] = preset
    return found


def expanded(kind: str, name: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The plugin and the parameters that a name means: those of the preset and `parameters` over them; the same name
    and parameters where no preset has the name."""
    preset = shipped().get((kind, name))
    if preset is None:
        return name, dict(parameters)
    plugin, own = parse_spec(preset.spec)
    return plugin, {**own, **parameters}


def named(kind: str, short: str) -> str:
    """The name of the preset that a spec means, else the spec. short: without defaults, its parameters in any order."""
    try:
        wanted = _read_once(short)
    except RegistryError:
        return short
    return next((p.name for (of, _), p in shipped().items() if of == kind and _read_once(p.spec) == wanted), short)


@functools.lru_cache(maxsize=10_000)
def _read_once(spec: str) -> tuple[str, dict[str, Any]]:
    """`parse_spec`, for comparing only: planning asks for the same few specs in every cell. Raises RegistryError."""
    return parse_spec(spec)
