"""What several test files share and what is dear to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import whole_runs


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
