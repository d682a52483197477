"""A folder of results, as it is committed: text and pictures only, and a manifest that seals them.

<suite>/manifest.json          {format, files: {path: sha256}, protocols: {key: hash}}
        records/<key>.json     one a cell, with per-sample values; one score a line; committed as .json.gz
        sheets/<hash>.png      contact sheets of at most 256 colours, by content: rows that show the same share one
        reproduced/<key>.json  what `bench reproduce --keep` found
        report.md  report.json  report.csv
        run.json  events.jsonl    beside a report in the store

Whatever else lies in the folder is somebody's own: it is neither sealed nor removed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.store import canonical

Record = Mapping[str, Any]
MANIFEST = "manifest.json"
FORMAT = 1
COLOURS = 256
LARGEST = 64_000_000  # bytes of a packed file, unpacked
PARTS = ("records", "sheets", "reproduced")
SHEET = re.compile(r"sheets/[0-9a-f]{8,64}\.png")
OURS = re.compile(
    rf"records/[0-9a-f]{{64}}\.json(\.gz)?|{SHEET.pattern}|reproduced/[0-9a-f]{{64}}\.json"
    r"|report\.(md|json|csv)|run\.json|events\.jsonl"
)
SHIPPED = Path(__file__).parent / "results"


class ResultsError(ValueError):
    """A folder of results that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Results:
    """One suite's results. reproduced: record key → the attestation. dropped: cells that the grid left out."""

    suite: str
    folder: Path
    records: tuple[dict[str, Any], ...]
    dropped: tuple[dict[str, Any], ...] = ()
    reproduced: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def record_file(self, key: str) -> Path:
        """Where a record is, or would be."""
        packed = self.folder / "records" / f"{key}.json.gz"
        return packed if packed.is_file() else packed.with_suffix("")

    def sheet_file(self, record: Record) -> Path | None:
        """A record's contact sheet; None where it has none or names a file that is not there."""
        name = record.get("sheet")
        return self.folder / name if name and (self.folder / name).is_file() else None


# ---- reading --------------------------------------------------------------------------------------------------------


def folders(root: Path) -> list[Path]:
    """`root` itself if it holds records, else its subfolders that do. Raises ResultsError if there are none."""
    found = [root] if (root / "records").is_dir() else sorted(p.parent for p in root.glob("*/records") if p.is_dir())
    if not found:
        raise ResultsError(f"{root}: no results here; a run writes them with bench run SUITE -o DIR")
    return found


def read(root: Path = SHIPPED) -> list[Results]:
    """The results below `root`, by suite name. Raises ResultsError, naming the file."""
    return [read_suite(folder) for folder in folders(root)]


def read_suite(folder: Path) -> Results:
    """One suite's results; records in the order of its report, those it does not name last."""
    report = load(folder / "report.json") if (folder / "report.json").is_file() else {}
    order = {str(record.get("key")): i for i, record in enumerate(report.get("records") or ())}
    found = [_record(path) for path in record_files(folder)]
    records = tuple(sorted(found, key=lambda record: order.get(str(record.get("key")), len(order))))
    reproduced = {path.stem: load(path) for path in _files(folder, "reproduced")}
    return Results(folder.resolve().name, folder, records, tuple(report.get("dropped") or ()), reproduced)


def record_files(folder: Path) -> list[Path]:
    return _files(folder, "records")


def _files(folder: Path, part: str) -> list[Path]:
    return [folder / name for name in contents(folder) if name.startswith(f"{part}/")]


def _record(path: Path) -> dict[str, Any]:
    """A record whose key is its file's name, so that no key can name a file elsewhere."""
    record = load(path)
    if record.get("key") != path.name.partition(".")[0]:
        raise ResultsError(f"{path}: a record is a file named for its key, which is hex digits")
    if record.get("sheet") is not None and not SHEET.fullmatch(str(record["sheet"])):
        raise ResultsError(f"{path}: its contact sheet should be sheets/<hash>.png, not {record['sheet']}")
    return record


def load(path: Path) -> dict[str, Any]:
    """A JSON object, NaN refused; of a .gz, unpacked. Raises ResultsError."""
    try:
        found = json.loads(_content(path), parse_constant=_no_constant)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ResultsError(f"{path}: a JSON {type(found).__name__}, not an object")
    return found


def _content(path: Path) -> bytes:
    """Raises OSError, ValueError."""
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


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON; what is unmeasured is null")


def find(every: Iterable[Results], start: str) -> tuple[Results, dict[str, Any]]:
    """The record whose key starts with `start`. Raises ResultsError where there is none, or several."""
    if not re.fullmatch(r"[0-9a-f]{4,64}", start):
        raise ResultsError(f"{start!r} is no key: give at least the first 4 of its hex digits, as a cell's page shows")
    found = {r["key"]: (results, r) for results in every for r in results.records if str(r["key"]).startswith(start)}
    if len(found) != 1:
        several = f"{len(found)} records: {', '.join(key[:12] for key in sorted(found)[:4])}" if found else "no record"
        raise ResultsError(f"key {start} names {several}")
    return next(iter(found.values()))


def cell_of(record: Record) -> str:
    """What two records of one cell have in common."""
    return canonical(record["cell"])


def twins(every: Iterable[Results], keys: Container[str] | None = None) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) for each record of a cell of which there is another one; of those in `keys`, by default of
    all. Code, weights or plugins changed between the two: they are no two seeds."""
    first: dict[str, tuple[str, Path]] = {}
    for results in every:
        for record in results.records:
            key, file = record["key"], results.record_file(record["key"])
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


def dump(record: Record) -> str:
    """A record (or a report) as JSON text: a line for each score, attempt and so on; per-sample values of single
    precision in their shortest form. Loading and dumping it again changes nothing."""
    body = ",\n".join(f' "{name}": {_nested(name, record[name])}' for name in sorted(record))
    return f"{{\n{body}\n}}\n"


def _nested(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and value:
        lines = [f"  {json.dumps(str(key))}: {_line(value[key])}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + "\n }"
    if isinstance(value, (list, tuple)) and value:
        return "[\n" + ",\n".join(f"  {_line(item)}" for item in value) + "\n ]"
    return _line(value)


def _line(value: Any) -> str:
    if isinstance(value, Mapping) and value.get("per_sample"):
        rest = _line({k: v for k, v in value.items() if k != "per_sample"})
        return f'{rest[:-1]}, "per_sample": [{", ".join(numbers(value["per_sample"]))}]}}'
    return json.dumps(null(value), sort_keys=True, allow_nan=False)


def numbers(values: Sequence[float | None]) -> list[str]:
    """Each number as the shortest text that reads back as itself; single-precision values as single precision."""
    import numpy as np

    exact = np.asarray(values, dtype=np.float64)  # None becomes NaN
    single = exact.astype(np.float32)
    if np.array_equal(single.astype(np.float64), exact, equal_nan=True):
        return [str(x) if math.isfinite(x) else "null" for x in single]
    return [json.dumps(x) if math.isfinite(x) else "null" for x in exact.tolist()]


def null(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): null(inner) for key, inner in value.items()}
    return [null(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_record(folder: Path, key: str, text: str, packed: bool = False) -> None:
    """Write records/<key>.json below `folder`, or its .json.gz, which stays as it is where it says the same: what
    zlib makes of a text depends on its version."""
    path = folder / "records" / f"{key}.json"
    gz = path.with_name(path.name + ".gz")
    if not packed:
        write_text(path, text)
        gz.unlink(missing_ok=True)
        return
    try:
        same = gz.is_file() and _content(gz) == text.encode()
    except ValueError:
        same = False
    if not same:
        _write(gz, gzip.compress(text.encode(), 9, mtime=0))
    path.unlink(missing_ok=True)


def prune(folder: Path, records: Sequence[Record]) -> None:
    """Remove the records, pictures and attestations in `folder` that are not of these records."""
    keys, sheets = {record["key"] for record in records}, {record.get("sheet") for record in records}
    for name in contents(folder):
        part, _, file = name.partition("/")
        known = name in sheets if part == "sheets" else file.partition(".")[0] in keys
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
    """Store a contact sheet below `folder`, with a palette of at most 256 colours (one that has a palette stays as it
    is), and return its name there, which is by content. Raises OSError, and ResultsError for what is no picture."""
    from PIL import Image

    content = sheet.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.mode != "P":
                small = io.BytesIO()
                picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
                content = small.getvalue()
    except (OSError, SyntaxError) as error:  # Pillow's words for what is no picture
        raise ResultsError(f"{sheet}: a contact sheet that is no picture ({error})") from None
    name = sheet_name(content)
    if not (folder / name).is_file() or (folder / name).read_bytes() != content:
        _write(folder / name, content)
    return name


def sheet_name(content: bytes) -> str:
    return f"sheets/{hashlib.sha256(content).hexdigest()[:20]}.png"


# ---- seals ----------------------------------------------------------------------------------------------------------


def seal(folder: Path) -> Path:
    """Write manifest.json over the results in `folder`."""
    records = [load(path) for path in record_files(folder)]
    manifest = {
        "format": FORMAT,
        "files": {name: digest(folder / name) for name in contents(folder)},
        "protocols": {record["key"]: protocol(record) for record in records},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return folder / MANIFEST


def contents(folder: Path) -> list[str]:
    """The files in `folder` that a manifest covers, as relative paths."""
    return sorted(name for name in _names(folder) if OURS.fullmatch(name) and (folder / name).is_file())


def strays(folder: Path) -> list[str]:
    """What lies in `folder` and is no part of results, as relative paths; a folder counts once."""
    return sorted(set(_names(folder)) - {MANIFEST, *PARTS, *contents(folder)})


def _names(folder: Path) -> Iterator[str]:
    for path in (*folder.glob("*"), *(path for part in PARTS for path in (folder / part).glob("*"))):
        yield path.relative_to(folder).as_posix()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def protocol(record: Record) -> str:
    """16 hex digits over all that must be equal before two rows may be compared: model, trigger, target, sampler,
    number of samples, and the key of the clean model's images, in which weights, noise and code are."""
    cell = record["cell"]
    jobs = (record.get("provenance") or {}).get("jobs") or {}
    clean = [key for key, job in jobs.items() if str(job.get("label", "")).startswith("sample clean inputs, clean ")]
    said = {name: cell.get(name) for name in ("model", "trigger", "target", "sampler", "n")}
    return hashlib.sha256(canonical({**said, "clean": sorted(clean)}).encode()).hexdigest()[:16]
