"""One row of the leaderboard, run again from its record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import call
from harness.runs import planning
from leaderboard import attestation, check, results
from tests.records import record, score, write_suite

SUITE = """
title = "one clean cell"
metrics = ["asr", "drift", "spread"]
[[grid]]
model = ["digits-ddpm"]
attack = ["none"]
trigger = ["box"]
target = ["corner"]
defense = ["none"]
sampler = ["ddim(steps=2)"]
n = 8
"""


def test_a_new_value_is_within_the_interval_or_equal_to_one_percent_where_there_is_none() -> None:
    before = {
        "asr": score(0.5, interval=(0.4, 0.6)), "drift": score(0.1, interval=(0.09, 0.11)), "fid": score(10.0),
        "suspicion": score(2.0, 1), "gone": score(1.0), "unmeasured": score(None), "defense_wall_s": score(9.0),
        "degenerate": score(1.0, interval=(0.9, 0.99)),
    }  # fmt: skip
    after = {
        "asr": score(0.59), "drift": score(0.12), "fid": score(10.05), "suspicion": score(2.5), "unmeasured": score(1),
        "defense_wall_s": score(90.0), "degenerate": score(1.0),
    }  # fmt: skip
    new = {name: made.value for name, made in after.items()}
    found = {line.score: line.within for line in attestation.compared(before, new)}
    assert found == {"asr": True, "drift": False, "fid": True, "suspicion": False, "gone": False, "degenerate": True}


def renewed_rows(out: Path, capsys: pytest.CaptureFixture[str], edited: str = "") -> int:
    """What `check --keys` counts; `edited`: a part of planning that gives something else today."""
    with pytest.MonkeyPatch.context() as patch:
        if edited:
            patch.setattr(planning, edited, lambda *modules: {"edited": "code"})
        capsys.readouterr()
        assert call(["leaderboard", "check", "--results", str(out), "--keys", "--json"]) in (0, 5)
    (words,) = [n["words"] for n in json.loads(capsys.readouterr().out)["notes"] if "another key today" in n["words"]]
    return int(words.split()[0])


@pytest.mark.slow
def test_a_row_is_run_again_from_its_record_and_attested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.toml").write_text(SUITE)
    store = ["--store", str(tmp_path / "store")]
    out = tmp_path / "results" / "one"
    assert call(["run", str(tmp_path / "one.toml"), "-o", str(out), *store]) == 0
    (row,) = results.read_suite(out).records
    assert [renewed_rows(out, capsys), renewed_rows(out, capsys, edited="closure")] == [0, 1]
    code = call(["reproduce", row.key[:10], "--results", str(out), "--keep", "--json", *store])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["within"]) == (0, True)
    assert {line["score"] for line in found["scores"]} >= {"asr", "clean_model_hits"}
    suite = results.read_suite(out)
    assert suite.reproduced[row.key].within
    sealed = [str(p) for p in check.check(out).problems]
    assert [line for line in sealed if "sha256" in line or "attest" in line] == []
    other = {
        name: replace(kept, value=0.7, interval=(0.6, 0.8)) for name, kept in row.scores.items() if kept.value == 0
    }
    results.write_record(out, row.model_copy(update={"scores": {**row.scores, **other}}))
    capsys.readouterr()
    assert call(["reproduce", row.key[:10], "--results", str(out), *store]) == 5
    assert "NOT reproduced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "says"),
    [("zz", "is no key"), ("0000", "names no record"), ("failed", "there is no number to reproduce")],
)
def test_a_row_that_cannot_be_run_again_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, says: str
) -> None:
    row = record("a()").model_copy(update={"error": "boom", "scores": {}})
    write_suite(tmp_path / "results", [row])
    asked = row.key[:8] if key == "failed" else key
    assert call(["reproduce", asked, "--results", str(tmp_path / "results")]) == 2
    assert says in capsys.readouterr().err


def test_a_dry_run_plans_the_one_cell_in_a_store_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = record("finetune(steps=4)", 5, attack="villandiffusion(solver='ode', steps=6)", target="hat", n=16)
    write_suite(tmp_path / "results", [row])
    words = ["reproduce", row.key[:8], "--results", str(tmp_path / "results"), "--store", str(tmp_path / "store")]
    assert call([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["cells"]) == 1 and plan["cells"][0]["seed"] == 0
    assert [job["kind"] for job in plan["jobs"]].count("attack") == 1
