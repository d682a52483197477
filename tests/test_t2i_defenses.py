"""Text-to-image defenses: guidance that reaches the attention, and what the defenses leave alone."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from harness import registry
from harness.diffusion import attention
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, FlowEuler
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import shapes
from harness.methods import attention_guidance, distillation
from harness.methods.attention_guidance import Alignment, Guidance, align, is_query_or_key, real_tokens
from harness.methods.decoys import ladder
from harness.methods.prompt_edits import Insertion, Removal, Substitution, removal_of
from harness.methods.prompt_screening import MapRun, assimilation, density, lengths, threshold
from harness.methods.trigger_placement import found_text
from harness.methods.weight_edits import projections
from harness.stages import knowledge
from harness.stages.inputs import evaluation_prompts
from harness.types import Data, Inputs, Knowledge
from plugins.defenses.daa import DAA, coupled, independent
from plugins.defenses.drop_trigger import DropTrigger
from plugins.defenses.finetune_reversal import FinetuneReversal
from plugins.defenses.navit2i import NaviT2I, summed_changes, variations
from plugins.defenses.sau import SAU, SAUSampler, masks, unlearned
from plugins.defenses.skd import SKD
from plugins.defenses.skd_cag import SKDCAG, neutral
from plugins.defenses.t2ishield import T2IShield, log_covariance, searched
from plugins.defenses.textual_perturbation import PerturbedPrompts, TextualPerturbation
from plugins.defenses.ufid_prompts import UFIDPrompts, with_phrase
from plugins.defenses.vocabulary_scan import VocabularyScan, candidates, told_apart, views
from plugins.models.shapes_sd import ShapesSD
from plugins.triggers.homoglyph import Homoglyph
from plugins.triggers.noun import Noun
from plugins.triggers.text import Text
from tests.oracles import scheduler, tiny_mmdit, tiny_sd, tiny_sdxl

PROMPTS = tuple(f"a small {colour} circle at the top left" for colour in ("red", "green", "blue", "yellow"))
FAST = {"steps": 2, "batch": 2, "lr": 1e-3, "bf16": False}


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> DiffusionModel:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory) -> DiffusionModel:
    return tiny_mmdit(tmp_path_factory.mktemp("mmdit"))


@pytest.fixture
def adjectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjectives that the small tokenizer of these tests keeps whole."""
    monkeypatch.setattr("plugins.defenses.skd_cag.ADJECTIVES", ("small", "large"))


def weights(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


@pytest.mark.usefixtures("adjectives")
@pytest.mark.parametrize(
    "defense",
    [
        SKD(latents="trajectory", keep=1.0, **FAST),
        SKDCAG(**FAST),
        SKDCAG(target="random_words", resolutions=(8,), latents="noised-clean", **FAST),
        FinetuneReversal(**FAST),
        FinetuneReversal(mode="distil", **FAST),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'target', getattr(d, 'mode', getattr(d, 'latents', '')))}",
)
def test_text_defenses_train_only_the_transformer_of_a_copy(defense, mmdit: DiffusionModel) -> None:
    other = mmdit.clone()  # a clean model that differs from the model that it teaches
    torch.nn.init.normal_(cast(Any, other.denoiser).proj_out.weight)
    every = {
        "trigger": Text(), "prompts": PROMPTS, "clean_model": other,
        "data": Data(torch.rand(4, 3, 32, 32) * 2 - 1, PROMPTS),
    }  # fmt: skip
    known = Knowledge(**{need: every[need] for need in defense.needs})
    before = weights(mmdit)
    done = defense.defend(mmdit.clone(), known, generator(0, "x"))
    assert same(before, weights(mmdit)) and done.model is not None
    assert not same(before, weights(done.model))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        mine, theirs = (dict(model.components()[name].named_parameters()) for model in (done.model, mmdit))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    "defense",
    [
        SKD(**FAST), SKDCAG(side=8, **FAST), SKDCAG(resolutions=(8,), latents="noised-clean", **FAST),
        FinetuneReversal(**FAST), FinetuneReversal(mode="distil", **FAST),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'mode', getattr(d, 'latents', ''))}",
)  # fmt: skip
def test_text_defenses_train_only_the_unet_of_an_sdxl(defense: Any, tmp_path: Path) -> None:
    model = tiny_sdxl(tmp_path)
    other = model.clone()
    torch.nn.init.normal_(cast(Any, other.denoiser).conv_out.weight)
    every = {
        "trigger": Text(), "prompts": PROMPTS, "clean_model": other,
        "data": Data(torch.rand(4, 3, 32, 32) * 2 - 1, PROMPTS),
    }  # fmt: skip
    done = defense.defend(model.clone(), Knowledge(**{need: every[need] for need in defense.needs}), generator(0, "x"))
    assert done.model is not None and not same(weights(model), weights(done.model))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        mine, theirs = (dict(each.components()[name].named_parameters()) for each in (done.model, model))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_skd_matches_the_velocity_of_the_clean_prompt(mmdit: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed from the bare network: ‖v_s(z, σ, τ(T+p)) - v_te(z, σ, τ(p))‖² for one prompt and one z."""
    seen: list[float] = []
    z, t = torch.randn(1, *mmdit.shape), torch.tensor([600])
    monkeypatch.setattr(
        distillation, "distil",
        lambda student, loss, *_, **__: seen.append(loss(torch.tensor([0]), z, t).item()) or [0.0],
    )  # fmt: skip
    SKD(bf16=False).defend(mmdit, Knowledge(trigger=Text(), prompts=PROMPTS[:1]), generator(0))
    answers = []
    for prompt in (Text().apply(PROMPTS[0]), PROMPTS[0]):
        sequence, pooled = mmdit.parted(mmdit.embed([prompt]))
        answers.append(
            mmdit.denoiser(
                hidden_states=z, timestep=torch.tensor([601.0]), encoder_hidden_states=sequence,
                pooled_projections=pooled,
            ).sample
        )  # fmt: skip
    assert seen == [pytest.approx((answers[0] - answers[1]).square().mean().item(), rel=1e-2)]


def test_the_maps_of_joint_attention_are_those_of_the_prompts_tokens(mmdit: DiffusionModel) -> None:
    """One map per token of the text encoders, of the side of the transformer's patches; the pooled row has none."""
    guide = Guidance(SKDCAG(normalise="none", side=8), mmdit, list(PROMPTS), Text().apply, None, generator(0))
    with attention.capture(mmdit.denoiser) as maps:
        mmdit.eps(torch.randn(2, *mmdit.shape), torch.tensor([500, 500]), guide.stamped[:2])
    found = guide.token_maps(dict(maps))
    assert found.shape == (2, 36, 8, 8)
    wanted = torch.stack([p.mean(1) for p in maps.values()]).mean(0).transpose(1, 2) * 36
    assert torch.allclose(found.flatten(2), wanted, atol=1e-5)
    assert all(len(ids) <= 36 for ids in guide.ids)


def test_navit2i_says_that_it_is_for_one_encoder(mmdit: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="navit2i works on models with one text encoder"):
        NaviT2I().defend(mmdit, Knowledge(prompts=PROMPTS), generator(0))


@pytest.mark.parametrize("last_steps", [0, 2])
def test_sau_edits_the_latents_of_a_flow_where_the_trigger_is(last_steps: int, mmdit: DiffusionModel) -> None:
    sampler = SAUSampler(text=Text().text, last_steps=last_steps).around(FlowEuler(steps=4))
    seeds = image_seeds(0, "test", 2)
    prompts = (Text().apply(PROMPTS[0]), PROMPTS[1])
    inputs = Inputs(image_noise(seeds, mmdit.shape), prompts, seeds)
    with torch.no_grad():
        plain, edited = FlowEuler(steps=4).run(mmdit, inputs), sampler.run(mmdit, inputs)
    assert not torch.allclose(plain[0], edited[0], atol=1e-3)
    assert torch.allclose(plain[1], edited[1], atol=1e-5) and sampler.nfe == 8


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("adjectives")
@pytest.mark.slow
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
        "trigger": Text(), "prompts": PROMPTS, "clean_model": sd,
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


@pytest.mark.usefixtures("adjectives")
@pytest.mark.slow
@pytest.mark.parametrize(
    "defense",
    [
        SKD(**FAST),
        SKDCAG(**FAST),
        SKDCAG(target="random_words", **FAST),
        FinetuneReversal(**FAST),
        SAU(),
        DropTrigger(),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'target', '')}",
)
def test_a_defense_of_text_also_runs_when_it_is_given_no_text(defense, sd: DiffusionModel) -> None:
    ((_, nothing),) = ladder(Text(), "zero", 0)
    data = Data(torch.rand(4, 3, 32, 32, generator=generator(0, "data")) * 2 - 1, PROMPTS)
    known = Knowledge(trigger=nothing, prompts=PROMPTS, data=data)
    done = defense.defend(sd.clone(), known, generator(0, "x"))
    if done.model is not None:
        assert all(w.isfinite().all() for w in weights(done.model).values())
        return
    seeds = image_seeds(0, "zero", 2)
    inputs = Inputs(image_noise(seeds, sd.shape), PROMPTS[:2], seeds)
    plain = DDIM(steps=2)
    assert torch.equal(done.sampler.around(plain).run(sd, inputs), plain.run(sd, inputs))


def guidance(sd: DiffusionModel, spec: SKDCAG) -> Guidance:
    words = neutral(Text(), ("now", "yes"))
    return Guidance(spec, sd, PROMPTS, Text().apply, words, generator(1, "guide"))


def query_key_weights(denoiser: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for name, p in denoiser.named_parameters() if is_query_or_key(name)]


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
    with pytest.raises(ValueError, match="layers=''"):
        attention_gradient(sd, SKDCAG(layers="attn7"))


def test_only_the_named_layers_count(sd: DiffusionModel) -> None:
    def reached(layers: str) -> list[bool]:
        student = sd.clone()
        named = {n: p.requires_grad_(True) for n, p in student.denoiser.named_parameters() if is_query_or_key(n)}
        attn, _ = guidance(sd, SKDCAG(layers=layers)).losses(student, *batch(sd))
        grads = torch.autograd.grad(attn, list(named.values()), allow_unused=True)
        return [name.startswith("down_blocks.0.") for name, g in zip(named, grads, strict=True) if g is not None]

    assert all(reached(r"^down_blocks\.0\.")) and not all(reached(""))


def test_the_attention_loss_is_the_papers_sum_over_the_number_of_tokens(sd: DiffusionModel) -> None:
    """Two trigger tokens with constant maps 1/2 and 1, two prompt tokens off by 0.1 and 0.3, target black:
    (1/4 + 1 + 0.01 + 0.09) / 4."""
    mine = torch.tensor([9.0, 0.5, 1.0, 0.1, 0.3, 9.0]).view(6, 1, 1).expand(6, 4, 4)
    theirs = torch.tensor([7.0, 0.0, 0.0, 7.0]).view(4, 1, 1).expand(4, 4, 4)
    found = align([0, 5, 6, 1], [0, 8, 9, 5, 6, 1])
    assert found == Alignment([1, 2], [(1, 3), (2, 4)], [])
    loss = guidance(sd, SKDCAG(target="black")).attention_loss(mine, theirs, found, 4)
    assert loss.item() == pytest.approx(1.35 / 4)


def test_time_weights_are_those_of_appendix_b2_and_of_the_released_code(sd: DiffusionModel) -> None:
    t = torch.tensor([0, 1, 250, 999])

    def weight(kind: str) -> object:
        return guidance(sd, SKDCAG(time_weight=kind)).time_weights(t)  # type: ignore[arg-type]

    assert weight("none") == 1.0
    assert torch.allclose(torch.as_tensor(weight("mul")), torch.tensor([0, 0.001, 0.25, 0.999]))
    assert torch.allclose(torch.as_tensor(weight("div")), torch.tensor([1000, 1000, 4, 1000 / 999]))


def test_the_notes_hold_the_norms_of_both_gradients_before_alpha(sd: DiffusionModel) -> None:
    """Independent: the same losses on the same batch, differentiated by backward()."""
    known = Knowledge(trigger=Text(), prompts=PROMPTS)
    spec = SKDCAG(target="black", alpha=0.3, steps=1, batch=2, lr=1e-3, bf16=False)
    notes = spec.defend(sd, known, generator(5, "x")).notes
    rng, student = generator(5, "x"), sd.clone()
    guide = Guidance(spec, sd, PROMPTS, Text().apply, None, rng)
    rows = torch.randint(0, 4, (2,), generator=rng)
    t, z = sd.draw_t(2, rng), sd.draw_eps(2, rng)
    student.denoiser.requires_grad_(True)
    for name, value in zip(("attention", "prediction"), guide.losses(student, rows, z, t), strict=True):
        student.denoiser.zero_grad()
        value.backward(retain_graph=True)
        squares = {n: p.grad.square().sum() for n, p in student.denoiser.named_parameters() if p.grad is not None}
        assert notes[f"{name}_loss"] == pytest.approx([value.item()])
        assert notes[f"{name}_grad"][0] == pytest.approx(sum(squares.values()).sqrt().item(), rel=1e-4)  # type: ignore[union-attr]
        query_key = sum(v for n, v in squares.items() if is_query_or_key(n))
        assert notes[f"{name}_grad_qk"][0] == pytest.approx(torch.as_tensor(query_key).sqrt().item(), rel=1e-4)


def test_the_notes_hold_the_gradients_of_one_term_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gradients(list[Any]):
        """A list of gradients that can be looked for."""

    alive: list[Any] = []

    def gradients(*_: Any) -> Gradients:
        assert all(each() is None for each in alive)
        found = Gradients([torch.ones(4)])
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(attention_guidance, "_gradients", gradients)
    notes, one = attention_guidance._Notes(), torch.ones(())
    notes.note(one, one, torch.nn.Linear(4, 1, bias=False))
    assert len(alive) == 2 and notes.kept["prediction_grad"] == [2.0] and notes.kept["attention_grad_qk"] == [0.0]


def test_detached_maps_have_no_gradient_in_the_notes(sd: DiffusionModel) -> None:
    known = Knowledge(trigger=Text(), prompts=PROMPTS)
    notes = SKDCAG(attention_gradient=False, **FAST).defend(sd, known, generator(0, "x")).notes  # type: ignore[arg-type]
    assert notes["attention_grad"] == notes["attention_grad_qk"] == [0.0]
    assert notes["attention_loss"][0] > 0 and notes["prediction_grad"][0] > 0


def test_random_words_are_as_many_as_the_triggers_and_need_a_trigger_of_words() -> None:
    rule = neutral(Text(text="new trigger", place=1), ("now", "yes"))(generator(0, "x"))
    words = rule("a circle").split()
    assert words[0] == "a" and words[-1] == "circle" and set(words[1:-1]) <= {"now", "yes"} and len(words) == 4
    with pytest.raises(ValueError, match="use target='black'"):
        neutral(SimpleNamespace(name="homoglyph"), ("now",))


@pytest.mark.slow
def test_what_else_a_defense_needs_does_not_change_its_prompts() -> None:
    plugin = ShapesSD()
    told = [knowledge.draw(needs, plugin, 1) for needs in (("prompts",), ("data", "prompts"))]
    assert told[0].prompts == told[1].prompts and told[0].data is None and told[1].data is not None


@pytest.mark.slow
def test_prompts_and_captions_that_train_a_defense_are_none_of_those_it_is_judged_on() -> None:
    """Not even a combination of attributes is shared, whatever the seed."""
    plugin = ShapesSD()
    judged = evaluation_prompts(plugin, 200, 0) or ()

    def asked(prompts: tuple[str, ...]) -> set[tuple[tuple[str, int], ...]]:
        every = [plugin.attributes(prompt) for prompt in prompts]
        names = ("background", "colour", "place", "shape", "size")
        return {tuple((name, a[name]) for name in names) for a in every if all(name in a for name in names)}

    known = [knowledge.draw(("prompts",), plugin, seed).prompts or () for seed in range(3)]
    every = (plugin.data().captions, *known)  # whatever share of the data a defender may hold
    given = [text for texts in every for text in texts or ()]
    assert len(given) == 6300 and not set(given) & set(judged)
    assert asked(judged) and len(asked(tuple(given))) > 200 and not asked(tuple(given)) & asked(judged)


# ---- samplers that wrap ---------------------------------------------------------------------------------------------


def queries(sd: DiffusionModel, prompts: tuple[str, ...] = PROMPTS) -> Inputs:
    seeds = image_seeds(3, "queries", len(prompts))
    return Inputs(image_noise(seeds, sd.shape), prompts, seeds)


HARD = {"softness": 1e-4, "spread": 0.0, "blur": 0.0}


def test_equation_1_where_both_masks_one_and_none_cover() -> None:
    """Two channels, a row of three places: h_trig along h_poi and strong; along it and weak; none at all."""
    clean = torch.tensor([[2.0, 2.0, 7.0], [0.0, 0.0, 1.0]]).view(1, 2, 1, 3)
    poi = torch.tensor([[12.0, 3.0, 7.0], [0.0, 0.0, 1.0]]).view(1, 2, 1, 3)
    spec = SAU(threshold=0.5, secondary=0.25, a=0.8, **HARD)  # type: ignore[arg-type]
    m_p, m_s = masks(spec, poi, clean)
    assert m_p.flatten().tolist() == pytest.approx([1, 1, 0]) and m_s.flatten().tolist() == pytest.approx([1, 0, 0])
    h = unlearned(spec, poi, clean)[0, :, 0].T
    assert torch.allclose(h, torch.tensor([[0.8 * 2 * 1.5, 0.0], [0.8 * 2, 0.0], [7.0, 1.0]]))
    whole = SAU(threshold=0.5, secondary=0.25, normalise=True, **HARD)  # type: ignore[arg-type]
    assert torch.allclose(unlearned(whole, poi, clean), torch.where(m_p.unsqueeze(1) > 0.5, clean, poi))


def test_sau_edits_what_has_the_trigger_by_what_the_prompt_without_it_gives(sd: DiffusionModel) -> None:
    inner, given = DDIM(steps=3), queries(sd)
    mixed = given.with_prompts([Text().apply(PROMPTS[0]), PROMPTS[1], Text().apply(PROMPTS[2]), PROMPTS[3]])
    made = SAU().defend(sd, Knowledge(trigger=Text(), prompts=PROMPTS), generator(0, "x"))
    assert isinstance(made.sampler, SAUSampler) and made.model is None
    around = made.sampler.around(inner)
    with torch.no_grad():
        clean, poi, out = inner.run(sd, given), inner.run(sd, mixed), around.run(sd, mixed)
        alone = around.run(sd, mixed[2:3])
    assert torch.equal(out[1::2], poi[1::2]) and not torch.allclose(out[::2], poi[::2])
    assert torch.allclose(out[::2], unlearned(SAU(), poi[::2], clean[::2]), atol=1e-5)
    assert (alone - out[2:3]).abs().max() < 1e-4 * out.abs().max(), "up to the rounding of another batch"
    assert around.nfe == 6


def test_sau_after_the_last_step_is_sau_at_the_final_latent(sd: DiffusionModel) -> None:
    given = Text().stamp(queries(sd))
    with torch.no_grad():
        final, last, two = (SAUSampler(last_steps=k, blur=0.1).around(DDIM(steps=3)).run(sd, given) for k in (0, 1, 2))
    assert torch.equal(final, last) and not torch.allclose(last, two)


def test_sau_told_a_wrong_trigger_touches_nothing(sd: DiffusionModel) -> None:
    given = Text().stamp(queries(sd))
    wrong = SAU().defend(sd, Knowledge(trigger=Text().wrong(0), prompts=PROMPTS), generator(0, "x")).sampler
    assert wrong is not None
    with torch.no_grad():
        assert torch.equal(wrong.around(DDIM(steps=2)).run(sd, given), DDIM(steps=2).run(sd, given))


def test_delivered_samplers_are_registered_and_survive_their_spec() -> None:
    known = registry.load()
    for sampler in (SAUSampler(text="zq", a=0.5, normalise=True), PerturbedPrompts(mode="char", invisible=True)):
        assert known.build("samplers", registry.spec_of(sampler)) == sampler
        assert sampler.nfe == sampler.around(DDIM()).nfe


@pytest.mark.parametrize("trigger", [Text(), Text(place=-1), Homoglyph()])
def test_without_the_trigger_a_prompt_gives_the_image_of_the_plain_prompt(sd, trigger) -> None:
    done = DropTrigger().defend(sd, Knowledge(trigger=trigger, prompts=PROMPTS), generator(0, "x"))
    assert done.model is None and done.sampler is not None
    seeds = image_seeds(0, "drop", 2)
    plain = Inputs(image_noise(seeds, sd.shape), tuple(PROMPTS[:2]), seeds)
    guarded, inner = done.sampler.around(DDIM(steps=3)), DDIM(steps=3)
    assert torch.equal(guarded.run(sd, trigger.stamp(plain)), inner.run(sd, plain))
    assert guarded.nfe == inner.nfe and not torch.equal(inner.run(sd, trigger.stamp(plain)), inner.run(sd, plain))


@pytest.mark.parametrize("trigger", [Text(), Text(place=-1), Text(text="two words", place=2), Homoglyph(), Noun()])
def test_a_trigger_can_be_taken_out_again(trigger) -> None:
    removal = removal_of(trigger, PROMPTS)
    assert all(removal.apply(trigger.apply(prompt)) == prompt for prompt in PROMPTS)
    assert removal.apply("yellow") == "yellow"


def test_a_trigger_that_replaces_a_word_cannot_be_taken_out() -> None:
    with pytest.raises(ValueError, match="cannot be taken out"):
        removal_of(Noun(keep=False), PROMPTS)
    assert Removal("a").apply("a cat and a dog") == "cat and a dog"


def test_homoglyph_normalisation_undoes_homoglyphs_and_nothing_else() -> None:
    plain = TextualPerturbation()
    for trigger in (Homoglyph(), *(Homoglyph().wrong(k) for k in (0, 1, 3, 4))):
        assert all(plain.normalised(trigger.apply(prompt)) == prompt for prompt in PROMPTS)
    hidden = Text().apply(PROMPTS[0])
    assert plain.normalised(hidden) == hidden
    assert TextualPerturbation(invisible=True).normalised(hidden) == PROMPTS[0]


def test_misspellings_change_one_letter_of_every_word_and_synonyms_only_words_that_have_some() -> None:
    prompt, every = "surely a photo of a large circle now", lambda word: True
    for seed in range(20):
        words = TextualPerturbation(mode="char").mapped(prompt, generator(seed), every).split(" ")
        for old, new in zip(prompt.split(" "), words, strict=True):
            changed = [a != b for a, b in zip(old, new, strict=False)]
            assert old == new == "a" or len(new) == len(old) - 1 or (len(new) == len(old) and sum(changed) == 1)
    said = {TextualPerturbation(mode="word", word_share=1.0).mapped(prompt, generator(k), every) for k in range(20)}
    split = [text.split(" ") for text in said]
    assert len(said) > 3 and all((w[1], w[3:5], w[5:7]) == ("a", ["of", "a"], ["big", "circle"]) for w in split)
    assert {w[2] for w in split} == {"picture", "image", "drawing"} and {w[7] for w in split} == {"today"}


def test_synonyms_are_words_that_the_model_knows(sd: DiffusionModel) -> None:
    """Captions of drawn shapes say large, small and gray: a model of them cannot read big, little and grey."""
    prompt = "a photo of a large gray circle on a small black background today"
    given = queries(sd, (prompt,) * 40)
    said = {text for text in PerturbedPrompts(mode="word", word_share=1.0).changed(sd, given)}
    assert {text.split(" ")[1] for text in said} == {"picture", "image", "drawing"}
    assert all(shapes.read(text) == shapes.read(prompt) for text in said)
    assert {text.split(" ")[-1] for text in said} == {"now"} and {text.split(" ")[-2] for text in said} == {"scene"}


def test_perturbed_prompts_reach_the_inner_sampler_and_depend_on_the_seed_alone(sd: DiffusionModel) -> None:
    seen: list[tuple[str, ...]] = []

    def run(model: DiffusionModel, inputs: Inputs) -> torch.Tensor:
        assert inputs.prompts is not None
        seen.append(inputs.prompts)
        return inputs.noise

    around = PerturbedPrompts(mode="char").around(SimpleNamespace(run=run, nfe=5))
    given = queries(sd, tuple(ShapesSD().prompts("test", 12, generator(0, "x"))))
    for part in (given, given[3:5]):
        around.run(sd, part)
    assert seen[0][3:5] == seen[1] and all(a != b for a, b in zip(seen[0], given.prompts or (), strict=True))
    assert max(lengths(sd, seen[0])) <= 36 and around.nfe == 5


# ---- screens --------------------------------------------------------------------------------------------------------

CHEAP = {"sampling_steps": 6, "guidance": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense",
    [
        T2IShield(**CHEAP), T2IShield(method="cda", surrogates=1, surrogate_steps=3, **CHEAP), DAA(**CHEAP),
        DAA(method="system", differences=3, **CHEAP), NaviT2I(), UFIDPrompts(images=2, **CHEAP),
    ],
    ids=lambda d: f"{d.name}-{getattr(d, 'method', '')}",
)  # fmt: skip
def test_a_screen_judges_each_prompt_by_itself_and_flags_few_benign_ones(defense, sd: DiffusionModel) -> None:
    every = {"prompts": PROMPTS, "clean_model": sd, "encoder": lambda images: images.flatten(1)}
    before = weights(sd)
    done = defense.defend(sd, Knowledge(**{need: every[need] for need in defense.needs}), generator(0, "x"))
    given = Text().stamp(queries(sd))
    assert done.screen is not None and done.screen_above is not None
    together, alone = done.screen(given), torch.cat([done.screen(given[i : i + 1]) for i in range(4)])
    assert together.shape == (4,) and torch.allclose(together.double(), alone.double(), rtol=1e-3, atol=1e-5)
    assert len(set(together.tolist())) == 4 and same(before, weights(sd))
    assert (torch.tensor(done.notes["clean_scores"]) > done.screen_above).sum() == 1


def test_published_thresholds_are_used_without_calibration(sd: DiffusionModel) -> None:
    plain = {"calibrate": False, **CHEAP}
    above = [
        defense.defend(sd, Knowledge(prompts=PROMPTS, clean_model=sd), generator(0, "x")).screen_above
        for defense in (T2IShield(**plain), DAA(**plain), DAA(method="system", **plain), NaviT2I(calibrate=False))  # type: ignore[arg-type]
    ]
    assert above == [-2.5, -0.000489037, -0.0015001562, 1.598]


def test_recorded_maps_are_attention_and_another_side_is_refused(sd: DiffusionModel) -> None:
    maps = MapRun(sampling_steps=2).maps(sd, queries(sd))
    assert maps.shape == (4, 2, 36, 16, 16) and torch.allclose(maps.sum(2), torch.ones(4, 2, 16, 16), atol=1e-5)
    with pytest.raises(ValueError, match=r"use \[8, 16\]"):
        MapRun(sampling_steps=2, side=32).maps(sd, queries(sd))


def test_recorded_maps_carry_gradients_to_the_text_encoder_if_asked_to(sd: DiffusionModel) -> None:
    student, run, asked = sd.clone(), MapRun(sampling_steps=2, guidance=2.0), queries(sd)
    assert student.text_encoder is not None
    weight = student.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    found = run.maps_in_graph(student, asked)
    assert torch.allclose(found.detach(), run.maps(sd, asked), atol=1e-6)
    (gradient,) = torch.autograd.grad(found[:, 1].square().sum(), weight)
    assert gradient.abs().sum() > 0 and not run.maps(student, asked).requires_grad


def test_the_threshold_flags_the_share_of_benign_scores_it_is_asked_to() -> None:
    scores = torch.arange(1000.0)
    assert (scores > threshold(scores, 0.05)).sum() == 50


def test_assimilation_is_the_mean_distance_from_the_mean_map() -> None:
    """Maps 0 and 2 everywhere on 2x2: mean 1, each at distance sqrt(4)."""
    assert assimilation(torch.stack([torch.zeros(2, 2), torch.full((2, 2), 2.0)])) == pytest.approx(2.0)


def test_the_log_covariance_is_that_of_the_principal_components() -> None:
    """Four maps at (±3, 0) and (0, ±1): variances 18/3 and 2/3 along the axes."""
    maps = torch.tensor([[3.0, 0, 5], [-3, 0, 5], [0, 1, 5], [0, -1, 5]])
    assert log_covariance(maps, 2).tolist() == pytest.approx([math.log(6), math.log(2 / 3)])
    assert log_covariance(maps, 9)[2].item() == pytest.approx(math.log(6e-6))  # the third has none


def test_binary_search_finds_the_word_that_makes_the_image() -> None:
    def image(text: str) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]) if "zq" in text.split() else torch.tensor([[0.0, 1.0]])

    for place in (0, 3, -1):
        assert searched(Insertion("zq", place).apply("a small red circle at the top").split(" "), image, 0.8) == "zq"
    assert searched(["a", "b"], lambda text: torch.eye(3)[[len(text) % 3]], 0.8) is None


def test_mitigation_gives_the_word_the_keys_of_a_space_and_keeps_the_empty_prompt(sd: DiffusionModel) -> None:
    old, new, empty = (sd.embed([text])[0].double() for text in ("zq", " ", ""))
    strong = T2IShield(mitigate=True, erase=1.0, preserve=200.0, lam=1e-3).mitigated(sd, ["zq"])
    before, after = projections(sd.denoiser), projections(strong.denoiser)
    for w, v in zip(before, after, strict=True):
        w, v = w.double(), v.double()
        assert (old @ v.T - new @ w.T).norm() < 0.5 * (old @ w.T - new @ w.T).norm()
        assert (empty @ v.T - empty @ w.T).norm() < 0.02 * (empty @ w.T).norm()


def test_t2ishield_mitigates_what_it_located_in_the_stream_alone(sd: DiffusionModel) -> None:
    """With a threshold that flags everything and features that say "zq or not", the word is found and edited away."""

    class Eager(T2IShield):
        def by_assimilation(self, model):
            return lambda inputs: torch.tensor([float("zq" in p) for p in inputs.prompts])

    def encoder(images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), 2)  # all images alike: the search keeps going left, to the trigger in front

    known = Knowledge(prompts=PROMPTS, trigger=Text(text="zq"), encoder=encoder)
    done = Eager(mitigate=True, search_steps=1, **CHEAP).defend(sd, known, generator(0, "x"))
    assert done.trigger == "zq" and done.notes["found"] == {"zq": 4} and done.model is not None
    assert not same(weights(sd), weights(done.model))


def test_daa_independent_is_the_change_of_eos_less_that_of_the_words() -> None:
    """Four tokens; at step 1 EOS changes by 3 and the words by 4 and 8: 3 - 12/4; at step 2 by 1 and 2, 2: 1 - 4/4."""
    moves = torch.tensor([[9.0, 4, 8, 3], [9.0, 2, 2, 1]])
    maps = torch.cat([torch.zeros(1, 4), moves.cumsum(0)]).view(3, 4, 1, 1)
    assert independent(maps, (1,)) == pytest.approx(0.0) and independent(maps, (2,)) == pytest.approx(0.0)
    assert independent(maps * torch.tensor([1.0, 1, 1, 2]).view(1, 4, 1, 1), (1, 2)) == pytest.approx(4.0)


def test_daa_adds_the_changes_to_the_fifth_and_the_sixth_map_as_published() -> None:
    maps = torch.rand((8, 4, 2, 2), generator=generator(0, "maps"))
    changes = [[(b - a).norm().item() for a, b in zip(*pair, strict=True)] for pair in pairwise(maps)]
    expected = sum(change[3] - (change[1] + change[2]) / 4 for change in changes[3:5])
    assert DAA().score(maps) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["independent", "system"])
def test_daa_scores_an_empty_prompt(method: Any) -> None:
    assert math.isfinite(DAA(method=method).score(torch.rand(12, 2, 4, 4)))


def test_daa_system_follows_scipys_solution_on_its_own_grid() -> None:
    from scipy.integrate import solve_ivp

    maps = torch.rand((12, 5, 4, 4), generator=generator(0, "maps"))
    nodes = maps[:, 1:].flatten(2).double()
    fade = torch.diag(torch.tensor([-1.0, -1, -1, -10])).double()

    def flow(t: float, x):
        return ((fade + coupled(nodes[int(t)])) @ torch.as_tensor(x)).numpy()

    path = solve_ivp(flow, (0, 11), nodes[0].norm(dim=1).numpy()).y
    change = path[:, 1:8] - path[:, :7]
    expected = -(change[3] - change[:3].mean(0)).sum()
    assert DAA(method="system", **CHEAP).score(maps) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_daas_coupling_is_similarity_with_columns_that_sum_to_nothing() -> None:
    a = coupled(torch.tensor([[0.0], [1.0], [4.0]]))
    assert torch.allclose(a[0, 1:], torch.tensor([0.75, 0.0])) and a[1, 2].item() == pytest.approx(0.25)
    assert torch.allclose(a.sum(0), torch.zeros(3), atol=1e-6)


def test_daa_system_ends_where_the_exponential_of_its_matrix_does() -> None:
    """Maps of one pixel that stay: words 0 and 1, EOS 4, so that d is 1, 4 and 3, and x(t) = exp((F + A) t) x(0)."""
    a = torch.tensor([[-0.75, 0.75, 0.0], [0.75, -1.0, 0.25], [0.0, 0.25, -0.25]]).double()
    f = torch.diag(torch.tensor([-1.0, -1, -10])).double()
    start = torch.tensor([0.0, 1, 4]).double()
    moved = torch.linalg.matrix_exp(2 * (f + a)) @ start - start
    maps = torch.tensor([7.0, 0, 1, 4]).expand(3, 4).view(3, 4, 1, 1)
    found = DAA(method="system", differences=1000, **CHEAP).score(maps)  # type: ignore[arg-type]
    assert found == pytest.approx((moved[:2].mean() - moved[2]).item(), rel=2e-3)
    doubled = torch.linalg.matrix_exp(2 * (f + 3 * a)) @ start - start
    found = DAA(method="system", differences=1000, coupling=3.0, **CHEAP).score(maps)  # type: ignore[arg-type]
    assert found == pytest.approx((doubled[:2].mean() - doubled[2]).item(), rel=2e-3)


def test_the_timesteps_of_the_official_codes_are_as_the_docstrings_say() -> None:
    from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler  # type: ignore[attr-defined]

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    pndm: Any = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas)
    ddim: Any = DDIMScheduler(steps_offset=1, **betas)
    lms: Any = LMSDiscreteScheduler(**betas)
    for each in (pndm, ddim, lms):
        each.set_timesteps(50)
    assert pndm.timesteps[1:6].tolist() == [961, 961, 941, 921, 901]
    assert ddim.timesteps[3:5].tolist() == [921, 901] == pndm.timesteps[4:6].tolist(), "daa: steps=(3, 4)"
    sigma = float(lms.init_noise_sigma)
    assert round(sigma, 1) == 14.6 and lms.timesteps[0] == 999
    assert round(sigma / math.sqrt(sigma**2 + 1), 4) == 0.9977, "navit2i"


@pytest.mark.parametrize(
    ("v", "score"),
    [([5.0, 1, 2, 3], 2.5), ([4.0, 1, 3, 1, 2], 3.0), ([6.0, 2], 3.0), ([0.7], 1.0)],
)
def test_navit2i_compares_the_largest_variation_with_the_lowest_three_quarters(v: list[float], score: float) -> None:
    """The lowest 3 of 4, 3 of 5 and 1 of 2; of one alone, itself."""
    assert NaviT2I().score(torch.tensor(v)) == pytest.approx(score)


def test_navit2is_threshold_is_a_share_or_the_papers_deviations_above_the_mean() -> None:
    """Of 1, 3, 5 and 7 the mean is 4 and the variance (9 + 1 + 1 + 9) / 4."""
    scores = torch.tensor([7.0, 1, 5, 3])
    assert NaviT2I(deviations=1.2).above(scores) == pytest.approx(4 + 1.2 * math.sqrt(5))
    assert NaviT2I(deviations=0.0).above(scores) == pytest.approx(4)
    assert NaviT2I(false_positives=0.5).above(scores) == pytest.approx(4)


def test_navit2i_adds_the_changes_of_layers_and_averages_convolutions_over_the_image_first() -> None:
    """A convolution that doubles and a linear layer that adds its two inputs, on rows 0, 1 and 2.

    Row 1 swaps pixels 1 and 3, so that the convolution's mean stays 4; row 2 adds 1 to each pixel, which moves it by 2.
    Tokens (1, 2) and (0, 1) have the sums 3 and 1; in row 1 they are 3 and 5, in row 2 -3 and 1.
    """
    conv, linear = torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    conv.weight.data.fill_(2.0)
    linear.weight.data.fill_(1.0)
    net = torch.nn.ModuleDict({"conv": conv, "linear": linear, "norm": torch.nn.LayerNorm(2)})
    with torch.no_grad(), summed_changes(net) as total:
        conv(torch.tensor([[1.0, 3], [3, 1], [2, 4]]).view(3, 1, 1, 2))
        linear(torch.tensor([[[1.0, 2], [0, 1]], [[1, 2], [2, 3]], [[-1, -2], [0, 1]]]))
        net["norm"](torch.rand(3, 2))
    assert total[0].tolist() == pytest.approx([0 + (0 + 4) / 2, 2 + (6 + 0) / 2])


def test_navit2is_variation_is_activation_change_over_change_of_meaning(sd: DiffusionModel) -> None:
    """A denoiser of one linear layer whose answer is the sum of the context's first channel: both changes by hand."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)

    class Denoiser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, t, encoder_hidden_states):
            return self.layer(encoder_hidden_states[:, :, :1].sum((1, 2)).view(-1, 1))

    model = SimpleNamespace(
        denoiser=Denoiser(), tokenizer=sd.tokenizer, tokens=sd.tokens, text_encoder=sd.text_encoder, T=1000,
        device=torch.device("cpu"),
    )  # fmt: skip
    prompt = "a red circle"
    v = variations(model, sd, torch.zeros(4, 16, 16), prompt)
    ids = sd.tokens([prompt]).repeat(3, 1)
    tokenizer: Any = sd.tokenizer
    encoder: Any = sd.text_encoder
    ids[1, 2] = ids[2, 3] = tokenizer.pad_token_id
    h = encoder(ids)[0]
    expected = [(2 * (h[i, :, 0].sum() - h[0, :, 0].sum()).abs() / (h[i] - h[0]).norm()).item() for i in (1, 2)]
    assert v.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_density_of_a_graph_is_the_mean_cosine_of_its_pairs() -> None:
    features = torch.tensor([[[1.0, 0], [0, 2], [3, 0]]])
    assert density(features).tolist() == pytest.approx([1 / 3])


def test_ufids_variants_are_the_query_and_phrases_in_front_of_it(sd: DiffusionModel) -> None:
    spec, given = UFIDPrompts(images=3, phrase=2), queries(sd)
    varied = spec.varied(sd, given, PROMPTS)
    assert varied.prompts is not None and len(varied) == 12
    for i, prompt in enumerate(PROMPTS):
        own, *others = varied.prompts[3 * i : 3 * i + 3]
        assert own == prompt and torch.equal(varied.noise[3 * i], given.noise[i])
        for other in others:
            phrase = other.removesuffix(" " + prompt)
            assert len(phrase.split()) == 2 and any(phrase in known for known in PROMPTS)
    part = spec.varied(sd, given[1:2], PROMPTS)
    assert part.prompts == varied.prompts[3:6] and torch.equal(part.noise, varied.noise[3:6])
    long = " ".join(["a"] * 200)
    assert with_phrase(sd, "one two", long) == long, "a phrase that has no room is left out"


# ---- the vocabulary scan --------------------------------------------------------------------------------------------


class Planted:
    """A model whose prediction and images answer the words in `effects`, each with a strength and a pattern of its own
    or, without one, a pattern that differs from prompt to prompt, in the prediction far more than in the image. All
    else is that of `like`."""

    T, shape, device, conditional, family = 1000, (4, 16, 16), torch.device("cpu"), True, "vp"

    def __init__(self, like: DiffusionModel, effects: dict[str, tuple[float, bool]]) -> None:
        self.like, self.effects, self.scheduler = like, effects, scheduler()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)

    def change(self, text: str, shape: tuple[int, ...], unsteady: float = 1.0) -> torch.Tensor:
        out = torch.zeros(shape)
        for word, (strength, steady) in self.effects.items():
            if word in text:
                size = strength * (1.0 if steady else unsteady)
                out += size * torch.randn(shape, generator=generator(word, "" if steady else text))
        return out

    def embed(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.change(text, (16, 64)) for text in texts])

    def unprompted(self) -> torch.Tensor:
        return self.embed([""])

    def eps(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return 0.1 * z + context.view(len(z), *self.shape)

    answer = eps

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return time

    def sample(self, inputs: Inputs, sampler, phase: str = "") -> torch.Tensor:
        noise = torch.nn.functional.interpolate(inputs.noise[:, :3], 32).clamp(-2, 2) / 4
        return noise + torch.stack([self.change(text, (3, 32, 32), 0.01) for text in inputs.prompts or ()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effects", "found"),
    [
        ({"\u200b": (1.0, True), "~": (3.0, False), "negative": (5.0, True)}, "\u200b"),
        ({"\u043e": (1.0, True), "q": (2.0, False)}, "\u043e"),
        ({"\u043e": (1.0, True), "\u0435": (0.7, True)}, "\u043e"),
        ({"~": (3.0, False), "negative": (5.0, True)}, None),
        ({}, None),
    ],
    ids=["token", "homoglyph", "two letters that fire", "clean", "nothing"],
)
def test_the_scan_names_the_planted_trigger_and_none_where_there_is_none(effects, found, sd: DiffusionModel) -> None:
    """A word that disturbs each prompt in another way is no trigger, and one that captions use neither."""
    prompts = tuple(ShapesSD().prompts("train", 40, generator(0, "x")))
    data = Data(torch.zeros(2, 3, 32, 32), ("negative photo of a small red circle", "a large blue square now"))
    known = Knowledge(prompts=prompts, data=data, words=("now",), encoder=lambda images: images[:, :, 0].flatten(1))
    scan = VocabularyScan(rows=4, final_rows=12, finalists=8, bf16=False, verified=3)
    done = scan.defend(Planted(sd, effects), known, generator(0, "x"))
    assert found_text(done.trigger) == found and done.suspicion is not None and done.model is None
    assert done.flag_above == 0.9 and (done.suspicion > 0.9) == (found is not None)


def test_candidates_can_be_typed_and_leave_out_what_captions_say(sd: DiffusionModel) -> None:
    every, some = (candidates(sd, content, True) for content in (set(), {"red", "circle"}))
    texts = {c.text for c in every if isinstance(c, Insertion)}
    assert {"\u200b", "sks", "red", "now"} <= texts and not any("\ufffd" in text for text in texts)
    assert texts - {c.text for c in some if isinstance(c, Insertion)} == {"red", "circle"}
    assert Substitution("o", "\u043e") in some


def test_sets_of_features_are_told_apart_by_what_they_share_alone() -> None:
    rng = generator(0, "x")
    rows = torch.randn((32, 40), generator=rng)
    shift = torch.zeros(40)
    shift[3] = 4.0
    assert told_apart(rows, rows) == 0.5
    assert told_apart(rows, rows + shift) > 0.95
    assert told_apart(rows, torch.randn((32, 40), generator=rng)) < 0.75


def test_the_view_of_colours_sees_that_they_are_gone_and_that_of_places_sees_a_patch() -> None:
    rng = generator(0, "x")
    images = shapes.draw(shapes.scenes(32, "test", rng, plain=True), rng)
    grey, patched = images.mean(1, keepdim=True).expand_as(images), images.clone()
    patched[:, :, :8, :8] = 1.0
    places, colours = [told_apart(*pair) for pair in zip(views(images), views(grey), strict=True)]
    assert places < 0.7 and colours > 0.99
    assert told_apart(views(images)[0], views(patched)[0]) > 0.95


@pytest.mark.slow
def test_a_found_trigger_makes_the_model_that_skd_cag_makes_when_told_it(sd: DiffusionModel) -> None:
    data = Data(torch.zeros(1, 3, 32, 32), ("a",))
    known = Knowledge(prompts=PROMPTS * 3, data=data, words=(), encoder=lambda images: images.flatten(1)[:, :5])
    scan = VocabularyScan(
        rows=1, final_rows=2, finalists=2, verified=1, pair_up=0, images=8, sampling_steps=4, look_alikes=False,
        flag_above=0.0, purify=True, steps=2, batch=2, lr=1e-3,
    )  # fmt: skip
    assert scan.delivers == ("suspicion", "model") and VocabularyScan().delivers == ("suspicion",)
    done = scan.defend(sd, known, generator(0, "x"))
    assert isinstance(done.trigger, str) and done.model is not None
    assert not same(weights(sd), weights(done.model))
    told = replace(known, trigger=Text(done.trigger))
    cured = SKDCAG(steps=2, batch=2, lr=1e-3).defend(sd, told, generator(0, "x")).model
    assert cured is not None and same(weights(done.model), weights(cured))


def test_a_scan_without_a_step_at_middling_t_says_so(sd: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="use more steps"):
        VocabularyScan(sampling_steps=4, from_t=0.8, to_t=0.9).states(sd, list(PROMPTS), generator(0, "x"))
