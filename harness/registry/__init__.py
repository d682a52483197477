"""Discover plugins, isolate broken ones, validate parameters, build instances from specs.

A spec is `name` or `name(key=literal, ...)`. What `bench list` and `bench show` print comes from an index that a
subprocess derives, so that no plugin module (and no torch) is imported for it.
"""

from harness.registry.descriptions import Entry, Field, Index, PluginWarning, describe
from harness.registry.entry_points import OWN, installed
from harness.registry.errors import (
    KINDS,
    InvalidSpec,
    PluginError,
    RegistryError,
    UnknownName,
    did_you_mean,
    kind_of,
)
from harness.registry.index import index
from harness.registry.kept import cache_dir
from harness.registry.loading import HOOKS, Registry, load, unknown_name
from harness.registry.specs import literal, parse_spec, spec_of, write_spec
from harness.registry.validation import make

__all__ = [
    "HOOKS", "KINDS", "OWN", "Entry", "Field", "Index", "InvalidSpec", "PluginError", "PluginWarning", "Registry",
    "RegistryError", "UnknownName", "cache_dir", "describe", "did_you_mean", "index", "installed", "kind_of",
    "literal", "load", "make", "parse_spec", "spec_of", "unknown_name", "write_spec",
]  # fmt: skip
