"""Forgeries that a record, a suite and the plugins show: each is refused by one line that says what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import registry
from harness.judges import statistics
from harness.runs.declared import Declared
from harness.runs.jsonable import key_of
from harness.runs.record import Record
from harness.runs.suite import find_suite
from leaderboard import attestation, check, claims, pictures, results
from tests.records import changed, digest, published, verifiable, write_sealed

Document = dict[str, Any]
FOREIGN = "0" * 63 + "1"


@pytest.fixture(scope="module")
def declared() -> Declared:
    """What the plugins say, and the suite quick, whose published rows are forged here."""
    return Declared(registry.load(), {"quick": find_suite("quick")})


def today(row: Record, declared: Declared) -> Record:
    """The row with the specs, the knowledge and the deliveries that its plugins have now."""
    whole = replace(row.cell, **declared.canonical(row.cell))
    said = declared.of(whole)
    return changed(row, cell=asdict(whole), knowledge=said.needs, provenance={"delivers": said.delivers})


@pytest.fixture(scope="module")
def honest(declared: Declared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planned rows of the suite quick as a run would write them now: the published numbers, with ingredients."""
    folder = tmp_path_factory.mktemp("honest") / "quick"
    published = results.read_suite(results.SHIPPED / "quick")
    planned = set(declared.suite("quick").cells)
    shutil.copytree(published.folder / "sheets", folder / "sheets")
    rows = [verifiable(row, declared) for row in (today(r, declared) for r in published.records) if row.cell in planned]
    for row in rows:
        results.write_record(folder, row)
    for name in results.contents(folder):
        if name.startswith("sheets/") and name not in {row.sheet for row in rows}:
            (folder / name).unlink()
    return folder


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """A copy that a test may forge."""
    return shutil.copytree(honest, tmp_path / "quick")


def found(folder: Path, declared: Declared) -> list[str]:
    return [str(problem) for problem in check.check(folder, declared=declared).problems]


def row(folder: Path, defense: str, decoy: bool = False) -> Path:
    """The file of the row of a defense on the attacked model that skd-cag defends."""
    cells = {
        path: record.cell
        for path in results.record_files(folder)
        if (record := results.read_record(path)).cell.model == "shapes-sd" and record.cell.attack.startswith("badt2i")
    }
    named = {path for path, cell in cells.items() if cell.defense.partition("(")[0] == defense}
    (path,) = (path for path in named if (cells[path].trigger_given == "decoy") == decoy)
    return path


def fixed(folder: Path) -> Path:
    """The file of the elijah row on the model whose target is a fixed image."""
    rows = [(p, results.read_record(p)) for p in results.record_files(folder)]
    return next(p for p, r in rows if r.cell.defense.startswith("elijah(invert=True"))


def forge(path: Path, change: Callable[[Document], Any]) -> Path:
    """Change a record and seal it anew, under the key that it then says."""
    document = json.loads(path.read_text())
    path.unlink()
    change(document)
    return write_sealed(path.parents[1], document)


def scores(document: Document, *names: str) -> list[Document]:
    return [document["scores"][name] for name in names]


def test_honest_rows_pass_and_nothing_of_them_is_unverifiable(honest: Path, declared: Declared) -> None:
    outcome = check.check(honest, declared=declared)
    assert outcome.problems == [] and outcome.records == 11
    assert not [note for note in outcome.notes if "unverifiable" in note.words]


# ---- scores and what they follow from -------------------------------------------------------------------------------


def lower_threshold(document: Document) -> None:
    """A threshold under which nothing is a hit, with the rates and intervals that follow from it."""
    document["scores"]["asr_threshold"]["value"] = 0.001
    no_hits(document, 128)


def no_hits(document: Document, n: int) -> None:
    low, high = statistics.wilson(0, n)
    for name in ("asr", "asr@calibrated"):
        document["scores"][name].update(value=0.0, n=n, interval=[low, high])
    document["scores"]["removal"].update(value=1.0, n=n, interval=[1 - high, 1 - low])


def uncount(document: Document) -> None:
    """Hits are said not to count, with the rate and n that follow."""
    kept = document["scores"]["asr"]["per_sample"]
    tau = document["scores"]["asr_threshold"]["value"]
    document["scores"]["asr"]["per_sample"] = [None if value <= tau else value for value in kept]


def uncounted_with_its_n(document: Document) -> None:
    uncount(document)
    no_hits(document, sum(value is not None for value in document["scores"]["asr"]["per_sample"]))


def drop(*names: str) -> Callable[[Document], None]:
    def dropped(document: Document) -> None:
        for score in scores(document, *names):
            score["per_sample"] = None

    return dropped


def said(name: str, **parts: Any) -> Callable[[Document], None]:
    return lambda document: document["scores"][name].update(parts)


def first_distance(value: float) -> Callable[[Document], None]:
    def changed(document: Document) -> None:
        document["scores"]["asr"]["per_sample"][0] = value

    return changed


OF_SCORES: dict[str, tuple[Callable[[Document], Any], str]] = {
    "threshold": (lower_threshold, "asr_threshold is 0.001; target patch has 0."),
    "hits set to null": (uncount, "per-sample values for n = 128"),
    "hits set to null, with their n": (uncounted_with_its_n, "its target and trigger count 128, or others"),
    "values of asr dropped": (drop("asr"), "asr lacks its per-sample values, which its metric keeps"),
    "values of a mean dropped": (drop("drift"), "drift lacks its per-sample values"),
    "a rate at a threshold": (lambda d: d["scores"].pop("asr@calibrated"), "lacks asr@calibrated"),
    "n of a rate": (said("asr@calibrated", n=1000), "asr@calibrated says n = 1000, and it has n = 128"),
    "n of a distance": (said("fd[shapes-cnn]", n=5000), "says n = 5000, and it has n = 256"),
    "distance of a hit": (first_distance(-1e300), "asr has the distance -1e+300, and it can be at least 0"),
    "negative Fréchet distance": (said("fd[shapes-cnn]", value=-1e300), "is -1e+300, and can be at least 0"),
    "a share above 1": (said("attribute_accuracy", value=1.5), "attribute_accuracy is 1.5, and can be 0 to 1"),
    "larger than single precision": (said("kd[shapes-cnn]", value=1e300), "no larger than what single precision"),
    "null without a reason": (said("spread", value=None), "spread is unmeasured and does not say why"),
    "null with values": (said("drift", value=None, warning="why"), "drift is unmeasured and has values all the same"),
    "interval upside down": (said("drift", interval=[0.9, 0.1]), "drift has the interval (0.9, 0.1), which is none"),
    "interval elsewhere": (said("fd[shapes-cnn]", interval=[1e6, 2e6]), "outside its interval (1e+06, 2e+06)"),
    "interval narrower": (said("asr", interval=[0.0, 0.01]), "asr has the interval (0, 0.01), its values give"),
    "attacked model's rate": (said("fd_before[shapes-cnn]", value=1.0), "which has the same backdoored model"),
    "warnings": (lambda d: d["warnings"].clear(), "its warnings are not those of its scores"),
    "scores of a failed row": (lambda d: d.update(error="boom"), "a row that failed and has scores"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_SCORES)
def test_a_forged_score_is_refused(folder: Path, declared: Declared, what: str) -> None:
    change, says = OF_SCORES[what]
    path = forge(row(folder, "skd-cag"), change)
    lines = found(folder, declared)
    assert any(str(path) in line and says in line for line in lines), lines


def test_the_threshold_of_a_fixed_target_is_the_plugins(folder: Path, declared: Declared) -> None:
    path = forge(fixed(folder), said("asr_threshold", value=1e-9))
    assert f"{path}: asr_threshold is 1e-09; target hat has 0.01" in found(folder, declared)


def test_a_rate_at_a_named_threshold_follows_from_the_targets_own(folder: Path, declared: Declared) -> None:
    path = forge(fixed(folder), said("asr@5e-2", value=0.0))
    assert any(str(path) in line and "asr@5e-2 is 0" in line for line in found(folder, declared))


def test_the_attacked_model_is_that_of_the_row_without_a_defense(folder: Path, declared: Declared) -> None:
    path = forge(row(folder, "none"), said("drift_before", value=0.5, interval=[0.4, 0.6]))
    lines = found(folder, declared)
    assert any(str(path) in line and "drift_before is 0.5 and drift" in line for line in lines), lines


def test_a_share_without_values_is_a_count_with_its_interval(folder: Path, declared: Declared) -> None:
    path = forge(row(folder, "skd-cag"), said("asr_before", value=0.123456, per_sample=None))
    lines = found(folder, declared)
    assert any(str(path) in line and "asr_before is 0.123456 in the record" in line for line in lines), lines


# ---- what the plugins say -------------------------------------------------------------------------------------------


def provenance(**parts: Any) -> Callable[[Document], None]:
    return lambda document: document["provenance"].update(parts)


def named(part: str, spec: Callable[[str], str]) -> Callable[[Document], None]:
    def renamed(document: Document) -> None:
        document["cell"][part] = spec(document["cell"][part])
        document["provenance"]["short"].pop(part)

    return renamed


def shown(defense: str) -> Callable[[Document], None]:
    return lambda document: document["provenance"]["short"].update(defense=defense)


def fewer_evaluations(document: Document) -> None:
    document["provenance"]["sampled"]["backdoored/triggered"]["nfe"] = 1


def spelt(name: str) -> Callable[[Document], None]:
    return named("defense", lambda spec: spec.replace("skd-cag", name))


OF_PLUGINS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "knowledge": (lambda d: d.update(knowledge=[]), "says that skd-cag was given nothing; its plugin needs"),
    "what it delivers": (provenance(delivers=["suspicion"]), "delivers suspicion; its plugin says model"),
    "track": (provenance(track="unconditional"), "its track is unconditional; its model is of text-to-image"),
    "evaluations": (fewer_evaluations, "1 network evaluations made an image; its sampler takes"),
    "another's code": (lambda d: d["provenance"]["sources"]["defense"].update(distribution="mine"), "skd-cag is of"),
    "no source": (lambda d: d["provenance"]["sources"].pop("defense"), "where its defense's plugin comes from"),
    "Cyrillic letter": (spelt("skd-c\u0430g"), "letters that look like others"),
    "hyphen": (spelt("skd\u2011cag"), "letters that look like others"),
    "underscore": (spelt("skd_cag"), "skd_cag looks like skd-cag, and is none"),
    "invisible character": (named("trigger", lambda s: s.replace("\\u200b", "\u200b")), "characters that nobody sees"),
    "short form": (shown("elijah"), "its short defense elijah is no short form of skd-cag"),
    "short parameter": (shown("skd-cag(steps=9)"), "its short defense skd-cag(steps=9) is no short form"),
    "score's name": (lambda d: d["scores"].update({"\u0430sr": d["scores"]["asr"]}), "letters other than ASCII's"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_PLUGINS)
def test_a_claim_that_the_plugins_deny_is_refused(folder: Path, declared: Declared, what: str) -> None:
    change, says = OF_PLUGINS[what]
    path = forge(row(folder, "skd-cag"), change)
    lines = found(folder, declared)
    assert any(str(path) in line and says in line for line in lines), lines


# ---- keys -----------------------------------------------------------------------------------------------------------


def relabelled(document: Document, old: str, new: str) -> None:
    document["provenance"]["jobs"][new] = document["provenance"]["jobs"].pop(old)


def random_key(document: Document) -> None:
    relabelled(document, document["key"], FOREIGN)
    document["key"] = FOREIGN


def rekeyed(part: str, value: Any, kind: str) -> Callable[[Document], None]:
    """Change one ingredient of a job and compute its key and those of all that depend on it again."""

    def forged(document: Document) -> None:
        jobs = document["provenance"]["jobs"]
        names: dict[str, str] = {}
        order = ("attack", "defend", "sample", "measure")
        for key in sorted(jobs, key=lambda key: order.index(jobs[key]["kind"])):
            job = jobs[key]
            job["ingredients"] = claims.renamed(job["ingredients"], names)
            job["ingredients"]["inputs"].sort()
            if job["kind"] == kind:
                job["ingredients"][part] = value
            names[key] = key_of(job["ingredients"])
        document["provenance"]["jobs"] = {names[key]: job for key, job in jobs.items()}
        document["key"] = names[document["key"]]

    return forged


def no_ingredients(document: Document) -> None:
    for job in document["provenance"]["jobs"].values():
        job.pop("ingredients")


def one_without(document: Document) -> None:
    next(iter(document["provenance"]["jobs"].values())).pop("ingredients")


def a_short_attempt(document: Document) -> None:
    jobs = document["provenance"]["jobs"]
    (defend,) = (key for key, job in jobs.items() if job["kind"] == "defend")
    document["attempts"].append({"job": defend, "wall_s": 0.5})


OF_KEYS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "random key": (random_key, "is not the sha256 of its ingredients"),
    "cell's n": (lambda d: d["cell"].update(n=1000), "was made from another"),
    "cell's seed": (lambda d: d["cell"].update(seed=1), "was made from another"),
    "another seed's attack": (rekeyed("seed", 7, "attack"), "was made from another seed than that of its cell"),
    "fewer images": (rekeyed("n", 3, "sample"), "was made from another n than that of its cell"),
    "another defense's work": (rekeyed("defense", {"spec": "none()"}, "defend"), "was made from another defense"),
    "an invented ingredient": (rekeyed("luck", 1, "defend"), "was made from another luck"),
    "no ingredients": (no_ingredients, "holds no ingredients from which its key is computed again"),
    "some without ingredients": (one_without, "jobs hold no ingredients"),
    "an attempt at another job": (lambda d: d["attempts"].append({"job": FOREIGN}), "which is none of its jobs"),
    "an attempt in the future": (lambda d: d["attempts"].append({"job": d["key"], "started": time.time() + 1e6}),
                                 "an attempt began in the future"),
    "cost above the job's": (a_short_attempt, "defense_wall_s is"),
    "commit": (provenance(commit="HEAD"), "names no commit that it was made from"),
}  # fmt: skip


@pytest.mark.parametrize("what", OF_KEYS)
def test_a_key_that_the_record_does_not_give_is_refused(folder: Path, declared: Declared, what: str) -> None:
    change, says = OF_KEYS[what]
    path = forge(row(folder, "skd-cag"), change)
    lines = found(folder, declared)
    assert any(str(path) in line and says in line for line in lines), lines


@pytest.mark.parametrize("rewrite", ["commit", "n", "sheet", "seed"])
def test_a_published_row_of_before_is_taken_only_as_it_was_published(
    tmp_path: Path, declared: Declared, rewrite: str
) -> None:
    folder = published("uncond", tmp_path)
    assert found(folder, declared) == []
    suite = results.read_suite(folder)
    path = suite.record_file(next(row for row in suite.records if row.cell.defense == "none").key)
    document = results.load(path)
    path.unlink()
    {
        "commit": lambda: document["provenance"].update(commit="a" * 40),
        "n": lambda: document["scores"]["kid[digits-cnn]"].update(n=128),
        "sheet": lambda: document.update(sheet=None),
        "seed": lambda: document["cell"].update(seed=5),
    }[rewrite]()
    document["provenance"]["machine"] = "another"
    forged = write_sealed(folder, document)
    lines = [line for line in found(folder, declared) if str(forged) in line]
    assert lines and (rewrite == "seed" or "no row as it was published" in lines[0]), lines


# ---- copies ---------------------------------------------------------------------------------------------------------


def as_seed(record: Record, seed: int, declared: Declared, evaluation_seed: int = 0) -> Record:
    document = record.model_dump()
    document["cell"] |= {"seed": seed, "evaluation_seed": evaluation_seed}
    return verifiable(Record.model_validate(document), declared)


def test_a_seed_under_another_number_is_refused_though_every_key_is_its_own(folder: Path, declared: Declared) -> None:
    rows = [results.read_record(path) for path in results.record_files(folder)]
    copies = [as_seed(each, 1, declared) for each in rows if each.cell.attack.startswith("villandiffusion")]
    for copy in copies:
        results.write_record(folder, copy)
    lines = found(folder, declared)
    copied = [copy for copy in copies if copy.value("asr") > 0 or copy.value("change") > 0]
    assert copied
    for copy in copied:
        assert any(copy.key in line and "are, one by one, those of" in line for line in lines), copy.cell.defense


def shaken(record: Record, by: float) -> Record:
    """The record with every drift changed by up to the share `by`, and with the means that follow."""
    made = {}
    for name in ("drift", "drift_before", "drift_triggered", "change"):
        kept = record.scores[name].per_sample or ()
        values = torch.tensor(kept, dtype=torch.float64) * (1 + by * torch.linspace(-1, 1, len(kept)))
        made[name] = replace(statistics.mean(values, False), higher_is_better=record.scores[name].higher_is_better)
    for name, score in record.scores.items():
        if score.per_sample and name not in made:
            made[name] = replace(score, per_sample=tuple(v * 1.0001 for v in score.per_sample))
    return record.model_copy(update={"scores": {**record.scores, **made}})


def test_a_seed_that_was_copied_and_shaken_is_refused(folder: Path, declared: Declared) -> None:
    for by, refused in ((0.003, True), (0.2, False)):
        copy = shaken(as_seed(results.read_record(row(folder, "skd-cag")), 1, declared), by)
        results.write_record(folder, copy)
        lines = [line for line in found(folder, declared) if copy.key in line and "are nearly those of" in line]
        assert len(lines) == refused, lines
        (folder / "records" / f"{copy.key}.json").unlink()


def test_a_shaken_copy_is_found_under_another_evaluation_seed_too(folder: Path, declared: Declared) -> None:
    honest = results.read_record(row(folder, "skd-cag"))
    copy = shaken(as_seed(honest, 1, declared, evaluation_seed=1), 0.003)
    results.write_record(folder, copy)
    lines = [line for line in found(folder, declared) if copy.key in line]
    assert any("are nearly those of" in line for line in lines)


def test_rows_of_one_seed_on_other_evaluation_samples_are_no_rows_of_one_table(
    folder: Path, declared: Declared
) -> None:
    """Their clean images differ, and what they say of the backdoored model may differ too."""
    other = as_seed(results.read_record(row(folder, "skd-cag")), 0, declared, evaluation_seed=7)
    results.write_record(folder, other)
    lines = [line for line in found(folder, declared) if other.key in line]
    assert not any("another protocol" in line or "another backdoored model" in line for line in lines), lines


def test_an_attack_of_one_seed_under_another_number_is_refused(folder: Path, declared: Declared) -> None:
    path = row(folder, "skd-cag")
    document = json.loads(path.read_text())
    document["cell"]["seed"] = 1
    document["key"], old = digest("random"), document["key"]
    relabelled(document, old, document["key"])
    no_ingredients(document)
    forged = write_sealed(folder, document)
    lines = found(folder, declared)
    assert any(str(forged) in line and "which has another seed" in line for line in lines), lines


def test_rows_that_share_their_images_by_right_are_not_refused(honest: Path, declared: Declared) -> None:
    """A decoy's and a true trigger's rows of one attacked model, and judges that say 0 or 1."""
    rows = [results.read_record(path) for path in results.record_files(honest)]
    shared = {r.scores["drift_before"].value for r in rows if r.cell.attack.startswith("badt2i")}
    assert len(shared) == 1 and check.check(honest, declared=declared).problems == []


def test_a_contact_sheet_of_other_images_is_refused(folder: Path, declared: Declared) -> None:
    other = results.read_record(row(folder, "none")).sheet
    path = forge(row(folder, "skd-cag"), lambda document: document.update(sheet=other))
    assert any("whose images are others" in line for line in found(folder, declared)), path


def test_two_rows_that_change_their_contact_sheets_are_refused(folder: Path, declared: Declared) -> None:
    """Each sheet is named by one row and is of a row: only the images say whose."""
    paths = [row(folder, "skd-cag"), row(folder, "none")]
    sheets = [results.read_record(path).sheet for path in paths]
    for path, sheet in zip(paths, reversed(sheets), strict=True):
        forge(path, lambda document, sheet=sheet: document.update(sheet=sheet))
    lines = found(folder, declared)
    for path in paths:
        assert any(str(path) in line and "shows other images than its scores are of" in line for line in lines), lines


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (28, 20)])
def test_a_contact_sheet_gives_the_drift_that_the_metric_measures(tmp_path: Path, size: tuple[int, int]) -> None:
    from harness.diffusion.images import save_png
    from harness.judges.evidence import contact_sheet
    from plugins.metrics.drift import Drift
    from tests.test_evidence import evidence

    rng = torch.Generator().manual_seed(0)
    images = {tuple(name.split("/")): torch.rand(9, 3, *size, generator=rng) * 2 - 1 for name in pictures.SETS}
    made = {name: partial(images.__getitem__, name) for name in images}
    seen = evidence(made)
    save_png(contact_sheet(seen), tmp_path / "sheet.png")
    shown = pictures.shown(tmp_path / "sheet.png", pictures.SETS)
    assert shown is not None
    for name, values in shown.items():
        assert Drift().measure(seen)[name].per_sample[:8] == pytest.approx(values, abs=0.01), name  # type: ignore[index]


def test_one_key_with_other_numbers_in_two_suites_is_refused(folder: Path, declared: Declared) -> None:
    shutil.copytree(folder, folder.parent / "sealing-alpha")
    assert not [line for line in found(folder.parent, declared) if "has the key of" in line]
    path = forge(row(folder, "skd-cag"), said("fd[shapes-cnn]", value=0.5))
    lines = [line for line in found(folder.parent, declared) if "has the key of" in line]
    assert len(lines) == 1 and path.name in lines[0] and "another fd[shapes-cnn]" in lines[0]


# ---- rows of the suite ----------------------------------------------------------------------------------------------


def test_the_worst_row_that_was_deleted_is_named(folder: Path, declared: Declared) -> None:
    row(folder, "skd-cag").unlink()
    lines = found(folder, declared)
    assert any("lacks a row of suite quick: skd-cag(" in line and "seed 0, n = 128" in line for line in lines), lines


def test_a_decoy_control_that_was_deleted_is_named(folder: Path, declared: Declared) -> None:
    row(folder, "skd-cag", decoy=True).unlink()
    assert any("given a decoy trigger on shapes-sd" in line for line in found(folder, declared))


def test_a_row_that_the_suite_plans_cannot_be_left_out(folder: Path, declared: Declared) -> None:
    from harness.runs.record import Dropped

    path = row(folder, "skd-cag")
    results.write_dropped(folder, Dropped(results.read_record(path).cell, "it does not apply"))
    path.unlink()
    assert any("says that a row is left out, and suite quick plans it" in line for line in found(folder, declared))


# ---- attestations ---------------------------------------------------------------------------------------------------


def attested(folder: Path, path: Path, change: Callable[[Document], Any] = lambda document: None) -> Path:
    """Put the attestation that a run with the very same numbers would leave beside a record, changed."""
    record = results.read_record(path)
    lines = attestation.compared(record.scores, {name: score.value for name, score in record.scores.items()})
    made = attestation.Attestation(
        key=record.key, within=True, same_key=True, scores=tuple(lines), provenance=record.provenance
    )
    document = made.model_dump(mode="json")
    change(document)
    file = folder / "reproduced" / f"{record.key}.json"
    results.write_text(file, json.dumps(document))
    return file


ATTESTED: dict[str, tuple[Callable[[Document], Any], str]] = {
    "another key": (lambda d: d.update(key=FOREIGN), "attests another record"),
    "other values": (lambda d: d["scores"][0].update(recorded=0.123), "what its record and its new value do not give"),
    "a new value outside": (lambda d: d["scores"][0].update(again=77.0), "its new value do not give"),
    "fewer scores": (lambda d: d["scores"].pop(), "does not attest exactly the scores of its record"),
    "a score twice": (lambda d: d["scores"].append(d["scores"][0]), "does not attest exactly the scores"),
    "not within": (lambda d: d.update(within=False), "says within: false, and 0 of its scores are not"),
    "no commit": (lambda d: d["provenance"].update(commit=None), "was made from no commit"),
    "outside, and honest": (
        lambda d: (d["scores"][0].update(again=77.0, within=False), d.update(within=False)),
        "says that the row was not reproduced: asr",
    ),
}  # fmt: skip


def test_an_honest_attestation_passes(folder: Path, declared: Declared) -> None:
    attested(folder, row(folder, "skd-cag"))
    outcome = check.check(folder, declared=declared)
    assert outcome.problems == [] and outcome.reproduced == 1


@pytest.mark.parametrize("what", ATTESTED)
def test_a_forged_attestation_is_refused(folder: Path, declared: Declared, what: str) -> None:
    change, says = ATTESTED[what]
    file = attested(folder, row(folder, "skd-cag"), change)
    lines = found(folder, declared)
    assert any(str(file) in line and says in line for line in lines), lines


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_number_as_a_text_or_a_fraction_is_refused(folder: Path, declared: Declared) -> None:
    for change in (
        said("spread", value="0.9"), said("spread", n=100.0), said("spread", n=True),
        lambda d: d["cell"].update(n="100"),
        lambda d: d["cell"].update(seed=0.0), lambda d: d["scores"]["drift"]["per_sample"].__setitem__(0, "0.1"),
        lambda d: d["provenance"].update(dirty=0),
    ):  # fmt: skip
        path = row(folder, "skd-cag")
        before = path.read_bytes()
        forge(path, change)
        assert any("not as a record is written" in line or "should be" in line for line in found(folder, declared))
        path.write_bytes(before)


def test_a_name_that_stands_twice_in_an_object_is_refused(folder: Path, declared: Declared) -> None:
    path = row(folder, "skd-cag")
    text = path.read_text()
    path.write_text(text.replace('"asr": {"higher', '"asr": {"value": 0.0, "higher', 1))
    assert path.read_text() != text
    lines = found(folder, declared)
    assert any(str(path) in line and "'value' stands twice in one object" in line for line in lines), lines


@pytest.mark.parametrize("what", ["record", "records", "suite", "sheet", "attestation", "pipe"])
def test_nothing_but_regular_files_is_read(folder: Path, tmp_path: Path, declared: Declared, what: str) -> None:
    root, outside = folder.parent, tmp_path / "outside"
    path = row(folder, "skd-cag")
    if what in ("record", "sheet"):
        path = path if what == "record" else next((folder / "sheets").iterdir())
        path.rename(outside)
        path.symlink_to(outside)
    elif what == "records":
        path = folder / "records"
        path.rename(outside)
        path.symlink_to(outside)
        root = folder.parent
        shutil.copytree(outside, root / "sealing-alpha" / "records")
    elif what == "suite":
        path = root / "sealing-alpha"
        shutil.copytree(folder, outside)
        path.symlink_to(outside)
    elif what == "attestation":
        outside.write_text("{}")
        (folder / "reproduced").mkdir()
        path = folder / "reproduced" / path.name
        path.symlink_to(outside)
    else:
        path = folder / "records" / f"{FOREIGN}.json"
        os.mkfifo(path)
    assert f"{path}: {results.IRREGULAR}" in found(root, declared)
    if what in ("record", "sheet", "attestation", "pipe"):
        with pytest.raises(results.ResultsError, match="results are regular files"):
            results.read(folder)


def test_a_published_row_without_ingredients_that_is_gone_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its suite may plan other rows today, and its seal still says that it was there."""
    monkeypatch.setattr(check, "_older", lambda: frozenset({"0123456789abcdef"}))
    monkeypatch.setattr(results, "SHIPPED", folder)
    lines = [str(problem) for problem in check.check(folder).problems]
    assert any("names the seals of 1 rows that are not among the results, such as 0123456789abcdef" in x for x in lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": 0}, "is not the one to which its candidates lead"),
        ({"inert": False}, "is not the one to which its candidates lead"),
        ({"given": "zero"}, "is not the one to which its candidates lead"),
        ({"tried": [{"name": "a", "hits": -1, "n": 9}], "chosen": 0}, "more hits than images"),
        (None, "names no control trigger"),
    ],
)
def test_a_control_trigger_that_its_candidates_do_not_give_is_refused(
    folder: Path, declared: Declared, change: Document | None, words: str
) -> None:
    def forged(document: Document) -> None:
        control = document["provenance"]["control"]
        document["provenance"]["control"] = None if change is None else control | change

    path = forge(row(folder, "skd-cag", decoy=True), forged)
    assert any(words in line for line in found(folder, declared) if line.startswith(str(path)))
