"""What a record says of the checkout that made it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.runs import records


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of one file, `a/file`."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("one")
    named = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "a"], [*named, "commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_a_commit_and_changes_are_those_of_the_checkout(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(asked, cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()
    assert records._commit(checkout, "a") == {"commit": commit, "dirty": False}
    (checkout / "a" / "file").write_text("two")
    assert records._commit(checkout, "a") == {"commit": commit, "dirty": True}
    assert records._commit(checkout, "b") == {"commit": commit, "dirty": False}
    assert records._commit(tmp_path_factory.mktemp("none")) == {"commit": None, "dirty": None}


def test_a_git_that_takes_half_a_minute_is_waited_for(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run

    def slow(command: list[str], timeout: float, **how: Any) -> Any:
        if timeout < 30:
            raise subprocess.TimeoutExpired(command, timeout)
        return run(command, timeout=timeout, **how)

    monkeypatch.setattr(subprocess, "run", slow)
    assert records._commit(checkout, "a")["dirty"] is False


def test_a_checkout_is_only_read(checkout: Path) -> None:
    """git would write the index again for a file whose time has changed, and hold its lock meanwhile."""
    index = checkout / ".git" / "index"
    before = index.read_bytes()
    os.utime(checkout / "a" / "file", (1e9, 1e9))
    assert records._commit(checkout, "a")["dirty"] is False and index.read_bytes() == before
