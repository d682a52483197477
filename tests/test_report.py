from __future__ import annotations

import csv
import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from harness.runs import doubts
from harness.runs.doubts import DoubtCode
from harness.runs.record import Dropped, Record
from harness.types import Cell, Score
from leaderboard import report, results, rows
from leaderboard.rows import Control, Table
from tests.records import changed, digest, picture, score, share

CELL = Cell("digits-ddpm", "baddiffusion(steps=600)", "box(size=5)", "hat()", "none()", "ddim(steps=20)", 0)


def record(
    key: str = "aa",
    error: str | None = None,
    knowledge: Sequence[str] = (),
    scores: Mapping[str, Score] | None = None,
    provenance: Mapping[str, object] | None = None,
    **cell: Any,
) -> Record:
    known = {
        "asr": score(0.97, interval=(0.915, 0.99)),
        "asr@1e-3": score(0.9),
        "asr_before": score(0.97),
        "removal": score(0.03),
        "clean_hits": score(0.0),
        "false_triggers": score(0.01),
        "fd[digits-cnn]": score(1.5),
        "fd_ratio[digits-cnn]": score(1.1),
        "fd_ratio_before[digits-cnn]": score(1.1),
        "attribute_accuracy": score(None, warning="the model takes no prompts"),
        "drift": score(0.01),
        "change": score(0.002),
        "spread": score(0.9),
        "defense_wall_s": score(12.0),
        **(scores or {}),
    }
    said = {"track": "unconditional"} if provenance is None else provenance
    return Record.model_validate({
        "key": digest(key), "cell": replace(CELL, **cell), "scores": {} if error else known, "error": error,
        "knowledge": knowledge, "provenance": said,
    })  # fmt: skip


def tables(*records: Record, dropped: Sequence[Dropped] = ()) -> list[Table]:
    return rows.by_setting(rows.pooled(records, dropped))


def comma_separated(records: Sequence[Record]) -> str:
    return report.comma_separated(records, tables(*records))


def lettered(*records: Record) -> dict[str, str]:
    """Defense → its letters in the one table of the records."""
    (table,) = tables(*records)
    return {row.defense: row.letters for row in table.rows}


def codes(asked: Record, beside: Sequence[Record]) -> list[DoubtCode]:
    return [DoubtCode(doubt.code) for doubt in doubts.of(beside)[asked.key]]


def test_a_row_shows_asr_with_its_interval_and_marks_a_single_seed() -> None:
    text = report.terminal([record()], width=200)
    assert "97.0 (91.5–99.0)" in text
    assert "one seed" in text and "[digits-cnn]" in text and "FD\\[digits-cnn\\]" in report.markdown([record()])
    assert "attr." not in text, "a column that nothing fills is left out"


def test_network_evaluations_stand_beside_the_numbers() -> None:
    known = record(provenance={"nfe": 35})
    both = report.markdown([known, record("bb", defense="x()")])
    head, *found = [[word.strip() for word in line.split("|")] for line in both.splitlines() if line.startswith("| ")]
    assert sorted(line[head.index("NFE")] for line in found) == ["35", "–"]
    read = list(csv.DictReader(io.StringIO(comma_separated([known, record("bb", seed=1)]))))
    assert [row["nfe"] for row in read] == ["35", ""]


def test_several_seeds_become_one_row_with_mean_and_t_interval() -> None:
    records = [record(str(i), seed=i, scores={"asr": score(v)}) for i, v in enumerate((0.8, 0.9, 1.0))]
    (row,) = tables(*records)[0].rows
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    asr = row.worst["asr"]
    assert row.first.seeds == (0, 1, 2) and asr.value == pytest.approx(0.9)
    assert asr.interval == pytest.approx((0.9 - half, 1.0)), "no share is above 1"
    text = report.terminal(records, width=200)
    assert "3 seeds" in text and "90.0 (65.2–100.0)" in text, "a share has its interval within 0 and 100 %"


def test_an_unmeasured_number_is_shown_as_such_with_its_reason_and_never_as_zero() -> None:
    records = [record(), record("bb", defense="x()", scores={"drift": score(None, warning="no images")})]
    text = report.markdown(records)
    row = next(line for line in text.splitlines() if "| x " in line)
    assert "n/a (" in row and "n/a: no images" in text
    spread = [record(str(i), seed=i, scores={"drift": score([0.1, None][i], warning="why")}) for i in (0, 1)]
    assert math.isnan(tables(*spread)[0].rows[0].worst["drift"].value), "one unmeasured seed, no mean"


def test_failed_and_dropped_cells_are_rows_with_their_reason() -> None:
    records = [record(), record("bb", error="RuntimeError: boom", defense="broken()")]
    dropped = [Dropped(replace(CELL, defense="t2i-only()"), "takes text triggers only")]
    for text in (report.terminal(records, dropped, width=200), report.markdown(records, dropped)):
        assert "RuntimeError: boom" in text and "failed" in text
        assert "takes text triggers only" in text and "n/a" in text
        assert "broken" in text and "t2i" in text


# ---- letters --------------------------------------------------------------------------------------------------------


def seeds(hits: Sequence[int], **more: Any) -> list[Record]:
    """A record for each seed from 0 on, with that many of 100 hits."""
    name = str(sorted(more.items()))
    return [record(f"{name} {seed}", seed=seed, scores={"asr": share(k, 100)}, **more) for seed, k in enumerate(hits)]


def test_blind_defenses_and_those_given_the_trigger_have_letters_apart() -> None:
    given: dict[str, Any] = {"knowledge": ("trigger", "data")}
    (table,) = tables(
        *seeds([97] * 3),
        *seeds([50] * 3, defense="finetune()", knowledge=("data",)),
        *seeds([70, 68, 72], defense="weak()"),
        *seeds([30, 29, 33], defense="blind()"),
        *seeds([0] * 3, defense="sighted()", **given),
        *seeds([0] * 3, defense="sighted()", trigger_given="decoy", **given),
        *seeds([40] * 3, defense="short()", **given),
    )
    assert [(row.defense, row.letters, row.knows) for row in table.rows] == [
        ("none", "", "none (blind)"), ("finetune", "", "data"), ("blind", "A", "none (blind)"),
        ("weak", "B", "none (blind)"), ("sighted", "A", "trigger, data"), ("sighted", "", "decoy trigger (control)"),
        ("short", "B", "trigger, data"),
    ]  # fmt: skip
    controls = [Control.none, Control.finetune, None, None, None, Control.decoy, None]
    assert [row.control for row in table.rows] == controls and table.remark == ""
    assert [row.trigger_given for row in table.rows] == [None, None, None, None, "true", "decoy", "true"]


@st.composite
def graphs(draw: st.DrawFn) -> list[set[int]]:
    """For each of up to 9 vertices its neighbours."""
    n = draw(st.integers(0, 9))
    pairs = list(itertools.combinations(range(n), 2))
    edges = {pair for pair in pairs if draw(st.booleans())}
    return [{j for j in range(n) if (min(i, j), max(i, j)) in edges} for i in range(n)]


@given(graphs())
def test_letters_are_the_largest_sets_of_rows_that_are_all_alike(alike: list[set[int]]) -> None:
    found, everyone = rows.letters(alike), set(range(len(alike)))
    for i, j in itertools.combinations(everyone, 2):
        assert bool(set(found[i]) & set(found[j])) == (j in alike[i]), (i, j, found)
    used = sorted(set("".join(found)))
    sets = [{i for i in everyone if letter in found[i]} for letter in used]
    for mine in sets:
        assert not any(mine <= alike[i] for i in everyone - mine), "a row that is like all of them has the letter too"
    assert used == list(rows.LETTERS[: len(used)]) and len({frozenset(mine) for mine in sets}) == len(sets)
    assert not found or found[0][0] == "A", "A is a letter of the first row"


def test_a_row_that_is_like_two_others_that_differ_has_both_of_their_letters() -> None:
    assert rows.letters([{1}, {0, 2}, {1}, set()]) == ["A", "AB", "B", "C"]


@pytest.mark.parametrize("few", [1, 2])
def test_below_three_seeds_no_row_has_letters_and_the_table_says_so(few: int) -> None:
    made = [*seeds([97] * few), *seeds([0] * few, defense="a()"), *seeds([90] * few, defense="b()")]
    (table,) = tables(*made)
    assert [row.letters for row in table.rows] == ["", "", ""]
    assert table.remark == "fewer than three seeds: no comparison"
    for text in (report.terminal(made, width=200), report.markdown(made)):
        assert "fewer than three seeds: no comparison" in text


def test_a_row_with_fewer_seeds_than_the_others_has_no_letters() -> None:
    made = [*seeds([0] * 3, defense="a()"), *seeds([90] * 3, defense="b()"), *seeds([40, 40], defense="c()")]
    (table,) = tables(*made)
    assert [(row.defense, row.letters) for row in table.rows] == [("a", "A"), ("c", ""), ("b", "B")]
    assert table.remark == "fewer than three seeds: no comparison of 1 row without letters"
    apart = [record(str(k), seed=k, defense="d()", scores={"asr": share(0, 100)}) for k in (3, 4, 5)]
    assert lettered(*made[3:6], *apart) == {"b": "", "d": ""}, "three seeds each, none in common"


def test_rows_are_never_rounded_before_they_are_put_in_order() -> None:
    """3.0 % of hits is not 0.0 %, also where the table shows both as less than ten percentage points."""
    (table,) = tables(
        record(),
        record("bb", defense="skd-cag(target='random_words')", knowledge=("trigger",), scores={"asr": share(6, 200)}),
        record("cc", defense="finetune-reversal(distil=True)", knowledge=("trigger",), scores={"asr": share(0, 200)}),
    )
    assert [row.first.specs.defense.partition("(")[0] for row in table.of("given")] == ["finetune-reversal", "skd-cag"]


def test_the_rows_of_a_published_suite_are_in_the_order_of_their_rates() -> None:
    """In sealing-style several defenses leave 2 to 6 %, which are not the same."""
    suite = results.read_suite(results.SHIPPED / "sealing-style")
    found = [row for table in tables(*suite.records) for row in table.of("given") if row.control is None]
    rates = [row.worst["asr"].value for row in found]
    assert rates == sorted(rates) and len({rate for rate in rates if 0.02 < rate < 0.06}) > 2


def test_only_what_the_defense_itself_broke_takes_its_letters_away() -> None:
    def three(defense: str, **scores: Score) -> list[Record]:
        taken = {"asr": share(0, 100), **scores}
        return [record(f"{defense} {seed}", seed=seed, defense=defense, scores=taken) for seed in range(3)]

    before = {"fd_ratio_before[digits-cnn]": score(1.9)}
    found = lettered(
        *three("none()", **before),
        *three("eraser()", **{"fd_ratio[digits-cnn]": score(9.0)}),
        *three("flattener()", spread=score(0.1)),
        *three("elijah()", **before),
        *three("other()"),
    )
    assert found == {"none": "", "elijah": "A", "other": "A", "eraser": "", "flattener": ""}


def test_a_single_seed_is_compared_also_where_the_attack_had_broken_the_model() -> None:
    before = {"fd_ratio_before[digits-cnn]": score(1.9, interval=(1.7, 2.1))}
    (table,) = tables(*(record(name, defense=f"{name}()", scores=before) for name in ("none", "elijah")))
    (mine,) = (row for row in table.rows if row.defense == "elijah")
    assert DoubtCode.utility_broken_by_attack in {doubt.code for doubt in mine.doubts}
    assert mine.uncompared and not mine.letters, "for want of seeds alone"


def test_what_does_not_purify_or_meets_no_attack_has_no_letters() -> None:
    screen = {"track": "unconditional", "delivers": ["screen"]}
    beside = [*seeds([0] * 3, defense="x()"), *seeds([9] * 3, defense="y()")]
    (table,) = tables(*beside, *seeds([0] * 3, defense="screen()", provenance=screen))
    assert [(row.defense, bool(row.letters)) for row in table.rows] == [("x", True), ("y", True), ("screen", False)]
    assert table.remark == ""
    clean = {"attack": "none()"}
    (table,) = tables(*seeds([0] * 3, defense="x()", **clean), *seeds([90] * 3, defense="y()", **clean))
    assert [(row.letters, row.uncompared) for row in table.rows] == [("", False), ("", False)]


# ---- words ----------------------------------------------------------------------------------------------------------


def test_defenses_show_only_the_parameters_in_which_they_differ() -> None:
    records = [record(str(i), defense=f"skd(alpha=1.0, steps={steps})") for i, steps in enumerate((100, 200))]
    assert [row.defense for row in tables(*records)[0].rows] == ["skd(steps=100)", "skd(steps=200)"]
    said = record("cc", defense="elijah(lr=0.1, steps=9)", provenance={"short": {"defense": "elijah(steps=9)"}})
    assert tables(said)[0].rows[0].defense == "elijah(steps=9)"


def test_doubts_stand_beside_the_row_in_words() -> None:
    text = report.terminal([record(scores={"asr_before": score(0.2)})], width=200)
    assert "a: the attack did not take" in text


def test_the_text_that_a_defense_names_as_the_trigger_is_shown_by_its_characters_numbers() -> None:
    named = [
        record("aa", defense="scan()"),
        record("bb", defense="scan()", seed=1, provenance={"found_trigger": "\u200b|o"}),
    ]
    text = report.markdown([*named, record("cc")])
    assert "- triggers found: scan, seed 1: '\\\\u200b\\|o'\n" in text + "\n"
    assert "triggers found" not in report.markdown([record("cc")])


@pytest.mark.parametrize(("track", "knows"), [("unconditional", "none (blind)"), ("text-to-image", "prompts")])
def test_a_defense_is_listed_with_what_its_model_has_of_what_it_needs(track: str, knows: str) -> None:
    row = record(defense="tnc()", knowledge=["prompts"], provenance={"track": track})
    assert [each.knows for each in rows.pooled([row])] == [knows]
    (line,) = csv.DictReader(io.StringIO(comma_separated([row])))
    assert line["knowledge"] == ("" if track == "unconditional" else "prompts")


def test_text_of_plugins_is_data_and_never_markup() -> None:
    evil = "<script>alert(1)</script>|`x`\n# big\x1b[31m\u200b"
    records = [record(), record("bb", error=evil, defense="a|b<i>()")]
    markdown, shown = report.markdown(records), report.terminal(records, width=300)
    assert "<script>" not in markdown and "<i>" not in markdown and "&lt;script&gt;" in markdown
    assert "a\\|b" in markdown and not any(line.startswith("# big") for line in markdown.splitlines())
    assert "\x1b" not in shown and "\\u001b" in shown and "\\u200b" in shown


# ---- files ----------------------------------------------------------------------------------------------------------


def test_csv_cells_never_become_formulas_and_numbers_stay_numbers() -> None:
    records = [
        record(error="=cmd|' /C calc'!A0", defense="@x()", seed=-1),
        record("bb", scores={"drift": score(-0.5), "asr_before": score(0.2)}),
    ]
    read = list(csv.DictReader(io.StringIO(comma_separated(records))))
    assert read[0]["state"].startswith("failed: =") and read[0]["defense"] == "'@x()"
    assert read[0]["seed"] == "-1" and read[1]["drift"] == "-0.5"
    assert read[1]["attribute_accuracy"] == "nan"
    assert read[1]["attribute_accuracy warning"] == "the model takes no prompts"
    assert read[1]["asr low"] == "0.915" and read[1]["doubts"] == "attack-failed" and read[1]["control"] == "none"


def test_the_report_folder_holds_markdown_json_csv_and_the_records(tmp_path: Path) -> None:
    nan = record("bb", defense="x()", scores={"drift": score(None), "asr_before": score(0.2)})
    letters = [*seeds([0, 0, 1], defense="y()"), *seeds([50, 50, 50], defense="z()")]
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "aaaaaaaa.webp").write_bytes(picture())
    paths = report.write([changed(record("aa"), sheet="sheets/aaaaaaaa.webp"), nan, *letters], [], tmp_path)
    assert {path.stem for path in paths["records"].iterdir()} == {digest("aa"), digest("bb"), *(r.key for r in letters)}
    whole = json.loads(paths["json"].read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert whole["records"][1]["scores"]["drift"]["value"] is None and "doubts" not in whole["records"][1]
    said = {row["defense"]: row for row in whole["rows"]}
    assert said["x"]["letters"] == "" and said["x"]["doubts"][0]["code"] == "attack-failed"
    assert (said["y"]["letters"], said["z"]["letters"]) == ("A", "B")
    assert said["none"]["control"] == "none" and said["none"]["keys"] == [digest("aa")]
    assert "(sheets/aaaaaaaa.webp)" in paths["md"].read_text()
    assert paths["csv"].read_text().startswith("key,model,attack")


def test_a_record_key_cannot_leave_the_folder() -> None:
    with pytest.raises(ValueError, match="String should match pattern"):
        changed(record(), key="../../etc/x")


def test_a_narrow_terminal_keeps_the_essential_columns_and_names_the_others() -> None:
    text = report.terminal([record()], width=84)
    table, legend = text.rsplit("\n\n\n", 1)
    assert "ASR" in table and "cost" not in table
    assert "cost s. report.md has them." in " ".join(legend.split())
    assert max(map(len, text.splitlines())) <= 84
    assert "report.md" not in report.terminal([record()], width=300)


def test_the_tracks_are_apart_and_controls_of_no_attack_come_last() -> None:
    other = record("bb", model="shapes-sd", provenance={"track": "text-to-image"})
    made = tables(other, record("cc", attack="none()"), record("aa"))
    assert [(t.track, t.rows[0].first.short.attack) for t in made] == [
        ("unconditional", "baddiffusion"), ("unconditional", "none"), ("text-to-image", "baddiffusion"),
    ]  # fmt: skip


# ---- doubts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ({"scores": {"asr_before": score(0.49)}}, DoubtCode.attack_failed),
        ({"scores": {"clean_model_hits": score(0.2)}}, DoubtCode.clean_model_hits),
        ({"defense": "x()", "scores": {"change": score(0.0)}}, DoubtCode.unchanged),
        ({"scores": {"spread": score(0.1)}}, DoubtCode.collapsed),
        ({"n": 20}, DoubtCode.few_samples),
        ({"scores": {"fd_ratio_before[digits-cnn]": score(1.5)}}, DoubtCode.utility_broken_by_attack),
        ({"defense": "x()", "scores": {"attribute_drop": score(0.5)}}, DoubtCode.utility_broken_by_defense),
        ({"defense": "x()"}, DoubtCode.control_missing),
    ],
)
def test_each_doubt_is_raised(other: dict[str, Any], code: DoubtCode) -> None:
    plain, doubted = record(), record("bb", **other)
    assert code in codes(doubted, [plain, doubted])


def test_a_sound_record_raises_no_doubt_and_a_failed_one_has_none() -> None:
    records = [record(), record("bb", defense="finetune()"), record("cc", defense="x()")]
    assert set(doubts.of(records).values()) == {()}
    failed = record("dd", error="boom", n=3)
    assert codes(failed, [*records, failed]) == []


def test_a_detector_removes_nothing_and_needs_no_control_of_removal() -> None:
    detector = record("bb", defense="x()", knowledge=("trigger",), provenance={"delivers": ["suspicion"]})
    assert codes(detector, [record(), detector]) == []
    (said,) = doubts.of([detector])[detector.key]
    assert said.text == "control missing: none"


def test_a_defense_that_acts_on_inputs_with_the_trigger_alone_has_changed_something() -> None:
    """Clean images stay as they were under a sampler that only looks for the trigger; that is not nothing."""
    same: dict[str, Any] = {"change": score(0.0), "asr": score(0.9), "asr_before": score(0.9)}
    same |= {"drift_triggered": score(0.31), "drift_triggered_before": score(0.31)}
    idle = record("bb", defense="x()", scores=same)
    assert DoubtCode.unchanged in codes(idle, [record(), idle])
    for other in ({"asr": score(0.0)}, {"drift_triggered": score(0.3100001)}):
        acts = record("cc", defense="x()", scores=same | other)
        assert DoubtCode.unchanged not in codes(acts, [record(), acts])


def test_a_dirty_working_tree_is_doubted() -> None:
    dirty = record(provenance={"dirty": True})
    assert codes(dirty, [dirty]) == [DoubtCode.dirty]


def test_a_defense_given_the_trigger_needs_the_decoy_control_and_must_beat_it() -> None:
    base = [record(), record("bb", defense="finetune()")]
    given: dict[str, Any] = {"defense": "x()", "knowledge": ("trigger",)}
    sighted = record("cc", **given, scores={"removal": score(0.9)})
    (said,) = doubts.of([*base, sighted])[sighted.key]
    assert said.code is DoubtCode.control_missing and said.text.endswith("the same defense given a decoy trigger")
    tried = {"given": "decoy", "chosen": 0, "inert": True, "tried": [{"name": "blobs", "hits": 1, "n": 100}]}
    inert = {"track": "unconditional", "control": tried}
    for removal, sound in ((0.1, True), (0.88, False)):
        decoy = record("dd", **given, trigger_given="decoy", scores={"removal": score(removal)}, provenance=inert)
        assert (codes(sighted, [*base, sighted, decoy]) == []) is sound
        other = changed(decoy, provenance={"jobs": {64 * "e": {"kind": "attack", "label": "by another version"}}})
        assert codes(sighted, [*base, sighted, other]) == [DoubtCode.control_missing]


def test_reporting_needs_no_torch() -> None:
    code = "import sys, leaderboard.report, harness.runs.doubts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
