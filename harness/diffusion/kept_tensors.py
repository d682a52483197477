"""Tensors that take time to compute and follow from what is known beforehand, kept in the cache directory.

A tensor stands under a digest of all that it depends on, so that no file can be out of date. The files can be removed
at any time: the next process computes its tensors again. Those that nobody has read for the longest time are removed
when all of them take more than MOST bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

OWN = "diffusion-defense-bench"  # the folder in the cache directory, as in harness.registry.entry_points
TENSOR = "tensor"
MOST = 2 * 2**30


def kept(of: Sequence[object], compute: Callable[[], Tensor], sound: Callable[[Tensor], bool]) -> Tensor:
    """`compute()`, or what an earlier process kept of it.

    of: what decides the tensor. sound: whether a tensor that was read can be one; another is computed again. A
    directory that cannot be written only means that the next process computes the tensor again.
    """
    place = _place(of)
    found = None if place is None else _read(place)
    if found is not None and sound(found):
        return found
    made = compute().contiguous()
    if place is not None:
        _write(place, made)
    return made


def _place(of: Sequence[object]) -> Path | None:
    """The file of a tensor; None where there is no home directory."""
    name = hashlib.sha256("\x1f".join(map(str, of)).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / OWN / "tensors" / f"{name}.safetensors"
    except RuntimeError:
        return None


def _read(place: Path) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(place).get(TENSOR)
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):
        os.utime(place)
    return found


def _write(place: Path, tensor: Tensor) -> None:
    from safetensors.torch import save

    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=place.parent, delete=False) as file:
            file.write(save({TENSOR: tensor}))
        os.replace(file.name, place)
        _trim(place.parent)


def _trim(folder: Path) -> None:
    """Removes the files that were read the longest time ago until the others take at most MOST bytes."""
    known = sorted(((at := file.stat()).st_mtime, at.st_size, file) for file in folder.iterdir())
    excess = sum(size for _, size, _ in known) - MOST
    for _, size, file in known:
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= size
