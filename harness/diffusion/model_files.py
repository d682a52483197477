"""The files of a model directory that may be hostile: what is there, and the only way in which any of it is read.

Regular files inside the directory are read and nothing else. A directory that holds a link, a pipe, a socket or a
device is refused, so that nothing outside it can be reached and nothing can block. The links of the hub's own cache are
the exception: they may lead into the `blobs` folder of the same repository. Sizes are checked before anything is read.
"""

from __future__ import annotations

import codecs
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
FLOATS = ("F64", "F32", "F16", "BF16")  # types in which weights are read
DTYPES = (*FLOATS, "I64", "I32", "I16", "I8", "U8", "BOOL")
FORBIDDEN = ("auto_map", "custom_pipeline", "transformers_weights", "quantization_config")  # what makes a library read
# or run something else than the files that were checked
FOREIGN = (".msgpack", ".h5", ".npz", ".npy", ".onnx", ".onnx_data", ".gguf", ".tflite")  # weights of other libraries
MADE_OF = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "pruned.json",
           "bench.json", "provenance.json")  # further files of a directory  # fmt: skip
NO_BOUND = re.compile(r'("lambda_min_clipped"\s*:\s*)-Infinity\b')  # as diffusers writes it for solvers of DPM
SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/[0-9a-f]{40}")


class CheckpointError(ValueError):
    """A model directory that cannot be read safely and completely; the message names the file and the way out."""


def local(where: str | Path) -> Path:
    """A path of the command line, ~ expanded; ~x stays as it is where there is no user x."""
    try:
        return Path(where).expanduser()
    except RuntimeError:
        return Path(where)


def is_of_a_model(name: str) -> bool:
    """Whether a file is, by its name alone, one of those that make up a model's directory."""
    endings = (".safetensors", ".py", ".md", ".model", "config.json", "index.json", *PICKLES, *FOREIGN)
    return name.lower().endswith(endings) or name in MADE_OF


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds: name → (dtype, shape)."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


class ModelFiles:
    """A listing of `directory`: relative POSIX path → size in bytes. Raises CheckpointError for what is refused.

    lent: files of other directories, by the names that they have here. They are taken as they are, so the caller has to
    trust them.
    """

    def __init__(self, directory: Path, lent: Mapping[str, Path] | None = None) -> None:
        self.directory = _named_in_utf8(directory)
        self.lent = dict(lent or {})
        sizes = dict(self._listed()) | {name: path.stat().st_size for name, path in self.lent.items()}
        self.sizes = dict(sorted(sizes.items()))
        if not self.sizes:
            raise CheckpointError(f"{directory}: is empty; give a directory saved by a diffusers pipeline")

    @classmethod
    def of_file(cls, path: Path) -> ModelFiles:
        """A listing of one file alone, whatever is beside it. Raises CheckpointError for what is no regular file."""
        made = cls.__new__(cls)
        made.directory, made.lent = _named_in_utf8(path).parent, {}
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
                raise CheckpointError(f"{self.directory / folder}: cannot be listed ({error.strerror})") from None
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
        return self.lent.get(name, self.directory / name)

    def read(self, name: str, most: int = MOST_TEXT) -> bytes:
        """The bytes of a listed file. Raises CheckpointError for more than `most`, and for a file that has changed."""
        if self.sizes[name] > most:
            raise CheckpointError(f"{self.path(name)}: {self.sizes[name]:,} bytes; at most {most:,} are read")
        try:
            file = os.open(self.real(name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise CheckpointError(f"{self.path(name)}: cannot be read ({error.strerror})") from None
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
        """The JSON object in a listed file, in UTF-8 with or without a byte order mark.

        Raises CheckpointError for anything else. That includes NaN, infinities and a name that stands twice in an
        object, because readers differ in which of the two values they take. The exception is `lambda_min_clipped`,
        which diffusers writes as -Infinity.
        """
        try:
            text = self.read(name, most).decode("utf-8-sig")
            text = NO_BOUND.sub(r"\1-1e999", text)
            found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path(name)}: not JSON ({short(error)}); fetch it again") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path(name)}: a JSON {type(found).__name__}, not an object; fetch it again")
        return found

    def marked(self, name: str) -> bool:
        """Whether a listed file begins with a byte order mark, which libraries do not expect in JSON."""
        return self.start(name, len(codecs.BOM_UTF8)) == codecs.BOM_UTF8

    def configuration(self, name: str, most: int = MOST_JSON) -> dict[str, Any]:
        """The JSON object in a listed file. Raises CheckpointError also where it names code or files of its own."""
        found = self.json(name, most)
        for key in FORBIDDEN:
            if found.get(key):
                raise CheckpointError(
                    f"{self.path(name)}: has {key}, which names code or files of its own; such models are refused"
                )
        return found

    def header(self, name: str) -> Header:
        """What a safetensors file holds, by its header, which must fit the file's size."""
        from safetensors import SafetensorError, safe_open

        path, size = self.real(name), self.sizes[name]
        length = int.from_bytes(self.start(name, 8), "little")
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
        """The first bytes of a listed file. Raises CheckpointError for one that cannot be opened."""
        try:
            with self.real(name).open("rb") as file:
                return file.read(most)
        except OSError as error:
            raise CheckpointError(f"{self.path(name)}: cannot be read ({error.strerror})") from None

    def digest(self, names: list[str]) -> str:
        """sha256 over the names and the bytes of listed files."""
        total = hashlib.sha256()
        for name in sorted(names):
            with self.real(name).open("rb") as file:
                total.update(f"{name}|{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    def weights(self, folder: str, stem: str) -> list[str]:
        """The safetensors files that hold the weights of a part: one file, or the shards that its index names.

        Where there are no such files without a variant, those of the variant fp16 are taken, or those of the only other
        variant. Raises CheckpointError, naming what is missing or ambiguous.
        """
        inside, variant = f"{folder}/" if folder else "", self.variant(folder, stem)
        if variant is None:
            raise self._no_weights(folder, stem)
        dotted = f".{variant}" if variant else ""
        single = f"{inside}{stem}{dotted}.safetensors"
        index = f"{inside}{stem}.safetensors.index{dotted}.json"
        if single in self and index in self:
            raise CheckpointError(f"{self.path(index)}: beside {PurePosixPath(single).name}; remove one of the two")
        return [single] if single in self else self._shards(index, inside)

    def variant(self, folder: str, stem: str) -> str | None:
        """The variant of the weights that `weights` takes; "" for those without one, None where it takes none."""
        found = self._variants(folder, stem)
        usual = next((variant for variant in ("", "fp16") if variant in found), None)
        return found.pop() if usual is None and len(found) == 1 else usual

    def _variants(self, folder: str, stem: str) -> set[str]:
        """The variants in the names of a part's weights, such as fp16 and non_ema; "" for names without one."""
        named = re.compile(rf"{stem}(?:(?:\.([\w-]+))?\.safetensors|\.safetensors\.index(?:\.([\w-]+))?\.json)")
        found = (named.fullmatch(PurePosixPath(name).name) for name in self.folder(folder))
        return {match[1] or match[2] or "" for match in found if match is not None}

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
        where, held, variants = self.directory / folder, self.folder(folder), sorted(self._variants(folder, stem))
        wanted = f"{stem}.safetensors"
        if variants:
            return CheckpointError(
                f"{where}: no {wanted} but the variants {', '.join(variants)}; rename the files of one to {wanted}"
            )
        pickles = [name for name in held if name.endswith(PICKLES)]
        if pickles:
            return CheckpointError(
                f"{self.path(pickles[0])}: a pickle can run code when it is loaded, so it is refused; "
                "convert it on a machine you can lose with save_pretrained(safe_serialization=True)"
            )
        others = [PurePosixPath(name).name for name in held if name.lower().endswith((".safetensors", *FOREIGN))]
        beside = f" but {others[0]}, which is not read" if others else ""
        way = f"convert the weights to safetensors as {wanted}" if others else "fetch the weights again"
        return CheckpointError(f"{where}: no {wanted}{beside}; {way}")


def _named_in_utf8(path: Path) -> Path:
    """The path itself. Raises CheckpointError for one that is not UTF-8, which safetensors does not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: its name is no text in UTF-8; rename it") from None
    return path


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


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has {name[:100]!r} twice")
    return found


def short(error: BaseException) -> str:
    """What an error of a library says, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
