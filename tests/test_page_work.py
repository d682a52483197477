"""What building the page computes once, by counts and not by seconds."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.registry import kept
from leaderboard import population, recompute, rendering, results, site, specs
from tests.records import changed, record, score, share, small, write_suite


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


def test_the_next_process_recomputes_no_score_of_a_record_that_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done, whole = list[Any](), recompute.recompute
    monkeypatch.setattr(recompute, "recompute", lambda scores: done.append(scores) or whole(scores))
    wrong = changed(record("skd(steps=80)", 3), scores={"asr": score(0.5, 100, per_sample=share(3, 100).per_sample)})

    def next_process(name: str, *records: Any) -> tuple[int, int]:
        """Records whose scores were recomputed, and those whose scores follow."""
        done.clear()
        fresh = kept.Kept("recomputed")
        for module in (recompute, site):
            monkeypatch.setattr(module, "followed", fresh)
        folder = write_suite(tmp_path / name, records)
        counts = site.build(results.read(folder), tmp_path / f"{name}-page")
        return len(done), counts["recomputed"]

    right = record("elijah(steps=1)", 30)
    assert next_process("one", right, wrong) == (2, 1) and next_process("two", right, wrong) == (0, 1)
    assert (tmp_path / "one-page" / "index.html").read_text() == (tmp_path / "two-page" / "index.html").read_text()
    mended = changed(wrong, scores={"asr": share(3, 100)})
    assert mended.key == wrong.key and next_process("three", right, mended) == (1, 2)
    (file,) = (tmp_path / "cache").rglob("recomputed-*.json")
    file.write_text(file.read_text().replace("true", "1"))
    assert next_process("four", right, mended)[0] == 2
    monkeypatch.setattr(recompute, "_version", lambda: "other libraries")
    assert next_process("five", right, mended) == (2, 2)


def test_records_that_were_not_read_from_files_are_recomputed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(recompute, "followed", kept.Kept("recomputed"))
    assert recompute.level(small()[0].scores, False) == "recomputed" == recompute.level(small()[0].scores, False)
    recompute.followed.save()
    assert not list(tmp_path.rglob("recomputed-*"))
