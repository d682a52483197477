"""What lies in a store: artifacts by kind, with their sizes and when they were used last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.runs.explain import inputs_of
from harness.runs.store import Store


@dataclass(frozen=True)
class Entry:
    """An artifact. size: bytes of its files. created, used: seconds since the epoch."""

    key: str
    kind: str
    label: str
    files: int
    size: int
    created: float
    used: float
    ingredients: Mapping[str, Any]

    @property
    def inputs(self) -> list[str]:
        """Keys of the artifacts that went into it."""
        return inputs_of(self.ingredients)


@dataclass(frozen=True)
class Total:
    """All artifacts of a kind. size: bytes. oldest, newest: when one was used last, seconds since the epoch."""

    kind: str
    number: int
    size: int
    oldest: float | None = None
    newest: float | None = None


def entries(store: Store) -> Iterator[Entry]:
    """Every artifact with a readable manifest, ordered by key."""
    for manifest, used in store.manifests():
        created, ingredients = manifest.get("created"), manifest.get("ingredients")
        sizes = [entry["size"] for entry in manifest["files"].values() if isinstance(entry["size"], int)]
        yield Entry(
            manifest["key"], str(manifest.get("kind", "other")), str(manifest.get("label", "")), len(sizes), sum(sizes),
            created if isinstance(created, (int, float)) else used, used,
            ingredients if isinstance(ingredients, dict) else {},
        )  # fmt: skip


def totals(found: Iterable[Entry]) -> list[Total]:
    """One for each kind, by name."""
    kinds: dict[str, list[Entry]] = {}
    for entry in found:
        kinds.setdefault(entry.kind, []).append(entry)
    return [
        Total(kind, len(of), sum(e.size for e in of), min(e.used for e in of), max(e.used for e in of))
        for kind, of in sorted(kinds.items())
    ]


def leftovers(store: Store) -> list[Total]:
    """What `Store.gc` would remove: drafts of dead writers, and what was set aside."""
    kinds: dict[str, list[int]] = {}
    for path in store.stale():
        kinds.setdefault("damaged" if path.parent.name == "quarantine" else "draft", []).append(_bytes_below(path))
    return [Total(kind, len(sizes), sum(sizes)) for kind, sizes in sorted(kinds.items())]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:  # it is being removed at this moment
            continue
    return total
