"""Why a job is not in the store: what differs between its ingredients and those of the nearest artifact that is there.

Ingredients are flattened to leaves, (path, value). The leaves of a job are its own and those of all jobs upstream of
it, so that a changed parameter of the attack explains a new measurement too. Artifacts of the same kind are compared
by the number of leaves that differ: first those that name the attack and the defense, then the configuration, then the
code. Among equals the newest is taken, so "changed since" means since the job was last computed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from harness.registry import RegistryError, literal, parse_spec
from harness.runs.job import Job
from harness.runs.printable import one_line
from harness.runs.store import Store
from harness.runs.suite import AXES

Place = tuple[str, ...]  # the kind of a job, then the names that lead to a value in its ingredients
Leaf = tuple[Place, str]
Reason = Literal["in the store", "needs", "damaged", "failed", "removed", "nearest", "never computed"]

CODE, NAME, PARAMETER, WEIGHTS = "code", "name", "parameter", "weights"
METHODS = ("attack", "defense")
INPUTS = ("inputs", "of", "found", "samples", "control", "learned by")  # keys of jobs, whose leaves stand for them
SINGULAR = {"metrics": "metric", "stamps": "trigger"}
DEPTH = 8  # of nested values that are compared part by part
NAMED, WIDTH, DIGITS = 2, 48, 6  # differences in a line, characters of a value, digits of a key


@dataclass(frozen=True)
class Difference:
    """One thing that differs. part: what it belongs to ("attack", "metric asr", "code", "" for the job itself). name:
    the parameter, module or other ingredient. old: as the nearest artifact has it, new: as the job has it; None where
    there is none."""

    part: str
    name: str
    old: str | None
    new: str | None
    text: str


@dataclass(frozen=True)
class Why:
    """Why a job is in the store or not. needs: keys of jobs upstream that are missing. nearest: key of the artifact to
    which `differences` refer; None where no artifact is near."""

    reason: Reason
    text: str
    needs: tuple[str, ...] = ()
    nearest: str | None = None
    differences: tuple[Difference, ...] = ()


class Explainer:
    """Explains the jobs of a plan. It reads the manifests of the store once, when the first job has to be compared."""

    def __init__(self, store: Store, jobs: Mapping[str, Job]) -> None:
        self.store, self.jobs = store, jobs
        self.has = cache(store.has)
        self.shelves = cache(self._shelves)

    def why(self, key: str) -> Why:
        """Why the job `key` of the plan is in the store or not."""
        job = self.jobs[key]
        if self.has(key):
            return Why("in the store", "in the store")
        needs = tuple(need for need in job.needs if not self.has(need))
        if needs:
            first = self.jobs[needs[0]].label if needs[0] in self.jobs else needs[0][:10]
            return Why("needs", f"needs {first}" + (f" and {len(needs) - 1} more" if needs[1:] else ""), needs)
        if self.store.artifact(key).exists():
            return Why("damaged", f"damaged: {self.store.fault(key)} is missing or has another size")
        last = (self.store.attempts(key) or [{}])[-1]
        if last.get("status") == "failed":
            return Why("failed", f"failed before ({str(last.get('error')).partition(chr(10))[0]})")
        if last.get("status") == "done":
            return Why("removed", "computed before, but its artifact was removed")
        return self.shelves().why(job)

    def _shelves(self) -> _Shelves:
        shelves = _Shelves({key: job.ingredients for key, job in self.jobs.items()})
        for manifest, _ in self.store.manifests():
            shelves.put(manifest)
        return shelves


@dataclass
class _Shelves:
    """Artifacts by kind, as sets of leaves. A set is an int with one bit for each known leaf: comparing two of them
    takes less than a microsecond, and a store may hold ten thousand."""

    ingredients: dict[str, Mapping[str, Any]]
    kept: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # kind → (negative time of making, key)
    bits: dict[Leaf, int] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    sets: dict[str, int] = field(default_factory=dict)
    grouped: dict[str, dict[int, list[tuple[float, str, int]]]] = field(default_factory=dict)
    code: int = 0  # the leaves that are code
    methods: int = 0  # those that name an attack or a defense

    def put(self, manifest: Mapping[str, Any]) -> None:
        ingredients, created = manifest.get("ingredients"), manifest.get("created")
        if isinstance(ingredients, Mapping) and ingredients:
            self.ingredients.setdefault(manifest["key"], ingredients)
            made = float(created) if isinstance(created, (int, float)) else 0.0
            self.kept.setdefault(str(ingredients.get("kind")), []).append((-made, manifest["key"]))

    def why(self, job: Job) -> Why:
        """By comparison with the nearest artifact."""
        never = Why("never computed", "never computed")
        near = self.nearest(job.key, str(job.kind)) if job.ingredients else None
        if near is None:
            return never
        found = self.differences(job.key, near, str(job.kind))
        renamed = [each for each in found if each.name == NAME]
        if len(renamed) > 1 or any(each.part in METHODS for each in renamed):
            return never
        return Why("nearest", _line(near, found), nearest=near, differences=found)

    def nearest(self, key: str, kind: str) -> str | None:
        """The artifact of the same kind with the fewest differing leaves; None where there is none."""
        ours, groups = self.set_of(key), self._groups(kind)
        best, fits = (sys.maxsize, 0), list[tuple[float, str, int]]()
        same = ours & ~self.code
        for config in [same] if same in groups else groups:
            differs = same ^ config
            distance = (differs & self.methods).bit_count(), differs.bit_count()
            if distance < best:
                best, fits = distance, []
            if distance == best:
                fits += groups[config]
        others = [(((ours ^ each) & self.code).bit_count(), made, other) for made, other, each in fits if other != key]
        return min(others)[2] if others else None

    def _groups(self, kind: str) -> dict[int, list[tuple[float, str, int]]]:
        """The artifacts of a kind by their leaves that are no code."""
        if kind not in self.grouped:
            made = self.grouped[kind] = {}
            for when, key in self.kept.get(kind, ()):
                leaves = self.set_of(key)
                made.setdefault(leaves & ~self.code, []).append((when, key, leaves))
        return self.grouped[kind]

    def set_of(self, key: str) -> int:
        """The leaves of a job and of all jobs upstream of it."""
        if key not in self.sets:
            self.sets[key] = 0  # ends the walk where damaged manifests name each other
            found, ingredients = 0, self.ingredients[key]
            for leaf in leaves_of(ingredients):
                found |= 1 << self._bit(leaf)
            for need in inputs_of(ingredients):
                found |= self.set_of(need) if need in self.ingredients else 1 << self._bit((("", "input"), need))
            self.sets[key] = found
        return self.sets[key]

    def _bit(self, leaf: Leaf) -> int:
        bit = self.bits.get(leaf)
        if bit is None:
            bit = self.bits[leaf] = len(self.leaves)
            self.leaves.append(leaf)
            path = leaf[0]
            self.code |= (path[1:2] == (CODE,)) << bit
            self.methods |= (len(path) == 3 and path[1] in METHODS and path[2] == NAME) << bit
        return bit

    def differences(self, key: str, near: str, kind: str) -> tuple[Difference, ...]:
        """What differs, plugins first, then parameters, code last; the job's own before what is upstream."""
        ours, theirs = self.set_of(key), self.set_of(near)
        new, old = self._by_path(ours & ~theirs), self._by_path(theirs & ~ours)
        found: dict[tuple[Any, ...], Difference] = {}
        for path in sorted({*new, *old}, key=lambda path: (path[0] != kind, path)):
            made = _difference(path, old.get(path), new.get(path), kind)
            found.setdefault((made.part, made.name, made.old, made.new), made)
        other = [each for each in found.values() if each.name == NAME]
        replaced = {each.part for each in other}
        rest = [each for each in found.values() if each.part not in replaced]
        if not found:
            rest = [_reordered(self.ingredients[key], self.ingredients[near])]
        return (*other, *sorted(rest, key=lambda each: each.part == CODE))

    def _by_path(self, bits: int) -> dict[Place, str]:
        """path → its values, joined."""
        found: dict[Place, list[str]] = {}
        while bits:
            path, value = self.leaves[(bits & -bits).bit_length() - 1]
            found.setdefault(path, []).append(value)
            bits &= bits - 1
        return {path: ", ".join(sorted(values)) for path, values in found.items()}


# ---- leaves ---------------------------------------------------------------------------------------------------------


def inputs_of(ingredients: Mapping[str, Any]) -> list[str]:
    """Keys of the artifacts that went into a job."""
    inputs = ingredients.get("inputs")
    return [key for key in inputs if isinstance(key, str)] if isinstance(inputs, (list, tuple)) else []


def leaves_of(ingredients: Mapping[str, Any]) -> Iterator[Leaf]:
    """(kind, ingredient, ...) and its value as text, but for keys of other jobs. A parameter of a spec is a leaf of its
    own. The specs of a cell stand beside those of the plugins they name."""
    kind = str(ingredients.get("kind"))
    for name, value in ingredients.items():
        if name == "cell" and isinstance(value, Mapping):
            for axis, part in value.items():
                yield from _flat((kind, str(axis)), {"spec": part} if axis in AXES else part)
        elif name != "kind" and name not in INPUTS:
            yield from _flat((kind, str(name)), value)


def _flat(path: Place, value: Any, depth: int = 0) -> Iterator[Leaf]:
    if isinstance(value, Mapping) and depth < DEPTH:
        for name, part in value.items():
            if name == "spec":
                yield from ((path + tail, text) for tail, text in _parts(str(part)))
            else:
                yield from _flat((*path, str(name)), part, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < DEPTH:
        for part in value:
            yield from _flat(path, part, depth + 1)
    elif value is not None:
        yield path, value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=str)
    except RecursionError:  # not ours
        return "(nested too deeply)"


@cache
def _parts(spec: str) -> tuple[Leaf, ...]:
    """A spec as leaves; one that cannot be read is a name."""
    try:
        name, parameters = parse_spec(spec)
        return (((NAME,), name), *(((PARAMETER, key), literal(value)) for key, value in parameters.items()))
    except RegistryError:
        return (((NAME,), spec),)


# ---- words ----------------------------------------------------------------------------------------------------------


def _difference(path: Place, old: str | None, new: str | None, kind: str) -> Difference:
    """path: of the leaf that differs. kind: of the job that is explained, whose own method is not named again."""
    *before, name = path[1:]
    if before and before[-1] == PARAMETER:
        before.pop()
    part = " ".join(SINGULAR.get(word, word) for word in before)
    mine = {"attack": "attack", "defend": "defense", "sample": "sampler"}.get(kind)
    return Difference(part, name, old, new, _text("" if part == mine else part, part, name, old, new))


def _text(said: str, part: str, name: str, old: str | None, new: str | None) -> str:
    if part == CODE:
        what = f"code of {_shown(name)}"
        return f"{what} differs" if old and new else f"{what} is new" if new else f"{what} is gone"
    if name == WEIGHTS:
        return f"weights of the {_shown(part)} differ"
    what = _shown(part if name == NAME else f"{said} {name}".strip())
    if old is None or new is None:
        value = _shown(new or old or "")
        named = what if what.endswith(f" {value}") else f"{what} {value}"
        return f"{named} is {'new' if old is None else 'gone'}"
    return f"{what} {_shown(old)} → {_shown(new)}"


def _shown(text: str) -> str:
    """A text as a line may hold it: short, without what steers a terminal."""
    text = re.sub(r"\b[0-9a-f]{16,}\b", lambda digits: digits[0][:DIGITS], text)
    text = one_line(text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _reordered(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Difference:
    """The first ingredient that differs although it has the same leaves: inputs in other roles, lists in another
    order."""
    names = sorted({*ours, *theirs}, key=lambda name: (name in INPUTS, name))
    name = next((name for name in names if ours.get(name) != theirs.get(name)), "inputs")
    old, new = (_json(each.get(name)) for each in (theirs, ours))
    return Difference("", name, old, new, f"order of {_shown(name)} differs")


def _line(near: str, found: tuple[Difference, ...]) -> str:
    """All that is said of a miss."""
    key, code = near[:DIGITS], [each for each in found if each.part == CODE]
    if len(code) == len(found):
        changed = [each for each in code if each.old and each.new] or code
        names = ", ".join(_shown(each.name) for each in changed[:NAMED])
        more = f" and {len(changed) - NAMED} more" if changed[NAMED:] else ""
        verb = "changed" if changed[0].old and changed[0].new else "was added" if changed[0].new else "was removed"
        return f"code of {names}{more} {verb} since {key}"
    told = [each.text for each in found[:NAMED]]
    return f"nearest {key}: {'; '.join(told)}" + (f"; {len(found) - NAMED} more" if found[NAMED:] else "")
