"""What a class of each kind has to have to be a plugin, and what belongs to a capability that it offers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

from harness import types
from harness.capabilities import (
    CAPABILITIES,
    FAMILIES,
    SETS,
    TRIGGER_CAPABILITIES,
    Capability,
    ExtraSetsMetric,
    NeedsOfTrigger,
    StatingDetector,
    delivers,
    members,
    offers,
)
from harness.methods import learned_triggers
from harness.registry import hookspecs
from harness.registry.entry_points import OWN
from harness.registry.errors import did_you_mean
from harness.registry.older_api import adopt, old_names
from harness.registry.validation import checked
from harness.types import DELIVERS, KNOWLEDGE, Modality, NoiseTrigger, TextTrigger

OLDEST_API = 1  # plugins written for this API version, or a later one up to hookspecs.API_VERSION, still run


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
    "models": {"modality": Modality, "conditional": bool},
    "triggers": {"modality": Modality},
    "targets": {"kind": str},
    "attacks": {"accepts_triggers": tuple[Modality, ...], "accepts_targets": tuple[str, ...]},
    "defenses": {"accepts_triggers": tuple[Modality, ...], "needs": tuple[str, ...]},
}


def faults(kind: str, cls: Any) -> list[str]:
    """What keeps `cls` from being a plugin of this kind, in words; [] if nothing. A class that was written for API 1
    gets the attributes that have had other names since."""
    if not isinstance(cls, type):
        return [f"{cls!r} is not a class"]
    api = getattr(cls, "api", 1)
    if api not in range(OLDEST_API, hookspecs.API_VERSION + 1):
        return [_api_fault(cls, api)]
    adopt(kind, cls)
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or "__dataclass_fields__" not in vars(cls):
        return [f"{cls.__name__} is not a frozen dataclass"]
    found = [f"{cls.__name__} has no method {name}" for name in METHODS[kind] if not callable(getattr(cls, name, None))]
    found += _call_faults(cls, CALLS[kind])
    found += [f"{old} is called {new} since plugin API 2; rename it" for old, new in old_names(kind, cls).items()]
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
    return _attribute_faults(kind, instance) or _capability_faults(kind, instance)


def _api_fault(cls: type, api: Any) -> str:
    speaks = f"{cls.__name__} is written for plugin API {api!r}, this harness supports {OLDEST_API}"
    speaks += f" to {hookspecs.API_VERSION}" if hookspecs.API_VERSION > OLDEST_API else ""
    newer = isinstance(api, int) and api > hookspecs.API_VERSION
    cure = f"upgrade {OWN}" if newer else f"port it and say api: ClassVar[int] = {hookspecs.API_VERSION}"
    return f"{speaks}; {cure}, or install a version of the plugin that fits"


def _call_faults(cls: type, calls: Sequence[str]) -> list[str]:
    """Methods that cannot be called as the harness calls them."""
    found = []
    for wanted in calls:
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
            found.append(f"{name}{signature} cannot be called as {wanted} ({error}); {_defined(wanted)}")
    return found


def _defined(call: str) -> str:
    """What to write for a method that is called so."""
    name, _, rest = call.partition("(")
    return f"write def {name}(self{', ' if rest != ')' else ''}{rest}"


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _attribute_faults(kind: str, instance: Any) -> list[str]:
    found = []
    for name, hint in {"name": str, "version": int, **ATTRIBUTES.get(kind, {})}.items():
        try:
            _, fault = checked(hint, getattr(instance, name))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        found += [f"{type(instance).__name__}.{name}: {fault}"] if fault else []
    if found:
        return found
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", instance.name, re.ASCII):
        found.append(f"the name {instance.name!r} cannot be written in a spec; use A-Z, a-z, 0-9, '-', '_' and '.'")
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
        method = "delta" if instance.modality == "noise" else "apply"
        found += [] if hasattr(instance, method) else [f"stamps {instance.modality} but has no method {method}"]
    return found


# ---- optional capabilities ------------------------------------------------------------------------------------------


def _capability_faults(kind: str, instance: Any) -> list[str]:
    """Capabilities that are half there: an attribute says that they are meant, and another one is missing, is of
    another type or cannot be called as the harness calls it."""
    found: list[str] = []
    try:
        for capability in (*CAPABILITIES, *learned_triggers.CAPABILITIES):
            claim = _claim(capability, instance) if kind in capability.kinds else None
            found += [] if claim is None else _half_there(capability.protocol, claim, instance)
        found = found or _name_faults(instance)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return [f"{type(instance).__name__}: {fault}" for fault in dict.fromkeys(found)]


def _claim(capability: Capability, instance: Any) -> str | None:
    """The attribute by which an instance claims a capability. None and False claim nothing."""
    bases = capability.protocol.__mro__
    modality = "text" if TextTrigger in bases else "noise" if NoiseTrigger in bases else None
    if modality is not None and modality != instance.modality:
        return None
    values = {name: getattr(instance, name, None) for name in capability.claimed_by}
    return next((name for name, value in values.items() if value is not None and value is not False), None)


def _half_there(protocol: type, claim: str, instance: Any) -> list[str]:
    found = []
    for name in members(protocol):
        asked = inspect.getattr_static(protocol, name, None)
        call = _call(asked) if inspect.isfunction(asked) else None
        if not hasattr(instance, name):
            wanted = _defined(call) if call else f"give it {name}"
            found.append(f"{claim} needs {name} beside it ({protocol.__name__}); {wanted}, or leave {claim} out")
        elif call and not callable(getattr(instance, name)):
            found.append(f"{name} is not a method ({protocol.__name__}); {_defined(call)}, or rename it")
        elif call:
            found += _call_faults(type(instance), [call])
        elif fault := checked(_type_of(protocol, name), getattr(instance, name))[1]:
            found.append(f"{name}: {fault} ({protocol.__name__})")
    return found


def _call(method: Callable[..., Any]) -> str:
    """How the harness calls a method of a Protocol: "scale(shape)"."""
    return f"{method.__name__}({', '.join(list(inspect.signature(method).parameters)[1:])})"


def _type_of(protocol: type, name: str) -> Any:
    """The type that a Protocol declares for an attribute."""
    declared, scope = inspect.getattr_static(protocol, name, None), dict(vars(types))
    if isinstance(declared, property):
        return eval(inspect.get_annotations(cast(Any, declared.fget))["return"], scope)
    hint = next(notes[name] for base in protocol.__mro__ if name in (notes := inspect.get_annotations(base)))
    (inner,) = get_args(eval(hint, scope))  # of a ClassVar
    return inner


def _name_faults(instance: Any) -> list[str]:
    """Names that nothing has, in what an instance requires of its trigger, reads beside every cell's images, or
    states to see."""
    required = instance.requires_trigger if offers(instance, NeedsOfTrigger) else ()
    read = instance.sets if offers(instance, ExtraSetsMetric) else ()
    seen = instance.sees if offers(instance, StatingDetector) else ()
    lists = (
        ("requires_trigger", "a plugin may require", required, TRIGGER_CAPABILITIES),
        ("sets", "a metric may read", read, SETS),
        ("sees", "a detector may see", seen, FAMILIES),
    )
    return [
        f"{attribute} {name!r}{did_you_mean(name, known)} {may}: {', '.join(known)}"
        for attribute, may, names, known in lists
        for name in names
        if name not in known
    ]
