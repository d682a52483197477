"""Whether committed results may be believed: schema, digests, scores recomputed from per-sample values, one protocol a
table, controls, nothing dirty or partial. `bench leaderboard check` runs it, and so does a contributor's pull request.
"""

from __future__ import annotations

import filecmp
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leaderboard import recompute, report, reported, results
from leaderboard.paired import place
from leaderboard.rendering import png_size
from leaderboard.results import MANIFEST, Results, ResultsError
from leaderboard.tables import CONTROLS, bare

LIMIT = 60_000_000  # bytes of results and page together
Record = Mapping[str, Any]
Annotate = Callable[[Sequence[Record]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which file."""

    file: str
    words: str

    def __str__(self) -> str:
        return f"{self.file}: {self.words}"


@dataclass
class Outcome:
    """problems fail the check; notes do not. recomputed of measured: scores, over all records."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    records: int = 0
    recomputed: int = 0
    measured: int = 0
    reproduced: int = 0
    bytes: int = 0


# ---- schema ---------------------------------------------------------------------------------------------------------


class _Cell(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    attack: str
    trigger: str
    target: str
    defense: str
    sampler: str
    seed: int
    told: Literal["truth", "wrong-trigger"]
    n: Annotated[int, Field(ge=1)]


class _Score(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: float | None
    n: Annotated[int, Field(ge=0)]
    higher_is_better: bool | None
    interval: tuple[float, float] | None
    per_sample: tuple[float | None, ...] | None = None
    warning: str | None


class _Job(BaseModel):
    kind: str
    label: str


class _Provenance(BaseModel):
    commit: str | None
    dirty: bool | None
    jobs: dict[str, _Job]
    track: str
    versions: dict[str, str | None]


class _Record(BaseModel):
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    cell: _Cell
    scores: dict[str, _Score]
    warnings: list[str]
    error: str | None
    attempts: list[dict[str, Any]]
    knowledge: list[str]
    provenance: _Provenance
    doubts: list[str]
    sheet: str | None


# ---- the checks -----------------------------------------------------------------------------------------------------


def check(root: Path, annotate: Annotate, page: Path | None = None) -> Outcome:
    """Check the results below `root`, and the built page if one is given.

    annotate: harness.doubts.annotate; the doubts stored must be those that it gives. Raises ResultsError
    only where `root` holds no results at all.
    """
    outcome = Outcome()
    every = []
    for folder in results.folders(root):
        before = len(outcome.problems)
        _digests(folder, outcome)
        try:
            suite = results.read_suite(folder)
        except ResultsError as error:
            file, _, words = str(error).partition(": ")
            outcome.problems.append(Problem(file, words))
            continue
        if _schema(suite, outcome):
            every.append(suite)
            _suite(suite, outcome, annotate, derive=len(outcome.problems) == before)
    _reported(outcome)
    _size([root, *([page] if page else [])], outcome)
    if page is not None and not outcome.problems:
        _page(every, page, outcome)
    return outcome


def _digests(folder: Path, outcome: Outcome) -> None:
    """Every file is as the manifest says, and the manifest says every file."""
    path = folder / MANIFEST
    try:
        manifest = results.load(path)
        files = dict(manifest["files"])
    except (ResultsError, KeyError, TypeError) as error:
        words = f"no readable manifest ({error}); bench leaderboard refresh {folder} writes it"
        outcome.problems.append(Problem(str(path), words))
        return
    if manifest.get("format") != results.FORMAT:
        outcome.problems.append(Problem(str(path), f"format {manifest.get('format')}, this version reads 1"))
    for name in results.strays(folder):
        outcome.problems.append(Problem(str(folder / name), "no part of the results; move it elsewhere"))
    there = set(results.contents(folder))
    for name in sorted(there | set(files)):
        if name not in there:
            outcome.problems.append(Problem(str(folder / name), "the manifest lists it, but it is not there"))
        elif name not in files:
            outcome.problems.append(Problem(str(folder / name), "the manifest does not list it"))
        elif results.digest(folder / name) != files[name]:
            outcome.problems.append(Problem(str(folder / name), "changed: its sha256 is not the manifest's"))


def _schema(suite: Results, outcome: Outcome) -> bool:
    """Whether every record has the form of one; says what has not."""
    sound = True
    for record in suite.records:
        file = str(suite.record_file(str(record.get("key"))))
        try:
            _Record.model_validate(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            outcome.problems.append(Problem(file, f"{place}: {first['msg']}"))
            sound = False
    return sound


def _suite(suite: Results, outcome: Outcome, annotate: Annotate, derive: bool) -> None:
    protocols = results.load(suite.folder / MANIFEST).get("protocols") if (suite.folder / MANIFEST).is_file() else {}
    for record, doubted in zip(suite.records, annotate(suite.records), strict=True):
        file = str(suite.record_file(record["key"]))
        found = _whole(suite, record) + _honest(record) + _controls(record, suite.records)
        if (protocols or {}).get(record["key"]) != results.protocol(record):
            found.append("its protocol hash is not the manifest's")
        if list(record["doubts"]) != doubted["doubts"]:
            found.append("its doubts are not those that the records give; bench leaderboard refresh writes them anew")
        again = recompute.recompute(record["scores"])
        outcome.problems += [Problem(file, words) for words in (*found, *again.problems)]
        outcome.notes += [Problem(file, words) for words in _remarks(record)]
        outcome.records += 1
        outcome.recomputed += len(again.recomputed)
        outcome.measured += len(again.recomputed) + len(again.unsupported)
    outcome.problems += [Problem(str(file), words) for file, words in results.twins([suite])]
    _together(suite, outcome)
    _attestations(suite, outcome)
    if derive:
        for name, text in report.derived(suite.records, suite.dropped, suite.folder).items():
            path = suite.folder / name
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                words = f"not what the records give; bench leaderboard refresh {suite.folder} writes it anew"
                outcome.problems.append(Problem(str(path), words))


def _whole(suite: Results, record: Record) -> list[str]:
    """Nothing of a row is missing: every unmeasured score says why, and every picture is there."""
    found = []
    if not record["error"] and not record["scores"]:
        found.append("a row without scores and without an error")
    for name, score in record["scores"].items():
        if score["value"] is None and not score["warning"]:
            found.append(f"{name} is unmeasured and does not say why")
        kept = score.get("per_sample")
        if kept and score["value"] is not None and not len(kept) >= score["n"] >= 1:
            found.append(f"{name} has {len(kept)} per-sample values for n = {score['n']}")
    sheet = suite.sheet_file(record)
    if record["sheet"] is not None and (sheet is None or png_size(sheet) == (0, 0)):
        found.append("its contact sheet is not there, or no PNG")
    elif sheet is not None and results.sheet_name(sheet.read_bytes()) != record["sheet"]:
        found.append(f"its contact sheet is not what its name {record['sheet']} was made from")
    return found


def _honest(record: Record) -> list[str]:
    """Made from a commit that others can check out."""
    commit, dirty = record["provenance"]["commit"], record["provenance"]["dirty"]
    if dirty:
        return ["made from a working tree with uncommitted changes; commit, and run it again"]
    if commit is None or not re.fullmatch(r"[0-9a-f]{40}", commit) or dirty is None:
        return ["names no commit that it was made from; run it from a checkout of the repository"]
    return []


def _controls(record: Record, records: Sequence[Record]) -> list[str]:
    """The controls `none` and, where a model or a sampler is delivered, `finetune`, in the same place and seed."""
    cell = record["cell"]
    if bare(cell["defense"]) in CONTROLS or record["error"]:
        return []
    delivers = set(record["provenance"].get("delivers") or ("model",))
    wanted = CONTROLS if delivers & {"model", "sampler"} else CONTROLS[:1]
    beside = {bare(o["cell"]["defense"]) for o in records if not o["error"] and place(o) == place(record)}
    missing = [name for name in wanted if name not in beside]
    return [f"its control is missing: {', '.join(missing)} in the same place with the same seed"] if missing else []


def _remarks(record: Record) -> list[str]:
    if record["error"]:
        return [f"failed, shown as such: {record['error']}"]
    return [words for words in record["doubts"] if words.startswith("control missing")]


def _together(suite: Results, outcome: Outcome) -> None:
    """Rows of one table share one protocol, rows of one seed one backdoored model, and every score of the control."""
    tables: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in suite.records:
        if not record["error"]:
            tables[place(record)].append(record)
    for rows in tables.values():
        first = next((row for row in rows if bare(row["cell"]["defense"]) == "none"), rows[0])
        for row in rows:
            file = str(suite.record_file(row["key"]))
            if results.protocol(row) != results.protocol(first):
                words = f"another protocol than {first['key'][:12]} of the same table (code or weights differ)"
                outcome.problems.append(Problem(file, words))
            if _jobs(row, "attack") != _jobs(first, "attack"):
                words = f"another backdoored model than {first['key'][:12]} of the same table and seed"
                outcome.problems.append(Problem(file, words))
            missing = sorted(set(first["scores"]) - set(row["scores"]))
            if missing:
                outcome.problems.append(Problem(file, f"partial: lacks {', '.join(missing[:4])}"))


def _jobs(record: Record, kind: str) -> set[str]:
    return {key for key, job in record["provenance"]["jobs"].items() if job["kind"] == kind}


def _attestations(suite: Results, outcome: Outcome) -> None:
    keys = {record["key"] for record in suite.records}
    for key, seen in suite.reproduced.items():
        file = str(suite.folder / "reproduced" / f"{key}.json")
        if key not in keys:
            outcome.problems.append(Problem(file, "attests a record that is not here"))
        elif seen.get("key") != key or not isinstance(seen.get("within"), bool):
            outcome.problems.append(Problem(file, "not an attestation of bench reproduce --keep"))
        outcome.reproduced += seen.get("within") is True


def _reported(outcome: Outcome) -> None:
    try:
        reported.read()
    except reported.ReportedError as error:
        outcome.problems.append(Problem(str(reported.FILE), str(error)))


def _size(folders: Iterable[Path], outcome: Outcome) -> None:
    outcome.bytes = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    if outcome.bytes > LIMIT:
        words = f"results and page take {outcome.bytes / 1e6:.1f} MB, at most {LIMIT / 1e6:.0f} MB are committed"
        outcome.problems.append(Problem(", ".join(map(str, folders)), words))


def _page(every: Sequence[Results], page: Path, outcome: Outcome) -> None:
    """The page is, byte for byte, what the records give."""
    from leaderboard import site

    with tempfile.TemporaryDirectory(prefix="bench-page-") as folder:
        fresh = Path(folder)
        site.build(every, fresh)
        names = {p.relative_to(root).as_posix() for root in (fresh, page) for p in root.rglob("*") if p.is_file()}
        for name in sorted(names):
            if not (fresh / name).is_file():
                outcome.problems.append(Problem(str(page / name), "no part of the page that the records give"))
            elif not (page / name).is_file() or not filecmp.cmp(fresh / name, page / name, shallow=False):
                words = f"not what the records give; bench leaderboard build -o {page} writes it anew"
                outcome.problems.append(Problem(str(page / name), words))
