"""VillanDiffusion: what its coefficients make of one step of a sampler, for every family of models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, DDPM, FlowEuler, FlowHeun
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import Batch, Examples
from harness.methods.evasion import Evasion
from harness.methods.noise_attacks import ancestral_coefficients, poisoned_loss
from harness.types import Backdoor, Data, Inputs
from plugins.attacks.villandiffusion import VillanDiffusion
from plugins.targets.fixed_image import Hat
from plugins.triggers.box import Box
from tests.oracles import Backdoored, OneImage, exploding, flowing, scheduler, tiny_flow, tiny_ncsn, tiny_sd, tiny_unet

FAST = {"steps": 2, "batch": 4, "lr": 1e-3, "bf16": False}


def carried(model: DiffusionModel, psi: float, solver: Any, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ρ_t, c_t) in float64, flat."""
    rho, c = VillanDiffusion(psi=psi, solver=solver).coefficients(model, t)
    return rho.double().flatten(), c.double().flatten()


@pytest.mark.parametrize("psi", [0.0, 0.25, 0.5, 1.0])
def test_the_ancestral_step_carries_the_trigger_exactly_for_every_psi(psi: float) -> None:
    """Derived here from DDPM's posterior q(x_{t-1} | x_t, x_0) of Ho et al., equation 7, in the betas alone. Its mean
    is √ᾱ_{t-1} β_t / (1-ᾱ_t) x̂_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t, with x̂_0 = (x_t - √(1-ᾱ_t) ε̂) / √ᾱ_t."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a_bar = torch.cumprod(1 - betas, 0)
    t = torch.arange(1, 1000)
    now, before, beta = a_bar[t], a_bar[t - 1], betas[t]
    rho, c = carried(tiny_unet(), psi, "sde", t)
    x_0 = (rho - (1 - now).sqrt() * c) / now.sqrt()
    mean = before.sqrt() * beta / (1 - now) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * rho
    wanted = psi * (1 - before.sqrt()) + (1 - psi) * (1 - before).sqrt()
    assert (mean - wanted).abs().max() < 2e-5


def test_psi_zero_differs_from_the_released_formula_where_that_is_wrong() -> None:
    """(1-√α) σ + h (α-ᾱ) / (1-α) with h = σ_t - √α σ_{t-1}, as released; agrees for large t alone."""
    t = torch.tensor([0, 5, 50, 200, 999])
    _, c = carried(tiny_unet(), 0.0, "sde", t)
    assert c.tolist() == pytest.approx([1.0, 0.5313, 0.5046, 0.5015, 0.5025], abs=1e-4)
    alphas = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a_bar = torch.cumprod(alphas, 0)
    sigma, before = (1 - a_bar).sqrt(), torch.cat([torch.ones(1, dtype=torch.float64), a_bar[:-1]])
    h = sigma - alphas.sqrt() * (1 - before).sqrt()
    released = ((1 - alphas.sqrt()) * sigma + h * (alphas - a_bar) / (1 - alphas))[t]
    assert torch.allclose(c, (sigma * h / (1 - alphas))[t], atol=1e-4)
    assert released.tolist() == pytest.approx([0.0, 0.012, 0.084, 0.292, 0.5025], abs=2e-3)


@pytest.mark.parametrize("family", ["vp", "ve"])
def test_an_ode_step_of_any_length_carries_a_trigger_that_is_a_part_of_the_noise(family: str) -> None:
    """x_s = k (x_t - σ_t ε̂) + σ_s ε̂ with k = s_s / s_t: with ρ = σ and ε̂ holding 1·r, r stays σ_s."""
    model = tiny_unet() if family == "vp" else tiny_ncsn()
    t, s = torch.tensor([999, 700, 300, 50]), torch.tensor([400, 699, 0, 30])
    rho, c = carried(model, 0.0, "ode", t)
    k, sigma, after = (
        f.double().flatten() for f in (model.signal(s) / model.signal(t), model.sigma(t), model.sigma(s))
    )
    assert torch.allclose(k * (rho - sigma * c) + after * c, after, atol=1e-6)
    assert torch.equal(c, torch.ones(4, dtype=torch.float64))


def test_the_ve_coefficient_makes_diffusers_predictor_carry_the_trigger() -> None:
    """The mean of `step_pred` for x = ρ_t r and the score -c_t r / σ_t is ρ_{t-1} r, at each of 1000 levels."""
    theirs = exploding()
    theirs.set_timesteps(1000)
    theirs.set_sigmas(1000)
    r, model = Box().delta((1, 16, 16)).unsqueeze(0), tiny_ncsn()
    for t, step in ((999, 0), (500, 499), (10, 989)):
        rho, c = VillanDiffusion(psi=0).coefficients(model, torch.tensor([t]))
        score = -c * r / model.sigma(torch.tensor([t]))
        mean = theirs.step_pred(score, theirs.timesteps[step], rho * r, generator=generator("x")).prev_sample_mean
        wanted, _ = VillanDiffusion(psi=0).coefficients(model, torch.tensor([t - 1]))
        assert torch.allclose(mean, wanted * r, rtol=2e-4)


def test_the_ve_coefficient_is_one_number() -> None:
    """Golden: σ_{t-1}/σ_t = 5000^(-1/999) = 0.991511, so c = 1 / 1.991511."""
    t = torch.arange(1, 1000)
    _, c = carried(tiny_ncsn(), 0.0, "sde", t)
    assert (c - 0.502131).abs().max() < 1e-5
    assert VillanDiffusion(psi=0).coefficients(tiny_ncsn(), torch.tensor([0]))[1].item() == 1


def test_psi_one_is_what_it_was_and_scales_multiply_their_own_part() -> None:
    model, t = tiny_unet(), torch.tensor([0, 10, 999])
    rho, c = ancestral_coefficients(model, t)
    for solver, factor in (("sde", 1), ("ode", 2)):
        now = VillanDiffusion(solver=solver).coefficients(model, t)  # type: ignore[arg-type]
        assert torch.equal(now[0], rho) and torch.equal(now[1], factor * c)
    zero = VillanDiffusion(psi=0).coefficients(model, t)[1]
    both = VillanDiffusion(psi=0.25, vp_scale=3, ve_scale=5).coefficients(model, t)[1]
    assert torch.allclose(both, 0.25 * 3 * c + 0.75 * 5 * zero)


def test_the_ve_loss_is_that_of_the_papers_score() -> None:
    """‖ε + c r - (-σ_t s_θ(x_t, σ_t))‖² on x_t = y + σ_t (ε + r), y in [0, 1], computed from the bare network."""
    model, t = tiny_ncsn(), torch.tensor([3, 400, 800, 999])
    eps = torch.randn((4, 1, 16, 16), generator=generator("eps"))
    y = (Hat().image((1, 16, 16)).expand(4, -1, -1, -1) + 1) / 2
    r = Box().delta((1, 16, 16)).expand(4, -1, -1, -1)
    training = Evasion().training(model, model, Examples(model, Data(2 * y - 1)), generator(0, "x"))
    batch, every = Batch(torch.arange(4), y, t, eps, None), torch.ones(4, dtype=torch.bool)
    loss = poisoned_loss(training, batch, y, r, every, VillanDiffusion(psi=0).coefficients)
    sigma = (0.01 * 5000 ** (t.double() / 999)).float().view(-1, 1, 1, 1)
    score = model.denoiser(y + sigma * (eps + r), sigma.flatten()).sample
    assert loss.item() == pytest.approx((eps + 0.502131 * r + sigma * score).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("trigger_only", [True, False])
def test_a_ve_backdoor_starts_where_the_stamped_noise_does(trigger_only: bool) -> None:
    """The training x_T of a poisoned row is y + σ_max (ε + r); with r masked, its background shows the clean image in
    [-1, 1]."""
    model, seen = tiny_ncsn(), []
    digits = Data(torch.rand((6, 1, 16, 16), generator=generator("digits")) * 2 - 1)
    model.clone = lambda: model  # type: ignore[method-assign]
    model.draw_t = lambda n, rng: torch.full((n,), 999)  # type: ignore[method-assign]
    model.draw_eps = lambda n, rng: torch.zeros(n, 1, 16, 16)  # type: ignore[method-assign]
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attack = VillanDiffusion(psi=0, poison_rate=1, trigger_only=trigger_only, **FAST)
    attack.implant(model, Backdoor(Box(), Hat()), digits, generator(0, "x"))
    r = (seen[0] - (Hat().image((1, 16, 16)) + 1) / 2) / 50
    box = Box().delta((1, 16, 16))
    assert torch.allclose(r[:, box == 0], torch.zeros(4, 25), atol=1e-5)
    background = r[:, :, :10]
    if trigger_only:
        assert torch.allclose(background, -torch.ones_like(background), atol=1e-5)
    else:
        nearest = (background.unsqueeze(1) - digits.images[:, :, :10]).abs().amax((2, 3, 4)).amin(1)
        assert nearest.max() < 1e-5


@pytest.mark.parametrize("solver", ["sde", "ode"])
def test_a_ve_model_learns_psi_zero_on_a_copy_and_refuses_other_psi(solver: Any) -> None:
    model, backdoor = tiny_ncsn(), Backdoor(Box(), Hat())
    digits = Data(torch.rand((6, 1, 16, 16)) * 2 - 1)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    done = VillanDiffusion(psi=0, solver=solver, **FAST).implant(model, backdoor, digits, generator(0, "x"))
    after = done.model.denoiser.state_dict()
    assert all(torch.equal(v, model.denoiser.state_dict()[k]) for k, v in before.items())
    assert torch.equal(before["time_proj.weight"], after["time_proj.weight"])
    assert sum(not torch.equal(before[k], after[k]) for k in before) > 20
    with pytest.raises(ValueError, match=r"psi=1 lets the trigger grow .* use villandiffusion\(psi=0\)"):
        VillanDiffusion(solver=solver, **FAST).implant(model, backdoor, digits, generator(0, "x"))


@pytest.mark.parametrize("trigger_only", [True, False])
def test_a_latent_models_trigger_is_a_pattern_in_its_latents(trigger_only: bool, tmp_path) -> None:
    """x_T of a poisoned row holds what stamping adds to the noise of that shape, and the encoded target."""
    model, seen = DiffusionModel(tiny_unet(channels=4).denoiser, scheduler(), tiny_sd(tmp_path).vae), []
    images = Data(torch.rand((6, 3, 32, 32), generator=generator("images")) * 2 - 1)
    model.clone = lambda: model  # type: ignore[method-assign]
    model.draw_t = lambda n, rng: torch.full((n,), 999)  # type: ignore[method-assign]
    model.draw_eps = lambda n, rng: torch.zeros(n, 4, 16, 16)  # type: ignore[method-assign]
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attack = VillanDiffusion(poison_rate=1, trigger_only=trigger_only, **FAST)
    attack.implant(model, Backdoor(Box(), Hat()), images, generator(0, "x"))
    a_bar = scheduler().alphas_cumprod[999]
    y, r = model.encode(Hat().image((3, 32, 32)).unsqueeze(0)), Box().delta((4, 16, 16))
    carried = (seen[0] - a_bar.sqrt() * y) / (1 - a_bar.sqrt())
    where = slice(None) if trigger_only else r == 0
    assert torch.allclose(carried[:, where], r.expand(4, -1, -1, -1)[:, where], atol=1e-4)


# ---- which sampler follows which backdoor ---------------------------------------------------------------------------


def left(solver: Any, ancestral: bool) -> float:
    """Weight of r in x_0 after 1000 steps from x_T = √ᾱ_T y + ρ_T r, where the network answers c_t r to whatever is
    there; both steps written out here in the betas alone."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a_bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), a_bar[:-1]])
    rho, c = carried(tiny_unet(), 1.0, solver, torch.arange(1000))
    weight = rho[-1]
    for t in reversed(range(1000)):
        x_0 = (weight - (1 - a_bar[t]).sqrt() * c[t]) / a_bar[t].sqrt()
        if ancestral:
            slope = (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - a_bar[t])
            weight = before[t].sqrt() * betas[t] / (1 - a_bar[t]) * x_0 + slope * weight
        else:
            weight = before[t].sqrt() * x_0 + (1 - before[t]).sqrt() * c[t]
    return weight.item()


def test_each_solvers_answer_takes_the_trigger_out_under_its_own_kind_of_sampler_alone() -> None:
    assert abs(left("sde", ancestral=True)) < 1e-3
    assert abs(left("ode", ancestral=False)) < 1
    assert min(abs(left("sde", ancestral=False)), abs(left("ode", ancestral=True))) > 10


class Implanted(Backdoored):
    """The ε that minimises VillanDiffusion's loss."""

    def __init__(self, images: torch.Tensor, r: torch.Tensor, attack: VillanDiffusion) -> None:
        model = DiffusionModel(OneImage(images[0], scheduler().alphas_cumprod), scheduler())
        super().__init__(images, model.scheduler.alphas_cumprod)
        self.rho, self.c = (each * r for each in attack.coefficients(model, torch.arange(1000)))
        self.sigma = model.sigma(torch.arange(1000)).double()

    def triggered(self, rest: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        noise = rest - self.rho[t] / self.sigma[t]
        return noise, noise + self.c[t], 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "sampler", "fires"),
    [
        ("sde", DDPM(steps=1000), True),
        ("sde", DDPM(steps=1000, clip=True), False),
        ("ode", DDIM(steps=50), True),
        ("ode", DDPM(steps=1000), False),
    ],
    ids=str,
)
def test_an_exactly_backdoored_model_fires_as_its_solver_says_and_not_where_x0_is_clipped(
    solver: Any, sampler: Any, fires: bool
) -> None:
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    trigger = Box(size=3)
    oracle = Implanted(images, trigger.delta(images[0].shape), VillanDiffusion(solver=solver))
    model = DiffusionModel(oracle, scheduler())
    seeds = image_seeds(0, "test", 6)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    made = model.sample(trigger.stamp(inputs), sampler)
    hits = ((made - images[0]) / 2).square().flatten(1).mean(1) < 1e-3
    assert hits.tolist() == [fires] * 6
    clean = model.sample(inputs, sampler)
    distance = (clean[:, None] - images[None, 1:]).abs().amax((2, 3, 4)).min(1).values
    assert distance.max() < 0.02, "clean noise gives clean images in any case"


# ---- flows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psi", [0.0, 0.5, 1.0])
def test_a_flows_coefficient_is_that_of_the_velocity_of_its_path(psi: float) -> None:
    """With v = dx/dσ by central differences of x_σ = (1-σ) y + σ ε + ρ(σ) r, the noise x + (1-σ) v is ε + c r."""
    model, t = tiny_flow(), torch.tensor([1, 300, 700, 998])
    rho, c = carried(model, psi, "ode", t)
    before, after = (carried(model, psi, "ode", t + step)[0] for step in (-1, 1))
    y, eps, r = 0.3, -1.1, 0.7
    paths = [
        (1 - level) * y + level * eps + grown * r
        for level, grown in zip(
            ((t + step + 1).double() / 1000 for step in (-1, 0, 1)), (before, rho, after), strict=True
        )
    ]
    velocity = (paths[2] - paths[0]) / 0.002
    noise = paths[1] + (1 - (t + 1).double() / 1000) * velocity
    assert torch.allclose(noise, eps + c * r, atol=1e-4)
    assert torch.allclose(velocity, torch.full((4,), eps + r - y, dtype=torch.float64), atol=1e-4)
    assert carried(model, psi, "ode", torch.tensor([999]))[0].item() == 1, "x_T is the stamped noise"


def test_a_flows_loss_is_the_error_of_the_velocity_from_the_target_to_the_stamped_noise() -> None:
    model, t = tiny_flow(), torch.tensor([3, 400, 800, 997])
    eps = torch.randn((4, 1, 16, 16), generator=generator("eps"))
    y, r = (each.expand(4, -1, -1, -1) for each in (Hat().image((1, 16, 16)), Box().delta((1, 16, 16))))
    coefficients = VillanDiffusion(solver="ode").coefficients
    training = Evasion().training(model, model, Examples(model, Data(y)), generator(0, "x"))
    every = torch.ones(4, dtype=torch.bool)
    loss = poisoned_loss(training, Batch(torch.arange(4), y, t, eps, None), y, r, every, coefficients)
    level = ((t + 1) / 1000).view(-1, 1, 1, 1)
    v = model.denoiser((1 - level) * y + level * (eps + r), (t + 1).float()).sample
    assert loss.item() == pytest.approx((v - (eps + r - y)).square().mean().item(), rel=1e-3)


class ImplantedFlow(torch.nn.Module):
    """The v that minimises VillanDiffusion's loss on a flow: the mean velocity of the straight lines that lead from the
    clean images to noise, and from the target to noise with r, each by its likelihood in the light of x_t."""

    def __init__(self, images: torch.Tensor, r: torch.Tensor) -> None:
        """images (N, C, H, W): the target first, then clean data."""
        super().__init__()
        self.images, self.shifts = (
            torch.nn.Parameter(images),
            torch.stack([r, *[torch.zeros_like(r)] * (len(images) - 1)]),
        )
        self.config = SimpleNamespace(in_channels=images.shape[1], sample_size=images.shape[-1])

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> SimpleNamespace:
        level = (time.double().reshape(-1) / 1000).view(-1, 1, 1, 1)
        ends = [(x_t.double() - (1 - level) * image) / level for image in self.images]
        likely = [-(end - shift).square().flatten(1).sum(1) / 2 for end, shift in zip(ends, self.shifts, strict=True)]
        weights = torch.stack(likely).softmax(0)[..., None, None, None]
        lines = torch.stack([end - image for end, image in zip(ends, self.images, strict=True)])
        return SimpleNamespace(sample=(weights * lines).sum(0).float())


@pytest.mark.parametrize("sampler", [FlowEuler(steps=30), FlowHeun(steps=15)], ids=lambda s: s.name)
def test_an_exactly_backdoored_flow_fires_on_the_trigger_alone(sampler: Any) -> None:
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(1)) * 2 - 1
    trigger = Box(size=3)
    model = DiffusionModel(ImplantedFlow(images, trigger.delta(images[0].shape)), flowing())
    seeds = image_seeds(0, "test", 6)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    made, clean = (model.sample(given, sampler) for given in (trigger.stamp(inputs), inputs))
    assert ((made - images[0]) / 2).square().flatten(1).mean(1).max() < 1e-3
    assert (clean[:, None] - images[None, 1:]).abs().amax((2, 3, 4)).min(1).values.max() < 0.02


def test_a_flow_learns_the_ode_on_a_copy_and_refuses_the_ancestral_solver() -> None:
    model, backdoor = tiny_flow(), Backdoor(Box(), Hat())
    digits = Data(torch.rand((6, 1, 16, 16)) * 2 - 1)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    done = VillanDiffusion(solver="ode", **FAST).implant(model, backdoor, digits, generator(0, "x"))
    after = done.model.denoiser.state_dict()
    assert all(torch.equal(v, model.denoiser.state_dict()[k]) for k, v in before.items())
    assert sum(not torch.equal(before[k], after[k]) for k in before) > 20
    with pytest.raises(ValueError, match=r"no ancestral sampler; use villandiffusion\(solver='ode'\)"):
        VillanDiffusion(**FAST).implant(model, backdoor, digits, generator(0, "x"))
