"""Whether committed results may be believed: form, digests, sizes, scores recomputed from per-sample values, one
protocol per table, controls, nothing dirty or partial. `bench leaderboard check` and every pull request run it.
"""

from __future__ import annotations

import filecmp
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from harness.runs import doubts
from harness.runs.doubts import CONTROLS, DoubtCode
from harness.runs.record import Record, Source, bare
from harness.types import Doubt
from leaderboard import recompute, reported, results
from leaderboard.paired import Place, attack_jobs, place
from leaderboard.rendering import picture_size
from leaderboard.results import Results, ResultsError

OWN = "diffusion-defense-bench"
LIMIT = 25_000_000  # bytes of all results
PER_RECORD = 25_000  # bytes of a packed record and its contact sheet, on average
T = TypeVar("T")


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


# ---- the checks -----------------------------------------------------------------------------------------------------


def check(root: Path, page: Path | None = None) -> Outcome:
    """Check the results below `root`, and the built page if one is given. Raises ResultsError only where `root` holds
    no results at all."""
    outcome = Outcome()
    every = []
    for folder in results.folders(root):
        suite = _read(folder, outcome)
        if suite is not None:
            every.append(suite)
            _suite(suite, outcome)
    _reported(outcome)
    _size(root, outcome)
    if page is not None and not outcome.problems:
        _page(every, page, outcome)
    return outcome


def _read(folder: Path, outcome: Outcome) -> Results | None:
    """A suite in which everything can be read and every record is as it was sealed; None, and what is wrong said."""
    for name in results.strays(folder):
        outcome.problems.append(Problem(str(folder / name), "no part of the results; move it elsewhere"))
    files = results.record_files(folder)
    records = [found for path in files if (found := _try(results.read_record, path, outcome)) is not None]
    if len(records) < len(files):
        return None
    return _try(lambda folder: results.read_suite(folder, records), folder, outcome)


def _try(read: Callable[[Path], T], path: Path, outcome: Outcome) -> T | None:
    try:
        return read(path)
    except ResultsError as error:
        file, _, words = str(error).partition(": ")
        outcome.problems.append(Problem(file, words))
        return None


def _suite(suite: Results, outcome: Outcome) -> None:
    doubted = doubts.of(suite.records)
    for record in suite.records:
        file = str(suite.record_file(record.key))
        found = _whole(suite, record) + _honest(record) + _controls(record, suite.records)
        again = recompute.recompute(record.scores)
        outcome.problems += [Problem(file, words) for words in (*found, *again.problems)]
        outcome.notes += [Problem(file, words) for words in _remarks(record, doubted[record.key])]
        outcome.records += 1
        outcome.recomputed += len(again.recomputed)
        outcome.measured += len(again.recomputed) + len(again.unsupported)
    outcome.problems += [Problem(str(file), words) for file, words in results.twins([suite])]
    _together(suite, outcome)
    _attestations(suite, outcome)
    _sheets(suite, outcome)


def _sheets(suite: Results, outcome: Outcome) -> None:
    """Every picture is of a record, and small."""
    named = {record.sheet for record in suite.records}
    for name in results.contents(suite.folder):
        size = (suite.folder / name).stat().st_size
        if name.startswith("sheets/") and name not in named:
            outcome.problems.append(Problem(str(suite.folder / name), "no record names this contact sheet; remove it"))
        elif name.startswith("sheets/") and size > results.SHEET_LIMIT:
            words = f"{size / 1e3:.0f} kB; a contact sheet has at most {results.SHEET_LIMIT / 1e3:.0f} kB"
            outcome.problems.append(Problem(str(suite.folder / name), words))


def _whole(suite: Results, record: Record) -> list[str]:
    """Nothing of a row is missing: every unmeasured score says why, and every picture is there."""
    found = []
    if not record.error and not record.scores:
        found.append("a row without scores and without an error")
    for name, score in record.scores.items():
        if math.isnan(score.value) and not score.warning:
            found.append(f"{name} is unmeasured and does not say why")
        kept = score.per_sample
        if kept and not math.isnan(score.value) and not len(kept) >= score.n >= 1:
            found.append(f"{name} has {len(kept)} per-sample values for n = {score.n}")
    sheet = suite.sheet_file(record)
    if record.sheet is not None and (sheet is None or picture_size(sheet) == (0, 0)):
        found.append("its contact sheet is not there, or no WebP picture")
    elif sheet is not None and results.sheet_name(sheet.read_bytes()) != record.sheet:
        found.append(f"its contact sheet is not what its name {record.sheet} was made from")
    return found


def _honest(record: Record) -> list[str]:
    """Made from a commit that others can check out."""
    commit, dirty = record.provenance.commit, record.provenance.dirty
    if dirty:
        return ["made from a working tree with uncommitted changes; commit, and run it again"]
    if commit is None or not re.fullmatch(r"[0-9a-f]{40}", commit) or dirty is None:
        return ["names no commit that it was made from; run it from a checkout of the repository"]
    return [words for part, source in record.provenance.sources.items() for words in _foreign(part, source)]


def _foreign(part: str, source: Source) -> list[str]:
    """What is missing where a plugin is of another distribution: what others would install to get the same code."""
    if source.distribution == OWN:
        return []
    who = f"the {part}'s plugin of {source.distribution}"
    if source.dirty:
        return [f"{who} had uncommitted changes; commit them, and run it again"]
    if source.version is None or source.code is None:
        return [f"{who} has no version or no digest of its code; make it a package, install it, and run it again"]
    return []


def _controls(record: Record, records: Sequence[Record]) -> list[str]:
    """The controls `none` and, where a model or a sampler is delivered, `finetune`, in the same place and seed."""
    if bare(record.cell.defense) in CONTROLS or record.error:
        return []
    wanted = CONTROLS if set(record.provenance.delivers) & {"model", "sampler"} else CONTROLS[:1]
    beside = {bare(o.cell.defense) for o in records if not o.error and place(o) == place(record)}
    missing = [name for name in wanted if name not in beside]
    return [f"its control is missing: {', '.join(missing)} in the same place with the same seed"] if missing else []


def _remarks(record: Record, doubted: Sequence[Doubt]) -> list[str]:
    if record.error:
        return [f"failed, shown as such: {record.error}"]
    return [doubt.text for doubt in doubted if doubt.code is DoubtCode.control_missing]


def _together(suite: Results, outcome: Outcome) -> None:
    """Rows of one table share one protocol, rows of one seed one backdoored model, and every score of the control."""
    tables: dict[Place, list[Record]] = defaultdict(list)
    for record in suite.records:
        if not record.error:
            tables[place(record)].append(record)
    for rows in tables.values():
        first = next((row for row in rows if bare(row.cell.defense) == "none"), rows[0])
        for row in rows:
            file = str(suite.record_file(row.key))
            if results.protocol(row) != results.protocol(first):
                words = f"another protocol than {first.key[:12]} of the same table (code or weights differ)"
                outcome.problems.append(Problem(file, words))
            if attack_jobs(row) != attack_jobs(first):
                words = f"another backdoored model than {first.key[:12]} of the same table and seed"
                outcome.problems.append(Problem(file, words))
            missing = sorted(set(first.scores) - set(row.scores))
            if missing:
                outcome.problems.append(Problem(file, f"partial: lacks {', '.join(missing[:4])}"))


def _attestations(suite: Results, outcome: Outcome) -> None:
    keys = {record.key for record in suite.records}
    for key, seen in suite.reproduced.items():
        file = str(suite.folder / "reproduced" / f"{key}.json")
        if key not in keys:
            outcome.problems.append(Problem(file, "attests a record that is not here"))
        elif seen.key != key:
            outcome.problems.append(Problem(file, "attests another record than the one that its name says"))
        outcome.reproduced += seen.within


def _reported(outcome: Outcome) -> None:
    try:
        reported.read()
    except reported.ReportedError as error:
        outcome.problems.append(Problem(str(reported.FILE), str(error)))


def _size(root: Path, outcome: Outcome) -> None:
    """What is stored is small enough to be committed. A run's own folder, with records that are not packed, may be
    larger."""
    files = [folder / name for folder in results.folders(root) for name in results.contents(folder)]
    outcome.bytes = sum(path.stat().st_size for path in files)
    packed = {path for path in files if path.suffix == ".gz"}
    if not packed:
        return
    if outcome.bytes > LIMIT:
        words = f"{outcome.bytes / 1e6:.1f} MB of results; at most {LIMIT / 1e6:.0f} MB are committed"
        outcome.problems.append(Problem(str(root), words))
    mean = sum(path.stat().st_size for path in files if path in packed or path.parent.name == "sheets") / len(packed)
    if mean > PER_RECORD:
        words = f"{mean / 1e3:.1f} kB per record with its contact sheet; at most {PER_RECORD / 1e3:.0f} kB on average"
        outcome.problems.append(Problem(str(root), words))


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
