"""A folder of results, as it is committed: records and pictures, one file each, so that two people who add rows to one
suite never change the same file. Everything else (tables, doubts, pages) follows from the records and is not stored.

<suite>/records/<key>.json.gz  one per cell, with per-sample values and, sealing it, `digest`; .json in a run's folder
        sheets/<hash>.webp     contact sheets of at most 30 kB, by content: rows that show the same share one
        dropped/<hash>.json    one per cell that the suite left out: the cell and the reason
        reproduced/<key>.json  what `bench reproduce --keep` found
        report.md  report.json  report.csv    for people, beside the records of a run
        run.json  events.jsonl                beside a report in the store

Whatever else lies in the folder is somebody's own: it is not removed.
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from harness.runs.jsonable import canonical, to_jsonable
from harness.runs.record import Dropped, Record
from leaderboard.attestation import Attestation

LARGEST = 64_000_000  # bytes of a packed file, unpacked
LARGEST_REPORT = 1_000_000_000  # bytes of report.json, which has all records of a run
SHEET_LIMIT = 30_000  # bytes of a contact sheet
WIDEST = 1600  # its pixels, at most
PARTS = ("records", "sheets", "dropped", "reproduced")
SHEET = re.compile(r"sheets/[0-9a-f]{8,64}\.webp")
STORED = re.compile(
    rf"records/[0-9a-f]{{64}}\.json(\.gz)?|{SHEET.pattern}|dropped/[0-9a-f]{{20}}\.json|reproduced/[0-9a-f]{{64}}\.json"
)
BESIDE = re.compile(r"report\.(md|json|csv)|run\.json|events\.jsonl")
SHIPPED = Path(__file__).parent / "results"
SEAL = "digest"
IRREGULAR = "a link, a pipe, a device or a folder; results are regular files, put the file itself here"
ANEW = "fetch it again, or compute it again with bench run SUITE -o DIR"
AGAIN = "fetch it again, or remove it and run bench reproduce --keep"
T = TypeVar("T")


class ResultsError(ValueError):
    """A folder of results that cannot be read; the message names the file."""


class NoResultsError(ResultsError):
    """There are no published results on this machine; the message names the command that fetches them."""


@dataclass(frozen=True)
class Results:
    """One suite's results. reproduced: record key → the attestation. dropped: cells that the grid left out. seals:
    record key → the seal of its file, for those that were read from files here."""

    suite: str
    folder: Path
    records: tuple[Record, ...]
    dropped: tuple[Dropped, ...] = ()
    reproduced: Mapping[str, Attestation] = field(default_factory=dict)
    seals: Mapping[str, str] = field(default_factory=dict)

    def record_file(self, key: str) -> Path:
        """Where a record is, or would be."""
        packed = self.folder / "records" / f"{key}.json.gz"
        return packed if packed.is_file() else packed.with_suffix("")

    def sheet_file(self, record: Record) -> Path | None:
        """A record's contact sheet; None where it has none or names a file that is not there."""
        name = record.sheet
        return self.folder / name if name and (self.folder / name).is_file() else None


# ---- where they are -------------------------------------------------------------------------------------------------


def pulled_root() -> Path:
    """Where `bench leaderboard pull` puts the published results: BENCH_RESULTS, else the user's data directory."""
    named = os.environ.get("BENCH_RESULTS")
    if named:
        return Path(named).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share"
    return Path(data) / "diffusion-defense-bench" / "results"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise NoResultsError("this user has no home directory; name a folder of results by BENCH_RESULTS") from None


def published_root() -> Path:
    """The published results: of the checkout that this package lies in, of the checkout around the current directory,
    or those that were pulled. Raises NoResultsError."""
    here = Path.cwd()
    checkouts = [folder / "leaderboard" / "results" for folder in (here, *here.parents)]
    for root in (SHIPPED, *checkouts, pulled_root()):
        if _holds_results(root):
            return root
    raise NoResultsError("no published results on this machine; bench leaderboard pull fetches them")


def _holds_results(root: Path) -> bool:
    return any(root.glob("records/*.json*")) or any(root.glob("*/records/*.json*"))


# ---- reading --------------------------------------------------------------------------------------------------------


def folders(root: Path) -> list[Path]:
    """`root` itself if it has a folder of records, else its subfolders that do. Raises ResultsError if no record is
    there."""
    found = [root] if (root / "records").is_dir() else sorted(p.parent for p in root.glob("*/records") if _is_own(p))
    if not any(any((folder / "records").iterdir()) for folder in found):
        raise ResultsError(f"{root}: no results here; a run writes them with bench run SUITE -o DIR")
    return found


def _is_own(records: Path) -> bool:
    """Whether a folder of records lies where it seems to lie."""
    return records.is_dir() and not records.is_symlink() and not records.parent.is_symlink()


def irregular(root: Path) -> list[Path]:
    """What lies below `root` and is neither a regular file nor a folder: links, pipes, devices; and folders that have
    the name of a file of results."""
    found = []
    for place, folders_, files in os.walk(root):
        paths = [Path(place) / name for name in (*folders_, *files)]
        found += [path for path in paths if path.is_symlink() or not (path.is_dir() or path.is_file())]
        found += [path for path in (Path(place) / name for name in folders_) if _as_stored(path)]
    return sorted(set(found))


def _as_stored(path: Path) -> bool:
    return STORED.fullmatch(f"{path.parent.name}/{path.name}") is not None


def read(root: Path | None = None) -> list[Results]:
    """The results below `root` (by default the published ones), by suite name. Raises ResultsError, naming the file."""
    with _uncollected():
        return [read_suite(folder) for folder in folders(published_root() if root is None else root)]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Records are many objects without cycles, each of which every collection of garbage would look at again."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.enable()


def read_suite(folder: Path, records: Iterable[Record] | None = None) -> Results:
    """One suite's results, in the order of `in_order`. records: where they have been read already. Raises
    ResultsError."""
    for path in irregular(folder):
        raise ResultsError(f"{path}: {IRREGULAR}")
    seals: dict[str, str] = {}
    if records is None:
        sealed = [read_sealed(path) for path in record_files(folder)]
        seals = {record.key: seal for record, seal in sealed}
        records = [record for record, _ in sealed]
    found = tuple(sorted(records, key=in_order))
    dropped = tuple(sorted((_dropped(path) for path in _files(folder, "dropped")), key=in_order))
    attested = _files(folder, "reproduced")
    reproduced = {path.stem: parsed(Attestation, load(path, AGAIN), path, AGAIN) for path in attested}
    return Results(folder.resolve().name, folder, found, dropped, reproduced, seals)


@dataclass(frozen=True)
class _Named:
    key: str


@dataclass(frozen=True)
class _Report:
    """What report.json says of which files lie beside it."""

    records: tuple[_Named, ...]
    dropped: tuple[Dropped, ...]


def of_one_run(found: Results) -> None:
    """Raise ResultsError unless the report.json of a run's folder, where it has one, can be read and names the records
    and dropped cells that are there, no more and no fewer."""
    path = found.folder / "report.json"
    if not path.is_file():
        return
    said = parsed(_Report, load(path, largest=LARGEST_REPORT), path)
    pairs = (
        ({f"records/{each.key}.json" for each in said.records}, {f"records/{each.key}.json" for each in found.records}),
        ({f"dropped/{_dropped_name(each)}" for each in said.dropped},
         {f"dropped/{_dropped_name(each)}" for each in found.dropped}),
    )  # fmt: skip
    gone = sorted(name for named, there in pairs for name in named - there)
    left = sorted(name for named, there in pairs for name in there - named)
    if gone:
        raise _broken(path, f"names {gone[0]}, which is not there ({len(gone)} such files)")
    if left:
        raise _broken(path, f"does not name {left[0]}, which is there ({len(left)} such files)")


def in_order(entry: Record | Dropped) -> tuple[Any, ...]:
    """A sort key for records and dropped cells: by setting, controls before defenses, seeds last."""
    cell = entry.cell
    setting = (cell.model, cell.attack != "none", cell.attack, cell.trigger, cell.target, cell.sampler, cell.n)
    control = {"none": 0, "finetune": 1}.get(cell.defense.partition("(")[0], 2)
    key = entry.key if isinstance(entry, Record) else ""
    return (*setting, control, cell.defense, cell.trigger_given != "true", cell.trigger_given, cell.seed, key)


def record_files(folder: Path) -> list[Path]:
    return _files(folder, "records")


def _files(folder: Path, part: str) -> list[Path]:
    return [folder / name for name in contents(folder) if name.startswith(f"{part}/")]


def read_record(path: Path) -> Record:
    """A record that has the form of one, is as it was sealed, and whose key is its file's name, so that no key can name
    a file elsewhere. Raises ResultsError."""
    return read_sealed(path)[0]


def read_sealed(path: Path) -> tuple[Record, str]:
    """A record as `read_record` reads it, and its seal. Raises ResultsError."""
    document = load(path)
    sealed = document.pop(SEAL, None)
    if document.get("key") != path.name.partition(".")[0]:
        raise _broken(path, "a record is a file named for its key, which is hex digits")
    if sealed != digest(document):
        raise _broken(path, "changed after it was sealed: its digest is not the sha256 of its content")
    record = parsed(Record, document, path)
    if record.sheet is not None and not SHEET.fullmatch(record.sheet):
        raise ResultsError(f"{path}: its contact sheet should be sheets/<hash>.webp, not {record.sheet}")
    place = _otherwise(document, record)
    if place is not None:
        raise ResultsError(
            f"{path}: {place}: not as a record is written; numbers are no texts, whole ones no fractions"
        )
    return record, str(sealed)


def _otherwise(document: Mapping[str, Any], record: Record) -> str | None:
    """The first place where a document says what it says in another form than a record is written in."""
    for name, score in document["scores"].items():
        kinds = {"value": {type(score["value"])} - {float, NoneType}, "n": {type(score["n"])} - {int}}
        kinds |= {
            part: set(map(type, score.get(part) or ())) - {float, NoneType} for part in ("interval", "per_sample")
        }
        odd = next((part for part, others in kinds.items() if others), None)
        if odd is not None:
            return f"scores.{name}.{odd}"
    rest = {name: value for name, value in document.items() if name != "scores"}
    return _differs(rest, to_jsonable(record.model_copy(update={"scores": {}})), "")


def _differs(written: Any, read: Any, place: str) -> str | None:
    """The first place where `read` is not `written`, type for type; what was not written is left aside."""
    if isinstance(written, dict) and isinstance(read, dict):
        inner = ((f"{place}.{name}".lstrip("."), value, read.get(name)) for name, value in written.items())
        return next((found for at, a, b in inner if (found := _differs(a, b, at)) is not None), None)
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = ((f"{place}.{i}", a, b) for i, (a, b) in enumerate(zip(written, read, strict=True)))
        return next((found for at, a, b in pairs if (found := _differs(a, b, at)) is not None), None)
    return None if type(written) is type(read) and written == read else place or "file"


def _dropped(path: Path) -> Dropped:
    """A cell that the suite left out. Raises ResultsError."""
    entry = parsed(Dropped, load(path), path)
    if path.name != _dropped_name(entry):
        raise ResultsError(f"{path}: its name should be {_dropped_name(entry)}, which follows from its cell")
    return entry


def _broken(path: Path, words: str, way: str = ANEW) -> ResultsError:
    return ResultsError(f"{path}: {words}; {way}")


def parsed(form: type[T], document: Any, path: Path, way: str = ANEW) -> T:
    """`document` as `form`. Raises ResultsError that names the file, the first place that is wrong and the way out."""
    try:
        return _adapter(form).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _broken(path, f"{place or 'file'}: {first['msg']}", way) from None


@cache
def _adapter(form: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(form)


def load(path: Path, way: str = ANEW, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object, NaN refused; of a .gz, unpacked. way: out of an error. largest: bytes that are read. Raises
    ResultsError."""
    try:
        found = json.loads(_content(path, largest), parse_constant=_no_constant, object_pairs_hook=_distinct_names)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"not JSON ({error})", way) from None
    if not isinstance(found, dict):
        raise _broken(path, f"a JSON {type(found).__name__}, not an object", way)
    return found


def _content(path: Path, largest: int = LARGEST) -> bytes:
    """Raises OSError, ValueError."""
    if path.stat().st_size > largest:
        raise ValueError(f"more than {largest / 1e6:.0f} MB")
    found = path.read_bytes()
    if path.suffix != ".gz":
        return found
    try:
        text = gzip.GzipFile(fileobj=io.BytesIO(found)).read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from None
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST / 1e6:.0f} MB once unpacked")
    return text


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!a} stands twice in one object")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON; what is unmeasured is null")


def find(every: Iterable[Results], start: str) -> tuple[Results, Record]:
    """The record whose key starts with `start`. Raises ResultsError where there is none, or several."""
    if not re.fullmatch(r"[0-9a-f]{4,64}", start):
        raise ResultsError(f"{start!r} is no key: give at least the first 4 of its hex digits, as a cell's page shows")
    found = {r.key: (results, r) for results in every for r in results.records if r.key.startswith(start)}
    if len(found) != 1:
        several = f"{len(found)} records: {', '.join(key[:12] for key in sorted(found)[:4])}" if found else "no record"
        raise ResultsError(f"key {start} names {several}")
    return next(iter(found.values()))


def state(records: Iterable[Record]) -> str:
    """12 hex digits over the keys of records: the same for the same records in any order."""
    return hashlib.sha256("".join(sorted(record.key for record in records)).encode()).hexdigest()[:12]


def cell_of(entry: Record | Dropped) -> str:
    """What two records of one cell have in common."""
    return canonical(to_jsonable(entry.cell))


def twins(every: Iterable[Results], keys: Container[str] | None = None) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) for each record of a cell of which there is another one; of those in `keys`, by default of
    all. Code, weights or plugins changed between the two: they are no two seeds."""
    first: dict[str, tuple[str, Path]] = {}
    for results in every:
        for record in results.records:
            key, file = record.key, results.record_file(record.key)
            if keys is not None and key not in keys:
                continue
            known, other = first.setdefault(cell_of(record), (key, file))
            if known != key:
                way = "remove the outdated one, or run the suite again with the same -o"
                yield file, f"a second record of the cell of {other}; {way}"


def distinct(every: Sequence[Results], keys: Container[str] | None = None) -> None:
    """Raise ResultsError where two records are of one cell."""
    for file, words in twins(every, keys):
        raise ResultsError(f"{file}: {words}")


# ---- writing --------------------------------------------------------------------------------------------------------


def stored(record: Record) -> dict[str, Any]:
    """What is written of a record: NaN as None, per-sample values of single precision, and its digest. Doing it again
    changes nothing."""
    kept = to_jsonable(record)
    kept["scores"] = {name: _single(score) for name, score in kept["scores"].items()}
    return {**kept, SEAL: digest(kept)}


def digest(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (harness.runs.jsonable) of a record without its seal."""
    kept = {name: value for name, value in document.items() if name != SEAL}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def dump(value: Mapping[str, Any]) -> str:
    """JSON text with a line for each score, attempt and so on. Loading and dumping it again changes nothing."""
    body = ",\n".join(f' "{name}": {_nested(value[name])}' for name in sorted(value))
    return f"{{\n{body}\n}}\n"


def _nested(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        lines = [f"  {json.dumps(str(key))}: {_line(value[key])}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + "\n }"
    if isinstance(value, (list, tuple)) and value:
        return "[\n" + ",\n".join(f"  {_line(item)}" for item in value) + "\n ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(to_jsonable(value), sort_keys=True, allow_nan=False)


def _single(score: Any) -> Any:
    kept = score.get("per_sample") if isinstance(score, Mapping) else None
    return {**score, "per_sample": singles(kept)} if kept else score


def singles(values: Sequence[float | None]) -> list[float | None]:
    """Each value as the number whose text is the shortest that reads back as the same single-precision value."""
    import numpy as np

    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, dtype=np.float32)]  # None becomes NaN


def write_record(folder: Path, record: Record, packed: bool = False) -> None:
    """Seal a record and write it as records/<key>.json below `folder`, or as .json.gz, which stays as it is where it
    says the same: what zlib makes of a text depends on its version."""
    path = folder / "records" / f"{record.key}.json"
    gz = path.with_name(path.name + ".gz")
    text = dump(stored(record)).encode()
    if not packed:
        _write(path, text)
        gz.unlink(missing_ok=True)
        return
    try:
        same = gz.is_file() and _content(gz) == text
    except ValueError:
        same = False
    if not same:
        _write(gz, gzip.compress(text, 9, mtime=0))
    path.unlink(missing_ok=True)


def write_dropped(folder: Path, entry: Dropped) -> None:
    """Write a cell that the suite left out as dropped/<hash>.json below `folder`."""
    text = json.dumps(to_jsonable(entry), sort_keys=True, indent=1) + "\n"
    _write(folder / "dropped" / _dropped_name(entry), text.encode())


def _dropped_name(entry: Dropped) -> str:
    return hashlib.sha256(cell_of(entry).encode("utf-8", "surrogatepass")).hexdigest()[:20] + ".json"


def prune(folder: Path, records: Sequence[Record], dropped: Sequence[Dropped]) -> None:
    """Remove what is stored in `folder` and is not of these records and dropped cells."""
    keys, sheets = {record.key for record in records}, {record.sheet for record in records}
    left_out = {_dropped_name(entry) for entry in dropped}
    for name in contents(folder):
        part, _, file = name.partition("/")
        known = {"sheets": name in sheets, "dropped": file in left_out}.get(part, file.partition(".")[0] in keys)
        if part in PARTS and not known:
            (folder / name).unlink()


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    _write(path, text.encode())


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    part.replace(path)


def keep_sheet(sheet: Path, folder: Path) -> str:
    """Store a contact sheet below `folder` as WebP of at most SHEET_LIMIT bytes (one that is so already stays as it
    is), and return its name there, which is by content. Raises OSError, and ResultsError for what is no picture."""
    from PIL import Image

    content = sheet.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format != "WEBP" or len(content) > SHEET_LIMIT:
                content = _small(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for what is no picture
        raise ResultsError(f"{sheet}: a contact sheet that is no picture ({error})") from None
    name = sheet_name(content)
    if not (folder / name).is_file() or (folder / name).read_bytes() != content:
        _write(folder / name, content)
    return name


def _small(picture: Any) -> bytes:
    """WebP of at most SHEET_LIMIT bytes: at first of less quality, in which its labels stay legible, then smaller."""
    picture.thumbnail((WIDEST, WIDEST))
    while True:
        for quality in (60, 50, 40, 30):
            packed = io.BytesIO()
            picture.save(packed, "WEBP", quality=quality, method=6)
            if packed.tell() <= SHEET_LIMIT:
                return packed.getvalue()
        share = min(0.9, math.sqrt(SHEET_LIMIT / packed.tell()))
        picture = picture.resize((max(1, int(picture.width * share)), max(1, int(picture.height * share))))


def sheet_name(content: bytes) -> str:
    return f"sheets/{hashlib.sha256(content).hexdigest()[:20]}.webp"


# ---- contents -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    """The results in `folder` and what a run wrote beside them, as relative paths."""
    return sorted(
        name
        for name in _names(folder)
        if (STORED.fullmatch(name) or BESIDE.fullmatch(name)) and _regular(folder / name)
    )


def _regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and not path.parent.is_symlink()


def strays(folder: Path) -> list[str]:
    """What lies in `folder` and is no part of results, as relative paths; a folder counts once."""
    return sorted(set(_names(folder)) - {*PARTS, *contents(folder)})


def _names(folder: Path) -> Iterator[str]:
    for path in (*folder.glob("*"), *(path for part in PARTS for path in (folder / part).glob("*"))):
        yield path.relative_to(folder).as_posix()


def protocol(record: Record) -> str:
    """16 hex digits over all that must be equal before two rows may be compared: model, trigger, target, sampler,
    number of samples, and the key of the clean model's images, in which weights, noise and code are."""
    jobs = record.provenance.jobs
    clean = [key for key, job in jobs.items() if job.label.startswith("sample clean inputs, clean ")]
    said = {name: getattr(record.cell, name) for name in ("model", "trigger", "target", "sampler", "n")}
    return hashlib.sha256(canonical({**said, "clean": sorted(clean)}).encode()).hexdigest()[:16]
