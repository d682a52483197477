"""Scores of a long search, kept line by line, so that a search that was stopped goes on where it stopped.

Whoever runs a search names a folder by `kept_in`. A search asks by `of` for what was found on its model with its
settings, and adds what it finds. Outside of `kept_in` nothing is read and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

MOST = 32  # files in the folder; the oldest are removed
_where: tuple[Path, str] | None = None


@contextmanager
def kept_in(folder: Path | None, code: str) -> Iterator[None]:
    """Context in which searches keep their scores in files of `folder`; None: nowhere. code: a digest of the code that
    searches, which is part of the files' names."""
    global _where
    before, _where = _where, None if folder is None else (folder, code)
    try:
        yield
    finally:
        _where = before


class Scores:
    """Numbers by name, and the file to which each new finite one is added at once."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found = {} if path is None else _read(path)

    def find(self, name: str) -> float | None:
        return self._found.get(name)

    def add(self, scores: Mapping[str, float]) -> None:
        """A folder that cannot be written only means that the next search judges all of it."""
        self._found |= scores
        if self.path is None:
            return
        lines = "".join(f"{json.dumps([name, value])}\n" for name, value in scores.items() if math.isfinite(value))
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{lines}")  # the last line of a process that was killed may have no end


def of(model: DiffusionModel, about: Callable[[], Mapping[str, Any]]) -> Scores:
    """What was found by a search on `model`, its weights and its configurations. about: gives all else that decides the
    scores, as JSON has it."""
    if _where is None:
        return Scores(None)
    folder, code = _where
    whole = hashlib.sha256(f"{code}|{model.device.type}|{json.dumps(about(), sort_keys=True)}".encode())
    for part, net in {"scheduler": model.scheduler, **model.components()}.items():
        config: Any = getattr(net, "config", {})
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        public = {name: value for name, value in settings.items() if not name.startswith("_")}
        whole.update(f"{part}|{json.dumps(public, sort_keys=True, default=str)}".encode())
    for part, net in model.components().items():
        for name, value in net.state_dict().items():
            whole.update(f"{part}|{name}|{value.dtype}|{tuple(value.shape)}".encode())
            whole.update(value.detach().cpu().contiguous().numpy().tobytes())
    path = folder / f"{whole.hexdigest()[:32]}.jsonl"
    if not path.exists():
        with suppress(OSError):
            for old in sorted(folder.glob("*.jsonl"), key=lambda each: each.stat().st_mtime)[: 1 - MOST]:
                old.unlink()
    return Scores(path)


def _read(path: Path) -> dict[str, float]:
    """The lines that are a name and a finite number; the file may be anybody's, and a line may be cut."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            named = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if named and isinstance(entry[1], float) and math.isfinite(entry[1]):
                found[entry[0]] = entry[1]
    return found
