"""GPUs by their UUIDs, and leases on parts of them that end with whoever holds them.

A card is cut into PARTS. A lease is a set of locks on single bytes of one file per card, held by the open file: the
kernel gives them back when the holder ends, however it ends, and two drivers on one machine never lease the same part,
whatever stores they work on. The files lie in a folder of the user's below the machine's temporary one, or in
BENCH_LEASES, which several users may share.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = 120  # divides evenly by 2, 3, 4, 5, 6, 8, 10, 12
_LOCK = getattr(fcntl, "F_OFD_SETLK", fcntl.F_SETLK)  # Linux: the lock is the open file's, not the process's


@dataclass(frozen=True)
class Card:
    """A GPU. uuid: as CUDA_VISIBLE_DEVICES takes it. memory: bytes, None if unknown."""

    uuid: str
    index: int | None = None
    name: str = ""
    memory: int | None = None


def cards() -> list[Card]:
    """The GPUs that the NVIDIA driver sees, in its order; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",", 3)] for line in said.splitlines() if line.strip()]
    return [Card(uuid, int(index), name, int(memory) * 2**20) for index, uuid, memory, name in rows]


def find(names: Sequence[str], among: Sequence[Card] | None = None) -> list[Card]:
    """The cards of these numbers (the driver's order) or UUIDs (or unique beginnings of them); "all" is every card that
    CUDA_VISIBLE_DEVICES leaves. Raises ValueError, naming the cards that there are.
    """
    found = cards() if among is None else list(among)
    if not found:
        raise ValueError("no GPU found: nvidia-smi lists none; run without --gpus")
    if list(names) == ["all"]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (
            found if visible is None else [_named(name.strip(), found) for name in visible.split(",") if name.strip()]
        )
    picked = [_named(name, found) for name in names]
    if len(set(picked)) < len(picked):
        raise ValueError(f"GPUs {', '.join(names)}: name each one once")
    return picked


def _named(name: str, among: Sequence[Card]) -> Card:
    fits = [card for card in among if name == str(card.index) or (not name.isdigit() and card.uuid.startswith(name))]
    if len(fits) != 1:
        known = ", ".join(f"{card.index} ({card.name}, {card.uuid})" for card in among)
        raise ValueError(f"no GPU {name!r}; there are {known}")
    return fits[0]


def default_folder() -> Path:
    named = os.environ.get("BENCH_LEASES")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"diffusion-defense-bench-{os.getuid()}" / "gpus"


class Leases:
    """Leases on parts of cards. parts: of PARTS; a whole card is PARTS."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def take(self, card: Card, parts: int) -> Lease | None:
        """A lease on that many parts of the card; None if others hold too many. Raises OSError if the folder cannot be
        written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() else "-" for letter in card.uuid)
        file = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lease, mine = Lease(card, parts, file), 0
        if not _lock(file, PARTS):  # one byte more, held while choosing: half-taken leases must not meet
            lease.release()
            return None
        for part in range(PARTS):
            mine += mine < parts and _lock(file, part)
        _unlock(file, PARTS)
        if mine < parts:
            lease.release()
            return None
        return lease


@dataclass
class Lease:
    """Held until `release`, or until this process ends."""

    card: Card
    parts: int
    file: int | None

    @property
    def share(self) -> float:
        return self.parts / PARTS

    def release(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


def parts_of(share: float) -> int:
    """How many parts a share (0 to 1] takes, rounded up so that no more jobs fit than the share says."""
    return max(1, math.ceil(share * PARTS - 1e-9))


def _lock(file: int, byte: int) -> bool:
    with contextlib.suppress(BlockingIOError, PermissionError):
        fcntl.fcntl(file, _LOCK, _flock(fcntl.F_WRLCK, byte))
        return True
    return False


def _unlock(file: int, byte: int) -> None:
    fcntl.fcntl(file, _LOCK, _flock(fcntl.F_UNLCK, byte))


def _flock(kind: int, byte: int) -> bytes:
    """struct flock: type, whence, start, length, pid (which must be 0)."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
