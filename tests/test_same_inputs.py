"""A defense that leaves the prompts of a set unchanged gets the images of the unprotected model without sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import registry
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, OnChangedPrompts
from harness.runs import execution, same_inputs
from harness.runs.job import SampleSpec
from harness.runs.store import Store
from harness.types import WRONG, Inputs
from tests.plans import cell, planned

SMALL = {"model": "shapes-sd", "attack": "none", "target": "prompt", "trigger": "text", "sampler": "ddim(steps=1)"}


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


def test_only_sets_whose_prompts_a_defense_changes_are_sampled_for_it(
    plugins: registry.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triggered prompts without the trigger are the clean ones. Without finished sets the images are the same."""
    sampled: list[int] = []
    ordinary = DiffusionModel.sample

    def counting(model: DiffusionModel, inputs: Inputs, *args: Any, **options: Any) -> Any:
        sampled.append(len(inputs))
        return ordinary(model, inputs, *args, **options)

    monkeypatch.setattr(DiffusionModel, "sample", counting)
    small = replace(cell(plugins, **SMALL), defense="drop-trigger", n=3, utility_n=3, utility_sampler="ddim(steps=1)")
    plan = planned(plugins, small)
    store, alone = Store(tmp_path / "store"), Store(tmp_path / "alone")
    made: dict[str, int] = {}
    for key, job in plan.jobs.items():
        if job.kind == "measure":
            continue
        before = len(sampled)
        without = replace(job.spec, beside=()) if isinstance(job.spec, SampleSpec) else job.spec
        for at, spec in ((store, job.spec), (alone, without)):
            at.publish(key, lambda out, spec=spec, at=at: execution.execute(spec, at, out), {})
            if at is store:
                made[job.label] = len(sampled) - before
        assert store.manifest(key)["files"] == alone.manifest(key)["files"]
        assert store.manifest(key)["facts"] == alone.manifest(key)["facts"]
    assert {label: n for label, n in made.items() if label.startswith("sample")} == {
        "sample clean inputs, clean shapes-sd": 1,
        "sample triggered inputs, clean shapes-sd": 1,
        "sample wrong inputs, clean shapes-sd": WRONG,
        "sample utility inputs, clean shapes-sd": 1,
        "sample clean inputs, drop-trigger on clean shapes-sd": 0,
        "sample triggered inputs, drop-trigger on clean shapes-sd": 0,
        "sample utility inputs, drop-trigger on clean shapes-sd": 0,
    }


def test_the_sets_beside_are_no_ingredients_and_belong_to_defenses_of_the_sampler_alone(
    plugins: registry.Registry,
) -> None:
    def beside(defense: str, **changes: Any) -> dict[str, tuple[Any, ...]]:
        jobs = planned(plugins, replace(cell(plugins, **changes), defense=defense)).jobs.values()
        found = {
            job.label.split()[1]: job.spec.beside
            for job in jobs
            if isinstance(job.spec, SampleSpec) and job.spec.defended
        }
        assert not any("beside" in job.ingredients for job in jobs)
        return found

    dropped = beside("drop-trigger", **SMALL)
    assert [stamps for _, stamps in dropped["clean"]] == [(None,)]
    assert [stamps[0] is None for _, stamps in dropped["triggered"]] == [False, True]
    assert set(beside("finetune", **SMALL).values()) == {()}


def told(change: Any, **other: Any) -> str | None:
    inputs = Inputs(torch.zeros(2, 1, 2, 2), ("a", "b"), (0, 1))
    sampler = DDIM(steps=1)
    given = {"sampler": sampler, "guarded": OnChangedPrompts(sampler, change, "test"), "has": lambda key: True} | other
    return same_inputs.found(
        [("missing", (None,)), ("same", (None,))], model=None, inputs=inputs, stamps=(None,),
        trigger=lambda stamp: None, **given,
    )  # fmt: skip


def test_a_set_is_the_same_only_if_it_is_finished_and_no_input_and_no_sampler_differs() -> None:
    unchanged: Any = lambda model, inputs: list(inputs.prompts)  # noqa: E731
    assert told(unchanged) == "missing" and told(unchanged, has=lambda key: key == "same") == "same"
    assert told(unchanged, has=lambda key: False) is None
    assert told(lambda model, inputs: ["a", "c"]) is None
    assert told(unchanged, sampler=DDIM(steps=1)) is None  # another object: wrapped once more, or not at all
    assert told(unchanged, guarded=DDIM(steps=1)) is None
