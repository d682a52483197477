"""The laws that a plugin keeps, and the kit that tries each of them.

`examine` runs a plugin a handful of times in processes of its own (see `harness.testing.watch`) and asks each law about
what was seen. A law answers with a fault and its cure, or with why it does not apply.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.registry import (
    InvalidSpec,
    PluginError,
    Registry,
    RegistryError,
    UnknownName,
    did_you_mean,
    make,
    parse_spec,
    spec_of,
)
from harness.registry.contract import CALLS, faults
from harness.stages.knowledge import UndeclaredKnowledge
from harness.testing.stages import STAGES
from harness.testing.trial import CLOSE, Place, Trial, Variation, warm
from harness.testing.watch import Seen, Watch, stir, watched, watching

SECONDS = 60.0  # for one run of a plugin on a tiny model
IMPORT_SECONDS = 2.0  # for the plugin's own module, when all that it imports is imported
SHORT = {  # whole-number parameters that say how long a run lasts, and what the kit sets them to
    "steps": 5, "iterations": 3, "epochs": 1, "rounds": 1, "trials": 2, "restarts": 1, "batch": 4, "noises": 8,
    "samples": 8, "examples": 8, "refinement": 3, "images": 8, "generations": 4, "seeds": 2, "drawings": 8,
}  # fmt: skip
HEAVY = (
    "diffusers", "transformers", "open_clip", "torch_fidelity", "torch_pruning", "torchvision", "torchmetrics", "ray",
    "scipy", "sklearn", "matplotlib", "pandas", "cv2", "skimage", "datasets", "timm", "peft", "tensorflow", "jax",
)  # fmt: skip


class Fault(Exception):
    """A law is broken: what is wrong, and what to do about it."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}; {cure}")


class NotHere(Exception):
    """The law does not apply to this plugin; says why."""


@dataclass(frozen=True)
class Finding:
    """What the kit says about one law. state: "kept", "broken", "n/a" (says why), or "open": the plugin did not get as
    far as this law asks, because of another fault."""

    law: str
    state: Literal["kept", "broken", "n/a", "open"]
    says: str


class Case:
    """A plugin and the runs of it, each made when a law first asks for it."""

    def __init__(self, kind: str, plugin: Any, registry: Registry, seconds: float = SECONDS) -> None:
        self.kind, self.plugin, self.registry, self.seconds = kind, plugin, registry, seconds
        self.cls = type(plugin)
        self.module = sys.modules[self.cls.__module__]
        self.file = str(getattr(self.module, "__file__", ""))
        self._runs: dict[Any, Seen] = {}

    @property
    def title(self) -> str:
        return f"{self.kind[:-1]} '{self.plugin.name}' ({self.file})"

    @cached_property
    def places(self) -> list[Place]:
        found = STAGES[self.kind][0](self.plugin, self.registry)
        if self.kind == "targets":  # may be for one kind of image only
            return [place for place in found if self.run(place).returned] or found[:1]
        if self.kind == "attacks":  # of each kind of trigger the first pair that it takes
            kinds = [[place for place in found if place.modality == modality] for modality in ("noise", "text")]
            return [next((p for p in each if self.run(p).returned), each[0]) for each in kinds if each]
        return found

    def run(
        self,
        place: Place,
        seed: int = 0,
        variation: Variation = "plain",
        interrupt: int | None = None,
        preload: tuple[str, ...] = (),
    ) -> Seen:
        """One run; the same arguments give the same run."""
        key = (str(place), seed, variation, interrupt, preload)
        if key not in self._runs:
            run = STAGES[self.kind][1]

            def work(watch: Watch) -> Any:
                return run(Trial(self.plugin, place, seed, variation, watch))

            warm(place.modality)
            self._runs[key] = watched(work, self.file, self.seconds, interrupt, preload)
        return self._runs[key]

    def settled(self, place: Place) -> list[str]:
        """What of the global state a run changes, apart from what the first import of a library does."""
        seen = self.run(place)
        if seen.global_state and seen.imported:
            return self.run(place, preload=tuple(seen.imported)).global_state
        return seen.global_state

    def plain(self) -> Iterator[tuple[Place, Seen]]:
        """Every place with its plain run. Raises NotHere where the plugin fits none."""
        if not self.places:
            raise NotHere("no registered trigger and target fit it on the kit's models")
        for place in self.places:
            yield place, self.run(place)

    def done(self) -> Iterator[tuple[Place, Seen]]:
        """The same, of runs that returned. Raises Open where one did not: the law `returns` says why."""
        for place, seen in self.plain():
            if not seen.returned:
                raise Open
            yield place, seen


class Open(Exception):
    """The plugin did not get as far as this law asks."""


# ---- laws of every kind ---------------------------------------------------------------------------------------------


def light_import(case: Case) -> None:
    """Its module imports quickly, and importing it does nothing else."""
    heavy = _heavy_imports(Path(case.file))
    if heavy:
        names = ", ".join(sorted(set(heavy)))
        raise Fault(f"imports {names} at the top", "import it in the function that uses it: every job loads this file")
    seen = watched(lambda watch: _import_again(case.module, watch), case.file, case.seconds)
    if not seen.returned:
        raise Fault(f"importing it again {_ended(seen)}", "let the module define classes and functions only")
    for found in (seen.writes, seen.network, seen.global_state):
        if found:
            raise Fault(f"importing it touches {found[0]}", "let the module define classes and functions only")
    if seen.result > IMPORT_SECONDS:
        raise Fault(f"importing it takes {seen.result:.1f} s", "move the work into the method that needs it")


def _heavy_imports(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        found += [name.partition(".")[0] for name in names if name.partition(".")[0] in HEAVY]
    return found


def _import_again(module: Any, watch: Watch) -> float:
    """Seconds of processor time that the module's own code takes."""
    spec = module.__spec__
    fresh = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = fresh
    stir(987)  # so that a seed set by the first import is seen again
    with watching(watch):
        started = time.process_time()
        spec.loader.exec_module(fresh)
        return time.process_time() - started


def _untyped_numbers(cls: type) -> list[str]:
    """Names in a class's body with a number and without a type, which a dataclass takes for no field. One that only
    overrides a constant of a base may stay."""
    fields = {f.name for f in dataclasses.fields(cls)}
    constants = {name for base in cls.__mro__ for name in inspect.get_annotations(base)} - fields | {"version", "api"}
    given = {
        name: value
        for base in cls.__mro__
        for name, value in vars(base).items()
        if name not in constants and name not in inspect.get_annotations(base)
    }
    return [n for n, v in given.items() if n.islower() and not n.startswith("_") and isinstance(v, int | float)]


def parameters(case: Case) -> None:
    """Its parameters validate, and survive being written as a spec."""
    for name in _untyped_numbers(case.cls):
        cure = f"write {name}: float = ..., or {name}: ClassVar[float] = ... for a constant"
        raise Fault(f"'{name}' has no type, so it is no parameter", cure)
    fields = [f for f in dataclasses.fields(case.cls) if f.init]
    default = case.cls()
    for f in fields:
        try:
            make(case.cls, {f.name: getattr(default, f.name)})
        except InvalidSpec as error:
            raise Fault(f"the default of '{f.name}' is not valid: {error}", "mend the default or the type") from None
        except NameError as error:
            raise Fault(f"the type of '{f.name}' cannot be read: {error}", "import it outside TYPE_CHECKING") from None
    try:
        again = make(case.cls, parse_spec(spec_of(case.plugin))[1])
    except RegistryError as error:
        raise Fault(f"cannot be written as a spec: {error}", "use numbers, texts, booleans, None and tuples") from None
    if again != case.plugin:
        raise Fault("does not survive its spec", "let __post_init__ check its fields, not change them")
    for f in fields:
        try:
            make(case.cls, {f.name: object()})
        except InvalidSpec:
            continue
        raise Fault(f"'{f.name}' takes anything, as its type is {f.type}", "say its type: int, float, str, bool ...")


def in_time(case: Case) -> None:
    """It returns on a tiny model within seconds."""
    for place, seen in case.plain():
        if seen.ended == "hung":
            where = f", at {seen.where}" if seen.where else ""
            cure = "give loops an end; parameters other than the usual ones (steps, batch ...) are set by a spec"
            raise Fault(f"did not return within {case.seconds:.0f} s on a tiny {place}{where}", cure)


def returns(case: Case) -> None:
    """It returns what a plugin of its kind returns: types, shapes, finite numbers."""
    for place, seen in case.plain():
        if seen.ended == "hung":
            raise Open
        if seen.error.startswith(UndeclaredKnowledge.__name__):
            _declares(case, seen)
        if not seen.returned:
            raise Fault(f"{_ended(seen)} on a tiny {place}", "make it run on small models too")
        for what, cure in seen.result["faults"]:
            raise Fault(what, cure)


def _ended(seen: Seen) -> str:
    where = f" at {seen.where}" if seen.where else ""
    return f"raises {seen.error}{where}" if seen.ended == "raised" else f"{seen.ended}: {seen.error}{where}"


def inputs(case: Case) -> None:
    """What it is given stays bit-identical."""
    for _, seen in case.done():
        touched = seen.result["inputs"]
        if touched:
            more = f" and {len(touched) - 1} more" if len(touched) > 1 else ""
            raise Fault(f"changes {touched[0]}{more}", "work on a copy: model.clone(), tensor.clone()")


def same_seed(case: Case) -> None:
    """The same seed gives the same result, whatever the global random state is."""
    for place, seen in case.done():
        again = case.run(place, variation="stirred")
        if not again.returned:
            raise Fault(f"{_ended(again)} when run a second time", "keep nothing between runs")
        if again.result["output"] != seen.result["output"]:
            cure = "draw every random number from the generator that you are given (generator=rng)"
            raise Fault("the same seed gives another result", cure)


def other_seed(case: Case) -> None:
    """Another seed gives another result, where it draws random numbers at all."""
    drew = False
    for place, seen in case.done():
        other = case.run(place, seed=1)
        if not other.returned:
            raise Fault(f"{_ended(other)} with another seed", "make it run with every seed")
        moved = seen.result["facts"].get("moved", False)
        drew = drew or moved
        told = [(run.result["output"], run.result["facts"].get("notes")) for run in (seen, other)]
        if moved and told[0] == told[1]:
            cure = "use what you draw; a fixed seed in place of the given generator is one way to lose it"
            raise Fault("it draws from its generator, yet another seed gives the same result", cure)
    if not drew:
        raise NotHere("it draws nothing from its generator")


def global_state(case: Case) -> None:
    """It leaves the process's global state alone: random states, default dtype, threads, environment."""
    for place, _ in case.plain():
        for state in case.settled(place)[:1]:
            cure = "draw from the generator that you are given, and never call manual_seed on the global one"
            if "random" not in state:
                cure = "put it back before you return"
            elif state.startswith("torch"):
                cure += "; networks are initialised within torch.random.fork_rng()"
            raise Fault(f"changes {state}", cure)


def writes(case: Case) -> None:
    """It writes nothing outside the temporary directory."""
    for _, seen in case.plain():
        if seen.writes:
            raise Fault(f"writes {seen.writes[0]}", "return what is worth keeping (notes); the harness stores it")


def no_network(case: Case) -> None:
    """It opens no connection."""
    for _, seen in case.plain():
        if seen.network:
            cure = "ask for what it needs by `needs`; weights and data belong in a model plugin or in the package"
            raise Fault(f"uses the network ({seen.network[0]})", cure)


def cancel(case: Case) -> None:
    """An interrupt in the middle ends it, and it reports progress while it works."""
    alive = False
    for place, seen in case.done():
        signs = seen.calls + seen.events
        if signs == 0:
            continue
        alive = True
        if seen.calls >= 50 and seen.events == 0:
            cure = "call harness.progress(phase, step, total) in the loop: a silent job is taken for a hanging one"
            raise Fault(f"uses the network {seen.calls} times without a word of progress", cure)
        cut = case.run(place, interrupt=(signs + 1) // 2)
        if cut.ended != "interrupted":
            how = "goes on" if cut.returned else _ended(cut)
            raise Fault(f"{how} after an interrupt", "catch Exception or narrower, never BaseException, and let it out")
    if not alive:
        raise NotHere("it neither uses a network nor reports progress")


def nan(case: Case) -> None:
    """What cannot be measured is NaN with a reason, and nothing sound comes out of a broken model."""
    for place, _ in case.done():
        seen = case.run(place, variation="broken")
        if case.kind == "metrics":
            if not seen.returned:
                cure = "return harness.unmeasured('why') for what cannot be measured"
                raise Fault(f"{_ended(seen)} where the defense returned no model", cure)
            for what, cure in seen.result["faults"]:
                raise Fault(f"where the defense returned no model, {what}", cure)
        elif seen.returned:
            _not_sound(seen.result["facts"])
        elif seen.ended == "hung":
            raise Fault(
                f"did not return within {case.seconds:.0f} s on a model whose weights are NaN", "check the loss"
            )


def _not_sound(facts: Mapping[str, Any]) -> None:
    cure = "raise an error, or let NaN through: comparisons with NaN are False and count as 'clean'"
    if facts.get("suspicion") not in (None, "nan"):
        raise Fault(f"gives a model whose weights are NaN the suspicion {facts['suspicion']}", cure)
    if facts.get("finite"):
        raise Fault("makes finite images of a network that returns NaN", cure)


# ---- laws of some kinds ---------------------------------------------------------------------------------------------


def knowledge(case: Case) -> None:
    """It uses only the knowledge that it declares."""
    for _, seen in case.plain():
        _declares(case, seen)


def _declares(case: Case, seen: Seen) -> None:
    """Raises Fault for knowledge that a run read and that the defense does not declare."""
    undeclared = [name for name in seen.read if name not in case.plugin.needs]
    if undeclared:
        fields, names = (" and ".join(map(form.format, undeclared)) for form in ("knowledge.{}", "'{}'"))
        where = f" at {seen.where}" if seen.where else ""
        cure = f"add {names} to `needs`: the leaderboard shows what a defense was told"
        raise Fault(f"reads {fields}{where}, which it does not declare", cure)


def ground_truth(case: Case) -> None:
    """It never looks for the backdoor outside what it is given."""
    for _, seen in case.plain():
        if seen.peeks:
            raise Fault(f"{seen.peeks[0]}", "use the model and the knowledge that it is given, nothing else")


def suspicion(case: Case) -> None:
    """The suspicion of a model is one number: the same whenever it is asked for."""
    given = [(place, seen.result["facts"].get("suspicion")) for place, seen in case.done()]
    if all(value is None for _, value in given):
        raise NotHere("it delivers no suspicion")
    for place, value in given:
        again = case.run(place, variation="stirred")
        other = again.result["facts"].get("suspicion") if again.returned else _ended(again)
        if other != value:
            raise Fault(f"the suspicion is {value}, then {other}", "draw from the given generator, sort before you sum")


def batch(case: Case) -> None:
    """What it gives for an input does not depend on the inputs beside it."""
    found = [seen.result["facts"].get("apart") for _, seen in case.done()]
    if all(value is None for value in found):
        raise NotHere("it maps no batches")
    for value in found:
        if value is not None and not value <= CLOSE:
            cure = "treat each row by itself: no statistics, sorting or random numbers over the batch"
            raise Fault(f"an input alone and in a batch differ by {value:.3g}", cure)


def exact(case: Case) -> None:
    """Where the data are one image and the network is exact, that image comes out."""
    found = [seen.result["facts"].get("error") for _, seen in case.done()]
    if all(value is None for value in found):
        raise NotHere("it wraps another sampler, or is for models whose variance explodes")
    for value in found:
        if value is not None and not value < 0.05:
            raise Fault(f"the image that comes out is {value:.3g} off", "check its coefficients and its last step")


Law = Callable[[Case], None]
FIRST: dict[str, Law] = {"light import": light_import, "parameters": parameters}
RUN: dict[str, Law] = {
    "returns in time": in_time,
    "returns what it should": returns,
    "inputs untouched": inputs,
    "same seed, same result": same_seed,
    "global state untouched": global_state,
    "no writes": writes,
    "no network": no_network,
}
LONG: dict[str, Law] = {"other seed, other result": other_seed, "honours cancel": cancel}
LAWS: dict[str, dict[str, Law]] = {
    "defenses": {
        **FIRST, **RUN, **LONG, "NaN policy": nan, "declared knowledge only": knowledge,
        "no ground truth": ground_truth, "deterministic suspicion": suspicion, "batch invariance": batch,
    },
    "attacks": {**FIRST, **RUN, **LONG},
    "metrics": {**FIRST, **RUN, "NaN policy": nan},
    "triggers": {**FIRST, **RUN, "batch invariance": batch},
    "targets": {**FIRST, **RUN, "batch invariance": batch},
    "samplers": {**FIRST, **RUN, "NaN policy": nan, "batch invariance": batch, "exact on one image": exact},
    # diffusers initialises a network from the global random state before it reads the weights
    "models": {**FIRST, **{law: run for law, run in RUN.items() if run is not global_state}},
}  # fmt: skip


# ---- the kit --------------------------------------------------------------------------------------------------------


def shortened(cls: Any, given: Mapping[str, Any]) -> Any:
    """An instance of `cls` with the given parameters and, of the others, those in SHORT made small, where it takes
    that: whoever checks a plugin wants its laws, not its numbers."""
    values = dict(given)
    for f in dataclasses.fields(cls):
        short = SHORT.get(f.name.rpartition("_")[2])
        default = getattr(cls(), f.name) if f.init and f.name not in given else None
        if short is None or type(default) is not int or default <= short:
            continue
        for value in (short, 2 * short, 4 * short):
            try:
                make(cls, {**values, f.name: value})
            except InvalidSpec:
                continue
            values[f.name] = value
            break
    if "bf16" not in values and any(f.name == "bf16" and f.init for f in dataclasses.fields(cls)):
        values["bf16"] = False  # slow on a CPU
    return make(cls, values)


def case_of(kind: str, cls: Any, parameters: Mapping[str, Any], registry: Registry, seconds: float = SECONDS) -> Case:
    """The case of a plugin class. Raises PluginError for a class that is no plugin of this kind, InvalidSpec or
    UnknownName for parameters that it does not take."""
    wrong = faults(kind, cls)
    if wrong:
        file = str(getattr(sys.modules.get(getattr(cls, "__module__", "")), "__file__", "no file"))
        calls = ", ".join(CALLS[kind])
        raise PluginError(f"{kind[:-1]} {cls.__name__} ({file}): {'; '.join(wrong)}; a {kind[:-1]} has {calls}")
    return Case(kind, shortened(cls, parameters), registry, seconds)


def examine(case: Case, law: str) -> Finding:
    """Try one law."""
    laws = LAWS[case.kind]
    if law not in laws:
        raise UnknownName(f"no law '{law}' for {case.kind}{did_you_mean(law, laws)} laws: {', '.join(laws)}")
    try:
        laws[law](case)
    except Fault as fault:
        return Finding(law, "broken", str(fault))
    except NotHere as reason:
        return Finding(law, "n/a", str(reason))
    except Open:
        return Finding(law, "open", "it did not get so far")
    return Finding(law, "kept", _first_line(laws[law]))


def _first_line(law: Law) -> str:
    return (law.__doc__ or "").strip().splitlines()[0]


def examine_all(case: Case, tell: Callable[[int, int, str], None] = lambda *_: None) -> list[Finding]:
    """Try every law. tell: called before each with its place, how many there are, and its name."""
    found, laws = [], LAWS[case.kind]
    for place, law in enumerate(laws, 1):
        tell(place, len(laws), law)
        found.append(examine(case, law))
    return found
