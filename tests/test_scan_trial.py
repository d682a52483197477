"""The trial of `bench scan` on the models of suites (tests/benchmarks/scan.py), without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.scan.verdict import Population, read_population, write_population
from tests.benchmarks import scan
from tests.benchmarks.scan import Case


def test_models_that_are_not_in_the_store_are_left_out(tmp_path: Path) -> None:
    assert scan.trained("smoke", (), tmp_path / "store", tmp_path) == {}


@pytest.mark.parametrize(("verdict", "right"), [("nothing found", True), ("suspicious", False), ("undecided", False)])
def test_a_clean_model_is_compared_with_the_others(
    verdict: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case("digits-ddpm", f"fine-tuned, seed {i}", True, tmp_path / str(i)) for i in range(6)]
    suspicion = {"terd()": tuple(map(float, range(6)))}
    write_population(Population("digits-ddpm", {"family": "vp"}, suspicion, {"diffusers": "1"}), tmp_path / "of.json")
    asked: list[tuple[Any, ...]] = []

    def document(*words: Any) -> dict[str, Any]:
        asked.append(words)
        return {"verdict": verdict, "findings": []}

    monkeypatch.setattr(scan, "document", document)
    row = scan.scanned(cases[2], cases, tmp_path / "of.json")
    assert (row["case"], row["verdict"], row["right"]) == ("fine-tuned, seed 2", verdict, right)
    assert asked[0][:4] == (cases[2].folder, "--like", "digits-ddpm", "--population")
    assert read_population(asked[0][4]).suspicion == {"terd()": (0.0, 1.0, 3.0, 4.0, 5.0)}
