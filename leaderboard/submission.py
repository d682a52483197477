"""A submission: rows of a run on a branch of their own, checked, with the text of a pull request."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.runs.record import bare
from leaderboard import add_results
from leaderboard.check import refused
from leaderboard.results import Results, ResultsError, read_suite, state
from leaderboard.specs import as_written

HOME, SUITES = Path("leaderboard", "results"), Path("leaderboard", "suites")
MARKS = ("pyproject.toml", "leaderboard/results")  # of a checkout of this project


@dataclass(frozen=True)
class Submission:
    """branch: that holds the rows. files: of it, relative to the checkout. title, body: of the pull request."""

    branch: str
    files: tuple[str, ...]
    title: str
    body: str


def prepare(
    run: Path, suite: Path | None, checkout: Path, name: str, branch: str | None = None,
    current: Callable[[str], str] = as_written,
) -> Submission:  # fmt: skip
    """Put the rows of a run, and the suite's file if it is one of the submitter's own, on a new branch of the checkout,
    as one commit. The checkout is on that branch afterwards. current: see `add_results.add`.

    Raises ResultsError where the run has no rows, a failed one, or one that others could not make again; where the
    folder is no clean checkout; where the suite is not that of the rows' folder; and for what git refuses. Nothing is
    changed then.
    """
    rows = read_suite(run)
    _refuse(rows, checkout, name)
    _refuse_suite(suite, checkout, name)
    before = _git(checkout, "rev-parse", "--abbrev-ref", "HEAD")
    made = branch or f"results/{name}-{state(rows.records)[:8]}"
    _git(checkout, "switch", "-c", made)
    try:
        add_results.add(run, checkout / HOME / name, current)
        if suite is not None:
            (checkout / SUITES / suite.name).write_bytes(suite.read_bytes())
        _git(checkout, "add", "--", "leaderboard")
        files = tuple(_git(checkout, "diff", "--cached", "--name-only").splitlines())
        if not files:
            raise ResultsError(f"{run}: the checkout has all of its rows already")
        title, body = words(rows, name, len(files))
        _git(checkout, "commit", "-q", "-m", title, "-m", f"{len(rows.records)} records of one run.")
    except BaseException:
        _git(checkout, "reset", "-q", "--hard")
        _git(checkout, "clean", "-fdq", "--", "leaderboard")
        _git(checkout, "switch", "-q", before)
        _git(checkout, "branch", "-D", made)
        raise
    return Submission(made, files, title, body)


def _refuse(rows: Results, checkout: Path, name: str) -> None:
    if not rows.records:
        raise ResultsError(f"{rows.folder}: holds no records; give the folder that bench run SUITE -o DIR wrote")
    failed = [record for record in rows.records if record.error]
    if failed:
        raise ResultsError(
            f"{rows.folder}: {len(failed)} of {len(rows.records)} cells failed, such as {failed[0].key[:12]}; "
            "bench retry computes them again"
        )
    if lacking := refused(rows.records):
        key, words = lacking[0]
        raise ResultsError(
            f"{rows.folder}: the check refuses {len(lacking)} of {len(rows.records)} rows, such as {key[:12]}: {words}"
        )
    if not name or name != Path(name).name or name.startswith("."):
        raise ResultsError(f"{name!r} is no name of a folder below {HOME.as_posix()}")
    if any(not (checkout / mark).exists() for mark in MARKS):
        raise ResultsError(f"{checkout}: no checkout of this project; clone it, and give --checkout DIR")
    if _git(checkout, "status", "--porcelain"):
        raise ResultsError(f"{checkout}: has changes that are not committed; commit or stash them first")


def _refuse_suite(suite: Path | None, checkout: Path, name: str) -> None:
    """The check holds a folder of rows against the suite of its name."""
    there = checkout / SUITES / f"{name}.toml"
    if suite is None:
        if not there.is_file():
            raise ResultsError(f"{checkout}: has no suite {name}; give the file of yours with --suite")
        return
    if suite.name != there.name:
        raise ResultsError(f"{suite}: rows of {name} need the suite {there.name}; rename the file, or leave --name out")
    if there.is_file() and there.read_bytes() != suite.read_bytes():
        raise ResultsError(
            f"{suite}: the checkout has another suite of that name ({there}); rename yours, and run it under that name"
        )


def suites(checkout: Path) -> dict[str, Path]:
    """The suites of a checkout: name → file."""
    return {path.stem: path for path in sorted((checkout / SUITES).glob("*.toml"))}


def words(rows: Results, name: str, files: int) -> tuple[str, str]:
    """Title and body of the pull request, in Markdown."""
    records = rows.records
    defenses = sorted({bare(record.cell.defense) for record in records} - {"none", "finetune"})
    what = ", ".join(defenses[:3]) + (f" and {len(defenses) - 3} more" if len(defenses) > 3 else "")
    title = f"Add {len(records)} rows of {name}" + (f": {what}" if what else "")
    title = title if len(title) <= 72 else f"Add {len(records)} rows of {name}"
    commits = sorted({str(record.provenance.commit)[:12] for record in records})
    machines = sorted({record.provenance.processor or "unknown" for record in records})
    lines = [
        f"{len(records)} rows of the suite `{name}`, {files} files.",
        "",
        f"- defenses: {_listed(record.cell.defense for record in records)}",
        f"- attacks: {_listed(record.cell.attack for record in records)}",
        f"- models: {_listed(record.cell.model for record in records)}",
        f"- seeds: {', '.join(map(str, sorted({record.cell.seed for record in records})))}",
        f"- computed at {', '.join(commits)} on {', '.join(machines)}",
        "",
        "To be filled in:",
        "",
        "- [ ] On which seeds and data were the settings chosen? Seeds 10, 11 and 12 are for the table alone.",
        "- [ ] The defense's source, and its paper if there is one:",
        "- [ ] `bench leaderboard check` says all well, and `bench reproduce` was run for one row.",
    ]
    return title, "\n".join(lines) + "\n"


def _listed(specs: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted({bare(spec) for spec in specs}))


def _git(checkout: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ResultsError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200]
        raise ResultsError(f"git {words[0]} in {checkout}: {said}")
    return done.stdout.strip()
