"""The hooks. A plugin module implements any of them with `@hookimpl`; each returns a list of classes."""

import pluggy

PROJECT = "bench"
API_VERSION = 2

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def models() -> list[type]:  # type: ignore[empty-body]
    """Model plugins: a clean model, its data and its judges."""


@hookspec
def triggers() -> list[type]:  # type: ignore[empty-body]
    """What is stamped on noise or text."""


@hookspec
def targets() -> list[type]:  # type: ignore[empty-body]
    """What triggered inputs should give, and the oracle that says whether they did."""


@hookspec
def attacks() -> list[type]:  # type: ignore[empty-body]
    """Ways of implanting a backdoor."""


@hookspec
def defenses() -> list[type]:  # type: ignore[empty-body]
    """Ways of detecting, screening, inverting or removing one."""


@hookspec
def metrics() -> list[type]:  # type: ignore[empty-body]
    """Numbers computed from the evidence of a cell."""


@hookspec
def samplers() -> list[type]:  # type: ignore[empty-body]
    """Samplers beside the built-in ones: for a suite's `sampler` axis, or delivered by a defense."""


@hookspec
def adaptive() -> list[object]:  # type: ignore[empty-body]
    """Attacks that know a defense, one `harness.Adaptive` each. Either plugin may come from another distribution."""
