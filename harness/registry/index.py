"""The index of installed plugins, derived in a process of its own, so that a list imports no plugin and no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.registry import entry_points
from harness.registry.descriptions import Entry, Field, Index, PluginWarning
from harness.registry.entry_points import OWN, installed
from harness.registry.errors import PluginError
from harness.registry.kept import cache_file, write_atomically
from harness.types import Adaptive

INDEX_VERSION = 4
FATAL = "BENCH_FATAL_PLUGINS"  # JSON: module → why it is not imported
PATIENCE = 300.0  # seconds for importing all plugins


def index(refresh: bool = False, notice: Callable[[str], None] | None = None) -> Index:
    """The index of installed plugins, without importing any plugin.

    It is read from a cache, or derived in a subprocess if a plugin file or the set of distributions has changed.
    notice: called with a message if that takes seconds. Raises PluginError if loading does (a misspelt hook, two
    plugins of one name).
    """
    key, kept = _index_key(), cache_file("plugins")
    if not refresh and kept is not None and (found := _read_index(kept, key)) is not None:
        return found
    if notice is not None:
        notice("reading plugins (once, and again when one changes) ...")
    document = {**_derived(), "key": key}
    if document["error"]:
        raise PluginError(document["error"])
    if kept is not None:
        write_atomically(kept, json.dumps(document))
    return _index_from(document)


def _index_key() -> str:
    found = installed()
    facts = {
        "version": INDEX_VERSION,
        "python": sys.version,
        "points": [(p.dist.name if p.dist else "", p.dist.version if p.dist else "", p.name, p.value) for p in found],
        "installed": sorted(distributions()),
        "files": sorted({_stamp(file) for point in found for file in entry_points.files(point)} | set(_own_files())),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def distributions() -> set[str]:
    """Names of the metadata directories on the path, versions included: a package that appears may mend a broken
    plugin."""
    found: set[str] = set()
    for base in sys.path:
        try:
            found |= {name for name in os.listdir(base or ".") if name.endswith((".dist-info", ".egg-info"))}
        except OSError:
            continue
    return found


def _own_files() -> list[tuple[str, int, int]]:
    return [_stamp(path) for path in Path(__file__).parents[1].rglob("*.py")]


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), stat.st_mtime_ns, stat.st_size


def _read_index(path: Path, key: str) -> Index | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _index_from(document) if document["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _index_from(document: Mapping[str, Any]) -> Index:
    entries = [Entry(**{**e, "fields": tuple(Field(**f) for f in e["fields"])}) for e in document["entries"]]
    known = tuple(Adaptive(**each) for each in document["adaptive"])
    return Index(tuple(entries), tuple(PluginWarning(**w) for w in document["warnings"]), known)


def _derived() -> dict[str, Any]:
    """Run this module in a process of its own and read what it found. A plugin module that ends that process, or does
    not come back, is left out and the rest is read again."""
    fatal: dict[str, str] = {}
    while True:
        with tempfile.TemporaryDirectory() as directory:
            out, begun = Path(directory) / "index.json", Path(directory) / "module.txt"
            how, said = _read_by_another(out, begun, fatal)
            if out.is_file():
                return json.loads(out.read_text(encoding="utf-8"))
            module = begun.read_text(encoding="utf-8") if begun.is_file() else ""
        if not module or module in fatal:
            raise PluginError(f"the plugins could not be read ({how}): {said}")
        fatal[module] = f"importing it {how}"


def _read_by_another(out: Path, begun: Path, fatal: Mapping[str, str]) -> tuple[str, str]:
    """How the process that reads all plugins ended, and the last line that it wrote."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-P", "-m", "harness.registry.index", str(out), str(begun)]
    env = {**os.environ, "PYTHONPATH": path, FATAL: json.dumps(dict(fatal))}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, errors="replace")
    except subprocess.TimeoutExpired:
        return f"takes more than {PATIENCE:.0f} s", ""
    code = done.returncode
    how = f"ends Python by signal {-code}" if code < 0 else f"ends Python with status {code}"
    return how, (done.stderr.strip().splitlines() or ["no message"])[-1]


def fatal() -> dict[str, str]:
    """Module → why it must not be imported here: it would end this process, or never come back.

    Known from the index, which another process has read. Nothing is read for a harness without other plugins.
    """
    if FATAL not in os.environ:
        foreign = any(point.dist is None or point.dist.name != OWN for point in installed())
        found: dict[str, str] = {}
        if foreign:
            with suppress(PluginError):
                found = {warning.module: warning.error for warning in index().warnings if warning.fatal}
        os.environ[FATAL] = json.dumps(found)  # for this process and for those that it starts
    try:
        return dict(json.loads(os.environ[FATAL]))
    except (ValueError, TypeError):
        return {}


def write_index(path: Path, begun: Path | None = None) -> None:
    """Load all installed plugins and write their index to `path`. begun: a file for the name of the module that is
    being imported, so that whoever finds this process dead knows which one ended it."""
    from harness.registry.loading import load

    document: dict[str, Any] = {"entries": [], "warnings": [], "adaptive": [], "error": None}
    try:
        document |= dataclasses.asdict(load(begun=begun).index())
    except PluginError as error:
        document["error"] = str(error)
    path.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    write_index(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # whatever threads a plugin has started
