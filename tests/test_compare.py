"""Paired comparisons: the statistics against independent numbers, the pairing, and the command line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli import call
from harness.runs.record import Record
from leaderboard import paired, results as stored
from tests.records import average, changed, digest, record, share, write_suite


def test_mcnemar_is_the_exact_sign_test_of_the_discordant_pairs() -> None:
    assert paired.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired.mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert paired.mcnemar(0, 0) == 1.0 and paired.mcnemar(4, 4) == 1.0


def test_the_interval_of_paired_shares_adds_half_a_pair_to_each_cell() -> None:
    difference, low, high = paired.paired_shares(2, 12, 100)  # b = 2.5, c = 12.5, n = 102
    middle, half = -10 / 102, 1.959963984540054 * math.sqrt(15 - 100 / 102) / 102
    assert difference == pytest.approx(-0.1)
    assert (low, high) == pytest.approx((middle - half, middle + half))
    _, low, high = paired.paired_shares(0, 0, 50)
    assert low < 0 < high, "no discordant pair is no proof of equality"


def test_holm_steps_down_and_never_decreases() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.6, None, 0.9]) == [pytest.approx(1.0), None, pytest.approx(1.0)]
    assert paired.holm([]) == []


def test_means_are_compared_by_the_paired_t_interval() -> None:
    difference, low, high, p = paired.paired_means([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 2.0, 2.0])
    half = 3.182446305284263 * math.sqrt(2 / 3) / 2  # t quantile at 3 degrees; differences 1, 0, 1, 2
    assert (difference, low, high) == pytest.approx((1.0, 1 - half, 1 + half))
    assert p is not None and 0 < p <= 1
    assert paired.paired_means([1.0, 1.0], [1.0, 1.0]) == (0.0, None, None, None)


def test_one_seed_is_compared_over_samples_and_says_that_it_is_one() -> None:
    (found,) = paired.compare([record("a()", 10)], [record("b()", 40)], ["asr"])
    assert (found.a, found.b, found.difference) == pytest.approx((0.1, 0.4, -0.3))
    assert found.test == "exact McNemar" and (found.unit, found.n) == ("samples", 100)
    assert found.p == pytest.approx(2 / 2**30) == found.p_holm
    assert found.note is not None and "one seed" in found.note


def test_several_seeds_are_compared_by_t_over_their_differences() -> None:
    a = [record("a()", hits, seed=seed) for seed, hits in enumerate((10, 20, 30))]
    b = [record("b()", hits, seed=seed) for seed, hits in enumerate((20, 40, 60))]
    (found,) = paired.compare(a, b, ["asr"])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (found.unit, found.n, found.test) == ("seeds", 3, "t over seeds")
    assert found.low is not None and found.high is not None
    assert (found.difference, found.low, found.high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert found.by_seed == ((0, 0.1, 0.2), (1, 0.2, 0.4), (2, 0.3, 0.6))


def without_five(made: Record) -> Record:
    """The record with its first five samples of the ASR not counted."""
    asr = made.scores["asr"]
    return changed(made, scores={"asr": replace(asr, per_sample=(*[math.nan] * 5, *(asr.per_sample or ())[5:]))})


def test_samples_that_do_not_count_are_left_out_of_the_pairs() -> None:
    a, b = (without_five(record(name, hits)) for name, hits in (("a()", 10), ("b()", 40)))
    (found,) = paired.compare([a], [b], ["asr"])
    assert found.n == 95


def test_only_rows_of_one_setting_seed_and_checkpoint_are_paired() -> None:
    assert paired.compare([record("a()")], [record("b()", seed=1)]) == []
    assert paired.compare([record("a()")], [record("b()", sampler="unipc(steps=20)")]) == []
    jobs = {"f" * 64 if job.kind == "attack" else key: job for key, job in record("b()").provenance.jobs.items()}
    other = changed(record("b()"), provenance={"jobs": jobs})
    with pytest.raises(ValueError, match="different backdoored models"):
        paired.compare([record("a()")], [other])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        record("none"),
        record("finetune(steps=100)", 60),
        record("skd(alpha=1.0, steps=80)", 5, knowledge=["trigger"], more={"drift": average([0.1, 0.3] * 50)}),
        record("skd(alpha=1.0, steps=80)", 90, knowledge=["trigger"], trigger_given="decoy"),
        record("cag(target='black')", 6),
        record("cag(target='noise')", 9, more={"asr@1e-3": share(3, 100)}),
    ]
    return write_suite(tmp_path_factory.mktemp("results") / "one", rows)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = call(["compare", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_bench_compare_shows_the_effect_before_the_p_value(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "skd", "finetune", "--results", str(results))
    assert code == 0
    head = next(line for line in out.splitlines() if "A - B" in line)
    assert head.index("A - B") < head.index("95 % interval") < head.index("p (Holm)")
    asr = next(line for line in out.splitlines() if line.strip().startswith("asr"))
    assert "-0.55" in asr and "exact McNemar" in asr and "100 samples" in asr
    assert "one seed" in out


def test_bench_compare_takes_the_decoy_control_and_a_key(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "skd", "skd:decoy", "--score", "asr", "--results", str(results), "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["difference"] == pytest.approx(-0.85)
    key = record("none").key
    code, out, _ = run(capsys, key[:10], "finetune", "--score", "asr", "--results", str(results), "--json")
    assert json.loads(out)[0]["a"] == pytest.approx(0.97)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cag", "finetune"), "'cag' has several variants here; name one: cag(target='black'); cag(target='noise')"),
        (("skdd", "finetune"), "no rows of 'skdd'; did you mean 'skd'?"),
        (("skd", "finetune", "--score", "no-such"), "meet nowhere"),
        (("skd", "finetune", "--results", "/no/where"), "no results here"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_one_line(
    results: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    where = () if "--results" in words else ("--results", str(results))
    code, out, err = run(capsys, *words, *where)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and says in err
    assert "--results DIR" not in err


def test_two_records_of_one_cell_are_no_two_seeds(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results, tmp_path / "run")
    outdated = record("finetune(steps=100)", 60)
    key = digest("another version")
    stored.write_record(tmp_path / "run", changed(outdated, key=key))
    code, out, err = run(capsys, "finetune", "none", "--results", str(tmp_path))
    files = [tmp_path / "run" / "records" / f"{each}.json" for each in (key, outdated.key)]
    assert (code, out, len(err.splitlines())) == (2, "", 1) and all(str(file) in err for file in files)
    assert "remove the outdated one, or run the suite again with the same -o" in err
    assert run(capsys, "skd", "none", "--results", str(tmp_path))[0] == 0, "rows that were not asked for"


def test_rows_that_are_not_published_say_how_to_name_a_run_of_ones_own(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "SHIPPED", results)
    for name in ("shrink", "cag", "f" * 12):
        code, _, err = run(capsys, name, "finetune")
        assert code == 2 and err.endswith("; your own run: --results DIR\n")
