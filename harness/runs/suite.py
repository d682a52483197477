"""Suite TOML → cells. A suite holds one or more [[grid]] tables, each a product over lists of specs:

    title = "..."
    metrics = ["*", "found-trigger"]     # default: "*", every registered metric that needs no images of its own
    packages = {hush = "bench-hush"}     # plugins of other distributions, and what pip installs for them: without it,
                                         # their cells are left out, and the others remain
    [[grid]]
    model = ["digits-ddpm"]
    attack = ["none", "villandiffusion(solver='ode')"]
    trigger = ["box"]
    target = ["corner"]
    defense = ["none", "finetune", "elijah"]
    sampler = ["ddim(steps=50)"]         # default: ddim
    seed = [0]                           # default: 0
    n = 256                              # evaluation samples per cell, default 256
    evaluation_seed = [0]                # draws noises and prompts of the evaluation; default: the cell's seed
    utility_n = 2048                     # further clean samples, for distances; default 2048 (256 for models that take
                                         # prompts), 0 where n is below 100
    utility_sampler = "dpm-solver-pp(steps=10)"  # of these; default: this one, or the cell's where it does not apply
    controls = ["decoy", "opposite", "zero"]  # what a defense that needs the trigger is given in further cells instead

Combinations that make no sense are dropped with the reason in words; they appear in the report as "n/a".
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from harness.capabilities import (
    AttackersSampler,
    accepted_models,
    extra_sets,
    family_of,
    missing_control,
    missing_of_trigger,
    offers,
    scales_noise,
)
from harness.methods.learned_triggers import unlearnable
from harness.registry import Registry, RegistryError, did_you_mean, parse_spec, presets, spec_of
from harness.runs.evaluations import nfe_of
from harness.runs.record import Dropped, bare
from harness.types import Cell

AXES = {
    "model": "models",
    "attack": "attacks",
    "trigger": "triggers",
    "target": "targets",
    "sampler": "samplers",
    "defense": "defenses",
}
DEFAULTS: dict[str, Any] = {"sampler": ("ddim",), "seed": (0,), "n": 256, "controls": ()}
UTILITY_N = {"unconditional": 2048, "text-to-image": 256}
TRIAL = 100  # evaluation samples below which a suite is a trial, and has no utility set unless it asks for one
UTILITY_SAMPLER = "dpm-solver-pp(steps=10)"  # of models that it samples: the fewest evaluations near 50 of DDIM
GRID_KEYS = (
    "model", "attack", "trigger", "target", "defense", "sampler", "seed", "n", "evaluation_seed", "utility_n",
    "utility_sampler", "controls",
)  # fmt: skip
NEEDED = tuple(axis for axis in AXES if axis not in DEFAULTS)  # keys that have no default
SUITE_KEYS = ("title", "metrics", "packages", "grid")
CONTROLS = ("decoy", "decoy-2", "decoy-3", "opposite", "zero")
FAMILIES = {"vp": "variance-preserving", "ve": "variance-exploding", "flow": "flow-matching"}
FILTERS = tuple(f.name for f in fields(Cell))


class SuiteError(RegistryError):
    """A suite, --set or --only that says something impossible, in one line."""


@dataclass(frozen=True)
class Suite:
    """What a run computes. Cells are distinct, their specs canonical, in the order of the file. absent: plugins whose
    cells are left out because their packages are not installed, and what pip installs for them."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    dropped: tuple[Dropped, ...]
    metrics: tuple[str, ...]
    path: Path
    absent: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, cell: Cell) -> bool:
        """Whether a part of the cell is of a package that is not installed."""
        return any(bare(getattr(cell, axis)) in self.absent for axis in AXES)


@dataclass(frozen=True)
class Grid:
    """One [[grid]] table, checked for form; `place` names it in messages. evaluation_seeds, utility_n and
    utility_sampler are None where the table leaves them to the cell."""

    place: str
    axes: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    n: int
    controls: tuple[str, ...]
    evaluation_seeds: tuple[int, ...] | None = None
    utility_n: int | None = None
    utility_sampler: str | None = None


@dataclass(frozen=True)
class Draft:
    """A suite file checked for form. Its specs have not met the plugins yet."""

    name: str
    title: str
    metrics: tuple[str, ...] | None
    grids: tuple[Grid, ...]
    path: Path
    packages: Mapping[str, str] = field(default_factory=dict)


def load_suite(suite: str | Path, registry: Registry, only: Sequence[str] = (), sets: Sequence[str] = ()) -> Suite:
    """The suite of that name or path, expanded. Raises SuiteError, UnknownName or InvalidSpec."""
    return expand(read(find_suite(suite), sets), registry, only)


# ---- files --------------------------------------------------------------------------------------------------------


def suites() -> dict[str, Path]:
    """name → file of the suites shipped with the leaderboard."""
    spec = importlib.util.find_spec("leaderboard")
    places = [Path(place) / "suites" for place in (spec.submodule_search_locations if spec else None) or ()]
    return {path.stem: path for place in places for path in sorted(place.glob("*.toml"))}


def find_suite(name_or_path: str | Path) -> Path:
    """A path ends in .toml or has a directory; anything else names a shipped suite. Raises SuiteError."""
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    if text.endswith(".toml") or len(path.parts) > 1:
        if not path.is_file():
            raise SuiteError(f"{text}: no such suite file")
        return path
    known = suites()
    if text not in known:
        raise SuiteError(f"no suite '{text}'{did_you_mean(text, known)} bench list suites lists them; or give a path")
    return known[text]


def read(path: Path, sets: Sequence[str] = ()) -> Draft:
    """Read a suite file, apply `sets` ("n=16", "grid.0.n=16") and check its form. Raises SuiteError."""
    if not re.fullmatch(r"\w[\w.+-]*", path.stem):
        raise SuiteError(f"{path}: runs are named for the file; use letters, digits, '-', '_' and '.' in its name")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise SuiteError(f"{path}: not TOML: {error}") from None
    for text in sets:
        _set(document, text)
    _known_keys(document, SUITE_KEYS, str(path))
    grids = document.get("grid")
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise SuiteError(f"{path}: a suite needs at least one table [[grid]], with {', '.join(NEEDED)}")
    title = _typed(document.get("title", path.stem), str, "a text", f"{path}: title")
    metrics = None
    if "metrics" in document:
        metrics = _list(document["metrics"], str, "texts", f"{path}: metrics")
    checked = tuple(_grid(grid, f"{path}: grid {i}") for i, grid in enumerate(grids))
    packages = document.get("packages", {})
    if not isinstance(packages, dict) or not all(isinstance(package, str) for package in packages.values()):
        raise SuiteError(f'{path}: packages should be a table such as {{hush = "bench-hush"}}, got {packages!r}')
    return Draft(path.stem, title, metrics, checked, path, packages)


def _grid(table: Mapping[str, Any], place: str) -> Grid:
    _known_keys(table, GRID_KEYS, place)
    values = {**DEFAULTS, **table}
    missing = [axis for axis in AXES if axis not in values]
    if missing:
        raise SuiteError(f"{place}: lacks {', '.join(missing)}; a grid needs {', '.join(NEEDED)}")
    axes = {axis: _list(values[axis], str, "specs", f"{place}: {axis}") for axis in AXES}
    seeds = _list(values["seed"], int, "whole numbers", f"{place}: seed")
    n = _typed(values["n"], int, "a whole number", f"{place}: n")
    if n < 1:
        raise SuiteError(f"{place}: n should be at least 1, got {n}")
    controls = _list(values["controls"], str, "texts", f"{place}: controls", empty=True)
    for control in controls:
        if control not in CONTROLS:
            known = ", ".join(CONTROLS)
            raise SuiteError(f"{place}: no control '{control}'{did_you_mean(control, CONTROLS)} known: {known}")
    return Grid(place, axes, seeds, n, controls, *_evaluation(values, place))


def _evaluation(values: Mapping[str, Any], place: str) -> tuple[tuple[int, ...] | None, int | None, str | None]:
    """The evaluation seeds, the size of the utility set and its sampler, each None where the table does not say it."""
    seeds, n, sampler = (values.get(key) for key in ("evaluation_seed", "utility_n", "utility_sampler"))
    if seeds is not None:
        seeds = _list(seeds, int, "whole numbers", f"{place}: evaluation_seed")
    if n is not None and _typed(n, int, "a whole number", f"{place}: utility_n") < 0:
        raise SuiteError(f"{place}: utility_n should be at least 0, got {n}; 0 measures distances on the n samples")
    if sampler is not None:
        sampler = _typed(sampler, str, "a spec", f"{place}: utility_sampler")
    return seeds, n, sampler


def _known_keys(table: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise SuiteError(f"{place}: no key '{key}'{did_you_mean(key, known)} known: {', '.join(known)}")


def _typed(value: Any, kind: type, words: str, place: str) -> Any:
    if type(value) is not kind:
        raise SuiteError(f"{place} should be {words}, got {value!r}")
    return value


def _list(value: Any, kind: type, words: str, place: str, empty: bool = False) -> tuple[Any, ...]:
    """A list of `kind`; a single value is a list of one."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(item) is kind for item in values) or not (values or empty):
        raise SuiteError(f"{place} should be a list of {words}, got {value!r}")
    return values


def _set(document: dict[str, Any], text: str) -> None:
    """Apply one override: a key of the suite, of one grid (grid.0.n) or of every grid (n)."""
    key, equals, literal = text.partition("=")
    key = key.strip()
    if not equals:
        raise SuiteError(f"--set {text}: write key=value, as in --set n=16")
    value = _toml(literal.strip(), text)
    tables = document.get("grid")
    tables = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
    if key in ("title", "metrics"):
        document[key] = value
        return
    if match := re.fullmatch(r"grid\.(\d+)\.(\w+)", key):
        number, key = int(match[1]), match[2]
        if number >= len(tables):
            raise SuiteError(f"--set {text}: there is no grid {number}; the suite has {len(tables)}, counted from 0")
        tables = [tables[number]]
    _known_keys({key: value}, GRID_KEYS, f"--set {text}")
    for table in tables:
        table[key] = value


def _toml(literal: str, text: str) -> Any:
    """A TOML value; what is a spec as it stands needs no quotes."""
    try:
        return tomllib.loads(f"value = {literal}")["value"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError, ValueError):
        pass
    try:
        parse_spec(literal)
    except RegistryError:
        raise SuiteError(f"--set {text}: {literal} is neither a TOML value nor a spec") from None
    return literal


# ---- expansion ----------------------------------------------------------------------------------------------------


def expand(draft: Draft, registry: Registry, only: Sequence[str] = ()) -> Suite:
    """Meet the plugins: canonical specs, impossible combinations dropped, duplicates merged, `only` applied.

    only: "defense=skd" keeps cells whose defense's name contains "skd" ("defense=skd(" and on: whose canonical spec
    starts so; the name of a preset: whose spec is the preset's); seed and n match exactly. Several of one key are
    alternatives, several keys must all hold. Raises SuiteError for a filter that leaves nothing.
    """
    cells: dict[Cell, None] = {}
    dropped: dict[Cell, str] = {}
    absent: dict[str, str] = {}
    for grid in draft.grids:
        here, gone = _installed(grid, draft.packages, registry)
        absent |= gone
        for cell, reason in _cells(here, registry):
            if reason is None:
                cells[cell] = None
            else:
                dropped[cell] = reason
    wanted = _filter(only, registry)
    kept = tuple(cell for cell in cells if wanted(cell))
    out = tuple(Dropped(cell, reason) for cell, reason in dropped.items() if wanted(cell))
    if not kept and not out:
        lacking = "".join(f"; {name} is not installed: pip install {package}" for name, package in absent.items())
        filters = " ".join(f"--only {text}" for text in only)
        nothing = f"{filters}: keeps no cell of {draft.path}" if only else f"{draft.path}: no cell is left"
        raise SuiteError(nothing + lacking)
    asked = ("*",) if draft.metrics is None else draft.metrics
    metrics = [name for spec in asked for name in (standard(registry) if spec == "*" else (spec,))]
    canonical = tuple(dict.fromkeys(_canonical(registry, "metrics", spec, str(draft.path)) for spec in metrics))
    return Suite(draft.name, draft.title, kept, out, canonical, draft.path, absent)


def _installed(grid: Grid, packages: Mapping[str, str], registry: Registry) -> tuple[Grid, dict[str, str]]:
    """The grid without the specs whose plugins are of packages that are not installed, and these: plugin → what pip
    installs for it."""
    axes: dict[str, tuple[str, ...]] = {}
    absent: dict[str, str] = {}
    for axis, specs in grid.axes.items():
        names = {spec: _plugin(AXES[axis], spec) for spec in specs} if packages else {}
        gone = {name for name in names.values() if name in packages and name not in registry.classes(AXES[axis])}
        axes[axis] = tuple(spec for spec in specs if names.get(spec) not in gone)
        absent |= {name: packages[name] for name in sorted(gone)}
    return replace(grid, axes=axes), absent


def _plugin(kind: str, spec: str) -> str:
    """The name of the plugin that a spec means; the spec where it is none."""
    try:
        return presets.expanded(kind, *parse_spec(spec))[0]
    except RegistryError:
        return spec


def standard(registry: Registry) -> tuple[str, ...]:
    """The metrics of a suite that names none: those that read no image set of their own."""
    return tuple(name for name, cls in registry.classes("metrics").items() if not extra_sets(cls))


def _cells(grid: Grid, registry: Registry) -> list[tuple[Cell, str | None]]:
    """The cells of one grid, defenses innermost, each with the reason for dropping it or None."""
    canonical = {
        axis: {_canonical(registry, kind, spec, f"{grid.place}: {axis}"): None for spec in grid.axes[axis]}
        for axis, kind in AXES.items()
    }
    built = {axis: {spec: registry.build(AXES[axis], spec) for spec in specs} for axis, specs in canonical.items()}
    sets = {
        (model, sampler): utility(grid, registry, built["model"][model], built["sampler"][sampler])
        for model, sampler in itertools.product(canonical["model"], canonical["sampler"])
    }
    found: list[tuple[Cell, str | None]] = []
    reasons: dict[tuple[str, ...], str | None] = {}
    models, attacks, triggers, targets, samplers, defenses = (canonical[axis] for axis in AXES)
    for model, attack, trigger, target, sampler, seed, defense in itertools.product(
        models, attacks, triggers, targets, samplers, dict.fromkeys(grid.seeds), defenses
    ):
        specs = (model, attack, trigger, target, sampler, defense)
        defender = built["defense"][defense]
        if specs not in reasons:
            reasons[specs] = impossible({axis: built[axis][spec] for axis, spec in zip(AXES, specs, strict=True)})
        reason = reasons[specs]
        size, fast = sets[model, sampler]
        for evaluation_seed in (seed,) if grid.evaluation_seeds is None else dict.fromkeys(grid.evaluation_seeds):
            cell = Cell(
                model, attack, trigger, target, defense, sampler, seed, n=grid.n, evaluation_seed=evaluation_seed,
                utility_n=size, utility_sampler=fast,
            )  # fmt: skip
            found.append((cell, reason))
            if "trigger" in defender.needs and reason is None:
                found += [
                    (replace(cell, trigger_given=given), missing_control(built["trigger"][trigger], given))
                    for given in dict.fromkeys(grid.controls)
                ]
    return found


def utility(grid: Grid, registry: Registry, model: Any, own: Any) -> tuple[int, str]:
    """The size of the utility set of cells of this model and sampler, and the spec of the sampler of the set; 0 and ""
    for none.

    Raises SuiteError where the grid names a sampler that does not sample the model.
    """
    usual = UTILITY_N["text-to-image" if model.conditional else "unconditional"] if grid.n >= TRIAL else 0
    size = usual if grid.utility_n is None else grid.utility_n
    if size == 0:
        return 0, ""
    named = grid.utility_sampler
    spec = _canonical(registry, "samplers", named or UTILITY_SAMPLER, f"{grid.place}: utility_sampler")
    sampler = registry.build("samplers", spec)
    if family_of(sampler) == family_of(model) and not scales_noise(sampler):
        return size, spec
    if named is not None:
        raise SuiteError(f"{grid.place}: utility_sampler {named} does not sample {model.name} without a trigger")
    return size, registry.canonical("samplers", _vanilla(own))


def _vanilla(sampler: Any) -> str:
    """The spec of a sampler, or of its vanilla form where it is an attacker's own reverse process."""
    return spec_of(sampler.vanilla() if offers(sampler, AttackersSampler) else sampler)


def _canonical(registry: Registry, kind: str, spec: str, place: str) -> str:
    try:
        return registry.canonical(kind, spec)
    except RegistryError as error:
        raise type(error)(f"{place}: {error}") from None


def impossible(parts: Mapping[str, Any]) -> str | None:
    """Why these plugin instances (by axis) cannot make a cell, in words; None if they can.

    What a part does not declare is taken as docs/plugins.md says: harness.types has the capabilities.
    """
    model, attack, trigger, target = (parts[axis] for axis in ("model", "attack", "trigger", "target"))
    if trigger.modality != model.modality:
        return f"{trigger.name} stamps {trigger.modality}, {model.name} takes triggers in {model.modality}"
    for axis in ("attack", "defense"):
        accepted = parts[axis].accepts_triggers
        if trigger.modality not in accepted:
            return (
                f"{parts[axis].name} accepts triggers in {_words(accepted)}, {trigger.name} stamps {trigger.modality}"
            )
    if target.kind not in attack.accepts_targets and "any" not in attack.accepts_targets:
        return f"{attack.name} accepts targets of kind {_words(attack.accepts_targets)}, {target.name} is {target.kind}"
    if reason := unlearnable(attack, trigger, target):
        return reason
    for axis in ("trigger", "sampler"):
        if scales_noise(parts[axis]) and not scales_noise(attack):
            return f"{parts[axis].name} is for attacks on biased noise γ ε + μ, {attack.name} trains on unit noise"
    if scales_noise(parts["sampler"]) and trigger.modality != "noise":
        return f"{parts['sampler'].name} follows a trigger in noise, {trigger.name} stamps {trigger.modality}"
    for axis in ("attack", "defense", "sampler"):
        if missing := missing_of_trigger(parts[axis], trigger):
            return f"{parts[axis].name} needs a trigger with {' and '.join(missing)}, {trigger.name} has none"
    sampler: Any = parts["sampler"]
    nfe = nfe_of(sampler)
    if type(nfe) is not int or nfe < 1:
        return f"{sampler.name} takes nfe = {nfe!r} network evaluations per image; it should be a whole number"
    family, sampled = family_of(model), family_of(parts["sampler"])
    if sampled != family:
        return f"{parts['sampler'].name} samples {FAMILIES[sampled]} models, {model.name} is {FAMILIES[family]}"
    for axis in ("attack", "trigger", "target", "defense"):
        accepted = accepted_models(parts[axis])
        if accepted is not None and model.name not in accepted:
            return f"{parts[axis].name} accepts the models {_words(accepted)}, not {model.name}"
    return None


def _words(names: Sequence[str]) -> str:
    return " or ".join(names) or "nothing"


def _filter(only: Sequence[str], registry: Registry) -> Any:
    """Cell → bool for filters as in `expand`. Raises SuiteError for an unknown key."""
    wanted: dict[str, list[str]] = {}
    for text in only:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise SuiteError(f"--only {text}: write key=value, as in --only defense=skd")
        if key not in FILTERS:
            raise SuiteError(f"--only {text}: no key '{key}'{did_you_mean(key, FILTERS)} known: {', '.join(FILTERS)}")
        if (AXES.get(key), value) in presets.shipped():
            value = registry.canonical(AXES[key], value)
        wanted.setdefault(key, []).append(value)
    return lambda cell: all(any(_matches(cell, key, value) for value in values) for key, values in wanted.items())


def _matches(cell: Cell, key: str, value: str) -> bool:
    have = getattr(cell, key)
    if isinstance(have, int):
        return str(have) == value
    return have.startswith(value) if "(" in value else value in have.partition("(")[0]
