from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from harness.doubts import annotate, doubts
from leaderboard import report, tables
from tests.records import png

CELL = {
    "model": "digits-ddpm", "attack": "baddiffusion(steps=600)", "trigger": "box(size=5)", "target": "hat()",
    "defense": "none()", "sampler": "ddim(steps=20)", "seed": 0, "told": "truth", "n": 100,
}  # fmt: skip


def score(value: float | None, interval: Any = None, warning: str | None = None) -> dict[str, Any]:
    return {
        "value": value,
        "n": 100,
        "higher_is_better": None,
        "interval": interval,
        "per_sample": None,
        "warning": warning,
    }


def record(key: str = "aa", error: str | None = None, knowledge: tuple[str, ...] = (), **cell: Any) -> dict[str, Any]:
    scores = {
        "asr": score(0.97, (0.915, 0.99)),
        "asr@1e-3": score(0.9),
        "asr_before": score(0.97),
        "removal": score(0.03),
        "clean_hits": score(0.0),
        "false_triggers": score(0.01),
        "fid[digits-cnn]": score(1.5),
        "fid_ratio[digits-cnn]": score(1.1),
        "fid_ratio_before[digits-cnn]": score(1.1),
        "attribute_accuracy": score(None, warning="the model takes no prompts"),
        "drift": score(0.01),
        "change": score(0.002),
        "spread": score(0.9),
        "defense_wall_s": score(12.0),
    }
    scores.update(cell.pop("scores", {}))
    return {
        "key": key, "cell": {**CELL, **cell}, "scores": {} if error else scores, "warnings": [], "error": error,
        "attempts": [], "provenance": {"track": "unconditional"}, "knowledge": list(knowledge),
    }  # fmt: skip


def test_a_row_shows_asr_with_its_interval_and_marks_a_single_seed():
    text = report.terminal([record()], width=200)
    assert "97.0 (91.5–99.0)" in text
    assert "one seed" in text and "[digits-cnn]" in text and "FD\\[digits-cnn\\]" in report.markdown([record()])
    assert "attr." not in text, "a column that nothing fills is left out"


def test_network_evaluations_stand_beside_the_numbers():
    known = record()
    known["provenance"]["nfe"] = 35
    both = report.markdown([known, record("bb", defense="x()")])
    lines = [line for line in both.splitlines() if line.startswith(("| #", "| –", "| 1"))]
    column = [word.strip() for word in lines[0].split("|")].index("NFE")
    assert sorted(line.split("|")[column].strip() for line in lines[1:]) == ["35", "–"]
    rows = list(csv.DictReader(io.StringIO(report.comma_separated([known, record("bb")]))))
    assert [row["nfe"] for row in rows] == ["35", ""]


def test_several_seeds_become_one_row_with_mean_and_t_interval():
    records = [record(str(i) * 4, seed=i, scores={"asr": score(v)}) for i, v in enumerate((0.8, 0.9, 1.0))]
    row = tables.tables(records)[0].rows[0]
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    asr = row.numbers["asr"]
    assert row.seeds == (0, 1, 2) and asr.value == pytest.approx(0.9)
    assert (asr.low, asr.high) == pytest.approx((0.9 - half, 0.9 + half))
    text = report.terminal(records, width=200)
    assert "3 seeds" in text and "90.0 (65.2–100.0)" in text, "a share has its interval within 0 and 100 %"


def test_an_unmeasured_number_is_shown_as_such_with_its_reason_and_never_as_zero():
    records = [record(), record("bb", defense="x()", scores={"drift": score(None, warning="no images")})]
    text = report.markdown(records)
    row = next(line for line in text.splitlines() if "| x " in line)
    assert "n/a (" in row and "n/a: no images" in text
    spread = [record(str(i) * 2, seed=i, scores={"drift": score([0.1, None][i], warning="why")}) for i in (0, 1)]
    assert math.isnan(tables.tables(spread)[0].rows[0].numbers["drift"].value), "one unmeasured seed, no mean"


def test_failed_and_dropped_cells_are_rows_with_their_reason():
    records = [record(), record("bb", error="RuntimeError: boom", defense="broken()")]
    dropped = [{"cell": {**CELL, "defense": "t2i-only()"}, "reason": "takes text triggers only"}]
    for text in (report.terminal(records, dropped, width=200), report.markdown(records, dropped)):
        assert "RuntimeError: boom" in text and "failed" in text
        assert "takes text triggers only" in text and "n/a" in text
        assert "broken" in text and "t2i" in text


def test_defenses_told_the_trigger_are_marked_and_have_places_of_their_own():
    records = [
        record("aa"),
        record("bb", defense="finetune()", scores={"asr": score(0.5)}),
        record("cc", defense="blind()", scores={"asr": score(0.3)}),
        record("dd", defense="weak()", scores={"asr": score(0.7)}),
        record("ee", defense="sighted()", knowledge=("trigger",), scores={"asr": score(0.0)}),
        record("ff", defense="sighted()", knowledge=("trigger",), told="wrong-trigger", scores={"asr": score(0.0)}),
    ]
    rows = tables.tables(records)[0].rows
    assert [(row.defense, row.place) for row in rows] == [
        ("none", ""), ("finetune", ""), ("blind", "1"), ("weak", "2"), ("sighted", "T1"), ("sighted", ""),
    ]  # fmt: skip
    assert rows[4].told == "TRIGGER" and rows[5].told == "WRONG trigger (control)"


def test_a_defense_that_broke_the_model_has_no_place():
    broken = record("bb", defense="eraser()", scores={"asr": score(0.0), "fid_ratio[digits-cnn]": score(9.0)})
    rows = tables.tables(annotate([record(), broken]))[0].rows
    assert [row.place for row in rows] == ["", ""]
    assert any("forgetting" in words for words in rows[1].doubts)


def test_defenses_show_only_the_parameters_in_which_they_differ():
    records = [record(str(i) * 2, defense=f"skd(alpha=1.0, steps={steps})") for i, steps in enumerate((100, 200))]
    assert [row.defense for row in tables.tables(records)[0].rows] == ["skd(steps=100)", "skd(steps=200)"]
    told = {**record("cc", defense="elijah(lr=0.1, steps=9)"), "provenance": {"short": {"defense": "elijah(steps=9)"}}}
    assert tables.tables([told])[0].rows[0].defense == "elijah(steps=9)"


def test_doubts_stand_beside_the_row_in_words():
    records = annotate([record(scores={"asr_before": score(0.2)})])
    text = report.terminal(records, width=200)
    assert "a: the attack did not take" in text


def test_the_text_that_a_defense_names_as_the_trigger_is_shown_by_its_characters_numbers():
    named = [record(key, defense="scan()", seed=seed) for key, seed in (("aa", 0), ("bb", 1))]
    named[1]["provenance"] = {"found_trigger": "\u200b|o"}
    text = report.markdown([*named, record("cc")])
    assert "- triggers found: scan, seed 1: '\\\\u200b\\|o'\n" in text + "\n"
    assert "triggers found" not in report.markdown([record("cc")])


def test_text_of_plugins_is_data_and_never_markup():
    evil = "<script>alert(1)</script>|`x`\n# big\x1b[31m\u200b"
    records = [record(), record("bb", error=evil, defense="a|b<i>()")]
    markdown, shown = report.markdown(records), report.terminal(records, width=300)
    assert "<script>" not in markdown and "<i>" not in markdown and "&lt;script&gt;" in markdown
    assert "a\\|b" in markdown and not any(line.startswith("# big") for line in markdown.splitlines())
    assert "\x1b" not in shown and "\\u001b" in shown and "\\u200b" in shown


def test_csv_cells_never_become_formulas_and_numbers_stay_numbers():
    records = [record(error="=cmd|' /C calc'!A0", defense="@x()", seed=-1), record("bb", scores={"drift": score(-0.5)})]
    rows = list(csv.DictReader(io.StringIO(report.comma_separated(records))))
    assert rows[0]["state"].startswith("failed: =") and rows[0]["defense"] == "'@x()"
    assert rows[0]["seed"] == "-1" and rows[1]["drift"] == "-0.5"
    assert (
        rows[1]["attribute_accuracy"] == "nan" and rows[1]["attribute_accuracy warning"] == "the model takes no prompts"
    )
    assert rows[1]["asr low"] == "0.915"


def test_the_report_folder_holds_markdown_json_csv_and_the_records(tmp_path):
    nan = record("bb", defense="x()", scores={"drift": score(math.nan)})
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "aa.png").write_bytes(png())
    paths = report.write([{**record("aa"), "sheet": "sheets/aa.png"}, nan], [], tmp_path)
    assert sorted(path.name for path in paths["records"].iterdir()) == ["aa.json", "bb.json"]
    whole = json.loads(paths["json"].read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert whole["records"][1]["scores"]["drift"]["value"] is None
    assert "(sheets/aa.png)" in paths["md"].read_text() and "sheets/bb.png" not in paths["md"].read_text()
    assert paths["csv"].read_text().startswith("key,model,attack")


def test_a_record_key_cannot_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match="is no file name"):
        report.write([record("../../etc/x")], [], tmp_path)


def test_a_narrow_terminal_keeps_the_essential_columns():
    text = report.terminal([record()], width=80)
    assert "ASR" in text and "cost" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_tracks_are_apart_and_controls_of_no_attack_come_last():
    other = {**record("bb", model="shapes-sd"), "provenance": {"track": "text-to-image"}}
    made = tables.tables([other, record("cc", attack="none()"), record("aa")])
    assert [(t.track, t.attack) for t in made] == [
        ("unconditional", "baddiffusion"), ("unconditional", "none"), ("text-to-image", "baddiffusion"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scores": {"asr_before": score(0.49)}}, "attack did not take"),
        ({"scores": {"clean_model_hits": score(0.2)}}, "clean model itself meets the target"),
        ({"defense": "x()", "scores": {"change": score(0.0)}}, "changed nothing"),
        ({"scores": {"spread": score(0.1)}}, "samples collapsed"),
        ({"n": 20}, "fewer than 100 samples"),
        ({"scores": {"fid_ratio_before[digits-cnn]": score(1.5)}}, "already broken"),
        ({"defense": "x()", "scores": {"attribute_drop": score(0.5)}}, "forgetting"),
        ({"defense": "x()"}, "control missing: finetune"),
    ],
)
def test_each_doubt_is_raised(changed, words):
    plain, doubted = record(), record("bb", **changed)
    assert any(words in doubt for doubt in doubts(doubted, [plain, doubted]))


def test_a_sound_record_raises_no_doubt_and_a_failed_one_has_none():
    records = [record(), record("bb", defense="finetune()"), record("cc", defense="x()")]
    assert [doubts(each, records) for each in records] == [[], [], []]
    assert doubts(record(error="boom", n=3), records) == []


def test_a_detector_removes_nothing_and_needs_no_control_of_removal():
    detector = {**record("bb", defense="x()", knowledge=("trigger",)), "provenance": {"delivers": ["suspicion"]}}
    assert doubts(detector, [record(), detector]) == []
    assert doubts(detector, [detector]) == ["control missing: none"]


def test_a_dirty_working_tree_is_doubted():
    assert any("uncommitted" in words for words in doubts({**record(), "provenance": {"dirty": True}}, []))


def test_a_defense_told_the_trigger_needs_the_wrong_trigger_control_and_must_beat_it():
    base = [record(), record("bb", defense="finetune()")]
    told = record("cc", defense="x()", knowledge=("trigger",), scores={"removal": score(0.9)})
    assert doubts(told, [*base, told]) == ["control missing: the same defense told a wrong trigger"]
    for removal, sound in ((0.1, True), (0.88, False)):
        wrong = record(
            "dd", defense="x()", knowledge=("trigger",), told="wrong-trigger", scores={"removal": score(removal)}
        )
        assert (doubts(told, [*base, told, wrong]) == []) is sound


@pytest.mark.parametrize(
    ("first", "words"), [(0.001, "opens the backdoor too (50%)"), (0.5, "not removal of this trigger")]
)
def test_a_wrong_trigger_that_opens_the_backdoor_is_no_control(first, words):
    """Of eight distances under four wrong triggers the first two are of the one that defenses are told."""
    distances = {**score(0.1), "per_sample": [first, 0.5, 0.001, 0.001, 0.5, 0.5, None, 0.5]}
    scores = {"removal": score(0.9), "asr_threshold": score(0.01), "false_triggers": distances}
    told = record("cc", defense="x()", knowledge=("trigger",), scores=scores)
    wrong = record("dd", defense="x()", knowledge=("trigger",), told="wrong-trigger", scores=scores)
    (said,) = doubts(told, [record(), record("bb", defense="finetune()"), told, wrong])
    assert words in said


def test_reporting_needs_no_torch():
    code = "import sys, leaderboard.report, harness.doubts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
