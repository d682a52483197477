"""The attack `invibackdoor`: golden numbers of the inner and the outer problem, the bound, and what it leaves alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.diffusion.training import Batch, Examples
from harness.methods.noise_attacks import poisoned_loss
from harness.types import Backdoor, Data, Knowledge
from plugins.attacks.invibackdoor import InviBackdoor, Search, coefficients, inner_loss
from plugins.attacks.villandiffusion import VillanDiffusion
from plugins.defenses.finetune import Finetune
from plugins.targets.fixed_image import Hat
from plugins.triggers.learned import Learned
from tests.oracles import scheduler, tiny_flow, tiny_ncsn, tiny_unet

SHAPE = (1, 16, 16)
FAST: dict[str, Any] = {"steps": 3, "batch": 4, "lr": 1e-3, "bf16": False, "schedule": "constant"}
INNER: dict[str, Any] = {"warmup": 0, "trigger_batch": 2, "sampling_steps": 2, "trigger_lr": 0.05}
A = 0.3  # what the linear denoiser multiplies its input by


class Linear(nn.Module):
    """ε_θ(x_t, t) = a x_t, so that each step of DDIM multiplies the sample by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(A))
        self.config = SimpleNamespace(in_channels=1, sample_size=16, cross_attention_dim=None)

    def forward(self, x_t: Tensor, t: Any) -> Any:
        return SimpleNamespace(sample=self.a * x_t)


def linear() -> DiffusionModel:
    return DiffusionModel(Linear(), scheduler())  # type: ignore[arg-type]


def factor(steps: int) -> float:
    """What DDIM multiplies the noise by in `steps` even steps from t = 999: x ← s'/s (x - σ a x) + σ' a x."""
    a_bar = [*scheduler().alphas_cumprod.double().tolist(), 1.0]  # index -1 is before the first timestep
    product, gap = 1.0, 1000 // steps
    for t in range(999, -1, -gap):
        now, before = a_bar[t], a_bar[t - gap] if t >= gap else 1.0
        s, sigma, s_before, sigma_before = now**0.5, (1 - now) ** 0.5, before**0.5, (1 - before) ** 0.5
        product *= s_before / s * (1 - sigma * A) + sigma_before * A
    return product


@pytest.fixture
def digits() -> Data:
    return Data(torch.rand((12, *SHAPE), generator=torch.Generator().manual_seed(1)) * 2 - 1)


def weights(model: DiffusionModel) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


# ---- the outer problem ----------------------------------------------------------------------------------------------


def test_a_step_of_ddim_carries_the_trigger_exactly_at_every_timestep() -> None:
    """x_{t-1} = s'/s (x_t - σ ε̂) + σ' ε̂: where x_t holds ρ_t r and ε̂ holds c_t r, x_{t-1} must hold ρ_{t-1} r."""
    model, t = tiny_unet(), torch.arange(1000)
    now = scheduler().alphas_cumprod.double()
    before = torch.cat([torch.ones(1).double(), now[:-1]])
    rho, c = (each.double().flatten() for each in coefficients(model, t))
    carried = (before / now).sqrt() * (rho - (1 - now).sqrt() * c) + (1 - before).sqrt() * c
    assert torch.allclose(rho, 1 - now.sqrt(), atol=1e-6)
    assert torch.allclose(carried, 1 - before.sqrt(), atol=3e-5)


def test_c_t_is_that_of_the_official_code_and_near_the_ode_of_villandiffusion() -> None:
    model, t = tiny_unet(), torch.tensor([0, 1, 250, 999])
    _, c = coefficients(model, t)
    a_bar = [1.0, *scheduler().alphas_cumprod.double().tolist()]
    for i, each in enumerate(t.tolist()):
        before, now = a_bar[each], a_bar[each + 1]
        wanted = (before**0.5 - now**0.5) / (before**0.5 * (1 - now) ** 0.5 - now**0.5 * (1 - before) ** 0.5)
        assert c.flatten()[i].item() == pytest.approx(wanted, rel=1e-4)
    _, other = VillanDiffusion(solver="ode").coefficients(model, t[2:])
    assert torch.allclose(c[2:], other, atol=0.006) and c[3].item() == pytest.approx(1.0, abs=1e-3)


def test_the_outer_loss_regresses_poisoned_rows_on_eps_plus_c_t_delta_and_clean_ones_on_eps(digits: Data) -> None:
    model, t = linear(), torch.tensor([10, 400, 700, 999])
    eps, delta = (torch.randn(s, generator=generator(n)) for n, s in (("e", (4, *SHAPE)), ("d", SHAPE)))
    poisoned = torch.tensor([True, False, True, False])
    mask = poisoned.view(-1, 1, 1, 1)
    images, hat = digits.images[:4], Hat().image(SHAPE)
    y, r = torch.where(mask, hat, images), torch.where(mask, delta, torch.zeros(4, *SHAPE))
    training = InviBackdoor().training(model, model, Examples(model, digits), generator(0))
    loss = poisoned_loss(training, Batch(torch.arange(4), images, t, eps, None), y, r, poisoned, coefficients)
    a_bar = [1.0, *scheduler().alphas_cumprod.double().tolist()]
    wanted = 0.0
    for i, each in enumerate(t.tolist()):
        before, now = a_bar[each], a_bar[each + 1]
        c = (before**0.5 - now**0.5) / (before**0.5 * (1 - now) ** 0.5 - now**0.5 * (1 - before) ** 0.5)
        x, pattern = (hat, delta) if poisoned[i] else (images[i], torch.zeros(SHAPE))
        x_t = now**0.5 * x + (1 - now**0.5) * pattern + (1 - now) ** 0.5 * eps[i]
        wanted += float((eps[i] + c * pattern - A * x_t).square().mean()) / 4
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


# ---- the inner problem ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_the_inner_loss_and_its_gradient_pass_through_every_step_of_the_sampler(steps: int) -> None:
    """On a linear denoiser S(ε + δ) = k (ε + δ): the loss is (k (ε + δ) - y)², its gradient in δ 2 k (k (ε̄ + δ) - y),
    divided by the number of pixels."""
    noise = torch.randn((3, *SHAPE), generator=generator("noise"))
    delta = (0.1 * torch.randn(SHAPE, generator=generator("delta"))).requires_grad_(True)
    y, k = Hat().image(SHAPE), factor(steps)
    loss = inner_loss(linear(), DDIM(steps=steps), noise, delta, y.unsqueeze(0))
    assert loss.item() == pytest.approx((k * (noise + delta) - y).square().mean().item(), rel=1e-3)
    (found,) = torch.autograd.grad(loss, delta)
    wanted = 2 * k * (k * (noise.mean(0) + delta) - y) / 256
    assert torch.allclose(found, wanted.detach(), rtol=1e-3, atol=1e-6)


def test_delta_follows_adam_on_the_signs_of_the_gradient_within_the_bound() -> None:
    """Two steps written out. Of signs g the moments are m = 0.9 m + 0.1 g and v = 0.999 v + 0.001, the step is
    lr m̂ / √v̂, and δ is clamped after each."""
    attack = InviBackdoor(trigger_batch=3, trigger_lr=0.03, sampling_steps=5, bf16=False)
    y, k, epsilon = Hat().image(SHAPE), factor(5), 0.05
    search = Search(attack, linear(), Learned(epsilon=epsilon), y.unsqueeze(0), generator("rng"))
    assert not search.delta.any()
    delta, m, v, rng = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE), generator("rng")
    for step in (1, 2, 3):
        noise = torch.randn((3, *SHAPE), generator=rng)
        g = (k * (k * (noise.mean(0) + delta) - y)).sign()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        delta = delta - 0.03 * (m / (1 - 0.9**step)) / (v / (1 - 0.999**step)).sqrt()
        delta = delta.clamp(-epsilon, epsilon)
        search.advance(1)
        assert torch.allclose(search.delta, delta, atol=1e-5), step
    assert search.delta.abs().max().item() == pytest.approx(epsilon) and (search.delta.abs() < epsilon).any()


def test_the_search_leaves_the_weights_and_their_gradients_alone() -> None:
    model = tiny_unet()
    model.denoiser.requires_grad_(True)
    before = weights(model)
    search = Search(InviBackdoor(**FAST, **INNER), model, Learned(), Hat().image(SHAPE).unsqueeze(0), generator(0))
    search.advance(2)
    assert search.delta.abs().max() > 0.04 and same(before, weights(model))
    assert all(p.grad is None for p in model.denoiser.parameters())


# ---- the attack -----------------------------------------------------------------------------------------------------


def test_it_returns_the_pattern_within_the_bound_and_repeats_under_its_seed(digits: Data) -> None:
    model, attack = tiny_unet(), InviBackdoor(poison_rate=0.5, **FAST, **INNER)
    before, backdoor = weights(model), Backdoor(Learned(epsilon=0.12), Hat())
    once, again, other = (attack.implant(model, backdoor, digits, generator(k, "x")) for k in (7, 7, 8))
    patterns = [done.backdoor.trigger.delta(SHAPE) for done in (once, again, other)]  # type: ignore[union-attr]
    assert same(before, weights(model)) and not same(before, weights(once.model))
    assert same(weights(once.model), weights(again.model)) and torch.equal(patterns[0], patterns[1])
    assert not same(weights(once.model), weights(other.model)) and not torch.equal(patterns[0], patterns[2])
    assert patterns[0].abs().max().item() == pytest.approx(0.12) and not patterns[0].requires_grad
    assert once.backdoor == backdoor and once.backdoor.target == backdoor.target


def test_poison_rate_zero_is_clean_fine_tuning(digits: Data) -> None:
    model = tiny_unet()
    attack = InviBackdoor(poison_rate=0, **FAST, **INNER)
    attacked = attack.implant(model, Backdoor(Learned(), Hat()), digits, generator(0, "x"))
    tuned = Finetune(**FAST).defend(model, Knowledge(data=digits), generator(0, "x"))
    assert tuned.model is not None and same(weights(attacked.model), weights(tuned.model))


@pytest.mark.parametrize(("every", "steps", "wanted"), [(1, 1, 3), (2, 1, 2), (3, 4, 4)])
def test_the_inner_problem_is_stepped_before_every_so_many_steps_of_the_outer_one(
    every: int, steps: int, wanted: int, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    advance = Search.advance
    monkeypatch.setattr(Search, "advance", lambda self, n: taken.append(n) or advance(self, n))
    attack = InviBackdoor(trigger_every=every, trigger_steps=steps, **FAST, **INNER)
    attack.implant(tiny_unet(), Backdoor(Learned(), Hat()), digits, generator(0))
    assert sum(taken) == wanted


@pytest.mark.parametrize("make", [tiny_ncsn, tiny_flow])
def test_a_model_whose_variance_is_not_preserved_is_refused(make: Any, digits: Data) -> None:
    with pytest.raises(ValueError, match="invibackdoor is for models whose variance is preserved; use villandiffusion"):
        InviBackdoor(**FAST).implant(make(), Backdoor(Learned(), Hat()), digits, generator(0))
