"""Presets: what a file may say, where a name stands for its spec, and that nothing was chosen on test seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import bench
from harness.registry import Registry, RegistryError, UnknownName, load, presets, spec_of, write_spec
from harness.registry.specs import parse_spec
from harness.runs.suite import Draft, expand, read
from leaderboard.specs import shortener
from tests.plans import planned
from tests.records import changed, record

TEXT = """
[attacks.ode-digits]
spec = "villandiffusion(solver='ode', steps=7)"
seeds = [100, 101]
chosen = "the first of two whose ASR is above 0.9"
[attacks.ode-digits.why]
solver = "the form for ODE samplers"
steps = "a minute on one core"
"""
WHOLE = "villandiffusion(solver='ode', steps=7)"


def read_text(tmp_path: Path, text: str) -> tuple[presets.Preset, ...]:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return presets.read(path)


def of_attacks(tmp_path: Path, *attacks: str) -> Draft:
    """A suite of digits-ddpm under these attacks."""
    path = tmp_path / "mine.toml"
    path.write_text(
        f'[[grid]]\nmodel = "digits-ddpm"\nattack = {json.dumps(attacks)}\ntrigger = "box"\ntarget = "hat"\n'
        'defense = "none"\nn = 16\n'
    )
    return read(path)


@pytest.fixture(scope="module")
def plugins() -> Registry:
    return load()


@pytest.fixture
def ode_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[presets.Preset]:
    (preset,) = read_text(tmp_path, TEXT)
    monkeypatch.setattr(presets, "shipped", lambda: presets.by_name([preset]))
    yield preset


def test_a_preset_has_its_spec_its_reasons_and_its_seeds(tmp_path: Path) -> None:
    (preset,) = read_text(tmp_path, TEXT)
    assert (preset.kind, preset.name, preset.spec, preset.seeds) == ("attacks", "ode-digits", WHOLE, (100, 101))
    assert set(preset.why) == {"solver", "steps"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[100, 101]", "[100, 11]", "chosen on seed 11, which is one of the benchmark's"),
        ("[100, 101]", "[]", "seeds should be a list of whole numbers"),
        ('solver = "the form for ODE samplers"', "", "a reason for each parameter"),
        ("steps = ", "stepz = ", "a reason for each parameter"),
        ('chosen = "the', 'chosn = "the', "exactly the keys spec, seeds, chosen, why"),
        ("steps=7", "steps=", "cannot read the spec"),
        ('"a minute on one core"', "3", "why a table of texts"),
        ("attacks.", "attack.", "is no kind; write"),
        ("[attacks", "attacks", "not a file of presets"),
    ],
)
def test_a_file_of_presets_that_says_too_little_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(presets.PresetError, match=message) as found:
        read_text(tmp_path, TEXT.replace(old, new, 1))
    assert "\n" not in str(found.value).strip() or "not a file" in message


def test_two_presets_of_one_kind_and_name_are_refused(tmp_path: Path) -> None:
    (preset,) = read_text(tmp_path, TEXT)
    with pytest.raises(presets.PresetError, match="two presets ode-digits"):
        presets.by_name([preset, preset])


@pytest.mark.usefixtures("ode_digits")
def test_the_name_of_a_preset_stands_for_its_spec(plugins: Registry) -> None:
    assert plugins.canonical("attacks", "ode-digits") == plugins.canonical("attacks", WHOLE)
    changed = plugins.build("attacks", "ode-digits(steps=9)")
    assert changed.steps == 9 and changed.solver == "ode"
    with pytest.raises(RegistryError, match="stepz"):
        plugins.build("attacks", "ode-digits(stepz=9)")
    with pytest.raises(UnknownName, match="did you mean 'ode-digits'"):
        plugins.build("attacks", "ode-digit")
    with pytest.raises(UnknownName):
        plugins.build("defenses", "ode-digits")


@pytest.mark.usefixtures("ode_digits")
def test_a_suite_names_a_preset_and_its_cells_hold_the_whole_spec(tmp_path: Path, plugins: Registry) -> None:
    (cell,) = expand(of_attacks(tmp_path, "ode-digits"), plugins).cells
    assert cell.attack == plugins.canonical("attacks", WHOLE)
    plan = planned(plugins, cell)
    assert any("attack ode-digits on digits-ddpm" in job.label for job in plan.jobs.values())
    assert plan.cells[0].short["attack"] == WHOLE, "a record has the spec, which stays true when a preset changes"


@pytest.mark.usefixtures("ode_digits")
def test_a_filter_takes_the_name_of_a_preset(tmp_path: Path, plugins: Registry) -> None:
    draft = of_attacks(tmp_path, "ode-digits", "villandiffusion")
    both = expand(draft, plugins, ["attack=villandiffusion"]).cells
    (cell,) = expand(draft, plugins, ["attack=ode-digits"]).cells
    assert len(both) == 2 and cell.attack == plugins.canonical("attacks", WHOLE)


@pytest.mark.usefixtures("ode_digits")
def test_tables_say_the_name_of_a_preset(plugins: Registry) -> None:
    one = record()
    whole = plugins.canonical("attacks", WHOLE)
    short = {**one.provenance.short, "attack": "villandiffusion(steps=7, solver='ode')"}
    named = changed(one, cell={"attack": whole}, provenance={"short": short})
    assert shortener([named])(named.cell).attack == "ode-digits"


@pytest.mark.usefixtures("ode_digits")
def test_presets_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(bench, ["list", "presets"])
    assert listed.exit_code == 0 and listed.output.split()[:2] == ["attack", "ode-digits"]
    shown = CliRunner().invoke(bench, ["show", "ode-digits"]).output
    assert WHOLE in shown and "steps: a minute on one core" in shown and "seeds 100 101" in shown
    (found,) = json.loads(CliRunner().invoke(bench, ["show", "ode-digits", "--json"]).output)
    assert found["spec"] == WHOLE and found["seeds"] == [100, 101]
    missed = CliRunner().invoke(bench, ["show", "ode-digts"]).exception
    assert isinstance(missed, UnknownName) and "did you mean 'ode-digits'" in str(missed)


def test_the_shipped_presets_are_valid_minimal_and_named_apart_from_plugins(plugins: Registry) -> None:
    for (kind, name), preset in presets.shipped().items():
        assert name not in plugins.classes(kind), name
        plugin, given = parse_spec(preset.spec)
        usual = parse_spec(spec_of(plugins.build(kind, plugin)))[1]
        own = {key: value for key, value in parse_spec(plugins.canonical(kind, name))[1].items() if value != usual[key]}
        assert write_spec(plugin, own).count("=") == preset.spec.count("="), f"{name} spells a default"
        assert own == given, name
