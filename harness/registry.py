"""Discover plugins, isolate broken ones, validate parameters, build instances from specs.

A spec is `name` or `name(key=literal, ...)`. What `bench list` and `bench show` print comes from an index that a
subprocess derives, so that no plugin module (and no torch) is imported for it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from harness import hookspecs, points, sources
from harness.types import DELIVERS, KNOWLEDGE, Stamps, delivers

GROUP = "bench.plugins"
HOOKS = ("models", "triggers", "targets", "attacks", "defenses", "metrics", "samplers")
KINDS = HOOKS
FACTS = ("stamps", "conditional", "kind", "accepts_models", "accepts_triggers", "accepts_targets", "needs", "delivers",
         "sets", "api")  # fmt: skip
OWN = points.OWN
OLDEST_API = 1  # plugins written for this API version, or a later one up to hookspecs.API_VERSION, still run
INDEX_VERSION = 1

T = TypeVar("T")


class RegistryError(Exception):
    """A mistake of the caller, in one line; `exit_code` is what a command line should end with."""

    exit_code = 2


class UnknownName(RegistryError):
    """No such kind, plugin or parameter."""


class InvalidSpec(RegistryError):
    """A spec that cannot be read, or parameters out of range or of the wrong type."""


class PluginError(RegistryError):
    """A plugin at fault, not the caller."""

    exit_code = 3


CURES = {
    "ModuleNotFoundError": "install what it imports, or import it inside the function that uses it",
    "ImportError": "import what is there; `harness` lists what it offers a plugin",
    "SyntaxError": "mend the line that Python names",
    "IndentationError": "mend the line that Python names",
    "SystemExit": "a module must not end the interpreter when it is imported",
}


@dataclass(frozen=True)
class PluginWarning:
    """A plugin module that was left out, and why."""

    distribution: str
    module: str
    file: str
    error: str

    def __str__(self) -> str:
        where = f" of {self.distribution}" if self.distribution != self.file else ""
        return f"plugin {self.module}{where} left out: {self.error} ({self.file}); {self.cure}"

    @property
    def cure(self) -> str:
        """What to do about it, by the kind of error."""
        for kind, cure in CURES.items():
            if self.error.startswith(kind):
                return cure
        return "mend it, then try: bench plugin check"


@dataclass(frozen=True)
class Field:
    """A parameter of a plugin, as text. `comment` is the comment that trails it in the source."""

    name: str
    type: str
    default: str
    comment: str


@dataclass(frozen=True)
class Entry:
    """What the lists show of one plugin. `facts`: those of `FACTS` that it declares."""

    kind: str
    name: str
    version: int
    summary: str
    docstring: str
    fields: tuple[Field, ...]
    facts: Mapping[str, Any]
    module: str
    file: str
    distribution: str


@dataclass(frozen=True)
class Index:
    """Every plugin that loads, and every module that does not."""

    entries: tuple[Entry, ...]
    warnings: tuple[PluginWarning, ...] = ()

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == kind)


YOURS = "for a plugin of your own: pip install -e DIR, or --plugin-file FILE"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What goes between an unknown word and the list of known ones: the nearest of them, if one is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1) or [name for name in names if word and name.startswith(word)]
    return f"; did you mean '{near[0]}'?" if near else ";"


def kind_of(word: str) -> str:
    """The kind that `word` means, singular or plural. Raises UnknownName."""
    for kind in KINDS:
        if word in (kind, kind[:-1]):
            return kind
    raise UnknownName(f"no kind '{word}'{did_you_mean(word, KINDS)} kinds: {', '.join(KINDS)}")


# ---- specs --------------------------------------------------------------------------------------------------------


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`name(key=literal, ...)` → (name, parameters); lists become tuples. Raises InvalidSpec."""
    match = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\((.*)\))?\s*", spec, re.DOTALL)
    if match is None:
        raise InvalidSpec(f"cannot read the spec {spec!r}; write name or name(key=value, ...)")
    name, arguments = match.groups()
    try:
        call = ast.parse(f"f({arguments or ''})", mode="eval").body
    except (SyntaxError, ValueError) as error:
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
        parameters[key] = _literal_of(keyword.value, key, spec)
    return name, parameters


def _literal_of(node: ast.expr, key: str, spec: str) -> Any:
    try:
        return _tupled(ast.literal_eval(node))
    except (ValueError, TypeError, RecursionError, MemoryError):
        text = ast.unparse(node)
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


def source_digest(cls: type) -> str:
    """Digest of the code in the file in which the plugin is written."""
    return sources.digest(Path(_file_of(cls.__module__)))


def _file_of(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__file__", None) or "")


# ---- validation ---------------------------------------------------------------------------------------------------


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


def _checked(hint: Any, value: Any) -> tuple[Any, str | None]:
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
            values[key], fault = _checked(hints[key], parameters[key])
            wrong += [f"{key}: {fault}"] if fault else []
    if unknown or wrong:
        raise (UnknownName if unknown else InvalidSpec)(f"{cls.name}: {'; '.join([*unknown, *wrong])}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise InvalidSpec(f"{cls.name}: {error}") from error


# ---- what a class of each kind has --------------------------------------------------------------------------------


METHODS: dict[str, tuple[str, ...]] = {
    "models": ("load", "digest", "data", "prompts", "attributes", "words", "judge", "scorer"),
    "triggers": ("stamp", "wrong"),
    "targets": ("hits", "distances"),
    "attacks": ("implant",),
    "defenses": ("defend",),
    "metrics": ("measure",),
    "samplers": ("run",),
}
CALLS: dict[str, tuple[str, ...]] = {  # how the harness calls them
    "models": ("load()", "digest()", "data()", "prompts(split, n, rng)", "attributes(prompt)", "judge()", "scorer()"),
    "triggers": ("stamp(inputs)", "wrong(k)"),
    "targets": ("distances(images, context)", "hits(images, context)"),
    "attacks": ("implant(model, backdoor, data, rng)",),
    "defenses": ("defend(model, knowledge, rng)",),
    "metrics": ("measure(evidence)",),
    "samplers": ("run(model, inputs)",),
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "models": {"stamps": Stamps, "conditional": bool},
    "triggers": {"stamps": Stamps},
    "targets": {"kind": str},
    "attacks": {"accepts_triggers": tuple[Stamps, ...], "accepts_targets": tuple[str, ...]},
    "defenses": {"accepts_triggers": tuple[Stamps, ...], "needs": tuple[str, ...]},
}


def faults(kind: str, cls: Any) -> list[str]:
    """What keeps `cls` from being a plugin of this kind, in words; [] if nothing."""
    if not isinstance(cls, type):
        return [f"{cls!r} is not a class"]
    api = getattr(cls, "api", 1)
    if api not in range(OLDEST_API, hookspecs.API_VERSION + 1):
        return [_api_fault(cls, api)]
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or "__dataclass_fields__" not in vars(cls):
        return [f"{cls.__name__} is not a frozen dataclass"]
    found = [f"{cls.__name__} has no method {name}" for name in METHODS[kind] if not callable(getattr(cls, name, None))]
    found += _call_faults(kind, cls)
    own = {f.name: f for f in dataclasses.fields(cls)}
    found += [
        f"{cls.__name__}.{name} is a parameter; make it a ClassVar" for name in ("name", "version") if name in own
    ]
    found += [f"{cls.__name__}.{name} has no default" for name, f in own.items() if _required(f)]
    if found:
        return [f"{cls.__name__}: {fault}" for fault in found]
    try:
        instance = cls()
    except Exception as error:
        return [f"{cls.__name__}() raises {type(error).__name__}: {error}"]
    return _attribute_faults(kind, instance)


def _api_fault(cls: type, api: Any) -> str:
    speaks = f"{cls.__name__} is written for plugin API {api!r}, this harness speaks {OLDEST_API}"
    speaks += f" to {hookspecs.API_VERSION}" if hookspecs.API_VERSION > OLDEST_API else ""
    newer = isinstance(api, int) and api > hookspecs.API_VERSION
    cure = f"upgrade {OWN}" if newer else f"port it and say api: ClassVar[int] = {hookspecs.API_VERSION}"
    return f"{speaks}; {cure}, or install a version of the plugin that fits"


def _call_faults(kind: str, cls: type) -> list[str]:
    """Methods that cannot be called as the harness calls them."""
    found = []
    for wanted in CALLS[kind]:
        name, _, rest = wanted.partition("(")
        method = getattr(cls, name, None)
        arguments = [word for word in rest.rstrip(")").split(", ") if word]
        try:
            signature = inspect.signature(method) if callable(method) else None
        except ValueError:  # written in C, without a signature
            signature = None
        try:
            if signature is not None:
                signature.bind("self", *arguments)
        except TypeError as error:
            found.append(f"{name}{signature} cannot be called as {wanted} ({error}); write def {name}(self, {rest}")
    return found


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _attribute_faults(kind: str, instance: Any) -> list[str]:
    found = []
    for name, hint in {"name": str, "version": int, **ATTRIBUTES.get(kind, {})}.items():
        try:
            _, fault = _checked(hint, getattr(instance, name))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        found += [f"{type(instance).__name__}.{name}: {fault}"] if fault else []
    if found:
        return found
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", instance.name):
        found.append(f"the name {instance.name!r} cannot be written in a spec; use letters, digits, '-', '_' and '.'")
    if kind == "defenses":
        found += [
            f"needs {need!r}{did_you_mean(need, KNOWLEDGE)} a defense may need: {', '.join(KNOWLEDGE)}"
            for need in instance.needs
            if need not in KNOWLEDGE
        ]
        found += [
            f"delivers {part!r}{did_you_mean(part, DELIVERS)} a defense may deliver: {', '.join(DELIVERS)}"
            for part in delivers(instance)
            if part not in DELIVERS
        ]
    if kind == "triggers":
        method = "delta" if instance.stamps == "noise" else "apply"
        found += [] if hasattr(instance, method) else [f"stamps {instance.stamps} but has no method {method}"]
    return found


# ---- loading ------------------------------------------------------------------------------------------------------


class Registry:
    """Plugin classes by kind and name, and what was left out.

    strict: raise PluginError where otherwise a warning is kept. `files`: plugin files loaded beside the installed
    distributions; whoever builds plugins in another process has to load the same.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.warnings: list[PluginWarning] = []
        self.files: list[Path] = []
        self._classes: dict[str, dict[str, tuple[Any, str]]] = {kind: {} for kind in HOOKS}
        self._seen: set[str] = set()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def classes(self, kind: str) -> dict[str, Any]:
        """name → class for every plugin of `kind`, in name order."""
        kind = kind_of(kind)
        own = _own_samplers() if kind == "samplers" else {}
        return own | {name: cls for name, (cls, _) in sorted(self._classes[kind].items())}

    def find(self, kind: str, name: str) -> Any:
        """The class of that name. Raises UnknownName with the nearest and all known names."""
        known = self.classes(kind)
        if name not in known:
            raise unknown_name(kind_of(kind), name, known, len(self.warnings))
        return known[name]

    def build(self, kind: str, spec: str) -> Any:
        """The instance that a spec describes. Raises UnknownName or InvalidSpec in the caller's words."""
        name, parameters = parse_spec(spec)
        return make(self.find(kind, name), parameters)

    def canonical(self, kind: str, spec: str) -> str:
        """The same spec with every default filled in: equal instances have equal specs."""
        return spec_of(self.build(kind, spec))

    def distribution_of(self, kind: str, name: str) -> str:
        kind = kind_of(kind)
        return self._classes[kind][name][1] if name in self._classes[kind] else OWN

    def index(self) -> Index:
        """What the lists show, read from the loaded classes and their sources."""
        found = [(kind, name, cls) for kind in KINDS for name, cls in self.classes(kind).items()]
        inhabitants = Counter(cls.__module__ for _, _, cls in found)
        entries = [
            describe(kind, cls, self.distribution_of(kind, name), alone=inhabitants[cls.__module__] == 1)
            for kind, name, cls in found
        ]
        return Index(tuple(entries), tuple(self.warnings))

    def load_installed(self) -> None:
        """Load every entry point of the group; one that names a package means each module below it."""
        for point in installed():
            self._load_point(point, point.dist.name if point.dist else "an unknown distribution")

    def load_file(self, path: Path) -> None:
        """Load one plugin file. It was asked for, so anything wrong with it raises PluginError."""
        path = path.resolve()
        name = f"bench_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        strict, self.strict = self.strict, True
        try:
            module = self._try(str(path), name, lambda: _module_from(path, name))
            self._register(module, name, str(path), alone=True)
        finally:
            self.strict = strict
        self.files.append(path)

    def _load_point(self, point: metadata.EntryPoint, distribution: str) -> None:
        module = self._try(distribution, point.module, lambda: points.imported(point))
        if module is None:
            return
        if point.attr:
            plugin = self._try(distribution, point.module, lambda: reduce(getattr, point.attr.split("."), module))
            self._register(plugin, point.value, distribution, alone=True)
        elif hasattr(module, "__path__"):
            self._load_below(module, distribution)
        else:
            self._register(module, module.__name__, distribution, alone=True)

    def _load_below(self, package: ModuleType, distribution: str) -> None:
        self._register(package, package.__name__, distribution)
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name.rpartition(".")[2].startswith("_"):
                continue
            module = self._try(distribution, info.name, partial(importlib.import_module, info.name))
            if info.ispkg and module is not None:
                self._load_below(module, distribution)
            else:
                self._register(module, info.name, distribution)

    def _register(self, plugin: Any, name: str, distribution: str, alone: bool = False) -> None:
        """Take the classes that a plugin's hooks return. alone: somebody named it, so it should have a hook."""
        if plugin is None or name in self._seen:
            return
        self._seen.add(name)
        if self._try(distribution, name, lambda: self._manager.register(plugin, name)) is None:
            return
        callers = self._manager.get_hookcallers(plugin) or []
        for caller in callers:
            if not caller.has_spec():
                hint = did_you_mean(caller.name, HOOKS)
                says = f"no hook '{caller.name}'{hint} hooks: {', '.join(HOOKS)}; rename the function"
                raise PluginError(f"{name} of {distribution}: {says} ({_file_of(name) or 'no file'})")
        if alone and not callers:
            self._try(distribution, name, _no_hook)
        for caller in callers:
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin:
                    self._take(caller.name, implementation.function, name, distribution)

    def _take(self, kind: str, hook: Callable[[], Any], module: str, distribution: str) -> None:
        for cls in self._try(distribution, module, lambda: _returned(kind, hook)) or []:
            if self._try(distribution, module, partial(_checked_class, kind, cls)) is not None:
                self._add(kind, cls, distribution)

    def _add(self, kind: str, cls: Any, distribution: str) -> None:
        other, owner = self._classes[kind].get(cls.name, (cls, distribution))
        if kind == "samplers" and cls.name in _own_samplers():
            other, owner = _own_samplers()[cls.name], OWN
        if other is not cls:
            raise PluginError(
                f"two {kind} are named '{cls.name}': {other.__module__} of {owner} ({_file_of(other.__module__)})"
                f" and {cls.__module__} of {distribution} ({_file_of(cls.__module__)}); rename or uninstall one"
            )
        self._classes[kind][cls.name] = (cls, owner)

    def _try(self, distribution: str, module: str, action: Callable[[], T]) -> T | None:
        """What `action` returns; None and a warning where the plugin raises (PluginError if strict)."""
        try:
            return action()
        except (Exception, SystemExit) as error:
            says = " ".join(f"{type(error).__name__}: {error}".split())
            warning = PluginWarning(distribution, module, _source_of(module), says)
            if self.strict:
                raise PluginError(str(warning)) from error
            self.warnings.append(warning)
            return None


def _own_samplers() -> dict[str, Any]:
    from harness.samplers import SAMPLERS
    from harness.trojan import TROJAN_SAMPLERS

    return {**SAMPLERS, **TROJAN_SAMPLERS}


def _module_from(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_hook() -> None:
    raise LookupError(f"has no hook; write @hookimpl above one of: {', '.join(HOOKS)}")


def _returned(kind: str, hook: Callable[[], Any]) -> list[Any]:
    found = hook()
    if not isinstance(found, list):
        raise TypeError(f"hook {kind} returned {type(found).__name__}, not a list of classes")
    return found


def _checked_class(kind: str, cls: Any) -> Any:
    wrong = faults(kind, cls)
    if wrong:
        raise TypeError(f"{kind}: {'; '.join(wrong)}")
    return cls


def _source_of(module: str) -> str:
    """The file of a module that may have failed to import, or "no file"."""
    try:
        spec = _locate(module.partition(":")[0])
    except (ImportError, ValueError, AttributeError):
        spec = None
    return _file_of(module) or (spec.origin if spec is not None and spec.origin else "no file")


def unknown_name(kind: str, name: str, known: Iterable[str], left_out: int = 0) -> UnknownName:
    names = sorted(known)
    near = did_you_mean(name, names)
    listed = "" if near != ";" else f" known: {', '.join(names) or 'none'};"
    more = f" ({left_out} plugin modules could not be loaded: bench plugins)" if left_out else ""
    return UnknownName(f"no {kind[:-1]} named '{name}'{near}{listed} {YOURS}{more}")


def load(files: Iterable[Path] = (), strict: bool = False) -> Registry:
    """Import all installed plugins and the given plugin files. Takes seconds: plugins import torch."""
    registry, paths = Registry(strict=strict), [Path(path) for path in files]
    for path in paths:
        if not path.is_file():
            raise RegistryError(f"{path}: no such plugin file")
    registry.load_installed()
    for path in paths:
        registry.load_file(path)
    return registry


def installed() -> list[metadata.EntryPoint]:
    """The entry points of the group, in an order that does not depend on the file system."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.dist.name if p.dist else "", p.name, p.value))


# ---- descriptions -------------------------------------------------------------------------------------------------


def describe(kind: str, cls: Any, distribution: str, alone: bool) -> Entry:
    """The entry of one plugin class, from the class and its source. alone: the only plugin of its module, so that the
    module's docstring speaks of it first."""
    instance = cls()
    declared = {name: getattr(instance, name) for name in FACTS if hasattr(instance, name)}
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in declared.items()}
    own, module = _docstrings(cls)
    shared = "" if cls.__module__.startswith("harness.") else module
    said = [text for text in ((module, own) if alone else (own, shared)) if text]
    first = " ".join(said[0].split("\n\n")[0].split()) if said else ""
    summary = first if len(first) <= 110 else first[:110].rsplit(" ", 1)[0] + " …"
    return Entry(
        kind, cls.name, cls.version, summary, "\n\n".join(said), tuple(_fields(cls)), facts,
        cls.__module__, _file_of(cls.__module__), distribution,
    )  # fmt: skip


@cache
def _parsed(file: str) -> tuple[ast.Module, dict[int, tuple[int, str]], list[str]]:
    """Tree, comments (line → column, text) and lines of a source file."""
    path = Path(file)
    with path.open("rb") as stream:
        comments = {
            token.start[0]: (token.start[1], token.string.lstrip("# ").rstrip())
            for token in tokenize.tokenize(stream.readline)
            if token.type == tokenize.COMMENT
        }
    with tokenize.open(path) as text:
        source = text.read()
    return ast.parse(source), comments, source.splitlines()


def _class_node(cls: type) -> tuple[str, ast.ClassDef | None]:
    file = _file_of(cls.__module__)
    try:
        tree = _parsed(file)[0]
    except (OSError, SyntaxError):
        return file, None
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return file, next(nodes, None)


def _docstrings(cls: type) -> tuple[str, str]:
    """(of the class, of its module); from the source, since dataclass writes a docstring where there is none."""
    file, node = _class_node(cls)
    if node is None:
        return "", ""
    return ast.get_docstring(node) or "", ast.get_docstring(_parsed(file)[0]) or ""


def _fields(cls: Any) -> Iterator[Field]:
    for f in dataclasses.fields(cls):
        if f.init:
            kind, comment = _annotation(cls, f.name)
            default = getattr(cls(), f.name)
            yield Field(f.name, kind or str(f.type), _shown(default), comment)


def _shown(value: Any) -> str:
    try:
        return literal(value)
    except PluginError:
        return repr(value)


def _annotation(cls: type, name: str) -> tuple[str, str]:
    """(type, trailing comment) of a field as written in the nearest class that declares it."""
    for base in cls.__mro__:
        file, node = _class_node(base) if name in inspect.get_annotations(base) else ("", None)
        for statement in node.body if node is not None else []:
            if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", None) == name:
                return ast.unparse(statement.annotation), _comment(file, statement)
    return "", ""


def _comment(file: str, statement: ast.AnnAssign) -> str:
    """Comments on the statement's own lines, and on the comment lines that directly follow them."""
    _, comments, lines = _parsed(file)
    last = statement.end_lineno or statement.lineno
    said = [comments[line][1] for line in range(statement.lineno, last + 1) if line in comments]
    following = last + 1
    while said and following in comments and lines[following - 1].lstrip().startswith("#"):
        said.append(comments[following][1])
        following += 1
    return " ".join(said)


# ---- index --------------------------------------------------------------------------------------------------------


def index(refresh: bool = False, notice: Callable[[str], None] | None = None) -> Index:
    """The index of installed plugins, without importing any: read from a cache, or derived in a subprocess when a
    plugin file or the set of distributions has changed. notice: told when that takes seconds.

    Raises PluginError where loading does (a misspelt hook, two plugins of one name).
    """
    key, kept = _index_key(), _index_path()
    if not refresh and kept is not None and (found := _read_index(kept, key)) is not None:
        return found
    if notice is not None:
        notice("reading plugins (once, and again when one changes) ...")
    document = {**_derived(), "key": key}
    if document["error"]:
        raise PluginError(document["error"])
    if kept is not None:
        _write_atomically(kept, json.dumps(document))
    return _index_from(document)


def cache_dir() -> Path | None:
    """Where derived files may be kept; None where there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / OWN
    except RuntimeError:
        return None


def _index_path() -> Path | None:
    base = cache_dir()
    return base and base / f"plugins-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}.json"


def _index_key() -> str:
    found = installed()
    facts = {
        "version": INDEX_VERSION,
        "python": sys.version,
        "points": [(p.dist.name if p.dist else "", p.dist.version if p.dist else "", p.name, p.value) for p in found],
        "installed": sorted(_distributions()),
        "files": sorted({_stamp(file) for point in found for file in points.files(point)} | set(_own_files())),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _distributions() -> set[str]:
    """Names of the metadata directories on the path: a package that appears may mend a broken plugin."""
    found: set[str] = set()
    for base in sys.path:
        try:
            found |= {name for name in os.listdir(base or ".") if name.endswith((".dist-info", ".egg-info"))}
        except OSError:
            continue
    return found


def _own_files() -> list[tuple[str, int, int]]:
    return [_stamp(path) for path in Path(__file__).parent.glob("*.py")]


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), stat.st_mtime_ns, stat.st_size


def _locate(module: str) -> Any:
    """The import spec of a module; importlib.util.find_spec would import its parents."""
    top, *rest = module.split(".")
    spec, name = importlib.util.find_spec(top), top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _read_index(path: Path, key: str) -> Index | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _index_from(document) if document["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index_from(document: Mapping[str, Any]) -> Index:
    entries = [Entry(**{**e, "fields": tuple(Field(**f) for f in e["fields"])}) for e in document["entries"]]
    return Index(tuple(entries), tuple(PluginWarning(**w) for w in document["warnings"]))


def _derived() -> dict[str, Any]:
    """Run this module in a process of its own and read what it found."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "index.json"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "harness.registry", str(out)], env=env, capture_output=True, text=True
        )
        if not out.is_file():
            says = done.stderr.strip().splitlines() or ["no message"]
            raise PluginError(f"the plugins could not be read (exit {done.returncode}): {says[-1]}")
        return json.loads(out.read_text(encoding="utf-8"))


def _write_atomically(path: Path, text: str) -> None:
    """Write a cache file; a directory that cannot be written only means that the next call derives it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return


def write_index(path: Path) -> None:
    """Load all installed plugins and write their index to `path`."""
    document: dict[str, Any] = {"entries": [], "warnings": [], "error": None}
    try:
        document |= dataclasses.asdict(load().index())
    except PluginError as error:
        document["error"] = str(error)
    path.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    from harness import registry

    registry.write_index(Path(sys.argv[1]))
