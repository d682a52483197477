"""What takes time to derive and never changes, kept in the cache directory for the next process.

An answer stands under a digest of all that it depends on, so that nothing in the file can be out of date. The file can
be removed at any time: the next process derives its answers again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.registry.entry_points import OWN

MOST = 5000  # answers in the file; with more, those that this process did not ask for are left out


def cache_dir() -> Path | None:
    """Where derived files may be kept; None where there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / OWN
    except RuntimeError:
        return None


def cache_file(name: str) -> Path | None:
    """The file of that name for this Python environment; None where there is no home directory."""
    base = cache_dir()
    return base and base / f"{name}-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a cache file; a directory that cannot be written only means that the next call derives it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return


def digest_of(*parts: str | bytes) -> str:
    """The name of an answer: a digest of what it depends on."""
    found = hashlib.sha256()
    for part in parts:
        octets = part.encode() if isinstance(part, str) else part
        found.update(f"{len(octets)}:".encode() + octets)
    return found.hexdigest()


class Kept:
    """Answers by digest. The file is read when the first answer is asked for, and written by `save`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path: Path | None = None
        self._there: dict[str, Any] | None = None
        self._used: dict[str, Any] = {}
        self._new = False

    def find(self, key: str) -> Any:
        """The answer; None where there is none. Whoever asks checks its form: the file may be anybody's."""
        if self._there is None:
            self._path, self._there = cache_file(self.name), {}
            self._there = _read(self._path)
        found = self._there.get(key)
        if found is not None:
            self._used[key] = found
        return found

    def keep(self, key: str, answer: Any) -> None:
        """Note an answer that JSON can hold."""
        self.find(key)
        assert self._there is not None
        self._there[key] = self._used[key] = answer
        self._new = True

    def save(self) -> None:
        """Write new answers, beside those that others wrote meanwhile."""
        if self._new and self._path is not None:
            every = _read(self._path) | self._used
            write_atomically(self._path, json.dumps(every if len(every) <= MOST else self._used))
        self._new = False


def _read(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


derived = Kept("derived")
