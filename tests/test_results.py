"""Results as they are stored: sealed records that git merges, small files, archives of strangers, and the wheel."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.cli import Exit, call
from harness.runs.jsonable import key_of
from harness.runs.record import Dropped, Provenance, Record
from harness.types import Cell
from leaderboard import add_results, check, releases, results
from tests.records import SPOILED, changed, digest, picture, record, score, small, write_sealed, write_suite

ROOT = Path(__file__).parents[1]
PICTURED = "ed8e500477260bb75ef5ddd8b9acd6af05be0936a4edf6aec5737e63698a8260"  # v1: skd-cag on shapes-sd, seed 10


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *named, "-C", str(folder), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    return [name for name in git(ROOT, "ls-files", "-z").split("\0") if name and (ROOT / name).exists()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A suite as it is committed."""
    add_results.add(write_suite(tmp_path / "run", small()), tmp_path / "results" / "small")
    return tmp_path / "results" / "small"


# ---- seals ----------------------------------------------------------------------------------------------------------


def flipped(content: bytes, i: int) -> bytes:
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


@pytest.mark.parametrize("packed", [True, False])
def test_no_byte_of_a_record_changes_unseen(tmp_path: Path, packed: bool) -> None:
    results.write_record(tmp_path, record("skd()", 3, n=20), packed)
    (path,) = results.record_files(tmp_path)
    before, content, refused = results.stored(results.read_record(path)), path.read_bytes(), 0
    for i in range(0, len(content), 3 if packed else 25):
        path.write_bytes(flipped(content, i))
        try:
            assert results.stored(results.read_record(path)) == before, f"byte {i}"
        except results.ResultsError:
            refused += 1
    assert refused > 0.9 * len(range(0, len(content), 3 if packed else 25))


def test_the_digest_is_of_the_canonical_json_without_itself(tmp_path: Path) -> None:
    results.write_record(tmp_path, record("skd()", 3), packed=True)
    (path,) = results.record_files(tmp_path)
    text = gzip.decompress(path.read_bytes()).decode()
    kept = json.loads(text)
    assert kept.pop("digest") == key_of(kept) and "doubts" not in kept
    assert results.dump(results.stored(results.read_record(path))) == text, "storing it again changes nothing"


def test_a_record_with_a_field_that_no_record_has_is_refused_though_its_digest_fits(tmp_path: Path) -> None:
    path = write_sealed(tmp_path, {**results.stored(record("skd()", 3)), "doubts": ["derived"]})
    with pytest.raises(results.ResultsError, match="doubts: Extra inputs"):
        results.read_record(path)


def test_per_sample_values_keep_single_precision_and_scores_keep_all(tmp_path: Path) -> None:
    spread = score(1 / 3, 3, per_sample=(1 / 3, math.nan, 2 / 3))
    results.write_record(tmp_path, record("skd()", 3, more={"spread": spread}))
    (path,) = results.record_files(tmp_path)
    assert json.loads(path.read_text())["scores"]["spread"]["per_sample"] == [0.33333334, None, 0.6666667]
    kept = results.read_record(path).scores["spread"]
    assert kept.value == 1 / 3 and kept.per_sample is not None and math.isnan(kept.per_sample[1])
    assert [np.float32(x) for x in (1 / 3, 2 / 3)] == [np.float32(kept.per_sample[i]) for i in (0, 2)]


def test_a_dropped_cell_is_read_back_and_its_file_is_named_for_it(folder: Path) -> None:
    left = Dropped(record("skd(steps=1)").cell, "it takes no text triggers")
    results.write_dropped(folder, left)
    assert results.read_suite(folder).dropped == (left,)
    (path,) = (folder / "dropped").iterdir()
    path.rename(path.with_name(f"{'0' * 20}.json"))
    with pytest.raises(results.ResultsError, match="its name should be"):
        results.read_suite(folder)


# ---- git ------------------------------------------------------------------------------------------------------------


def contribution(tmp_path: Path, name: str, defense: str) -> Path:
    """The folder of a contributor's own run: a new defense, and the suite's controls with other times."""
    rows = [record("none"), record("finetune(steps=100)", 74, knowledge=["data"]), record(defense, 20)]
    left_out = [Dropped(record(defense, attack=f"{name}()").cell, "it does not apply")]
    return write_suite(tmp_path / name, [timed(row, float(len(name))) for row in rows], left_out)


def timed(made: Record, wall_s: float) -> Record:
    """The record with another time, as another machine would note it."""
    (attempt,) = made.attempts
    return made.model_copy(update={"attempts": (attempt.model_copy(update={"wall_s": wall_s}),)})


def test_two_contributors_who_add_rows_to_one_suite_do_not_conflict(folder: Path, tmp_path: Path) -> None:
    home = folder.parent
    git(home, "init", "-q")
    git(home, "add", ".")
    git(home, "commit", "-qm", "published")
    before = {path.name: path.read_bytes() for path in results.record_files(folder)}
    for name, defense in (("ann", "one(steps=1)"), ("benjamin", "two(steps=1)")):
        git(home, "switch", "-q", "-c", name, "main")
        add_results.add(contribution(tmp_path, name, defense), folder)
        kept = {path.name: path.read_bytes() for path in results.record_files(folder)}
        assert before.items() <= kept.items() and len(kept) == len(before) + 1, "files of other rows keep their bytes"
        git(home, "add", ".")
        git(home, "commit", "-qm", f"{name}'s rows")
    git(home, "merge", "-q", "--no-edit", "ann")
    assert check.check(home).problems == []
    merged = results.read_suite(folder)
    assert {"one(steps=1)", "two(steps=1)"} <= {row.cell.defense for row in merged.records}
    assert len(merged.dropped) == 2


def test_a_row_that_failed_gives_way_to_one_of_the_same_key(tmp_path: Path) -> None:
    sound = record("none")
    failed = sound.model_copy(update={"scores": {}, "error": "out of memory"})
    add_results.add(write_suite(tmp_path / "bad", [failed]), tmp_path / "to")
    add_results.add(write_suite(tmp_path / "good", [sound]), tmp_path / "to")
    (row,) = results.read_suite(tmp_path / "to").records
    assert row.error is None and row.value("asr") == 0.97


def test_a_row_from_before_a_parameter_gives_way_to_its_cell_as_it_is_written_today(tmp_path: Path) -> None:
    old = record("none", trigger="text(text='sks')")
    grown = "text(text='sks', other='')"
    new = changed(old, key=digest("newer"), cell={"trigger": grown})
    add_results.add(write_suite(tmp_path / "old", [old]), tmp_path / "to")
    today = {old.cell.trigger: grown}
    after = add_results.add(write_suite(tmp_path / "new", [new]), tmp_path / "to", lambda spec: today.get(spec, spec))
    assert [row.key for row in after.records] == [new.key]


def test_a_sheet_goes_with_the_last_row_that_names_it(folder: Path, tmp_path: Path) -> None:
    old = next(row for row in small() if row.cell.defense.startswith("terd"))
    alone = add_results.add(write_suite(tmp_path / "one", [old]), tmp_path / "to")
    assert alone.sheet_file(alone.records[0]) is not None
    newer = changed(old, key=digest("newer"), sheet=None)
    after = add_results.add(write_suite(tmp_path / "two", [newer]), tmp_path / "to")
    assert [row.key for row in after.records] == [newer.key]
    assert list((tmp_path / "to" / "sheets").iterdir()) == []


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_the_committed_results_are_small() -> None:
    folders = results.folders(results.SHIPPED)
    packed = [path for folder in folders for path in results.record_files(folder)]
    sheets = [path for folder in folders for path in (folder / "sheets").iterdir()]
    assert {path.suffix for path in packed} == {".gz"} and {path.suffix for path in sheets} == {".webp"}
    assert max(path.stat().st_size for path in sheets) <= results.SHEET_LIMIT
    assert sum(path.stat().st_size for path in (*packed, *sheets)) / len(packed) <= check.PER_RECORD


def test_the_tracked_tree_is_small_and_holds_nothing_derived(tracked: list[str]) -> None:
    assert sum((ROOT / name).stat().st_size for name in tracked) <= 62_000_000  # weights 42 MB, records 13 MB
    derived = ("leaderboard/page/", "leaderboard/LEADERBOARD.md")
    assert not [name for name in tracked if name.startswith(derived)]
    ours = [name.split("/", 3)[3] for name in tracked if name.startswith("leaderboard/results/")]
    assert ours and all(results.STORED.fullmatch(name) for name in ours)


@pytest.mark.slow
def test_every_committed_record_is_stored_as_it_would_be_today() -> None:
    """But for parts of the cell and of the provenance that are younger than the record."""
    usual = {field.name: field.default for field in fields(Cell) if field.default is not MISSING}
    defaults = {"provenance": results.to_jsonable(Provenance()), "cell": usual}
    for folder in results.folders(results.SHIPPED):
        for path in results.record_files(folder):
            document = results.load(path)
            today = results.stored(results.read_record(path))
            for part, known in defaults.items():
                younger = {name: today[part].pop(name) for name in today[part].keys() - document[part]}
                assert younger == {name: known[name] for name in younger}, path
            today[results.SEAL] = results.digest(today)
            assert results.dump(today) == gzip.decompress(path.read_bytes()).decode(), path


def test_the_readmes_picture_is_the_sheet_of_a_published_record() -> None:
    suite, row = results.find(results.read(results.SHIPPED / "v1"), PICTURED)
    sheet = suite.sheet_file(row)
    assert sheet is not None
    assert (ROOT / "docs" / "images" / "v1-skd-cag.webp").read_bytes() == sheet.read_bytes()
    assert row.provenance.short["defense"].startswith("skd-cag") and row.cell.model == "shapes-sd"


@pytest.mark.parametrize("size", [(945, 498), pytest.param((2300, 1600), marks=pytest.mark.slow)])
def test_a_sheet_of_any_size_gets_small(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "sheet.png")
    name = results.keep_sheet(tmp_path / "sheet.png", tmp_path)
    assert results.SHEET.fullmatch(name) and 0 < (tmp_path / name).stat().st_size <= 30_000


def test_wide_images_are_as_wide_as_a_tile_beside_their_labels() -> None:
    import torch

    from harness.judges.evidence import Evidence, contact_sheet
    from tests.test_evidence import evidence

    made: Evidence = evidence({("clean", "clean"): lambda: torch.zeros(4, 3, 256, 256)})
    assert contact_sheet(made, k=4).shape == (3, 96 + 2, 150 + 4 * (96 + 1) + 1)


# ---- archives -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a checkout: nothing beside the package, nothing around the current directory."""
    for name in ("empty", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(results, "SHIPPED", tmp_path / "installed" / "leaderboard" / "results")
    monkeypatch.delenv("BENCH_RESULTS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "diffusion-defense-bench" / "results"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed
    return printed.err


@pytest.mark.parametrize("words", [["compare", "skd", "none"], ["reproduce", "abcd"], ["leaderboard", "check"]])
def test_without_results_one_line_names_the_command_that_fetches_them(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert call(words) == Exit.missing
    assert "bench leaderboard pull" in one_line(capsys)


@pytest.mark.parametrize("file", ["report.json", "records"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_file_of_a_run_that_cannot_be_read_is_one_line_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[bytes], bytes], file: str
) -> None:
    run = write_suite(tmp_path / "run", small()[:3])
    path = run / file if file == "report.json" else min((run / file).iterdir())
    path.write_bytes(spoil(path.read_bytes()))
    readers = [["report", str(run)], ["report", str(run), "--json"]]
    if file == "records":
        readers += [[*words, "--results", str(run)] for words in (["compare", "skd", "none"], ["reproduce", "abcd"])]
        readers += [["leaderboard", "build", "-o", str(tmp_path / "page"), "--results", str(run)]]
        readers += [["leaderboard", "add", str(run), "--to", str(tmp_path / "to")]]
        readers += [["leaderboard", "archive", "-o", str(tmp_path / "all.tar.gz"), "--results", str(run)]]
    for words in readers:
        assert call(words) == Exit.usage
        said = one_line(capsys)
        assert said.startswith(f"bench: {path}: ") and said.endswith(f"; {results.ANEW}\n")


@pytest.mark.parametrize("part", ["records", "dropped"])
def test_a_report_that_names_other_files_than_lie_beside_it_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    rows = small()
    run = write_suite(tmp_path / "run", rows[:3], [Dropped(rows[3].cell, "it meets no such trigger")])
    assert call(["report", str(run)]) == 0
    capsys.readouterr()
    path = min((run / part).iterdir())
    gone = path.rename(tmp_path / path.name)
    assert call(["report", str(run)]) == Exit.usage
    assert f"{run / 'report.json'}: names {part}/{path.name}, which is not there (1 such files)" in one_line(capsys)
    gone.rename(path)
    if part == "records":
        results.write_record(run, rows[4])
    else:
        results.write_dropped(run, Dropped(rows[4].cell, "nor such a target"))
    assert call(["report", str(run)]) == Exit.usage
    assert f"{run / 'report.json'}: does not name {part}/" in one_line(capsys)


@pytest.mark.parametrize(
    "words", [["compare", "skd", "none"], ["leaderboard", "build", "-o"], ["leaderboard", "check"]]
)
def test_a_folder_without_a_record_holds_no_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "run" / "records").mkdir(parents=True)
    words = [*words, str(tmp_path / "page")] if words[-1] == "-o" else words
    assert call([*words, "--results", str(tmp_path / "run")]) == Exit.usage
    assert f"{tmp_path / 'run'}: no results here; a run writes them" in one_line(capsys)


def test_a_run_without_a_record_is_not_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_suite(tmp_path / "run", small()[:1])
    shutil.rmtree(run / "records")
    assert call(["leaderboard", "add", str(run), "--to", str(tmp_path / "to")]) == Exit.usage
    assert f"{run}: holds no records; give the folder that bench run SUITE -o DIR wrote" in one_line(capsys)


def test_a_folder_with_the_name_of_a_record_is_no_record_that_is_passed_over(folder: Path) -> None:
    path = min((folder / "records").iterdir())
    path.unlink()
    path.mkdir()
    with pytest.raises(results.ResultsError, match=f"{path}: .* or a folder; results are regular files"):
        results.read(folder)


def test_an_archive_is_not_written_of_what_could_not_be_pulled(folder: Path, tmp_path: Path) -> None:
    sheet = min((folder / "sheets").iterdir())
    sheet.write_bytes(sheet.read_bytes()[:-1])
    with pytest.raises(results.ResultsError, match=f"{sheet}: is not what its name was made from"):
        releases.archive(folder.parent, tmp_path / "all.tar.gz")


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_pulled_results_are_found_and_are_what_was_published(
    home: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = folder.parent
    if kind == "archive":
        source = tmp_path / "results.tar.gz"
        assert call(["leaderboard", "archive", "-o", str(source), "--results", str(folder.parent)]) == 0
    for _ in range(2):  # the second replaces the first
        capsys.readouterr()
        assert call(["leaderboard", "pull", "--from", str(source), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"folder": str(home), "records": 13}
    assert results.published_root() == home
    files = {p.relative_to(home.parent / "results"): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert files == {p.relative_to(folder.parent): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert call(["compare", "skd", "none", "--score", "removal", "--json"]) in (0, 2)
    assert "bench leaderboard pull" not in capsys.readouterr().err
    assert sorted(path.name for path in home.parent.iterdir()) == ["results"], "nothing is left behind"


def test_a_checkout_around_the_current_directory_comes_before_what_was_pulled(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases.pull(str(folder.parent), home)
    checkout = tmp_path / "checkout" / "leaderboard" / "results"
    checkout.parent.mkdir(parents=True)
    folder.parent.rename(checkout)
    (tmp_path / "checkout" / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "checkout" / "docs")
    assert results.published_root() == checkout


def test_the_same_results_give_the_same_archive(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        releases.archive(folder.parent, tmp_path / name)
        for path in folder.rglob("*"):
            os.utime(path, (0, 0))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as tar:
        names = tar.getnames()
    assert names == sorted(names) and all(releases.NAME.fullmatch(name) for name in names)


def member(name: str, content: bytes = b"{}", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    found.size = len(content)
    for fact, value in facts.items():
        setattr(found, fact, value)
    return found, content


def inside(name: str = f"{'a' * 64}.json.gz") -> str:
    return f"results/small/records/{name}"


HOSTILE: dict[str, Callable[[], list[tuple[tarfile.TarInfo, bytes]]]] = {
    "a path upwards": lambda: [member(f"results/../../{inside()}")],
    "an absolute path": lambda: [member(f"/tmp/{inside()}")],
    "a suite upwards": lambda: [member(f"results/../records/{'a' * 64}.json")],
    "another file": lambda: [member("results/small/records/evil.py")],
    "a symbolic link": lambda: [member(inside(), b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a hard link": lambda: [member(inside(), b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "a linked folder": lambda: [
        member("results/small/records", b"", type=tarfile.SYMTYPE, linkname="/tmp"), member(inside()),
    ],
    "a device": lambda: [member(inside(), b"", type=tarfile.CHRTYPE)],
    "a record that is none": lambda: [member(inside(f"{'a' * 64}.json"))],
    "nothing": lambda: [],
}  # fmt: skip


def packed(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    home: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    releases.pull(str(folder.parent), home)
    before = {path: path.read_bytes() for path in home.parent.rglob("*") if path.is_file()}
    source = packed(tmp_path / "evil.tar.gz", HOSTILE[what]())
    assert call(["leaderboard", "pull", "--from", str(source)]) == Exit.usage
    one_line(capsys)
    assert {path: path.read_bytes() for path in home.parent.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "records").exists() and not (tmp_path / "home" / "records").exists()


def bomb(path: Path, kind: str) -> Path:
    """A small file that claims, or unpacks to, more than is taken."""
    with gzip.open(path, "wb", 1) as out:
        if kind == "header":  # a pax header of 2 GB, which tarfile would read whole
            head = tarfile.TarInfo("././@PaxHeader")
            head.type, head.size = tarfile.XHDTYPE, 2_000_000_000
        else:
            head = tarfile.TarInfo(inside())
            head.size = {"claim": 10**12, "member": results.LARGEST + 1}[kind]
        out.write(head.tobuf(tarfile.GNU_FORMAT))
        for _ in range(30 if kind == "header" else 1):
            out.write(bytes(1_000_000))
    return path


@pytest.mark.parametrize("kind", ["header", "claim", "member"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(releases, "MOST_BYTES", 20_000_000)
    source = bomb(tmp_path / "bomb.tar.gz", kind)
    assert source.stat().st_size < 1_000_000
    with pytest.raises(results.ResultsError, match="larger than any archive of results"):
        releases.pull(str(source), tmp_path / "home" / "results")
    assert not (tmp_path / "home" / "results").exists()


def test_more_bytes_or_files_than_any_archive_has_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.tar.gz"
    releases.archive(folder.parent, source)
    for limit in ("MOST_PACKED", "MOST_BYTES", "MOST_FILES"):
        with monkeypatch.context() as patch:
            patch.setattr(releases, limit, 5)
            with pytest.raises(results.ResultsError, match="larger than any archive"):
                releases.pull(str(source), tmp_path / "home" / "results")
    assert releases.pull(str(source), tmp_path / "home" / "results") == 13


def spoil_record(folder: Path) -> None:
    (path, *_) = results.record_files(folder)
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(text.replace('"wall_s": 1.5', '"wall_s": 0.5').encode(), mtime=0))


def spoil_sheet(folder: Path) -> None:
    (path,) = (folder / "sheets").iterdir()
    path.write_bytes(picture(8, 8))


@pytest.mark.parametrize(
    ("spoil", "says"), [(spoil_record, "changed after it was sealed"), (spoil_sheet, "is not what its name")]
)
def test_what_is_not_as_it_was_sealed_is_not_taken(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(folder)
    with pytest.raises(results.ResultsError, match=says) as caught:
        releases.pull(str(folder.parent), tmp_path / "home" / "results")
    assert str(caught.value).startswith(f"{folder.parent}: small/"), (
        "it names what was pulled, not where it was unpacked"
    )
    assert not (tmp_path / "home" / "results").exists()


@pytest.mark.parametrize("source", ["http://example.org/a", "file:///etc/passwd", "ftp://example.org/a"])
def test_only_https_addresses_are_asked(home: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    assert call(["leaderboard", "pull", "--from", source]) == Exit.usage
    assert "only https:// addresses" in one_line(capsys)


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no archive" * 99)])
def test_what_is_no_archive_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "a").write_bytes(content)
    assert call(["leaderboard", "pull", "--from", str(tmp_path / "a")]) == Exit.usage
    assert str(tmp_path / "a") in one_line(capsys)
    assert call(["leaderboard", "pull", "--from", str(tmp_path / "none")]) == Exit.usage
    assert "No such file" in one_line(capsys)


def test_a_folder_with_somebody_elses_files_is_not_replaced(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(results.ResultsError, match="holds files that are no results"):
        releases.pull(str(folder.parent), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_the_archive_of_a_release_is_fetched_by_its_address(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases.archive(folder.parent, tmp_path / "a.tar.gz")
    asked = []

    class Answer(io.BytesIO):
        url = "https://cdn.example.org/a"

    def opened(url: str, timeout: float) -> Answer:
        asked.append(url)
        return Answer((tmp_path / "a.tar.gz").read_bytes())

    monkeypatch.setattr(releases.urllib.request, "urlopen", opened)
    assert call(["leaderboard", "pull"]) == 0
    assert asked == [releases.address()] and len(results.read(home)) == 1
    monkeypatch.setattr(Answer, "url", "http://cdn.example.org/a")
    with pytest.raises(results.ResultsError, match="not https"):
        releases.pull(None, home)


def test_the_address_of_releases_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Releases"] == f"{releases.PROJECT}/releases"
    assert project["name"] == releases.DISTRIBUTION


# ---- wheel ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist and wheel of the tracked files; the wheel is built from the sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_has_weights_and_no_results_and_the_sdist_is_as_small(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.stat().st_size <= 40_000_000 and sdist.stat().st_size <= 40_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("leaderboard/results/", "leaderboard/page/", "tests/"))]
    weights = {name.split("/")[3] for name in names if name.startswith("plugins/models/weights/")}
    assert weights == {path.name for path in (ROOT / "plugins" / "models" / "weights").iterdir()}
    wanted = {"harness/py.typed", "harness/__init__.pyi", "leaderboard/suites/smoke.toml", "leaderboard/reported.toml"}
    assert wanted <= set(names) and any(name.startswith("leaderboard/assets/") for name in names)
    with tarfile.open(sdist) as tar:
        assert not [name for name in tar.getnames() if "/leaderboard/results/" in name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_installed_wheel_runs_the_smoke_suite_without_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    libraries = [path for path in sys.path if path.endswith("site-packages")]  # no editable install: .pth is not read
    (own / "libraries.pth").write_text("\n".join(libraries))
    (tmp_path / "cwd").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BENCH_", "PYTHON", "XDG_"))}
    env = {**kept, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(python), *words], cwd=tmp_path / "cwd", env=env, capture_output=True, text=True)

    where = run("-c", "import harness, leaderboard, plugins; print(harness.__file__)").stdout
    assert where.startswith(str(own)), where
    bench = (str(python.with_name("bench")),)
    done = run(*bench, "run", "smoke", "--store", str(tmp_path / "store"), "-o", "report")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (suite,) = results.read(tmp_path / "cwd" / "report")
    assert len(suite.records) == 4 and all(row.scores and suite.sheet_file(row) for row in suite.records)
    none = run(*bench, "compare", "skd", "none")
    assert none.returncode == Exit.missing and "bench leaderboard pull" in none.stderr
