"""The published results as one archive per release: written in a checkout, fetched where there is none.

An archive comes from elsewhere, so nothing in it is believed: only regular files whose names are those of results are
taken, sizes are bounded while it is unpacked, and every record and picture must be what its digest says.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from leaderboard import results
from leaderboard.results import ResultsError

PROJECT = "https://github.com/diffusion-defense-bench/diffusion-defense-bench"
DISTRIBUTION = "diffusion-defense-bench"
MOST_PACKED = 100_000_000  # bytes of an archive
MOST_BYTES = 400_000_000  # of what is in it, with the headers
MOST_FILES = 50_000
TIMEOUT_S = 60  # without a byte
NAME = re.compile(rf"results/[A-Za-z0-9][\w.-]{{0,99}}/({results.STORED.pattern})")


def address() -> str:
    """Where the release of this version has its archive."""
    version = importlib.metadata.version(DISTRIBUTION)
    return f"{PROJECT}/releases/download/v{version}/results-v{version}.tar.gz"


def archive(root: Path, out: Path) -> None:
    """Write the results below `root` into a .tar.gz; the same results give the same bytes. Raises ResultsError, also
    for what `pull` would refuse."""
    _verified(root)
    files = {
        f"results/{folder.resolve().name}/{name}": folder / name
        for folder in results.folders(root)
        for name in results.contents(folder)
        if results.STORED.fullmatch(name)
    }
    with (
        out.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        tarfile.open(None, "w", packed) as tar,
    ):
        for name in sorted(files):
            content = files[name].read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))


def pull(source: str | None, into: Path) -> int:
    """Replace the results in `into` by those of `source`: an https address, an archive or a folder, by default the
    release of this version. Nothing is replaced unless all can be read and is as it was sealed. Returns the number of
    records. Raises ResultsError."""
    _ours(into)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=into.parent) as scratch:
        fresh = Path(scratch) / "results"
        source = address() if source is None else source
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
            with _downloaded(source) as file:
                _unpack(file, source, Path(scratch))
        elif Path(source).is_dir():
            _copy(Path(source), fresh)
        else:
            try:
                with Path(source).open("rb") as file:
                    _unpack(file, source, Path(scratch))
            except OSError as error:
                raise ResultsError(f"{source}: {error.strerror or error}") from None
        if not fresh.is_dir():
            raise ResultsError(f"{source}: no results in it")
        try:
            records = _verified(fresh)
        except ResultsError as error:
            raise ResultsError(f"{source}: {str(error).replace(f'{fresh}{os.sep}', '')}") from None
        if into.exists():
            into.rename(Path(scratch) / "replaced")
        fresh.rename(into)
    return records


def _ours(into: Path) -> None:
    """Raise ResultsError for a folder that holds anything but results, which would be lost."""
    for folder in into.iterdir() if into.exists() else ():
        if not (folder / "records").is_dir() or results.strays(folder):
            raise ResultsError(f"{into}: holds files that are no results; name another folder with BENCH_RESULTS")


def _verified(root: Path) -> int:
    """The number of records below `root`, each as it was sealed and each picture as its name says. Raises
    ResultsError."""
    records = 0
    for suite in results.read(root):
        records += len(suite.records)
        for name in results.contents(suite.folder):
            path = suite.folder / name
            if name.startswith("sheets/") and results.sheet_name(path.read_bytes()) != name:
                raise ResultsError(f"{path}: is not what its name was made from; {results.ANEW}")
    return records


def _copy(root: Path, fresh: Path) -> None:
    for folder in results.folders(root):
        for name in results.contents(folder):
            if results.STORED.fullmatch(name):
                (fresh / folder.resolve().name / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, fresh / folder.resolve().name / name)


@contextmanager
def _downloaded(url: str) -> Iterator[IO[bytes]]:
    """A temporary file with what is at an https address. Raises ResultsError."""
    if not url.startswith("https://"):
        raise ResultsError(f"{url}: only https:// addresses, archives and folders")
    with tempfile.TemporaryFile() as file:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                if not answer.url.startswith("https://"):
                    raise ResultsError(f"{url}: leads to {answer.url}, which is not https")
                shutil.copyfileobj(_Bounded(answer, MOST_PACKED), file)
        except OSError as error:  # URLError is one
            reason = getattr(error, "reason", None) or error
            raise ResultsError(f"{url}: cannot be fetched ({reason}); name a copy with --from") from None
        file.seek(0)
        yield file


class _Bounded(io.RawIOBase):
    """Reads from `source`, and refuses to go on after `most` bytes."""

    def __init__(self, source: IO[bytes], most: int) -> None:
        self.source, self.left = source, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        found = self.source.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(found)
        if self.left < 0:
            raise _TooLarge
        return found


class _TooLarge(ResultsError):
    def __init__(self) -> None:
        super().__init__("larger than any archive of results")


def _unpack(file: IO[bytes], source: str, into: Path) -> None:
    """Unpack the archive into `into`, which gets results/<suite>/... Raises ResultsError."""
    try:
        with gzip.GzipFile(fileobj=_Bounded(file, MOST_PACKED)) as packed:
            stream = _Bounded(packed, MOST_BYTES)  # type: ignore[arg-type]
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for count, member in enumerate(tar):
                    _admit(member, count)
                    tar.extract(member, into, set_attrs=False, filter="data")
    except ResultsError as error:
        raise ResultsError(f"{source}: {error}") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ResultsError(f"{source}: not an archive of results ({error})") from None


def _admit(member: tarfile.TarInfo, count: int) -> None:
    """Raise ResultsError for what has no place in an archive of results."""
    name = ascii(member.name)[1:-1][:120]
    if not member.isreg() or not NAME.fullmatch(member.name):
        raise ResultsError(f"{name} has no place in an archive of results")
    if count >= MOST_FILES or member.size > results.LARGEST:
        raise _TooLarge
