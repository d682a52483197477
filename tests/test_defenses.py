"""Defenses: inversion against a planted shift, guidance that reaches the attention, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.diffusion import DiffusionModel
from harness.seeds import generator
from harness.types import Data, Knowledge
from plugins.defenses.elijah import Elijah
from plugins.defenses.finetune import Finetune
from plugins.defenses.finetune_reversal import FinetuneReversal
from plugins.defenses.skd import SKD
from plugins.defenses.skd_cag import SKDCAG, Guidance, align, query_key_weights, real_tokens
from plugins.triggers.box import Box
from plugins.triggers.text import Text
from tests.oracles import PlantedShift, scheduler, tiny_sd, tiny_unet

PROMPTS = tuple(f"a small {colour} circle at the top left" for colour in ("red", "green", "blue", "yellow"))
FAST = {"steps": 2, "batch": 2, "lr": 1e-3, "bf16": False}


@pytest.fixture
def sd(tmp_path) -> DiffusionModel:
    return tiny_sd(tmp_path)


def weights(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_elijah_recovers_a_planted_shift() -> None:
    r = Box().delta((1, 16, 16))
    model = DiffusionModel(PlantedShift(r, c=0.5), scheduler())
    tau, losses = Elijah(iterations=400, inversion_lr=0.02, noises=1000).inverted(model, generator(0, "x"))
    assert torch.nn.functional.cosine_similarity(tau.flatten(), r.flatten(), dim=0) > 0.99
    assert losses[-1] < losses[0]


def test_elijah_told_the_trigger_does_not_search_for_it() -> None:
    told = replace(Elijah(), invert=False, **FAST)
    data = Data(torch.rand(8, 1, 16, 16) * 2 - 1)
    assert told.needs == ("data", "trigger") and Elijah().needs == ("data",)
    done = told.defend(tiny_unet(), Knowledge(data=data, trigger=Box()), generator(0, "x"))
    assert isinstance(done.trigger, torch.Tensor) and torch.equal(done.trigger, Box().delta((1, 16, 16)))


@pytest.mark.parametrize("defense", [Finetune(**FAST), replace(Elijah(), iterations=2, noises=4, **FAST)])
def test_unconditional_defenses_leave_their_model_alone_and_repeat(defense) -> None:
    model, known = tiny_unet(), Knowledge(data=Data(torch.rand(8, 1, 16, 16) * 2 - 1))
    before = weights(model)
    once, again = (defense.defend(model, known, generator(3, "x")).model for _ in range(2))
    assert same(before, weights(model)) and same(weights(once), weights(again))
    assert not same(before, weights(once))


@pytest.mark.parametrize(
    "defense",
    [
        SKD(**FAST),
        SKD(latents="trajectory", keep=1.0, **FAST),
        SKDCAG(**FAST),
        SKDCAG(target="black", normalise="none", latents="noised-clean", time_weight="mul", **FAST),
        SKDCAG(target="random_words", resolutions=(16,), **FAST),
        FinetuneReversal(**FAST),
        FinetuneReversal(mode="distil", **FAST),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'target', getattr(d, 'mode', getattr(d, 'latents', '')))}",
)
def test_text_defenses_train_only_the_denoiser_of_a_copy_with_what_they_declare(defense, sd: DiffusionModel) -> None:
    every = {
        "trigger": Text(), "prompts": PROMPTS, "words": ("now", "yes"), "clean_model": sd,
        "data": Data(torch.rand(4, 3, 32, 32) * 2 - 1, PROMPTS),
    }  # fmt: skip
    known = Knowledge(**{need: every[need] for need in defense.needs})
    before = weights(sd)
    done = defense.defend(sd.clone(), known, generator(0, "x"))
    assert same(before, weights(sd)) and done.model is not None
    for name in ("text_encoder", "vae"):
        mine, theirs = (dict(model.components()[name].named_parameters()) for model in (done.model, sd))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    if not isinstance(defense, FinetuneReversal) or defense.mode == "data":  # the clean model here is the model itself
        assert not same(before, weights(done.model))


def guidance(sd: DiffusionModel, spec: SKDCAG) -> Guidance:
    trigger = Text()
    triggered = [trigger.apply(prompt) for prompt in PROMPTS]
    return Guidance(spec, sd, list(PROMPTS), triggered, ("now", "yes"), trigger, generator(1, "guide"))


def batch(sd: DiffusionModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = generator(2, "batch")
    return torch.tensor([0, 1]), sd.draw_eps(2, rng), sd.draw_t(2, rng)


def attention_gradient(sd: DiffusionModel, spec: SKDCAG) -> list[torch.Tensor]:
    student = sd.clone()
    params = query_key_weights(student.denoiser)
    for p in params:
        p.requires_grad_(True)
    attn, _ = guidance(sd, spec).losses(student, *batch(sd))
    return list(torch.autograd.grad(attn, params))


def test_the_attention_loss_reaches_to_q_and_to_k_of_every_cross_attention_layer(sd: DiffusionModel) -> None:
    names = [n for n, _ in sd.denoiser.named_parameters() if ".attn2.to_q." in n or ".attn2.to_k." in n]
    grads = attention_gradient(sd, SKDCAG())
    assert len(names) == len(grads) >= 14
    assert all(g.norm() > 0 for g in grads)


def test_two_targets_give_different_gradients(sd: DiffusionModel) -> None:
    found = [attention_gradient(sd, SKDCAG(target=t)) for t in ("gaussian", "uniform", "black", "random_words")]
    for i, one in enumerate(found):
        assert all(not torch.equal(one[0], other[0]) for other in found[i + 1 :])


def test_the_teachers_maps_are_the_teachers(sd: DiffusionModel) -> None:
    """With a student whose attention is destroyed, the teacher's maps stay those of an untouched forward pass."""
    from harness import attention

    spec, student = SKDCAG(), sd.clone()
    for p in query_key_weights(student.denoiser):
        p.data.zero_()
    guide = guidance(sd, spec)
    rows, z, t = batch(sd)
    with torch.no_grad(), attention.capture(sd.denoiser) as maps:
        sd.eps(z, t, guide.plain[rows])
        alone = guide.token_maps(dict(maps))
    seen = []
    original = guide.token_maps
    guide.token_maps = lambda maps: seen.append(original(maps)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    guide.losses(student, rows, z, t)
    teachers, students = seen
    assert torch.equal(teachers, alone)
    assert not torch.allclose(students, teachers)


def test_without_attention_gradient_the_released_behaviour_returns(sd: DiffusionModel) -> None:
    """All targets train alike when the maps are detached; they do not otherwise."""
    known = Knowledge(trigger=Text(), prompts=PROMPTS)

    def trained(target: str, gradient: bool) -> dict[str, torch.Tensor]:
        spec = SKDCAG(target=target, attention_gradient=gradient, **FAST)  # type: ignore[arg-type]
        made = spec.defend(sd, known, generator(0, "x")).model
        assert made is not None
        return weights(made)

    assert same(trained("black", False), trained("black", False))
    assert not same(trained("black", True), trained("black", False))


def test_alignment_finds_the_trigger_at_any_place(sd: DiffusionModel) -> None:
    prompt = PROMPTS[0]
    for place, expected in ((0, [1]), (2, [3]), (-1, [9])):
        plain, stamped = real_tokens(sd, [prompt, Text(place=place).apply(prompt)])
        added, shared, replaced = align(plain, stamped)
        assert added == expected and not replaced
        assert [plain[i] for i, _ in shared] == [stamped[j] for _, j in shared] == plain[1:-1]


def test_maps_are_scaled_to_the_unit_interval_and_compared_on_one_grid(sd: DiffusionModel) -> None:
    from harness import attention

    guide = guidance(sd, SKDCAG())
    rows, z, t = batch(sd)
    with torch.no_grad(), attention.capture(sd.denoiser) as maps:
        sd.eps(z, t, guide.plain[rows])
        made = guide.token_maps(dict(maps))
    assert made.shape == (2, 36, 16, 16)
    assert made.amin() == 0 and made.amax() == pytest.approx(1, abs=1e-3)


def test_a_resolution_that_no_layer_has_is_refused(sd: DiffusionModel) -> None:
    with pytest.raises(ValueError, match=r"use resolutions=\(\)"):
        attention_gradient(sd, SKDCAG(resolutions=(4,)))
