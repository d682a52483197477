"""What the registry raises. Each is one line for whoever asked, with the exit code of a command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

KINDS = ("models", "triggers", "targets", "attacks", "defenses", "metrics", "samplers")


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What goes between an unknown word and the list of known ones: the nearest of them, if one is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    near = near or [name for name in names if word and name.startswith(word.lower())]
    return f"; did you mean '{names[near[0]]}'?" if near else ";"


def kind_of(word: str) -> str:
    """The kind that `word` means, singular or plural. Raises UnknownName."""
    for kind in KINDS:
        if word in (kind, kind[:-1]):
            return kind
    raise UnknownName(f"no kind '{word}'{did_you_mean(word, KINDS)} kinds: {', '.join(KINDS)}")
