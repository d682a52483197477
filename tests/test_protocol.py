"""The protocol of the benchmark: the suite keeps to it, what is frozen stays, and the table says how far it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import bench
from harness.registry import Registry, load, presets
from harness.runs import suite as suites
from harness.runs.declared import Declared
from harness.runs.record import Dropped
from harness.runs.suite import Suite
from leaderboard import claims, headline, protocol, results, rows, site
from leaderboard.results import ResultsError
from tests.records import changed, record, write_suite


@pytest.fixture(scope="module")
def plugins() -> Registry:
    return load()


@pytest.fixture(scope="module")
def planned(plugins: Registry) -> Suite:
    return suites.load_suite(protocol.shipped().suite, plugins)


def same(spec: str) -> str:
    return spec


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of protocols in which nothing is frozen."""
    monkeypatch.setattr(protocol, "FOLDER", tmp_path)
    protocol.frozen.cache_clear()
    yield tmp_path
    protocol.frozen.cache_clear()


def test_the_shipped_suite_keeps_to_the_protocol(plugins: Registry, planned: Suite) -> None:
    draft = suites.read(suites.find_suite(protocol.shipped().suite))
    assert protocol.problems(planned, Declared(plugins).current) == []
    assert protocol.unnamed(draft.grids) == []
    assert {cell.seed for cell in planned.cells} == set(protocol.shipped().seeds) == {10, 11, 12}


def test_what_was_frozen_can_be_read_and_is_as_it_was_written(planned: Suite, empty: Path) -> None:
    path = protocol.freeze(planned, "digits-ddpm")
    kept = protocol.frozen("digits-ddpm")
    assert kept is not None and set(kept.cells) == {c for c in planned.cells if c.model.startswith("digits-ddpm")}
    assert protocol.frozen("shapes-ldm") is None
    with pytest.raises(ResultsError, match="no cell of digits-ddpm that is not frozen yet"):
        protocol.freeze(planned, "digits-ddpm")
    protocol.frozen.cache_clear()
    path.write_text(path.read_text().replace('"seed": 10', '"seed": 13', 1))
    with pytest.raises(ResultsError, match="changed after it was frozen"):
        protocol.frozen("digits-ddpm")


def test_a_changed_cell_of_a_frozen_model_is_named_and_a_new_one_is_not(planned: Suite, empty: Path) -> None:
    protocol.freeze(planned, "digits-ddpm")
    assert protocol.problems(planned, same) == []
    other = replace(planned.cells[0], n=7)
    (words,) = protocol.problems(replace(planned, cells=(*planned.cells[1:], other)), same)
    assert words.startswith("digits-ddpm: the suite no longer has a frozen cell")
    grown = replace(planned, cells=(*planned.cells, other))
    assert protocol.problems(grown, same) == []


def test_attacks_are_frozen_one_after_the_other_and_nothing_before_them_changes(planned: Suite, empty: Path) -> None:
    mine = [c for c in planned.cells if c.model.startswith("shapes-sd")]
    first, second = sorted({c.attack for c in mine} - {"none()"})[:2]
    protocol.freeze(planned, "shapes-sd", attack=first)
    before = protocol.frozen("shapes-sd")
    assert before is not None and {c.attack for c in before.cells} - {first} == {mine[0].attack}
    assert any(c.defense.startswith("none") for c in before.cells), "with the clean model under its triggers"
    protocol.freeze(planned, "shapes-sd", attack=second)
    after = protocol.frozen("shapes-sd")
    assert after is not None and after.cells[: len(before.cells)] == before.cells
    assert after.digest != before.digest and protocol.problems(planned, same) == []
    moved = replace(planned, cells=tuple(replace(c, n=7) if c == before.cells[-1] else c for c in planned.cells))
    with pytest.raises(ResultsError, match="frozen cells or thresholds have changed"):
        protocol.freeze(moved, "shapes-sd")


def test_a_default_that_changed_is_seen_and_a_new_parameter_is_none(planned: Suite, empty: Path) -> None:
    protocol.freeze(planned, "digits-ddpm")
    elijah = next(c for c in planned.cells if c.defense.startswith("elijah("))
    assert "iterations=100" in elijah.defense

    def changed(cell: object) -> Suite:
        cells = [replace(c, defense=str(cell)) if c.defense == elijah.defense else c for c in planned.cells]
        return replace(planned, cells=tuple(cells))

    today = elijah.defense.replace("iterations=100", "iterations=90")
    assert any("elijah" in words for words in protocol.problems(changed(today), same))
    grown = elijah.defense.removesuffix(")") + ", later=0)"
    current = {elijah.defense: grown}
    assert protocol.problems(changed(grown), lambda spec: current.get(spec, spec)) == []


def test_a_changed_threshold_is_seen(planned: Suite, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol.freeze(planned, "digits-ddpm")
    mine = protocol.shipped()
    other = replace(mine, thresholds=replace(mine.thresholds, left=0.1))
    monkeypatch.setattr(protocol, "shipped", lambda: other)
    assert any("frozen under other thresholds" in words for words in protocol.problems(planned, same))


def test_a_defense_that_does_not_meet_an_attack_is_a_hole(planned: Suite) -> None:
    gone = next(c for c in planned.cells if c.defense.startswith("elijah("))
    left = replace(planned, cells=tuple(c for c in planned.cells if c != gone))
    (words, *_) = protocol.problems(left, same)
    assert words.startswith("has 1 holes: elijah does not meet")
    said = replace(left, dropped=(*planned.dropped, Dropped(gone, "does not apply")))
    assert not any("holes" in words for words in protocol.problems(said, same))


def test_frozen_cells_of_a_package_that_is_not_installed_are_not_missed(planned: Suite, empty: Path) -> None:
    protocol.freeze(planned, "digits-ddpm")
    kept = tuple(c for c in planned.cells if not c.defense.startswith("elijah("))
    without = replace(planned, cells=kept, absent={"elijah": "bench-elijah"})
    assert protocol.problems(without, same) == []
    assert any("elijah" in words for words in protocol.problems(replace(without, absent={}), same))
    further = replace(without, cells=(*kept, replace(kept[0], n=7)))
    assert protocol.freeze(further, "digits-ddpm").is_file()


def test_rows_of_a_package_that_is_not_installed_are_not_called_unplanned(plugins: Registry, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "packages = {hush = 'bench-hush'}\n[[grid]]\nmodel = 'digits-ddpm'\nattack = 'none'\ntrigger = 'box'\n"
        "target = 'hat'\ndefense = ['none', 'hush']\n"
    )
    declared = Declared(plugins, {"mine": path})
    for defense, notes in (("hush(size=1.0)", []), ("clp()", ["has 1 rows that suite mine does not plan"])):
        folder = write_suite(tmp_path / defense[:3] / "mine", [record(defense)])
        assert claims.rows(results.read_suite(folder), declared)[1] == notes


def test_other_seeds_than_the_protocols_are_refused(planned: Suite) -> None:
    tuned = replace(planned, cells=(*planned.cells, replace(planned.cells[0], seed=100, evaluation_seed=100)))
    assert any("has cells of seed 100" in words for words in protocol.problems(tuned, same))
    shared = replace(planned, cells=(*planned.cells, replace(planned.cells[0], evaluation_seed=11)))
    assert any("evaluates a cell of seed 10 on seed 11" in words for words in protocol.problems(shared, same))


def test_specs_that_are_no_presets_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[grid]]\nmodel="digits-ddpm"\nattack="baddiffusion(steps=3)"\ntrigger="box"\ntarget="hat"\ndefense="clp"\n'
    )
    assert protocol.unnamed(suites.read(path).grids) == ["baddiffusion(steps=3)"]


@pytest.mark.usefixtures("empty")
def test_the_command_freezes_a_model_once_and_says_how_many_cells_it_has(planned: Suite) -> None:
    asked = ["leaderboard", "protocol", "--json"]
    before = CliRunner().invoke(bench, asked)
    count = sum(c.model.startswith("digits-ddpm") for c in planned.cells)
    assert before.exit_code == 0
    assert json.loads(before.stdout)["models"]["digits-ddpm"] == {"cells": count, "frozen": 0, "sha256": None}
    protocol.frozen.cache_clear()
    after = CliRunner().invoke(bench, ["leaderboard", "protocol", "--freeze", "digits-ddpm"])
    kept = protocol.frozen("digits-ddpm")
    assert kept is not None and f"digits-ddpm: {count} cells, {count} frozen, sha256 {kept.digest[:12]}" in after.stdout
    again = CliRunner().invoke(bench, ["leaderboard", "protocol", "--freeze", "digits-ddpm"])
    assert isinstance(again.exception, ResultsError)


def rows_of(seeds: tuple[int, ...]) -> list:
    attack = "baddiffusion(poison_rate=0.1, steps=600)"
    return [
        record(defense, hits, attack=attack, seed=seed, knowledge=["data"], utility_n=100)
        for seed in seeds
        for defense, hits in (("none", 97), ("elijah(steps=150)", 0), ("skd(steps=80)", 50))
    ]


def test_the_benchmarks_own_rows_have_the_first_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows_of((10, 11, 12))
    write_suite(tmp_path / "results" / "v1", made[:3])
    write_suite(tmp_path / "results" / "study", made[3:])
    kept = protocol.Frozen(protocol.shipped().thresholds, tuple(r.cell for r in made))
    monkeypatch.setattr(protocol, "frozen", lambda model: kept)
    first, second = headline.published(rows.pooled(made), rows.pooled(made[:3]), "unconditional")
    assert first.version is not None and (first.version.done, first.version.planned) == (3, 9)
    assert (first.seeds, second.seeds) == ((10,), (10, 11, 12))
    site.build(results.read(tmp_path / "results"), tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Benchmark v1. Cleaned models: digits-ddpm" in page
    (entry, *_) = json.loads((tmp_path / "page" / "leaderboard.json").read_text())["heads"]
    assert entry["version"] == asdict(first.version)
    assert second.version is None


def test_a_record_from_after_a_plugin_gained_a_parameter_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows_of((10,))
    kept = protocol.Frozen(protocol.shipped().thresholds, tuple(r.cell for r in made))
    monkeypatch.setattr(protocol, "frozen", lambda model: kept)

    def done(short: str, written: str) -> int:
        """How many of the three cells are there if elijah's record is written so."""
        cell = replace(made[1].cell, defense=written)
        later = changed(made[1], cell=cell, provenance={"short": {**made[1].provenance.short, "defense": short}})
        return headline.version("digits-ddpm", rows.pooled([made[0], later, made[2]])).done

    assert done("elijah(steps=150)", "elijah(steps=150, later=0)") == 3
    assert done("elijah(steps=150, later=1)", "elijah(steps=150, later=1)") == 2  # not its default
    assert done("elijah(steps=90)", "elijah(steps=90, later=0)") == 2


def test_its_table_says_the_names_of_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "frozen", lambda model: None)
    preset = presets.shipped()["attacks", "digits-trojdiff"]
    made = [
        changed(each, provenance={"short": {**each.provenance.short, "attack": preset.spec}}) for each in rows_of((10,))
    ]
    (first, *_) = headline.published(rows.pooled(made), rows.pooled(made), "unconditional")
    assert list(first.names.values()) == ["digits-trojdiff"]


def test_a_whole_benchmark_has_the_only_table_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows_of((10, 11, 12))
    kept = protocol.Frozen(protocol.shipped().thresholds, tuple(r.cell for r in made))
    monkeypatch.setattr(protocol, "frozen", lambda model: kept)
    (only,) = headline.published(rows.pooled(made), rows.pooled(made), "unconditional")
    assert only.version is not None and "9 of 9 frozen cells" in only.version.words


def test_a_model_that_is_not_frozen_is_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "frozen", lambda model: None)
    made = rows_of((10,))
    (first, *_) = headline.published(rows.pooled(made), rows.pooled(made), "unconditional")
    assert first.version is not None and "draft" in first.version.words
