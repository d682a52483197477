"""Diff-Cleanse: inversion against a planted trigger, the scores on a network whose answer is known, the whole path."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.methods import inversion, pruning
from harness.types import Data, Knowledge
from plugins.defenses.diff_cleanse import DiffCleanse, Search, balanced, entropy_loss, growth
from plugins.triggers.box import Box
from tests.oracles import PlantedShift, scheduler, tiny_unet

ONE_STEP: dict[str, Any] = {"sampling_steps": 1, "noises": 32, "encoder": "pixels", "entropy": False}
FAST: dict[str, Any] = {
    "sampling_steps": 2, "noises": 4, "iterations": 2, "steps": 2, "batch": 2, "images": 2, "synthetic": 4, "tau": 996,
    "ratio": 0.3, "rounding": "up",
}  # fmt: skip


class Planted(nn.Module):
    """A network that sees the trigger r and nothing else: from x_T one step of DDIM leads to an image of chaos, which
    differs wildly from noise to noise, plus `strength` times what x_T has along r."""

    def __init__(self, r: Tensor, strength: float) -> None:
        super().__init__()
        self.unit = nn.Parameter(r / r.norm(), requires_grad=False)
        self.strength = strength
        self.alpha_bar = scheduler().alphas_cumprod[-1].double()
        self.config = SimpleNamespace(in_channels=r.shape[0], sample_size=r.shape[-1])

    def forward(self, sample: Tensor, timestep: Tensor, **unused: Any) -> UNet2DOutput:
        along = (sample * self.unit).flatten(1).sum(1).view(-1, 1, 1, 1)
        x_0 = 0.3 * (200 * sample).sin() + self.strength * along * self.unit
        eps = (sample.double() - self.alpha_bar.sqrt() * x_0.double()) / (1 - self.alpha_bar).sqrt()
        return UNet2DOutput(sample=eps.float())  # type: ignore[arg-type]


def planted(strength: float) -> tuple[DiffusionModel, Tensor]:
    r = Box(value=1.0).delta((1, 16, 16)) - Box(value=1.0).delta((1, 16, 16)).mean()
    return DiffusionModel(Planted(r, strength), scheduler()), r


def test_the_inversion_recovers_a_planted_trigger_and_says_so_on_noise_it_did_not_see() -> None:
    model, r = planted(1.0)
    notes: dict[str, Any] = {}
    defense = DiffCleanse(**ONE_STEP, kappa=0.6, threshold=0.9, spread=0.1, inversion_lr=0.03, iterations=40)
    found, mscr = defense.inverted(model, Knowledge(), generator(0, "x"), notes)
    assert mscr > 0.9 and torch.nn.functional.cosine_similarity(found.flatten(), r.flatten(), dim=0) > 0.6
    (search,) = notes["searches"]
    assert search["mscr"] == mscr and search["similarity_loss"][-1] < 0.4 < 0.9 < search["similarity_loss"][0]
    assert len(search["similarity_loss"]) == 40  # it went on when the threshold was passed


def test_a_search_that_stops_at_the_threshold_reports_no_more_than_the_threshold() -> None:
    """With the stop, MSCR is that of the first trigger above the threshold; without it, of the last iteration."""
    model, _ = planted(1.0)
    spec = DiffCleanse(**ONE_STEP, kappa=0.6, threshold=0.2, spread=0.1, inversion_lr=0.03, iterations=40)
    scores, lengths = {}, {}
    for stop in (True, False):
        notes: dict[str, Any] = {}
        _, scores[stop] = replace(spec, stop=stop).inverted(model, Knowledge(), generator(0, "x"), notes)
        lengths[stop] = len(notes["searches"][0]["similarity_loss"])
    assert 0.2 < scores[True] < 0.6 < 0.9 < scores[False]
    assert lengths[True] < lengths[False] == 40


def followed(spec: DiffCleanse, images: Tensor) -> Search:
    """A search that saw triggers 0, 1 and 2, whose images form cliques of 1, 3 and 2."""
    search = Search(spec, tiny_unet(), lambda images: images.flatten(1), (0.5, 7.0), generator(0, "x"))
    axes = torch.eye(4)
    for k, rows in enumerate(([0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2])):
        search.follow(torch.full((1, 16, 16), float(k)), images, axes[rows])
    return search


def test_the_best_trigger_of_a_search_is_the_one_with_the_highest_mscr_on_its_noises() -> None:
    search = followed(DiffCleanse(judged="best", noises=4, encoder="pixels"), torch.rand(4, 1, 16, 16))
    assert search.curves["mscr_of_search"] == [0.25, 0.75, 0.5]
    assert (search.best == 1).all() and (search.last == 2).all()


def test_images_outside_the_bounds_are_in_no_clique_if_asked() -> None:
    """Two of three alike images are black: 0 bits, below the bound of 0.5."""
    images = torch.rand((4, 1, 16, 16), generator=generator(1, "x"))
    images[:2] = -1
    spec = DiffCleanse(judged="best", noises=4, within=True, encoder="pixels")
    search = followed(spec, images)
    assert search.curves["mscr_of_search"] == [0.25, 0.25, 0.25] and (search.best == 0).all()
    assert followed(spec, -torch.ones(4, 1, 16, 16)).curves["mscr_of_search"] == [0.25, 0.25, 0.25]


class Steep(nn.Module):
    """A denoiser that is exact for inputs around `centre`: ε(x) = v - v³/10 with v = x - centre."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.centre = nn.Parameter(centre)
        self.config = SimpleNamespace(in_channels=centre.shape[0], sample_size=centre.shape[-1])

    def forward(self, sample: Tensor, timestep: Tensor, **unused: Any) -> UNet2DOutput:
        v = sample - self.centre
        return UNet2DOutput(sample=v - v**3 / 10)  # type: ignore[arg-type]


def test_a_search_can_start_where_terds_loss_draws_mirrored_starts() -> None:
    r = 0.3 * Box(value=1.0, background=0.0).delta((1, 16, 16))
    spec = DiffCleanse(start="terd", start_iterations=20)
    first, second = (
        spec.started(DiffusionModel(Steep(r), scheduler()), Knowledge(), k, generator(0, "x")) for k in (0, 1)
    )
    assert torch.nn.functional.cosine_similarity(first.flatten(), r.flatten(), dim=0) > 0.8
    assert first.abs().max() == 1 and torch.equal(first, -second)


def test_a_search_can_start_where_elijahs_loss_leads() -> None:
    """On a model that answers a shift r with r / 2 the loss leads to r, from either side of 0."""
    r = -Box(value=1.0, background=0.0).delta((1, 16, 16))
    model = DiffusionModel(PlantedShift(r, c=0.5), scheduler())

    def begun(k: int, iterations: int) -> Tensor:
        spec = DiffCleanse(start="elijah", noises=64, start_iterations=iterations)
        return spec.started(model, Knowledge(), k, generator(0, "x"))

    for k in (0, 1):
        assert torch.nn.functional.cosine_similarity(begun(k, 60).flatten(), r.flatten(), dim=0) > 0.5
    assert begun(0, 1).mean() < -0.3 < 0.3 < begun(1, 1).mean()


def test_the_oracle_start_is_half_the_trigger_and_needs_it() -> None:
    spec = DiffCleanse(start="oracle", prune="never")
    assert spec.needs == ("trigger", "encoder")
    begun = spec.started(tiny_unet(), Knowledge(trigger=Box()), 0, generator(0, "x"))
    assert torch.equal(begun, Box().delta((1, 16, 16)) / 2)


def test_bounds_from_data_are_quantiles_of_the_entropy_of_the_clean_images() -> None:
    levels = [torch.linspace(-1, 1, 2**bits).round(decimals=6).repeat(256 // 2**bits) for bits in range(9)]
    grey = torch.stack([((level + 1) / 2 * 255).round() / 255 * 2 - 1 for level in levels]).view(9, 1, 16, 16)
    spec = DiffCleanse(bounds="data", quantiles=(0.25, 0.75), prune="never")
    assert spec.needs == ("encoder", "data")
    assert spec.bounds_of(Knowledge(data=Data(grey))) == pytest.approx((2, 6), abs=0.01)
    assert DiffCleanse().bounds_of(Knowledge()) == (0.1, 8.5)


def test_where_nothing_is_planted_no_search_passes_the_threshold_and_all_restarts_are_used() -> None:
    model, _ = planted(0.0)
    notes: dict[str, Any] = {}
    _, mscr = DiffCleanse(**ONE_STEP, kappa=0.6, iterations=5, restarts=2, stop=True).inverted(
        model, Knowledge(), generator(0, "x"), notes
    )
    assert mscr < 0.2 and [len(each["similarity_loss"]) for each in notes["searches"]] == [5, 5]


def test_one_step_moves_the_trigger_by_the_learning_rate_against_the_mean_gradient_of_the_images() -> None:
    model, _ = planted(1.0)
    defense = DiffCleanse(**ONE_STEP, iterations=1)
    rng, same = generator(0, "x"), generator(0, "x")
    search = Search(defense, model, lambda images: images.flatten(1), (0.1, 8.5), rng)
    fixed, _ = (defense.noise(model, same) for _ in range(2))
    start = torch.randn(model.shape, generator=generator(1, "start"))
    found, _ = search.run(start)
    images = DDIM(steps=1).run(model, fixed.with_noise(fixed.noise + start)).clamp(-1, 1).requires_grad_(True)
    unit = images.flatten(1) / images.flatten(1).norm(dim=1, keepdim=True)
    (1 - (unit @ unit.T).sum() / 32**2).backward()
    assert images.grad is not None
    mean = images.grad.mean(0)
    step = 0.1 * mean / (mean.abs() + 1e-8)  # Adam's first
    assert torch.allclose(found, start - step, atol=1e-4) and not torch.equal(found, start)


def test_through_the_sampler_the_gradient_is_that_of_the_whole_map() -> None:
    model, _ = planted(1.0)
    seen = {}
    for through in ("straight", "sampler"):
        noise = DiffCleanse(**ONE_STEP).noise(model, generator(1, "n"))
        at = torch.zeros(model.shape, requires_grad=True)
        images = inversion.images_of(model, DDIM(steps=1), noise, at, through)
        (seen[through],) = torch.autograd.grad(images.sum(), at)
    assert torch.allclose(seen["straight"], torch.ones(model.shape))
    assert not torch.allclose(seen["sampler"], seen["straight"], atol=0.1)


def test_the_largest_cluster_is_a_set_of_which_every_two_are_alike() -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.1, 2.2])  # 0.3 apart: cosine 0.955; 0.6 apart: 0.825
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert inversion.largest_cluster(features, 0.9) == 3  # 2.0, 2.1, 2.2; a chain 0, 0.3, 0.6 is none
    assert inversion.largest_cluster(features[:3], 0.9) == 2 and inversion.largest_cluster(features[:3], 0.8) == 3
    assert DiffCleanse().mscr(features) == 0.5


def test_entropy_is_that_of_the_grey_levels_in_bits() -> None:
    levels = torch.arange(256.0).view(1, 1, 16, 16) / 255 * 2 - 1
    images = torch.cat([torch.full((1, 1, 16, 16), -1.0), levels, torch.where(levels > 0, 1.0, -1.0)])
    assert inversion.entropy(images).tolist() == pytest.approx([0, 8, 1], abs=1e-3)
    between = torch.full((1, 1, 16, 16), 0.0, requires_grad=True)  # half way between levels 127 and 128
    bits = inversion.entropy(between)
    assert bits.item() == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(torch.autograd.grad(bits.sum(), between)[0]).all()


def test_the_entropy_term_is_as_large_as_the_similarity_term_and_absent_within_its_bounds() -> None:
    l_s, l_e = torch.tensor(0.25), torch.tensor(30.0, requires_grad=True)
    assert balanced(l_s, l_e).item() == pytest.approx(0.5)
    assert torch.autograd.grad(balanced(l_s, l_e), l_e)[0].item() == pytest.approx(0.25 / 30)
    black, digits = torch.full((2, 1, 16, 16), -1.0), torch.rand(2, 1, 16, 16)
    assert entropy_loss(black, (0.1, 8.5)).item() == pytest.approx(0.2)  # 0.1 bits short, twice
    assert entropy_loss(digits, (0.1, 8.5)).item() == 0 < entropy_loss(digits, (0.1, 6.0)).item()


class Diagonal(nn.Module):
    """out_k = a_k x_k, by a hidden channel for each: conv_in is the identity, conv_out has a on its diagonal."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.conv_in, self.conv_out = (nn.Conv2d(len(a), len(a), 1, bias=False) for _ in range(2))
        self.conv_in.weight.data = torch.eye(len(a)).view(len(a), len(a), 1, 1)
        self.conv_out.weight.data = a.diag().view(len(a), len(a), 1, 1)
        self.config = SimpleNamespace(in_channels=len(a), sample_size=4)

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=self.conv_out(self.conv_in(sample)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("score", "gone"), [("difference", 2), ("sum", 1)])
def test_the_score_is_the_difference_of_the_two_importances(score: Any, gone: int) -> None:
    """Channel 1 matters most to all inputs, channel 2 to those with the trigger alone."""
    a, r = torch.tensor([0.3, 0.6, 0.15]), torch.zeros(3, 4, 4)
    r[2] = 4.0
    model = DiffusionModel(Diagonal(a), scheduler())
    spec = DiffCleanse(score=score, tau=996)
    importance = spec.importance(model, torch.zeros(100, 3, 4, 4), r, generator(0, "x"))
    eps = model.draw_eps(100, generator(0, "x"))

    def expected(r: Tensor) -> Tensor:
        slope = torch.zeros(3)
        for t in (996, 997, 998, 999):
            sigma = (1 - scheduler().alphas_cumprod[t]).sqrt()
            x = sigma * eps + (2e-4 + (1 - 2e-4) * t / 999) * r
            slope += (-2 * (eps - a.view(3, 1, 1) * x) * x).sum((2, 3)).mean(0)
        return 2 * (a * slope).abs()  # once for the weight that makes the channel, once for the one that reads it

    clean, backdoored = expected(torch.zeros(3, 4, 4)), expected(r)
    wanted = clean - backdoored if score == "difference" else -(clean + backdoored)
    graph = pruning._graph(model)
    (group,) = graph.get_all_groups(ignored_layers=[model.denoiser.conv_out], root_module_types=[nn.Conv2d])
    found = importance(group)
    assert found is not None and torch.allclose(found, wanted, rtol=1e-4)
    pruning.prune(model, importance, 0.3)
    conv_in: Any = model.denoiser.conv_in
    assert torch.equal(conv_in.weight.flatten(1), torch.eye(3)[[k for k in range(3) if k != gone]])


def test_the_trigger_grows_linearly_to_one_in_the_inputs_that_are_scored() -> None:
    model = tiny_unet()
    assert growth(model, torch.tensor([0, 999])).flatten().tolist() == pytest.approx([2e-4, 1])
    assert growth(model, torch.tensor([500])).item() == pytest.approx(0.5006005)


@pytest.mark.slow
def test_the_whole_defense_delivers_what_it_declares_and_repeats() -> None:
    model = tiny_unet()
    defense = DiffCleanse(**FAST, prune="always")
    assert defense.needs == ("encoder",) and defense.delivers == ("model", "suspicion")
    known = Knowledge(encoder=lambda images: images.flatten(1)[:, ::3])
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    once, again = (defense.defend(model, known, generator(3, "x")) for _ in range(2))
    assert all(torch.equal(before[k], v) for k, v in model.denoiser.state_dict().items())
    assert once.model is not None and again.model is not None
    mine, theirs = (made.denoiser.state_dict() for made in (once.model, again.model))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert once.suspicion == again.suspicion and once.flag_above == 0.5
    assert isinstance(once.trigger, Tensor) and once.trigger.shape == (1, 16, 16)
    assert {"inversion_s", "images_s", "pruning_s", "finetuning_s", "pruned", "searches"} <= set(once.notes)


def test_a_model_that_is_not_flagged_is_left_as_it_is() -> None:
    known = Knowledge(encoder=lambda images: images.flatten(1))
    for prune, delivers in (("flagged", ("model", "suspicion")), ("never", ("suspicion",))):
        defense = DiffCleanse(**FAST, threshold=1.0, prune=prune)  # type: ignore[arg-type]
        done = defense.defend(tiny_unet(), known, generator(0, "x"))
        assert defense.delivers == delivers and done.model is None and done.suspicion is not None


def test_told_the_trigger_it_does_not_search_and_gives_no_verdict() -> None:
    defense = DiffCleanse(**FAST, invert=False)
    assert defense.needs == ("trigger",) and defense.delivers == ("model",)
    done = defense.defend(tiny_unet(), Knowledge(trigger=Box()), generator(0, "x"))
    assert done.model is not None and done.suspicion is None and done.flag_above is None
    assert isinstance(done.trigger, Tensor) and torch.equal(done.trigger, Box().delta((1, 16, 16)))


def test_settings_that_leave_nothing_to_do_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing to do"):
        DiffCleanse(invert=False, prune="never")
    with pytest.raises(ValueError, match="wrong order"):
        DiffCleanse(entropy_bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="use a smaller tau"):
        replace(DiffCleanse(**FAST, invert=False), tau=1000).defend(
            tiny_unet(), Knowledge(trigger=Box()), generator(0, "x")
        )


def test_an_encoder_without_a_gradient_is_refused() -> None:
    known = Knowledge(encoder=lambda images: images.detach().flatten(1))
    with pytest.raises(ValueError, match="gives no gradient"):
        DiffCleanse(**FAST).defend(tiny_unet(), known, generator(0, "x"))


def test_the_judges_features_have_a_gradient_where_the_images_ask_for_one() -> None:
    from harness.judges.classifiers import AttributeCNN, CNNJudge

    judge = CNNJudge("toy", AttributeCNN(1, 16, {"digit": 10}, width=8, dim=4).eval().requires_grad_(False))
    images = torch.rand(2, 1, 16, 16)
    assert not judge.features(images).requires_grad
    assert torch.autograd.grad(judge.features(images.requires_grad_(True)).sum(), images)[0].norm() > 0
