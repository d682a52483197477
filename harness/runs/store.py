"""Content-addressed artifacts, records and job folders on disk. The only module that spells a path.

    artifacts/<kk>/<key>/    manifest.json and the files it lists; without its manifest it does not exist
    records/<key>.json       one a cell
    jobs/<kk>/<key>/         log.<attempt>.txt  outcome.<attempt>.json  events.jsonl  attempts.json
    runs/<suite>/            reports, run.json  events.jsonl
    rehearsals/              <device>.json: figures of rehearsed jobs  jobs/: a store of their logs
    quarantine/              damaged artifacts, until `gc`

Whatever appears under its final name is complete: it is filled under a temporary name, synced and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.runs.jsonable import to_jsonable

if TYPE_CHECKING:
    from harness.runs.record import Record

MANIFEST = "manifest.json"
FORMAT = 1
FOREIGN_S = 7 * 86400.0  # what another machine left for longer is abandoned
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(RuntimeError):
    """The store cannot be read or written; the message names the path and the way out."""


class MissingArtifact(StoreError):
    """No complete artifact under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"artifact {key[:12]} is not in the store; `bench run` builds it again")
        self.key = key


class CorruptArtifact(StoreError):
    """An artifact whose bytes are not those that were published; it has been moved out of the way."""

    def __init__(self, key: str, file: str) -> None:
        super().__init__(f"artifact {key[:12]} was damaged ({file}) and set aside; `bench run` builds it again")
        self.key = key
        self.file = file


def default_root() -> Path:
    """BENCH_STORE, else `diffusion-defense-bench` in the user's cache directory."""
    named = os.environ.get("BENCH_STORE")
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(cache) / "diffusion-defense-bench"


def _home() -> Path:
    """The user's home directory. Raises StoreError for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        raise StoreError("this user has no home directory; name a store by --store or BENCH_STORE") from None


class Store:
    """A store below `root`. Making the object touches no disk; the first write makes the folders."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self._verified: set[str] = set()

    # ---- artifacts

    def artifact(self, key: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / "artifacts" / _checked(key)[:2] / key

    def has(self, key: str) -> bool:
        """Whether the artifact is complete: its manifest parses and each file it lists is there in its size."""
        return self.fault(key) is None

    def manifest(self, key: str) -> dict[str, Any]:
        """{key, kind, label, facts, files: {name: {sha256, size}}, created, digest}. Raises MissingArtifact."""
        manifest = _read_json(self.artifact(key) / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("key") != key or not _lists_files(manifest.get("files")):
            raise MissingArtifact(key)
        return manifest

    def verify(self, key: str) -> list[str]:
        """The files whose bytes differ from what was published; [] when all is well, [manifest.json] without one."""
        try:
            manifest = self.manifest(key)
        except MissingArtifact:
            return [MANIFEST]
        folder = self.artifact(key)
        files = manifest["files"].items()
        damaged = [name for name, entry in files if _digest_or_none(folder / name) != entry["sha256"]]
        return damaged if manifest.pop("digest", None) == _seal(manifest) else [*damaged, MANIFEST]

    def open_artifact(self, key: str) -> Path:
        """The artifact's folder, its digests verified and its use noted on the first use in this process.

        Raises MissingArtifact, or CorruptArtifact after moving the damaged one to quarantine.
        """
        if key in self._verified and self.has(key):
            return self.artifact(key)
        if not self.artifact(key).exists():
            raise MissingArtifact(key)
        damaged = self.verify(key)
        if damaged:
            self.set_aside(key)
            raise CorruptArtifact(key, damaged[0])
        self._verified.add(key)
        with suppress(OSError):  # of a store that can only be read, nobody sees when it was used
            os.utime(self.artifact(key) / MANIFEST)
        return self.artifact(key)

    def publish(self, key: str, fill: Callable[[Path], Mapping[str, Any]], meta: Mapping[str, Any]) -> Path:
        """Make the artifact by `fill(folder) -> facts` and return its final folder.

        meta: more entries of the manifest (kind, label). If another writer was first, its artifact stays and ours is
        dropped. If `fill` raises, nothing is left. Raises StoreError when the disk is full or not writable.
        """
        final = self.artifact(key)
        with self._writing(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            draft = final.parent / _draft_name()
            draft.mkdir()
            try:
                facts = dict(fill(draft))
                _write_manifest(draft, {**meta, "key": key, "facts": facts})
                self._promote(key, draft, final)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return final

    def _promote(self, key: str, draft: Path, final: Path) -> None:
        for _ in range(10):
            try:
                os.rename(draft, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                if self.has(key):
                    return
                self.set_aside(key)
            else:
                _sync(final.parent)
                return
        raise StoreError(f"{final}: something keeps putting an incomplete artifact there; remove it and run again")

    def fault(self, key: str) -> str | None:
        """The first file of the artifact that is missing or of another size; the manifest, if it is that; else None."""
        try:
            files = self.manifest(key)["files"]
        except MissingArtifact:
            return MANIFEST
        folder = self.artifact(key)
        return next((name for name, entry in files.items() if _size(folder / name) != entry["size"]), None)

    def set_aside(self, key: str) -> None:
        """Move an artifact to the quarantine, so that the next run builds it again."""
        target = self.root / "quarantine" / f"{key}-{secrets.token_hex(4)}"
        self._verified.discard(key)
        with self._writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process was first
                os.rename(self.artifact(key), target)

    def remove(self, key: str) -> None:
        """Remove an artifact. It is gone at once; what a crash leaves of it is a draft, which `gc` removes."""
        final = self.artifact(key)
        doomed = final.parent / _draft_name()
        with self._writing(final), suppress(FileNotFoundError):  # another process was first
            os.rename(final, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def digest(self, path: Path) -> str:
        """sha256 of a file, as manifests have it."""
        return _digest(path)

    def keys(self) -> Iterator[str]:
        """The keys of all artifacts that have a manifest."""
        yield from (path.parent.name for path in sorted(self.root.glob(f"artifacts/??/[0-9a-f]*/{MANIFEST}")))

    def folders(self) -> list[str]:
        """The keys of all artifacts' folders, also of those without a manifest."""
        return sorted(path.name for path in self.root.glob("artifacts/??/*") if _is_key(path.name))

    def manifests(self) -> Iterator[tuple[dict[str, Any], float]]:
        """The manifests of all artifacts, ordered by key, each with the time of its last use in seconds since the
        epoch: when a process last opened it, else when it was published. Unreadable ones are passed over."""
        for key in self.folders():
            with suppress(MissingArtifact, OSError):
                yield self.manifest(key), (self.artifact(key) / MANIFEST).stat().st_mtime

    def verify_all(self) -> dict[str, list[str]]:
        """Damaged artifacts and their files; {} when all is well."""
        checked = {key: self.verify(key) for key in self.keys()}
        return {key: files for key, files in checked.items() if files}

    def stale(self, older_than: float = 3600.0) -> list[Path]:
        """Drafts that dead processes left over `older_than` seconds ago, and what is in the quarantine."""
        before = time.time() - older_than
        drafts = [path for path in self.root.glob("artifacts/??/.tmp-*") if _abandoned(path, before)]
        return drafts + list(self.root.glob("quarantine/*"))

    def gc(self, older_than: float = 3600.0) -> list[Path]:
        """Remove what is stale. Returns it."""
        stale = self.stale(older_than)
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        return stale

    # ---- records and runs

    def write_record(self, key: str, record: Record) -> Path:
        """Write a cell's record, all or nothing."""
        return self._write_json(self.root / "records" / f"{_checked(key)}.json", to_jsonable(record.model_dump()))

    def record(self, key: str) -> Record | None:
        """The record of a cell; None where there is none, or one of another form."""
        return _read_record(self.root / "records" / f"{_checked(key)}.json")

    def records(self) -> Iterator[Record]:
        """All records, ordered by key; files that are none are passed over."""
        for path in sorted(self.root.glob("records/*.json")):
            record = _read_record(path)
            if record is not None:
                yield record

    def broken_records(self, beginning: str) -> list[Path]:
        """The files of records whose keys begin so, and that `records` passes over."""
        paths = sorted(self.root.glob("records/*.json"))
        return [path for path in paths if path.stem.startswith(beginning) and _read_record(path) is None]

    def run_dir(self, suite: str) -> Path:
        """The folder of a suite's reports, made if need be. ValueError for a name that is not a plain file name."""
        if not re.fullmatch(r"[\w][\w.+-]*", suite):
            raise ValueError(f"suite name {suite!r}: use letters, digits, '-', '_' and '.'")
        return self._folder(self.root / "runs" / suite)

    def write_run(self, suite: str, run: Mapping[str, Any]) -> Path:
        """Stores the options and the jobs of a run, for `bench status` and `bench retry`."""
        return self._write_json(self.run_dir(suite) / "run.json", run)

    def run(self, suite: str) -> dict[str, Any] | None:
        """What `write_run` wrote last; None if there was no run. Raises StoreError for a file that is none of these."""
        path = self.root / "runs" / suite / "run.json"
        if not path.exists():
            return None
        wrong = _fault_of_run(path)
        if wrong:
            raise StoreError(f"{path}: no run that can be read ({wrong}); remove it, and run the suite again")
        return _read_json(path)

    def runs(self) -> list[str]:
        """Suites that were run, the newest run last."""
        found = {path.parent.name: path.stat().st_mtime for path in self.root.glob("runs/*/run.json")}
        return sorted(found, key=lambda name: found[name])

    def run_events(self, suite: str) -> Path:
        """The file to which the runs of a suite append their events, one JSON object a line."""
        return self.run_dir(suite) / "events.jsonl"

    # ---- rehearsals

    def rehearsal(self, device: str) -> dict[str, Any]:
        """The figures of a device, as `write_rehearsal` wrote them; {} if there are none."""
        found = _read_json(self.root / "rehearsals" / f"{device}.json")
        return found if isinstance(found, dict) else {}

    def write_rehearsal(self, device: str, figures: Mapping[str, Any]) -> Path:
        """Stores the figures of a device. ValueError for a name that is not a plain file name."""
        if not re.fullmatch(r"[\w][\w.+-]*", device):
            raise ValueError(f"device name {device!r}: use letters, digits, '-', '_' and '.'")
        return self._write_json(self.root / "rehearsals" / f"{device}.json", figures)

    def rehearsals(self) -> list[str]:
        """The devices that have figures."""
        return sorted(path.stem for path in self.root.glob("rehearsals/*.json"))

    def rehearsal_store(self) -> Store:
        """Where rehearsed jobs keep logs and, until the rehearsal is over, their artifacts."""
        return Store(self.root / "rehearsals" / "jobs")

    # ---- jobs

    def job_dir(self, key: str) -> Path:
        """The folder of a job's logs and attempts, made if need be."""
        return self._folder(self.root / "jobs" / _checked(key)[:2] / key)

    def job_keys(self, beginning: str) -> list[str]:
        """Keys that begin so, of all jobs that were ever begun."""
        if not re.fullmatch(r"[0-9a-f]{1,64}", beginning):
            return []
        return sorted(path.name for path in self.root.glob(f"jobs/{beginning[:2]}*/{beginning}*") if path.is_dir())

    def log_path(self, key: str, attempt: int) -> Path:
        return self.job_dir(key) / f"log.{attempt}.txt"

    def outcome_path(self, key: str, attempt: int) -> Path:
        return self.job_dir(key) / f"outcome.{attempt}.json"

    def events_path(self, key: str) -> Path:
        return self.job_dir(key) / "events.jsonl"

    def has_event(self, key: str, text: str) -> bool:
        """Whether `text` stands in the job's event file as it is to be seen from here; makes no folder."""
        try:
            return text in (self.root / "jobs" / _checked(key)[:2] / key / "events.jsonl").read_text(encoding="utf-8")
        except OSError:
            return False

    def engine_log(self) -> Path:
        return self._folder(self.root / "jobs") / "forkserver.txt"

    def outcome(self, key: str, attempt: int) -> dict[str, Any] | None:
        """What the job's process wrote last, None if it wrote nothing."""
        return _read_json(self.outcome_path(key, attempt))

    def write_outcome(self, key: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        self._write_json(self.outcome_path(key, attempt), outcome)

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Every attempt at this job so far, oldest first."""
        found = _read_json(self.root / "jobs" / _checked(key)[:2] / key / "attempts.json")
        return found if isinstance(found, list) and all(isinstance(attempt, dict) for attempt in found) else []

    def write_attempts(self, key: str, attempts: list[dict[str, Any]]) -> None:
        """Note them, all or nothing; after a loss of power they may be gone, which costs no result."""
        self._write_json(self.job_dir(key) / "attempts.json", attempts, synced=False)

    def lock(self, key: str) -> Any:
        """A file lock for the job `key`, not yet taken; it is free again when its holder dies."""
        from filelock import FileLock

        return FileLock(self._folder(self.root / "locks") / f"{_checked(key)}.lock")

    def lock_keys(self) -> list[str]:
        """The keys of all jobs that were ever locked; most of them are free again."""
        return sorted(path.stem for path in self.root.glob("locks/*.lock") if _is_key(path.stem))

    # ---- writing

    def _write_json(self, path: Path, value: Any, synced: bool = True) -> Path:
        draft = path.parent / _draft_name()
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(draft, json.dumps(value, indent=1, sort_keys=True).encode(), synced)
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        return path

    def _folder(self, path: Path) -> Path:
        with self._writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn a full or unwritable disk into a StoreError; every other error passes."""
        try:
            yield
        except Exception as error:
            code = error.errno if isinstance(error, OSError) else None
            if code in _FULL or "os error 28" in str(error):
                artifacts = self.root / "artifacts"
                way_out = f"free some, delete {artifacts} (all in it can be computed again), or name another store"
                way_out += " by --store or BENCH_STORE"
                raise StoreError(f"{path}: no space left; {way_out}") from error
            if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) and _below(error, self.root):
                raise StoreError(
                    f"{path}: cannot be written ({os.strerror(code)}); name another store by --store or BENCH_STORE"
                ) from error
            raise


def _is_key(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{8,64}", text) is not None


def _checked(key: str) -> str:
    if not _is_key(key):
        raise ValueError(f"{key!r} is not a key; keys are lower-case hex digits, as `key_of` makes them")
    return key


def _lists_files(files: Any) -> bool:
    return isinstance(files, dict) and all(isinstance(e, dict) and {"sha256", "size"} <= set(e) for e in files.values())


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Sync every file below `folder`, then write the manifest that lists them."""
    files: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"sha256": _digest(path), "size": path.stat().st_size}
    manifest = json.loads(json.dumps({**manifest, "files": files, "created": time.time(), "format": FORMAT}))
    manifest["digest"] = _seal(manifest)
    _write(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    for directory in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(directory)


def _seal(manifest: dict[str, Any]) -> str:
    """Digest of the manifest's own content, so that a changed fact shows as well as a changed file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes, synced: bool = True) -> None:
    with path.open("wb") as file:
        file.write(content)
        if synced:
            file.flush()
            os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_or_none(path: Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read_json(path: Path) -> Any:
    """The parsed file; None if it is not there or not JSON, or is nested too deeply to be ours."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class _Driver:
    host: str
    pid: int
    started: float


@dataclass(frozen=True)
class _Planned:
    key: str
    label: str
    needs: list[str]
    estimate: float


@dataclass(frozen=True)
class _Told:
    suite: str
    only: list[str]
    sets: list[str]
    files: list[str]
    out: str | None = None


@dataclass(frozen=True)
class _Settings:
    threads: int


@dataclass(frozen=True)
class _Run:
    driver: _Driver
    told: _Told
    settings: _Settings
    jobs: list[_Planned]


def _fault_of_run(path: Path) -> str | None:
    """The first place where a file is not what `Store.write_run` is given, in words."""
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(_Run).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        return error.strerror
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    return None


def _read_record(path: Path) -> Record | None:
    from pydantic import ValidationError

    from harness.runs.record import Record

    try:
        return Record.model_validate(_read_json(path))
    except ValidationError:
        return None


def _below(error: BaseException, root: Path) -> bool:
    """Whether an OSError is about a path of the store, or about a folder above it that could not be made."""
    named = getattr(error, "filename", None)
    if named is None:
        return False
    path = Path(os.fsdecode(named)).absolute()
    return path.is_relative_to(root) or root.is_relative_to(path)


def _draft_name() -> str:
    return f".tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _abandoned(draft: Path, before: float) -> bool:
    """Whether the writer of a draft is dead. Of a writer on another machine that shares the store only age can tell:
    its longest job takes less than FOREIGN_S."""
    *host, pid, _ = draft.name.removeprefix(".tmp-").split("-")
    ours = host in ([], [_host()])
    try:
        old = draft.stat().st_mtime <= (before if ours else before - FOREIGN_S)
    except OSError:
        return False
    return old and not (ours and pid.isdigit() and _alive(int(pid)))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
