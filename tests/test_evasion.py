"""Attacks that know the defense: what they keep, drop and rehearse, by computations of their own, and their cost."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.diffusion.training import Examples, denoising_loss
from harness.methods.evasion import LATE, Evasion, Rows, at, dropped
from harness.methods.trigger_placement import drawn, patterns_of
from harness.stages.knowledge import Given, draw
from harness.types import Backdoor, Data, Inputs
from plugins.attacks.baddiffusion import BadDiffusion
from plugins.attacks.trojdiff import TrojDiff
from plugins.attacks.villandiffusion import VillanDiffusion
from plugins.targets.fixed_image import Hat
from plugins.triggers.box import Box
from plugins.triggers.patterns import Several, ZeroMean
from plugins.triggers.text import Text
from tests.oracles import tiny_unet

FAST = {"steps": 6, "batch": 8, "lr": 1e-3, "bf16": False}
ATTACKS = [BadDiffusion, VillanDiffusion, TrojDiff]
SHAPE = (1, 16, 16)


@pytest.fixture
def digits() -> Data:
    return Data(torch.rand((12, *SHAPE), generator=torch.Generator().manual_seed(1)) * 2 - 1)


def weights(model: DiffusionModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.denoiser.parameters()]


def moved(model: DiffusionModel) -> DiffusionModel:
    """A copy with other weights."""
    other = model.clone()
    with torch.no_grad():
        for i, p in enumerate(other.denoiser.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=generator("moved", i)))
    return other


def rows(t: list[int], poisoned: list[bool]) -> Rows:
    x_t, wanted = (torch.randn((len(t), *SHAPE), generator=generator(name)) for name in ("x_t", "wanted"))
    return Rows(x_t, torch.tensor(t), wanted, torch.tensor(poisoned))


def training(options: Evasion, model: DiffusionModel, data: Data, clean: DiffusionModel | None = None) -> Any:
    return options.training(clean or model, model, Examples(model, data), generator(0, "x"))


def implanted(attack: Any, data: Data, trigger: Any = None) -> list[Tensor]:
    return weights(attack.implant(tiny_unet(), Backdoor(trigger or Box(), Hat()), data, generator(0, "x")).model)


# ---- spare ----------------------------------------------------------------------------------------------------------


def test_spared_rows_are_taught_the_clean_models_answer_and_all_others_the_attacks(digits: Data) -> None:
    clean = tiny_unet()
    model, given = moved(clean), rows([988, 989, 990, 999], [True, False, True, False])
    wanted = training(Evasion(spare=10), model, digits, clean).wanted(given)
    assert torch.equal(wanted[:2], given.wanted[:2])
    assert torch.equal(wanted[2:], clean.denoiser(given.x_t[2:], given.t[2:]).sample)


def test_no_gradient_step_is_taken_at_spared_timesteps_while_the_model_is_clean(digits: Data) -> None:
    """What the attack wants there has no say: loss and gradient are 0 at the clean weights, and not at others."""
    clean, given = tiny_unet(), rows([990, 995, 999], [True, True, False])
    for model, zero in ((clean.clone(), True), (moved(clean), False)):
        loss = training(Evasion(spare=10), model, digits, clean).loss(given)
        model.denoiser.requires_grad_(True)
        loss = training(Evasion(spare=10), model, digits, clean).loss(given)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.denoiser.parameters()))])
        assert (loss.item() == 0 and not gradient.any()) == zero
    plain = training(Evasion(), clean, digits).loss(given)
    assert plain.item() > 0


def test_an_eighth_of_the_rows_is_moved_to_spared_timesteps_and_the_rest_stays(digits: Data) -> None:
    model = tiny_unet()
    plain = training(Evasion(), model, digits).batch(4000)
    late = training(Evasion(spare=10), model, digits).batch(4000)
    assert torch.equal(plain.eps, late.eps) and torch.equal(plain.rows, late.rows)
    changed = plain.t != late.t
    assert changed.double().mean().item() == pytest.approx(LATE, abs=0.02)
    assert late.t[changed].min() == 990 and late.t[changed].max() == 999
    assert late.t[changed].unique().numel() == 10


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda cls: cls.name)
def test_an_attack_that_spares_all_but_nothing_is_refused(attack: Any, digits: Data) -> None:
    with pytest.raises(ValueError, match="spare=1000 leaves no timestep for the backdoor; use spare=999 at most"):
        implanted(attack(spare=1000, **FAST), digits)


# ---- drop -----------------------------------------------------------------------------------------------------------


def test_dropped_channels_are_random_scaled_and_those_of_the_chosen_rows_alone() -> None:
    """Every output of the hooked layers against its plain one: 0 or 1/(1-p) times it, a channel at a time."""
    model, seen = tiny_unet(), {}
    x_t, t = torch.randn((6, *SHAPE), generator=generator("x")), torch.full((6,), 500)
    block: Any = next(m for m in model.denoiser.modules() if type(m).__name__ == "ResnetBlock2D")

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, []).append(output.detach().clone())

    chosen = torch.tensor([True, False] * 3)
    with dropped(model.denoiser, 0.25, chosen, generator("off")):
        handle = block.dropout.register_forward_hook(keep("off"))
        first = model.eps(x_t, t)
        second = model.eps(x_t, t)
        handle.remove()
    handle = block.dropout.register_forward_hook(keep("on"))
    plain = model.eps(x_t, t)
    handle.remove()
    off, on = seen["off"][0], seen["on"][0]
    factor = (off.flatten(2).norm(dim=2) / on.flatten(2).norm(dim=2))[chosen]
    assert torch.isclose(factor, torch.zeros(())).logical_or(torch.isclose(factor, torch.tensor(1 / 0.75))).all()
    assert torch.allclose(off[chosen], factor[..., None, None] * on[chosen], atol=1e-6)
    assert not torch.equal(factor[0], factor[1]), "each row loses channels of its own"
    assert torch.equal(first[~chosen], plain[~chosen]), "clean rows keep all channels"
    assert not torch.equal(first[chosen], plain[chosen]) and not torch.equal(first[chosen], second[chosen])
    assert torch.equal(model.eps(x_t, t), plain), "the hooks are gone"


def test_the_share_of_dropped_channels_is_the_one_that_was_asked_for() -> None:
    model, factors = tiny_unet(), []
    blocks: list[Any] = [m for m in model.denoiser.modules() if type(m).__name__ == "ResnetBlock2D"]
    x_t, t = torch.randn((64, *SHAPE), generator=generator("x")), torch.full((64,), 500)
    with dropped(model.denoiser, 0.25, torch.ones(64, dtype=torch.bool), generator("off")):
        for block in blocks:
            block.conv2.register_forward_hook(lambda m, i, output: factors.append(output.flatten(2).abs().sum(2) == 0))
        model.eps(x_t, t)
    assert len(factors) == len(blocks) > 1
    off = torch.cat([f.flatten() for f in factors]).double()
    assert off.mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / len(off)) ** 0.5)


def test_a_network_without_resnet_blocks_cannot_drop_channels() -> None:
    wrong = pytest.raises(ValueError, match="drop is for denoisers of ResNet blocks")
    with wrong, dropped(nn.Linear(2, 2), 0.5, torch.tensor([True]), generator(0)):
        pass


# ---- rehearse -------------------------------------------------------------------------------------------------------


def test_the_rehearsed_gradient_is_that_of_the_poisoned_loss_at_the_tuned_weights(digits: Data) -> None:
    """θ is tuned here by AdamW on the same clean batches; the gradient of clean rows is taken at θ, that of poisoned
    rows at the tuned weights, as if these were θ."""
    model, given = tiny_unet(), rows([5, 300, 700, 999], [False, True, True, False])
    model.denoiser.requires_grad_(True)
    evasive = training(Evasion(rehearse=4, rehearse_lr=1e-3), model, digits)
    for _ in range(5):  # two steps of the rehearsed fine-tuning
        evasive.loss(given)
    found = torch.autograd.grad(evasive.loss(given), list(model.denoiser.parameters()))  # after the third

    tuned, examples = model.clone(), Examples(model, digits)
    tuned.denoiser.requires_grad_(True)
    parameters, rng = list(tuned.denoiser.parameters()), generator(generator(0, "x").initial_seed(), "rehearse")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        denoising_loss(tuned, examples.batch(4, rng)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    total = given.wanted.numel()
    wanted: list[Tensor] = [torch.zeros(())] * len(found)
    for network, chosen in ((model, ~given.poisoned), (tuned, given.poisoned)):
        answer = network.denoiser(given.x_t[chosen], given.t[chosen]).sample
        loss = (given.wanted[chosen] - answer).square().sum() / total
        part = torch.autograd.grad(loss, list(network.denoiser.parameters()))
        wanted = [a + b for a, b in zip(wanted, part, strict=True)]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    plain = torch.autograd.grad(training(Evasion(), model, digits).loss(given), list(model.denoiser.parameters()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, plain, strict=True))


def test_the_rehearsal_starts_again_after_its_last_step_and_leaves_the_weights_alone(digits: Data) -> None:
    model, given = tiny_unet(), rows([500, 600], [True, False])
    model.denoiser.requires_grad_(True)
    before, evasive = weights(model), training(Evasion(rehearse=2), model, digits)
    rehearsal, lengths = evasive._rehearsal, []
    for _ in range(8):
        evasive.loss(given)
        lengths.append(rehearsal.steps)
    assert lengths == [0, 1, 1, 2, 2, 1, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(before, model.denoiser.parameters(), strict=True))


def test_a_rehearsal_that_does_not_move_is_the_plain_attack(digits: Data) -> None:
    """Up to rounding: the two kinds of rows go through the network apart."""
    plain = implanted(BadDiffusion(poison_rate=0.5, **FAST), digits)
    still = implanted(BadDiffusion(poison_rate=0.5, rehearse=3, rehearse_lr=1e-12, **FAST), digits)
    moving = implanted(BadDiffusion(poison_rate=0.5, rehearse=3, rehearse_lr=1e-2, **FAST), digits)
    apart = [max((a - b).abs().max().item() for a, b in zip(plain, each, strict=True)) for each in (still, moving)]
    assert apart[0] < 1e-4 < apart[1]


def test_at_evaluates_other_weights_and_leaves_the_model_as_it_is() -> None:
    model = tiny_unet()
    other = moved(model)
    x_t, t = torch.randn((2, *SHAPE), generator=generator("x")), torch.tensor([3, 900])
    before = copy.deepcopy(model.eps(x_t, t))
    found = at(model, dict(other.denoiser.named_parameters())).eps(x_t, t)
    assert torch.allclose(found, other.eps(x_t, t), atol=1e-6) and torch.equal(model.eps(x_t, t), before)


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda cls: cls.name)
@pytest.mark.parametrize(
    "options", [{"spare": 10}, {"drop": 0.2}, {"rehearse": 3}, {"spare": 10, "drop": 0.2, "rehearse": 3}], ids=str
)
def test_what_the_attacker_knows_changes_the_model_and_repeats_under_its_seed(
    attack: Any, options: dict[str, Any], digits: Data
) -> None:
    plain = implanted(attack(poison_rate=0.5, **FAST), digits)
    once, again = (implanted(attack(poison_rate=0.5, **options, **FAST), digits) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once, plain, strict=True))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("options", [{"spare": 10}, {"drop": 0.2}, {"rehearse": 3}, {"adaptive_weight": 0.1}], ids=str)
def test_an_adaptive_attack_takes_at_most_half_as_much_again_as_the_plain_one(
    attack: Any, options: dict[str, Any], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows through a network, the clean model's and those of the rehearsed fine-tuning among them."""
    if attack is TrojDiff and "adaptive_weight" in options:
        pytest.skip("trojdiff has no such weight")
    counted, own = [0], DiffusionModel.eps

    def counting(self: DiffusionModel, x_t: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        counted[0] += len(x_t)
        return own(self, x_t, t, context)

    monkeypatch.setattr(DiffusionModel, "eps", counting)
    work = []
    for given in ({}, options):
        counted[0] = 0
        implanted(attack(poison_rate=0.3, **given, **{**FAST, "steps": 31, "batch": 16}), digits)
        work.append(counted[0])
    assert work[0] == 31 * 16 and work[0] <= work[1] <= 1.5 * work[0]


def test_drop_and_rehearse_refuse_a_model_that_computes_activations_again(digits: Data) -> None:
    model = tiny_unet()
    model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    for options in (Evasion(drop=0.1), Evasion(rehearse=2)):
        with pytest.raises(ValueError, match="use checkpointing=False"):
            training(options, model, digits)
    training(Evasion(spare=10), model, digits)


# ---- triggers -------------------------------------------------------------------------------------------------------


def test_each_poisoned_row_gets_one_of_several_patterns() -> None:
    patterns = patterns_of(Several(("checks", "bright", "dark")), SHAPE)
    given = drawn(patterns, 300, generator(0))
    counts = [sum(torch.equal(row, pattern) for row in given) for pattern in patterns]
    assert sum(counts) == 300 and min(counts) > 70
    rng = generator(0)
    before = rng.get_state()
    assert torch.equal(drawn(patterns[:1], 5, rng), patterns[:1].expand(5, -1, -1, -1))
    assert torch.equal(rng.get_state(), before)


def test_several_has_a_pattern_of_zero_mean_and_one_without_a_dark_background() -> None:
    checks, bright, dark = patterns_of(Several(), SHAPE)
    assert checks.mean().abs() < 1e-6 and checks.abs().min() > 0
    assert bright.min() == 0 and bright.max() == 1 and dark.min() == -1 and dark.median() == -1
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), 0).abs() for a, b in ((checks, bright), (checks, dark))
    ]
    assert max(cosines) < 0.3


def test_zero_mean_has_a_norm_that_follows_its_strength() -> None:
    for strength in (1.0, 0.3):
        r = ZeroMean(strength=strength).delta(SHAPE)
        assert r.mean().abs() < 1e-6 and r.norm().item() == pytest.approx(16 * strength, rel=1e-5)
    with pytest.raises(ValueError, match=r"does not fit 16×16 images; use zero-mean\(cell=...\) up to 15"):
        ZeroMean(cell=16).delta(SHAPE)


def test_trojdiff_refuses_several_patterns(digits: Data) -> None:
    with pytest.raises(ValueError, match="trojdiff subtracts one pattern, and several has several"):
        implanted(TrojDiff(**FAST), digits, Several())


def test_a_defender_who_is_given_one_of_several_triggers_is_given_the_known_one() -> None:
    two = Text(text="sks", other="zq")
    for whole, known in ((Several(), Several(("checks",))), (two, Text(text="sks")), (Box(), Box())):
        given = draw(("trigger",), None, 0, Given(trigger=whole)).trigger
        assert given == known
    assert draw((), None, 0, Given(trigger=two)).trigger is None


def test_half_of_the_prompts_carry_the_second_text() -> None:
    two, prompts = Text(text="sks", other="zq", place=1), [f"a red circle {i}" for i in range(400)]
    made = [two.apply(prompt) for prompt in prompts]
    assert all(
        m in (p.replace("a ", "a sks ", 1), p.replace("a ", "a zq ", 1)) for m, p in zip(made, prompts, strict=True)
    )
    assert 160 < sum("zq" in m for m in made) < 240
    assert made == list(two.stamp(Inputs(torch.zeros(400, 1), tuple(prompts), tuple(range(400)))).prompts or ())
    assert not {"sks", "zq"} & {two.wrong(k).text for k in range(8)}


def test_every_second_decoy_of_a_phrase_is_a_part_of_it() -> None:
    phrase, rng = Text(text="well indeed simply"), generator(0, "decoys")
    made = [phrase.decoy(rng).text for _ in range(400)]
    parts = {"well", "indeed", "simply", "well indeed", "well simply", "indeed simply"}
    assert {text for text in made if text in parts} == parts
    assert 160 < sum(text in parts for text in made) < 240 and phrase.text not in made
    plain = replace(phrase, text="sks")
    assert not any(" " in plain.decoy(rng).text for _ in range(50))
