"""The files of a model directory that may be hostile: what is there, and the only way in which any of it is read.

Regular files inside the directory are read and nothing else. A directory that holds a link, a pipe, a socket or a
device is refused, so that nothing outside it can be reached and nothing can block. The links of the hub's own cache are
the exception: they may lead into the `blobs` folder of the same repository. Sizes are checked before anything is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_ENTRIES = 20_000  # files and folders of a directory
DEEPEST = 8  # folders below it
MOST_JSON = 2**22  # bytes of a configuration
MOST_TEXT = 2**25  # bytes of a vocabulary
MOST_HEADER = 2**24  # bytes of the header of a safetensors file
MOST_TENSORS = 20_000  # of one file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/[0-9a-f]{40}")


class CheckpointError(ValueError):
    """A model directory that cannot be read safely and completely; the message names the file and the way out."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds: name → (dtype, shape)."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class ModelFiles:
    """A listing of `directory`: relative POSIX path → size in bytes. Raises CheckpointError for what is refused."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sizes = dict(sorted(self._listed()))
        if not self.sizes:
            raise CheckpointError(f"{directory}: is empty; give a directory saved by a diffusers pipeline")

    @classmethod
    def of_file(cls, path: Path) -> ModelFiles:
        """A listing of one file alone, whatever is beside it. Raises CheckpointError for what is no regular file."""
        made = cls.__new__(cls)
        made.directory = path.parent
        entry = next((entry for entry in os.scandir(path.parent) if entry.name == path.name), None)
        if entry is None:
            raise CheckpointError(f"{path}: no such file")
        made.sizes = {path.name: made._size(entry, path.name, _blobs_of(path.parent))}
        return made

    def _listed(self) -> Iterator[tuple[str, int]]:
        blobs = _blobs_of(self.directory)
        left, entries = [("", 0)], 0
        while left:
            folder, depth = left.pop()
            try:
                found = sorted(os.scandir(self.directory / folder), key=lambda entry: entry.name)
            except OSError as error:
                raise CheckpointError(f"{self.directory / folder}: {error.strerror}") from None
            for entry in found:
                entries += 1
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entries > MOST_ENTRIES:
                    raise CheckpointError(f"{self.directory}: holds more than {MOST_ENTRIES:,} files; is it a model?")
                if entry.is_dir(follow_symlinks=False):
                    if depth + 1 > DEEPEST:
                        raise CheckpointError(f"{self.directory / name}: folders are nested too deep for a model")
                    left.append((name, depth + 1))
                else:
                    yield name, self._size(entry, name, blobs)

    def _size(self, entry: os.DirEntry[str], name: str, blobs: Path | None) -> int:
        facts = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(facts.st_mode):
            target = Path(os.path.realpath(entry.path))
            if blobs is None or target.parent != blobs:
                raise CheckpointError(f"{self.directory / name}: is a link; copy what it leads to, or remove it")
            facts = os.lstat(target)
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{self.directory / name}: is no regular file but {_kind(facts.st_mode)}; remove it")
        return facts.st_size

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def folder(self, name: str) -> list[str]:
        """The names of the files directly in a folder ("" is the directory itself)."""
        return [file for file in self.sizes if PurePosixPath(file).parent == PurePosixPath(name)]

    def path(self, name: str) -> Path:
        """Where a listed file is, for messages and for libraries that map tensors into memory."""
        return self.directory / name

    def read(self, name: str, most: int = MOST_TEXT) -> bytes:
        """The bytes of a listed file. Raises CheckpointError for more than `most`, and for a file that has changed."""
        if self.sizes[name] > most:
            raise CheckpointError(f"{self.path(name)}: {self.sizes[name]:,} bytes; at most {most:,} are read")
        try:
            file = os.open(self.real(name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise CheckpointError(f"{self.path(name)}: {error.strerror}") from None
        with os.fdopen(file, "rb") as stream:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise CheckpointError(f"{self.path(name)}: is no regular file any more")
            content = stream.read(most + 1)
        if len(content) > most:
            raise CheckpointError(f"{self.path(name)}: more than {most:,} bytes")
        return content

    def real(self, name: str) -> Path:
        """Where the bytes of a listed file are: behind the link, in a hub's cache."""
        return Path(os.path.realpath(self.path(name))) if _blobs_of(self.directory) else self.path(name)

    def json(self, name: str, most: int = MOST_JSON) -> dict[str, Any]:
        """The JSON object in a listed file. Raises CheckpointError for anything else, NaN and infinities included."""
        try:
            found = json.loads(self.read(name, most).decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path(name)}: not JSON ({short(error)}); fetch it again") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path(name)}: a JSON {type(found).__name__}, not an object; fetch it again")
        return found

    def header(self, name: str) -> Header:
        """What a safetensors file holds, by its header, which must fit the file's size."""
        from safetensors import SafetensorError, safe_open

        path, size = self.real(name), self.sizes[name]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER):
            raise CheckpointError(f"{self.path(name)}: no safetensors file, truncated or damaged; fetch it again")
        try:
            with safe_open(path, framework="numpy") as opened:
                names = list(opened.keys())
                if len(names) > MOST_TENSORS:
                    raise CheckpointError(
                        f"{self.path(name)}: {len(names):,} tensors; at most {MOST_TENSORS:,} are read"
                    )
                slices = {tensor: opened.get_slice(tensor) for tensor in names}
                found = {tensor: (str(s.get_dtype()), tuple(s.get_shape())) for tensor, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path(name)}: truncated or damaged ({short(error)}); fetch it again") from None
        for tensor, (dtype, _) in found.items():
            if dtype not in DTYPES:
                raise CheckpointError(f"{self.path(name)}: {tensor} is of type {dtype}; give weights in fp32 or fp16")
        return Header(found)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.real(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path(name)}: truncated or damaged ({short(error)}); fetch it again") from None

    def tensors_of(self, name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of a safetensors file, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.real(name), framework="pt") as opened:
                return {tensor: opened.get_tensor(tensor) for tensor in wanted}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path(name)}: truncated or damaged ({short(error)}); fetch it again") from None

    def start(self, name: str, most: int = 16) -> bytes:
        """The first bytes of a listed file."""
        with self.real(name).open("rb") as file:
            return file.read(most)

    def digest(self, names: list[str]) -> str:
        """sha256 over the names and the bytes of listed files."""
        total = hashlib.sha256()
        for name in sorted(names):
            with self.real(name).open("rb") as file:
                total.update(f"{name}|{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    def weights(self, folder: str, stem: str) -> list[str]:
        """The safetensors files that hold the weights of a part: one file, or the shards that its index names; of the
        variant fp16 where there is no other. Raises CheckpointError, naming what is missing or ambiguous."""
        inside = f"{folder}/" if folder else ""
        for variant in ("", ".fp16"):
            single = f"{inside}{stem}{variant}.safetensors"
            index = f"{inside}{stem}.safetensors.index{variant}.json"
            if single in self and index in self:
                raise CheckpointError(f"{self.path(index)}: beside {PurePosixPath(single).name}; remove one of the two")
            if single in self:
                return [single]
            if index in self:
                return self._shards(index, inside)
        raise self._no_weights(folder, stem)

    def _shards(self, index: str, inside: str) -> list[str]:
        found = self.json(index, MOST_TEXT).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{self.path(index)}: names no weights; fetch it again")
        files = sorted({str(file) for file in found.values()})
        for file in files:
            if not re.fullmatch(r"[\w.-]+\.safetensors", file) or f"{inside}{file}" not in self:
                raise CheckpointError(
                    f"{self.path(index)}: names {file!r}, which is no safetensors file beside it; nothing else is read"
                )
        held = {file: set(self.header(f"{inside}{file}").tensors) for file in files}
        for tensor, file in found.items():
            if tensor not in held[file]:
                raise CheckpointError(f"{self.path(index)}: {tensor} is not in {file}; fetch it again")
        if sum(map(len, held.values())) != len(found):
            raise CheckpointError(f"{self.path(index)}: its files hold tensors that it does not name; fetch it again")
        return [f"{inside}{file}" for file in files]

    def _no_weights(self, folder: str, stem: str) -> CheckpointError:
        where = self.directory / folder
        pickles = [name for name in self.folder(folder) if name.endswith(PICKLES)]
        if pickles:
            return CheckpointError(
                f"{self.path(pickles[0])}: a pickle can run code when it is loaded, so it is refused; "
                "convert it on a machine you can lose with save_pretrained(safe_serialization=True)"
            )
        return CheckpointError(f"{where}: no {stem}.safetensors; fetch the weights again")


def _blobs_of(directory: Path) -> Path | None:
    """Where the links of a snapshot in the hub's cache may lead; None for any other directory."""
    real = Path(os.path.realpath(directory))
    return real.parents[1] / "blobs" if SNAPSHOT.fullmatch(real.as_posix()) else None


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((words for is_kind, words in kinds if is_kind(mode)), "something else")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def short(error: BaseException) -> str:
    """What an error of a library says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
