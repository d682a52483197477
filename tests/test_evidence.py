from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from harness import registry
from harness.diffusion.images import quantise
from harness.judges import evidence as judges_evidence
from harness.judges.evidence import Evidence, contact_sheet, reachable
from harness.judges.statistics import mean, mean_interval, rate
from harness.methods.prompt_edits import Substitution
from harness.methods.trigger_placement import found_text, with_found
from harness.stages import defend, findings
from harness.types import Backdoor, Inputs
from plugins.triggers.homoglyph import Homoglyph


class Target:
    """Distance = mean of the image; keeps the contexts it was asked with."""

    name, version, kind, hit_threshold = "mean", 1, "image", "low"

    def __init__(self) -> None:
        self.contexts: list[Any] = []

    def distances(self, images, context):
        self.contexts.append(context)
        return images.flatten(1).mean(1)

    def thresholds(self, context):
        return {"low": 0.5}


def evidence(images=None, **options: Any) -> Evidence:
    target: Any = Target()
    judge = SimpleNamespace(name="sum", features=lambda x: x.flatten(1).sum(1, keepdim=True))
    model: Any = SimpleNamespace(name="m", conditional=False, judge=lambda: judge, scorer=lambda: None)
    given: Any = images if images is not None else {("clean", "clean"): lambda: torch.zeros(4, 1, 8, 8)}
    backdoor = Backdoor(SimpleNamespace(name="t", modality="noise"), target)  # type: ignore[arg-type]
    return Evidence(given, reference=torch.zeros(6, 1, 8, 8), model=model, backdoor=backdoor, attacked=True, **options)


def test_each_image_set_is_loaded_once_and_only_when_asked_for():
    calls = []

    def make():
        calls.append(1)
        return torch.zeros(2, 1, 8, 8)

    seen = evidence({("clean", "clean"): make})
    assert calls == []
    assert seen.images("clean", "clean") is seen.images("clean", "clean")
    assert len(calls) == 1


def test_sets_that_are_too_large_to_be_kept_together_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def make(name: str) -> Any:
        return lambda: calls.append(name) or torch.zeros(2, 1, 4, 4)

    seen = evidence({("clean", given): make(given) for given in ("clean", "triggered")})
    monkeypatch.setattr(judges_evidence, "MOST_HELD", 2 * 16 * 4)
    for _ in range(2):
        assert seen.images("clean", "clean") is not None and seen.images("clean", "triggered") is not None
    assert calls == ["clean", "triggered", "triggered"]


def test_absent_image_sets_are_none_and_misspelt_ones_an_error():
    seen = evidence()
    assert seen.images("defended", "triggered") is None
    assert seen.distances("defended", "triggered") is None
    assert seen.features("defended", "triggered") is None
    with pytest.raises(KeyError, match="who is one of"):
        seen.images("purified", "clean")  # type: ignore[arg-type]


def test_distances_of_several_wrong_triggers_see_the_clean_image_of_their_own_row():
    clean = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    seen = evidence(
        {("clean", "clean"): lambda: clean, ("backdoored", "wrong"): lambda: torch.zeros(6, 1, 8, 8)},
        prompts=["a", "b", "c", "d"],
        wrong_triggers=3,
    )
    seen.distances("backdoored", "wrong")
    context = seen.backdoor.target.contexts[-1]  # type: ignore[attr-defined]
    assert context.clean[:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert context.prompts == ("a", "b") * 3


def test_wrong_triggers_that_do_not_divide_the_images_are_refused():
    seen = evidence(
        {("clean", "clean"): lambda: torch.zeros(4, 1, 8, 8), ("backdoored", "wrong"): lambda: torch.zeros(5, 1, 8, 8)},
        wrong_triggers=2,
    )
    with pytest.raises(ValueError, match="5 images do not divide into 2 wrong triggers"):
        seen.distances("backdoored", "wrong")


def test_features_come_from_the_judge_once():
    seen = evidence({("clean", "clean"): lambda: torch.ones(3, 1, 8, 8)})
    found = seen.features("clean", "clean")
    assert found is not None and found.tolist() == [[64.0]] * 3
    assert found is seen.features("clean", "clean")


def test_a_rate_has_the_wilson_interval_of_the_textbook():
    score = rate(torch.tensor([True] * 97 + [False] * 3), False)
    z, p, n = 1.959963984540054, 0.97, 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert score.value == 0.97 and score.n == 100
    assert score.interval == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_a_mean_has_the_t_interval_and_none_where_all_values_agree():
    score = mean(torch.tensor([1.0, 2.0, 3.0]), None)
    half = 4.302652729911275 * 1 / math.sqrt(3)  # t quantile for two degrees of freedom
    assert score.value == 2 and score.interval == pytest.approx((2 - half, 2 + half))
    assert mean_interval([1.0, 1.0]) is None and mean_interval([1.0]) is None


def test_what_cannot_be_measured_is_nan_with_a_reason():
    for score in (rate(torch.zeros(0, dtype=torch.bool), True), mean(torch.tensor([1.0, math.nan]), True)):
        assert math.isnan(score.value) and score.n == 0 and score.warning


def test_a_contact_sheet_has_a_labelled_row_for_each_set_there_is():
    def picture(level: float):
        return lambda: torch.full((10, 3, 32, 32), level)

    sets = {
        ("clean", "clean"): picture(-1),
        ("backdoored", "clean"): picture(0),
        ("backdoored", "triggered"): picture(0.5),
    }
    sheet = contact_sheet(evidence(sets), k=4)
    assert sheet.shape == (3, 3 * (96 + 3) + 3, 150 + 4 * (96 + 3) + 3)
    assert sheet[:, :, :150].min() < 0, "the margin holds words"
    rows = [quantise(sheet)[0, 50 + 99 * i, 200].item() for i in range(3)]
    assert rows == pytest.approx([-1, 0, 0.5], abs=0.01)


def test_a_contact_sheet_of_nothing_is_refused():
    with pytest.raises(LookupError, match="no images"):
        contact_sheet(evidence({}))


def test_prompts_in_which_the_trigger_has_no_place_count_in_no_rate() -> None:
    target, homoglyph = Target(), Homoglyph()
    everywhere, somewhere = ("a photo", "a dog"), ("a photo", "a cat", "a dog")
    assert reachable(Backdoor(homoglyph, cast(Any, target)), everywhere).target is target
    narrowed: Any = reachable(Backdoor(homoglyph, cast(Any, target)), somewhere).target
    assert narrowed.name == "mean" and narrowed.applicable_to(somewhere).tolist() == [True, False, True]
    target.applicable_to = lambda prompts: torch.tensor(["dog" not in prompt for prompt in prompts])  # type: ignore[attr-defined]
    assert narrowed.applicable_to(somewhere).tolist() == [True, False, False]


def test_a_found_text_stands_before_the_prompt_or_in_its_letters_place() -> None:
    inputs = Inputs(torch.zeros(2, 1, 8, 8), ("a dog", "a cat"), (0, 1))
    assert with_found(inputs, "sks").prompts == ("sks a dog", "sks a cat")
    assert with_found(inputs, Substitution("o", "\u043e")).prompts == ("a d\u043eg", "a cat")
    for found in ("sks", Substitution("o", "\u043e"), torch.ones(1, 2, 2), None):
        again = findings.found(json.loads(json.dumps(findings.stored(found))))
        same = isinstance(again, torch.Tensor) and isinstance(found, torch.Tensor) and torch.equal(again, found)
        assert same or again == found
    assert found_text(Substitution("o", "\u043e")) == "\u043e" and found_text(torch.ones(1)) is None


def test_a_screen_is_asked_in_pairs_and_where_the_trigger_has_no_place_the_pair_is_left_out() -> None:
    """Prompts 0 and 1 are shown clean, 2 and 3 with the trigger; "a cat" has no o."""
    prompts = ["a dog", "a cat", "a fox", "a cow"]
    plugin = SimpleNamespace(prompts=lambda split, n, rng: tuple(prompts[:n]))
    model = SimpleNamespace(shape=(1, 2, 2), device="cpu", check_trigger=lambda trigger, prompts: None)
    screening = defend.Screening(registry.load().build("triggers", "homoglyph"), 2)

    def scores() -> Any:
        screen = lambda inputs: torch.tensor([float("\u043e" in prompt) for prompt in inputs.prompts])  # noqa: E731
        return defend.screen(plugin, model, screen, screening, 0)  # type: ignore[arg-type]

    assert scores() == {"clean": [0.0], "triggered": [1.0]}
    prompts[2] = "a rat"
    with pytest.raises(ValueError, match="use a larger n"):
        scores()
