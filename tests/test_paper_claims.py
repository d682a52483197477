"""The claims of the papers against made rows: each outcome, each rule in both directions, and the file itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import registry
from harness.runs.doubts import DoubtCode
from harness.runs.record import Record, bare
from harness.runs.suite import AXES
from harness.types import Doubt, Score
from leaderboard import paper_claims, reported, results, rows, site
from leaderboard.paper_claims import OUTCOMES, Cells, Claim, Claims, Criterion, Verdict
from leaderboard.reported import ReportedError
from leaderboard.rows import PooledCell
from leaderboard.specs import arguments
from tests.records import changed, record, score, small, write_suite

BAD, VILLAN = "baddiffusion(poison_rate=0.1, steps=600)", "villandiffusion(solver='ode', steps=900)"
SKD, CAG = "skd(steps=80)", "skd-cag(steps=80)"
LOW = {"rule": "bound", "defense": ["skd"], "score": "asr", "at_most": 0.05, "end": 0.1}
HIGH = {"rule": "bound", "defense": ["skd"], "score": "removal", "at_least": 0.95, "end": 0.9}
ABOVE = {"rule": "order", "defense": ["skd-cag"], "below": ["skd"], "score": "removal"}
ALIKE = {"rule": "alike", "defense": ["skd-cag"], "below": ["skd"], "score": "removal", "margin": 0.1}
STYLE = {"rule": "order", "defense": ["skd"], "targets": ["hat", "shoe"], "score": "removal"}
RIGHT = {"rule": "models", "defense": ["terd"], "statistic": "accuracy", "at_least": 0.5, "end": 0.4}
BETTER = {"rule": "models", "defense": ["terd"], "below": ["bias-scan"], "statistic": "accuracy"}


def claim(test: dict[str, Any] | None, **cells: Sequence[str]) -> Claim:
    more = {"test": test} if test else {"not_testable": "pictures"}
    plain = {
        "id": "c",
        "paper": "2407.21316",
        "where": "table 1",
        "read": "paper",
        "kind": "removal",
        "claim": "It does.",
    }
    return Claim.model_validate({**plain, **more, "cells": cells})


def verdict(test: dict[str, Any] | None, made: Iterable[Record | PooledCell], **cells: Sequence[str]) -> Verdict:
    every = list(made)
    pooled = [each for each in every if isinstance(each, PooledCell)]
    pooled += rows.pooled([each for each in every if isinstance(each, Record)])
    (found,) = paper_claims.verdicts(pooled, Claims(claim=(claim(test, **cells),)))
    return found


def seeds(defense: str, *hits: int, attack: str = BAD, n: int = 100, **more: Any) -> list[Record]:
    return [
        record(defense, k, attack=attack, seed=seed, knowledge=["trigger", "data"], n=n, **more)
        for seed, k in enumerate(hits)
    ]


def models(defense: str, attack: str, *flags: bool, found: float | None = None, **more: Any) -> list[Record]:
    """One model of each seed, as a detector judged it."""
    made = []
    for seed, flag in enumerate(flags):
        scores: dict[str, Score] = {"suspicion": score(float(flag), 1), "flagged": score(float(flag), 1)}
        scores["found_asr"] = score(found, 50, warning=None if found is not None else "none was found")
        made.append(record(defense, attack=attack, seed=seed, delivers=["suspicion"], more=scores, **more))
    return made


def judged(defense: str, attacked: Sequence[bool], clean: Sequence[bool], attack: str = BAD) -> list[Record]:
    return [*models(defense, attack, *attacked), *models(defense, "none(steps=600)", *clean)]


# ---- outcomes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "outcome", "why"),
    [
        ((0, 1, 0), "holds", ""),
        ((0, 0, 0), "holds", ""),
        ((30, 34, 31), "does not hold", ""),
        ((4, 5, 40), "not shown", "the interval leaves it open"),
        ((6, 6, 6), "not shown", "the interval leaves it open"),
        ((0, 1), "not shown", "fewer than three seeds"),
        ((97, 96), "not shown", "fewer than three seeds"),
        ((), "not measured", "no row measures it"),
    ],
)
def test_a_bound_is_decided_by_the_interval_and_by_no_fewer_than_three_seeds(
    hits: Sequence[int], outcome: str, why: str
) -> None:
    for test in (LOW, HIGH):
        found = verdict(test, [*seeds("none", 97, 97, 97), *seeds(SKD, *hits)])
        assert (found.outcome, found.why) == (outcome, why)
        assert bool(found.measured) == bool(hits) and len(found.cells) == bool(hits)


def test_seeds_that_agree_have_the_interval_of_their_samples() -> None:
    """0 hits of 10 at three seeds may all be of the same ten noises: Wilson's interval reaches 28 %."""
    found = verdict(LOW, seeds(SKD, 0, 0, 0, n=10))
    assert found.outcome == "not shown" and found.measured == "ASR 0.0 % (0.0–27.8), 3 seeds"


def test_a_claim_without_a_test_says_why() -> None:
    found = verdict(None, small())
    assert (found.outcome, found.why, found.cells) == ("not testable", "pictures", ())


def test_a_claim_holds_in_each_of_its_rows_or_not_at_all() -> None:
    good, bad = seeds(SKD, 0, 1, 0), seeds(SKD, 40, 41, 39, attack=VILLAN)
    assert verdict(LOW, good).outcome == "holds"
    found = verdict(LOW, [*good, *bad])
    assert found.outcome == "does not hold" and found.measured.startswith("ASR 40.0 %")
    assert len(found.cells) == 2 and [bare(cell.specs.attack) for cell in found.deciding] == ["villandiffusion"]
    few = seeds(SKD, 0, attack=VILLAN)
    assert verdict(LOW, [*good, *few]).outcome == "holds", "a single seed on the claim's side does not stand against it"
    found = verdict(LOW, [*good, *seeds(SKD, 40, attack=VILLAN)])
    assert (found.outcome, found.why) == ("not shown", "fewer than three seeds (1 of 2 rows)")


def test_everything_that_a_claim_names_has_to_be_shown() -> None:
    good = seeds(SKD, 0, 1, 0)
    names = ("baddiffusion", "villandiffusion")
    found = verdict(LOW, good, attack=names)
    assert (found.outcome, found.why) == ("not shown", "no row of villandiffusion")
    found = verdict(LOW, [*good, *seeds(SKD, 0, attack=VILLAN)], attack=names)
    assert (found.outcome, found.why) == ("not shown", "fewer than three seeds (1 of 2 rows)")
    assert verdict(LOW, [*good, *seeds(SKD, 0, 0, 1, attack=VILLAN)], attack=names).outcome == "holds"
    two = {**LOW, "defense": ["skd", "skd(alpha=0.3)"]}
    assert verdict(two, good).why == "no row of skd(alpha=0.3)"
    both = [*seeds(CAG, 0, 1, 0), *seeds("skd(alpha=0.3, steps=80)", 50, 52, 51)]
    three = {**ABOVE, "below": ["skd(alpha=0.3)", "skd"]}
    assert verdict(three, both).why == "no row of skd", "another form of it does not stand for it"
    assert verdict(three, [*both, *seeds(SKD, 50, 52, 51)]).outcome == "holds"


def test_a_ruined_model_is_no_removal() -> None:
    (cell,) = rows.pooled(seeds(SKD, 0, 1, 0))
    assert verdict(LOW, [cell]).outcome == "holds"
    broken = replace(cell, doubts=(Doubt(DoubtCode.utility_broken_by_defense, "broken"),))
    found = verdict(LOW, [broken])
    assert (found.outcome, found.why) == ("not shown", "the defense ruined the model")


# ---- which cells ----------------------------------------------------------------------------------------------------


def test_an_attack_that_did_not_take_decoys_failures_and_detection_alone_count_for_nothing() -> None:
    weak = [changed(each, scores={"asr_before": score(0.5)}) for each in seeds(SKD, 0, 1, 0)]
    assert verdict(LOW, weak).outcome == "not measured"
    assert verdict(LOW, seeds(SKD, 0, 1, 0, trigger_given="decoy")).outcome == "not measured"
    assert verdict(LOW, seeds(SKD, 0, 1, 0, delivers=["suspicion"])).outcome == "not measured"
    assert verdict(LOW, seeds(SKD, 0, 1, 0, attack="none")).outcome == "not measured"
    assert verdict(LOW, [*weak[:1], *seeds(SKD, 0, 1, 0)[1:]]).why == "fewer than three seeds"


def test_parameters_that_are_not_named_have_their_defaults_unless_they_are_free() -> None:
    other = seeds("skd(latents='trajectory', steps=80)", 0, 1, 0)
    assert verdict(LOW, other).outcome == "not measured"
    assert verdict({**LOW, "free": ["latents"]}, other).outcome == "holds"
    assert verdict({**LOW, "defense": ["skd(latents='trajectory')"]}, other).outcome == "holds"
    assert verdict({**LOW, "defense": ["skd(latents='noise')"], "free": ["latents"]}, other).outcome == "not measured"


def test_attacks_that_know_the_defense_take_part_only_if_they_are_named() -> None:
    knowing = seeds(SKD, 0, 1, 0, attack="baddiffusion(steps=600, adaptive_weight=0.01)")
    assert verdict(LOW, knowing, attack=["baddiffusion"]).outcome == "not measured"
    plain = seeds(SKD, 0, 1, 0, attack="baddiffusion(steps=600, adaptive_weight=0.0)")
    assert verdict(LOW, plain, attack=["baddiffusion"]).outcome == "holds"
    named = ["baddiffusion(adaptive_weight='any')"]
    assert verdict(LOW, knowing, attack=named).outcome == "holds"
    assert verdict(LOW, seeds(SKD, 0, 1, 0), attack=named).outcome == "not measured"


# ---- orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "why"),
    [
        ((0, 1, 0), (50, 52, 51), "holds", ""),
        ((50, 52, 51), (0, 1, 0), "does not hold", ""),
        ((9, 40, 20), (10, 42, 18), "not shown", "the interval leaves it open"),
        ((0, 1), (50, 52), "not shown", "fewer than three seeds"),
        ((0, 1, 0), (), "not measured", "no row measures it"),
    ],
)
def test_an_order_is_that_of_the_paired_rule(
    ours: Sequence[int], theirs: Sequence[int], outcome: str, why: str
) -> None:
    found = verdict(ABOVE, [*seeds(CAG, *ours), *seeds(SKD, *theirs)])
    assert (found.outcome, found.why) == (outcome, why)


def test_only_defenses_with_one_budget_and_the_same_models_are_compared() -> None:
    ours = seeds(CAG, 0, 1, 0)
    assert verdict(ABOVE, [*ours, *seeds("skd(steps=60)", 50, 52, 51)]).outcome == "not measured"
    assert verdict(ABOVE, [*ours, *seeds(SKD, 50, 52, 51, attack=VILLAN)]).outcome == "not measured"
    forms = [*seeds("skd(alpha=0.5, latents='a')", 0, 1, 0), *seeds("skd(alpha=0.3, latents='b')", 50, 52, 51)]
    test = {**ABOVE, "defense": ["skd(alpha=0.5)"], "below": ["skd(alpha=0.3)"], "free": ["latents"]}
    assert verdict(test, forms).outcome == "not measured", "they differ in more than the claim names"
    forms = [*seeds("skd(alpha=0.5, latents='a')", 0, 1, 0), *seeds("skd(alpha=0.3, latents='a')", 50, 52, 51)]
    assert verdict(test, forms).outcome == "holds"


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        ((2, 3, 2), (3, 2, 3), "holds"),
        ((0, 1, 0), (50, 52, 51), "does not hold"),
        ((50, 52, 51), (0, 1, 0), "does not hold"),
        ((10, 30, 20), (20, 12, 35), "not shown"),
        ((2, 3), (3, 2), "not shown"),
    ],
)
def test_equal_means_that_the_whole_interval_lies_within_the_margin(
    ours: Sequence[int], theirs: Sequence[int], outcome: str
) -> None:
    assert verdict(ALIKE, [*seeds(CAG, *ours), *seeds(SKD, *theirs)]).outcome == outcome


@pytest.mark.parametrize(
    ("hat", "shoe", "outcome"),
    [
        ((0, 1, 0), (50, 52, 51), "holds"),
        ((50, 52, 51), (0, 1, 0), "does not hold"),
        ((3, 4, 5), (4, 5, 6), "not shown"),
        ((0, 1), (50, 52), "not shown"),
        ((0, 1, 0), (), "not measured"),
    ],
)
def test_two_targets_are_apart_if_their_intervals_do_not_overlap(
    hat: Sequence[int], shoe: Sequence[int], outcome: str
) -> None:
    made = [*seeds(SKD, *hat, target="hat()"), *seeds(SKD, *shoe, target="shoe()")]
    assert verdict(STYLE, made).outcome == outcome


def test_a_ratio_and_a_difference_have_the_interval_over_seeds() -> None:
    test = {
        "rule": "bound",
        "defense": ["skd"],
        "score": "fd_ratio[]",
        "per": "fd_ratio_before[]",
        "at_most": 1.2,
        "end": 1.4,
    }
    near = [r for seed, x in enumerate((1.0, 1.05, 1.1)) for r in seeds(SKD, 0, ratio=x) for r in [_at(r, seed)]]
    far = [_at(seeds(SKD, 0, ratio=x)[0], seed) for seed, x in enumerate((3.0, 3.1, 3.2))]
    assert verdict(test, near).outcome == "holds" and verdict(test, far).outcome == "does not hold"
    minus = {"rule": "bound", "defense": ["skd"], "score": "drift", "minus": "asr", "at_most": 0.0, "end": 0.0}
    assert verdict(minus, seeds(SKD, 50, 52, 51)).outcome == "holds"
    assert verdict({**minus, "minus": "clean_hits"}, seeds(SKD, 50, 52, 51)).outcome == "does not hold"


def _at(made: Record, seed: int) -> Record:
    """The scores of a record at another seed."""
    return changed(
        record(made.cell.defense, 0, seed=seed, knowledge=["trigger", "data"]), scores=made.model_dump()["scores"]
    )


# ---- models ---------------------------------------------------------------------------------------------------------


def test_a_detector_is_judged_over_models() -> None:
    right = judged("terd", [True] * 6, [False] * 6)
    assert verdict(RIGHT, right, attack=["baddiffusion"]).outcome == "holds"
    wrong = judged("terd", [False] * 6, [True] * 6)
    assert verdict(RIGHT, wrong, attack=["baddiffusion"]).outcome == "does not hold"
    mixed = judged("terd", [True, False, True], [False, True, False])
    found = verdict(RIGHT, mixed, attack=["baddiffusion"])
    assert (found.outcome, found.why) == ("not shown", "the interval leaves it open")
    few = verdict(RIGHT, judged("terd", [True] * 2, [False] * 9), attack=["baddiffusion"])
    assert (few.outcome, few.why) == ("not shown", "fewer than three clean or backdoored models")
    assert verdict(RIGHT, models("terd", BAD, True, True, True), attack=["baddiffusion"]).outcome == "not measured"
    assert "9 + 2 models" in few.measured
    assert {bare(cell.specs.attack) for cell in few.cells} == {"baddiffusion", "none"}


def test_two_detectors_are_apart_if_their_intervals_do_not_overlap() -> None:
    good, bad = [True] * 9, [False] * 9
    one, other = judged("terd", good, bad), judged("bias-scan", bad, good)
    assert verdict(BETTER, [*one, *other], attack=["baddiffusion"]).outcome == "holds"
    swapped = [*judged("terd", bad, good), *judged("bias-scan", good, bad)]
    assert verdict(BETTER, swapped, attack=["baddiffusion"]).outcome == "does not hold"
    same = [*one, *judged("bias-scan", good, bad)]
    assert verdict(BETTER, same, attack=["baddiffusion"]).outcome == "not shown"
    assert verdict(BETTER, one, attack=["baddiffusion"]).outcome == "not measured"


def test_found_triggers_are_compared_model_by_model() -> None:
    test = {"rule": "order", "defense": ["terd"], "below": ["bias-scan"], "score": "found_asr"}
    made = [
        r for seed, x in enumerate((0.9, 0.8, 0.95)) for r in models("terd", BAD, *[True] * (seed + 1), found=x)[-1:]
    ]
    low = [
        r
        for seed, x in enumerate((0.1, 0.2, 0.1))
        for r in models("bias-scan", BAD, *[True] * (seed + 1), found=x)[-1:]
    ]
    assert verdict(test, [*made, *low]).outcome == "holds"
    assert verdict({**test, "defense": ["bias-scan"], "below": ["terd"]}, [*made, *low]).outcome == "does not hold"


# ---- the file -------------------------------------------------------------------------------------------------------


def test_every_claim_names_its_paper_and_place_once() -> None:
    every = paper_claims.shipped().claim
    assert len({each.id for each in every}) == len(every)
    assert {each.paper for each in every} == {"2508.18235", "2504.18563", "2407.21316"}
    place = re.compile(r"(table|figure|section|appendix|abstract|evaluation|ablation)", re.IGNORECASE)
    assert [each.id for each in every if not place.search(each.where)] == []
    assert [each.id for each in every if not each.claim.endswith(".")] == []
    tables = {
        n for each in every if each.paper == "2407.21316" for n in re.findall(r"tables? (\d)|and (\d)", each.where)
    }
    assert {n for pair in tables for n in pair if n} >= set("12345678")


def test_claims_name_plugins_and_parameters_that_exist() -> None:
    plugins = registry.load()
    for each in paper_claims.shipped().claim:
        specs = [(part, spec) for part in Cells.model_fields for spec in getattr(each.cells, part)]
        specs += [("defense", spec) for spec in (*each.test.defense, *each.test.below)] if each.test else []
        for part, spec in specs:
            whole = plugins.canonical(AXES[part], spec.replace("'any'", "0.01"))
            assert set(arguments(spec)) <= set(arguments(whole)), (each.id, spec)
        free = set(each.test.free) if each.test else set()
        every = [plugins.canonical("defenses", spec) for part, spec in specs if part == "defense"]
        assert free <= {name for whole in every for name in arguments(whole)}, each.id


def test_no_claim_names_a_record() -> None:
    assert not re.search(r"\b[0-9a-f]{12,}\b", paper_claims.FILE.read_text())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({**LOW, "end": 0.01}, "`end` lies on the claim's side"),
        ({**LOW, "at_least": 0.1}, "at_most or at_least"),
        ({**LOW, "margin": 0.1}, "margin"),
        ({**ABOVE, "targets": ["a", "b"]}, "give one of them"),
        ({**RIGHT, "score": "asr"}, "a statistic"),
        ({**ABOVE, "per": "asr"}, "belongs to rule 'bound'"),
    ],
)
def test_a_test_that_is_none_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Criterion.model_validate(wrong)


def test_the_file_is_refused_with_one_line_that_names_the_fault(tmp_path: Path) -> None:
    text = paper_claims.FILE.read_text()
    faults = {
        text.replace('id = "skd-pixel"', 'id = "skd-cag-pixel"', 1): "claim skd-cag-pixel stands twice",
        text.replace('paper = "2504.18563"', 'paper = "1234.5678"', 1): "which reported.toml does not list",
        text.replace("\nnot_testable", "\nreason", 1): "claim",
        text + "x": "not TOML",
    }
    for content, words in faults.items():
        (tmp_path / "paper_claims.toml").write_text(content)
        with pytest.raises(ReportedError, match=re.escape(words)):
            paper_claims.read(tmp_path / "paper_claims.toml")


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_every_claim_with_its_count_and_its_cells(tmp_path: Path) -> None:
    attack = "badt2i(steps=1200)"
    made = [
        *seeds("sau()", 1, 0, 0, attack=attack, target="patch()"),
        *seeds("skd(steps=80)", 60, 61, 62, attack=attack, target="patch()"),
    ]
    site.build(results.read(write_suite(tmp_path / "results" / "small", made).parent), tmp_path / "page")
    page = tmp_path / "page"
    found = json.loads((page / "leaderboard.json").read_text())["claims"]
    every = paper_claims.shipped().claim
    assert [line["id"] for line in found["lines"]] == [each.id for each in every]
    assert found["counts"] == {o: sum(line["outcome"] == o for line in found["lines"]) for o in OUTCOMES}
    lines = {line["id"]: line for line in found["lines"]}
    assert lines["sau-pixel"]["outcome"] == "holds" and lines["skd-pixel"]["outcome"] == "does not hold"
    index, text = (page / "index.html").read_text(), (page / "LEADERBOARD.md").read_text()
    said = paper_claims.summary(paper_claims.verdicts(rows.pooled(made)))
    assert f"{len(every)} claims: 1 hold, 1 do not hold" in said and said in index and said in text
    for line in lines.values():
        assert f'id="claim-{line["id"]}"' in index
        for cell in line["cells"]:
            assert f"cells/{cell}.html" in index and f"cells/{cell}.html" in text
            assert (page / "cells" / f"{cell}.html").is_file()


def test_titles_of_papers_come_from_the_papers_numbers() -> None:
    titles = {paper.id: paper.title for paper in reported.shipped().papers}
    for paper, mine in paper_claims.by_paper(paper_claims.verdicts([])):
        assert paper.title == titles[paper.id] and mine
    assert {each.outcome for each in paper_claims.verdicts([])} == {"not measured", "not testable"}
    assert arguments("f(a='any')") == {"a": "'any'"}
