"""The head table: which defenses clean which attacks."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from harness import registry
from harness.diffusion import checkpoint
from harness.judges.statistics import wilson
from harness.runs.record import Record
from leaderboard import headline, results, rows, site
from leaderboard.headline import Head
from tests.records import changed, record, score, write_suite

BAD, VILLAN = "baddiffusion(poison_rate=0.1, steps=600)", "villandiffusion(solver='ode', steps=900)"


def one(defense: str, hits: int, attack: str = BAD, seed: int = 0, **more: Any) -> Record:
    return record(defense, hits, attack=attack, seed=seed, knowledge=["data"], **{"utility_n": 100, **more})


def head(*made: Record) -> Head:
    (found,) = headline.heads(rows.pooled(made), "unconditional")
    return found


def of(found: Head) -> dict[str, list[str]]:
    """Each row's fields."""
    return {row.defense: [m.words if (m := row.met.get(s)) else "–" for s in found.settings] for row in found.rows}


@pytest.mark.parametrize(
    ("hits", "ratio", "wanted"), [(5, 1.2, True), (6, 1.2, False), (0, 1.21, False), (0, 0.9, True), (97, 2.0, False)]
)
def test_a_clean_model_has_both_a_low_asr_and_its_utility(hits: int, ratio: float, wanted: bool) -> None:
    assert headline.cleaned(one("finetune(steps=1)", hits, ratio=ratio)) is wanted


def prompted(now: float | None, before: float | None, **more: Any) -> Record:
    """A record of a model that takes prompts, with its drops of attribute accuracy and a Fréchet distance as before."""
    drops = {"attribute_drop": score(now), "attribute_drop_before": score(before)}
    return changed(one("f", 0, **more), scores=drops, provenance={"track": "text-to-image"})


@pytest.mark.parametrize("utility_n", [0, 100])
@pytest.mark.parametrize(
    ("now", "before", "lost"), [(0.10, 0.06, False), (0.12, 0.06, True), (None, 0.06, None), (0.1, None, None)]
)
def test_utility_of_a_model_with_prompts_is_its_attributes_alone(
    now: float | None, before: float | None, lost: bool | None, utility_n: int
) -> None:
    assert headline.utility_lost(prompted(now, before, utility_n=utility_n)) is lost
    ruined = prompted(now, before, utility_n=utility_n, ratio=9.0)
    assert headline.utility_lost(ruined) is lost


def test_utility_of_a_model_without_prompts_is_its_distance_whatever_else_was_measured() -> None:
    odd = changed(one("f", 0, ratio=1.0), scores={"attribute_drop": score(0.9), "attribute_drop_before": score(0.0)})
    assert headline.utility_lost(odd) is False
    untold = changed(one("f", 0), provenance={"track": None})
    assert headline.utility_lost(untold) is None and headline.utility_lost(untold, "unconditional") is False


def test_a_distance_needs_a_utility_set_with_images_enough() -> None:
    assert headline.cleaned(one("f", 0)) is True
    assert headline.cleaned(one("f", 0, utility_n=0)) is None
    for name in ("fd_ratio[digits-cnn]", "fd_ratio_before[digits-cnn]"):
        few = changed(one("f", 0), scores={name: score(1.0, 50, warning="n = 50 is under the 100 images")})
        assert headline.cleaned(few) is None


def test_what_was_not_backdoored_or_not_measured_is_neither_clean_nor_not() -> None:
    weak = changed(one("finetune(steps=1)", 0), scores={"asr_before": score(0.79)})
    blind = changed(one("finetune(steps=1)", 0), scores={"fd_ratio[digits-cnn]": score(None, warning="no set")})
    assert headline.cleaned(weak) is None and headline.cleaned(blind) is None


def test_a_defended_model_that_could_not_be_judged_is_not_cleaned() -> None:
    odd = changed(one("finetune(steps=1)", 0), scores={"asr": score(None, warning="3 of 100 distances are NaN")})
    assert headline.cleaned(odd) is False


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
    assert not terd.whole and terd.interval is None and math.isnan(terd.share) and terd.full == 0
    assert of(found)["terd"] == ["1/1 of 3", "–"]
    assert found.holes == 2 and found.seeds == (10, 11, 12) and not found.few
    assert head(*(r for r in table() if r.cell.seed != 12)).few


def failed(made: Record) -> Record:
    """The record if its defense had died."""
    return made.model_copy(update={"scores": {}, "error": "MemoryError: out of memory"})


def without(made: list[Record], defense: str, attack: str, seed: int) -> list[Record]:
    return [r for r in made if (r.cell.defense, r.cell.attack, r.cell.seed) != (defense, attack, seed)]


def test_a_defense_that_failed_did_not_clean_its_model() -> None:
    died = [failed(r) if (r.cell.defense, r.cell.seed) == ("skd(steps=80)", 11) else r for r in table()]
    skd = next(row for row in head(*died).rows if row.defense == "skd")
    assert (skd.whole, skd.cleaned, skd.n) == (True, 4, 6) and skd.interval == wilson(4, 6)
    assert skd.asr == 0 and of(head(*died))["skd"] == ["2/3", "2/3"]
    every = [failed(r) if r.cell.defense == "skd(steps=80)" else r for r in table()]
    skd = next(row for row in head(*every).rows if row.defense == "skd")
    assert (skd.whole, skd.cleaned, skd.n) == (True, 0, 6) and math.isnan(skd.asr) and math.isnan(skd.cost)


def test_a_defense_that_failed_on_a_model_that_was_not_backdoored_counts_in_no_field() -> None:
    made = without(table(), "skd(steps=80)", BAD, 11)
    weak = [
        changed(r, scores={"asr_before": score(0.5)}) if (r.cell.attack, r.cell.seed) == (BAD, 11) else r for r in made
    ]
    found = head(*weak, failed(one("skd(steps=80)", 0, BAD, 11)))
    assert of(found)["skd"] == ["2/2", "3/3"] and found.rows[0].defense == "skd" and found.rows[0].whole


def test_a_model_that_was_not_run_is_a_hole_and_its_row_is_not_whole() -> None:
    found = head(*without(table(), "skd(steps=80)", BAD, 11))
    assert of(found)["skd"] == ["2/2 of 3", "3/3"] and found.holes == 3
    skd = next(row for row in found.rows if row.defense == "skd")
    assert not skd.whole and skd.interval is None and skd.full == 1
    (entry,) = [row for row in headline.entry(found)["rows"] if row["defense"] == "skd"]
    assert entry["met_all"] is False and headline.entry(found)["models"] == {"baddiffusion": 3, "villandiffusion": 3}
    assert any("| met 1 of 2" in line for line in headline.markdown(found)[-1].splitlines() if "skd" in line)


def later(made: Record, part: str, old: str, new: str) -> Record:
    """The record if the plugin of a part of its cell had a parameter more, `new`, which has its default: `old` is what
    the record says without defaults."""
    return changed(made, cell={part: new}, provenance={"short": {part: old}})


def test_a_parameter_that_a_plugin_gained_later_splits_no_row_and_no_column() -> None:
    """The seeds 11 and 12 are computed after the attack, the trigger and a defense have gained one."""
    made = []
    for each in table():
        if each.cell.seed > 10:
            each = later(each, "trigger", "box", "box(size=5, other='')")
            short, new = {"trigger": "box"}, {}
            for part, spec in (("attack", BAD), ("defense", "skd(steps=80)")):
                if getattr(each.cell, part) == spec:
                    short[part], new[part] = spec, f"{spec[:-1]}, later=0)"
            each = changed(each, cell=new, provenance={"short": short})
        made.append(each)
    assert of(head(*made)) == of(head(*table())) and len(head(*made).settings) == 2
    assert [cell.seeds for cell in rows.pooled(made)] == [cell.seeds for cell in rows.pooled(table())]
    other = [changed(each, cell={"trigger": "box(size=5, other='x')"}) for each in table()]
    assert len(head(*made, *other).settings) == 4, "another value is another trigger"


def test_a_spec_that_two_longer_ones_could_be_stays_as_it_is() -> None:
    """The default of the parameter has changed since: nothing says which one the older record had."""
    old = one("skd(steps=80)", 0)
    one_way = later(one("skd(steps=80)", 0, seed=1), "defense", "skd(steps=80)", "skd(steps=80, later=0)")
    other = later(one("skd(steps=80)", 0, seed=2), "defense", "skd(steps=80)", "skd(steps=80, later=1)")
    assert sorted(cell.seeds for cell in rows.pooled([old, one_way])) == [(0, 1)]
    assert sorted(cell.seeds for cell in rows.pooled([old, one_way, other])) == [(0,), (1,), (2,)]


def of_weights(made: Record, sha256: str, version: int = 1) -> Record:
    jobs = made.model_dump()["provenance"]["jobs"]
    for job in jobs.values():
        job["ingredients"]["model"] = {"spec": made.cell.model, "version": version, "weights": sha256}
    return changed(made, provenance={"jobs": jobs})


def test_models_of_other_weights_have_a_table_of_their_own() -> None:
    """Seed 10 names no weights; 11 and 12 have the same sha256, and another version for one."""
    named = [of_weights(r, 64 * "a", r.cell.seed) if r.cell.seed > 10 else r for r in table()]
    found = headline.heads(rows.pooled(named), "unconditional")
    assert {(each.model, each.weights): each.seeds for each in found} == {
        ("digits-ddpm", "version not recorded"): (10,),
        ("digits-ddpm", "version 11"): (11,),
        ("digits-ddpm", "version 12"): (12,),
    }
    assert all(row.n <= 2 for each in found for row in each.rows)
    assert "## Cleaned models: digits-ddpm, version not recorded" in {headline.markdown(each)[0] for each in found}


def test_weights_that_one_suite_holds_are_one_and_those_of_two_suites_are_not() -> None:
    two = [of_weights(r, 64 * ("a" if r.cell.seed == 10 else "b")) for r in table()]
    assert [cell.seeds for cell in rows.pooled(two)] == [cell.seeds for cell in rows.pooled(table())]
    apart = {r.key: ("v1" if r.cell.seed == 10 else "study",) for r in two}
    found = headline.heads(rows.pooled(two, (), apart), "unconditional")
    assert {each.of: each.seeds for each in found} == {
        f"digits-ddpm, version 1, weights {12 * 'a'}": (10,), f"digits-ddpm, version 1, weights {12 * 'b'}": (11, 12),
    }  # fmt: skip
    both = {**apart, two[0].key: ("v1", "study")}
    assert [each.seeds for each in headline.heads(rows.pooled(two, (), both), "unconditional")] == [(10, 11, 12)]


def test_weights_that_have_two_digests_by_the_rules_of_the_time_are_one_in_all_suites() -> None:
    now, before, oldest = tomllib.loads(rows.DIGESTS.read_text(encoding="utf-8"))["shapes-sd"]
    said = [of_weights(r, (now, before, oldest)[r.cell.seed - 10]) for r in table()]
    apart = {r.key: (f"suite {r.cell.seed}",) for r in said}
    assert [cell.seeds for cell in rows.pooled(said, (), apart)] == [cell.seeds for cell in rows.pooled(table())]
    other = [of_weights(r, 64 * "c") if r.cell.seed == 12 else r for r in said]
    assert {cell.seeds for cell in rows.pooled(other, (), apart)} == {(10,), (10, 11), (12,)}


def test_the_digests_of_the_list_are_those_of_the_weights_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """By today's rule, by the one before, and by the oldest: tensors, vocabularies and schedulers."""

    def oldest(folder: Path) -> str:
        total = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".safetensors":
                for key, tensor in sorted(load_file(path).items()):
                    total.update(f"{name}|{key}|{tensor.dtype}|{tensor.shape}".encode() + tensor.tobytes())
            elif path.name in ("vocab.json", "merges.txt", "scheduler_config.json"):
                total.update(name.encode() + path.read_bytes())
        return total.hexdigest()

    listed = tomllib.loads(rows.DIGESTS.read_text(encoding="utf-8"))
    for name, digests in listed.items():
        model = registry.load([]).build("models", name)
        found = [model.digest()]
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "LAST_CALL", set())
            found.append(model.digest())
        assert [*dict.fromkeys(found), oldest(model.folder)] == digests, name


def test_no_table_of_cells_sets_models_of_other_weights_beside_each_other() -> None:
    new = [of_weights(r, 64 * "a") for r in table() if r.cell.seed > 10]
    made = rows.pooled([*(r for r in table() if r.cell.seed == 10), *new])
    tables = [*rows.by_task(made, "unconditional", "purification"), *rows.by_setting(made)]
    assert all(len({cell.weights for row in each.rows for cell in row.cells}) == 1 for each in tables)
    assert {each.model for each in tables} == {"digits-ddpm, version not recorded", "digits-ddpm, version 1"}


def test_a_model_is_clean_under_every_sampler_or_it_is_not() -> None:
    other = [one("skd(steps=80)", 50, BAD, 10, sampler="ddpm(steps=100)")]
    skd = next(row for row in head(*table(), *other).rows if row.defense == "skd")
    assert (skd.cleaned, skd.n) == (5, 6)


def test_controls_and_clean_models_have_no_place_in_it() -> None:
    decoy = record("skd(steps=80)", 0, seed=10, knowledge=["trigger"], trigger_given="decoy", utility_n=100)
    clean = record("skd(steps=80)", 0, attack="none", seed=10, utility_n=100)
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


@pytest.mark.parametrize(("seeds", "first"), [((10,), "unconditional"), ((10, 11, 12, 13), "text-to-image")])
def test_the_page_opens_on_the_track_with_the_most_backdoored_models(
    seeds: tuple[int, ...], first: str, tmp_path: Path
) -> None:
    asked = [prompted(0.0, 0.0, attack=BAD, seed=seed, model="shapes-sd") for seed in seeds]
    for flip, defense in enumerate(("none", "skd(steps=80)"), 1):
        of_f = asked[: len(seeds)]
        asked += [changed(r, cell={"defense": defense}, key=f"{int(r.key, 16) ^ flip:064x}") for r in of_f]
    write_suite(tmp_path / "results" / "s", [*(r for r in table() if r.cell.attack == BAD), *asked])
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert re.findall(r'name="track" value="([^"]+)" checked', page) == [first]


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


def test_every_field_leads_to_a_page_of_its_cell(tmp_path: Path) -> None:
    """Of the benchmark's own table too, whose rows are a part of all that the page pools."""
    made = table()
    newer = [of_weights(later(r, "trigger", "box", "box(size=5, other='')"), 64 * "a") for r in table()[:9]]
    newer = [changed(r, cell={"seed": r.cell.seed + 5}, key=f"{int(r.key, 16) ^ 1:064x}") for r in newer]
    write_suite(tmp_path / "results" / "v1", newer)
    write_suite(tmp_path / "results" / "study", made)
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Benchmark v1. Cleaned models: digits-ddpm, version 1<" in page
    for words in ("version 1", "version not recorded"):
        assert page.count(f"<h3>digits-ddpm, {words}</h3>") == 1, "the table of attacks has models of other weights"
        assert f'"digits-ddpm, {words}"' in page.partition('id="data">')[2], "and that of all cells does not name them"
    cells = [path.read_text() for path in (tmp_path / "page" / "cells").iterdir()]
    assert sum(f"version 1, sha256 {64 * 'a'}" in text for text in cells) == 3
    assert page.count("Cleaned models: digits-ddpm") == 2, "the rows of the other suite have no such weights"
    links = set(re.findall(r'href="(cells/[^"#]+)"', page))
    assert links and all((tmp_path / "page" / link).is_file() for link in links)
