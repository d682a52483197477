"""Input screening: areas and rates against hand-computed values, and screens that judge each input by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from harness.diffusion import events
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import statistics
from harness.judges.evidence import Verdict
from harness.methods import inversion, prompt_screening
from harness.runs.shortened import Clock
from harness.types import Defended, Inputs, Knowledge
from leaderboard import recompute
from plugins.defenses import bias_scan, disdet, terd
from plugins.defenses.bias_scan import BiasScan
from plugins.defenses.disdet import DisDet
from plugins.defenses.terd import TERD
from plugins.defenses.ufid import UFID
from plugins.metrics.screening import Screening
from plugins.triggers.biased import Blend, PatchNoise
from plugins.triggers.box import Box
from tests.oracles import one_image_model, scheduler, tiny_ncsn, tiny_unet, trojan_model


def test_an_area_is_the_share_of_pairs_in_the_right_order() -> None:
    area, (low, high) = statistics.auroc([0.1, 0.4, 0.4], [0.4, 0.9])
    assert area == pytest.approx((3 + 1 + 0.5 + 0.5) / 6)
    assert 0 <= low < area < high <= 1


def test_the_interval_of_an_area_holds_newcombes_equation_and_survives_the_ends() -> None:
    """|A - θ| = 1.96 √V(θ) at both ends, with Hanley & McNeil's V written for negative-exponential scores."""
    negatives, positives = list(range(10)), [5, 6, 7, 8, 9, 10, 11]
    area, ends = statistics.auroc(negatives, positives)
    m, n = len(negatives), len(positives)
    for theta in ends:
        q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
        mean_size = (m + n) / 2 - 1
        variance = (theta * (1 - theta) + mean_size * (q1 - theta**2) + mean_size * (q2 - theta**2)) / (m * n)
        assert abs(area - theta) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    assert statistics.auroc([0, 1], [2, 3])[0] == 1.0 and 0.3 < statistics.auroc([0, 1], [2, 3])[1][0] < 1
    assert statistics.auroc([2, 3], [0, 1])[1][0] == 0.0
    with pytest.raises(ValueError, match="both kinds"):
        statistics.auroc([], [1.0])


def test_at_one_percent_one_of_a_hundred_clean_inputs_may_be_flagged_and_none_of_ninety_nine() -> None:
    negatives, positives = [float(i) for i in range(100)], [98.5, 99.0, 99.5, 20.0]
    assert statistics.at_fpr(negatives, positives, 0.01) == statistics.Point(98.0, 0.75, 0.01)
    assert statistics.at_fpr(negatives[1:], positives, 0.01) == statistics.Point(99.0, 0.25, 0.0)


def screened(verdict: Verdict) -> Any:
    evidence: Any = SimpleNamespace(verdict=verdict)
    return Screening().measure(evidence)


def test_a_screen_is_scored_from_its_scores_which_stay_in_the_record() -> None:
    clean, triggered = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0, 5.0, 6.0])
    scores = screened(Verdict(screen_above=2.0, screened={"clean": clean, "triggered": triggered}))
    assert {name: score.value for name, score in scores.items()} == {
        "screen_auroc": 15 / 16, "screen_tpr@1%fpr": 0.75, "screen_fpr": 0.25, "screen_tpr": 1.0,
        "screen_threshold": 2.0,
    }  # fmt: skip
    assert scores["screen_auroc"].per_sample == (0, 1, 2, 3, 2.5, 4, 5, 6)
    assert scores["screen_fpr"].interval == pytest.approx((0.0456, 0.6994), abs=1e-4)  # Wilson's for 1 of 4


def test_a_stored_screen_can_be_recomputed_without_a_model() -> None:
    clean, triggered = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0, 5.0, 6.0])
    scores = screened(Verdict(screen_above=2.0, screened={"clean": clean, "triggered": triggered}))
    found = recompute.recompute(scores)
    assert set(found.recomputed) == set(scores) - {"screen_threshold"} and not found.problems
    for name in ("screen_fpr", "screen_tpr", "screen_tpr@1%fpr"):
        other = {**scores, name: replace(scores[name], value=0.5, interval=statistics.wilson(2, 4))}
        assert f"{name} is 0.5" in recompute.recompute(other).problems[0]
    other = {**scores, "screen_auroc": replace(scores["screen_auroc"], value=0.9)}
    assert "screen_auroc is 0.9" in recompute.recompute(other).problems[0]


def test_without_a_threshold_there_are_no_rates_at_it_and_without_a_screen_nothing() -> None:
    pair = {"clean": torch.zeros(3), "triggered": torch.ones(3)}
    assert set(screened(Verdict(screened=pair))) == {"screen_auroc", "screen_tpr@1%fpr"}
    assert all(score.warning == "the defense screens no inputs" for score in screened(Verdict()).values())


# ---- bias-scan ------------------------------------------------------------------------------------------------------


class TakesOut(nn.Module):
    """A denoiser of pure noise that takes a share of a shift r out of its answer: ε(x) = x - share · gate · r, the gate
    being how far x lies along r, within [0, 1]."""

    def __init__(self, r: Tensor, share: float) -> None:
        super().__init__()
        self.r = nn.Parameter(r)
        self.share = share
        self.config = SimpleNamespace(in_channels=r.shape[0], sample_size=r.shape[-1])

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        along = ((x_t * self.r).flatten(1).sum(1) / self.r.square().sum()).clamp(0, 1).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=x_t - self.share * along * self.r)


@torch.no_grad()
def test_what_an_exact_trojdiff_model_leaves_of_its_trigger_is_nothing_and_a_clean_one_leaves_all() -> None:
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn((64, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    for trigger in (Blend(), PatchNoise()):
        mu, gamma = trigger.delta((1, 8, 8)), trigger.scale((1, 8, 8))
        assert bias_scan.remaining(trojan_model(images, trigger), eps, mu, gamma) < 0.01
        assert bias_scan.remaining(one_image_model(images[0]), eps, mu, gamma) == pytest.approx(1, abs=0.05)


def test_bias_scan_finds_trojdiffs_patch_by_trying_every_place() -> None:
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    scan = BiasScan(starts=0, shifts=0, batch=8)
    done = scan.defend(trojan_model(images, PatchNoise(place="top left", gap=2)), Knowledge(), generator(0, "x"))
    assert isinstance(done.trigger, Tensor) and done.suspicion is not None and done.suspicion > 0.99
    assert torch.equal(done.trigger, PatchNoise(place="top left", gap=2).delta((1, 8, 8)))
    clean = scan.defend(one_image_model(images[0]), Knowledge(), generator(0, "x"))
    assert clean.suspicion == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(("share", "flagged"), [(0.5, True), (0.1, False)], ids=["BadDiffusion's", "little"])
def test_bias_scan_finds_a_shift_of_which_half_is_taken_out(share: float, flagged: bool) -> None:
    r = 0.8 * Box(size=7, value=1.0).delta((1, 16, 16))
    model = DiffusionModel(TakesOut(r, share), scheduler())
    done = BiasScan(starts=0, patch=0).defend(model, Knowledge(), generator(0, "x"))
    assert isinstance(done.trigger, Tensor) and done.suspicion is not None
    cosine = torch.nn.functional.cosine_similarity(done.trigger.flatten(), r.flatten(), dim=0)
    assert cosine > 0.95 if flagged else cosine.abs() > 0.95  # so little could also be the other side's excess
    assert 1 - done.suspicion == pytest.approx((1 - share) ** 2, abs=0.05)
    assert (done.suspicion > bias_scan.FLAG_ABOVE) is flagged and done.flag_above == bias_scan.FLAG_ABOVE


def test_a_shift_is_found_at_the_size_of_the_trigger_alone() -> None:
    r = Box(size=6, value=1.0, background=0.0).delta((1, 16, 16))  # root mean square 0.375
    model = DiffusionModel(TakesOut(r, 0.5), scheduler())
    left = {}
    for sizes in ((0.8,), (0.8, 0.4)):
        scan = BiasScan(starts=0, patch=0, batch=8, shifts=2, sizes=sizes)
        done = scan.defend(model, Knowledge(), generator(0, "x"))
        assert done.features is not None
        left[sizes] = done.features["left_shift"]
        assert (1 - left[sizes] > bias_scan.FLAG_ABOVE) is (0.4 in sizes)
    assert isinstance(done.trigger, Tensor)
    assert torch.nn.functional.cosine_similarity(done.trigger.flatten(), r.flatten(), dim=0) > 0.95
    # of ‖μ‖² half of r is left out: 1 - (1 - ¼) ‖r‖² / ‖μ‖² at most
    assert left[0.8,] == pytest.approx(1 - 0.75 * 36 / (256 * 0.64), abs=0.05)


class BehindAWall(TakesOut):
    """Takes r out only of inputs that lie more than three quarters of the way to it: no gradient leads there."""

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        along = (x_t * self.r).flatten(1).sum(1) / self.r.square().sum()
        gate = (4 * along - 3).clamp(0, 1).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=0.9 * x_t - (self.share - 0.1) * gate * self.r)


def test_a_trigger_on_a_black_ground_is_found_from_black_and_one_on_white_from_white() -> None:
    r = 0.8 * Box(size=6, value=0.5).delta((1, 16, 16))
    scan = BiasScan(starts=0, patch=0, batch=8, shifts=0, iterations=20, uniform=True)
    for sign in (1, -1):
        done = scan.defend(DiffusionModel(BehindAWall(sign * r, 0.5), scheduler()), Knowledge(), generator(0, "x"))
        assert isinstance(done.trigger, Tensor) and done.suspicion is not None
        assert done.suspicion > bias_scan.FLAG_ABOVE
        assert torch.nn.functional.cosine_similarity(done.trigger.flatten(), sign * r.flatten(), dim=0) > 0.95


@torch.no_grad()
def test_biases_that_are_measured_together_have_the_ratios_that_each_has_alone() -> None:
    r = 0.8 * Box(size=7, value=1.0).delta((1, 16, 16))
    model, eps = DiffusionModel(TakesOut(r, 0.5), scheduler()), torch.randn((4, 1, 16, 16))
    mus, gammas = map(torch.stack, zip(*list(bias_scan.squares((1, 16, 16), 3, 0.1, "cpu"))[100:103], strict=True))
    mus, gammas = torch.cat([mus, r[None]]), torch.cat([gammas, torch.ones_like(r)[None]])
    for scan in (BiasScan(), BiasScan(mirrored=False)):
        together = scan.measured(model, eps, mus, gammas)
        for k, alone in enumerate(together):
            inside = (gammas[k] < 1) | (mus[k] != 0)
            lefts = []
            for sign in (1, -1):
                given = sign * (gammas[k] * eps + mus[k])
                answer = model.eps(given, torch.full((4,), model.T - 1))
                error, whole = (sign * eps - answer)[:, inside], (sign * eps - given)[:, inside]
                lefts.append(error.square().mean() / whole.square().mean())
            expected = lefts[0] / lefts[1] if scan.mirrored else lefts[0]
            assert alone == pytest.approx(expected.item(), rel=1e-4)
            assert scan.measured(model, eps, mus[k], gammas[k]) == pytest.approx(expected.item(), rel=1e-4)


class Counts(nn.Module):
    """A denoiser that notes how many rows it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.config, self.rows = net, net.config, []

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        self.rows.append(len(x_t))
        return self.net(x_t, t)


def told_by(detector: Any) -> tuple[Defended, list[int]]:
    """What a detector says of a small random network, and the rows of each of its evaluations."""
    counts = Counts(tiny_unet().denoiser)
    return detector.defend(DiffusionModel(counts, scheduler()), Knowledge(), generator(0, "x")), counts.rows


@pytest.mark.parametrize("mirrored", [True, False])
def test_starts_that_descend_together_find_what_each_finds_alone(
    mirrored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = BiasScan(starts=2, shifts=1, uniform=True, iterations=2, batch=4, patch=0, mirrored=mirrored)
    together, few = told_by(scan)
    monkeypatch.setattr(inversion, "PIXELS", 1)
    alone, many = told_by(scan)
    assert together.suspicion == pytest.approx(alone.suspicion, rel=1e-4)
    assert together.features == pytest.approx(alone.features, rel=1e-4)
    torch.testing.assert_close(together.trigger, alone.trigger, atol=1e-4, rtol=1e-3)
    assert sum(few) == sum(many) and len(few) == len(many) - (1 + 2) * 2, (
        "one evaluation for a step of two and of three"
    )


def test_starts_descend_alone_where_one_has_as_many_pixels_as_a_call_may_have() -> None:
    """64 noises of 16×16 pixels and their mirror images. Each result is measured on 128 noises and theirs."""
    _, rows = told_by(BiasScan(starts=2, shifts=0, iterations=1, batch=64, patch=0))
    assert sorted(rows)[:2] == [128, 128] and sum(rows) == 2 * (128 + 2 * 128) + 2 * 128


def test_a_shortened_search_measures_two_of_the_starts_that_descend_together() -> None:
    """Two steps of eight starts, and two results on 128 noises and their mirror images, as the last one is again."""
    events.shorten(Clock(None, "defend").shorten)
    try:
        _, rows = told_by(BiasScan(starts=8, shifts=0, iterations=9, batch=4, patch=0))
    finally:
        events.shorten(None)
    assert rows == [64, 64, 128, 128, 128, 128, 128, 128]


class Saturates(TakesOut):
    """A clean denoiser that returns 80 % of any shift, except that it returns r whole, as an ODE backdoor does."""

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        mean = torch.nn.functional.avg_pool2d(x_t, 5, 1, 2, count_include_pad=False)
        along = ((mean * self.r).flatten(1).sum(1) / self.r.square().sum()).clamp(0, 1).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=x_t - 0.2 * mean + self.share * 0.2 * along * self.r)


def test_bias_scan_sees_a_shift_that_the_model_keeps_more_fully_than_its_mirror_image() -> None:
    """R alone finds the saturation, in the clean model as in the other; the ratio tells them apart."""
    r = 0.8 * torch.ones(1, 16, 16)
    scores = {}
    for share in (0.0, 1.0):
        model = DiffusionModel(Saturates(r, share), scheduler())
        for mirrored in (False, True):
            scan = BiasScan(starts=0, patch=0, shifts=1, iterations=20, mirrored=mirrored)
            done = scan.defend(model, Knowledge(), generator(0, "x"))
            scores[share, mirrored] = done.suspicion or 0.0
    assert abs(scores[1.0, False] - scores[0.0, False]) < 0.1 and scores[0.0, False] > 0.2
    assert scores[0.0, True] < 0.1 < 0.25 < scores[1.0, True]
    assert isinstance(done.trigger, Tensor) and done.notes["kept"]
    assert torch.nn.functional.cosine_similarity(done.trigger.flatten(), r.flatten(), dim=0) > 0.8


def test_bias_scan_stops_at_the_first_start_that_is_flagged_if_asked_and_says_what_it_cannot_do() -> None:
    r = 0.8 * Box(size=7, value=1.0).delta((1, 16, 16))
    model = DiffusionModel(TakesOut(r, 0.9), scheduler())
    seen: list[Tensor] = []  # a pattern of each start

    class Counted(BiasScan):
        def descend(self, *args: Any) -> Tensor:
            seen.extend(args[1])
            return super().descend(*args)

    Counted(starts=0, patch=0, stop=True).defend(model, Knowledge(), generator(0, "x"))
    assert len(seen) < 4
    seen.clear()
    Counted(starts=0, patch=0).defend(model, Knowledge(), generator(0, "x"))
    assert len(seen) == 4
    with pytest.raises(ValueError, match="use terd"):
        BiasScan().defend(tiny_ncsn(), Knowledge(), generator(0, "x"))
    with pytest.raises(ValueError, match="searches for nothing"):
        BiasScan(starts=0, shifts=0, patch=0).defend(model, Knowledge(), generator(0, "x"))
    with pytest.raises(ValueError, match=r"bias-scan\(patch="):
        BiasScan(starts=0, shifts=0, patch=17).defend(model, Knowledge(), generator(0, "x"))


# ---- terd -----------------------------------------------------------------------------------------------------------


class ExactAt(nn.Module):
    """A denoiser of pure noise that is best for inputs around `centre`: ε(x) = v - a v³ with v = (x - μ)/γ. The two
    answers of a pair of noises differ from the noises' difference the more, the farther the inputs are from μ."""

    def __init__(self, centre: Tensor, gamma: float = 1.0, a: float = 0.1) -> None:
        super().__init__()
        self.centre = nn.Parameter(centre)
        self.gamma, self.a = gamma, a
        self.config = SimpleNamespace(in_channels=centre.shape[0], sample_size=centre.shape[-1])

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        v = (x_t - self.centre) / self.gamma
        return SimpleNamespace(sample=v - self.a * v**3)


def exact_at(centre: Tensor, **options: float) -> DiffusionModel:
    return DiffusionModel(ExactAt(centre, **options), scheduler())


def test_terd_recovers_a_planted_trigger_and_its_screen_knows_it_from_noise() -> None:
    r = Box().delta((1, 16, 16))
    spec = TERD(iterations=200, batch=64, refinement=0)
    done = spec.defend(exact_at(r), Knowledge(), generator(0, "x"))
    assert isinstance(done.trigger, Tensor) and done.screen is not None
    assert torch.nn.functional.cosine_similarity(done.trigger.flatten(), r.flatten(), dim=0) > 0.99
    assert (done.trigger - r).abs().mean() < 0.05
    assert done.suspicion == pytest.approx((r.square() / 2).mean().item(), rel=0.1)
    clean = inputs(200)
    scores = screened(Verdict(screen_above=done.screen_above, screened={
        "clean": done.screen(clean), "triggered": done.screen(Box().stamp(clean)),
    }))  # fmt: skip
    assert scores["screen_auroc"].value == 1.0 and scores["screen_fpr"].value == 0 and scores["screen_tpr"].value == 1


@pytest.mark.parametrize("k", [0, 1])
def test_a_descent_that_hardly_left_its_start_says_nothing_with_mirrored_starts(k: int) -> None:
    """On an odd denoiser the mirrored starts end in mirror images, so their average is 0 however few the steps are."""
    odd = exact_at(torch.zeros(1, 16, 16), a=0.01)
    few = {"iterations": 5, "batch": 8, "refinement": 0}
    one, two = (TERD(starts=n, **few).defend(odd, Knowledge(), generator(k, "x")) for n in (1, 2))  # type: ignore[arg-type]
    assert one.suspicion is not None and one.suspicion > 0.1  # KL of -U[0, 1) is 1/6
    assert two.suspicion == pytest.approx(0, abs=1e-6)
    assert [each["kl_mean"] for each in two.notes["starts"]] == pytest.approx([one.suspicion] * 2, rel=1e-4)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_trigger_on_either_side_of_zero_draws_both_starts_and_is_seen(side: int) -> None:
    r = side * 0.5 * torch.ones(1, 16, 16)
    few = {"iterations": 60, "batch": 16, "refinement": 0}
    found = TERD(**few).defend(exact_at(r), Knowledge(), generator(0, "x"))  # type: ignore[arg-type]
    assert found.suspicion is not None and found.suspicion > 0.03 and found.flag_above is None
    assert isinstance(found.trigger, Tensor) and side * found.trigger.mean() > 0.25
    assert TERD(**few, flag_above=0.003).defend(exact_at(r), Knowledge(), generator(0, "x")).flag_above == 0.003  # type: ignore[arg-type]


def test_terd_finds_nothing_where_plain_noise_is_answered_best() -> None:
    done = TERD(iterations=200, batch=64, refinement=0).defend(
        exact_at(torch.zeros(1, 16, 16)), Knowledge(), generator(0, "x")
    )
    assert done.suspicion == pytest.approx(0, abs=0.01)


def test_terd_estimates_the_scale_of_the_noise_where_it_is_asked_to() -> None:
    """Without the cubic error the answer is exact for γ' = γ, whatever μ."""
    model = exact_at(torch.zeros(1, 8, 8), gamma=0.6, a=0.0)
    ((found, _),) = TERD(scale=True, scale_lr=0.05, iterations=100).estimated(model, range(1), seed=0)
    torch.testing.assert_close(found.gamma, torch.full((1, 8, 8), 0.6), atol=0.02, rtol=0)


def test_the_reversed_loss_of_a_linear_denoiser_is_its_error_on_the_difference_of_two_noises() -> None:
    """ε(x) = k x with k = 1/2: L = ½ (1 - k σ_t)² ‖ε₁ - ε₂‖², of which the mean is (1 - k σ_t)² C H W."""

    class Half(ExactAt):
        def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
            return SimpleNamespace(sample=x_t / 2)

    model = DiffusionModel(Half(torch.zeros(1, 16, 16)), scheduler())
    zero, one = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    for t in (999, 300):
        ts = torch.full((400,), t)
        value = inversion.reversed_loss(model, torch.zeros(400, 1, 16, 16), ts, zero + 0.3, one, generator(0, "x"))
        assert value.item() == pytest.approx((1 - model.sigma(ts[:1]).item() / 2) ** 2 * 256, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"scale": True}, {"starts": 3}, {"refinement": 2, "sampling_steps": 2}])
def test_terds_starts_that_descend_together_find_what_each_finds_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TERD(**{"iterations": 4, "batch": 4, "refinement": 0, **options})
    together, few = told_by(spec)
    monkeypatch.setattr(inversion, "PIXELS", 1)
    alone, many = told_by(spec)
    assert sum(few) == sum(many) and len(few) == len(many) - 4, "one evaluation for each step of two starts"
    assert together.suspicion == pytest.approx(alone.suspicion, rel=1e-4)
    assert together.features == pytest.approx(alone.features, rel=1e-4)
    assert together.notes["estimation_loss"] == pytest.approx(alone.notes["estimation_loss"], rel=1e-4)
    torch.testing.assert_close(together.trigger, alone.trigger, atol=1e-4, rtol=1e-3)


def test_terds_refinement_follows_the_gradient_through_the_sampler() -> None:
    """The gradient for μ is that of finite differences, with the images' part in it: without it, it is another."""
    model, spec = tiny_unet(), TERD(batch=4, sampling_steps=2, refinement=1)
    mu = -torch.rand((1, 16, 16), generator=generator(1, "mu"))
    one = torch.ones_like(mu)

    def value(mu: Tensor, fixed: Tensor | None = None) -> Tensor:
        rng = generator(2, "loss")
        x_0 = spec.generated(model, terd.Estimate(mu if fixed is None else fixed, one), rng)
        t = inversion.late(model, 4, rng)
        early = torch.full((4,), 5)
        late = inversion.reversed_loss(model, x_0, t, mu, one, rng)
        return late + inversion.reversed_loss(model, x_0, early, 0 * mu, one, rng)

    leaf = mu.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(mu + 0.05 * direction) - value(mu - 0.05 * direction)) / 0.1
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)
    (partial,) = torch.autograd.grad(value(leaf, fixed=mu), leaf)
    assert (partial - gradient).norm() > 0.1 * gradient.norm()


def test_terds_refinement_keeps_a_trigger_that_is_right_and_refuses_variance_that_explodes() -> None:
    r = Box().delta((1, 16, 16))
    done = TERD(iterations=150, batch=32, refinement=10, sampling_steps=2).defend(
        exact_at(r), Knowledge(), generator(0, "x")
    )
    assert isinstance(done.trigger, Tensor)
    assert torch.nn.functional.cosine_similarity(done.trigger.flatten(), r.flatten(), dim=0) > 0.98
    assert len(done.notes["refinement_loss"]) == 10
    with pytest.raises(ValueError, match=r"terd\(refinement=0\)"):
        TERD().defend(tiny_ncsn(), Knowledge(), generator(0, "x"))


def test_divergence_and_likelihood_ratio_are_those_of_normal_distributions() -> None:
    mu, gamma = torch.tensor([[[-1.0, 0.5]]]), torch.tensor([[[0.6, 1.0]]])
    found, normal, plain = (
        terd.Estimate(mu, gamma),
        Normal(mu, gamma),
        Normal(torch.zeros(1, 1, 2), torch.ones(1, 1, 2)),
    )
    torch.testing.assert_close(found.divergence(), torch.distributions.kl_divergence(normal, plain))
    x = torch.randn((5, 1, 1, 2), generator=generator(0, "x"))
    expected = (normal.log_prob(x) - plain.log_prob(x)).flatten(1).sum(1)
    torch.testing.assert_close(found.log_ratio(x), expected)


# ---- disdet ---------------------------------------------------------------------------------------------------------


def test_the_histogram_of_one_value_is_as_far_off_as_its_bin_is_rare() -> None:
    values = torch.tensor([[0.05] * 8, [9.0] * 8], dtype=torch.float64)
    middle = 0.5 * math.erf(0.125 / math.sqrt(2))  # of N(0, 1), between 0 and 1/8
    tail = 0.5 * math.erfc(3.875 / math.sqrt(2))  # above 4 - 1/8
    assert disdet.histogram(values, 64).tolist() == pytest.approx([-math.log(middle), -math.log(tail)])


def test_the_gaussian_discrepancy_is_the_divergence_of_the_fitted_normal() -> None:
    values = torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    expected = torch.distributions.kl_divergence(Normal(2.0, 1.0), Normal(0.0, 1.0))
    assert disdet.gaussian(values).item() == pytest.approx(expected.item()) == pytest.approx(2.0)


@pytest.mark.parametrize("score", ["histogram", "gaussian"])
def test_disdet_separates_boxes_and_not_trojdiffs_small_patch(score: Literal["histogram", "gaussian"]) -> None:
    """At the papers' 32×32 in colour; the trigger is all that differs."""
    model: Any = SimpleNamespace(shape=(3, 32, 32))
    done = DisDet(score=score, draws=400, quantile=0.99).defend(model, Knowledge(), generator(0, "x"))
    assert done.screen is not None and done.screen_above is not None
    clean, other = inputs(300, model.shape), inputs(300, model.shape, "other")
    rate = (done.screen(clean) > done.screen_above).double().mean()
    assert rate < 0.05
    for trigger, low, high in ((Box(size=14), 0.99, 1.0), (Blend(), 0.99, 1.0), (PatchNoise(), 0.4, 0.75)):
        area, _ = statistics.auroc(done.screen(clean).tolist(), done.screen(trigger.stamp(other)).tolist())
        assert low <= area <= high, trigger.name


# ---- ufid -----------------------------------------------------------------------------------------------------------


def test_density_is_the_mean_cosine_over_pairs() -> None:
    """Three features, two alike and one at a right angle: cosines 1, 0, 0."""
    features = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], [[1.0, 1.0]] * 3])
    assert prompt_screening.density(features).tolist() == pytest.approx([1 / 3, 1.0])


def test_copies_are_unit_noise_again_unless_the_trigger_shall_keep_its_size() -> None:
    query = inputs(50, (1, 16, 16))
    plain, loud = UFID(copies=3, strength=2.0, rescale=True), UFID(copies=3, strength=2.0)
    rows = plain.perturbed(query).noise.unflatten(0, (50, 4))
    assert torch.equal(rows[:, 0], query.noise)
    assert rows[:, 1:].var().item() == pytest.approx(1, rel=0.03)
    assert loud.perturbed(query).noise.unflatten(0, (50, 4))[:, 1:].var().item() == pytest.approx(5, rel=0.03)
    shifted = plain.perturbed(query.with_noise(query.noise + 1)).noise.unflatten(0, (50, 4))
    assert (shifted - rows)[:, 1:].mean().item() == pytest.approx(5**-0.5, rel=1e-4)


def test_ufid_flags_inputs_whose_copies_all_give_one_image() -> None:
    """A generator that turns dark noise into one picture and other noise into its own signs."""

    def sample(given: Inputs, sampler: Any) -> Tensor:
        dark = given.noise.mean((1, 2, 3)) < -0.3
        return torch.where(dark.view(-1, 1, 1, 1), torch.ones_like(given.noise), given.noise.sign())

    model: Any = SimpleNamespace(shape=(1, 16, 16), sample=sample)
    done = UFID(queries=300).defend(model, Knowledge(encoder=lambda images: images.flatten(1)), generator(0, "x"))
    assert done.screen is not None and done.screen_above is not None
    clean, triggered = done.screen(inputs(300)), done.screen(Box().stamp(inputs(60, name="other")))
    assert (triggered > 0.9).all() and (triggered > done.screen_above).all()
    assert (clean > done.screen_above).double().mean() < 0.1


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TERD(iterations=2, batch=2, refinement=0),
        DisDet(draws=20),
        UFID(copies=2, queries=2, sampling_steps=2),
        UFID(copies=2, queries=2, sampling_steps=2, sampler="ddpm"),
    ],
    ids=["terd", "disdet", "ufid", "ufid-ddpm"],
)
def test_a_screen_judges_each_input_by_itself(spec: Any) -> None:
    known = Knowledge(encoder=lambda images: images.flatten(1))
    done, again = (spec.defend(tiny_unet(), known, generator(0, "x")) for _ in range(2))
    given = inputs(5)
    together = done.screen(given)
    assert together.shape == (5,) and torch.equal(together, again.screen(given))
    apart = torch.cat([done.screen(given[i : i + 1]) for i in (3, 0, 4, 1, 2)])[[1, 3, 4, 0, 2]]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert spec.delivers == tuple(name for name in ("suspicion", "screen") if getattr(done, name) is not None)


def inputs(n: int, shape: tuple[int, ...] = (1, 16, 16), name: str = "clean") -> Inputs:
    seeds = image_seeds(0, name, n)
    return Inputs(image_noise(seeds, shape), None, seeds)
