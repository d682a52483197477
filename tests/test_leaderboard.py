"""The published leaderboard: records as committed, scores recomputed, the check, tables of defenses and the page."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.cli import call
from harness.judges import statistics
from harness.registry import presets
from harness.runs.record import Dropped, Record
from harness.types import Cell, Score
from leaderboard import (
    add_results,
    charts,
    check,
    figures,
    paper_rankings,
    recompute,
    rendering,
    report,
    reported,
    results,
    rows,
    site,
)
from leaderboard.columns import bounds, of_view, possible
from leaderboard.rows import Control
from tests.records import (
    changed,
    digest,
    of_version,
    picture,
    published,
    record,
    score,
    small,
    write_sealed,
    write_suite,
)

HOSTILE = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'=cmd()|`x`\u202e"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("sealed") / "results" / "small", small()).parent


@pytest.fixture
def root(sealed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of sealed results that a test may spoil."""
    shutil.copytree(sealed, tmp_path / "results")
    yield tmp_path / "results"


def a_record(root: Path) -> Path:
    return min((root / "small" / "records").glob("*.json"))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# ---- records on disk ------------------------------------------------------------------------------------------------


def test_per_sample_values_are_written_short_and_read_back_as_themselves() -> None:
    import numpy as np

    singles = [float(np.float32(x)) for x in (0.1, 1e-7, 0.30669924, 3.0)]
    assert results.singles(singles) == [0.1, 1e-07, 0.30669925, 3.0]
    assert [np.float32(x) for x in results.singles(singles)] == [np.float32(x) for x in singles]
    assert results.singles([1 / 3, None, math.inf]) == [0.33333334, None, None]


def test_a_record_has_a_line_for_each_score_and_writing_it_again_changes_nothing() -> None:
    made = record("elijah(invert=True)", 12)
    text = results.dump(results.stored(changed(made, scores={"nan": score(math.nan)})))
    document = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    del document[results.SEAL]
    again = Record.model_validate(document)
    assert results.dump(results.stored(again)) == text and document["scores"]["nan"]["value"] is None
    assert again.scores["asr"] == made.scores["asr"]
    assert sum(line.startswith('  "asr') for line in text.splitlines()) == 4


def test_a_key_that_is_not_its_files_name_is_refused(root: Path) -> None:
    path = a_record(root)
    change(path, f'"key": "{path.stem}"', f'"key": "../{path.stem}"')
    with pytest.raises(results.ResultsError, match="named for its key"):
        results.read(root)


def test_contact_sheets_are_stored_as_webp_once(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "sheet.png"
    Image.effect_noise((96, 96), 90).convert("RGB").save(path)
    name = results.keep_sheet(path, tmp_path)
    assert Image.open(tmp_path / name).format == "WEBP" and (tmp_path / name).stat().st_size < path.stat().st_size
    assert results.keep_sheet(tmp_path / name, tmp_path / "elsewhere") == name
    assert (tmp_path / "elsewhere" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_contact_sheet_that_is_no_picture_is_named(root: Path, tmp_path: Path) -> None:
    run = write_suite(tmp_path / "run", [record("terd(steps=400)", 5, knowledge=["data"])])
    (path,) = (run / "sheets").iterdir()
    path.write_bytes(b"no picture")
    with pytest.raises(results.ResultsError, match=f"{path}: a contact sheet that is no picture"):
        add_results.add(run, root / "small")
    assert problems(root) == [], "nothing was touched"


def test_rows_get_in_by_adding_a_run_and_replace_those_of_the_same_cell(root: Path, tmp_path: Path) -> None:
    newer = record("terd(steps=300)", 5, knowledge=["data"], version=2)
    write_suite(tmp_path / "run", [newer])
    before = len(results.read_suite(root / "small").records)
    done = add_results.add(tmp_path / "run", root / "small")
    assert len(done.records) == before
    found = [r for r in done.records if r.cell == newer.cell]
    assert [r.key for r in found] == [newer.key] and found[0].value("asr") == 0.05
    assert done.sheet_file(found[0]) is not None and check.check(root).problems == []
    assert [path.name for path in (root / "small" / "records").glob("*.gz")] == [f"{newer.key}.json.gz"]


def second(folder: Path, defense: str) -> tuple[Path, Path]:
    """The files of a defense's record and of one that another version of it made, which is put beside it."""
    suite = results.read_suite(folder)
    row = next(r for r in suite.records if r.cell.defense.startswith(defense))
    newer = of_version(row, 2)
    results.write_record(folder, newer)
    return suite.record_file(row.key), folder / "records" / f"{newer.key}.json"


def test_two_records_of_one_cell_are_named_and_never_added(root: Path, tmp_path: Path) -> None:
    run = write_suite(tmp_path / "run", [record("terd(steps=300)", 5, knowledge=["data"])])
    files = second(run, "terd")
    with pytest.raises(results.ResultsError, match="remove the outdated one, or run the suite again") as caught:
        add_results.add(run, root / "small")
    assert all(str(file) in str(caught.value) for file in files)
    assert problems(root) == [], "nothing was touched"
    files[0].unlink()
    add_results.add(run, root / "small")
    assert problems(root) == []
    files = second(root / "small", "elijah")
    assert [line for line in problems(root) if all(str(file) in line for file in files) and "a second record" in line]
    with pytest.raises(results.ResultsError, match="a second record of the cell"):
        add_results.add(run, root / "small")


def test_a_report_written_again_leaves_its_own_records_and_pictures_and_every_file_of_somebody_else(root: Path) -> None:
    folder, kept = root / "small", small()[:2]
    others = {"precious.txt": "p", "records/my.json": "no JSON", "records/notes/x.json": "x", "sheets/my.png": "m"}
    for name, text in others.items():
        results.write_text(folder / name, text)
    old = small()[2].key
    for name in (f"records/{old}.json.gz", f"reproduced/{old}.json", "sheets/0123456789abcdef0123.webp"):
        results.write_text(folder / name, "of an earlier run")
    report.write(kept, [], folder)
    assert {r.key for r in results.read_suite(folder).records} == {r.key for r in kept}
    ours = {*(f"records/{r.key}.json" for r in kept), kept[0].sheet, "report.md", "report.json", "report.csv"}
    assert set(results.contents(folder)) == ours
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {*ours, *others}
    assert results.strays(folder) == ["precious.txt", "records/my.json", "records/notes", "sheets/my.png"]


def packed(root: Path, folder: Path) -> Path:
    """A folder as it is committed, with the rows of the run in `root`."""
    add_results.add(root / "small", folder)
    return folder


def test_packed_records_are_read_like_plain_ones_and_stay_where_they_say_the_same(root: Path, tmp_path: Path) -> None:
    folder = packed(root, tmp_path / "to" / "small")
    found, plain = results.read_suite(folder).records, results.read_suite(root / "small").records
    assert [results.stored(r) for r in found] == [results.stored(r) for r in plain]  # NaN is not equal to itself
    path = min((folder / "records").glob("*.json.gz"))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=0))  # another zlib's bytes
    before = path.read_bytes()
    packed(root, folder)
    results.write_record(folder, results.read_record(path), packed=True)
    assert path.read_bytes() == before and problems(folder) == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda packed: packed[: len(packed) // 2], "cannot be unpacked"),
        (lambda packed: b"no gzip", "cannot be unpacked"),
        (lambda packed: gzip.compress(b" " * (results.LARGEST + 1)), "more than 64 MB once unpacked"),
    ],
)
def test_a_packed_record_that_cannot_be_read_is_named(root: Path, tmp_path: Path, spoil: Any, says: str) -> None:
    path = min((packed(root, tmp_path / "to") / "records").glob("*.json.gz"))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(results.ResultsError, match=f"{path}: not JSON .*{says}"):
        results.read(tmp_path / "to")


def test_a_sheet_elsewhere_is_refused(root: Path) -> None:
    (row, *_) = results.read_suite(root / "small").records
    results.write_record(root / "small", changed(row, sheet=f"../{row.sheet}"))
    with pytest.raises(results.ResultsError, match=r"should be sheets/<hash>\.webp"):
        results.read(root)


# ---- recomputation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_score_of_the_committed_records_follows_from_its_values(published: list[results.Results]) -> None:
    for suite in published:
        for each in suite.records:
            found = recompute.recompute(each.scores)
            assert found.problems == (), each.key
            assert "asr" in found.recomputed or each.error


def test_rates_means_ratios_and_removal_are_recomputed() -> None:
    values = (0.001, 0.02, 0.5, 0.005)
    scores = {
        "asr": score(0.5, 4, per_sample=values, interval=(0.15003898915214947, 0.8499610108478506)),
        "asr@1e-3": score(0.25, 4, interval=(0.04558726080970059, 0.6993581574175981)),
        "asr_threshold": score(0.01),
        "removal": score(0.5, 4, interval=(0.1500389891521494, 0.8499610108478505)),
        "drift": score(2.5, 4, per_sample=(1.0, 2.0, 3.0, 4.0), interval=(0.445739743239121, 4.554260256760879)),
        "fid[j]": score(3.0), "fid_clean[j]": score(2.0), "fid_ratio[j]": score(1.5),
        "spread": score(0.9), "nothing": score(None, warning="why"),
    }  # fmt: skip
    found = recompute.recompute(scores)
    assert found.problems == ()
    assert set(found.recomputed) == {"asr", "asr@1e-3", "removal", "drift", "fid_ratio[j]"}
    for name in found.recomputed:
        wrong = {**scores, name: replace(scores[name], value=scores[name].value + 0.25)}
        assert any(words.startswith(name) for words in recompute.recompute(wrong).problems), name
    around = {**scores, "fid_ratio[j]": score(1.5, interval=(1.2, 1.8))}
    assert recompute.recompute(around).problems == (), "a bootstrap over samples that no record holds"
    scores["drift"] = replace(scores["drift"], interval=(0.4, 4.6))
    assert "drift has the interval (0.4, 4.6)" in recompute.recompute(scores).problems[0]


def test_only_shares_are_counted_without_values() -> None:
    """A distance between 0 and 1 is no share, whatever its interval."""
    distance = Score(0.0424, 256, False, (0.0368, 0.0479))
    assert recompute.recompute({"kd[efficientnet-lite0]": distance}).problems == ()
    (words,) = recompute.recompute({"recognised": distance}).problems
    assert words.startswith("recognised is")


def test_the_screens_area_is_recomputed_from_what_it_said_of_each_input() -> None:
    clean, triggered = [0.1, 0.4, 0.35, 0.2], [0.8, 0.7, 0.38, 0.9]
    area, interval = statistics.auroc(clean, triggered)
    assert area == 15 / 16
    scores = {"screen_auroc": score(area, 8, per_sample=(*clean, *triggered), interval=interval)}
    assert recompute.recompute(scores).recomputed == ("screen_auroc",)
    scores["screen_auroc"] = replace(scores["screen_auroc"], per_sample=(0.95, *clean[1:], *triggered))
    assert len(recompute.recompute(scores).problems) == 1


def test_a_share_without_values_must_be_a_whole_count_with_its_own_interval() -> None:
    interval = statistics.wilson(93, 100)
    assert recompute.recompute({"x": score(0.93, interval=interval)}).problems == ()
    assert recompute.recompute({"x": score(0.935, interval=interval)}).problems
    assert recompute.recompute({"x": score(0.92, interval=interval)}).problems


# ---- the check ------------------------------------------------------------------------------------------------------


def problems(root: Path, page: Path | None = None) -> list[str]:
    return [str(problem) for problem in check.check(root, page).problems]


def test_sound_results_and_their_page_pass_the_check(sealed: Path, tmp_path: Path) -> None:
    site.build(results.read(sealed), tmp_path / "page")
    found = check.check(sealed, tmp_path / "page")
    assert found.problems == [] and found.records == 13 and found.recomputed > 100


def test_one_digit_in_a_record_fails_with_the_file_named(root: Path) -> None:
    path = a_record(root)
    line = next(line for line in path.read_text().splitlines() if line.startswith('  "spread"'))
    change(path, line, line.replace('"value": 0.9', '"value": 0.8'))
    assert [line for line in problems(root) if str(path) in line and "sha256" in line]


def test_one_per_sample_value_fails_even_with_a_digest_made_to_fit(root: Path) -> None:
    path = a_record(root)
    change(path, '"per_sample": [0.001, ', '"per_sample": [0.25, ')
    assert any(str(path) in line and "sha256" in line for line in problems(root))
    write_sealed(root / "small", json.loads(path.read_text()))
    found = problems(root)
    assert any(str(path) in line and "its values give" in line for line in found), found
    assert not any("sha256" in line for line in found)


def test_one_changed_image_fails_with_the_file_named(root: Path) -> None:
    path = min((root / "small" / "sheets").glob("*.webp"))
    path.write_bytes(picture(24, 17))
    assert any("is not what its name" in line and f"sheets/{path.name}" in line for line in problems(root))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r["provenance"].update(dirty=True), "uncommitted changes"),
        (lambda r: r["provenance"].update(commit=None), "names no commit"),
        (lambda r: r["scores"]["spread"].update(value=None), "spread is unmeasured and does not say why"),
        (lambda r: r["scores"].pop("clean_hits"), "partial: lacks clean_hits"),
        (lambda r: r["scores"]["asr"].pop("value"), "scores.asr.value: Field required"),
        (lambda r: r["cell"].update(colour="red"), "cell.colour: Unexpected keyword"),
        (lambda r: r.update(doubts=["invented"]), "doubts: Extra inputs"),
        (lambda r: r.update(sheet="sheets/0123456789.webp"), "its contact sheet is not there"),
        (lambda r: r["provenance"]["jobs"].update(a={"kind": "attack", "label": "x"}), "another backdoored model"),
        (lambda r: r["provenance"]["jobs"].update(a={"kind": "sample", "label": "sample clean inputs, clean x"}),
         "another protocol"),
    ],
)  # fmt: skip
def test_a_row_that_may_not_be_believed_fails_with_its_file(root: Path, spoil: Any, says: str) -> None:
    suite = results.read_suite(root / "small")
    row = next(r for r in suite.records if r.cell.defense.startswith("terd"))
    document = json.loads(suite.record_file(row.key).read_text())
    spoil(document)
    write_sealed(root / "small", document)
    found = problems(root)
    assert any(row.key in line and says in line for line in found), found


@pytest.mark.parametrize("control", ["none", "finetune"])
def test_a_row_without_its_controls_fails(root: Path, control: str) -> None:
    suite = results.read_suite(root / "small")
    for row in suite.records:
        if row.cell.defense.startswith(control):
            suite.record_file(row.key).unlink()
    assert any(f"its control is missing: {control}" in line for line in problems(root))


def test_files_that_are_no_part_of_the_results_fail(root: Path) -> None:
    (root / "small" / "notes.txt").write_text("x")
    words = "no part of the results; move it elsewhere"
    assert problems(root) == [f"{root / 'small' / 'notes.txt'}: {words}"]
    (root / "small" / "notes.txt").unlink()
    extra = root / "small" / "records" / f"{digest('extra')}.json"
    shutil.copy(a_record(root), extra)
    words = f"a record is a file named for its key, which is hex digits; {results.ANEW}"
    assert problems(root) == [f"{extra}: {words}"]
    extra.unlink()
    orphan = root / "small" / results.sheet_name(picture(8, 8))
    orphan.write_bytes(picture(8, 8))
    assert problems(root) == [f"{orphan}: no record names this contact sheet; remove it"]


def test_a_page_that_the_records_do_not_give_fails(sealed: Path, tmp_path: Path) -> None:
    site.build(results.read(sealed), tmp_path)
    change(tmp_path / "index.html", "97.0", "7.0")
    assert [line.split(": ")[0] for line in problems(sealed, tmp_path)] == [str(tmp_path / "index.html")]


@pytest.mark.parametrize(
    ("where", "limit", "says"),
    [
        ("check.LIMIT", 1000, "are committed"),
        ("check.PER_RECORD", 100, "kB per record with its contact sheet"),
        ("results.SHEET_LIMIT", 10, "a contact sheet has at most"),
    ],
)
def test_results_over_a_size_limit_fail(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, limit: int, says: str
) -> None:
    folder = packed(root, tmp_path / "to")
    monkeypatch.setattr(f"leaderboard.{where}", limit)
    assert any(says in line for line in problems(folder))


def test_bench_leaderboard_check_ends_with_5_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = published("ablation", tmp_path)
    assert call(["leaderboard", "check", "--results", str(root)]) == 0
    printed = capsys.readouterr()
    assert "all well: 24 records" in printed.out
    assert "unverifiable: 24 rows were made before records held the ingredients of their keys" in printed.err
    assert "24 of the rows here are not in suite ablation of today, which plans 31 others" in printed.err
    way = "git checkout the commit, then bench run ablation; commits (rows): aeb1e11b313f (5), b6d8f5642b3e (2), fc29"
    assert way in printed.err
    path = min((root / "records").glob("*.json"))
    change(path, '"attempt": 1', '"attempt": 2')
    assert call(["leaderboard", "check", "--results", str(root)]) == 5
    assert f"records/{path.name[:12]}.json: " in capsys.readouterr().out


def test_the_lines_of_the_check_are_short_and_say_a_thing_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress and notes are on stderr; what several rows have in common is one line, and so is a missing control."""
    for path in results.record_files(root / "small"):
        if results.read_record(path).cell.defense.startswith("finetune"):
            path.unlink()
    monkeypatch.chdir(tmp_path)
    assert call(["leaderboard", "check", "--results", str(root)]) == 5
    out, err = capsys.readouterr()
    assert "checking small, 1 of 1 ...\n" in err and "comparing 11 records ...\n" in err
    assert "its control is missing: finetune" in out and "control missing: finetune" not in err
    assert not re.search(r"[0-9a-f]{64}", out + err) and str(tmp_path) not in out + err
    notes = [line for line in err.splitlines() if line.startswith("note: ") and " rows, such as " in line]
    assert notes and len(set(notes)) == len(notes)
    assert re.search(r"problems: 11 records, 11 of them unverifiable in part, ", out.splitlines()[-1])
    assert call(["leaderboard", "check", "--results", str(root), "--json"]) == 5
    told, silent = capsys.readouterr()
    assert silent == "" and len(json.loads(told)["unverifiable"]) == 11
    assert call(["leaderboard", "check", "--results", "/no/where"]) == 2


@pytest.mark.parametrize("words", [["check", "--page"], ["serve"]])
def test_a_folder_that_is_no_page_is_one_line_with_the_command_that_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert call(["leaderboard", *words, str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert f"{tmp_path}: no index.html; bench leaderboard build -o {tmp_path} writes it" in printed.err


def test_ctrl_c_ends_serving_quietly(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socketserver

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", interrupted)
    assert call(["leaderboard", "serve", str(page), "--port", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_one_line_with_the_way_out(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call(["leaderboard", "serve", str(page), "--port", str(port)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and f"--port {port}: Address already in use; name another, or 0" in printed.err


def test_a_file_in_the_way_of_page_or_results_is_named_before_anything_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    afile = tmp_path / "afile"
    afile.write_text("mine")
    for words, option in (
        (["build", "--results", str(root), "-o"], "-o"),
        (["add", str(root / "small"), "--to"], "--to"),
    ):
        assert call(["leaderboard", *words, str(afile)]) == 2
        says = f"{afile}: cannot be written (Not a directory); name another with {option}"
        assert says in capsys.readouterr().err and afile.read_text() == "mine"


def test_adding_says_what_it_did_as_json(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["leaderboard", "add", str(root / "small"), "--to", str(tmp_path / "to"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "to"), "records": 13}


def test_results_that_cannot_be_read_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_record(root).write_text("no JSON")
    assert call(["leaderboard", "build", "-o", str(root / "page"), "--results", str(root / "small")]) == 2
    assert f"{a_record(root)}: not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_the_committed_results_and_their_page_pass_the_check(tmp_path: Path) -> None:
    site.build(results.read(results.SHIPPED), tmp_path)
    assert problems(results.SHIPPED, tmp_path) == []


# ---- tables of defenses ---------------------------------------------------------------------------------------------


def purification(records: Sequence[Record]) -> list[rows.Table]:
    return rows.by_task(rows.pooled(records), "unconditional", "purification")


def test_worst_case_and_mean_stand_side_by_side_over_equal_settings() -> None:
    (table,) = purification(small())
    assert len(table.settings) == 2
    assert [row.control for row in table.of("control")] == [Control.none, Control.finetune]
    found = {row.first.specs.defense: row for row in table.of("blind")}
    elijah = found["elijah(invert=True, steps=150)"]
    assert elijah.worst["asr"].value == 0.42 and elijah.mean["asr"] == pytest.approx(0.365)
    assert elijah.deciding["asr"].specs.attack.startswith("villandiffusion")
    given = [(row.first.specs.defense, row.control) for row in table.of("given")]
    assert given == [("skd(steps=80)", None), ("skd(steps=80)", Control.decoy)]


def test_defenses_that_met_other_attacks_are_never_in_one_table() -> None:
    made = [record(d, attack=a) for d in ("none", "finetune()") for a in ("one()", "two()")]
    made += [record("a()", 10, attack="one()"), record("b()", 20, attack="one()"), record("b()", 20, attack="two()")]
    found = purification(made)
    assert [[row.first.specs.defense for row in table.of("blind")] for table in found] == [["b()"], ["a()"]]
    assert all(len(table.of("control")) == 2 for table in found)


def test_a_setting_that_another_suite_measured_with_another_utility_set_counts_once() -> None:
    """Else a seed counts twice, and the worst of one seed stands for three."""
    made = [record("a()", hits, seed=seed) for seed, hits in enumerate((9, 3, 3))]
    again = changed(made[0], cell={"utility_n": made[0].cell.utility_n + 7})
    for records in ([*made, again], [again, *made]):
        (table,) = purification(records)
        (row,) = table.of("blind")
        assert row.seeds == 3
        assert row.worst["asr"].value == pytest.approx(0.05) and row.mean["asr"] == pytest.approx(0.05)


def test_rows_that_are_not_shown_to_differ_share_a_letter_instead_of_a_rank() -> None:
    rates = {"d0": (2, 3, 1), "d1": (4, 3, 5), "d2": (30, 33, 31), "d3": (34, 28, 36), "d4": (90, 91, 89)}
    made = [record(f"{name}()", k, seed=seed) for name, hits in rates.items() for seed, k in enumerate(hits)]
    made += [record("broken()", 0, ratio=3.0, seed=seed) for seed in range(3)]
    (table,) = purification(made)
    assert [(row.first.specs.defense, row.letters) for row in table.of("blind")] == [
        ("d0()", "A"), ("d1()", "A"), ("d2()", "B"), ("d3()", "B"), ("d4()", "C"), ("broken()", ""),
    ]  # fmt: skip


def test_over_several_settings_rows_are_compared_by_their_worst_at_each_seed() -> None:
    """a and b differ on the easy attack alone; what counts at each seed is the hard one, where they do not."""
    made = [
        record(defense, hits, attack=attack, seed=seed)
        for seed in range(3)
        for defense, attack, hits in (
            ("a()", "easy()", 0), ("a()", "hard()", 50 + seed), ("b()", "easy()", 40), ("b()", "hard()", 52 - seed),
            ("c()", "easy()", 95), ("c()", "hard()", 10),
        )
    ]  # fmt: skip
    (table,) = purification(made)
    assert {row.defense: row.letters for row in table.rows} == {"a": "A", "b": "A", "c": "B"}
    without = [each for each in made if (each.cell.defense, each.cell.attack, each.cell.seed) != ("c()", "hard()", 2)]
    (table,) = purification(without)
    assert {row.defense: row.letters for row in table.rows} == {"a": "A", "b": "A", "c": ""}, "two seeds have both"


def test_a_rows_level_says_how_far_it_was_checked() -> None:
    sound = record("a()").scores
    wrong = {**sound, "asr": replace(sound["asr"], value=0.5)}
    assert recompute.level(sound, False) == "recomputed" and recompute.level(wrong, True) == "claimed"
    assert recompute.level(sound, True) == "reproduced"


def test_a_cell_run_by_two_versions_is_two_rows_and_never_two_seeds() -> None:
    one, other = record("a()", 10), changed(record("a()", 20), key=digest("another version"))
    assert sorted(cell.number("asr").value for cell in rows.pooled([one, other])) == [0.1, 0.2]


def test_a_combination_left_out_for_every_seed_is_one_row() -> None:
    left = [Dropped(replace(record("a()").cell, seed=seed), "takes text triggers only") for seed in range(3)]
    (cell,) = rows.pooled([], left)
    assert cell.state == rows.State("n/a", "takes text triggers only") and cell.knows == "–"


def test_tasks_follow_from_what_a_defense_delivers_and_what_was_measured() -> None:
    made = [
        record("screen()", delivers=["screen"], more={"screen_auroc": score(0.9, 8)}),
        record("both()", delivers=["model", "suspicion"], more={"suspicion": score(0.3, 1)}),
        record("clip()", delivers=["sampler"]),
        record("none"),
    ]
    assert {cell.specs.defense: cell.tasks for cell in rows.pooled(made)} == {
        "screen()": ("screening",), "both()": ("purification", "detection"), "clip()": ("purification",),
        "none": ("purification", "attacks"),
    }  # fmt: skip


def test_screens_and_detectors_have_their_own_views_with_curves(tmp_path: Path) -> None:
    clean, triggered = [0.1, 0.4, 0.35, 0.2], [0.8, 0.7, 0.38, 0.9]
    area, interval = statistics.auroc(clean, triggered)
    said = {"screen_auroc": score(area, 8, interval=interval, per_sample=(*clean, *triggered))}
    made = [record("none"), record("screen()", delivers=["screen"], more=said)]
    for seed in range(3):
        for attack, suspicion in (("none(steps=50)", 0.1), ("trojdiff()", 0.9)):
            more = {"suspicion": score(suspicion + seed / 100, 1)}
            made.append(record("judge()", attack=attack, seed=seed, delivers=["suspicion"], more=more))
    site.build([results.Results("x", tmp_path, tuple(made))], tmp_path)
    text = (tmp_path / "index.html").read_text()
    screening = text[text.index('data-task="screening"') : text.index('data-task="detection"')]
    detection = text[text.index('data-task="detection"') : text.index('data-task="attacks"')]
    assert "0.938" in screening and "ROC of screening" in screening and "screen</b>" in screening
    assert "3 + 3" in detection and "1.000" in detection and "ROC over models" in detection
    assert (tmp_path / "charts" / "unconditional-detection-0.svg").is_file()


# ---- charts ---------------------------------------------------------------------------------------------------------


def test_names_in_a_chart_keep_their_distance_and_their_order() -> None:
    heights = charts.spread([50, 50, 51, 300], 20, 0, 340)
    assert all(b - a >= 20 - 1e-9 for a, b in itertools.pairwise(heights)) and heights[3] == 300
    crowded = charts.spread([340] * 5, 20, 0, 340)
    assert max(crowded) <= 340 and min(crowded) >= 0 and len(set(crowded)) == 5


def test_axes_have_round_numbers_that_span_the_data() -> None:
    assert charts.nice(0, 100) == [0, 20, 40, 60, 80, 100]
    assert charts.nice(1.19, 2.26) == [1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.4]
    assert charts.nice(3, 3)[0] <= 3 <= charts.nice(3, 3)[-1]


def test_a_chart_is_well_formed_and_its_names_are_text() -> None:
    from xml.etree import ElementTree

    points = [charts.Point(HOSTILE[:-1], 10, 1.5, kind) for kind in ("blind", "given", "control")]
    axis = charts.Axis("x <b>")
    line = charts.Curve(HOSTILE[:-1], (0, 1), (0, 1))
    for drawn in (charts.scatter(points, axis, axis, "t", True), charts.curves([line], axis, axis, "t", True)):
        tree = ElementTree.fromstring(drawn)
        assert not [node for node in tree.iter() if node.tag.endswith(("script", "img", "b"))]
    assert charts.scatter([charts.Point("a", math.nan, 1, "given")], axis, axis, "t") == ""


def test_a_defense_with_three_budgets_has_a_curve_and_one_with_two_has_none() -> None:
    made = [record("none", 97), *(record(f"skd(steps={k}, lr=0.1)", 90 - k) for k in (40, 10, 80))]
    made += [record(f"sau(steps={k})", 50) for k in (10, 20)]
    (table,) = rows.by_task(rows.pooled(made), "unconditional", "purification")
    drawn = {figure.caption: figure.file for figure in figures.of_table(table, "purification")}
    curve = drawn["What is left after how much training."]
    assert "skd" in curve and "sau" not in curve and curve.count("<title>") >= 1
    (path,) = re.findall(r'class="curve s0" d="M([^"]+)"><title>', curve)
    across = [float(point.split()[0]) for point in path.split("L")]
    assert across == sorted(across) and len(across) == 3, "in the order of the budgets"
    few = [each for each in made if "steps=80" not in each.cell.defense]
    (table,) = rows.by_task(rows.pooled(few), "unconditional", "purification")
    assert len(figures.of_table(table, "purification")) == len(drawn) - 2


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(sealed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    site.build(results.read(sealed), out)
    return out


def test_the_same_records_give_the_same_bytes(sealed: Path, page: Path, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for name in (site.MARK, "cells/old.html"):
        (tmp_path / name).write_text("of an earlier build")
    site.build(results.read(sealed), tmp_path)
    files = {p.relative_to(page) for p in page.rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert all((page / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_a_page_is_built_into_no_folder_of_somebody_elses(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "charts").mkdir()
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(results.ResultsError, match="holds files of another kind"):
        site.build(results.read(sealed), tmp_path)
    assert (tmp_path / "charts").is_dir() and (tmp_path / "index.html").read_text() == "mine"


def test_the_page_has_every_cell_and_its_one_line_of_reproduction(page: Path) -> None:
    assert dead_links(page) == set()
    cells = [path.read_text() for path in (page / "cells").glob("*.html")]
    assert len(cells) == 13
    keys = {r.key for r in small()}
    assert {key for text in cells for key in re.findall(r"<pre>bench reproduce ([0-9a-f]{12})</pre>", text)} == {
        k[:12] for k in keys
    }
    assert all("poison_rate" in text or "none" in text for text in cells)
    document = json.loads((page / "leaderboard.json").read_text())
    assert {s["key"] for cell in document["cells"] for s in cell["seeds"].values()} == keys
    lines = list(csv.DictReader(io.StringIO((page / "leaderboard.csv").read_text())))
    assert len(lines) == 13 and "worst" in (page / "LEADERBOARD.md").read_text()


def test_a_cells_page_shows_what_the_defense_says_of_its_own_work(tmp_path: Path) -> None:
    first, second, elijah, *rest = small()
    notes = {"loss": [0.5, 0.3, 0.25], "kept": {"channels": 0.875}, "found": ["<b>", "sks"]}
    elijah = changed(elijah, provenance={"notes": notes, "found_trigger": "f\u043ex"})
    made = [first, second, elijah, *rest]
    site.build(results.read(write_suite(tmp_path / "results" / "small", made).parent), tmp_path / "page")
    pages = [file.read_text() for file in (tmp_path / "page" / "cells").glob("*.html")]
    (text,) = [text for text in pages if "says of its own work" in text]
    for said in ("0.5 … 0.25 (3 values)", "kept.channels", "0.875", "&lt;b&gt;", "f\\u043ex"):
        assert said in text


def test_where_our_order_is_not_a_papers_the_page_says_so(tmp_path: Path) -> None:
    places: dict[str, Any] = {"attack": "badt2i(steps=800)", "trigger": "text()", "target": "patch()"}
    made = [
        record("none", **places),
        *(record("skd(steps=80)", 40, **places, seed=seed) for seed in range(3)),
        *(record("skd-cag(steps=80)", 20, **places, seed=seed) for seed in range(3)),
        *(record("skd-cag(steps=80, target='random_words')", 4, **places, seed=seed) for seed in range(3)),
        record("skd-cag(steps=80, time_weight='mul')", 90, **places),
        record("skd-cag(steps=80)", 100, **{**places, "target": "style()"}),
    ]
    site.build(results.read(write_suite(tmp_path / "results" / "small", made).parent), tmp_path / "page")
    text = (tmp_path / "page" / "LEADERBOARD.md").read_text()
    (said,) = re.findall(r"### removal of the pixel backdoor: .*?Ours differs.*?$", text, re.DOTALL | re.MULTILINE)
    assert "- skd: paper 97 %, ours 60 %" in said and "- skd-cag: paper 100 %, ours 80 %" in said
    assert "(96 %) is above skd-cag (80 %), in the paper 45 % against 100 %" in said
    assert "(96 %) is above skd (60 %), in the paper 45 % against 97 %" in said
    assert "skd-cag (80 %) is above skd (60 %)" not in said and "style" not in said
    for name in ("index.html", "defenses/skd.html"):
        assert "Ours differs" in (tmp_path / "page" / name).read_text()
    assert "Ours differs" not in (tmp_path / "page" / "defenses" / "none.html").read_text()


def of_presets(attack: str, defense: str, hits: int, **more: Any) -> Record:
    """The record of a cell whose attack and defense are spelled as in these presets."""
    told = {"attack": presets.shipped()["attacks", attack].spec, "defense": presets.shipped()["defenses", defense].spec}
    made = record(told["defense"], hits, attack=told["attack"], **more)
    return changed(made, provenance={"short": told, "track": "text-to-image"})


def dead_links(page: Path) -> set[str]:
    """Links and pictures of all pages that lead to no file."""
    found = set()
    for path in page.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)', path.read_text()):
            if not (path.parent / link).is_file():
                found.add(f"{path.relative_to(page)}: {link}")
    return found


def test_rows_of_presets_stand_on_the_page_of_their_plugin_and_beside_the_papers_numbers(tmp_path: Path) -> None:
    where: dict[str, Any] = {"trigger": "text()", "target": "patch()", "model": "shapes-sd"}
    more = {"attribute_drop": score(0.0), "attribute_drop_before": score(0.0)}
    made = [
        of_presets("shapes-badt2i", name, hits, **where, seed=seed, more=more)
        for name, hits in (("skd-text", 2), ("skd-cag-text", 4), ("finetune-text", 90))
        for seed in (0, 1)
    ]
    every = results.read(write_suite(tmp_path / "results" / "small", made).parent)
    counts = site.build(every, tmp_path / "page")
    assert (counts["defenses"], counts["attacks"], counts["cells"]) == (3, 1, 3)
    assert {path.stem for path in (tmp_path / "page" / "defenses").iterdir()} == {"skd", "skd-cag", "finetune"}
    text, index = (tmp_path / "page" / name for name in ("defenses/skd.html", "index.html"))
    assert "skd-text" in text.read_text() and "Ours differs" in text.read_text()
    assert "Cleaned models: shapes-sd" in index.read_text() and dead_links(tmp_path / "page") == set()


def test_places_that_our_seeds_do_not_tell_apart_are_named() -> None:
    entries = [
        reported.Number(
            defense=name,
            attack="a",
            model="m",
            score="s",
            unit="share",
            value=value,
            ours="removal",
            paper="p",
            where="w",
            read="paper",
            order="o",
        )
        for name, value in zip("xyz", (0.9, 0.8, 0.8), strict=True)
    ]
    x, y, z = entries

    def place(entry: reported.Number, *removed: int) -> paper_rankings.Place:
        made = [record(f"{entry.defense}()", 100 - k, seed=seed) for seed, k in enumerate(removed)]
        return paper_rankings.Place(entry, tuple(k / 100 for k in sorted(removed)), tuple(made))

    same = [place(x, 50, 90, 70), place(y, 60, 70, 65), place(z, 70, 60, 65)]
    assert paper_rankings.differences(same) == ("no two of them are distinguished",)
    assert paper_rankings.differences([place(x, 90, 90, 90), place(y, 60, 70, 65), place(z, 65, 65, 65)]) == ()
    found = paper_rankings.differences([place(x, 70, 90, 65), place(y, 70, 69, 71), place(z, 40, 41, 40)])
    assert found == ("y (69–71 %) is above z (40–41 %), in the paper equal", "not distinguished: x and y")
    few = [place(x, 90, 90), place(z, 50, 50)]
    assert paper_rankings.differences(few) == ("no two of them are distinguished",)
    overlapping = [place(z, 50, 60, 70), place(x, 59, 70, 81)]
    assert paper_rankings.differences(overlapping) == (
        "x (59–81 %) is above z (50–70 %), in the paper 90 % against 80 %",
    )


def test_a_defenses_page_shows_what_papers_report_beside_ours(page: Path) -> None:
    text = (page / "defenses" / "elijah.html").read_text()
    assert "2407.21316" in text and "Table 1" in text and "not yet checked in the paper" in text


def test_pages_ask_for_nothing_from_elsewhere_and_let_only_their_own_scripts_run(page: Path) -> None:
    import base64
    import hashlib

    for path in page.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text), path
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
        assert "unsafe" not in policy and policy.startswith("default-src &#39;none&#39;")
        scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
        assert all(f"sha256-{found}" in policy for found in hashes) and (scripts or path.name != "index.html")
        assert not re.search(r"\son\w+=|\sstyle=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)), path


def hostile() -> list[Record]:
    """Records with markup and formulas in every string that a third party fills."""

    def spoil(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {(HOSTILE + str(i) if name in ("scores", "versions") and k not in ("asr", "asr_threshold") else k):
                    spoil(v, str(k)) for i, (k, v) in enumerate(value.items())}  # fmt: skip
        if isinstance(value, list | tuple):
            return [spoil(item, name) for item in value]
        keep = name in ("key", "track", "trigger_given", "kind", "sheet")
        return value if not isinstance(value, str) or keep else f"=cmd(){HOSTILE}"

    def spoiled(row: Record) -> Record:
        return Record.model_validate(spoil(row.model_dump()))

    noted = changed(record("x()", 50, knowledge=["a"]), provenance={"notes": {"said": ["a", {"b": "c"}]}})
    failed = record("y()").model_copy(update={"scores": {}, "error": "boom", "warnings": ("w",)})
    return [spoiled(noted), record("none"), record("finetune()"), spoiled(failed)]


def left_out() -> Dropped:
    """A cell that a hostile suite left out."""
    return Dropped(Cell(*[HOSTILE] * 6, seed=0), HOSTILE)


def test_text_of_strangers_is_never_markup_or_a_formula(tmp_path: Path) -> None:
    write_suite(tmp_path / "results", hostile(), [left_out()])
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    for path in (tmp_path / "page").rglob("*"):
        if path.suffix in (".html", ".svg", ".md"):
            text = path.read_text()
            assert "<script>window" not in text and "<img src=x" not in text, path
            assert "\u202e" not in text, f"{path}: a character that turns text around"
    for line in csv.reader(io.StringIO((tmp_path / "page" / "leaderboard.csv").read_text())):
        assert not any(cell.startswith(("=", "+", "@")) for cell in line)
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "page" / "index.html").read_text(), re.DOTALL)
    assert data is not None and HOSTILE[:20] in json.dumps(json.loads(data[1])["words"], ensure_ascii=False)


def test_the_vendored_table_is_the_published_one() -> None:
    import hashlib

    folder = rendering.ASSETS / "tabulator"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert "MIT" in (folder / "LICENSE").read_text()


# ---- reported numbers -----------------------------------------------------------------------------------------------


def test_the_papers_numbers_are_well_formed() -> None:
    assert reported.shipped().number
    for entry in reported.shipped().number:
        assert entry.cited and entry.shown


@pytest.mark.parametrize(
    ("change_of", "says"),
    [
        ({"value": 97}, "write 0.97 for 97 %"),
        ({"low": 0.1, "high": 0.2}, "give either value, or low and high"),
        ({"paper": "0000.00000"}, "which no [[papers]] has"),
        ({"tabel": "1"}, "tabel: Extra inputs"),
        ({"read": "somewhere"}, "read: Input should be"),
    ],
)
def test_a_malformed_reported_number_is_named(tmp_path: Path, change_of: dict[str, Any], says: str) -> None:
    entry = {
        "defense": "d", "attack": "a", "model": "m", "score": "ASR", "unit": "share", "value": 0.5, "paper": "1234.5",
        "where": "Table 1", "read": "paper", **change_of,
    }  # fmt: skip
    body = "\n".join(f"{key} = {json.dumps(value)}" for key, value in entry.items())
    path = tmp_path / "reported.toml"
    path.write_text(f'[[papers]]\nid = "1234.5"\ntitle = "t"\nvenue = "v"\n[[number]]\n{body}\n')
    with pytest.raises(reported.ReportedError, match=re.escape(says)):
        reported.read(path)


@pytest.mark.parametrize(
    ("score", "interval", "shown"),
    [
        ("attribute_accuracy_before", (0.994, 1.002), (0.994, 1.0)),
        ("asr@1e-3", (-0.1, 1.1), (0.0, 1.0)),
        ("defense_wall_s", (-52.0, 197.0), (0.0, 197.0)),
        ("perceptual_distance_triggered[lpips]", (-0.005, 1.6), (0.0, 1.6)),
        ("target_ssim", (-0.04, 1.007), (-0.04, 1.0)),
        ("removal", (-3.0, 1.2), (-3.0, 1.0)),
        ("clip_score_clean[judge]", (93.0, 100.4), (93.0, 100.0)),
        ("kid[judge]", (-17.0, 2.0), (-17.0, 2.0)),
        ("asr", None, None),
    ],
)
def test_intervals_stay_within_what_a_score_can_be(
    score: str, interval: tuple[float, float] | None, shown: tuple[float, float] | None
) -> None:
    assert possible(score, interval) == shown


def test_seeds_that_all_give_one_value_have_the_interval_of_their_samples() -> None:
    (cell,) = rows.pooled([record(hits=0, seed=seed) for seed in range(3)])
    assert cell.number("asr").interval == statistics.wilson(0, 100)
    assert cell.number("fd_ratio[]").interval is None, "no seed has one"
    (cell,) = rows.pooled([record(hits=seed, seed=seed) for seed in range(3)])
    low, high = statistics.mean_interval([0.0, 0.01, 0.02]) or (0.0, 0.0)
    assert cell.number("asr").interval == (max(low, 0.0), high)


def test_the_roc_of_a_screen_is_the_mean_over_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its area is the AUROC beside it, which is a mean over seeds too."""
    drawn: list[charts.Curve] = []
    monkeypatch.setattr(charts, "curves", lambda lines, *_: drawn.extend(lines) or "<svg/>")
    made = []
    for seed, (clean, triggered) in enumerate((([0.1, 0.4, 0.3], [0.8, 0.3, 0.9]), ([0.5, 0.6], [0.1, 0.55]))):
        found, interval = statistics.auroc(clean, triggered)
        said = score(found, len(clean) * 2, interval=interval, per_sample=(*clean, *triggered))
        made.append(record("screen()", seed=seed, delivers=["screen"], more={"screen_auroc": said}))
    (table,) = rows.by_task(rows.pooled(made), "unconditional", "screening")
    (figure, *_) = figures.of_table(table, "screening")
    points = list(zip(drawn[0].x, drawn[0].y, strict=True))
    area = sum((x - at) * (y + before) / 2e4 for (at, before), (x, y) in itertools.pairwise(points))
    assert area == pytest.approx(table.rows[0].mean["screen_auroc"]) and "mean over its seeds" in figure.caption


def test_a_screen_stands_beside_itself_on_the_clean_model_under_the_same_trigger() -> None:
    """A screen that sees the trigger and no backdoor has the same area there."""

    def screened(area: float, attack: str, seed: int = 0, trigger: str = "box(size=5)") -> Record:
        more = {"screen_auroc": score(area, 8, interval=(area - 0.1, area + 0.1))}
        return record("screen()", attack=attack, seed=seed, delivers=["screen"], more=more, trigger=trigger)

    attacked, clean = "baddiffusion(poison_rate=0.1)", "none(steps=0)"
    made = [screened(0.9, attacked, seed) for seed in (0, 1)]
    made += [screened(area, clean, seed) for seed, area in enumerate((0.5, 0.7))]
    made += [screened(0.2, clean, trigger="box(size=3)"), screened(0.8, attacked, trigger="blend()")]
    cells = {(cell.attack, cell.specs.trigger): cell for cell in rows.pooled(made)}
    beside = cells["baddiffusion", "box(size=5)"]
    assert beside.number("screen_auroc_clean").value == pytest.approx(0.6)
    assert beside.number("screen_auroc").value == pytest.approx(0.9)
    lacks = cells["baddiffusion", "blend()"].number("screen_auroc_clean")
    assert math.isnan(lacks.value) and lacks.warning == "the clean model was not screened"
    assert "AUROC, clean model" in [column.title for column in of_view("unconditional", "screening")]


def test_every_published_value_lies_within_the_bounds_of_its_score(published: list[results.Results]) -> None:
    for each in published:
        for kept in each.records:
            for name, found in kept.scores.items():
                least, most = bounds(name)
                assert math.isnan(found.value) or least <= found.value <= most, (kept.key, name, found.value)


def test_a_cell_pooled_over_seeds_shows_no_negative_cost_and_no_share_above_one() -> None:
    seeds = [
        record("a()", seed=seed, more={"defense_wall_s": score(cost, 1), "attribute_accuracy": score(attributes, 100)})
        for seed, cost, attributes in ((0, 2.0, 0.98), (1, 90.0, 1.0))
    ]
    (found,) = rows.pooled(seeds)
    low, high = found.number("defense_wall_s").ends
    assert low == 0 and high > 90
    assert found.number("attribute_accuracy").ends[1] == 1.0
