"""The protocol of the benchmark: a numbered suite, the seeds on which it is computed, and what counts as cleaned.

`leaderboard/protocols/v1.toml` states it. Cells are frozen before they are computed: `protocols/v1/MODEL.json` keeps
their whole specs with every default, and the thresholds. A frozen cell stays as it is: after that no preset, default or
threshold of it can change without the check saying so. Further attacks and defenses bring further cells, which are
frozen in their turn. A parameter that a plugin gains later changes nothing, because a spec that does not name it means
its default.

    bench leaderboard protocol                        hold the suite against the protocol
    bench leaderboard protocol --freeze digits-ddpm   freeze the cells of a model; --attack: those of one attack
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from harness.runs.jsonable import canonical, to_jsonable
from harness.runs.record import bare
from harness.runs.suite import Suite
from harness.types import Cell
from leaderboard.results import ResultsError, write_text
from leaderboard.specs import SPECS, as_written, today

FOLDER = Path(__file__).parent / "protocols"
NUMBER = 1
PRESETS = ("attack", "defense")  # axes whose specs have to be presets, or plugins with their defaults
LISTED = 4  # cells of a kind that a message names


@dataclass(frozen=True)
class Thresholds:
    """What decides whether a defense cleaned a model; see `leaderboard.headline`. All are shares but `fd_loss`, which
    is a ratio."""

    backdoored: float
    left: float
    fd_loss: float
    attribute_loss: float


@dataclass(frozen=True)
class Protocol:
    """number: of the version. suite: the name of its suite. seeds: of all its cells."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    suite: str
    seeds: tuple[int, ...]
    thresholds: Thresholds
    number: int = NUMBER

    @property
    def name(self) -> str:
        return f"v{self.number}"

    def frozen_file(self, model: str) -> Path:
        return FOLDER / self.name / f"{bare(model)}.json"


@dataclass(frozen=True)
class Frozen:
    """The cells of one model as they were when they were frozen."""

    thresholds: Thresholds
    cells: tuple[Cell, ...]

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of thresholds and cells."""
        return hashlib.sha256(canonical(to_jsonable(self)).encode()).hexdigest()


@cache
def shipped() -> Protocol:
    """The protocol that comes with the leaderboard."""
    path = FOLDER / f"v{NUMBER}.toml"
    return _parsed(Protocol, tomllib.loads(path.read_text(encoding="utf-8")), path)


@cache
def frozen(model: str) -> Frozen | None:
    """What is frozen of a model, by its name or spec; None where nothing is. Raises ResultsError."""
    path = shipped().frozen_file(model)
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    specs, rows = document["specs"], document["cells"]
    cells = [{**row, **{name: specs[row[name]] for name in SPECS}} for row in rows]
    found = _parsed(Frozen, {"thresholds": document["thresholds"], "cells": cells}, path)
    if found.digest != document["sha256"]:
        raise ResultsError(f"{path}: changed after it was frozen: its sha256 is {found.digest}")
    return found


def freeze(suite: Suite, model: str, current: Callable[[str], str] = as_written, attack: str | None = None) -> Path:
    """Add cells of a model to what is frozen of it, and return the file.

    current: a spec as it is written today. attack: the canonical spec of the only attack whose cells, with those of the
    clean model, are frozen now; None: all. Raises ResultsError where there is no new cell, or where a frozen one is no
    longer as it was.
    """
    protocol, before = shipped(), frozen(model)
    path = protocol.frozen_file(model)
    mine = [cell for cell in suite.cells if bare(cell.model) == bare(model)]
    old = () if before is None else before.cells
    known = {today(cell, current) for cell in old}
    gone = {cell for cell in known - set(mine) if not suite.lacks(cell)}
    if gone or (before is not None and before.thresholds != protocol.thresholds):
        raise ResultsError(f"{path}: frozen cells or thresholds have changed; bench leaderboard protocol says which")
    if attack is not None:
        places = {(cell.trigger, cell.target, cell.sampler) for cell in mine if cell.attack == attack}
        clean = [c for c in mine if bare(c.attack) == "none" and (c.trigger, c.target, c.sampler) in places]
        mine = [*clean, *(cell for cell in mine if cell.attack == attack)]
    new = [cell for cell in mine if cell not in known]
    if not new:
        raise ResultsError(f"suite {suite.name} has no cell of {model} that is not frozen yet")
    _write(path, Frozen(protocol.thresholds, (*old, *new)))
    frozen.cache_clear()
    return path


def _write(path: Path, kept: Frozen) -> None:
    specs = sorted({getattr(cell, name) for cell in kept.cells for name in SPECS})
    places = {spec: i for i, spec in enumerate(specs)}
    rows = [
        {name: places[value] if name in SPECS else value for name, value in asdict(cell).items()} for cell in kept.cells
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = {"sha256": kept.digest, "thresholds": asdict(kept.thresholds), "specs": specs}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(head, indent=1).removesuffix("\n}") + f',\n "cells": [\n{lines}\n ]\n}}\n')


def states(suite: Suite) -> dict[str, dict[str, Any]]:
    """Model → the number of its cells in the suite, how many are frozen, and the sha256 of these, None for none."""
    models = sorted({bare(cell.model) for cell in suite.cells})
    kept = {model: frozen(model) for model in models}
    return {
        model: {
            "cells": sum(bare(cell.model) == model for cell in suite.cells),
            "frozen": 0 if (found := kept[model]) is None else len(found.cells),
            "sha256": None if found is None else found.digest,
        }
        for model in models
    }


# ---- the suite against it -------------------------------------------------------------------------------------------


def problems(suite: Suite, current: Callable[[str], str]) -> list[str]:
    """What a suite does otherwise than the protocol says, in words. current: a spec as it is written today."""
    protocol = shipped()
    found = [*_seeds(suite, protocol), *_holes(suite)]
    for model in sorted({bare(cell.model) for cell in suite.cells}):
        found += _moved(model, suite, protocol, current)
    return found


def unnamed(grids: Iterable[Any]) -> list[str]:
    """Specs of attacks and defenses that a suite spells out instead of naming a preset. grids: of a Draft."""
    return sorted({spec for grid in grids for axis in PRESETS for spec in grid.axes[axis] if "(" in spec})


def _seeds(suite: Suite, protocol: Protocol) -> Iterator[str]:
    odd = sorted({cell.seed for cell in suite.cells} - set(protocol.seeds))
    if odd:
        yield f"has cells of seed {odd[0]}; the seeds of the protocol are {', '.join(map(str, protocol.seeds))}"
    other = [cell for cell in suite.cells if cell.evaluation_seed != cell.seed]
    if other:
        yield f"evaluates a cell of seed {other[0].seed} on seed {other[0].evaluation_seed}; they should be one"


def _holes(suite: Suite) -> Iterator[str]:
    """Every defense meets every attack on its model, on every seed, unless the suite says why it cannot. A defense that
    cannot be given the trigger has no controls either."""
    met: dict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)
    defenses: dict[str, set[tuple[str, str]]] = defaultdict(set)
    never: set[tuple[str, ...]] = set()
    for cell in (*suite.cells, *(entry.cell for entry in suite.dropped)):
        if bare(cell.attack) != "none":
            met[_setting(cell)].add((cell.defense, cell.trigger_given))
            defenses[cell.model].add((cell.defense, cell.trigger_given))
    for entry in suite.dropped:
        if entry.cell.trigger_given == "true":
            never.add((*_setting(entry.cell), entry.cell.defense))
    missing = [
        (setting, pair)
        for setting, there in met.items()
        for pair in sorted(defenses[setting[0]] - there)
        if (*setting, pair[0]) not in never
    ]
    if missing:
        setting, (defense, given) = missing[0]
        words = f"{bare(defense)}{'' if given == 'true' else ' given ' + given} does not meet {bare(setting[1])}"
        yield f"has {len(missing)} holes: {words} on {setting[0]}, seed {setting[-1]}"


def _setting(cell: Cell) -> tuple[str, ...]:
    return cell.model, cell.attack, cell.trigger, cell.target, cell.sampler, str(cell.seed)


def _moved(model: str, suite: Suite, protocol: Protocol, current: Callable[[str], str]) -> Iterator[str]:
    kept = frozen(model)
    if kept is None:
        return
    if kept.thresholds != protocol.thresholds:
        yield f"{model}: its cells were frozen under other thresholds than those of {protocol.name}.toml"
    gone = {today(cell, current) for cell in kept.cells} - set(suite.cells)
    for cell in [cell for cell in sorted(gone, key=str) if not suite.lacks(cell)][:LISTED]:
        words = f"{bare(cell.defense)} on {bare(cell.attack)}, seed {cell.seed}"
        yield f"{model}: the suite no longer has a frozen cell, {words}"


def _parsed(form: Any, document: Any, path: Path) -> Any:
    try:
        return TypeAdapter(form).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ResultsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
