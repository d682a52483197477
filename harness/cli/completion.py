"""What a shell completes: names of suites, plugins and kinds, read from the index, without importing a plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem


class Named(click.ParamType):
    """A text that may be one of some names, which a shell completes. kinds: of plugins. suites: also names of suites.
    presets: also names of presets of these kinds.

    Nothing is checked here: the command says what is wrong with a name."""

    name = "text"

    def __init__(self, *kinds: str, suites: bool = False, presets: bool = True) -> None:
        self.kinds = kinds
        self.suites = suites
        self.presets = presets

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin with `incomplete`, each with its summary. Where they cannot be read there are none: an
        error would stand in the middle of a command line."""
        try:
            found = list(self._names())
        except Exception:
            return []
        return [CompletionItem(name, help=text) for name, text in found if name.startswith(incomplete)]

    def _names(self) -> Iterable[tuple[str, str]]:
        if self.suites:
            from harness.runs.suite import read, suites

            yield from ((name, read(path).title) for name, path in suites().items())
        if self.kinds:
            from harness import registry
            from harness.registry import presets

            entries = registry.index().entries
            yield from ((e.name, e.summary) for e in entries if e.kind in self.kinds or "any" in self.kinds)
            named = presets.shipped().values() if self.presets else ()
            yield from ((p.name, p.spec) for p in named if p.kind in self.kinds or "any" in self.kinds)


class Kind(Named):
    """A kind of plugin, suites, presets or adaptive."""

    def _names(self) -> Iterable[tuple[str, str]]:
        from harness.registry import KINDS

        return [(kind, "") for kind in (*KINDS, "presets", "suites", "adaptive")]


class Spec(Named):
    """A filter KEY=TEXT of cells, whose TEXT a shell completes with the plugins of that axis."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from harness.runs.suite import AXES

        axis, equals, begun = incomplete.partition("=")
        if not equals:
            return [CompletionItem(f"{name}=") for name in AXES if name.startswith(axis)]
        names = Named(AXES[axis]).shell_complete(ctx, param, begun) if axis in AXES else []
        return [CompletionItem(f"{axis}={item.value}", help=item.help) for item in names]
