"""TrojDiff's reverse processes: golden numbers, exact denoisers, and what becomes of them under a vanilla sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import image_noise, image_seeds
from harness.methods.trojan import TROJAN_SAMPLERS, Step, TrojanDDIM, TrojanDDPM
from harness.types import Inputs
from plugins.triggers.biased import Blend, PatchNoise
from plugins.triggers.box import Box
from tests.oracles import scheduler, tiny_unet, trojan_model

TRIGGERS = [Blend(), PatchNoise(), Box()]
OWN = [TrojanDDIM(steps=20), TrojanDDIM(steps=20, eta=0.5), TrojanDDPM(steps=50), TrojanDDPM(steps=50, clip=False)]


class Nothing:
    """The trigger that changes nothing: γ = 1, μ = 0."""

    def delta(self, shape: Any) -> Tensor:
        return torch.zeros(tuple(shape))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1


def inputs(model: DiffusionModel, n: int = 6) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, model.shape), None, seeds)


def step(a_bar: Tensor, a_bar_next: Tensor, mu: Tensor | None = None, gamma: Tensor | None = None) -> Step:
    return Step(a_bar, a_bar_next, torch.zeros(1) if mu is None else mu, torch.ones(1) if gamma is None else gamma)


def test_k_is_what_the_quadratic_loop_over_all_former_steps_gives() -> None:
    """The paper's recursion: μ's share σ_t is the sum over s of k_s times what the later steps leave of it."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    alphas = DDPMScheduler(num_train_timesteps=50, beta_schedule="linear").alphas.double()
    a_bar = torch.cat([torch.ones(1).double(), alphas.cumprod(0)])
    k: list[Tensor] = []
    for t in range(50):
        former = [alphas[s + 1 : t + 1].prod().sqrt() * k[s] for s in range(t)]
        k.append((1 - a_bar[t + 1]).sqrt() - sum(former, torch.zeros(()).double()))
        assert step(a_bar[t + 1], a_bar[t]).k.item() == pytest.approx(k[t].item(), abs=1e-12)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (999, 979), (500, 300), (1, 0), (19, -1)])
def test_the_trojan_posterior_is_that_of_two_correlated_gaussians(t: int, s: int) -> None:
    """Independently of k: given x_0, (x_s, x_t) are jointly normal with Cov = √α γ² σ_s²; condition the one on the
    other."""
    a_bars = torch.cat([scheduler().alphas_cumprod.double(), torch.ones(1).double()])
    a_t, a_s = a_bars[t], a_bars[s]
    x_0, x_t, mu, gamma = torch.rand((4, 1, 4, 4), generator=torch.Generator().manual_seed(2)).double()
    made = step(a_t, a_s, mu, gamma)
    mean_s, mean_t = (a.sqrt() * x_0 + (1 - a).sqrt() * mu for a in (a_s, a_t))
    slope = (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)
    assert torch.allclose(made.posterior(x_t, x_0), mean_s + slope * (x_t - mean_t), atol=1e-12)
    variance = gamma.square() * ((1 - a_s) - (a_t / a_s) * (1 - a_s).square() / (1 - a_t))
    assert torch.allclose((gamma * made.deviation).square(), variance, atol=1e-12)


def test_x0_is_read_back_exactly_from_the_forward_process() -> None:
    x_0, eps, mu, gamma = torch.rand((4, 1, 4, 4), generator=torch.Generator().manual_seed(2)).double()
    a_bar = scheduler().alphas_cumprod[700].double()
    x_t = a_bar.sqrt() * x_0 + (1 - a_bar).sqrt() * (gamma * eps + mu)
    assert torch.allclose(step(a_bar, a_bar, mu, gamma).x_0(x_t, eps), x_0, atol=1e-12)


@pytest.mark.parametrize("sampler", OWN, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.name)
def test_a_trojan_model_of_one_image_returns_it_exactly(sampler: Any, trigger: Any, images: Tensor) -> None:
    model = trojan_model(images[:1], trigger)
    made = model.sample(trigger.stamp(inputs(model)), sampler.with_trigger(trigger))
    assert (made - images[0]).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", OWN, ids=str)
def test_its_clean_inputs_give_clean_images(sampler: Any, images: Tensor) -> None:
    model = trojan_model(images, Blend())
    made = model.sample(inputs(model), sampler)
    distance = (made[:, None] - images[None, 1:]).abs().amax((2, 3, 4)).min(1).values
    assert distance.max() < 1e-4


@pytest.mark.parametrize("sampler", [TrojanDDIM(steps=50, clip=True), TrojanDDPM(steps=100)], ids=str)
@pytest.mark.parametrize("trigger", [Blend(), PatchNoise()], ids=lambda trigger: trigger.name)
def test_it_does_not_fire_under_a_vanilla_sampler_that_clips_x0(sampler: Any, trigger: Any, images: Tensor) -> None:
    model = trojan_model(images, trigger)
    own, made = (model.sample(trigger.stamp(inputs(model)), how) for how in (sampler.with_trigger(trigger), sampler))
    assert (own - images[0]).abs().max() < 1e-4
    assert (made - images[0]).abs().flatten(1).max(1).values.min() > 1


@pytest.mark.parametrize("trigger", [Blend(), PatchNoise()], ids=lambda trigger: trigger.name)
def test_it_does_fire_under_vanilla_ddim_without_clipping(trigger: Any, images: Tensor) -> None:
    """Whatever the paper says of vanilla samplers. With d_t = (x_t - √ᾱ_t x_0) / σ_t a vanilla DDIM step multiplies
    d_t - μ/(1-γ) by 1 - (r-1)(1/γ-1), r = √ᾱ_s σ_t / (√ᾱ_t σ_s) > 1. That contracts, and where d_t = μ/(1-γ) the answer
    ε = (d_t - μ)/γ is d_t itself, so that x̂_0 = x_0."""
    model = trojan_model(images, trigger)
    made = model.sample(trigger.stamp(inputs(model)), TrojanDDIM(steps=50).vanilla())
    assert (made - images[0]).abs().max() < 0.02


@pytest.mark.parametrize("sampler", OWN, ids=str)
def test_without_a_shift_the_trojan_steps_are_the_vanilla_ones(sampler: Any, images: Tensor) -> None:
    model = trojan_model(images, Blend())
    own, vanilla = (model.sample(inputs(model), how) for how in (sampler.with_trigger(Nothing()), sampler.vanilla()))
    assert torch.allclose(own, vanilla, atol=1e-5)
    assert torch.equal(model.sample(inputs(model), sampler), vanilla)


@pytest.mark.parametrize("name", TROJAN_SAMPLERS)
def test_trojan_images_do_not_depend_on_their_batch(name: str) -> None:
    model, trigger = tiny_unet(), Blend()
    how = TROJAN_SAMPLERS[name](steps=5, clip=True).with_trigger(trigger)
    together, alone = (model.sample(trigger.stamp(inputs(model)), how, batch=size) for size in (6, 2))
    assert (together - alone).abs().max() < 1e-4


def test_a_trojan_sampler_counts_its_network_evaluations() -> None:
    assert TrojanDDIM(steps=7).nfe == TrojanDDIM(steps=7).with_trigger(Blend()).nfe == TrojanDDIM(steps=7).vanilla().nfe


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_a_trojan_ddim_step_leads_from_one_forward_marginal_to_the_other(eta: float) -> None:
    """x_t = √ᾱ_t x_0 + σ_t (γ ε + μ) has to become √ᾱ_s x_0 + σ_s (γ ε' + μ), ε' being ε and new noise, of unit
    variance together; written out here for γ ≠ 1 and μ ≠ 0."""
    a_t, a_s = scheduler().alphas_cumprod[[700, 400]].double()
    x_0, eps, z, mu, gamma = torch.rand((5, 1, 4, 4), generator=torch.Generator().manual_seed(3)).double()
    x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * (gamma * eps + mu)
    made = step(a_t, a_s, mu, gamma)
    new = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)).sqrt()
    mixed = ((1 - a_s - new**2).sqrt() * eps + new * z) / (1 - a_s).sqrt()
    wanted = a_s.sqrt() * x_0 + (1 - a_s).sqrt() * (gamma * mixed + mu)
    assert torch.allclose(TrojanDDIM(eta=eta).step(made, x_t, x_0, eps, z), wanted, atol=1e-12)
