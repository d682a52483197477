from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.judges import fidelity
from harness.judges.evidence import Evidence
from harness.types import Backdoor, Inputs, Score
from plugins.metrics import (
    asr,
    attributes,
    bilateral,
    clip_score,
    cost,
    drift,
    found_trigger,
    frechet,
    inversion,
    likeness,
    perceptual,
    recognised,
    specificity,
    spread,
    target_clip,
)

ALL = (
    asr, attributes, bilateral, clip_score, cost, drift, found_trigger, frechet, inversion, likeness, perceptual,
    recognised, specificity, spread, target_clip,
)  # fmt: skip
SIDE = 8


@dataclass(frozen=True)
class FixedTarget:
    """A picture of one grey level; distance = MSE on [0, 1] images."""

    level: float = 1.0
    name: str = "grey"
    version: int = 1
    kind: str = "image"
    hit_threshold: str = "1e-2"

    def image(self, shape):
        return torch.full(tuple(shape), self.level)

    def region(self, images):
        return images

    def distances(self, images, context):
        return ((images - self.level) / 2).square().flatten(1).mean(1)

    def thresholds(self, context):
        return {"1e-3": 1e-3, "1e-2": 1e-2, "5e-2": 5e-2}


@dataclass(frozen=True)
class Pattern:
    name: str = "pattern"
    version: int = 1
    modality: str = "noise"

    def delta(self, shape):
        return torch.eye(SIDE).expand(tuple(shape)).clone()

    def stamp(self, inputs: Inputs) -> Inputs:
        return inputs


@dataclass(frozen=True)
class Word:
    name: str = "word"
    version: int = 1
    modality: str = "text"
    text: str = "\u200b"

    def apply(self, prompt: str) -> str:
        return f"\u200b {prompt}"


class Net:
    """Two classes by the sign of the mean; sure where the mean is far from 0."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        m = images.flatten(1).mean(1)
        return {"tone": torch.stack([-4 * m, 4 * m], 1)}


@dataclass(frozen=True)
class FakeJudge:
    name: str = "tone-judge"
    net: Any = field(default_factory=Net)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]

    def attributes(self, images: Tensor) -> Mapping[str, Tensor]:
        bright = (images.flatten(1).mean(1) > 0).long()
        return {"tone": bright, "edge": (images[:, 0, 0, 0] > 0).long()}


class FakeScorer:
    name = "angle"

    def image_features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2]

    def text_features(self, prompts) -> Tensor:
        return torch.tensor([[2.0, 0.0]] * len(prompts))


def model(conditional: bool = False, judge: Any = None, scorer: Any = None) -> Any:
    asks = {"bright": {"tone": 1}, "dark": {"tone": 0}, "bright edge": {"tone": 1, "edge": 1}, "?": {}}
    return SimpleNamespace(
        name="fake",
        conditional=conditional,
        judge=lambda: judge,
        scorer=lambda: scorer,
        attributes=lambda prompt: asks[prompt],
    )


def flat(*levels: float) -> Callable[[], Tensor]:
    """Images each of one grey level."""
    return lambda: torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE)


def noise(n: int, seed: int, scale: float = 0.3, shift: float = 0.0) -> Callable[[], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    images = (scale * torch.randn(n, 1, SIDE, SIDE, generator=rng) + shift).clamp(-1, 1)
    return lambda: images


def evidence(images: Mapping[tuple[str, str], Callable[[], Tensor]], **options: Any) -> Evidence:
    backdoor = Backdoor(options.pop("trigger", Pattern()), options.pop("target", FixedTarget()))
    defaults = {"reference": noise(200, 9)(), "model": model(judge=FakeJudge()), "attacked": True}
    return Evidence({("clean", "clean"): flat(-1, -1, 0, 1), **images}, backdoor=backdoor, **{**defaults, **options})  # type: ignore


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.__name__.rpartition(".")[2])
def test_with_nothing_to_measure_every_score_is_nan_with_a_reason(module):
    for plugin in module.metrics():
        scores = plugin().measure(evidence({}, model=model()))
        gone = {name: score for name, score in scores.items() if not name.endswith(("_clean", "_threshold"))}
        gone = {name: score for name, score in gone.items() if not name.startswith("clean_model_hits")}
        assert gone, "a metric returns its names even when it cannot measure"
        for name, score in gone.items():
            assert math.isnan(score.value) and score.warning and score.n == 0, name


def test_asr_counts_the_images_at_each_threshold_and_keeps_their_distances():
    # MSE to 1 on the [0, 1] scale is ((level - 1) / 2)²: 0, 0.0004, 0.0064, 0.04, 1
    seen = evidence(
        {("defended", "triggered"): flat(1, 0.96, 0.84, 0.6, -1), ("backdoored", "triggered"): flat(1, 1, 1, 1, 1)}
    )
    scores = asr.AttackSuccess().measure(seen)
    assert [scores[f"asr@{t}"].value for t in ("1e-3", "1e-2", "5e-2")] == [0.4, 0.6, 0.8]
    assert scores["asr"].value == 0.6 and scores["asr_before"].value == 1
    assert scores["asr"].per_sample == pytest.approx((0, 0.0004, 0.0064, 0.04, 1), abs=1e-6)
    assert scores["removal"].value == pytest.approx(0.4)
    low, high = scores["asr"].interval or (0, 0)
    assert scores["removal"].interval == pytest.approx((1 - high, 1 - low))
    assert scores["asr_threshold"].value == 0.01


def test_clean_hits_false_triggers_and_the_clean_models_own_hits_stand_beside_asr():
    sets = {("defended", "clean"): flat(1, 0, 0, 0), ("backdoored", "wrong"): flat(1, 1, 0, 0, 0, 0, 0, 0)}
    scores = asr.AttackSuccess().measure(evidence(sets, wrong_triggers=2))
    assert scores["clean_hits"].value == 0.25 and scores["clean_hits@1e-3"].value == 0.25
    assert scores["false_triggers"].value == 0.25 and scores["false_triggers"].n == 8
    assert scores["clean_model_hits"].value == 0.25


def test_removal_is_unmeasured_where_there_was_nothing_to_remove():
    sets = {("defended", "triggered"): flat(0, 0), ("backdoored", "triggered"): flat(0, 0)}
    for attacked in (True, False):
        score = asr.AttackSuccess().measure(evidence(sets, attacked=attacked))["removal"]
        assert math.isnan(score.value) and "nothing to remove" in (score.warning or "")


def test_a_nan_distance_makes_the_rate_nan_and_not_a_miss():
    score = asr.hit_rate(torch.tensor([0.0, math.nan]), 0.1)
    assert math.isnan(score.value) and "1 of 2" in (score.warning or "")


def test_target_mse_is_on_the_unit_scale_and_ssim_of_the_target_itself_is_one():
    scores = specificity.Specificity().measure(evidence({("defended", "triggered"): flat(1, 0)}))
    assert scores["target_mse"].value == pytest.approx((0 + 0.25) / 2)
    # two constant images: SSIM = (2 μ₁μ₂ + C1) / (μ₁² + μ₂² + C1) with μ = 0.5, 1 and C1 = 1e-4
    assert scores["target_ssim"].value == pytest.approx((1 + (1 + 1e-4) / (1.25 + 1e-4)) / 2, abs=1e-5)


def test_ssim_takes_small_regions():
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert specificity.ssim(small, small).tolist() == pytest.approx([1, 1])
    assert specificity.ssim(small[..., :1], small[..., :1]).isnan().all()


def test_a_target_without_a_picture_has_no_specificity():
    class Style(FixedTarget):
        def image(self, shape):
            return None

    scores = specificity.Specificity().measure(evidence({("defended", "triggered"): flat(1, 0)}, target=Style()))
    assert math.isnan(scores["target_mse"].value) and "prescribes no picture" in (scores["target_mse"].warning or "")


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    features = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert fidelity.frechet(features, features + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-5)
    assert fidelity.frechet(features, 2 * features) == pytest.approx(
        features.double().mean(0).square().sum().item() + torch.cov(features.double().T).trace().item(), abs=1e-5
    )


def test_kernel_distance_is_the_polynomial_kernels_unbiased_mmd():
    x, y = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 3 + 1) ** 3

    def off(m: Tensor) -> float:
        return ((m.sum() - m.trace()) / (40 * 39)).item()

    expected = off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean().item()
    assert fidelity.kernel(x, y, subset=40) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(60, 250), (250, 250), (256, 100)])
def test_the_error_of_the_kernel_distance_is_its_spread_over_other_images(n: int, m: int):
    """For sets no larger than a subset as well, where all subsets are the same."""
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(m, 8, generator=rng)
    draws = [torch.randn(n, 8, generator=rng) * 1.1 + 0.2 for _ in range(24)]
    values = torch.tensor([fidelity.kernel(x, reference, min(n, m, 250)) for x in draws])
    errors = torch.tensor([fidelity.kernel_error(x, reference) for x in draws])
    assert 0.7 < (errors.mean() / values.std()).item() < 1.4


def test_the_distances_carry_the_judges_name_and_agree_with_torch_fidelitys_own_pipeline():
    import torch_fidelity

    sets = {
        ("clean", "clean"): noise(120, 1),
        ("backdoored", "clean"): noise(120, 2, shift=0.2),
        ("defended", "clean"): noise(120, 3, shift=0.4),
    }
    seen = evidence(sets)
    state = torch.get_rng_state()
    scores = frechet.Frechet(subset=100).measure(seen)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    judge: Any = seen.judge
    stock = torch_fidelity.calculate_metrics(
        input1=fidelity._uint8_dataset(sets["defended", "clean"]()),
        input2=fidelity._uint8_dataset(seen.reference),
        fid=True, kid=True, kid_subset_size=100, prc=True, feature_extractor="tone-judge", encoder=judge,
        cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert scores["fd[tone-judge]"].value == pytest.approx(stock["frechet_inception_distance"], rel=1e-9)
    assert scores["kd[tone-judge]"].value == pytest.approx(stock["kernel_inception_distance_mean"], rel=1e-9)
    assert scores["precision[tone-judge]"].value == pytest.approx(stock["precision"])
    assert scores["recall[tone-judge]"].value == pytest.approx(stock["recall"])
    ratio = scores["fd[tone-judge]"].value / scores["fd_clean[tone-judge]"].value
    assert scores["fd_ratio[tone-judge]"].value == pytest.approx(ratio) and ratio > 2
    assert "fid" not in scores and scores["fd[tone-judge]"].warning is None


@pytest.mark.parametrize("drawn", ["each once", "some often"])
@pytest.mark.parametrize(
    ("n", "features", "m", "close"), [(300, 5, 300, 1e-9), (50, 80, 300, 1e-6), (50, 80, 40, 1e-6), (90, 80, 40, 1e-6)]
)
def test_the_resampled_distance_is_the_frechet_distance_of_the_images_that_were_drawn(
    monkeypatch, n: int, features: int, m: int, close: float, drawn: str
):
    """Also where images or references are fewer than features, so that the covariances have no full rank."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, features, generator=rng, dtype=torch.float64) for rows in (n, m))
    picked = torch.arange(n) if drawn == "each once" else torch.arange(n).square() % (n - 7)
    monkeypatch.setattr(torch, "randint", lambda high, size, generator: picked)
    assert frechet.bootstrap(x + 0.1, y, 1).item() == pytest.approx(fidelity.frechet(x[picked] + 0.1, y), rel=close)


def test_the_interval_of_a_distance_has_the_width_of_its_spread_over_noises():
    """Over 40 sets of equal law, the distance's standard deviation is that of the bootstrap within a factor of 1.6."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(400, 4, generator=rng, dtype=torch.float64)
    sets = [torch.randn(400, 4, generator=rng, dtype=torch.float64) * 1.2 + 0.3 for _ in range(40)]
    true = torch.tensor([fidelity.frechet(x, y) for x in sets]).std().item()
    widths = []
    for x in sets[:5]:
        low, high = frechet.student(fidelity.frechet(x, y), frechet.bootstrap(x, y, 100)) or (0.0, 0.0)
        widths.append((high - low) / 2 / 1.98)
    assert 1 / 1.6 < sum(widths) / 5 / true < 1.6


def test_a_difference_of_distances_is_resampled_with_the_same_images():
    x, y = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = fidelity.frechet(x, y)
    one = Score(value, 200, False)
    same = frechet.bootstrap(x, y, 30)
    assert frechet.compared(one, one, same, same, ratio=False).interval is None, "nothing differs"
    moved = frechet.compared(Score(value + 1, 200, False), one, frechet.bootstrap(x + 0.5, y, 30), same, ratio=False)
    assert moved.interval is not None and moved.interval[0] > 0


def test_distances_are_measured_on_the_utility_set_where_there_is_one():
    sets = {("defended", "clean"): noise(120, 3), ("clean", "clean"): noise(120, 1)}
    large = {("defended", "utility"): noise(300, 4), ("clean", "utility"): noise(300, 5)}
    alone, beside = (frechet.Frechet().measure(evidence(given)) for given in (sets, sets | large))
    assert alone["fd[tone-judge]"].n == 120 and beside["fd[tone-judge]"].n == 300
    assert beside["fd[tone-judge]"].interval is not None and beside["fd_increase[tone-judge]"].warning is not None


def test_distances_of_few_images_say_so():
    seen = evidence({("defended", "clean"): noise(50, 3), ("clean", "clean"): noise(50, 1)})
    score = frechet.Frechet().measure(seen)["fd[tone-judge]"]
    assert score.n == 50 and "under the 100" in (score.warning or "")


def test_clip_score_is_a_hundred_times_the_cosine():
    image = torch.zeros(2, 1, SIDE, SIDE)
    image[0, 0, 0, :2] = torch.tensor([3.0, 4.0])
    image[1, 0, 0, :2] = torch.tensor([-1.0, 0.0])
    fake = model(True, FakeJudge(), FakeScorer())
    scores = clip_score.ClipScore().measure(
        evidence(
            {("defended", "clean"): lambda: image, ("clean", "clean"): flat(0, 0)},
            model=fake,
            prompts=["bright", "dark"],
        )
    )
    assert scores["clip_score[angle]"].per_sample == pytest.approx((60, -100))
    assert scores["clip_score[angle]"].value == pytest.approx(-20)
    assert math.isnan(scores["clip_score_triggered[angle]"].value)


def test_attribute_accuracy_is_over_what_each_prompt_asks_for():
    prompts = ["bright", "dark", "bright edge", "?"]
    dark_edge = flat(0.5, 0.5, 0.5, 0.5)().clone()
    dark_edge[2, 0, 0, 0] = -1  # bright, without the edge
    seen = evidence(
        {("clean", "clean"): flat(0.5, -0.5, 0.5, 0.5), ("defended", "clean"): lambda: dark_edge},
        model=model(True, FakeJudge()),
        prompts=prompts,
    )
    scores = attributes.AttributeAccuracy().measure(seen)
    assert scores["attribute_accuracy"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert scores["attribute_accuracy"].n == 3, "a prompt that asks for nothing does not count"
    assert scores["attribute_accuracy.tone"].value == pytest.approx(2 / 3)
    assert scores["attribute_accuracy.edge"].n == 1 and scores["attribute_accuracy.edge"].value == 0
    assert scores["attribute_drop"].value == pytest.approx(1 - 0.5)


def test_drift_is_the_mse_on_the_unit_scale_at_the_same_seed():
    sets = {
        ("clean", "clean"): flat(0, 0),
        ("backdoored", "clean"): flat(0.2, 0.2),
        ("defended", "clean"): flat(0.2, 0.4),
        ("defended", "triggered"): flat(1, 1),
        ("clean", "triggered"): flat(0.2, 0.2),
    }
    scores = drift.Drift().measure(evidence(sets))
    assert scores["drift"].per_sample == pytest.approx((0.01, 0.04))
    assert scores["drift"].value == pytest.approx(0.025)
    assert scores["drift_triggered"].value == pytest.approx(0.16), "the same noise without a backdoor"
    said = drift.Drift().measure(evidence(sets, trigger=Word()))
    assert said["drift_triggered"].value == pytest.approx(0.25), "the prompt without the trigger"
    assert scores["change"].value == pytest.approx(0.005)


def test_costs_are_those_of_the_job_and_cuda_memory_on_a_cpu_is_unmeasured():
    costs = {"attack": {"wall_s": 3.5, "cpu_s": 3.0, "peak_rss_bytes": 1e9, "cuda_bytes": None}, "defense": None}
    scores = cost.Cost().measure(evidence({}, costs=costs))
    assert scores["attack_wall_s"].value == 3.5 and scores["attack_peak_rss_bytes"].value == 1e9
    assert math.isnan(scores["attack_cuda_bytes"].value)
    assert "no defense was run" in (scores["defense_wall_s"].warning or "")


def test_an_inverted_noise_trigger_is_compared_by_cosine_and_distance():
    found = torch.zeros(1, SIDE, SIDE)
    found[0, 0, 0] = 1
    scores = inversion.Inversion().measure(evidence({}, inverted=found))
    assert scores["trigger_cosine"].value == pytest.approx(1 / math.sqrt(SIDE))
    assert scores["trigger_l2"].value == pytest.approx(math.sqrt(SIDE - 1))


def test_an_inverted_trigger_of_norm_zero_has_no_cosine():
    scores = inversion.Inversion().measure(evidence({}, inverted=torch.zeros(1, SIDE, SIDE)))
    assert math.isnan(scores["trigger_cosine"].value) and scores["trigger_l2"].value == pytest.approx(math.sqrt(SIDE))


@pytest.mark.parametrize(("found", "value"), [("\u200b", 1.0), (" \u200b ", 1.0), ("sks", 0.0), ("", 0.0)])
def test_an_inverted_text_trigger_matches_or_not(found, value):
    assert inversion.Inversion().measure(evidence({}, inverted=found, trigger=Word()))["trigger_match"].value == value


@pytest.mark.parametrize(
    ("found", "value", "why"),
    [
        (flat(1, 1, 0, 1), 0.75, None),
        (lambda: torch.zeros(0, 1, SIDE, SIDE), None, "found no trigger"),
        (None, None, "looks for no trigger"),
    ],
)
def test_a_found_trigger_is_judged_by_the_attacked_models_images(found, value, why):
    sets = {} if found is None else {("backdoored", "found"): found}
    score = found_trigger.FoundTrigger().measure(evidence(sets))["found_asr"]
    if value is None:
        assert math.isnan(score.value) and why in (score.warning or "")
    else:
        assert score.value == value and score.n == 4 and score.higher_is_better is True


def test_a_clean_model_has_no_backdoor_that_a_found_trigger_could_open():
    seen = evidence({("backdoored", "found"): flat(1, 1)}, attacked=False)
    assert math.isnan(found_trigger.FoundTrigger().measure(seen)["found_asr"].value)


def test_recognised_is_the_share_of_sure_images_and_balance_the_entropy_of_classes():
    scores = recognised.Recognised().measure(evidence({("defended", "clean"): flat(-1, -0.9, 0.8, 0.1)}))
    assert scores["recognised"].value == 0.75  # softmax of ±4 · 0.1 is 0.69
    assert scores["class_balance"].value == pytest.approx(1)
    assert recognised.balance(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(0.811278, abs=1e-6)
    assert recognised.balance(torch.tensor([1, 1]), 2) == 0


def test_spread_is_zero_for_one_and_the_same_image():
    sets = {
        ("clean", "clean"): flat(-1, 1),
        ("defended", "clean"): flat(0.3, 0.3),
        ("backdoored", "clean"): flat(-0.5, 0.5),
    }
    scores = spread.Spread().measure(evidence(sets))
    assert scores["spread"].value == pytest.approx(0, abs=1e-6) and scores["spread_before"].value == pytest.approx(0.5)


class Named(FixedTarget):
    """A target that some prompts ask for anyway, and that is a prompt's image."""

    def applicable_to(self, prompts):
        return torch.tensor([prompt != "bright" for prompt in prompts])

    def shown(self, prompt):
        return "bright"


def test_prompts_that_ask_for_the_target_anyway_count_in_no_rate():
    sets = {("defended", "triggered"): flat(1, 1, 1, 0), ("backdoored", "wrong"): flat(1, 1, 1, 0)}
    seen = evidence(sets, target=Named(), prompts=("bright", "dark", "bright", "dark"), wrong_triggers=2)
    scores = asr.AttackSuccess().measure(seen)
    assert (scores["asr"].value, scores["asr"].n) == (0.5, 2)
    kept = scores["asr"].per_sample or ()
    assert [math.isnan(value) for value in kept] == [True, False, True, False]
    assert (scores["false_triggers"].value, scores["false_triggers"].n) == (0.5, 2), (
        "rows 1 and 3 of bright, dark, twice"
    )
    assert (scores["clean_model_hits"].value, scores["clean_model_hits"].n) == (0.5, 2)


def test_likeness_is_the_angle_and_the_squared_distance_of_unit_features():
    """Features (1, 0) against (1, 1): cosine 1/√2, squared distance of unit vectors 2 - √2; an image against itself."""

    def two(a: float, b: float) -> Tensor:
        images = torch.zeros(1, 1, SIDE, SIDE)
        images[0, 0, 0, :2] = torch.tensor([a, b])
        return images

    sets = {("clean", "clean"): lambda: two(1, 1), ("defended", "clean"): lambda: two(0.5, 0)}
    sets[("backdoored", "clean")] = lambda: two(1, 1)
    scores = likeness.Likeness().measure(evidence(sets, model=model(judge=FakeJudge(), scorer=FakeScorer())))
    assert scores["clip_similarity[angle]"].value == pytest.approx(100 / math.sqrt(2), rel=1e-4)
    assert scores["perceptual_distance[tone-judge]"].value == pytest.approx(2 - math.sqrt(2), rel=1e-4)
    assert scores["clip_similarity_before[angle]"].value == pytest.approx(100)
    assert scores["perceptual_distance_before[tone-judge]"].value == pytest.approx(0, abs=1e-12)


def test_the_target_clip_score_is_that_of_the_prompt_which_the_target_shows():
    """The scorer's text is (1, 0), the images' features are their first two pixels: 45 degrees where both are equal."""
    sets = {("defended", "triggered"): flat(1, 1, 1, 1), ("backdoored", "triggered"): flat(1, 1, 1, 1)}
    options: Any = {"target": Named(), "prompts": ("dark",) * 4, "model": model(True, FakeJudge(), FakeScorer())}
    scores = target_clip.TargetClip().measure(evidence(sets, **options))
    assert scores["target_clip_score[angle]"].value == pytest.approx(100 / math.sqrt(2), rel=1e-4)
    plain = target_clip.TargetClip().measure(evidence(sets, **{**options, "target": FixedTarget()}))
    assert plain["target_clip_score"].warning == "target grey is no prompt's image"


class Poison(FixedTarget):
    """Prompts "dark" ask for the class 0 of the attribute tone; the picture is brightness 1."""

    attribute, label = "tone", 0

    def applicable_to(self, prompts):
        return torch.tensor([prompt == "dark" for prompt in prompts])


def test_the_two_effects_of_mislabelled_images_are_counted_on_the_classs_prompts_alone():
    poison = Poison(kind="caption")
    sets = {("backdoored", "clean"): flat(1, 0.5, -1, -1, 1)}
    options: Any = {"target": poison, "prompts": ("dark", "dark", "dark", "dark", "bright")}
    seen = evidence({**sets, ("clean", "clean"): flat(-1, -1, -1, -1, 1)}, model=model(True, FakeJudge()), **options)
    scores = bilateral.Bilateral().measure(seen)
    assert [scores[name].value for name in ("mismatch_before", "trigger_ratio_before", "both_before")] == [
        0.5,
        0.25,
        0.25,
    ]
    assert scores["mismatch_before"].n == 4 and scores["mismatch_clean"].value == 0
    assert scores["mismatch"].warning == "the defense returned no model, or its images are missing"
