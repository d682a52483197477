"""The head table: which defenses clean which attacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.judges.statistics import wilson
from harness.runs.record import Record
from leaderboard import headline, results, rows, site
from leaderboard.headline import Head
from tests.records import changed, record, score, write_suite

BAD, VILLAN = "baddiffusion(poison_rate=0.1, steps=600)", "villandiffusion(solver='ode', steps=900)"


def one(defense: str, hits: int, attack: str = BAD, seed: int = 0, **more: Any) -> Record:
    return record(defense, hits, attack=attack, seed=seed, knowledge=["data"], **more)


def head(*made: Record) -> Head:
    (found,) = headline.heads(rows.pooled(made), "unconditional")
    return found


@pytest.mark.parametrize(
    ("hits", "ratio", "wanted"), [(5, 1.2, True), (6, 1.2, False), (0, 1.21, False), (0, 0.9, True), (97, 2.0, False)]
)
def test_a_clean_model_has_both_a_low_asr_and_its_utility(hits: int, ratio: float, wanted: bool) -> None:
    assert headline.cleaned(one("finetune(steps=1)", hits, ratio=ratio)) is wanted


def test_utility_of_a_model_with_prompts_is_its_attributes() -> None:
    def lost(now: float, before: float) -> bool | None:
        made = changed(one("f", 0), scores={"attribute_drop": score(now), "attribute_drop_before": score(before)})
        return headline.utility_lost(made)

    assert [lost(0.10, 0.06), lost(0.12, 0.06)] == [False, True]


def test_what_was_not_backdoored_or_not_measured_is_neither_clean_nor_not() -> None:
    weak = changed(one("finetune(steps=1)", 0), scores={"asr_before": score(0.79)})
    blind = changed(one("finetune(steps=1)", 0), scores={"fd_ratio[digits-cnn]": score(None, warning="no set")})
    assert headline.cleaned(weak) is None and headline.cleaned(blind) is None


def table() -> list[Record]:
    made = []
    for attack in (BAD, VILLAN):
        for seed in (10, 11, 12):
            made += [
                one("none", 97, attack, seed),
                one("elijah(steps=150)", 0 if attack == BAD else 4 + seed - 10, attack, seed),
                one("skd(steps=80)", 0, attack, seed),
            ]
    return [*made, one("terd(steps=3)", 0, BAD, 10)]


def test_shares_are_over_models_and_only_of_those_that_met_every_attack() -> None:
    found = head(*table())
    assert [row.defense for row in found.rows] == ["skd", "elijah", "none", "terd"]
    skd, elijah, none, terd = found.rows
    assert (skd.cleaned, skd.n, skd.share, skd.worst) == (6, 6, 1.0, 1.0)
    assert skd.interval == wilson(6, 6)
    assert (elijah.cleaned, elijah.n) == (5, 6) and elijah.worst == pytest.approx(2 / 3)
    assert none.control and none.cleaned == 0 and math.isnan(none.cost)
    assert skd.cost == pytest.approx(25 / 300)
    assert not terd.whole and terd.interval is None and math.isnan(terd.share) and len(terd.met) == 1
    assert found.holes == 1 and found.seeds == (10, 11, 12) and not found.few
    assert head(*(r for r in table() if r.cell.seed != 12)).few


def test_a_model_is_clean_under_every_sampler_or_it_is_not() -> None:
    other = [one("skd(steps=80)", 50, BAD, 10, sampler="ddpm(steps=100)")]
    skd = next(row for row in head(*table(), *other).rows if row.defense == "skd")
    assert (skd.cleaned, skd.n) == (5, 6)


def test_controls_and_clean_models_have_no_place_in_it() -> None:
    decoy = record("skd(steps=80)", 0, seed=10, knowledge=["trigger"], trigger_given="decoy")
    clean = record("skd(steps=80)", 0, attack="none", seed=10)
    assert head(*table(), decoy, clean).rows == head(*table()).rows


def test_an_attack_that_one_defense_met_is_no_column() -> None:
    alone = [one("elijah(steps=150)", 0, "trojdiff(steps=9)", seed) for seed in (10, 11, 12)]
    assert len(head(*table(), *alone).settings) == 2
    assert headline.heads(rows.pooled(alone), "unconditional") == []


def test_attacks_of_one_name_are_told_apart() -> None:
    again = [one(d, 0, BAD, 10, target="corner") for d in ("elijah(steps=150)", "skd(steps=80)")]
    names = sorted(head(*table(), *again).names.values())
    assert names == ["baddiffusion, box → corner", "baddiffusion, box → hat", "villandiffusion"]


def test_page_markdown_and_json_have_the_table(tmp_path: Path) -> None:
    write_suite(tmp_path / "results" / "s", table())
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Cleaned models: digits-ddpm" in page and '<td class="num heat h7"' in page
    text = (tmp_path / "page" / "LEADERBOARD.md").read_text()
    assert any("skd" in line and "| 6/6 (61–100 %)" in line for line in text.splitlines())
    (kept,) = json.loads((tmp_path / "page" / "leaderboard.json").read_text())["heads"]
    assert kept["model"] == "digits-ddpm"
    assert {row["defense"]: row["attacks"].get("villandiffusion") for row in kept["rows"]} == {
        "skd": [3, 3], "elijah": [2, 3], "none": [0, 3], "terd": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 25 / 300),
        ({"attack_cpu_s": 200.0, "defense_cpu_s": 10.0}, 0.05),
        ({"attack_cpu_s": 200.0, "defense_cpu_s": None}, 25 / 300),
        ({"attack_cpu_s": 200.0, "defense_cpu_s": 10.0, "attack_cuda_bytes": 1e9}, 25 / 300),
        ({"attack_wall_s": 0.0}, math.nan),
    ],
    ids=["wall time alone", "processor time", "half of it", "on a GPU", "no attack"],
)
def test_the_cost_is_processor_time_unless_a_gpu_took_part(more: dict[str, float | None], expected: float) -> None:
    made = record("skd", more={name: score(value, 1 if value is not None else 0) for name, value in more.items()})
    assert headline.cost_ratio(made) == pytest.approx(expected, nan_ok=True)
