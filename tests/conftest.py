"""What several test files share and what is dear to make."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from leaderboard import results
from leaderboard.results import Results
from tests import whole_runs

# Examples follow from the test alone, and a slow machine is no fault of theirs.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test, and a fixture that it is the first to need, draws without a generator is the same in any order of
    tests. Python's own `random` is left alone: libraries choose ports by it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(whole_runs.SUITE)
    return path


@pytest.fixture(scope="session")
def undisturbed(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The store and the report of the tiny suite, run by one job at a time."""
    store = tmp_path_factory.mktemp("store")
    return store, whole_runs.run(store, str(suite), "--cpus", "1")


@pytest.fixture(scope="session")
def published() -> list[Results]:
    """The results of the repository, which take a second to read."""
    return results.read()


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Mapping[str, str]], Path]:
    """install(name, entry, {file: source}): a distribution on the path; only such ones are seen."""
    names: set[str] = set()
    every = metadata.entry_points

    def install(name: str, entry: str, files: Mapping[str, str]) -> Path:
        root = tmp_path / name
        for file, source in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(textwrap.dedent(source))
        info = root / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bench.plugins]\nmain = {entry}\n")
        monkeypatch.syspath_prepend(str(root))
        names.add(name)
        return root

    monkeypatch.setattr(
        metadata, "entry_points", lambda **select: [p for p in every(**select) if p.dist and p.dist.name in names]
    )
    return install


os.environ.setdefault("BENCH_FATAL_PLUGINS", "{}")  # tests make their own distributions; none of theirs ends Python
