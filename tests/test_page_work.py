"""What building the page computes once, by counts and not by seconds."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leaderboard import population, rendering, results, site, specs
from tests.records import changed, record, score, small, write_suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results with a screen, with a detector that has judged a clean and an attacked model, and with contact sheets."""
    told = {"suspicion": score(0.5), "flagged": score(1.0)}
    judged = [
        record("terd(steps=300)", 0, attack="none", delivers=["suspicion"]),
        record("terd(steps=300)", 90, attack="baddiffusion(poison_rate=0.1, steps=700)", delivers=["suspicion"]),
    ]
    rows = [*small(), *(changed(one, scores=told) for one in judged)]
    return write_suite(tmp_path / "results", rows)


def test_a_page_reads_each_spec_and_each_picture_and_judges_the_models_of_a_defense_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[str, Counter[Any]] = {"spec": Counter(), "picture": Counter(), "models": Counter()}
    parse, size, judge = ast.parse, rendering.picture_size, population.estimates

    def parsed(text: str, **how: Any) -> Any:
        done["spec"][text] += 1
        return parse(text, **how)

    def sized(path: Path) -> tuple[int, int]:
        done["picture"][path] += 1
        return size(path)

    def judged(models: Any) -> Any:
        done["models"][repr(models)] += 1
        return judge(models)

    specs.arguments.cache_clear()
    monkeypatch.setattr(specs, "ast", SimpleNamespace(parse=parsed, unparse=ast.unparse, Call=ast.Call))
    monkeypatch.setattr(site, "picture_size", sized)
    monkeypatch.setattr(population, "estimates", judged)
    built = site.build(results.read(folder), tmp_path / "page")
    assert built["records"] == len(small()) + 2
    assert "Detection of backdoored models" in (tmp_path / "page" / "LEADERBOARD.md").read_text()
    assert sum(done.pop("spec").values()) == specs.arguments.cache_info().currsize, "names aside, specs may be equal"
    for what, counts in done.items():
        assert counts and max(counts.values()) == 1, (what, counts.most_common(1))


def test_the_parameters_of_a_spec_that_is_asked_for_again_cannot_be_changed() -> None:
    found: Any = specs.arguments("f(a=1, b='x')")
    with pytest.raises(TypeError):
        found["a"] = "2"
    assert specs.arguments("f(a=1, b='x')") == {"a": "1", "b": "'x'"} and specs.arguments("f(") == {}
