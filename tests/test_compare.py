"""Paired comparisons: the statistics against independent numbers, the pairing, and the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.cli import call
from harness.runs.record import Record
from leaderboard import paired, results as stored, rows
from tests.records import average, changed, digest, record, score, share, write_suite


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


def three(defense: str, hits: Sequence[int], **more: Any) -> list[Record]:
    """A record for each seed from 0 on."""
    return [record(defense, k, seed=seed, **more) for seed, k in enumerate(hits)]


@pytest.mark.parametrize(
    ("a", "b", "differs"),
    [
        ((10, 20, 30), (22, 32, 43), True),  # the ranges overlap; every seed says the same
        ((10, 11, 12), (13, 20, 14), False),  # the ranges are apart; the seeds do not agree
        ((0, 0, 0), (1, 1, 1), False),  # no variance over seeds, and one sample of a hundred
        ((0, 0, 0), (20, 20, 20), True),
        ((5, 5, 5), (5, 5, 5), False),
        ((0, 0), (90, 90), None),
        ((0,), (90,), None),
    ],
)
def test_the_letters_of_a_table_and_bench_compare_agree(
    a: Sequence[int], b: Sequence[int], differs: bool | None
) -> None:
    one, other = three("a()", a), three("b()", b)
    (said,) = paired.compare(one, other, ["asr"])
    assert said.differs is bool(differs)
    (table,) = rows.by_task(rows.pooled([*one, *other]), "unconditional", "purification")
    (setting,) = rows.by_setting(rows.pooled([*one, *other]))
    for found in (table, setting):
        letters = {row.defense: row.letters for row in found.rows}
        assert letters == ({"a": "", "b": ""} if differs is None else {"a": "A", "b": "B" if differs else "A"})
        assert (found.remark == paired.FEW) == (differs is None) == (paired.FEW in (said.note or ""))


def test_bench_compare_and_a_table_over_several_settings_agree() -> None:
    one = [*three("a()", (0, 0, 0), attack="easy()"), *three("a()", (50, 52, 51), attack="hard()")]
    other = [*three("b()", (40, 40, 40), attack="easy()"), *three("b()", (51, 50, 53), attack="hard()")]
    found = {str(dict(each.setting).get("attack", "worst")): each for each in paired.compare(one, other, ["asr"])}
    assert {name: each.differs for name, each in found.items()} == {"easy()": True, "hard()": False, "worst": False}
    assert dict(found["worst"].setting) == {"model": "digits-ddpm", "settings": "the worst of 2 settings at each seed"}
    assert found["worst"].by_seed == found["hard()"].by_seed
    (table,) = rows.by_task(rows.pooled([*one, *other]), "unconditional", "purification")
    assert {row.defense: row.letters for row in table.rows} == {"a": "A", "b": "A"}


def test_seeds_that_agree_by_chance_have_the_interval_of_their_samples() -> None:
    """Sample i has the same noise at every seed: three seeds with the same 20 samples prove no more than one."""
    (found,) = paired.compare(three("a()", (0, 0, 0)), three("b()", (20, 20, 20)), ["asr"])
    _, low, high = paired.paired_shares(0, 20, 100)
    assert found.low is not None and found.high is not None and found.test == "normal over samples"
    assert found.high - found.low == pytest.approx(high - low) and found.low < -0.2 < found.high
    assert found.p is not None and found.p < 0.05 and found.differs


def test_the_samples_of_several_seeds_are_averaged_before_their_interval_is_taken() -> None:
    """Noise that is new at each seed averages out; noise that is the same does not."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(1, 200)).repeat(3, 0)

    def drifts(defense: str, values: np.ndarray[Any, Any]) -> list[Record]:
        return [record(defense, seed=seed, more={"drift": average(row.tolist())}) for seed, row in enumerate(values)]

    zero = drifts("b()", np.zeros((3, 200)))
    (found,) = paired.compare(drifts("a()", common), zero, ["drift"])
    assert found.high is not None and found.low is not None and found.test == "normal over samples"
    assert found.high - found.low == pytest.approx(2 * 1.959964 * common[0].std(ddof=1) / math.sqrt(200))


def test_equal_differences_without_samples_are_no_proof() -> None:
    a, b = (
        [record(name, seed=seed, more={"cost": score(0.1 * seed + more)}) for seed in range(3)]
        for name, more in (("a()", 0.3), ("b()", 0.1))
    )
    (found,) = paired.compare(a, b, ["cost"])
    assert (found.low, found.p, found.differs) == (None, None, False) and "no interval" in (found.note or "")


def test_shares_without_samples_have_the_interval_of_their_counts() -> None:
    def counted(name: str, rate: float) -> list[Record]:
        return [record(name, seed=seed, more={"asr": score(rate, 100)}) for seed in range(3)]

    (near,) = paired.compare(counted("a()", 0.0), counted("b()", 0.01), ["asr"])
    (far,) = paired.compare(counted("a()", 0.0), counted("b()", 0.9), ["asr"])
    p, q = 1 / 102, 91 / 102
    assert far.high == pytest.approx(-0.9 + 1.959964 * math.sqrt((p * (1 - p) + q * (1 - q)) / 102))
    assert far.differs and not near.differs


def test_areas_under_curves_have_the_interval_of_delong() -> None:
    clean, triggered = [0.1, 0.4, 0.35, 0.2], [0.8, 0.3, 0.38, 0.9]
    said = score(0.8125, 8, per_sample=(*clean, *triggered))
    per_clean, per_triggered = paired.parts(record("screen()", more={"screen_auroc": said}), "screen_auroc")
    assert list(per_clean) == [1.0, 0.5, 0.75, 1.0] and list(per_triggered) == [1.0, 0.5, 0.75, 1.0]
    perfect = score(1.0, 8, per_sample=(0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9))
    a, b = (
        [record(name, seed=seed, more={"screen_auroc": each}) for seed in range(3)]
        for name, each in (("a()", said), ("b()", perfect))
    )
    (found,) = paired.compare(a, b, ["screen_auroc"])
    half = 1.959964 * math.sqrt(2 * np.var([1, 0.5, 0.75, 1], ddof=1) / 4)
    assert found.high == pytest.approx(-0.1875 + half) and not found.differs


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
    made = [
        record("none"),
        record("finetune(steps=100)", 60),
        record("skd(alpha=1.0, steps=80)", 5, knowledge=["trigger"], more={"drift": average([0.1, 0.3] * 50)}),
        record("skd(alpha=1.0, steps=80)", 90, knowledge=["trigger"], trigger_given="decoy"),
        record("cag(target='black')", 6),
        record("cag(target='noise')", 9, more={"asr@1e-3": share(3, 100)}),
    ]
    return write_suite(tmp_path_factory.mktemp("results") / "one", made)


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
    assert "one seed" in out and "note: fewer than three seeds: no comparison" in out
    assert head.endswith("shown to differ") and asr.split()[-1] == "no"


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
