import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.registry import InvalidSpec, Registry, RegistryError, UnknownName, load
from harness.runs import suite as suites
from harness.runs.suite import AXES, SuiteError, find_suite, impossible, load_suite, read
from harness.types import Cell

PLUGINS = """
from dataclasses import dataclass
from typing import ClassVar
from harness import SAMPLERS, hookimpl

def nothing(self, *_): raise NotImplementedError
MODEL = {m: nothing for m in ("load", "digest", "data", "prompts", "attributes", "words", "judge", "scorer")}

def made(name, methods=(), fields=(), **facts):
    body = {"__annotations__": {}, "name": name, "version": 1, **facts, **{m: nothing for m in methods}}
    for field, default in fields:
        body["__annotations__"][field], body[field] = type(default), default
    return dataclass(frozen=True)(type(name.title(), (), {"__module__": __name__, **body}))

@dataclass(frozen=True)
class Seal:
    name: ClassVar[str] = "seal"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    given: bool = True

    @property
    def needs(self):
        return ("trigger",) if self.given else ()

    defend = nothing

@hookimpl
def models():
    return [made("pixels", MODEL, modality="noise", conditional=False),
            made("words", MODEL, modality="text", conditional=True)]

@hookimpl
def triggers():
    return [made("box", ("stamp", "wrong", "delta"), [("size", 5)], modality="noise"),
            made("token", ("stamp", "wrong", "apply"), modality="text")]

@hookimpl
def targets():
    return [made("hat", ("hits", "distances"), kind="image"),
            made("patch", ("hits", "distances"), kind="patch"),
            made("only-pixels", ("hits", "distances"), kind="image", accepts_models=("pixels",))]

BOTH = ("noise", "text")
@hookimpl
def attacks():
    return [made("none", ("implant",), accepts_triggers=BOTH, accepts_targets=("image", "patch")),
            made("bad", ("implant",), [("rate", 0.1)], accepts_triggers=("noise",), accepts_targets=("image",))]

@hookimpl
def defenses():
    return [made("none", ("defend",), accepts_triggers=BOTH, needs=()),
            made("seal-text", ("defend",), accepts_triggers=("text",), needs=("trigger",)), Seal]

@hookimpl
def metrics():
    return [made("asr", ("measure",)), made("drift", ("measure",), [("power", 2)]),
            made("opened", ("measure",), sets=("backdoored/found",))]

@hookimpl
def samplers():
    return list(SAMPLERS.values())
"""
SUITE = """
title = "A test"
[[grid]]
model = ["pixels"]
attack = ["none", "bad"]
trigger = "box"
target = ["hat"]
defense = ["none", "seal"]
sampler = ["ddim(steps=5)"]
seed = [0, 1]
n = 16
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    path = tmp_path_factory.mktemp("plugins") / "tiny.py"
    path.write_text(PLUGINS)
    registry = Registry(strict=True)
    registry.load_file(path)
    return registry


@pytest.fixture
def suite(tmp_path: Path):
    def write(text: str = SUITE) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


def test_a_metric_with_images_of_its_own_is_measured_where_a_suite_names_it(plugins: Registry, suite) -> None:
    named = suite("metrics = ['*', 'opened', 'drift(power=3)']\n" + SUITE)
    assert load_suite(named, plugins).metrics == ("asr", "drift(power=2)", "opened", "drift(power=3)")


def test_a_suite_is_the_product_of_its_lists_with_canonical_specs(plugins: Registry, suite) -> None:
    found = load_suite(suite(), plugins)
    assert (found.name, found.title, found.metrics) == ("mine", "A test", ("asr", "drift(power=2)"))
    assert len(found.cells) == 8 and not found.dropped
    sampler = plugins.canonical("samplers", "ddim(steps=5)")
    assert found.cells[1] == Cell("pixels", "none", "box(size=5)", "hat", "seal(given=True)", sampler, 0, "true", 16)
    assert [(cell.attack, cell.seed, cell.defense) for cell in found.cells[:5]] == [
        ("none", 0, "none"),
        ("none", 0, "seal(given=True)"),
        ("none", 1, "none"),
        ("none", 1, "seal(given=True)"),
        ("bad(rate=0.1)", 0, "none"),
    ]


def test_specs_that_mean_the_same_make_one_cell(plugins: Registry, suite) -> None:
    text = SUITE.replace('"bad"]', '"bad", "bad(rate=0.1)", "bad()"]')
    assert len(load_suite(suite(text), plugins).cells) == 8
    assert (
        len(load_suite(suite(SUITE + SUITE.partition("\n[[grid]]")[1] + SUITE.partition("[[grid]]")[2]), plugins).cells)
        == 8
    )


def test_impossible_cells_are_dropped_with_the_reason_in_words(plugins: Registry, suite) -> None:
    text = """
    [[grid]]
    model = ["pixels", "words"]
    attack = ["none", "bad"]
    trigger = ["box", "token"]
    target = ["hat", "patch", "only-pixels"]
    defense = ["none", "seal-text"]
    """
    found = load_suite(suite(text), plugins)
    assert len(found.cells) + len(found.dropped) == 48
    assert {(c.model, c.attack, c.trigger, c.target, c.defense) for c in found.cells} == {
        ("pixels", "none", "box(size=5)", "hat", "none"),
        ("pixels", "none", "box(size=5)", "patch", "none"),
        ("pixels", "none", "box(size=5)", "only-pixels", "none"),
        ("pixels", "bad(rate=0.1)", "box(size=5)", "hat", "none"),
        ("pixels", "bad(rate=0.1)", "box(size=5)", "only-pixels", "none"),
        ("words", "none", "token", "hat", "none"),
        ("words", "none", "token", "hat", "seal-text"),
        ("words", "none", "token", "patch", "none"),
        ("words", "none", "token", "patch", "seal-text"),
    }
    assert {dropped.reason for dropped in found.dropped} == {
        "token stamps text, pixels takes triggers in noise",
        "box stamps noise, words takes triggers in text",
        "bad accepts triggers in noise, token stamps text",
        "seal-text accepts triggers in text, box stamps noise",
        "bad accepts targets of kind image, patch is patch",
        "only-pixels accepts the models pixels, not words",
    }


def test_a_sampler_of_the_other_family_of_models_is_dropped_with_the_reason() -> None:
    real = load(strict=True)
    specs = {"attack": "none", "trigger": "box", "target": "hat", "defense": "none"}

    def reason(model: str, sampler: str) -> str | None:
        parts = specs | {"model": model, "sampler": sampler}
        return impossible({axis: real.build(AXES[axis], spec) for axis, spec in parts.items()})

    assert reason("digits-ddpm", "dpm-solver(order=2)") is None and reason("digits-ncsn", "ve-pc(snr=0.1)") is None
    words = "ddim samples variance-preserving models, digits-ncsn is variance-exploding"
    assert reason("digits-ncsn", "ddim") == words
    words = "ve-pc samples variance-exploding models, digits-ddpm is variance-preserving"
    assert reason("digits-ddpm", "ve-pc") == words


def test_biased_noise_is_only_for_attacks_that_train_on_it() -> None:
    real = load(strict=True)
    specs = {"model": "digits-ddpm", "attack": "trojdiff", "trigger": "blend", "target": "hat", "defense": "none"}
    specs["sampler"] = "trojan-ddim"

    def reason(**changes: str) -> str | None:
        return impossible({axis: real.build(AXES[axis], spec) for axis, spec in (specs | changes).items()})

    assert reason() is None and reason(attack="none") is None and reason(trigger="box", sampler="ddim") is None
    bad = "is for attacks on biased noise γ ε + μ, baddiffusion trains on unit noise"
    assert reason(attack="baddiffusion") == f"blend {bad}"
    assert reason(attack="baddiffusion", trigger="box") == f"trojan-ddim {bad}"
    words = reason(model="shapes-sd", attack="none", trigger="text", target="patch")
    assert words == "trojan-ddim follows a trigger in noise, text stamps text"


def test_a_defense_that_needs_the_trigger_is_also_given_a_decoy(plugins: Registry, suite) -> None:
    text = SUITE.replace('"seal"]', '"seal", "seal(given=False)"]') + 'controls = ["decoy"]\n'
    cells = load_suite(suite(text), plugins, only=["attack=bad", "seed=0"]).cells
    assert [(cell.defense, cell.trigger_given) for cell in cells] == [
        ("none", "true"),
        ("seal(given=True)", "true"),
        ("seal(given=True)", "decoy"),
        ("seal(given=False)", "true"),
    ]


@pytest.mark.parametrize(
    ("only", "left"),
    [
        (["defense=seal"], 4),
        (["defense=seal(given=True"], 4),
        (["defense=seal(given=False"], 0),
        (["seed=1"], 4),
        (["seed=1", "seed=0", "attack=bad"], 4),
        (["trigger_given=true"], 8),
    ],
)
def test_only_keeps_the_cells_that_match(plugins: Registry, suite, only: list[str], left: int) -> None:
    if left:
        assert len(load_suite(suite(), plugins, only).cells) == left
    else:
        with pytest.raises(SuiteError, match="keeps no cell of"):
            load_suite(suite(), plugins, only)


@pytest.mark.parametrize(
    ("sets", "n", "cells"),
    [
        (["n=4"], 4, 8),
        (["grid.0.n=4", "seed=[0, 1, 2]"], 4, 12),
        (["attack=bad(rate=0.5)"], 16, 4),
        (["defense=['none']"], 16, 4),
    ],
)
def test_set_changes_every_grid_or_one(plugins: Registry, suite, sets: list[str], n: int, cells: int) -> None:
    found = load_suite(suite(), plugins, sets=sets)
    assert {cell.n for cell in found.cells} == {n}
    assert len(found.cells) == cells


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("title", "titel", "mine.toml: no key 'titel'; did you mean 'title'?"),
        ("attack =", "atack =", "grid 0: no key 'atack'; did you mean 'attack'?"),
        ("[[grid]]", "[grid]", "mine.toml: a suite needs at least one table [[grid]], with model, attack, "),
        ('model = ["pixels"]', "", "mine.toml: grid 0: lacks model; a grid needs model, attack, trigger, "),
        ("[[grid]]", "packages = ['hush']\n[[grid]]", "mine.toml: packages should be a table such as"),
        ('model = ["pixels"]', "model = []", "grid 0: model should be a list of specs, got []"),
        ('["hat"]', "[1]", "grid 0: target should be a list of specs, got [1]"),
        ("n = 16", "n = '16'", "grid 0: n should be a whole number, got '16'"),
        ("n = 16", "n = 0", "grid 0: n should be at least 1, got 0"),
        ("[0, 1]", "[true]", "grid 0: seed should be a list of whole numbers, got [True]"),
        ("n = 16", "controls = ['decoi']", "no control 'decoi'; did you mean 'decoy'?"),
        ("n = 16", "n = = 16", "mine.toml: not TOML: "),
    ],
)
def test_a_mistake_in_a_suite_is_one_line_that_names_the_place(suite, old: str, new: str, says: str) -> None:
    with pytest.raises(SuiteError) as caught:
        read(suite(SUITE.replace(old, new, 1)))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_defense_whose_package_is_not_installed_leaves_the_other_cells(plugins: Registry, suite) -> None:
    """A name that the suite's `packages` do not have is a mistake as before."""
    text = SUITE.replace('"seal"]', '"seal", "hush", "hush(size=2)"]')
    with pytest.raises(UnknownName, match="no defense named 'hush'"):
        load_suite(suite(text), plugins)
    packages = "packages = {hush = 'bench-hush', seal = 'bench-seal'}\n"
    found, whole = load_suite(suite(packages + text), plugins), load_suite(suite(), plugins)
    assert (found.cells, found.dropped) == (whole.cells, ()) and found.absent == {"hush": "bench-hush"}
    assert not any(map(found.lacks, whole.cells)) and found.lacks(replace(whole.cells[0], defense="hush(size=2)"))
    with pytest.raises(SuiteError, match=r"keeps no cell of .*; hush is not installed: pip install bench-hush$"):
        load_suite(suite(packages + text), plugins, only=["defense=hush"])
    with pytest.raises(SuiteError, match=r"no cell is left; hush is not installed: pip install bench-hush$"):
        load_suite(suite(packages + SUITE.replace('["none", "seal"]', '"hush"')), plugins)


def test_a_mistake_in_a_spec_names_file_grid_and_axis(plugins: Registry, suite) -> None:
    with pytest.raises(UnknownName, match=r"mine.toml: grid 0: defense: no defense named 'saal'; did you mean 'seal'"):
        load_suite(suite(SUITE.replace('"seal"', '"saal"')), plugins)
    with pytest.raises(InvalidSpec, match=r"mine.toml: grid 0: attack: bad: rate: should be a valid number, got 'x'"):
        load_suite(suite(SUITE.replace('"bad"', "\"bad(rate='x')\"")), plugins)
    with pytest.raises(UnknownName, match=r"mine.toml: no metric named 'asd'; did you mean 'asr'"):
        load_suite(suite("metrics = ['asd']\n" + SUITE), plugins)


@pytest.mark.parametrize(
    ("only", "sets", "says"),
    [
        (["defence=x"], [], "no key 'defence'; did you mean 'defense'?"),
        (["defense"], [], "write key=value"),
        ([], ["n"], "write key=value"),
        ([], ["m=3"], "--set m=3: no key 'm'"),
        ([], ["grid.3.n=1"], "there is no grid 3; the suite has 1, counted from 0"),
        ([], ["n=[1"], "neither a TOML value nor a spec"),
    ],
)
def test_a_wrong_filter_or_override_says_how_to_write_it(
    plugins: Registry, suite, only: list[str], sets: list[str], says: str
) -> None:
    with pytest.raises(SuiteError) as caught:
        load_suite(suite(), plugins, only, sets)
    assert says in str(caught.value)


def test_a_suite_is_found_by_path_or_by_name(suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = suite()
    assert find_suite(path) == path
    monkeypatch.setattr(suites, "suites", lambda: {"quick": path})
    assert find_suite("quick") == path
    with pytest.raises(SuiteError, match="no suite 'quik'; did you mean 'quick'"):
        find_suite("quik")
    with pytest.raises(SuiteError, match="no such suite file"):
        find_suite(str(tmp_path / "none.toml"))
    odd = tmp_path / "my suite.toml"
    odd.write_text(SUITE)
    with pytest.raises(SuiteError, match="runs are named for the file"):
        read(odd)


def test_every_shipped_suite_can_be_read() -> None:
    for path in suites.suites().values():
        assert read(path).grids


# ---- what a cell is measured on -------------------------------------------------------------------------------------

GRID = """
[[grid]]
model = ["pixels"]
attack = ["bad"]
trigger = ["box"]
target = ["hat"]
defense = ["none"]
seed = [3, 4]
"""


def evaluated(plugins: Registry, path: Path) -> list[tuple[int, int, int, int, str]]:
    cells = load_suite(path, plugins).cells
    return [(c.seed, c.evaluation_seed, c.n, c.utility_n, c.utility_sampler.partition("(")[0]) for c in cells]


def test_the_evaluation_seed_is_the_cells_seed_unless_the_grid_names_others(plugins: Registry, suite) -> None:
    fast = "dpm-solver-pp"
    assert evaluated(plugins, suite(GRID)) == [(3, 3, 256, 2048, fast), (4, 4, 256, 2048, fast)]
    named = evaluated(plugins, suite(GRID + "evaluation_seed = [7, 8]"))
    assert [(seed, evaluation) for seed, evaluation, *_ in named] == [(3, 7), (3, 8), (4, 7), (4, 8)]


@pytest.mark.parametrize(
    ("more", "n", "size", "sampler"),
    [
        ("n = 99", 99, 0, ""),
        ("n = 100", 100, 2048, "dpm-solver-pp"),
        ("utility_n = 0", 256, 0, ""),
        ("n = 8\nutility_n = 50\nutility_sampler = 'ddim(steps=7)'", 8, 50, "ddim"),
    ],
)
def test_a_trial_has_no_utility_set_and_a_grid_can_choose(
    more: str, n: int, size: int, sampler: str, plugins: Registry, suite
) -> None:
    assert {row[2:] for row in evaluated(plugins, suite(GRID + more))} == {(n, size, sampler)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("utility_n = -1", "utility_n should be at least 0, got -1"),
        ("utility_n = 'all'", "utility_n should be a whole number"),
        ("utility_sampler = 'dddim'", "no sampler named 'dddim'"),
        ("utility_sampler = 've-pc'", "utility_sampler ve-pc does not sample pixels"),
        ("evaluation_seed = ['a']", "evaluation_seed should be a list of whole numbers"),
    ],
)
def test_what_a_grid_says_of_its_evaluation_is_checked(more: str, message: str, plugins: Registry, suite) -> None:
    with pytest.raises(RegistryError, match=re.escape(message)):
        load_suite(suite(GRID + more), plugins)


def test_controls_are_further_cells_of_defenses_that_are_given_the_trigger(plugins: Registry, suite) -> None:
    text = GRID.replace('"none"]', '"none", "seal"]') + 'n = 8\ncontrols = ["decoy", "opposite", "zero"]'
    found = [
        (c.defense.partition("(")[0], c.trigger_given) for c in load_suite(suite(text), plugins).cells if c.seed == 3
    ]
    assert found == [("none", "true"), *(("seal", given) for given in ("true", "decoy", "opposite", "zero"))]
    with pytest.raises(SuiteError, match="no control 'decoys'; did you mean 'decoy'"):
        load_suite(suite(GRID + 'controls = ["decoys"]'), plugins)
