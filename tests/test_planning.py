"""Which jobs a cell needs, which of them cells share, and what their keys depend on."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import registry
from harness.registry import presets
from harness.registry.code_digest import closure
from harness.runs import execution, planning
from harness.runs.job import DefendSpec, SampleSpec, condensed
from harness.runs.jsonable import key_of
from harness.runs.planning import STAGES
from harness.runs.suite import standard
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.triggers.box import Box
from tests.plans import cell, planned
from tests.whole_runs import ATTACK


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


def keys(plugins: registry.Registry, kind: str, **changes: Any) -> set[str]:
    plan = planned(plugins, cell(plugins, **changes))
    return {key for key, job in plan.jobs.items() if job.kind == kind}


@pytest.mark.parametrize(
    "change",
    [
        {"attack": ATTACK.replace("steps=2", "steps=3")},
        {"attack": ATTACK.replace("villandiffusion(solver='ode', ", "baddiffusion(")},
        {"trigger": "box(size=4)"},
        {"target": "corner"},
        {"seed": 1},
    ],
    ids=["parameter", "plugin", "trigger", "target", "seed"],
)
def test_each_ingredient_of_an_attack_is_in_its_key(change: dict[str, Any], plugins: registry.Registry) -> None:
    assert keys(plugins, "attack") != keys(plugins, "attack", **change)


@pytest.mark.parametrize(
    "change", [{"defense": "elijah"}, {"sampler": "ddim(steps=4)"}, {"n": 12}], ids=["defense", "sampler", "n"]
)
def test_what_does_not_touch_an_attack_is_not_in_its_key(change: dict[str, Any], plugins: registry.Registry) -> None:
    assert keys(plugins, "attack") == keys(plugins, "attack", **change)
    assert keys(plugins, "measure") != keys(plugins, "measure", **change)


def test_the_evaluation_seed_is_in_the_keys_of_samples_and_not_in_those_of_methods(plugins: registry.Registry) -> None:
    for kind, same in (("attack", True), ("defend", True), ("sample", False), ("measure", False)):
        found = keys(plugins, kind, evaluation_seed=7)
        assert (found == keys(plugins, kind)) if same else not found & keys(plugins, kind), kind


def test_what_screens_inputs_depends_on_the_evaluation_seed(plugins: registry.Registry) -> None:
    assert keys(plugins, "defend", defense="ufid") != keys(plugins, "defend", defense="ufid", evaluation_seed=7)


def test_a_utility_set_is_sampled_once_for_each_model_by_its_own_sampler(plugins: registry.Registry) -> None:
    fast = plugins.canonical("samplers", "dpm-solver-pp(steps=3)")
    plan = planned(plugins, cell(plugins, utility_n=40, utility_sampler=fast), cell(plugins))
    large = [
        job.spec for job in plan.jobs.values() if isinstance(job.spec, SampleSpec) and job.spec.stream == "utility"
    ]
    assert len(large) == 3 and {(spec.sampler, spec.n, spec.stamps) for spec in large} == {(fast, 40, (None,))}
    sets = [plan.measured(each.key).samples for each in plan.cells]
    assert {"clean/utility", "backdoored/utility", "defended/utility"} <= set(sets[0])
    assert not any(name.endswith("utility") for name in sets[1]) and sets[1].items() <= sets[0].items()


def test_version_code_weights_and_threads_are_in_the_key(
    plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.attacks.villandiffusion import VillanDiffusion
    from plugins.models.digits_ddpm import DigitsDDPM

    before = keys(plugins, "attack")
    with monkeypatch.context() as patch:
        patch.setattr(VillanDiffusion, "version", 2)
        assert keys(plugins, "attack") != before
    with monkeypatch.context() as patch:
        patch.setattr(planning, "closure", lambda classes, modules=(): {"edited": "0"})
        assert keys(plugins, "attack") != before
    with monkeypatch.context() as patch:
        patch.setattr(DigitsDDPM, "digest", lambda self: "other weights")
        assert keys(plugins, "attack") != before
    other = planned(plugins, cell(plugins), threads=2)
    assert {k for k, j in other.jobs.items() if j.kind == "attack"} != before
    assert keys(plugins, "attack") == before


def test_a_job_names_the_code_weights_and_parameters_that_its_key_was_made_from(plugins: registry.Registry) -> None:
    jobs = planned(plugins, cell(plugins)).jobs.values()
    for job in jobs:
        assert key_of(condensed(job.ingredients)) == job.key and job.ingredients["inputs"] == sorted(job.needs)
        assert f"harness.stages.{job.kind}" in job.ingredients["code"]
    (attack,) = (job for job in jobs if job.kind == "attack")
    wanted = {"plugins.attacks.villandiffusion", "plugins.triggers.box", "plugins.targets.fixed_image"}
    wanted |= {"harness.methods.noise_attacks", "harness.diffusion.training"}
    assert wanted <= set(attack.ingredients["code"])
    assert "plugins.defenses.finetune" not in attack.ingredients["code"]
    assert attack.ingredients["attack"]["spec"].startswith("villandiffusion(") and attack.ingredients["seed"] == 0
    assert len(attack.ingredients["model"]["weights"]) == 64


def test_what_a_trigger_is_computed_from_is_in_the_keys_of_whoever_stamps_it(
    plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.triggers.uap import UAP

    jobs = planned(plugins, cell(plugins, trigger="uap")).jobs.values()
    (attack,) = (job for job in jobs if job.kind == "attack")
    assert attack.ingredients["trigger"]["weights"] == UAP().digest()
    before = {kind: keys(plugins, kind, trigger="uap") for kind in ("attack", "sample", "measure")}
    monkeypatch.setattr(UAP, "digest", lambda self: "another network")
    assert not any(before[kind] & keys(plugins, kind, trigger="uap") for kind in ("attack", "measure"))
    assert before["sample"] != keys(plugins, "sample", trigger="uap")
    assert "weights" not in next(iter(planned(plugins, cell(plugins)).jobs.values())).ingredients["trigger"]


def test_a_library_that_a_plugin_names_is_in_its_key_by_its_minor_version(
    plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.defenses.finetune import Finetune

    before, installed = keys(plugins, "defend"), {"torch": "2.10.0"}
    monkeypatch.setattr(Finetune, "keyed_libraries", ("torch",), raising=False)
    monkeypatch.setattr(planning.importlib.metadata, "version", installed.__getitem__)
    named = keys(plugins, "defend")
    assert named != before
    installed["torch"] = "2.10.3"
    assert keys(plugins, "defend") == named
    installed["torch"] = "2.11.0"
    assert keys(plugins, "defend") != named


def test_one_backdoored_model_serves_every_defense_sampler_and_metric(plugins: registry.Registry) -> None:
    cells = [
        cell(plugins, defense=d, sampler=s) for d in ("none", "finetune") for s in ("ddim(steps=3)", "ddpm(steps=3)")
    ]
    kinds = [job.kind for job in planned(plugins, *cells).jobs.values()]
    assert kinds.count("attack") == 1 and kinds.count("defend") == 1
    assert kinds.count("sample") == 2 * (2 + 3 + 2) and kinds.count("measure") == 4


def test_only_inputs_with_a_trigger_meet_the_attackers_sampler(plugins: registry.Registry) -> None:
    usual: dict[str, Any] = {"attack": "trojdiff(steps=2, batch=4)", "trigger": "blend", "defense": "none"}
    cells = [cell(plugins, sampler=s, **usual) for s in ("ddim(steps=3)", "trojan-ddim(steps=3)")]
    plan = planned(plugins, *cells)
    samplers = {
        given: {
            job.spec.sampler.partition("(")[0]
            for job in plan.jobs.values()
            if isinstance(job.spec, SampleSpec) and job.label.startswith(f"sample {given}")
        }
        for given in ("clean", "triggered", "wrong")
    }
    both = {"ddim", "trojan-ddim"}
    assert samplers == {"clean": {"ddim"}, "triggered": both, "wrong": both}
    kinds = [job.kind for job in plan.jobs.values()]
    assert kinds.count("attack") == 1 and kinds.count("sample") == 4 + 4


def test_a_metric_that_reads_the_found_trigger_has_it_sampled_for_defenses_that_look_for_one(
    plugins: registry.Registry,
) -> None:
    def found(**changes: Any) -> list[SampleSpec]:
        plan = planned(plugins, cell(plugins, **changes), metrics=("asr", "found-trigger"))
        specs = [job.spec for job in plan.jobs.values()]
        return [spec for spec in specs if isinstance(spec, SampleSpec) and spec.found_by]

    (spec,) = found(defense="elijah(steps=1)")
    assert spec.attacked and spec.defended is None
    assert found(defense="none") == [] == found(defense="elijah(invert=False)")
    own = {"attack": "trojdiff(steps=2, batch=4)", "trigger": "blend", "sampler": "trojan-ddim(steps=3)"}
    assert found(defense="terd", **own)[0].sampler.startswith("ddim(")
    assert "found-trigger" not in standard(plugins)


def test_only_a_trigger_that_prompts_may_carry_is_in_the_keys_of_clean_inputs_and_of_blind_defenses(
    plugins: registry.Registry,
) -> None:
    def avoided(trigger: str) -> list[str | None]:
        parts = {"model": "shapes-sd", "attack": "none", "target": "prompt", "trigger": trigger}
        plan = planned(plugins, cell(plugins, **parts))
        specs = [job.spec for job in plan.jobs.values() if isinstance(job.spec, SampleSpec | DefendSpec)]
        found = [job.ingredients.get("avoided", {}).get("spec") for job in plan.jobs.values() if job.kind != "measure"]
        assert [spec.avoided for spec in specs] == found and len(found) > 4
        return found

    assert set(avoided("text")) == {None}
    for spec in ("syntax(form='plain')", "syntax(form='cleft')"):
        assert set(avoided(spec)) == {plugins.canonical("triggers", spec)}


def test_a_defense_that_needs_no_trigger_is_the_same_job_when_it_is_given_a_decoy(plugins: registry.Registry) -> None:
    def defends(**changes: Any) -> set[str]:
        plan = planned(plugins, replace(cell(plugins, **changes), trigger_given="decoy"))
        return {key for key, job in plan.jobs.items() if job.kind == "defend"}

    assert defends() == keys(plugins, "defend")
    given = "elijah(invert=False)"
    assert defends(defense=given) != keys(plugins, "defend", defense=given)


def test_samples_of_a_defense_that_only_samples_share_the_model_it_was_given(plugins: registry.Registry) -> None:
    def shares(**changes: Any) -> dict[str, str | None]:
        jobs = planned(plugins, cell(plugins, **changes)).jobs.values()
        return {job.label: job.reuse_key for job in jobs if job.kind == "sample"}

    assert len(set(shares(defense="clip").values())) == 2
    assert len(set(shares(defense="finetune").values())) == 3
    assert not set(shares(seed=0, defense="finetune").values()) >= set(shares(seed=1, defense="finetune").values())


def test_more_seeds_of_the_same_cells_read_no_spec_again(
    plugins: registry.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading of a spec takes as long as the rest of a cell's planning."""
    presets._read_once.cache_clear()
    read, monkey = list[str](), presets.parse_spec

    def counted(spec: str) -> tuple[str, dict[str, Any]]:
        read.append(spec)
        return monkey(spec)

    for module in (presets, planning):
        monkeypatch.setattr(module, "parse_spec", counted)
    planned(plugins, cell(plugins, defense="elijah"))
    assert read, "the first cell is read"
    read.clear()
    planned(plugins, *(cell(plugins, defense="elijah", seed=seed) for seed in range(20)))
    assert len(read) <= 2 * 6, "each part of a cell once for each plan, whatever the number of cells"


def imported_by(function: str) -> set[str]:
    """The modules that decide numbers and that a function of harness.runs.execution imports, or a function of that
    module which it names."""
    tree = ast.parse(Path(execution.__file__).read_text())
    bodies = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    found: set[str] = set()
    open_, seen = [function], set()
    while open_:
        name = open_.pop()
        seen.add(name)
        for node in ast.walk(bodies[name]):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{each.name}" for each in node.names]
                found |= {module if find_spec_of(module) else node.module for module in whole}
            elif isinstance(node, ast.Name) and node.id in bodies and node.id not in seen:
                open_.append(node.id)
    deciding = ("harness.stages", "harness.methods", "harness.diffusion", "harness.judges")
    return {module for module in found if module.startswith(deciding)}


def find_spec_of(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent is no package
        return False


@pytest.mark.parametrize("kind", sorted(STAGES))
def test_what_a_job_imports_is_in_its_key(kind: str) -> None:
    """The inputs of a sample job are drawn by harness.stages.inputs: other noise has to be another key."""
    learned = {"harness.methods.learned_triggers"}  # in the key of the attack that learns, which the others hold
    missing = imported_by(f"_{kind}") - set(closure([DigitsDDPM, Box], STAGES[kind])) - learned
    assert missing == set()
