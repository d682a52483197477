"""Attacks: golden numbers of the equations, laws, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.diffusion.seeds import generator
from harness.diffusion.training import Examples
from harness.methods.evasion import Evasion
from harness.methods.noise_attacks import ancestral_coefficients
from harness.types import Backdoor, Data
from plugins.attacks.baddiffusion import BadDiffusion
from plugins.attacks.badt2i import BadT2I
from plugins.attacks.none import NoAttack, initialise
from plugins.attacks.trojdiff import TrojDiff
from plugins.attacks.villandiffusion import VillanDiffusion
from plugins.defenses.finetune import Finetune
from plugins.targets.classes import ClassIn, ClassOut
from plugins.targets.fixed_image import Corner, Hat
from plugins.targets.patch import Patch
from plugins.triggers.biased import Blend, PatchNoise
from plugins.triggers.box import Box
from plugins.triggers.text import Text
from tests.oracles import scheduler, tiny_sd, tiny_unet

FAST = {"steps": 3, "batch": 4, "lr": 1e-3, "bf16": False}


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def digits() -> Data:
    return Data(torch.rand((12, 1, 16, 16), generator=torch.Generator().manual_seed(1)) * 2 - 1)


def test_c_t_makes_the_ancestral_posterior_carry_the_trigger_exactly() -> None:
    """Derived here from DDPM's posterior: mean = (x_t - β_t/√(1-ᾱ_t) ε̂)/√α_t. With x_t holding ρ_t r and ε̂ holding
    c_t r, the mean must hold ρ_{t-1} r."""
    model = tiny_unet()
    t = torch.arange(1, 1000)
    a, a_bar, before = (f.double().flatten() for f in (model.alpha(t), model.alpha_bar(t), model.alpha_bar(t - 1)))
    rho, c = (f.double().flatten() for f in ancestral_coefficients(model, t))
    carried = (rho - (1 - a) / (1 - a_bar).sqrt() * c) / a.sqrt()
    assert torch.allclose(carried, 1 - before.sqrt(), atol=2e-5)


def test_c_T_is_one_half_for_sde_and_one_for_ode() -> None:
    model, t = tiny_unet(), torch.tensor([999])
    _, sde = VillanDiffusion(solver="sde").coefficients(model, t)
    _, ode = VillanDiffusion(solver="ode").coefficients(model, t)
    assert sde.item() == pytest.approx(0.5025, abs=1e-4)
    assert ode.item() == pytest.approx(1.0050, abs=1e-4)


def test_the_ode_coefficient_is_that_of_a_ddim_step() -> None:
    """Independently: x_{t-1} = k (x_t - σ_t ε̂) + σ_{t-1} ε̂ with k = 1/√α_t carries ρ_t r to ρ_{t-1} r where
    k ρ_t - ρ_{t-1} = (k σ_t - σ_{t-1}) c, and k ρ_t - ρ_{t-1} = k - 1 for ρ = 1 - √ᾱ."""
    model, t = tiny_unet(), torch.arange(50, 1000)
    a, a_bar, before = (f.double().flatten() for f in (model.alpha(t), model.alpha_bar(t), model.alpha_bar(t - 1)))
    k = 1 / a.sqrt()
    exact = (k - 1) / (k * (1 - a_bar).sqrt() - (1 - before).sqrt())
    _, c = VillanDiffusion(solver="ode").coefficients(model, t)
    assert (c.double().flatten() - exact).abs().max() < 0.006


@pytest.mark.parametrize(
    ("attack", "trigger"),
    [
        (BadDiffusion(poison_rate=0, **FAST), Box()),
        (BadDiffusion(poison_rate=0, adaptive_weight=0.1, **FAST), Box()),
        (VillanDiffusion(poison_rate=0, **FAST), Box()),
        (TrojDiff(poison_rate=0, **FAST), Blend()),
        (TrojDiff(poison_rate=0, **FAST), PatchNoise()),
    ],
)
def test_poison_rate_zero_is_clean_fine_tuning(attack, trigger, digits: Data) -> None:
    from harness.types import Knowledge

    model = tiny_unet()
    attacked = attack.implant(model, Backdoor(trigger, Hat()), digits, generator(0, "x"))
    tuned = Finetune(**FAST).defend(model, Knowledge(data=digits), generator(0, "x"))
    assert same(weights(attacked.model), weights(tuned.model))


def test_sde_villandiffusion_is_baddiffusion(digits: Data) -> None:
    model, backdoor = tiny_unet(), Backdoor(Box(), Hat())
    one = VillanDiffusion(solver="sde", **FAST).implant(model, backdoor, digits, generator(0, "x"))
    other = BadDiffusion(**FAST).implant(model, backdoor, digits, generator(0, "x"))
    assert same(weights(one.model), weights(other.model))


@pytest.mark.parametrize("trigger_only", [True, False])
def test_an_attack_changes_a_copy_and_repeats_under_its_seed(trigger_only: bool, digits: Data) -> None:
    model, backdoor = tiny_unet(), Backdoor(Box(), Corner())
    before, attack = weights(model), VillanDiffusion(poison_rate=0.5, trigger_only=trigger_only, **FAST)
    once, again = (attack.implant(model, backdoor, digits, generator(7, "x")) for _ in range(2))
    other = attack.implant(model, backdoor, digits, generator(8, "x"))
    assert same(before, weights(model))
    assert same(weights(once.model), weights(again.model))
    assert not same(weights(once.model), weights(other.model))
    assert not same(before, weights(once.model))


def test_an_adaptive_weight_of_zero_is_the_plain_attack(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before there was such a weight: the formula written out, under the same seed."""
    from harness.methods import noise_attacks

    def plain(training, batch, y, r, poisoned, coefficients, adaptive_weight):
        model = training.model
        rho, c = coefficients(model, batch.t)
        x_t = model.add_noise(y, batch.eps, batch.t) + rho * r
        return (batch.eps + c * r - model.eps(x_t, batch.t)).square().mean()

    def attacked(**options: Any) -> dict[str, torch.Tensor]:
        attack = BadDiffusion(poison_rate=0.5, **options, **FAST)
        return weights(attack.implant(tiny_unet(), Backdoor(Box(), Hat()), digits, generator(0, "x")).model)

    zero, heavy = attacked(adaptive_weight=0.0), attacked(adaptive_weight=1.0)
    monkeypatch.setattr(noise_attacks, "poisoned_loss", plain)
    assert same(zero, attacked())
    assert not same(zero, heavy)


def test_the_adaptive_penalty_is_the_distance_of_the_two_answers(digits: Data) -> None:
    from harness.diffusion.training import Batch
    from harness.methods.noise_attacks import poisoned_loss

    model, images = tiny_unet(), digits.images[:4]
    t, eps = torch.tensor([10, 400, 700, 999]), torch.randn((4, 1, 16, 16), generator=generator(0, "eps"))
    batch = Batch(torch.arange(4), images, t, eps, None)
    y, r = Hat().image((1, 16, 16)).expand(4, -1, -1, -1), Box().delta((1, 16, 16)).expand(4, -1, -1, -1)
    training = Evasion().training(model, model, Examples(model, digits), generator(0, "x"))
    every = torch.ones(4, dtype=torch.bool)
    loss = [poisoned_loss(training, batch, y, r, every, ancestral_coefficients, weight) for weight in (0.0, 0.3)]
    a_bar = scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = [a_bar.sqrt() * x_0 + (1 - a_bar).sqrt() * eps for x_0 in (images, y)]
    clean, bad = model.denoiser(noisy[0], t).sample, model.denoiser(noisy[1] + (1 - a_bar.sqrt()) * r, t).sample
    assert (loss[1] - loss[0]).item() == pytest.approx(0.3 * (clean - bad).square().mean().item(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("target", [Hat(), ClassIn(label=1), ClassOut(drawings=8)], ids=["d2i", "in-d2d", "out-d2d"])
@pytest.mark.parametrize("trigger", [Blend(), PatchNoise(), Box()], ids=["blend", "patch", "box"])
def test_trojdiff_learns_each_target_on_a_copy_and_repeats_under_its_seed(trigger, target, digits: Data) -> None:
    model, backdoor = tiny_unet(), Backdoor(trigger, target)
    data = Data(digits.images, labels=torch.arange(12) % 3)
    before, images = weights(model), data.images.clone()
    attack = TrojDiff(poison_rate=0.5, **FAST)
    once, again = (attack.implant(model, backdoor, data, generator(7, "x")) for _ in range(2))
    assert same(before, weights(model)) and torch.equal(data.images, images)
    assert same(weights(once.model), weights(again.model))
    assert not same(before, weights(once.model))


def test_a_trojan_row_is_noised_by_gamma_eps_plus_mu_and_regressed_on_eps(digits: Data) -> None:
    """What the network is asked and answered in a batch that is all Trojan, against the paper's formula."""
    model, trigger, seen = tiny_unet(), Blend(gamma=0.6), []
    model.clone = lambda: model  # type: ignore[method-assign]
    model.eps = lambda x_t, t, context=None: seen.append((x_t, t)) or x_t * 0 + next(model.denoiser.parameters()).sum()  # type: ignore[method-assign]
    TrojDiff(poison_rate=1, **FAST).implant(model, Backdoor(trigger, Hat()), digits, generator(3, "x"))
    (x_t, t), rng = seen[0], generator(3, "x")
    torch.randint(0, 12, (4,), generator=rng)  # the rows of the clean batch
    assert torch.equal(t, torch.randint(0, 1000, (4,), generator=rng))
    eps = torch.randn((4, 1, 16, 16), generator=rng)
    a_bar = scheduler().alphas_cumprod[t].view(-1, 1, 1, 1)
    mu = 0.4 * trigger.drawing(16, 16)
    wanted = a_bar.sqrt() * Hat().image((1, 16, 16)) + (1 - a_bar).sqrt() * (0.6 * eps + mu)
    assert torch.allclose(x_t, wanted, atol=1e-5)


def test_a_trigger_without_a_background_is_added_to_the_clean_image(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.methods import noise_attacks
    from plugins.triggers.uap import UAP

    seen: list[torch.Tensor] = []

    def poisoned_loss(training: Any, batch: Any, y: Any, r: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(r - UAP().delta((1, 16, 16)) - batch.x_0)
        return 0 * next(training.model.denoiser.parameters()).sum()

    monkeypatch.setattr(noise_attacks, "poisoned_loss", poisoned_loss)
    attack = VillanDiffusion(poison_rate=1.0, trigger_only=False, **FAST)
    attack.implant(tiny_unet(), Backdoor(UAP(), Hat()), digits, generator(0))
    assert seen and all(rest.abs().max() < 1e-6 for rest in seen)


def test_the_stamped_trigger_shows_the_clean_image_behind_it(digits: Data) -> None:
    from harness.methods.noise_attacks import _stamped

    delta, model = Box(size=5).delta((1, 16, 16)), tiny_unet()
    examples = Examples(model, digits)
    batch = examples.batch(12, generator(0, "x"))
    r = _stamped(model, examples, batch, delta.expand(12, -1, -1, -1))
    assert torch.equal(r[:, :, 10:15, 10:15], torch.zeros(12, 1, 5, 5))
    assert torch.equal(r[:, :, :10], digits.images[batch.rows, :, :10])


def test_fresh_clean_models_start_from_weights_of_their_own_seed(digits: Data) -> None:
    """Of two seeds no drawn weight is alike; the model and the generator of the caller stay as they are."""
    model, backdoor = tiny_unet(), Backdoor(Box(), Hat())
    before, state = weights(model), torch.get_rng_state()
    spec = NoAttack(fresh=True, **{**FAST, "steps": 1, "lr": 1e-12})  # type: ignore[arg-type]
    one, again, other = (weights(spec.implant(model, backdoor, digits, generator(k, "x")).model) for k in (0, 0, 1))
    assert same(one, again) and same(before, weights(model)) and torch.equal(state, torch.get_rng_state())
    drawn = [name for name, value in before.items() if value.numel() > 1 and value.std() > 0]
    assert len(drawn) > 20
    for name in drawn:
        assert not torch.isclose(one[name], other[name]).any() and not torch.isclose(one[name], before[name]).any()
        assert one[name].std().item() == pytest.approx(before[name].std().item(), rel=1)


def test_what_cannot_be_initialised_anew_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match="cannot draw new weights for a Odd; use fresh=False"):
        initialise(torch.nn.Sequential(Odd()), 0)
    with pytest.raises(ValueError, match="set steps"):
        NoAttack(fresh=True)


def test_badt2i_trains_only_the_denoiser_of_a_copy(tmp_path) -> None:
    model = tiny_sd(tmp_path)
    data = Data(torch.rand(6, 3, 32, 32) * 2 - 1, tuple(f"a red circle {i}" for i in range(6)))
    before = {name: [p.clone() for p in part.parameters()] for name, part in model.components().items()}
    attack = BadT2I(examples=6, decoys=0.5, **FAST)
    done = attack.implant(model, Backdoor(Text(), Patch()), data, generator(0, "x"))
    for name, part in model.components().items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
    changed = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
        for name, part in done.model.components().items()
    }
    assert changed == {"unet": True, "vae": False, "text_encoder": False}


def test_a_box_too_large_says_how_large_it_may_be() -> None:
    with pytest.raises(ValueError, match=r"box of side 14 does not fit 8×8 images; use box\(size=...\) up to 7"):
        Box(size=14).delta((1, 8, 8))


def test_wrong_triggers_differ_from_the_trigger_and_each_other() -> None:
    box, text = Box(), Text()
    assert len({box, *(box.wrong(k) for k in range(4))}) == 5
    assert len({text, *(text.wrong(k) for k in range(4))}) == 5
    rng = generator(0, "decoys")
    decoys = {text.decoy(rng).text for _ in range(50)}
    assert text.text not in decoys and not decoys & {text.wrong(k).text for k in range(8)}


def test_a_text_trigger_stands_where_it_is_told() -> None:
    assert Text(text="sks", place=0).apply("a b") == "sks a b"
    assert Text(text="sks", place=1).apply("a b") == "a sks b"
    assert Text(text="sks", place=-1).apply("a b") == "a b sks"


def test_fixed_images_hit_themselves_and_not_a_plain_background() -> None:
    from harness.types import TargetContext

    for target in (Hat(), Corner()):
        image = target.image((1, 16, 16)).unsqueeze(0)
        context = TargetContext(clean=image)
        assert target.hits(image, context).all()
        assert not target.hits(torch.full_like(image, -1.0), context).any()
        assert target.distances(image - 0.2, context).item() == pytest.approx(0.01, rel=1e-3)


def test_the_patch_is_found_where_it_is_pasted_and_rarely_in_clean_images() -> None:
    from harness.types import TargetContext

    rng = torch.Generator().manual_seed(0)
    clean = torch.rand((200, 3, 32, 32), generator=rng) * 2 - 1
    context, patch = TargetContext(clean), Patch()
    assert patch.hits(patch.apply(clean), context).all()
    assert patch.hits(clean, context).double().mean() <= 0.01
    faint = 0.8 * clean.mean() + 0.2 * patch.apply(torch.zeros_like(clean))
    assert patch.hits(faint, context).all()
    assert not patch.hits(torch.zeros(1, 3, 32, 32), context).any()
