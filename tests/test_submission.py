"""`bench leaderboard submit`: rows of a run on a branch, with the text of a pull request."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from harness.cli import call
from leaderboard import results, submission
from leaderboard.results import ResultsError
from tests.records import changed, record, small, write_suite


def git(checkout: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the layout of this project's and one published row."""
    root = tmp_path / "checkout"
    write_suite(root / "leaderboard" / "results" / "quick", [record("none")])
    (root / "leaderboard" / "suites").mkdir()
    (root / "leaderboard" / "suites" / "quick.toml").write_text("title = 'quick'\n")
    (root / "pyproject.toml").write_text("")
    git(root.parent, "init", "-q", "-b", "main", str(root))
    for name, value in (("user.name", "x"), ("user.email", "x@example.org"), ("commit.gpgsign", "false")):
        git(root, "config", name, value)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "Begin")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "run", small())


def test_rows_and_suite_are_one_commit_on_a_branch_of_their_own(checkout: Path, run: Path, tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text("title = 'mine'\n")
    before = git(checkout, "rev-parse", "main")
    made = submission.prepare(run, suite, checkout, "mine")
    assert git(checkout, "rev-parse", "--abbrev-ref", "HEAD") == made.branch and made.branch.startswith("results/mine-")
    assert git(checkout, "rev-parse", "main") == before == git(checkout, "rev-parse", "HEAD~1")
    assert git(checkout, "status", "--porcelain") == ""
    assert "leaderboard/suites/mine.toml" in made.files
    kept = results.read_suite(checkout / "leaderboard" / "results" / "mine")
    assert {r.key for r in kept.records} == {r.key for r in small()}
    assert all(file.startswith("leaderboard/") for file in made.files)


def own(folder: Path, text: str = "title = 'mine'\n", name: str = "mine") -> Path:
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def test_the_text_names_what_the_rows_are_of_and_asks_for_what_they_do_not_say(
    checkout: Path, run: Path, tmp_path: Path
) -> None:
    made = submission.prepare(run, own(tmp_path), checkout, "mine", "my-rows")
    assert made.branch == "my-rows" and len(made.title) <= 72 and made.title.startswith("Add 13 rows of mine")
    assert git(checkout, "log", "-1", "--format=%s") == made.title
    for words in ("`elijah`", "`skd`", "`villandiffusion`", "- seeds: 0", "on a processor", "settings chosen?"):
        assert words in made.body


def test_nothing_is_changed_where_something_is_wrong(checkout: Path, run: Path, tmp_path: Path) -> None:
    def refused(
        words: str, folder: Path = run, name: str = "mine", at: Path = checkout, suite: Path | None = None
    ) -> None:
        before = (git(checkout, "rev-parse", "HEAD"), git(checkout, "branch"), git(checkout, "status", "--porcelain"))
        with pytest.raises(ResultsError, match=words):
            submission.prepare(folder, suite, at, name)
        after = (git(checkout, "rev-parse", "HEAD"), git(checkout, "branch"), git(checkout, "status", "--porcelain"))
        assert before == after

    refused("no checkout of this project", at=tmp_path)
    refused("is no name of a folder", name="../x")
    refused("the checkout has all of its rows already", write_suite(tmp_path / "same", [record("none")]), "quick")
    failed = changed(record("elijah"), error="it broke", scores={})
    refused("1 of 1 cells failed", write_suite(tmp_path / "failed", [failed.model_copy(update={"scores": {}})]))
    dirty = changed(record("elijah"), provenance={"dirty": True})
    refused(r"1 of 1 rows, such as [0-9a-f]{12}: made from .* uncommitted", write_suite(tmp_path / "dirty", [dirty]))
    installed = changed(record("elijah"), provenance={"commit": None, "dirty": None})
    refused("installed copy of the bench .* install the bench from a", write_suite(tmp_path / "no", [installed]))
    alone = {"distribution": "hush.py", "version": None, "code": None}
    file = changed(record("elijah"), provenance={"sources": {**record().provenance.sources, "defense": alone}})
    refused("make it a package, install it", write_suite(tmp_path / "file", [file]))
    refused("has no suite mine; give the file of yours with --suite")
    refused("rows of mine need the suite mine.toml; rename the file", suite=own(tmp_path, name="other"))
    other = own(tmp_path, "title = 'another'\n", "quick")
    refused("has another suite of that name .* rename yours", name="quick", suite=other)
    (checkout / "mine.txt").touch()
    refused("has changes that are not committed; commit or stash")
    (checkout / "mine.txt").unlink()
    suite = own(tmp_path)
    submission.prepare(run, suite, checkout, "mine", "b")
    git(checkout, "switch", "-q", "main")
    with pytest.raises(ResultsError, match=r"git switch in .* already exists"):
        submission.prepare(run, suite, checkout, "mine", "b")


def test_adding_rows_without_a_commit_warns_of_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed = changed(record("elijah"), provenance={"commit": None, "dirty": None})
    for rows, warned in (([record("none")], False), ([record("none"), installed], True)):
        folder = write_suite(tmp_path / f"run{len(rows)}", rows)
        assert call(["leaderboard", "add", str(folder), "--to", str(tmp_path / "to")]) == 0
        said = capsys.readouterr().err
        assert ("warning: the check refuses 1 of these rows, such as " in said) == warned
        assert ("install the bench from a checkout" in said) == warned


SUITE = """
title = "A suite of somebody"
[[grid]]
model = "digits-ddpm"
attack = "none"
trigger = "box"
target = "hat"
defense = "none"
n = 7
"""


def test_the_command_checks_the_rows_beside_all_others_and_against_the_suite_that_comes_with_them(
    checkout: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ends with 5 where the check finds something, also in rows that the submission does not touch."""
    spoilt = changed(record("elijah"), provenance={"dirty": True})
    write_suite(checkout / "leaderboard" / "results" / "older", [record("none"), spoilt])
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "Add a row that was made from changes")
    words = ["leaderboard", "submit", str(run), "--checkout", str(checkout)]
    assert call(words) == 2 and "give --suite FILE, or --name NAME" in capsys.readouterr().err
    words += ["--suite", str(own(tmp_path, SUITE))]
    assert call([*words, "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["title"].startswith("Add 13 rows") and told["branch"].startswith("results/mine-")
    assert any("results/mine: lacks a row of suite mine: none" in words for words in told["problems"])
    assert any("results/older/" in words and "uncommitted changes" in words for words in told["problems"])
    assert any(words.endswith("has 13 rows that suite mine does not plan") for words in told["notes"])
    assert not any("results/older" in words for words in told["notes"]), "notes on what was there before"
    git(checkout, "switch", "-q", "main")
    git(checkout, "branch", "-q", "-D", told["branch"])
    assert call(words) == 5
    said = capsys.readouterr()
    assert said.out.startswith("# Add 13 rows of mine") and "git push -u origin results/mine-" in said.err
    assert (
        "note: mine: has 13 rows that suite mine does not plan\n" in said.err and "checking quick, 3 of 3" in said.err
    )
