"""The contract that every plugin keeps, as tests. One line in a test file of yours runs all of it:

    from bench_jitter import Jitter
    from harness.testing import contract

    test_jitter_keeps_the_contract = contract(Jitter)

pytest then shows one test for each law; `bench plugin check NAME` runs the same without pytest. Models are random and
tiny, each run has a process of its own, and all of it takes well under a minute on one CPU core. Parameters that say
how long a run lasts (steps, batch, iterations ...) are made small unless you give them: contract(Jitter, steps=20).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.registry import Registry

SECONDS = 60.0


def contract(plugin: Any, *, kind: str | None = None, seconds: float = SECONDS, **parameters: Any) -> Any:
    """A test function for pytest, with one case for each law of the plugin's kind.

    plugin: the class. kind: "defense", "attack", ...; found by its methods if not given. seconds: for one run.
    A class that is no plugin, or parameters that it does not take, fail every case with the reason.
    """
    import pytest

    from harness.registry import kind_of
    from harness.testing import checks

    kinds = kind_of(kind) if kind is not None else kind_by_methods(plugin)

    @cache
    def case() -> checks.Case:
        return checks.case_of(kinds, plugin, parameters, registry(), seconds)

    @pytest.mark.parametrize("law", list(checks.LAWS[kinds]))
    def test_contract(law: str) -> None:
        __tracebackhide__ = True
        found = checks.examine(case(), law)
        if found.state == "broken":
            pytest.fail(f"{case().title}: {found.says}", pytrace=False)
        if found.state in ("n/a", "open"):
            pytest.skip(found.says)

    return test_contract


def kind_by_methods(plugin: Any) -> str:
    """The kind whose methods the class has. Raises TypeError where there is none."""
    from harness.registry.contract import METHODS

    found = [kind for kind, methods in METHODS.items() if all(hasattr(plugin, method) for method in methods)]
    if not found:
        wanted = ", ".join(f"{kind[:-1]} ({', '.join(methods)})" for kind, methods in METHODS.items())
        raise TypeError(f"{plugin.__name__} has the methods of no kind of plugin: {wanted}")
    return found[0]


@cache
def registry() -> Registry:
    """The installed plugins, loaded once."""
    from harness.registry import load

    return load()
