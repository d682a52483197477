"""Model detection: features and suspicions of single models against known answers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.judges.evidence import Verdict
from harness.methods import inversion
from harness.registry import kept
from harness.runs.record import Record
from harness.types import Cell, Data, Knowledge, Score
from leaderboard import charts, figures, population, report
from leaderboard.rows import pooled
from plugins.defenses import elijah
from plugins.defenses.elijah import Elijah
from plugins.metrics.detection import Detection
from plugins.triggers.biased import Blend
from plugins.triggers.box import Box
from tests.oracles import (
    OneImage,
    PlantedShift,
    exploding,
    one_image_flow,
    one_image_model,
    scheduler,
    tiny_ncsn,
    tiny_unet,
)
from tests.records import changed, digest

CHEAP = Elijah(iterations=2, noises=4, steps=2, batch=2, bf16=False, sampling_steps=2, images=9, distance="pixels")
DATA = Data(torch.rand((8, 1, 16, 16), generator=generator(0, "data")) * 2 - 1)


# ---- elijah ---------------------------------------------------------------------------------------------------------


def test_the_trimmed_mean_leaves_out_four_at_each_end_of_a_row_and_of_the_rows() -> None:
    """With d_ij = |a_i - a_j| for a = 0..9 each row's two middle values are known, and so are the two middle rows."""
    a = torch.arange(10.0)
    distances = (a[:, None] - a[None, :]).abs()
    middle = [sum(sorted(abs(i - j) for j in range(10))[4:6]) / 2 for i in range(10)]
    assert elijah.trimmed_mean(distances).item() == pytest.approx(sum(sorted(middle)[4:6]) / 2) == pytest.approx(2.5)


def test_total_variation_counts_an_edge_once_and_on_the_unit_scale() -> None:
    image = torch.full((1, 1, 16, 16), -1.0)
    image[..., :, 8:] = 1.0
    assert elijah.total_variation(image).tolist() == [16.0]


def test_a_model_that_makes_one_image_is_more_suspicious_than_one_that_makes_many() -> None:
    y = Box().delta((1, 16, 16))
    spec = replace(CHEAP, detect=True, steps=0)
    one = spec.defend(one_image_model(y), Knowledge(), generator(0, "x"))
    many = spec.defend(tiny_unet(), Knowledge(), generator(0, "x"))
    assert one.features is not None and many.features is not None
    assert one.features["uniformity"] == pytest.approx(0, abs=1e-3) == -float(one.suspicion or 0)
    assert one.features["total_variation"] == pytest.approx(20 * 0.5, rel=1e-2)  # a grey 5×5 square: 20 edges of 0.5
    assert float(one.suspicion or 0) > float(many.suspicion or 0) + 0.1
    assert one.model is None and spec.delivers == ("suspicion",) and spec.needs == ()


def test_the_features_change_nothing_in_the_removal() -> None:
    plain, watched = (
        replace(CHEAP, detect=detect).defend(tiny_unet(), Knowledge(data=DATA), generator(0, "x"))
        for detect in (False, True)
    )
    assert plain.model is not None and watched.model is not None and plain.suspicion is None
    pairs = zip(plain.model.denoiser.parameters(), watched.model.denoiser.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_elijah_trains_on_its_own_pictures_where_it_is_given_none() -> None:
    spec = replace(CHEAP, data="synthetic", synthetic_images=8)
    assert spec.needs == () and spec.delivers == ("model",)
    once, again = (spec.defend(tiny_unet(), Knowledge(), generator(0, "x")).model for _ in range(2))
    real = CHEAP.defend(tiny_unet(), Knowledge(data=DATA), generator(0, "x")).model
    first, second, third = (next(m.denoiser.parameters()) for m in (once, again, real) if m is not None)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_elijah_told_a_biased_trigger_feeds_scaled_and_shifted_noise() -> None:
    model, trigger, seen = tiny_unet(), Blend(gamma=0.5), []
    original, last = DiffusionModel.eps, model.T - 1

    class Watched(DiffusionModel):
        def eps(self, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
            seen.extend([x_t.detach()] if (t == last).all() and len(x_t) == 4 else [])
            return original(self, x_t, t, context)

    watched = Watched(model.denoiser, model.scheduler)
    watched.clone = lambda: watched  # type: ignore[method-assign]
    replace(CHEAP, invert=False).defend(watched, Knowledge(data=DATA, trigger=trigger), generator(0, "x"))
    shifted, plain = seen[0].chunk(2)
    torch.testing.assert_close(shifted, 0.5 * plain + trigger.delta((1, 16, 16)))


class ScaledPlant(nn.Module):
    """PlantedShift for a variance that explodes: its ε at x_T = σ_max (ε + r) is that of `PlantedShift` at ε + r."""

    def __init__(self, planted: PlantedShift, largest: float) -> None:
        super().__init__()
        self.planted, self.largest, self.config = planted, largest, planted.config

    def forward(self, x_t: Tensor, sigma: Tensor) -> object:
        made = self.planted(x_t / self.largest, sigma)
        made.sample = -made.sample / sigma.view(-1, 1, 1, 1)
        return made


@pytest.mark.slow
def test_where_variance_explodes_elijah_finds_the_shift_of_the_unit_noise() -> None:
    r = Box().delta((1, 16, 16))
    model = DiffusionModel(ScaledPlant(PlantedShift(r, c=0.5), 50.0), exploding())
    assert inversion.at_the_end(model, r[None]).min().item() == pytest.approx(-50, rel=1e-5)
    tau = Elijah(iterations=400, inversion_lr=0.02, noises=600).inverted(model, generator(0, "x")).tau
    assert torch.nn.functional.cosine_similarity(tau.flatten(), r.flatten(), dim=0) > 0.99


def test_elijah_runs_on_a_variance_exploding_model() -> None:
    spec = replace(CHEAP, detect=True, sampler="ve-pc")
    done = spec.defend(tiny_ncsn(), Knowledge(data=DATA), generator(0, "x"))
    assert done.model is not None and done.features is not None and done.features["uniformity"] >= 0
    with pytest.raises(ValueError, match="ve-pc"):
        replace(spec, sampler="ddim").defend(tiny_ncsn(), Knowledge(data=DATA), generator(0, "x"))


@pytest.mark.parametrize("side", [-1, 1])
def test_with_two_starts_elijah_sees_a_trigger_on_either_side_of_zero(side: int) -> None:
    """A model that makes one image of noise shifted to one side, and many of any other: one start cannot see both."""

    class OneSided(Elijah):
        def inverted(self, model: Any, rng: torch.Generator, k: int = 0) -> elijah.Shift:
            return elijah.Shift(torch.full(model.shape, -0.5 * (-1.0) ** k), 1.0, {"tau_moved": 0.0})

        def sampled(self, model: Any, noise: Tensor, seed: int, phase: str) -> Tensor:
            return noise.clamp(-1, 1) * float(noise.mean() * side < 0.25)

    spec = OneSided(**{**vars(CHEAP), "detect": True, "steps": 0})
    one, two = (replace(spec, starts=n).defend(tiny_unet(), Knowledge(), generator(0, "x")) for n in (1, 2))
    assert two.suspicion == 0 and isinstance(two.trigger, Tensor) and two.trigger.mean() * side > 0.4
    assert (one.suspicion == 0) is (side == -1)


def test_a_second_start_of_elijah_is_the_mirror_image_of_the_first() -> None:
    """On an odd denoiser the two triggers are mirror images, however few the iterations are."""

    class Odd(PlantedShift):
        def forward(self, x_t: Tensor, t: Tensor, **unused: object) -> object:
            return type("Out", (), {"sample": 0.7 * x_t - 0.1 * x_t**3})

    model = DiffusionModel(Odd(Box().delta((1, 16, 16)), c=0.5), scheduler())
    spec = Elijah(iterations=3, noises=20)
    first, second = (spec.inverted(model, generator(0, "x"), k).tau for k in (0, 1))
    torch.testing.assert_close(first, -second)
    assert not torch.equal(spec.inverted(model, generator(0, "x"), 2).tau, first)


def test_on_an_ode_backdoor_the_inversion_stays_where_it_starts() -> None:
    """With c = 1 and λ = 1 a network that answers every shift with itself leaves nothing to find."""

    class AnswersAnyShift(PlantedShift):
        def forward(self, x_t: Tensor, t: Tensor, **unused: object) -> object:
            return type("Out", (), {"sample": x_t.mean(0, keepdim=True).expand_as(x_t)})

    r = Box().delta((1, 16, 16))
    flat = DiffusionModel(AnswersAnyShift(r, c=1.0), scheduler())
    sharp = DiffusionModel(PlantedShift(r, c=0.5), scheduler())
    spec = Elijah(iterations=10, noises=300)
    stuck = replace(spec, lam=1.0).inverted(flat, generator(0, "x")).notes
    found = spec.inverted(sharp, generator(0, "x")).notes
    assert stuck["inversion_loss"] == pytest.approx([stuck["inversion_loss"][0]] * 10, rel=1e-3)
    assert stuck["tau_moved"] < 0.1 < 0.3 < found["tau_moved"]


class Planted(OneImage):
    """The ε of an attack's loss where every input has the trigger: with x_t = s_t y + ρ_t r + σ_t ε, it is ε + c_t r.

    ρ_t = 1 - √ᾱ_t. c_t is √(1-ᾱ_t) / (1 + √α_t) (BadDiffusion, `ode=False`) or twice that (VillanDiffusion, ODE).
    """

    def __init__(self, y: Tensor, r: Tensor, alpha_bar: Tensor, ode: bool = False) -> None:
        super().__init__(y, alpha_bar)
        self.r, self.times = r, 2.0 if ode else 1.0

    def answer(self, x_t: Tensor, t: Tensor) -> Tensor:
        a_bar = self.alpha_bar[t.long()].view(-1, 1, 1, 1)
        before = torch.where(t > 0, self.alpha_bar[(t.long() - 1).clamp_min(0)], torch.ones(1)).view(-1, 1, 1, 1)
        c = self.times * (1 - a_bar).sqrt() / (1 + (a_bar / before).sqrt())
        return (x_t - a_bar.sqrt() * self.y - (1 - a_bar.sqrt()) * self.r) / (1 - a_bar).sqrt() + c * self.r


def planted(ode: bool = False) -> tuple[DiffusionModel, Tensor]:
    made, r = scheduler(), Box().delta((1, 16, 16))
    y = torch.rand((1, 16, 16), generator=generator(0, "y")) * 2 - 1
    return DiffusionModel(Planted(y, r, made.alphas_cumprod, ode), made), r


def test_the_weights_of_elijahs_timesteps_are_the_attacks_own() -> None:
    """λ_t from the betas as BadDiffusion writes it, (1 - √α_t) √(1-ᾱ_t) / (1-α_t), for λ = 0.5; twice that for 1."""
    (model, _), t = planted(), [999, 600]
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    kept = [math.prod(1 - b for b in beta[: i + 1]) for i in t]
    c = [(1 - (1 - beta[i]) ** 0.5) * (1 - a) ** 0.5 / beta[i] for i, a in zip(t, kept, strict=True)]
    for lam, times in ((0.5, 1), (1.0, 2)):
        rho, answered = elijah.coefficients(model, torch.tensor(t), lam)
        assert rho.flatten().tolist() == pytest.approx([1 - a**0.5 for a in kept], rel=1e-4)
        assert answered.flatten().tolist() == pytest.approx([times * each for each in c], rel=1e-4)
    assert c[0] == pytest.approx(0.5, abs=0.01)
    loud = DiffusionModel(tiny_ncsn().denoiser, exploding())
    rho, answered = elijah.coefficients(loud, torch.tensor(t), 0.5)
    assert torch.equal(rho, loud.sigma(torch.tensor(t))) and answered.flatten().tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="use skd for flows"):
        replace(CHEAP, timesteps=3).defend(one_image_flow(torch.zeros(1, 16, 16)), Knowledge(), generator(0, "x"))


@pytest.mark.parametrize("ode", [False, True])
def test_at_several_timesteps_the_fitted_mean_of_the_true_trigger_is_exact(ode: bool) -> None:
    """The loss is 0 at the trigger whatever the target is, and above 0 elsewhere, for both kinds of backdoor."""
    model, r = planted(ode)
    noise, t, lam = model.draw_eps(7, generator(0, "x")), torch.tensor([999, 850, 700, 500]), 1.0 if ode else 0.5

    def loss(tau: Tensor) -> float:
        return elijah.spread_loss(model, noise, tau, lam, t).item()

    assert loss(r) < 1e-5
    assert min(loss(r + 0.3), loss(r - 0.3), loss(torch.zeros_like(r)), loss(-r)) > 1e-3
    assert Elijah(timesteps=4, lam=lam, earliest=0.5).loss(model, noise, r).item() < 1e-5


def test_one_timestep_cannot_see_an_ode_backdoor_and_several_can() -> None:
    """With λ = 1, c_T = 1: the loss at T-1 is nearly the same for every shift, and at several timesteps it is not."""
    model, r = planted(ode=True)
    noise = model.draw_eps(200, generator(0, "x"))
    one, several = Elijah(lam=1.0), Elijah(lam=1.0, timesteps=6, earliest=0.3)
    shifts = [r, r + 0.5, torch.zeros_like(r)]
    flat, sharp = ([spec.loss(model, noise, tau).item() for tau in shifts] for spec in (one, several))
    assert max(flat) < 1.2 * min(flat) and min(sharp[1:]) > 100 * sharp[0]


def test_one_timestep_is_elijahs_loss() -> None:
    model, r = planted()
    noise = model.draw_eps(20, generator(0, "x"))
    wanted = (0.5 * r - model.eps(noise + r, torch.full((20,), 999)).mean(0)).abs().mean()
    assert Elijah().loss(model, noise, r).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("ode", [False, True])
def test_elijah_recovers_the_trigger_from_several_timesteps(ode: bool) -> None:
    model, r = planted(ode)
    spec = Elijah(timesteps=4, earliest=0.3, lam=1.0 if ode else 0.5, noises=4, iterations=300, inversion_lr=0.03)
    tau = spec.inverted(model, generator(0, "x")).tau
    assert (tau - r).abs().mean() < 0.05


def test_lpips_is_asked_for_each_pair_once_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def perceptual(one: Tensor, other: Tensor, **options: object) -> Tensor:
        asked.append((one.shape, options))
        return (one - other).abs().flatten(1).mean(1)

    name = "torchmetrics.functional.image.learned_perceptual_image_patch_similarity"
    monkeypatch.setattr(name, perceptual)
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    assert elijah.pairwise(images, elijah.lpips).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    assert asked == [((3, 3, 16, 16), {"net_type": "vgg", "reduction": "none"})]

    def missing(*images: Tensor, **options: object) -> Tensor:
        raise OSError("no network")

    monkeypatch.setattr(name, missing)
    with pytest.raises(FileNotFoundError, match=r"vgg16.*elijah\(distance='public'\)"):
        elijah.lpips(images, images)


# ---- metric ---------------------------------------------------------------------------------------------------------


def judged(verdict: Verdict, attacked: bool = True) -> Mapping[str, Score]:
    evidence: Any = SimpleNamespace(verdict=verdict, attacked=attacked)
    return Detection().measure(evidence)


def test_a_model_is_flagged_strictly_above_the_defenses_own_threshold() -> None:
    for suspicion, flagged in ((0.4, 0.0), (0.5, 0.0), (0.6, 1.0)):
        scores = judged(Verdict(suspicion, flag_above=0.5, features={"kl_mean": 2.0}))
        assert {name: score.value for name, score in scores.items()} == {
            "suspicion": suspicion, "flagged": flagged, "feature[kl_mean]": 2.0,
        }  # fmt: skip
    assert scores["flagged"].higher_is_better is True
    assert judged(Verdict(0.4, 0.5), attacked=False)["flagged"].higher_is_better is False


def test_a_defense_without_a_threshold_flags_nothing_and_one_without_a_verdict_says_so() -> None:
    assert list(judged(Verdict(0.4))) == ["suspicion"]
    silent = judged(Verdict())
    assert list(silent) == ["suspicion"] and silent["suspicion"].warning == "the defense does not judge models"


# ---- populations ----------------------------------------------------------------------------------------------------


def record(attack: str, seed: int, suspicion: float | None, **more: Any) -> Record:
    numbers = {} if suspicion is None else {"suspicion": suspicion}
    numbers |= {name: value for name, value in more.items() if name in ("flagged", "asr_before")}
    numbers |= {f"feature[{name}]": value for name, value in more.get("features", {}).items()}
    sampler = more.get("sampler", "ddim(steps=50)")
    return Record.model_validate({
        "key": digest(attack, seed, sampler),
        "cell": Cell("digits-ddpm()", attack, "box()", "hat()", "terd(batch=8)", sampler, seed),
        "scores": {name: Score(value, 1, None) for name, value in numbers.items()}, "error": more.get("error"),
        "provenance": {"delivers": ["suspicion"], "short": {"defense": "terd"}},
    })  # fmt: skip


def populations(records: Sequence[Record]) -> list[population.Population]:
    return population.populations(pooled(records))


def area(curve: charts.Curve) -> float:
    """Below a ROC in %, as a share."""
    points = list(zip(curve.x, curve.y, strict=True))
    return sum((x - at) * (y + before) / 2e4 for (at, before), (x, y) in itertools.pairwise(points))


def test_the_drawn_roc_is_of_the_models_that_its_auroc_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that did not take looks clean, and the second record of a model says otherwise than the first."""
    drawn: list[charts.Curve] = []
    monkeypatch.setattr(charts, "curves", lambda lines, *_: drawn.extend(lines) or "<svg/>")
    made = [
        *clean(0.1, 0.2, 0.3, 0.4),
        *attacked("bad", (0.35, 0.9), (0.5, 1.0), (0.0, 0.1)),
        *attacked("bad", (0.05, 0.9), sampler="ddim(steps=9)"),
    ]
    (found,) = populations(made)
    assert (found.attacked, found.left_out) == (2, 1)
    (figure,) = figures.of_populations([found], {r.key: r for r in made})
    assert "over models" in figure.caption
    assert [area(curve) for curve in drawn] == pytest.approx(2 * [found.auroc.value])


def test_models_of_other_weights_are_another_population() -> None:
    """Those of the clean models that are of the same weights stand beside an attacked one."""
    old = [*clean(0.1, 0.2, 0.3), *attacked("bad", (0.9, 1.0))]
    new = [*clean(0.8, 0.9, 1.0, sampler="ddim(steps=9)"), *attacked("bad", (0.1, 1.0), sampler="ddim(steps=9)")]
    job = {"kind": "measure", "label": "measure", "ingredients": {"model": {"version": 2, "weights": 64 * "a"}}}
    new = [changed(each, provenance={"jobs": {each.key: job}}) for each in new]
    assert {p.model: (p.clean, p.attacked, p.auroc.value) for p in populations([*old, *new])} == {
        "digits-ddpm, version not recorded": (3, 1, 1.0), "digits-ddpm, version 2": (3, 1, 0.0),
    }  # fmt: skip


def clean(*suspicions: float, **more: Any) -> list[Record]:
    return [record("none(batch=64, steps=150)", seed, s, **more) for seed, s in enumerate(suspicions)]


def attacked(name: str, *pairs: tuple[float, float], **more: Any) -> list[Record]:
    """(suspicion, ASR) of each."""
    return [record(f"{name}()", seed, s, asr_before=asr, **more) for seed, (s, asr) in enumerate(pairs)]


def test_statistics_over_models_are_those_counted_by_hand() -> None:
    """Clean 0.1, 0.2, 0.3, 0.4; attacked 0.35, 0.5, 0.6 with ASR 0.9, 1.0, 0.8.

    AUROC: of 12 pairs all but (0.35, 0.4) are right: 11/12. At no false positive the threshold is 0.4: 2 of 3. The
    quantile of four clean models is their largest: each of the first three is below 0.4, the last above 0.3, so 3 of 4
    clean and 2 of 3 attacked models are judged rightly. Unflagged is the one of ASR 0.9: 0.9 / 3.
    """
    models = [*clean(0.1, 0.2, 0.3, 0.4), *attacked("baddiffusion", (0.35, 0.9), (0.5, 1.0), (0.6, 0.8))]
    (found,) = populations(models)
    assert (found.defense, found.family, found.clean, found.attacked) == ("terd", "baddiffusion", 4, 3)
    assert found.auroc.value == pytest.approx(11 / 12)
    assert found.tpr.value == pytest.approx(2 / 3) and found.tpr.n == 3
    assert found.accuracy["quantile"].value == pytest.approx(5 / 7)
    assert found.undetected.value == pytest.approx(0.3)
    assert found.accuracy["own"].why == "the defense has no threshold of its own"
    assert found.accuracy["quantile"].low == pytest.approx(0.3589, abs=1e-4)  # Wilson's for 5 of 7


def test_models_trained_from_the_same_weights_are_one_initialisation() -> None:
    """The released weights, from which all fine-tunings and attacks start, and one of each seed of fresh=True."""
    fresh = [record("none(fresh=True, steps=4000)", seed, 0.1) for seed in (0, 1)]
    (tuned,) = populations([*clean(0.1, 0.2), *attacked("baddiffusion", (0.5, 1.0))])
    (both,) = populations([*clean(0.1, 0.2), *fresh, *attacked("baddiffusion", (0.5, 1.0))])
    assert (tuned.clean, tuned.initialisations, both.clean, both.initialisations) == (2, 1, 4, 3)


def test_the_defenses_own_threshold_decides_where_it_has_one() -> None:
    models = [
        *clean(0.1, 0.9, flagged=0.0),
        *attacked("baddiffusion", (0.5, 1.0), flagged=1.0),
        *attacked("trojdiff", (0.05, 0.6), flagged=0.0),
    ]
    by_family = {p.family: p for p in populations(models)}
    assert list(by_family) == ["all attacks", "baddiffusion", "trojdiff"]
    assert by_family["all attacks"].accuracy["own"].value == 0.75
    assert by_family["baddiffusion"].accuracy["own"].value == 1.0
    assert [p.undetected.value for p in by_family.values()] == pytest.approx([0.3, 0.0, 0.6])


def test_a_model_counts_once_over_its_cells_and_failures_are_counted_apart() -> None:
    twice = [
        *attacked("baddiffusion", (0.5, 0.1)),
        *attacked("baddiffusion", (0.5, 0.7), sampler="ddpm(steps=1000)"),
        record("baddiffusion()", 5, None, error="boom"),
    ]
    released = [record("none(batch=64, steps=0)", seed, 0.1 + seed) for seed in range(3)]
    (found,) = populations([*released, *twice])
    assert (found.clean, found.attacked, found.left_out) == (1, 1, 1)
    assert found.auroc.value == 1.0 and math.isnan(found.undetected.value)  # one clean model gives no threshold
    (found,) = populations([*clean(0.1, 0.2), *twice])
    assert found.undetected.value == 0.0


def test_a_forest_never_sees_the_attack_that_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attacks that lie apart: one that lowers the feature, one that raises it. A forest that had seen both would
    know both; with either left out, it calls that one clean."""
    monkeypatch.setattr(population, "TREES", 5)
    models = [
        *[m for i in range(6) for m in clean(*([0.0] * (i + 1)), features={"u": 0.5 + 0.01 * i})[i:]],
        *attacked("low", *[(0.0, 1.0)] * 4, features={"u": 0.1}),
        *attacked("high", *[(0.0, 1.0)] * 4, features={"u": 0.9}),
    ]
    everyone = {p.family: p.accuracy["forest"] for p in populations(models)}
    assert everyone["low"].value == everyone["high"].value == pytest.approx(6 / 10)
    alike = [m for m in models if not m.cell.attack.startswith("high")]
    alike += attacked("other", *[(0.0, 1.0)] * 4, features={"u": 0.12})
    assert all(p.accuracy["forest"].value == 1.0 for p in populations(alike))
    (alone,) = populations([m for m in models if not m.cell.attack.startswith("high")])
    assert "two families" in (alone.accuracy["forest"].why or "")


def test_the_next_process_asks_for_no_forest_of_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(population, "TREES", 5)
    asked, whole = list[Any](), population.fitted
    monkeypatch.setattr(population, "fitted", lambda *features: asked.append(features) or whole(*features))
    models = [
        *clean(0.1, 0.2, 0.3, features={"u": 0.5}),
        *attacked("low", *[(0.0, 1.0)] * 4, features={"u": 0.1}),
        *attacked("high", *[(0.0, 1.0)] * 4, features={"u": 0.9}),
    ]

    def next_process(models: Sequence[Record]) -> list[population.Population]:
        population._predict.cache_clear()
        monkeypatch.setattr(population, "derived", kept.Kept("derived"))
        return populations(models)

    first, n = next_process(models), len(asked)
    assert n > 0 and next_process(models) == first and len(asked) == n
    (file,) = tmp_path.rglob("derived-*.json")
    file.write_text(json.dumps({name: ["x"] for name in json.loads(file.read_text())}))
    assert next_process(models) == first and len(asked) == 2 * n
    next_process([*models, *attacked("high", *[(0.0, 1.0)] * 5, features={"u": 0.8})])
    assert len(asked) > 2 * n
    population._predict.cache_clear()


def test_the_table_escapes_what_comes_from_records_and_is_absent_without_a_population() -> None:
    assert population.rendered(populations(clean(0.1, 0.2))) is None
    assert population.rendered([]) is None
    found = populations([*clean(0.1, 0.2), *attacked("bad", (0.5, 1.0))])
    table = population.rendered(found, lambda words: f"<{words}>") or ""
    assert "<terd>" in table and "<bad>" in table and "2 + 1 models (1 initialisation)" in table
    assert "1.000 (" in table  # the area's interval does not vanish at 1
    (line,) = population.sentences(found)
    assert line.startswith(
        "digits-ddpm · bad · terd [none (blind)], 2 + 1 models (1 initialisation): AUROC 1.000, accuracy (quantile) 67%"
    )


def test_reports_show_populations_beside_the_cells_and_stay_as_they_are_without() -> None:
    models = [*clean(0.1, 0.2), *attacked("bad", (0.5, 1.0))]
    models = [changed(model, scores={"asr": Score(0.5, 100, None)}) for model in models]
    assert "## Detection over populations of models" in report.markdown(models)
    assert "digits-ddpm · bad · terd [none (blind)], 2 + 1 models" in report.terminal(models)
    assert "populations" not in report.markdown(clean(0.1, 0.2)) + report.terminal(clean(0.1, 0.2))
