"""Triggers that an attack learns: the trigger `learned`, the file of its pattern, plans, jobs and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from harness import registry
from harness.cli import call
from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.images import to_uint8
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.methods import decoys, learned_triggers
from harness.methods.learned_triggers import FILE, TENSOR, pattern_of, read, save
from harness.registry import spec_of
from harness.registry.contract import faults
from harness.runs import execution
from harness.runs.declared import Declared
from harness.runs.job import ControlSpec, DefendSpec, Job, MeasureSpec, SampleSpec
from harness.runs.store import Store
from harness.runs.suite import expand, impossible, read as read_suite
from harness.stages.inputs import evaluation_inputs
from harness.stages.sample import sample
from harness.testing.checks import case_of, examine, examine_all
from harness.types import Backdoored, Inputs
from plugins.attacks.baddiffusion import BadDiffusion
from plugins.attacks.invibackdoor import InviBackdoor
from plugins.metrics import inversion
from plugins.triggers.box import Box
from plugins.triggers.learned import Learned
from tests.plans import cell, planned
from tests.whole_runs import run, unplaced

SHAPE = (1, 16, 16)
PATTERN = 0.3 * torch.randn(SHAPE, generator=generator(0)).clamp(-1, 1)
LEARNED: dict[str, Any] = {
    "attack": "invibackdoor(steps=1, batch=2, trigger_batch=1, sampling_steps=1, trigger_lr=0.05, bf16=False)",
    "trigger": "learned(epsilon=0.5)",
}


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


# ---- the trigger ----------------------------------------------------------------------------------------------------


def test_before_an_attack_there_is_no_pattern() -> None:
    with pytest.raises(ValueError, match=r"learned has no pattern before an attack has learned it; .* invibackdoor"):
        Learned().delta(SHAPE)


def test_it_adds_the_pattern_that_was_learned_and_keeps_its_own() -> None:
    given = PATTERN.clone()
    trigger = Learned(epsilon=0.5).with_pattern(given)
    given.zero_()
    inputs = Inputs(torch.zeros(2, *SHAPE), None, (0, 1))
    assert torch.equal(trigger.stamp(inputs).noise, PATTERN.expand(2, -1, -1, -1))
    trigger.delta(SHAPE).zero_()
    assert torch.equal(trigger.delta(SHAPE), PATTERN)
    with pytest.raises(ValueError, match=r"the learned pattern is \(1, 16, 16\) and does not fit \(3, 16, 16\)"):
        trigger.delta((3, 16, 16))


def test_the_spec_holds_the_bound_and_not_the_pattern() -> None:
    bare = Learned(epsilon=0.5)
    assert spec_of(bare.with_pattern(PATTERN)) == spec_of(bare) == "learned(epsilon=0.5, other=0)"
    assert bare.with_pattern(PATTERN) == bare and "pattern" not in repr(bare.with_pattern(PATTERN))


@pytest.mark.parametrize("pattern", [2 * PATTERN, PATTERN[0], torch.full(SHAPE, torch.nan)])
def test_a_pattern_outside_the_bound_is_refused(pattern: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"is none of learned\(epsilon=0\.5\)"):
        Learned(epsilon=0.5).with_pattern(pattern)


def test_the_projection_clamps_each_value() -> None:
    values = torch.tensor([-0.7, -0.5, 0.1, 0.5, 2.0]).view(1, 1, 5)
    assert Learned(epsilon=0.5).projected(values).flatten().tolist() == pytest.approx([-0.5, -0.5, 0.1, 0.5, 0.5])


def test_other_triggers_have_the_same_values_in_other_places() -> None:
    trigger = Learned(epsilon=0.5).with_pattern(PATTERN)
    others = [trigger.wrong(k) for k in range(4)]
    assert len({trigger, *others}) == 5
    for k, other in enumerate(others):
        r = other.delta(SHAPE)
        assert torch.equal(r.flatten().sort().values, PATTERN.flatten().sort().values)
        assert torch.cosine_similarity(r.flatten(), PATTERN.flatten(), dim=0).abs() < 0.3
        again = Learned(epsilon=0.5, other=k + 1).with_pattern(PATTERN)  # as a job builds it from its spec
        assert other == again and torch.equal(again.delta(SHAPE), r)


def test_pixels_move_with_all_their_channels() -> None:
    pattern = torch.arange(8.0).view(2, 2, 2) / 10
    r = Learned(epsilon=1.0, other=1).with_pattern(pattern).delta((2, 2, 2))
    assert torch.allclose(r[1] - r[0], torch.full((2, 2), 0.4))


def test_decoys_are_orthogonal_to_the_learned_pattern() -> None:
    trigger = Learned(epsilon=0.5).with_pattern(PATTERN)
    made: list[Any] = [each for _, each in decoys.ladder(trigger, "decoy", 0)]
    for decoy in made:
        r = decoy.delta(SHAPE)
        assert abs(float((r * PATTERN).sum())) < 1e-3 and r.norm() == pytest.approx(PATTERN.norm().item(), rel=1e-4)
    ((_, opposite),) = decoys.ladder(trigger, "opposite", 0)
    assert decoys.cosine(trigger, opposite, SHAPE) == pytest.approx(-1)


def test_the_cosine_of_a_found_pattern_is_that_with_the_learned_one() -> None:
    scores = inversion.noise(PATTERN, Learned(epsilon=0.5).with_pattern(PATTERN))
    assert scores["trigger_cosine"].value == pytest.approx(1) and scores["trigger_l2"].value == pytest.approx(0)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save(PATTERN.requires_grad_(False), tmp_path / "trigger")
    assert torch.equal(read(tmp_path / "trigger", Learned(epsilon=0.5)).delta(SHAPE), PATTERN)
    other = read(tmp_path / "trigger", Learned(epsilon=0.5, other=2))
    assert torch.equal(other.delta(SHAPE), Learned(epsilon=0.5).with_pattern(PATTERN).wrong(1).delta(SHAPE))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({TENSOR: PATTERN.half()}, "is no pattern (C, H, W) in fp32"),
        ({TENSOR: PATTERN[0]}, "is no pattern (C, H, W) in fp32"),
        ({TENSOR: torch.zeros(0, 16, 16)}, "is no pattern (C, H, W) in fp32"),
        ({"delta": PATTERN}, "is no pattern (C, H, W) in fp32"),
        ({TENSOR: PATTERN, "more": -PATTERN}, "is no pattern (C, H, W) in fp32"),
        ({TENSOR: torch.full(SHAPE, torch.inf)}, "holds NaN or infinity"),
        ({TENSOR: 2 * PATTERN}, "is none of learned(epsilon=0.5)"),
    ],
)
def test_a_file_that_holds_no_such_pattern_is_refused(tensors: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, Learned(epsilon=0.5))
    assert says in str(caught.value) and str(caught.value).endswith("run the attack again")


def test_a_pattern_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(PATTERN, tmp_path / "trigger")
    monkeypatch.setattr(learned_triggers, "MOST", PATTERN.numel() - 1)
    monkeypatch.setattr("safetensors.torch.load_file", lambda path: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="is no pattern"):
        read(tmp_path / "trigger", Learned(epsilon=0.5))


def test_a_folder_with_another_file_or_a_link_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not there, so the attack stored no pattern; run the attack again"):
        read(tmp_path / "trigger", Learned())
    save(PATTERN, tmp_path / "trigger")
    (tmp_path / "trigger" / "more").write_text("")
    with pytest.raises(CheckpointError, match=r"should hold pattern\.safetensors alone"):
        read(tmp_path / "trigger", Learned(epsilon=0.5))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FILE).symlink_to(tmp_path / "trigger" / FILE)
    with pytest.raises(CheckpointError, match="is a link"):
        read(tmp_path / "linked", Learned(epsilon=0.5))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no safetensors file, truncated or damaged"):
        read(tmp_path / "damaged", Learned(epsilon=0.5))


# ---- what goes together ---------------------------------------------------------------------------------------------


def parts(plugins: registry.Registry, **changes: str) -> dict[str, Any]:
    specs = {"model": "digits-ddpm", "attack": "invibackdoor", "trigger": "learned", "target": "hat"}
    specs |= {"sampler": "ddim", "defense": "none"} | changes
    kinds = {"model": "models", "attack": "attacks", "trigger": "triggers", "target": "targets"}
    kinds |= {"sampler": "samplers", "defense": "defenses"}
    return {axis: plugins.build(kinds[axis], spec) for axis, spec in specs.items()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"trigger": "box"}, "invibackdoor learns its trigger, and box is fixed; use the trigger learned"),
        (
            {"attack": "baddiffusion"},
            "learned is the pattern that an attack learns, and baddiffusion learns none; use a trigger that is fixed, "
            "or an attack that learns one, such as invibackdoor",
        ),
        (
            {"attack": "none"},
            "learned is the pattern that an attack learns, and none learns none; use a trigger that is fixed, or an "
            "attack that learns one, such as invibackdoor",
        ),
        (
            {"trigger": "learned(other=1)"},
            "learned(other=1) is made of the learned pattern for controls; use other=0",
        ),
        ({"target": "trigger"}, "trigger is made of the trigger, and learned has no pattern before the attack"),
        ({"attack": "baddiffusion", "trigger": "box"}, None),
    ],
)
def test_an_attack_that_learns_and_a_learned_trigger_go_together_alone(
    changes: dict[str, str], says: str | None, plugins: registry.Registry
) -> None:
    assert impossible(parts(plugins, **changes)) == says


def test_a_suite_drops_what_does_not_go_together_with_the_reason(tmp_path: Path, plugins: registry.Registry) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        '[[grid]]\nmodel = ["digits-ddpm"]\nattack = ["invibackdoor", "baddiffusion"]\ntrigger = ["learned", "box"]\n'
        'target = ["hat"]\ndefense = ["none"]\n'
    )
    suite = expand(read_suite(path), plugins)
    kept = [(each.attack.partition("(")[0], each.trigger.partition("(")[0]) for each in suite.cells]
    assert kept == [("invibackdoor", "learned"), ("baddiffusion", "box")]
    assert [each.reason.partition(",")[0] for each in suite.dropped] == [
        "invibackdoor learns its trigger",
        "learned is the pattern that an attack learns",
    ]


def test_half_of_the_capability_is_a_fault() -> None:
    @dataclass(frozen=True)
    class Half(Box):
        name: ClassVar[str] = "half"

        def with_pattern(self, pattern: Any) -> Half:
            return self

    said = faults("triggers", Half)
    assert any("with_pattern needs other beside it (LearnedTrigger)" in each for each in said)
    assert any("write def projected(self, pattern)" in each for each in said)

    @dataclass(frozen=True)
    class Says(BadDiffusion):
        name: ClassVar[str] = "says"
        learns_trigger: ClassVar[str] = "yes"

    (said,) = faults("attacks", Says)
    assert "learns_trigger: should be a valid boolean, got 'yes' (LearningAttack)" in said
    assert faults("attacks", InviBackdoor) == faults("triggers", Learned) == []


# ---- the kit --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trigger_keeps_every_law(plugins: registry.Registry) -> None:
    found = examine_all(case_of("triggers", Learned, {}, plugins))
    assert {each.state for each in found} <= {"kept", "n/a"}, [each.says for each in found]


@dataclass(frozen=True)
class Forgets(InviBackdoor):
    """Learns a trigger and does not return it."""

    name: ClassVar[str] = "forgets"

    def implant(self, model: Any, backdoor: Any, data: Any, rng: Any) -> Backdoored:
        done = super().implant(model, backdoor, data, rng)
        return Backdoored(done.model, backdoor)


def test_an_attack_that_forgets_its_pattern_is_told_so(plugins: registry.Registry) -> None:
    finding = examine(case_of("attacks", Forgets, {"steps": 1, "sampling_steps": 1}, plugins), "returns what it should")
    assert finding.state == "broken"
    assert "attack 'forgets' learns its trigger and did not return the pattern" in finding.says
    assert "return Backdoored(model, replace(backdoor, trigger=backdoor.trigger.with_pattern(r)))" in finding.says


def test_of_an_attack_that_learns_nothing_there_is_no_pattern() -> None:
    assert pattern_of(BadDiffusion(), Box(), SHAPE) is None
    with pytest.raises(ValueError, match="attack 'invibackdoor' learns its trigger and did not return the pattern"):
        pattern_of(InviBackdoor(), Learned(), SHAPE)


# ---- plans ----------------------------------------------------------------------------------------------------------


def jobs(plugins: registry.Registry, **changes: Any) -> dict[str, Job]:
    given = changes.pop("trigger_given", "true")
    made = replace(cell(plugins, **{**LEARNED, **changes}), trigger_given=given)
    return planned(plugins, made, metrics=("asr", "inversion")).jobs


def test_every_job_that_stamps_or_tells_or_compares_the_trigger_reads_it_from_the_attack(
    plugins: registry.Registry,
) -> None:
    made = jobs(plugins, defense="elijah(invert=False, steps=2)", trigger_given="decoy")
    (attack,) = (key for key, job in made.items() if job.kind == "attack")
    for job in made.values():
        spec = job.spec
        reads = isinstance(spec, ControlSpec | DefendSpec | MeasureSpec)
        reads = reads or (isinstance(spec, SampleSpec) and spec.stamps != (None,))
        assert (getattr(spec, "learned_by", None) == attack) == reads, job.label
        assert job.ingredients.get("learned by") == (attack if reads else None), job.label
        assert attack in job.needs or not reads
    stamped = [job for job in made.values() if job.label.startswith("sample triggered inputs, clean")]
    assert [job.spec.attacked for job in stamped if isinstance(job.spec, SampleSpec)] == [None]


def test_a_blind_defense_reads_no_pattern(plugins: registry.Registry) -> None:
    (defend,) = (job for job in jobs(plugins, defense="elijah(steps=2)").values() if job.kind == "defend")
    assert isinstance(defend.spec, DefendSpec) and defend.spec.learned_by is None
    (screen,) = (job for job in jobs(plugins, defense="ufid").values() if job.kind == "defend")
    assert isinstance(screen.spec, DefendSpec) and screen.spec.learned_by is not None


def test_the_clean_models_triggered_images_follow_the_seed_of_the_attack(plugins: registry.Registry) -> None:
    def clean(**changes: Any) -> set[str]:
        made = jobs(plugins, evaluation_seed=7, **changes)
        return {key for key, job in made.items() if job.label.startswith("sample triggered inputs, clean")}

    assert len(clean(seed=0)) == 1 and not clean(seed=0) & clean(seed=1)
    fixed: dict[str, Any] = {"attack": cell(plugins).attack, "trigger": "box"}
    assert clean(seed=0, **fixed) == clean(seed=1, **fixed)


def test_no_job_without_a_learned_trigger_says_who_learned_it(plugins: registry.Registry) -> None:
    for job in planned(plugins, cell(plugins), cell(plugins, trigger="uap")).jobs.values():
        assert "learned by" not in job.ingredients and "harness.methods.learned_triggers" not in job.ingredients["code"]


def test_a_record_is_held_against_the_same_jobs(plugins: registry.Registry) -> None:
    """`bench leaderboard check` plans the cell without weights and code."""
    made = cell(plugins, **LEARNED)
    outline = Declared(plugins).jobs(made, ("asr",))
    whole = planned(plugins, made).jobs
    assert [job.label for job in outline.values()] == [job.label for job in whole.values()]
    assert [set(job.ingredients) for job in outline.values()] == [set(job.ingredients) for job in whole.values()]


# ---- jobs -----------------------------------------------------------------------------------------------------------


def test_a_job_stamps_the_pattern_that_the_attack_left_in_the_store(tmp_path: Path, plugins: registry.Registry) -> None:
    """The clean model's triggered images are those of its noise with δ."""
    store, made = Store(tmp_path), jobs(plugins, n=2, sampler="ddim(steps=1)")
    wanted = ("attack", "sample triggered inputs, clean")
    attack, triggered = (job for job in made.values() if job.label.startswith(wanted))
    for job in (attack, triggered):
        store.publish(job.key, lambda out, job=job: execution.execute(job.spec, store, out), {})
    trigger = read(store.open_artifact(attack.key) / execution.TRIGGER, Learned(epsilon=0.5))
    assert 0 < trigger.delta(SHAPE).abs().max() <= 0.5
    plugin: Any = plugins.build("models", "digits-ddpm")
    model = plugin.load()
    inputs = evaluation_inputs(plugin, model, 2, 0)
    expected = sample(model, inputs, DDIM(steps=1), [trigger])
    found = execution.stored_images(store, triggered.key)()
    assert torch.equal(to_uint8(found), to_uint8(expected))
    assert not torch.equal(to_uint8(found), to_uint8(sample(model, inputs, DDIM(steps=1), [None])))


def test_a_damaged_pattern_is_named_and_not_stamped(tmp_path: Path, plugins: registry.Registry) -> None:
    store, key = Store(tmp_path), "0" * 16

    def fill(out: Path) -> dict[str, Any]:
        save(2 * PATTERN, out / execution.TRIGGER)
        return {}

    store.publish(key, fill, {})
    with pytest.raises(CheckpointError, match=r"is none of learned\(epsilon=0\.5\); run the attack again"):
        execution.trigger_of("learned(epsilon=0.5)", key, plugins, store)
    assert torch.equal(execution.trigger_of("learned(epsilon=1.0)", key, plugins, store).delta(SHAPE), 2 * PATTERN)
    assert execution.trigger_of("box", key, plugins, store) == Box()


def test_the_code_of_the_trigger_is_in_the_key_of_whoever_reads_it(plugins: registry.Registry) -> None:
    reading = [job for job in jobs(plugins).values() if "learned by" in job.ingredients]
    assert reading and all("plugins.triggers.learned" in job.ingredients["code"] for job in reading)


SUITE = """
title = "tiny"
metrics = ["asr", "drift"]
[[grid]]
model = ["digits-ddpm"]
attack = ["invibackdoor(steps=2, batch=4, trigger_batch=2, sampling_steps=2, trigger_lr=0.05, bf16=False)"]
trigger = ["learned(epsilon=0.5)"]
target = ["hat"]
defense = ["none", "elijah(invert=False, steps=2, batch=4)"]
sampler = ["ddim(steps=2)"]
controls = ["decoy", "opposite"]
n = 4
"""


@pytest.mark.slow
def test_a_whole_run_gives_the_learned_trigger_and_controls_of_it_to_the_defender(tmp_path: Path) -> None:
    path, store = tmp_path / "tiny.toml", tmp_path / "store"
    path.write_text(SUITE)
    records = run(store, str(path), "--cpus", "1")["records"]
    assert len(records) == 4 and not any(record["error"] for record in records)
    tried = {r["cell"]["trigger_given"]: (r["provenance"]["control"] or {"tried": []})["tried"] for r in records}
    assert tried["decoy"][0]["cosine"] == pytest.approx(0, abs=1e-4)
    assert tried["opposite"][0]["cosine"] == pytest.approx(-1, abs=1e-4)
    learned = list(store.rglob(FILE))
    assert len(learned) == 1
    again = run(store, str(path), "--cpus", "1")
    assert unplaced(again) == unplaced({"records": records})
    analysed = ["analyse", records[0]["key"], "-o", str(tmp_path / "drawn"), "--store", str(store), "-n", "2"]
    assert call(analysed) == 0 and (tmp_path / "drawn" / "index.html").is_file()
