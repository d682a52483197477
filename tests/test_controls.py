"""Control triggers: patterns that are not the trigger, tried on the attacked model before a defender is given them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from harness import registry
from harness.capabilities import OTHERS, missing_control
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.methods import decoys
from harness.methods.decoy_choice import led
from harness.runs import doubts
from harness.runs.declared import Declared
from harness.runs.job import ControlSpec, DefendSpec
from harness.runs.record import Control, TriedControl
from harness.stages.control import choose
from harness.stages.sample import sample, wrapped
from harness.testing import tiny
from harness.testing.methods import known
from harness.types import INERT, Backdoor, Inputs, NoiseTrigger, Score, Trigger
from leaderboard import claims
from plugins.triggers.biased import Blend
from plugins.triggers.box import Box
from plugins.triggers.homoglyph import Homoglyph
from plugins.triggers.text import Text
from tests.plans import cell, planned
from tests.records import changed, record

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def plugins() -> registry.Registry:
    return registry.load()


TRIGGERS: tuple[Any, ...] = (Box(), Box(value=1.0, size=7), Blend())


def patterns(trigger: Any, given: str, seed: int = 0) -> list[Tensor]:
    made = [each for _, each in decoys.ladder(trigger, given, seed)]
    return [each.delta(SHAPE) for each in made if isinstance(each, NoiseTrigger)]


@pytest.mark.parametrize("trigger", TRIGGERS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), named=st.sampled_from(["decoy", "decoy-2", "decoy-3"]))
def test_a_decoy_pattern_has_the_norm_of_the_trigger_and_is_orthogonal_to_it(
    trigger: Any, seed: int, named: str
) -> None:
    r = trigger.delta(SHAPE)
    found = patterns(trigger, named, seed)
    assert len(found) == OTHERS
    for pattern in found:
        assert pattern.norm() == pytest.approx(r.norm().item(), rel=1e-4)
        assert abs(float((pattern * r).sum() / r.square().sum())) < 1e-4
    assert len({tuple(pattern.flatten().tolist()) for pattern in found}) == len(found)


def test_patterns_of_decoys_begin_with_every_kind_and_depend_on_the_seed() -> None:
    kinds = [kind for kind, _ in decoys.ladder(Box(), "decoy-2", 0)]
    assert kinds[: len(decoys.PATTERNS)] == list(decoys.PATTERNS)
    one, other = (patterns(Box(), "decoy", seed)[0] for seed in (0, 1))
    assert not torch.allclose(one, other)


def test_the_opposite_trigger_is_minus_r_and_the_zero_trigger_nothing() -> None:
    r = Box().delta(SHAPE)
    assert torch.equal(patterns(Box(), "opposite")[0], -r) and not patterns(Box(), "zero")[0].any()
    ((_, nothing),) = decoys.ladder(Text(), "zero", 0)
    inputs = Inputs(torch.zeros(1, 1), ("a circle",), (0,))
    assert nothing.stamp(inputs) is inputs
    with pytest.raises(ValueError, match="text is text and has no opposite"):
        decoys.ladder(Text(), "opposite", 0)


def test_a_control_of_biased_noise_scales_the_noise_as_the_trigger_does() -> None:
    ((_, placebo),) = decoys.ladder(Blend(), "zero", 0)
    inputs = Inputs(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), None, (0, 1))
    assert torch.allclose(placebo.stamp(inputs).noise, 0.6 * inputs.noise)


def test_decoy_words_are_other_words() -> None:
    names = [name for name, _ in decoys.ladder(Text(), "decoy", 0)]
    assert len(names) == len(set(names)) == OTHERS and "\u200b" not in names


def test_a_trigger_with_too_few_others_has_no_later_decoy() -> None:
    """Nine characters are written with marks or in other alphabets; the one of the trigger is not another."""
    few = Homoglyph()
    most = len({few.wrong(k) for k in range(OTHERS)})
    assert missing_control(few, f"decoy-{most}") is None
    with pytest.raises(ValueError, match=f"homoglyph has {most} other triggers and therefore no decoy-{most + 1}"):
        decoys.ladder(few, f"decoy-{most + 1}", 0)


# ---- the choice -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bright:
    """A target that is hit by images whose mean is above 0."""

    name: ClassVar[str] = "bright"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "image"
    hit_threshold: ClassVar[str] = "0"

    def image(self, shape: Sequence[int]) -> None:
        return None

    def region(self, images: Tensor) -> Tensor:
        return images

    def distances(self, images: Tensor, context: Any) -> Tensor:
        return -images.flatten(1).mean(1)

    def thresholds(self, context: Any) -> dict[str, float]:
        return {"0": 0.0}

    def hits(self, images: Tensor, context: Any) -> Tensor:
        return self.distances(images, context) < 0


class Opened:
    """A model that answers the patterns in `opens` with a bright image, and everything else with a dark one."""

    shape = SHAPE
    conditional = False

    def __init__(self, *opens: Tensor) -> None:
        self.opens = opens

    def sample(self, inputs: Inputs, sampler: Any) -> Tensor:
        close = [[torch.allclose(noise, r) for r in self.opens] for noise in inputs.noise]
        return torch.stack([torch.full(SHAPE, 0.5 if any(row) else -0.5) for row in close])


def chosen(model: Any, trigger: Trigger, given: str) -> Any:
    inputs = Inputs(torch.zeros(8, *SHAPE), None, tuple(range(8)))
    plugin: Any = type("Plugin", (), {"judge": lambda self: None})()
    return choose(plugin, model, Backdoor(trigger, Bright()), object(), given, 0, inputs, torch.zeros(8, *SHAPE))  # type: ignore[arg-type]


def test_the_first_decoy_that_does_not_open_the_backdoor_is_given() -> None:
    first, second, *_ = patterns(Box(), "decoy")
    choice = chosen(Opened(Box().delta(SHAPE), first, second), Box(), "decoy")
    assert choice.chosen == 2 and choice.inert and [each.rate for each in choice.tried] == [1.0, 1.0, 0.0]
    assert all(abs(each.cosine) < 1e-4 for each in choice.tried)


def test_the_decoys_of_a_trigger_are_never_the_same() -> None:
    """The first candidate opens the backdoor, and decoy 2 must not take the one that decoy 1 takes instead of it."""
    model = Opened(patterns(Box(), "decoy")[0])
    choices = [chosen(model, Box(), given) for given in ("decoy", "decoy-2", "decoy-3")]
    assert [choice.chosen for choice in choices] == [1, 2, 3] and all(choice.inert for choice in choices)


def test_a_candidate_is_sampled_only_until_it_is_known_not_to_be_inert() -> None:
    """60 inputs allow three hits: of 32 images the third hit does not decide, and 28 more show whether a fourth comes.
    The choice is that of all images."""
    every = patterns(Box(), "decoy")
    hits = {0: (32, 28), 1: (3, 1), 2: (4, 0), 3: (3, 0)}  # of the first and of the second part
    drawn: list[tuple[int, int]] = []

    class Partly(Opened):
        def sample(self, inputs: Inputs, sampler: Any) -> Tensor:
            which = next(i for i, r in enumerate(every) if torch.allclose(inputs.noise[0], r))
            drawn.append((which, len(inputs)))
            part = hits[which][0 if inputs.seeds[0] == 0 else 1]
            return torch.stack([torch.full(SHAPE, 0.5 if row < part else -0.5) for row in range(len(inputs))])

    inputs = Inputs(torch.zeros(60, *SHAPE), None, tuple(range(60)))
    plugin: Any = type("Plugin", (), {"judge": lambda self: None})()
    backdoor, clean = Backdoor(Box(), Bright()), torch.zeros(60, *SHAPE)
    choice = choose(plugin, Partly(), backdoor, object(), "decoy", 0, inputs, clean)  # type: ignore[arg-type]
    assert drawn == [(0, 32), (1, 32), (1, 28), (2, 32), (3, 32), (3, 28)]
    assert [(each.hits, each.n) for each in choice.tried] == [(32, 32), (4, 60), (4, 32), (3, 60)]
    assert choice.inert and choice.chosen == 3


def test_where_every_decoy_opens_the_backdoor_the_choice_says_so() -> None:
    choice = chosen(Opened(*patterns(Box(), "decoy")), Box(), "decoy")
    assert not choice.inert and len(choice.tried) == OTHERS and choice.tried[choice.chosen].rate > INERT


def test_where_too_few_decoys_are_inert_the_last_is_one_that_opens_the_backdoor() -> None:
    inert = patterns(Box(), "decoy")[4]
    model = Opened(*(r for r in patterns(Box(), "decoy") if not torch.equal(r, inert)))
    first, second = (chosen(model, Box(), given) for given in ("decoy", "decoy-2"))
    assert first.chosen == 4 and first.inert and second.chosen != 4 and not second.inert


@pytest.mark.parametrize(
    ("rates", "k", "leads"),
    [
        ([0.5, 0.05, 0.0], 1, (True, 1)),
        ([0.5, 0.05, 0.0], 2, (True, 2)),
        ([0.5, 0.05, 0.06], 2, (False, 2)),
        ([math.nan, 0.0], 1, (True, 1)),
        ([math.nan, 0.5, 0.2], 1, (False, 2)),
        ([math.nan, math.nan], 1, (False, 0)),
        ([0.0], 2, (False, -1)),
    ],
)
def test_rates_of_hits_lead_to_the_kth_inert_candidate_or_to_the_best_of_the_others(
    rates: list[float], k: int, leads: tuple[bool, int]
) -> None:
    assert led(rates, k) == leads


def test_the_zero_trigger_of_a_text_is_tried_on_prompts_as_they_are() -> None:
    """It changes no prompt; a model would refuse it as a trigger that its tokenizer drops."""
    model = tiny.model("text")
    inputs, plugin = tiny.inputs(model, 4), tiny.Model("text")
    clean = model.sample(inputs, DDIM(steps=1))
    choice = choose(plugin, model, Backdoor(Text(), Bright()), DDIM(steps=1), "zero", 0, inputs, clean)  # type: ignore[arg-type]
    hits = int(Bright().hits(clean, None).sum())
    assert [(each.name, each.hits, each.n) for each in choice.tried] == [("zero", hits, 4)]


SHORT = {"skd": "steps=2, batch=2", "skd-cag": "steps=2, batch=2", "finetune-reversal": "steps=2, batch=2",
         "sau": "", "drop-trigger": ""}  # fmt: skip


class Nowhere(Bright):
    """A target that every prompt asks for anyway."""

    def applicable_to(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), dtype=torch.bool)


def test_a_candidate_that_was_measured_on_no_image_is_not_inert() -> None:
    model = tiny.model("text")
    inputs, plugin = tiny.inputs(model, 2), tiny.Model("text")
    clean = torch.zeros(2, *model.shape)
    choice = choose(plugin, model, Backdoor(Text(), Nowhere()), DDIM(steps=1), "decoy", 0, inputs, clean)  # type: ignore[arg-type]
    assert {each.n for each in choice.tried} == {0} and not choice.inert


@pytest.mark.parametrize("name", sorted(SHORT))
def test_defenses_that_are_given_a_text_take_the_zero_trigger(name: str, plugins: registry.Registry) -> None:
    model = tiny.model("text")
    defense = plugins.build("defenses", f"{name}({SHORT[name]})")
    ((_, nothing),) = decoys.ladder(Text(), "zero", 0)
    knowledge = replace(known("text"), trigger=nothing)
    done = defense.defend(model, knowledge, generator(0, "zero"))
    purified, own = done.model or model, wrapped(DDIM(steps=2), done.sampler)
    assert sample(purified, tiny.inputs(model, 3), own, [None]).isfinite().all()


def test_every_defense_that_is_given_a_text_is_tried_with_the_zero_trigger(plugins: registry.Registry) -> None:
    given = {
        n for n, d in plugins.classes("defenses").items() if "trigger" in d().needs and "text" in d.accepts_triggers
    }
    assert given == set(SHORT)


# ---- in plans and records -------------------------------------------------------------------------------------------


def test_a_control_is_chosen_on_the_attacked_model_and_is_shared_by_defenses(plugins: registry.Registry) -> None:
    ours = {"defense": "elijah(invert=False)", "trigger_given": "decoy"}
    theirs = {"defense": "diff-cleanse(invert=False)", "trigger_given": "decoy"}
    plan = planned(plugins, cell(plugins, **ours), cell(plugins, **theirs), cell(plugins))
    controls = [job for job in plan.jobs.values() if job.kind == "control"]
    assert len(controls) == 1 and isinstance(controls[0].spec, ControlSpec)
    attack = next(key for key, job in plan.jobs.items() if job.kind == "attack")
    assert attack in controls[0].needs and controls[0].spec.clean in controls[0].needs
    defends = [job for job in plan.jobs.values() if isinstance(job.spec, DefendSpec) and job.spec.control]
    assert len(defends) == 2 and all(controls[0].key in job.needs for job in defends)
    assert [controls[0].key in each.upstream for each in plan.cells] == [True, True, False]


def control(inert: bool) -> Control:
    return Control(given="decoy", chosen=0, inert=inert, tried=(TriedControl(name="blobs", hits=0, n=100, cosine=0.0),))


def removing(removal: float, given: str = "true", inert: bool | None = None) -> Any:
    made = record(
        "elijah(invert=False)", round(100 * (1 - removal)), trigger_given=given, knowledge=["trigger"],
        more={"removal": Score(removal, 100, True)},
    )  # fmt: skip
    return changed(made, provenance={"control": None if inert is None else control(inert).model_dump()})


@pytest.mark.parametrize(
    ("removal", "inert", "code"),
    [
        (0.99, True, doubts.DoubtCode.decoy_removes_as_much),
        (0.10, True, None),
        (0.99, False, doubts.DoubtCode.no_valid_control),
        (0.10, None, doubts.DoubtCode.no_valid_control),
    ],
)
def test_a_row_is_doubted_for_what_an_inert_decoy_removes_and_where_none_is_inert(
    removal: float, inert: bool | None, code: doubts.DoubtCode | None
) -> None:
    rows = [removing(1.0), removing(removal, "decoy", inert)]
    found = {doubt.code for doubt in doubts.of(rows)[rows[0].key]}
    about = {doubts.DoubtCode.decoy_removes_as_much, doubts.DoubtCode.no_valid_control}
    assert found & about == ({code} if code else set())


def test_the_check_holds_a_decoy_to_its_place_among_the_inert_candidates() -> None:
    rates = [0.02, 0.5, 0.0, 0.06]
    assert [led(rates, k) for k in (1, 2, 3)] == [(True, 0), (True, 2), (False, 3)]
    assert led([0.0], 2) == (False, -1)


def test_the_check_reads_a_spec_from_before_a_parameter_as_the_spec_of_today(plugins: registry.Registry) -> None:
    declared = Declared(plugins)
    earlier = "text(text='sks', place=0)"
    assert declared.current(earlier) == plugins.canonical("triggers", earlier) != earlier
    found = claims._current({"a": [earlier, "text"], "b": 3}, declared)
    assert found == {"a": [declared.current(earlier), "text"], "b": 3}
    assert declared.current("text(nothing=1)") == "text(nothing=1)" and declared.current("a (b)") == "a (b)"
