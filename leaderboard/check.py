"""Whether committed results may be believed: form, digests, sizes, scores recomputed from per-sample values, one
protocol per table, controls, nothing dirty or partial. `bench leaderboard check` and every pull request run it.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
import tempfile
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from harness.runs import doubts
from harness.runs.declared import Declared
from harness.runs.doubts import CONTROLS, DoubtCode
from harness.runs.printable import printable
from harness.runs.record import Record, Source, bare
from harness.runs.records import GIT_S
from harness.types import Doubt
from leaderboard import (
    attestation,
    claims,
    copies,
    paper_claims,
    pictures,
    recompute,
    reported,
    results,
    wellformed,
)
from leaderboard.paired import Place, place
from leaderboard.rendering import picture_size
from leaderboard.results import Results, ResultsError
from leaderboard.specs import PARTS

OWN = "diffusion-defense-bench"
OLDER = Path(__file__).parent / "older.toml"
SEAL_DIGITS = 16
COMMIT_DIGITS = 12
MOST_LINES = 4  # about what one record says against itself
LIMIT = 25_000_000  # bytes of all results
PER_RECORD = 50_000  # bytes of a packed record and its contact sheet, on average; those of v1 take 46,000
CHECKOUT = (  # the way out for rows without a commit
    "install the bench from a checkout (git clone, pip install -e DIR) and run the same command again: the same code "
    "computes nothing again that the store holds"
)
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
    """problems fail the check; notes do not. recomputed of measured: scores, over all records. unverifiable: files
    of the rows of which something cannot be verified here, and notes say what."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    records: int = 0
    recomputed: int = 0
    measured: int = 0
    reproduced: int = 0
    bytes: int = 0
    unverifiable: list[str] = field(default_factory=list)


# ---- the checks -----------------------------------------------------------------------------------------------------


def check(
    root: Path, page: Path | None = None, declared: Declared | None = None, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Check the results below `root`, and the built page if one is given. declared: what the plugins and the suites
    say; without it, records are held against each other alone. tell: called with what is checked next. Raises
    ResultsError only where `root` holds no results at all."""
    outcome = Outcome()
    unknown: set[str] = set()
    every: list[Results] = []
    sealed: dict[Path, tuple[Record, str]] = {}
    for path in results.irregular(root):
        outcome.problems.append(Problem(str(path), results.IRREGULAR))
    folders = results.folders(root)
    for number, folder in enumerate(folders, 1):
        tell(f"checking {folder.name}, {number} of {len(folders)} ...")
        suite = _read(folder, outcome, sealed)
        if suite is not None:
            every.append(suite)
            published = frozenset(record.key for record, seal in sealed.values() if seal[:SEAL_DIGITS] in _older())
            unknown |= _suite(suite, outcome, declared, published)
    tell(f"comparing {outcome.records} records ...")
    _copies(every, outcome)
    _ages(sealed, outcome, root.resolve() == results.SHIPPED.resolve())
    unknown |= {str(path) for path, (record, _) in sealed.items() if wellformed.unverifiable(record)}
    unknown |= _commits(every, root, outcome)
    _reported(outcome)
    _size(root, outcome)
    if page is not None and not outcome.problems:
        tell(f"building the page anew, to compare it with {page} ...")
        _page(every, page, outcome)
    outcome.unverifiable = sorted(unknown)
    return outcome


def _read(folder: Path, outcome: Outcome, sealed: dict[Path, tuple[Record, str]]) -> Results | None:
    """A suite in which everything can be read and every record is as it was sealed; None, and what is wrong said.
    sealed: to which its records are added, each with its seal."""
    odd = {path.relative_to(folder).as_posix() for path in results.irregular(folder)}
    for name in sorted(set(results.strays(folder)) - odd):
        outcome.problems.append(Problem(str(folder / name), "no part of the results; move it elsewhere"))
    files = results.record_files(folder)
    found = [read for path in files if (read := _try(results.read_sealed, path, outcome)) is not None]
    if len(found) < len(files) or odd:
        return None
    sealed |= dict(zip(files, found, strict=True))
    records = [record for record, _ in found]
    return _try(lambda folder: results.read_suite(folder, records), folder, outcome)


def _try(read: Callable[[Path], T], path: Path, outcome: Outcome) -> T | None:
    try:
        return read(path)
    except ResultsError as error:
        file, _, words = str(error).partition(": ")
        outcome.problems.append(Problem(file, words))
        return None


def _ages(sealed: Mapping[Path, tuple[Record, str]], outcome: Outcome, whole: bool) -> None:
    """A record whose key nobody can compute again is believed only as it was published. That it is another one is said
    where nothing else says what does not fit. whole: all published rows are there, so that each seal has its row."""
    known, named = _older(), {problem.file for problem in outcome.problems}
    older: dict[Path, Counter[str]] = defaultdict(Counter)
    for path, (record, seal) in sealed.items():
        if not wellformed.unverifiable(record):
            continue
        older[path.parents[1]][record.provenance.commit or ""] += 1
        if seal[:SEAL_DIGITS] not in known and str(path) not in named:
            words = "holds no ingredients from which its key is computed again, and is no row as it was published "
            outcome.problems.append(Problem(str(path), f"{words}before they were kept; run it again"))
    gone = known - {seal[:SEAL_DIGITS] for _, seal in sealed.values()} if whole else ()
    if gone:
        words = f"names the seals of {len(gone)} rows that are not among the results, such as {min(gone)}"
        outcome.problems.append(Problem(str(OLDER), f"{words}; restore the rows, or take out seals of replaced rows"))
    for folder, commits in older.items():
        words = f"unverifiable: {commits.total()} rows were made before records held the ingredients of their keys"
        made = ", ".join(f"{printable(commit[:COMMIT_DIGITS])} ({rows})" for commit, rows in sorted(commits.items()))
        way = f"a row's own commit plans it: git checkout the commit, then bench run {printable(folder.name)}"
        outcome.notes.append(Problem(str(folder), f"{words}; {way}; commits (rows): {made}"))


@cache
def _older() -> frozenset[str]:
    """The first digits of the seals of all records that were published without ingredients."""
    return frozenset(tomllib.loads(OLDER.read_text(encoding="utf-8"))["seals"])


def _claims(suite: Results, declared: Declared, outcome: Outcome, published: frozenset[str]) -> set[str]:
    """What the plugins and the suite say otherwise; returns the files of the rows of which they cannot say all. Rows
    that were published before records named the versions of their plugins are not asked: today's plugins may be
    others."""
    open_: set[str] = set()
    for record in suite.records:
        if record.key in published:
            continue
        file = str(suite.record_file(record.key))
        wrong, unknown = claims.problems(record, declared)
        outcome.problems += [Problem(file, words) for words in wrong]
        outcome.notes += [Problem(file, words) for words in unknown]
        open_ |= {file} if unknown else set()
    wrong, unknown = claims.rows(suite, declared)
    outcome.problems += [Problem(str(suite.folder), words) for words in wrong]
    outcome.notes += [Problem(str(suite.folder), words) for words in unknown]
    return open_


def _copies(every: Sequence[Results], outcome: Outcome) -> None:
    """Nothing of one record stands in another that cannot have it."""
    files = {record.key: str(suite.record_file(record.key)) for suite in every for record in suite.records}
    records = [record for suite in every for record in suite.records]
    found = [*copies.across(records), *copies.near(records), *copies.attacks(records)]
    for suite in every:
        found += copies.sheets(suite.records)
    outcome.problems += [Problem(files[record.key], words) for record, words in found]
    by_file = [(str(suite.record_file(record.key)), record) for suite in every for record in suite.records]
    outcome.problems += [Problem(file, words) for file, words in copies.twins(by_file)]


def _commits(every: Sequence[Results], root: Path, outcome: Outcome) -> set[str]:
    """Commits that the checkout of this package does not have: nobody can say here what they hold. Returns the files
    of their rows."""
    gone: set[str] = set()
    named = sorted({r.provenance.commit for suite in every for r in suite.records if r.provenance.commit} - {""})
    unknown = [commit for commit in named if re.fullmatch(r"[0-9a-f]{40}", commit)]
    asked = ["git", "-C", str(Path(__file__).parent), "cat-file", "--batch-check"]
    try:
        done = subprocess.run(asked, input="\n".join(unknown), capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    if done.returncode == 0:
        for line in done.stdout.splitlines():
            commit, _, kind = line.partition(" ")
            if not kind.startswith("commit"):
                words = f"unverifiable: the commit {commit[:COMMIT_DIGITS]} is not in this checkout"
                outcome.notes.append(Problem(str(root), words))
                gone.add(commit)
    rows = [(suite, record) for suite in every for record in suite.records]
    return {str(suite.record_file(record.key)) for suite, record in rows if record.provenance.commit in gone}


def _suite(suite: Results, outcome: Outcome, declared: Declared | None, published: frozenset[str]) -> set[str]:
    """Returns the files of the rows of which the plugins cannot say all. published: keys of the rows that are as they
    were published before records held ingredients."""
    doubted = doubts.of(suite.records)
    for record in suite.records:
        file = str(suite.record_file(record.key))
        found = _first(wellformed.problems(record)) + _whole(suite, record) + honest(record)
        controls = _controls(record, suite.records)
        found += controls
        again = recompute.recompute(record.scores)
        outcome.problems += [Problem(file, words) for words in (*found, *again.problems)]
        outcome.notes += [Problem(file, words) for words in _remarks(record, () if controls else doubted[record.key])]
        outcome.records += 1
        outcome.recomputed += len(again.recomputed)
        outcome.measured += len(again.recomputed) + len(again.unsupported)
    outcome.problems += [Problem(str(file), words) for file, words in results.twins([suite])]
    unknown = set() if declared is None else _claims(suite, declared, outcome, published)
    _together(suite, outcome)
    _attestations(suite, outcome)
    _sheets(suite, outcome)
    return unknown


def _first(words: list[str]) -> list[str]:
    """The first of many lines about one record, and how many more there are."""
    left = len(words) - MOST_LINES
    return [*words[:MOST_LINES], f"and {left} more that no run would write"] if left > 0 else words


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
    """Nothing of a row is missing, and every picture is there."""
    found = []
    if not record.error and not record.scores:
        found.append("a row without scores and without an error")
    if record.error and record.scores:
        found.append("a row that failed and has scores")
    sheet = suite.sheet_file(record)
    if record.sheet is not None and (sheet is None or picture_size(sheet) == (0, 0)):
        found.append("its contact sheet is not there, or no WebP picture")
    elif sheet is not None and results.sheet_name(sheet.read_bytes()) != record.sheet:
        found.append(f"its contact sheet is not what its name {record.sheet} was made from")
    elif sheet is not None and not record.error and (name := pictures.differs(sheet, record)) is not None:
        found.append(f"its contact sheet shows other images than its scores are of: {name} differs")
    return found


def honest(record: Record) -> list[str]:
    """What a row lacks from which others would make it again: a commit that can be checked out, without changes, and
    the packages of its plugins."""
    commit, dirty = record.provenance.commit, record.provenance.dirty
    if dirty:
        return ["made from a working tree with uncommitted changes; commit, and run it again"]
    if commit is None or not re.fullmatch(r"[0-9a-f]{40}", commit) or dirty is None:
        return [f"names no commit that it was made from, as an installed copy of the bench knows none; {CHECKOUT}"]
    unsaid = sorted(set(PARTS) - set(record.provenance.sources))
    if unsaid and not wellformed.unverifiable(record):
        return [f"does not say where its {unsaid[0]}'s plugin comes from; run it again"]
    return [words for part, source in record.provenance.sources.items() for words in _foreign(part, source)]


def refused(records: Iterable[Record]) -> list[tuple[str, str]]:
    """The key of each record that the check refuses whatever stands beside it, and why, in words."""
    return [(record.key, words) for record in records for words in honest(record)[:1]]


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
            if row.attack_jobs != first.attack_jobs:
                words = f"another backdoored model than {first.key[:12]} of the same table and seed"
                outcome.problems.append(Problem(file, words))
            if row.attack_jobs == first.attack_jobs:
                outcome.problems += [Problem(file, words) for words in copies.beside(first, row)]
            outcome.problems += [Problem(file, words) for words in copies.undefended(row)]
            missing = sorted(set(first.scores) - set(row.scores))
            if missing:
                outcome.problems.append(Problem(file, f"partial: lacks {', '.join(missing[:4])}"))


def _attestations(suite: Results, outcome: Outcome) -> None:
    keys = {record.key: record for record in suite.records}
    for key, seen in suite.reproduced.items():
        file = str(suite.folder / "reproduced" / f"{key}.json")
        if key not in keys:
            outcome.problems.append(Problem(file, "attests a record that is not here"))
        elif seen.key != key:
            outcome.problems.append(Problem(file, "attests another record than the one that its name says"))
        else:
            outcome.problems += [Problem(file, words) for words in attestation.problems(seen, keys[key])]
        outcome.reproduced += seen.within


def _reported(outcome: Outcome) -> None:
    for file, read in ((reported.FILE, reported.read), (paper_claims.FILE, paper_claims.read)):
        try:
            read()
        except reported.ReportedError as error:
            outcome.problems.append(Problem(str(file), str(error)))


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
