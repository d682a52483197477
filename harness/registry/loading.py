"""Plugin classes by kind and name: found through entry points and files, the broken ones left out and named."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import pluggy

from harness.registry import entry_points, hookspecs, presets
from harness.registry.contract import faults
from harness.registry.descriptions import Index, PluginWarning, describe
from harness.registry.entry_points import OWN, file_of, installed, source_of
from harness.registry.errors import KINDS, PluginError, RegistryError, UnknownName, did_you_mean, kind_of
from harness.registry.specs import parse_spec, spec_of
from harness.registry.validation import make
from harness.types import Adaptive

HOOKS = KINDS
ADAPTIVE = "adaptive"  # the hook whose values are declarations, not classes
UNDECLARED = "No plugin declares an attack that knows it."
YOURS = "for a plugin of your own: pip install -e DIR, or --plugin-file FILE"

T = TypeVar("T")


class Registry:
    """Plugin classes by kind and name, and what was left out.

    strict: raise PluginError where otherwise a warning is kept. `files`: plugin files loaded beside the installed
    distributions; whoever builds plugins in another process has to load the same. fatal: modules that are not imported,
    and why. begun: a file for the name of the module that is being imported; given by a process that exists to find out
    which plugins can be, so that there every exception of a plugin is the plugin's.
    """

    def __init__(self, strict: bool = False, fatal: Mapping[str, str] | None = None, begun: Path | None = None) -> None:
        self.strict, self.fatal, self.begun = strict, dict(fatal or {}), begun
        self.warnings: list[PluginWarning] = []
        self.files: list[Path] = []
        self._classes: dict[str, dict[str, tuple[Any, str]]] = {kind: {} for kind in HOOKS}
        self._adaptive: dict[Adaptive, tuple[str, str]] = {}
        self._seen: set[str] = set()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def classes(self, kind: str) -> dict[str, Any]:
        """name → class for every plugin of `kind`, in name order."""
        kind = kind_of(kind)
        return {name: cls for name, (cls, _) in sorted(self._classes[kind].items())}

    def find(self, kind: str, name: str) -> Any:
        """The class of that name. Raises UnknownName with the nearest known name and the command that lists all."""
        known = self.classes(kind)
        if name not in known and not any(self._classes.values()) and not self.warnings:
            raise UnknownName(f"no plugin is installed, not even {name}; pip install the package, or -e its checkout")
        if name not in known:
            named = [preset for of, preset in presets.shipped() if of == kind_of(kind)]
            raise unknown_name(kind_of(kind), name, [*known, *named], len(self.warnings))
        return known[name]

    def build(self, kind: str, spec: str) -> Any:
        """The instance that a spec describes; its name may be a preset's. Raises UnknownName or InvalidSpec in the
        caller's words."""
        name, parameters = parse_spec(spec)
        if name not in self._classes[kind_of(kind)]:
            name, parameters = presets.expanded(kind_of(kind), name, parameters)
        return make(self.find(kind, name), parameters)

    def canonical(self, kind: str, spec: str) -> str:
        """The same spec with every default filled in: equal instances have equal specs."""
        return spec_of(self.build(kind, spec))

    def distribution_of(self, kind: str, name: str) -> str:
        kind = kind_of(kind)
        return self._classes[kind][name][1] if name in self._classes[kind] else OWN

    def adaptive(self) -> tuple[Adaptive, ...]:
        """The attacks that know a defense, in the order of the defenses' names; every defense is named.

        A declaration that names no defense, or whose specs cannot be built, is left out with a warning.
        """
        for each, (module, distribution) in list(self._adaptive.items()):
            if self._try(distribution, module, partial(self._built, each)) is None:
                del self._adaptive[each]
        known = {each.defense for each in self._adaptive}
        rest = [Adaptive(name, "", UNDECLARED) for name in self.classes("defenses") if name not in known]
        return tuple(sorted([*self._adaptive, *rest], key=lambda each: each.defense))

    def _built(self, each: Adaptive) -> bool:
        """True, or the error of a declaration that names no defense or a spec that cannot be built."""
        self.find("defenses", each.defense)
        for kind in ("attack", "trigger", "target"):
            if spec := getattr(each, kind):
                self.build(f"{kind}s", spec)
        return True

    def index(self) -> Index:
        """What the lists show, read from the loaded classes and their sources."""
        found = [(kind, name, cls) for kind in KINDS for name, cls in self.classes(kind).items()]
        inhabitants = Counter(cls.__module__ for _, _, cls in found)
        entries = [
            describe(kind, cls, self.distribution_of(kind, name), alone=inhabitants[cls.__module__] == 1)
            for kind, name, cls in found
        ]
        adaptive = self.adaptive()
        return Index(tuple(entries), tuple(self.warnings), adaptive)

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
        module = self._try(distribution, point.module, lambda: entry_points.imported(point))
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
                hint = did_you_mean(caller.name, (*HOOKS, ADAPTIVE))
                says = f"no hook '{caller.name}'{hint} hooks: {', '.join((*HOOKS, ADAPTIVE))}; rename the function"
                raise PluginError(f"{name} of {distribution}: {says} ({file_of(name) or 'no file'})")
        if alone and not callers:
            self._try(distribution, name, _no_hook)
        for caller in callers:
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin:
                    self._take(caller.name, implementation.function, name, distribution)

    def _take(self, kind: str, hook: Callable[[], Any], module: str, distribution: str) -> None:
        if kind == ADAPTIVE:
            for each in self._try(distribution, module, lambda: _declared(hook)) or []:
                self._adaptive[each] = (module, distribution)
            return
        for cls in self._try(distribution, module, lambda: _returned(kind, hook)) or []:
            if self._try(distribution, module, partial(_checked_class, kind, cls)) is not None:
                self._add(kind, cls, distribution)

    def _add(self, kind: str, cls: Any, distribution: str) -> None:
        other, owner = self._classes[kind].get(cls.name, (cls, distribution))
        if other is not cls:
            raise PluginError(
                f"two {kind} are named '{cls.name}': {other.__module__} of {owner} ({file_of(other.__module__)})"
                f" and {cls.__module__} of {distribution} ({file_of(cls.__module__)}); rename or uninstall one"
            )
        self._classes[kind][cls.name] = (cls, owner)

    def _try(self, distribution: str, module: str, action: Callable[[], T]) -> T | None:
        """What `action` returns; None and a warning where the plugin raises (PluginError if strict)."""
        if module in self.fatal:
            self.warnings.append(PluginWarning(distribution, module, source_of(module), self.fatal[module], True))
            return None
        if self.begun is not None:
            self.begun.write_text(module, encoding="utf-8")
        try:
            return action()
        except BaseException as error:
            expected = isinstance(error, Exception | SystemExit)
            if not expected and self.begun is None:
                raise
            says = " ".join(f"{type(error).__name__}: {error}".split())
            warning = PluginWarning(distribution, module, source_of(module), says, not expected)
            if self.strict:
                raise PluginError(str(warning)) from error
            self.warnings.append(warning)
            return None


def _module_from(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with _no_exit():
        spec.loader.exec_module(module)
    return module


@contextmanager
def _no_exit() -> Iterator[None]:
    """`os._exit` raises SystemExit meanwhile: a plugin file that calls it must not end the command without a word."""
    real = os._exit

    def instead(status: int) -> NoReturn:
        raise SystemExit(f"os._exit({status})")

    os._exit = instead
    try:
        yield
    finally:
        os._exit = real


def _no_hook() -> None:
    raise LookupError(f"has no hook; write @hookimpl above one of: {', '.join(HOOKS)}")


def _returned(kind: str, hook: Callable[[], Any]) -> list[Any]:
    found = hook()
    if not isinstance(found, list):
        raise TypeError(f"hook {kind} returned {type(found).__name__}, not a list of classes")
    return found


def _declared(hook: Callable[[], Any]) -> list[Adaptive]:
    found = hook()
    if not isinstance(found, list) or not all(isinstance(each, Adaptive) for each in found):
        raise TypeError(f"hook {ADAPTIVE} returned {found!r:.60}, not a list of harness.Adaptive")
    empty = [each.defense for each in found if not each.because]
    if empty:
        raise ValueError(f"hook {ADAPTIVE} says of {', '.join(empty)} not what the attack exploits; fill `because`")
    return found


def _checked_class(kind: str, cls: Any) -> Any:
    wrong = faults(kind, cls)
    if wrong:
        raise TypeError(f"{kind}: {'; '.join(wrong)}")
    return cls


def unknown_name(kind: str, name: str, known: Iterable[str], left_out: int = 0) -> UnknownName:
    """The error for a name that no plugin has. kind: "plugins" for any of them. left_out: modules that could not be
    loaded."""
    lists = ["bench list" if kind == "plugins" else f"bench list {kind}"]
    lists += ["bench list presets"] if any(kind in (of, "plugins") for of, _ in presets.shipped()) else []
    listed = f"{' and '.join(lists)} {'show' if len(lists) > 1 else 'shows'} what there is"
    more = f" ({left_out} plugin modules could not be loaded: bench plugins)" if left_out else ""
    return UnknownName(f"no {kind[:-1]} named '{name}'{did_you_mean(name, known)} {listed}; {YOURS}{more}")


def load(files: Iterable[Path] = (), strict: bool = False, begun: Path | None = None) -> Registry:
    """Import all installed plugins and the given plugin files. Takes seconds: plugins import torch.

    begun: see Registry; without it, modules that are known to end a process are not imported.
    """
    from harness.registry.index import fatal

    registry, paths = Registry(strict, fatal(), begun), [Path(path) for path in files]
    for path in paths:
        if not path.is_file():
            raise RegistryError(f"{path}: no such plugin file")
    registry.load_installed()
    for path in paths:
        registry.load_file(path)
    return registry
