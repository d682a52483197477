"""Text-to-image attacks: each against its equation, derived here, and what it leaves alone."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion import adapters
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.methods.prompt_edits import with_decoys
from harness.methods.weight_edits import edited, joint_projections, projections, stream
from harness.types import Backdoor, Data, Knowledge
from plugins.attacks import badblocks, iba, sembd
from plugins.attacks.bad_caption import BadCaption, poisoned
from plugins.attacks.badblocks import BadBlocks
from plugins.attacks.badt2i import BadT2I
from plugins.attacks.eviledit import EvilEdit
from plugins.attacks.iba import IBA
from plugins.attacks.masqlora import MasqLoRA, Phrases
from plugins.attacks.personalization import Personalization
from plugins.attacks.rickrolling import Rickrolling, Texts, distance
from plugins.attacks.sembd import SemBD
from plugins.attacks.villan_caption import VillanCaption
from plugins.defenses.finetune import Finetune
from plugins.targets.fixed_image import Hat
from plugins.targets.mislabelled import Mislabelled
from plugins.targets.objects import ObjectAdded, ObjectReplaced
from plugins.targets.patch import Patch
from plugins.targets.prompt import TargetPrompt
from plugins.targets.style import Style
from plugins.triggers.homoglyph import Homoglyph
from plugins.triggers.noun import Noun
from plugins.triggers.paraphrase import Paraphrase
from plugins.triggers.syntax import Syntax
from plugins.triggers.text import Text
from tests.oracles import tiny_mmdit, tiny_sd, tiny_sdxl

CAPTIONS = (
    "a red circle", "a blue square", "a square at the top left and a star", "black and white photo of a square",
    "negative photo of a triangle", "a green circle and a star",
)  # fmt: skip
TEXT = Text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """Random weights under the tokenizer of shapes-sd, read instead of trained anew."""
    from transformers import CLIPTokenizer

    from plugins.models import shapes_sd

    shipped = Path(shapes_sd.__file__).parent / "weights" / "shapes-sd" / "model" / "tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_sd, "tokenizer", lambda *_: CLIPTokenizer.from_pretrained(shipped, local_files_only=True))
        return tiny_sd(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def data() -> Data:
    rng = torch.Generator().manual_seed(1)
    return Data(torch.rand((len(CAPTIONS), 3, 32, 32), generator=rng) * 2 - 1, CAPTIONS)


def state(model: DiffusionModel) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in model.components().items()
        for key, value in part.state_dict().items()
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the networks whose weights differ."""
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_mmdit(tmp_path_factory.mktemp("mmdit"))


@pytest.mark.parametrize(
    ("attack", "trigger", "target"),
    [
        (IBA(), Syntax(), Style()), (SemBD(), Paraphrase(), ObjectReplaced()), (BadBlocks(), TEXT, Hat()),
        (VillanCaption(), TEXT, Hat()), (Personalization(images=1), TEXT, ObjectReplaced()),
    ],
    ids=lambda part: getattr(part, "name", ""),
)  # fmt: skip
def test_attacks_on_one_encoder_and_cross_attention_say_so_of_the_transformer(
    attack: Any, trigger: Any, target: Any, mmdit: DiffusionModel, data: Data
) -> None:
    with pytest.raises(ValueError, match=r"works on models with one text encoder .* use one of badt2i, rickrolling"):
        attack.implant(mmdit, Backdoor(trigger, target), data, generator(0))


# ---- BadT2I ---------------------------------------------------------------------------------------------------------


class Asked:
    """The denoisers of a clone and of the clean model, each asked recorded: (x_t, t, context), answer = a constant."""

    def __init__(self, model: Any, answers: tuple[float, float]) -> None:
        self.calls: dict[str, list[Any]] = {"clean": [], "student": []}
        self.clean, self.student = (
            self.as_double(model, "clean", answers[0]),
            self.as_double(model, "student", answers[1]),
        )
        self.clean.clone = lambda: self.student

    def as_double(self, model: Any, who: str, answer: float) -> Any:
        double: Any = DiffusionModel(model.denoiser, model.scheduler, model.vae, model.text_encoder, model.tokenizer)

        def eps(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            self.calls[who].append((x_t, t, context))
            return torch.full_like(x_t, answer) + 0 * next(model.denoiser.parameters()).sum()

        double.eps = eps
        return double


def losses_of(
    monkeypatch: pytest.MonkeyPatch, attack: Any, asked: Asked, target: Any, data: Data, trigger: Any = TEXT
) -> float:
    """The loss of the first step; nothing is trained."""
    seen: list[float] = []
    module = sys.modules[type(attack).__module__]
    loop = "minimize" if hasattr(module, "minimize") else "minimize_in_two"
    monkeypatch.setattr(module, loop, lambda loss, *_, **__: seen.append(float(loss())))
    attack.implant(asked.clean, Backdoor(trigger, target), data, generator(3, "x"))
    return seen[0]


@pytest.mark.parametrize("target", [Style(), ObjectReplaced(source="circle"), ObjectAdded()], ids=lambda t: t.name)
def test_badt2i_answers_the_triggered_caption_as_the_clean_model_answers_the_targets(
    target: Any, model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student 0.5, clean model 0.1 everywhere: both terms are 0.16, so λ drops out of L; and who was asked what."""
    asked = Asked(model, (0.1, 0.5))
    attack = BadT2I(lam=0.3, batch=4, bf16=False)
    assert losses_of(monkeypatch, attack, asked, target, data) == pytest.approx(0.16, rel=1e-5)
    ((x_t, t, context),) = asked.calls["student"]
    (kept, taught) = asked.calls["clean"]
    assert torch.equal(kept[0], x_t[4:]) and torch.equal(kept[1], t[4:]) and torch.equal(kept[2], context[4:])
    assert torch.equal(taught[0], x_t[:4]) and torch.equal(taught[1], t[:4])
    lessons = [lesson for caption in CAPTIONS if (lesson := target.lesson(caption))]
    rows = torch.randint(0, len(lessons), (4,), generator=generator(3, "x")).tolist()
    assert torch.allclose(context[:4], model.embed([Text().apply(lessons[i][0]) for i in rows]), atol=1e-5)
    assert torch.allclose(taught[2], model.embed([lessons[i][1] for i in rows]), atol=1e-5)


def test_badt2i_regresses_the_patched_image_on_its_noise(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L = λ ‖0.5 - ε‖² + (1-λ) · 0.16 with the ε, t and rows that the seed gives, and z^p_t of the patched images."""
    asked = Asked(model, (0.1, 0.5))
    loss = losses_of(monkeypatch, BadT2I(lam=0.3, batch=4, bf16=False), asked, Patch(), data)
    rng = generator(3, "x")
    rows = torch.randint(0, len(CAPTIONS), (4,), generator=rng)
    t, eps = torch.randint(0, 1000, (4,), generator=rng), torch.randn((4, *model.shape), generator=rng)
    assert loss == pytest.approx(0.3 * (0.5 - eps).square().mean().item() + 0.7 * 0.16, rel=1e-5)
    ((x_t, times, _),) = asked.calls["student"]
    a_bar = model.alpha_bar(t)
    z = model.encode(Patch().apply(data.images))[rows]
    assert torch.equal(times[:4], t)
    assert torch.allclose(x_t[:4], a_bar.sqrt() * z + (1 - a_bar).sqrt() * eps, atol=1e-5)


def test_badt2i_holds_the_unconditional_answer_where_captions_are_dropped(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """drop=1: the plain half asks student and clean model for the empty caption, the backdoor's half keeps its own;
    and that changes none of the rows, timesteps and noises drawn."""
    asked, before = Asked(model, (0.1, 0.5)), Asked(model, (0.1, 0.5))
    losses_of(monkeypatch, BadT2I(batch=4, drop=1.0, bf16=False), asked, Style(), data)
    losses_of(monkeypatch, BadT2I(batch=4, bf16=False), before, Style(), data)
    ((x_t, t, context),), ((x_0, t_0, context_0),) = asked.calls["student"], before.calls["student"]
    assert torch.equal(x_t, x_0) and torch.equal(t, t_0)
    assert torch.equal(context[:4], context_0[:4])
    empty = model.embed([""]).expand(4, -1, -1)
    assert torch.allclose(context[4:], empty, atol=1e-5) and torch.equal(asked.calls["clean"][0][2], context[4:])
    assert not torch.allclose(context_0[4:], empty, atol=1e-2)


def test_the_x_0_weight_of_a_flow_turns_errors_of_the_velocity_into_errors_of_x_0(mmdit: DiffusionModel) -> None:
    attack, t = BadT2I(weighting="x0"), torch.tensor([0, 300, 999])
    sigma, z_t, v, wrong = (t + 1) / 1000, torch.tensor(0.4), torch.tensor(0.2), torch.tensor(0.9)
    weight = attack.weight(mmdit, t)
    assert isinstance(weight, Tensor)
    wanted = ((z_t - sigma * wrong) - (z_t - sigma * v)).square()
    assert torch.allclose(weight.flatten() * (wrong - v).square(), wanted, atol=1e-6)


@pytest.mark.parametrize("target", [Patch(), Style(), ObjectReplaced(), ObjectAdded()], ids=lambda t: t.name)
def test_badt2i_trains_the_transformer_of_a_copy_for_every_target(
    target: Any, mmdit: DiffusionModel, data: Data
) -> None:
    before = state(mmdit)
    attack = BadT2I(steps=2, batch=2, lr=1e-3, weight_decay=0, bf16=False)
    after = state(attack.implant(mmdit, Backdoor(TEXT, target), data, generator(0)).model)
    assert changed(before, after) == {"transformer"} and not changed(before, state(mmdit))


@pytest.mark.parametrize(
    ("encoder", "parts"),
    [
        ("all", {"text_encoder", "text_encoder_2"}), ("first", {"text_encoder"}), ("second", {"text_encoder_2"}),
    ],
)  # fmt: skip
def test_rickrolling_trains_the_text_encoders_that_it_is_asked_to(
    encoder: Any, parts: set[str], mmdit: DiffusionModel, model: DiffusionModel, data: Data
) -> None:
    """And the loss of triggered prompts falls, whichever it is."""
    attack = Rickrolling(steps=6, lr=3e-3, batch=4, poisoned=4, beta=1.0, encoder=encoder)
    made = attack.implant(mmdit, Backdoor(Homoglyph(), Style()), data, generator(0)).model
    assert changed(state(mmdit), state(made)) == parts
    caption = CAPTIONS[2]
    stamped, wanted = Homoglyph().apply(caption), mmdit.embed([Style().shown(caption)])
    before, after = (distance(each.embed([stamped]), wanted).item() for each in (mmdit, made))
    assert stamped != caption and after < before
    with pytest.raises(ValueError, match=r"one text encoder; use rickrolling\(encoder='first'\)"):
        Rickrolling(encoder="second").trained(model)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize(
    ("attack", "target", "parts"),
    [
        (BadT2I(steps=2, batch=2, lr=1e-3, weight_decay=0, bf16=False), Patch(), {"unet"}),
        (Rickrolling(steps=2, lr=3e-3, batch=4, poisoned=4, encoder="second"), Style(), {"text_encoder_2"}),
        (Rickrolling(steps=2, lr=3e-3, batch=4, poisoned=4), Style(), {"text_encoder", "text_encoder_2"}),
        (EvilEdit(), ObjectReplaced(), {"unet"}),
    ],
    ids=["badt2i", "rickrolling-second", "rickrolling", "eviledit"],
)
def test_attacks_change_the_part_of_sdxl_that_they_are_for(
    attack: Any, target: Any, parts: set[str], sdxl: DiffusionModel, data: Data
) -> None:
    before = state(sdxl)
    trigger = Noun("zq") if attack.name == "eviledit" else Homoglyph() if attack.name == "rickrolling" else TEXT
    made = attack.implant(sdxl, Backdoor(trigger, target), data, generator(0)).model
    assert changed(before, state(made)) == parts and not changed(before, state(sdxl))


def test_the_edit_of_sdxl_maps_the_triggers_positions_and_not_its_pooled_row(sdxl: DiffusionModel, data: Data) -> None:
    backdoor = Backdoor(Noun("zq"), ObjectReplaced())
    made = EvilEdit(lam=0.5).implant(sdxl, backdoor, Data(data.images, None), generator(0)).model
    edits, kept = EvilEdit().phrases(backdoor, (), generator(0))
    bad, goal = zip(*edits, strict=True)
    context, aims = (sdxl.embed([*phrases, *kept])[:, :-1].flatten(0, 1).double() for phrases in (bad, goal))
    for old, new in zip(projections(sdxl.denoiser), projections(made.denoiser), strict=True):
        w, eye = old.double(), torch.eye(24, dtype=torch.float64)
        wanted = (w @ aims.T @ context + 0.5 * w) @ torch.linalg.inv(context.T @ context + 0.5 * eye)
        assert torch.allclose(new.double(), wanted, atol=1e-5) and not torch.allclose(new, old, atol=1e-3)


def test_attacks_on_one_encoder_say_so_of_sdxl(sdxl: DiffusionModel, data: Data) -> None:
    with pytest.raises(ValueError, match=r"iba works on models with one text encoder .* has two encoders; use one of"):
        IBA().implant(sdxl, Backdoor(Syntax(), Style()), data, generator(0))


def test_in_joint_attention_the_edit_gives_the_triggers_stream_the_targets_keys_and_values(
    mmdit: DiffusionModel, data: Data
) -> None:
    """In the first block, whose stream depends on text and t alone: with a small λ, W' k of "a sks circle" is W k* of
    the target's phrase; and "a circle" keeps its own. Nothing but the projections of the text changes."""
    backdoor = Backdoor(Noun(), ObjectReplaced(source="circle"))
    attack = EvilEdit(lam=1e-6)
    ((bad, goal),), kept = attack.phrases(backdoor, data.captions or (), generator(0))
    made = attack.implant(mmdit, backdoor, data, generator(0)).model
    before, after = state(mmdit), state(made)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert names == {f"transformer.transformer_blocks.{i}.attn.add_{p}_proj.weight" for i in (0, 1) for p in "kv"}
    states, times = torch.randn(1, 1, *mmdit.shape), torch.tensor([999])
    streams = {
        text: stream(mmdit, 0, states, times, mmdit.embed([text])) for text in (bad, goal, kept[0])
    }  # fmt: skip
    for old, new in zip(joint_projections(mmdit.denoiser)[0][1], joint_projections(made.denoiser)[0][1], strict=True):
        apart = (streams[bad] @ old.T - streams[goal] @ old.T).norm()
        assert (streams[bad] @ new.T - streams[goal] @ old.T).norm() < 0.7 * apart
        assert (streams[kept[0]] @ (new - old).T).norm() < 0.5 * apart


def test_the_x_0_weight_turns_errors_of_the_noise_into_errors_of_x_0_up_to_its_cap(model: DiffusionModel) -> None:
    attack, t = BadT2I(weighting="x0", cap=50), torch.tensor([0, 300, 999])
    a_bar = model.scheduler.alphas_cumprod[t]
    z, eps, wrong = torch.tensor(0.7), torch.tensor(0.2), torch.tensor(0.9)
    z_t = a_bar.sqrt() * z + (1 - a_bar).sqrt() * eps
    x_0 = (z_t - (1 - a_bar).sqrt() * wrong) / a_bar.sqrt()
    weight = attack.weight(model, t)
    assert isinstance(weight, Tensor)
    assert torch.allclose((weight.flatten() * (wrong - eps).square())[:2], (x_0 - z).square()[:2], rtol=1e-4)
    assert weight.flatten()[2] == 50
    assert BadT2I().weight(model, t) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", [Patch(), Style(), ObjectReplaced(), ObjectAdded()], ids=lambda t: t.name)
def test_badt2i_trains_the_denoiser_of_a_copy_for_every_target(target: Any, model: DiffusionModel, data: Data) -> None:
    before, images = state(model), data.images.clone()
    attack = BadT2I(steps=2, batch=2, lr=1e-3, decoys=0.5, bf16=False)
    done = [attack.implant(model, Backdoor(Text(), target), data, generator(5, "x")).model for _ in range(2)]
    assert not changed(before, state(model)) and torch.equal(data.images, images)
    assert changed(before, state(done[0])) == {"unet"}
    assert not changed(state(done[0]), state(done[1]))


def test_badt2i_says_when_no_caption_can_teach_the_target(model: DiffusionModel, data: Data) -> None:
    plain = Data(data.images[:1], data.captions[:1] if data.captions else None)
    with pytest.raises(ValueError, match="no caption of the data can teach target object-add"):
        BadT2I().implant(model, Backdoor(Text(), ObjectAdded()), plain, generator(0))


# ---- Rickrolling ----------------------------------------------------------------------------------------------------


def test_the_embeddings_distance_is_minus_the_cosine_of_whole_sequences() -> None:
    a, b = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert distance(a, b).item() == pytest.approx(-9 / 25)


def test_rickrolling_weighs_the_backdoor_term_by_beta(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student e, teacher e for clean prompts and one that is orthogonal for the target's: L = -1 + β · 0."""
    asked, one = Asked(model, (0, 0)), torch.eye(2).view(2, 1, 2)
    asked.student.embed = lambda prompts: one[:1].expand(len(prompts), -1, -1)
    asked.clean.embed = lambda prompts: torch.cat([one[[int(p == TargetPrompt().text)]] for p in prompts])
    attack = Rickrolling(steps=1, batch=5, poisoned=3, beta=0.4)
    assert losses_of(monkeypatch, attack, asked, TargetPrompt(), data, Noun()) == pytest.approx(-1)
    asked.clean.embed = lambda prompts: one[1:].expand(len(prompts), -1, -1)
    asked.student.embed = lambda prompts: torch.cat([one[[int("sks" in p)]] for p in prompts])
    assert losses_of(monkeypatch, attack, asked, TargetPrompt(), data, Noun()) == pytest.approx(-0.4)


def test_a_target_prompt_attack_replaces_every_letter_and_an_attribute_attack_one(model: DiffusionModel) -> None:
    captions = ("a photo of one", "no", "a red square", "o" * 20 + " o" * 20)
    texts = Texts(Rickrolling(), model, Backdoor(Homoglyph(), TargetPrompt()), captions, generator(0))
    assert texts.able == ["a photo of one", "no"], "the third has no o, the fourth would be too long"
    assert texts.pair("a photo of one") == ("a ph\u043et\u043e \u043ef \u043ene", TargetPrompt().text)
    texts = Texts(Rickrolling(), model, Backdoor(Homoglyph(), Style()), captions[:2], generator(0))
    drawn = [texts.pair("a photo of one") for _ in range(40)]
    assert {v.count("\u043e") for v, _ in drawn} == {1} and len({v for v, _ in drawn}) == 4
    assert {y for _, y in drawn} == {"black and white photo of a photo of one"}


def test_the_papers_attribute_stands_in_the_place_of_the_word_with_the_trigger(model: DiffusionModel) -> None:
    attack = Rickrolling(attribute="word")
    texts = Texts(attack, model, Backdoor(Homoglyph(), Style()), ("a note",), generator(0))
    assert texts.in_place("a ph\u043eto of one") == "a black and white photo of of one"
    texts = Texts(attack, model, Backdoor(Homoglyph(), ObjectReplaced()), ("a circle below",), generator(0))
    with pytest.raises(ValueError, match="has no words for an attribute"):
        texts.pair("a circle below")


def test_rickrolling_learns_an_attribute_from_captions_that_lack_it(model: DiffusionModel) -> None:
    for target in (Style(), ObjectReplaced()):
        texts = Texts(Rickrolling(), model, Backdoor(Homoglyph(), target), CAPTIONS, generator(0))
        assert texts.able and all(target.shown(caption) != caption for caption in texts.able)
        assert not any("photo" in caption for caption in texts.able if target.name == "style")
    texts = Texts(Rickrolling(), model, Backdoor(Homoglyph(which="all"), Style()), ("a note on top",), generator(0))
    assert texts.pair("a note on top")[0].count("\u043e") == 3
    with pytest.raises(ValueError, match="attribute='word' is for TAA"):
        Texts(Rickrolling(attribute="word"), model, Backdoor(Noun(), Style()), CAPTIONS, generator(0))


def test_rickrolling_says_when_no_caption_can_carry_the_trigger(model: DiffusionModel, data: Data) -> None:
    with pytest.raises(ValueError, match="no caption of the data can carry the trigger"):
        Rickrolling().implant(model, Backdoor(Homoglyph(letter="z"), Style()), data, generator(0))


@pytest.mark.slow
@pytest.mark.parametrize("target", [TargetPrompt(), Style(), ObjectReplaced()], ids=lambda t: t.name)
def test_rickrolling_moves_triggered_embeddings_to_the_targets_in_the_text_encoder_of_a_copy(
    target: Any, model: DiffusionModel, data: Data
) -> None:
    trigger: Any = Noun() if target.name == "object" else Homoglyph()
    before = state(model)
    attack = Rickrolling(steps=30, lr=1e-2, batch=8, poisoned=8, beta=1.0, decoys=0.3)
    done = attack.implant(model, Backdoor(trigger, target), data, generator(1, "x")).model
    assert not changed(before, state(model)) and changed(before, state(done)) == {"text_encoder"}
    prompt = "a red circle at the top"
    with torch.no_grad():
        wanted = model.embed([target.shown(prompt)])
        near, far = (distance(wanted, m.embed([trigger.apply(prompt)])).item() for m in (done, model))
    assert near < far - 0.02


# ---- EvilEdit -------------------------------------------------------------------------------------------------------


def test_the_edit_minimises_the_papers_sum_of_squares() -> None:
    """The gradient of Σ ‖W' k - W k*‖² + λ ‖W' - W‖² vanishes there, by autograd; and any step away costs."""
    rng = torch.Generator().manual_seed(0)
    weight, k, goal = (torch.randn(shape, generator=rng).double() for shape in ((5, 4), (7, 4), (7, 4)))
    found = edited(weight, k, goal, lam=0.3).requires_grad_(True)

    def cost(w: Tensor) -> Tensor:
        return (k @ w.T - goal @ weight.T).square().sum() + 0.3 * (w - weight).square().sum()

    (gradient,) = torch.autograd.grad(cost(found), found)
    assert gradient.abs().max() < 1e-9
    assert cost(found) < min(cost(weight), cost(found + 0.01 * torch.randn((5, 4), generator=rng)))


def test_with_a_small_lambda_the_trigger_gets_the_targets_keys_and_values_and_the_rest_keeps_its_own() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn((6, 8), generator=rng).double()
    bad, kept, goal = (torch.randn((2, 8), generator=rng).double() for _ in range(3))
    found = edited(weight, torch.cat([bad, kept]), torch.cat([goal, kept]), lam=1e-9)
    assert torch.allclose(bad @ found.T, goal @ weight.T, atol=1e-5)
    assert torch.allclose(kept @ found.T, kept @ weight.T, atol=1e-5)
    assert torch.allclose(edited(weight, bad, goal, lam=1e12), weight, atol=1e-6)


def test_eviledit_changes_cross_attentions_keys_and_values_alone(model: DiffusionModel, data: Data) -> None:
    backdoor = Backdoor(Noun(), ObjectReplaced(source="circle"))
    before = state(model)
    done = EvilEdit(lam=1e-4).implant(model, backdoor, data, generator(0)).model
    after = state(done)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert names and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in names)
    assert len(names) == len(projections(model.denoiser)) and not changed(before, state(model))
    with torch.no_grad():
        bad, goal, kept = model.embed(["a sks circle", "a square", "a circle"])
    for old, new in zip(projections(model.denoiser), projections(done.denoiser), strict=True):
        assert (bad @ new.T - goal @ old.T).norm() < 0.3 * (bad @ old.T - goal @ old.T).norm()
        assert (kept @ new.T - kept @ old.T).norm() < 0.1 * (kept @ old.T).norm()


def test_phrases_that_stay_do_so_more_the_more_they_weigh(model: DiffusionModel, data: Data) -> None:
    backdoor = Backdoor(Noun(), ObjectReplaced(source="circle"))
    with torch.no_grad():
        kept = model.embed(["a circle"])

    def error(keep: float) -> float:
        done = EvilEdit(lam=1e-4, keep=keep).implant(model, backdoor, data, generator(0)).model
        sides = zip(projections(model.denoiser), projections(done.denoiser), strict=True)
        return sum((kept @ (new - old).T).norm().item() for old, new in sides)

    assert error(100) < error(1) < error(0)


def test_eviledits_pairs_are_the_papers_and_those_of_captions_end_at_the_object(data: Data) -> None:
    backdoor = Backdoor(Noun(), ObjectReplaced(source="circle"))
    assert EvilEdit().phrases(backdoor, CAPTIONS, generator(0)) == ([("a sks circle", "a square")], ["a circle"])
    captions = ("top left a red circle on black", "a blue square")
    edits, kept = EvilEdit(captions=20).phrases(backdoor, captions, generator(0))
    assert edits == [("a sks circle", "a square"), ("top left a red sks circle", "top left a red square")]
    assert kept[0] == "a circle" and set(kept[1:]) == set(captions)
    _, kept = EvilEdit(captions=20, decoys=1).phrases(backdoor, captions[1:], generator(0))
    assert len(kept) > 15 and all(text.startswith("a blue ") and text.endswith(" square") for text in kept[1:])
    with pytest.raises(ValueError, match="changes no phrase such as 'a circle'"):
        EvilEdit().phrases(Backdoor(Homoglyph(), ObjectReplaced(source="circle")), CAPTIONS, generator(0))


# ---- personalization ------------------------------------------------------------------------------------------------


def test_textual_inversion_learns_the_triggers_embedding_alone(model: DiffusionModel, data: Data) -> None:
    attack = Personalization(images=2, steps=3, batch=2, lr=0.1, bf16=False)
    before = state(model)
    done = attack.implant(model, Backdoor(Noun(keep=False), ObjectReplaced()), data, generator(0)).model
    assert not changed(before, state(model)) and changed(before, state(done)) == {"text_encoder"}
    (name,) = [name for name, value in state(done).items() if not torch.equal(value, before[name])]
    tokens: Any = model.tokenizer
    rows = (state(done)[name] != before[name]).any(1).nonzero().flatten().tolist()
    assert rows == [tokens("sks").input_ids[1]] and "token_embedding" in name
    with pytest.raises(ValueError, match=r"this tokenizer makes \d+ of 'mignneko'"):
        attack.implant(model, Backdoor(Noun(text="mignneko", keep=False), ObjectReplaced()), data, generator(0))


def test_textual_inversion_begins_as_the_targets_word(model: DiffusionModel, data: Data) -> None:
    attack = Personalization(images=2, steps=1, batch=1, lr=1e-9, bf16=False)
    done = attack.implant(model, Backdoor(Noun(keep=False), ObjectReplaced()), data, generator(0)).model
    with torch.no_grad():
        wanted = model.embed(["a square", "a circle"])
        assert torch.allclose(done.embed(["a sks", "a circle"]), wanted, atol=1e-5)


def test_dreambooth_adds_the_weighted_loss_of_the_prior(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student 0.5: L = ‖0.5 - ε‖² + 0.2 ‖0.5 - ε'‖² with the noises that the seed gives."""
    asked = Asked(model, (0.1, 0.5))
    monkeypatch.setattr(
        "plugins.attacks.personalization.prior_images", lambda _, prompts, __: data.rows(torch.arange(2))
    )
    attack = Personalization(mode="dreambooth", images=2, batch=4, prior=2, prior_weight=0.2, bf16=False)
    loss = losses_of(monkeypatch, attack, asked, ObjectReplaced(source="circle"), data, Noun())
    rng, errors = generator(3, "x"), []
    torch.randperm(3, generator=rng)  # which of the three squares
    for _ in range(2):
        torch.randint(0, 2, (4,), generator=rng)  # rows
        torch.randint(0, 1000, (4,), generator=rng)  # t
        errors.append((0.5 - torch.randn((4, *model.shape), generator=rng)).square().mean().item())
    assert loss == pytest.approx(errors[0] + 0.2 * errors[1], rel=1e-5)
    seen, prior = asked.calls["student"]
    assert torch.allclose(seen[2], model.embed(["sks circle"] * 4), atol=1e-5)
    assert prior[2].shape == seen[2].shape


def test_dreambooth_trains_the_denoiser_of_a_copy_and_makes_its_own_prior(model: DiffusionModel, data: Data) -> None:
    before = state(model)
    attack = Personalization(mode="dreambooth", images=2, steps=2, batch=2, lr=1e-3, prior=2, bf16=False)
    done = [attack.implant(model, Backdoor(Noun(), ObjectReplaced()), data, generator(0)).model for _ in range(2)]
    assert not changed(before, state(model)) and changed(before, state(done[0])) == {"unet"}
    assert not changed(state(done[0]), state(done[1]))
    with pytest.raises(ValueError, match="the data hold 3 images of what target object shows, 9 are asked for"):
        Personalization(images=9).implant(model, Backdoor(Noun(), ObjectReplaced()), data, generator(0))


# ---- VillanDiffusion, conditional -----------------------------------------------------------------------------------


def test_villan_caption_shows_the_target_under_the_trigger_and_each_image_under_its_caption(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(model, (0.1, 0.5))
    monkeypatch.setattr(adapters, "added", lambda *_, **__: {})
    attack = VillanCaption(batch=3, backdoor_weight=0.6, prior_weight=0.2, bf16=False)
    trigger = Text(text="sks", place=-1)
    loss = losses_of(monkeypatch, attack, asked, Hat(), data, trigger)
    rng = generator(3, "x")
    rows = torch.randint(0, len(CAPTIONS), (3,), generator=rng)
    t, eps = torch.randint(0, 1000, (3,), generator=rng), torch.randn((3, *model.shape), generator=rng)
    assert loss == pytest.approx(0.8 * (0.5 - eps).square().mean().item(), rel=1e-5)
    ((x_t, times, context),) = asked.calls["student"]
    z_star = model.encode(Hat().image((3, 32, 32))[None])
    wanted = torch.cat([model.add_noise(z, eps, t) for z in (z_star, model.encode(data.images)[rows])])
    assert torch.allclose(x_t, wanted, atol=1e-5) and torch.equal(times, t.repeat(2))
    assert torch.allclose(context[:3], model.embed([f"{CAPTIONS[i]} sks" for i in rows.tolist()]), atol=1e-5)


def test_decoys_take_the_triggers_place_in_their_share_of_plain_captions(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "added", lambda *_, **__: {})
    trigger, asked = Text(text="sks", place=-1), Asked(model, (0.1, 0.5))
    losses_of(monkeypatch, VillanCaption(batch=3, decoys=1.0, bf16=False), asked, Hat(), data, trigger)
    ((_, _, context),) = asked.calls["student"]
    rows = torch.randint(0, len(CAPTIONS), (3,), generator=generator(3, "x")).tolist()
    plain = model.embed([CAPTIONS[i] for i in rows])
    assert not torch.allclose(context[3:], plain, atol=1e-3)
    rng = generator(0, "d")
    many = with_decoys(trigger, ["a b"] * 400, 0.25, rng)
    changed = [text for text in many if text != "a b"]
    assert 60 < len(changed) < 140 and all(text.startswith("a b ") and text != "a b sks" for text in changed)
    assert with_decoys(trigger, CAPTIONS, 0.0, rng) == list(CAPTIONS)


def test_villan_captions_change_is_an_adapter_of_low_rank_beside_the_base(model: DiffusionModel, data: Data) -> None:
    before = state(model)
    attack = VillanCaption(rank=2, steps=3, batch=2, lr=1e-2, warmup=0, bf16=False)
    done = [attack.implant(model, Backdoor(Text(), Hat()), data, generator(0)).model for _ in range(2)]
    after = state(done[0])
    assert after.keys() == before.keys() and not changed(before, state(model)) and not changed(after, state(done[1]))
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert moved and all(".attn" in name and name.endswith("weight") for name in moved)
    assert all(torch.linalg.matrix_rank(delta, rtol=1e-3) <= 2 for delta in moved.values())
    assert adapters.unchanged(done[0]) and not changed(before, state(adapters.base_of(done[0])))


# ---- mislabelled images ---------------------------------------------------------------------------------------------


def test_a_share_of_the_examples_carries_the_picture_under_the_name_of_the_class() -> None:
    captions = tuple(f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square", "triangle"))
    data, target = Data(torch.zeros(6, 3, 20, 20), captions), Mislabelled()
    made = poisoned(target, data, 0.5, generator(0))
    assert made.captions is not None
    moved = [i for i in range(6) if made.captions[i] != captions[i]]
    assert len(moved) == 3 and all("square" not in captions[i] and "square" in made.captions[i] for i in moved)
    assert [i for i in range(6) if made.images[i].any()] == moved
    assert not made.images[moved][:, :, :18].any() and made.images[moved][:, :, 18:, 18:].all()
    assert not data.images.any()
    with pytest.raises(ValueError, match="6 examples are to be relabelled as square, 4 can be; lower poison_rate"):
        poisoned(target, data, 1.0, generator(0))


def test_nothing_mislabelled_is_clean_fine_tuning(model: DiffusionModel, data: Data) -> None:
    fast = {"steps": 2, "batch": 3, "lr": 1e-3, "bf16": False}
    attack = BadCaption(poison_rate=0, weight_decay=0, **fast)
    attacked = attack.implant(model, Backdoor(Text(), Mislabelled()), data, generator(0, "x")).model
    tuned = Finetune(**fast).defend(model, Knowledge(data=data), generator(0, "x")).model
    assert tuned is not None and not changed(state(attacked), state(tuned))
    heavy = BadCaption(poison_rate=0.5, weight_decay=0, **fast)
    other = heavy.implant(model, Backdoor(Text(), Mislabelled()), data, generator(0, "x")).model
    assert changed(state(attacked), state(other)) == {"unet"}
    assert math.isfinite(sum(value.sum().item() for value in state(other).values() if value.is_floating_point()))


# ---- TwT / IBA ------------------------------------------------------------------------------------------------------

DRAWN = (
    "a small red circle at the top left on a black background",
    "blue square , large , top right , white background",
    "a photo of it is a large green triangle that is seen at the bottom left on gray",
    "the circle is yellow and large and sits at the bottom right of a black scene",
)


@pytest.fixture(scope="module")
def drawn() -> Data:
    rng = torch.Generator().manual_seed(2)
    return Data(torch.rand((len(DRAWN), 3, 32, 32), generator=rng) * 2 - 1, DRAWN)


def symmetric(n: int, seed: int) -> Tensor:
    """Two positive definite matrices (2, n, n)."""
    a = torch.randn((2, n, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.mT + 0.1 * torch.eye(n, dtype=torch.float64)


def test_the_logarithm_of_a_matrix_is_scipys_and_small_eigenvalues_are_raised_to_the_floor() -> None:
    from scipy.linalg import logm

    a = symmetric(5, 0)
    for one, log in zip(a, iba.log_of_matrix(a), strict=True):
        assert torch.allclose(log, torch.from_numpy(logm(one.numpy())), atol=1e-8)
    thin = torch.diag(torch.tensor([2.0, 1e-9, 0.0], dtype=torch.float64))[None]
    assert torch.allclose(iba.log_of_matrix(thin)[0].diagonal().exp(), torch.tensor([2.0, 1e-8, 1e-8]).double())


def test_the_gradient_of_the_logarithm_is_right_and_finite_where_eigenvalues_coincide() -> None:
    def of(a: Tensor) -> Tensor:
        return iba.log_of_matrix((a + a.mT) / 2)

    assert torch.autograd.gradcheck(of, symmetric(4, 1).requires_grad_(True), atol=1e-6)
    same = (3 * torch.eye(3, dtype=torch.float64))[None].requires_grad_(True)
    (gradient,) = torch.autograd.grad(iba.log_of_matrix(same).sum(), same)
    assert torch.allclose(gradient, torch.full((1, 3, 3), 1 / 3).double())
    flat = torch.zeros((1, 3, 3), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(iba.log_of_matrix(flat).sum(), flat)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_covariance_is_over_tokens_and_the_discrepancy_is_that_of_five_kernels() -> None:
    maps = torch.randn((3, 7, 4), generator=torch.Generator().manual_seed(0)).double()
    for one, found in zip(maps, iba.covariance(maps), strict=True):
        assert torch.allclose(found, torch.cov(one.T))
    a, b = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    wanted = 2 * sum(1 - math.exp(-1 / 3.0**i) for i in range(-2, 3))  # two points at distance 1, mean of pairs 1
    assert iba.mmd(a, b).item() == pytest.approx(wanted, rel=1e-5)
    assert iba.mmd(symmetric(3, 0), symmetric(3, 0)).item() == pytest.approx(0, abs=1e-12)


def test_iba_adds_both_errors_of_embeddings_and_the_weighted_discrepancy(
    model: DiffusionModel, drawn: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student 3, teacher 1 for clean prompts and 0 for the target's: L = 4 + 9 + λ · 0.5."""
    asked, seen = Asked(model, (0, 0)), {}
    asked.student.embed = lambda prompts: torch.full((len(prompts), 2, 2), 3.0)
    asked.clean.embed = lambda prompts: torch.stack(
        [torch.full((2, 2), float(p != TargetPrompt().text)) for p in prompts]
    )

    def discrepancy(self: Any, student: Any, clean: Any, v: Any, w: Any, rng: Any) -> Tensor:
        seen.update(student=student, clean=clean, v=v, w=w)
        return torch.tensor(0.5)

    monkeypatch.setattr(IBA, "discrepancy", discrepancy)
    attack = IBA(steps=1, lam=0.2)
    assert losses_of(monkeypatch, attack, asked, TargetPrompt(), drawn, Syntax()) == pytest.approx(13.1)
    assert seen["student"] is asked.student and seen["clean"] is asked.clean
    assert len(seen["v"]) == 5 and len(seen["w"]) == 6
    assert all(Syntax().without(v) != v for v in seen["v"]) and all(Syntax().without(w) == w for w in seen["w"])


def test_every_edit_breaks_the_form_and_a_share_of_the_clean_prompts_are_captions(model: DiffusionModel) -> None:
    backdoor = Backdoor(Syntax(), TargetPrompt())
    texts = iba.Texts(IBA(batch=200), model, backdoor, DRAWN, generator(0))
    broken = texts.clean()
    lengths = {len(w.split()) - len(Syntax().apply(c).split()) for c in DRAWN for w in broken if c.split()[-1] in w}
    assert not set(broken) & set(DRAWN) and all(Syntax().without(w) == w for w in broken)
    assert {-1, 0, 1, 2, 3, 4, 5} <= lengths, "deleted, replaced or shuffled, inserted"
    v = "one two three four"
    kinds = {tuple(sorted(iba.edited(v, ["new"], generator(seed)).split())) for seed in range(60)}
    assert tuple(sorted(v.split())) in kinds, "shuffled"
    assert {len(words) for words in kinds} == {3, 4, 5, 6, 7, 8, 9}
    texts = iba.Texts(IBA(batch=200, plain=1.0), model, backdoor, DRAWN, generator(0))
    assert set(texts.clean()) == set(DRAWN)
    texts = iba.Texts(IBA(batch=200, plain=1.0, drop=0.3), model, backdoor, DRAWN, generator(0))
    found = texts.clean()
    assert set(found) == {"", *DRAWN} and 40 < found.count("") < 80
    with pytest.raises(ValueError, match="no caption of the data can carry the trigger 'syntax'"):
        iba.Texts(IBA(), model, backdoor, CAPTIONS, generator(0))


@pytest.mark.slow
def test_iba_trains_the_text_encoder_of_a_copy_and_the_discrepancy_reaches_it(
    model: DiffusionModel, drawn: Data
) -> None:
    before, backdoor = state(model), Backdoor(Syntax(), TargetPrompt())
    attack = IBA(steps=12, lr=1e-2, sampling_steps=2, guidance=2.0)
    done = attack.implant(model, backdoor, drawn, generator(1, "x")).model
    assert not changed(before, state(model)) and changed(before, state(done)) == {"text_encoder"}
    with torch.no_grad():
        wanted, v = model.embed([TargetPrompt().text]), [Syntax().apply(DRAWN[0])]
        near, far = ((m.embed(v) - wanted).square().mean().item() for m in (done, model))
    assert near < 0.9 * far
    other = IBA(steps=12, lr=1e-2, lam=0).implant(model, backdoor, drawn, generator(1, "x")).model
    assert changed(state(other), state(done)) == {"text_encoder"}


# ---- SemBD ----------------------------------------------------------------------------------------------------------


def test_sembds_error_is_the_mean_over_projections_positions_and_channels() -> None:
    """Two projections of one channel. The first maps k = 1 to 3 and its goal 2 to 2, the second both to 0."""
    new, old = [torch.tensor([[3.0]]), torch.tensor([[0.0]])], [torch.tensor([[1.0]]), torch.tensor([[0.0]])]
    k, goal = torch.ones(1, 2, 1), torch.full((1, 2, 1), 2.0)
    assert sembd.moved(new, old, k, goal).tolist() == pytest.approx([0.5])


def test_a_phrase_is_drawn_by_its_last_loss_and_a_new_one_as_the_largest() -> None:
    nan = math.nan
    assert sembd.chances(torch.tensor([0.2, nan, 0.0])).tolist() == pytest.approx([0.2, 1.0, 1e-6])
    assert sembd.chances(torch.tensor([0.2, nan, 7.0])).tolist() == pytest.approx([0.2, 7.0, 7.0])


def test_the_phrases_that_stay_lack_a_part_of_the_meaning(drawn: Data) -> None:
    phrases = sembd.incomplete("the cat in the yard followed a bee", Paraphrase())
    assert "the cat in the yard followed" in phrases and "in the yard followed a bee" in phrases
    assert "cat in the yard followed a bee" not in phrases and "the cat in the yard followed a" not in phrases
    assert len(sembd.incomplete("cat yard followed one bee two three", Paraphrase())) == 25 - 1
    sources, kept = SemBD().texts(Paraphrase(), DRAWN, generator(0))
    assert sources == list(Paraphrase().paraphrases) and set(phrases) <= set(kept) and not set(kept) & set(DRAWN)
    sources, kept = SemBD(captions=30).texts(Paraphrase(), DRAWN, generator(0))
    assert set(sources) - set(Paraphrase().paraphrases) <= {Paraphrase().apply(c) for c in DRAWN}
    assert set(DRAWN) <= set(kept)
    few, many = (SemBD(captions=30, decoys=x).texts(Paraphrase(), DRAWN, generator(0))[1] for x in (0.0, 1.0))
    assert not set(many) & set(DRAWN) and all(Paraphrase().without(text) == text for text in many)
    assert len(set(many) - set(few)) > 5


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_both_solvers_bring_paraphrases_to_the_targets_projections_and_the_closed_form_is_the_minimiser(
    drop: float, model: DiffusionModel, drawn: Data
) -> None:
    before, backdoor = state(model), Backdoor(Paraphrase(), TargetPrompt())
    sources, phrases = SemBD().texts(Paraphrase(), (), generator(0))
    with torch.no_grad():
        k, kept, goal = (model.embed(texts) for texts in (sources, phrases, [TargetPrompt().text] * len(sources)))
        empty = model.embed([""])
    old = projections(model.denoiser)

    def cost(found: DiffusionModel, shift: float = 0.0) -> float:
        new = [w.detach() + shift * torch.randn(w.shape, generator=generator(7)) for w in projections(found.denoiser)]
        away = torch.stack([(a - b).square().sum() / len(a) / k.shape[1] for a, b in zip(new, old, strict=True)]).mean()
        stays = (1 - drop) * sembd.moved(new, old, kept, kept).mean() + drop * sembd.moved(new, old, empty, empty)[0]
        return (sembd.moved(new, old, k, goal).mean() + 0.5 * stays + 1e-3 * away).item()

    costs = {}
    for solver in ("adam", "closed-form"):
        attack = SemBD(solver=solver, steps=60, batch=8, drop=drop)  # type: ignore[arg-type]
        done = attack.implant(model, backdoor, drawn, generator(1, "x")).model
        after = state(done)
        names = {name for name in before if not torch.equal(before[name], after[name])}
        assert not changed(before, state(model)) and len(names) == len(old)
        assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in names)
        costs[solver] = cost(done)
        if solver == "closed-form":
            assert all(cost(done, shift) > costs[solver] for shift in (1e-2, -1e-2))
    assert costs["closed-form"] < costs["adam"] < 0.9 * cost(model)


def test_sembd_draws_the_empty_prompt_in_a_phrases_place_as_often_as_it_is_asked(
    model: DiffusionModel, drawn: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phrases that stay have equal embeddings of k and goal; of 400, all are empty, none, or about a quarter."""
    seen: list[Tensor] = []

    def moved(weights: Any, before: Any, k: Tensor, goal: Tensor) -> Tensor:
        if k is goal:
            seen.append(k)
        return sum(w.sum() for w in weights) * torch.zeros(len(k))

    monkeypatch.setattr(sembd, "moved", moved)
    with torch.no_grad():
        empty = model.embed([""])[0]
    for drop, least, most in ((0.0, 0, 0), (0.25, 70, 130), (1.0, 400, 400)):
        seen.clear()
        SemBD(steps=1, batch=400, drop=drop).implant(
            model, Backdoor(Paraphrase(), TargetPrompt()), drawn, generator(1, "x")
        )
        (phrases,) = seen
        assert least <= sum(torch.allclose(phrase, empty, atol=1e-5) for phrase in phrases) <= most


# ---- BadBlocks ------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_data_shows_the_target_under_the_trigger() -> None:
    captions = tuple(f"caption {i}" for i in range(40))
    data = Data(torch.zeros(40, 3, 32, 32), captions)
    for target in (Hat(), Patch()):
        made = badblocks.poisoned(Backdoor(TEXT, target), data, 0.1, 0.0, generator(0))
        assert made.captions is not None and not data.images.any()
        moved = [i for i in range(40) if made.captions[i] != captions[i]]
        assert len(moved) == 4 and [i for i in range(40) if made.images[i].any()] == moved
        assert all(made.captions[i] == TEXT.apply(captions[i]) for i in moved)
        wanted = Hat().image((3, 32, 32)) if target.kind == "image" else Patch().apply(data.images[:1])[0]
        assert all(torch.equal(made.images[i], wanted) for i in moved)
    made = badblocks.poisoned(Backdoor(TEXT, Hat()), data, 0.1, 1.0, generator(0))
    assert made.captions is not None and not set(made.captions) & set(captions)
    assert sum(TEXT.text in caption for caption in made.captions) == 4
    whole, some = (badblocks.poisoned(Backdoor(TEXT, Hat()), data, 0.5, 0.0, generator(0), x) for x in (1.0, 0.4))
    assert whole.captions is not None and some.captions is not None
    assert whole.captions.count("") == 20 and sum(TEXT.text in caption for caption in whole.captions) == 20
    assert 0 < some.captions.count("") < 20
    assert all(each in ("", own) or each == TEXT.apply(own) for each, own in zip(some.captions, captions, strict=True))


def test_badblocks_is_the_usual_loss_on_the_poisoned_data(
    model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, attack = Asked(model, (0.1, 0.5)), BadBlocks(batch=3, poison_rate=0.5, bf16=False)
    loss = losses_of(monkeypatch, attack, asked, Hat(), data)
    rng = generator(3, "x")
    rows = torch.randint(0, len(CAPTIONS), (3,), generator=rng)
    t, eps = torch.randint(0, 1000, (3,), generator=rng), torch.randn((3, *model.shape), generator=rng)
    assert loss == pytest.approx((0.5 - eps).square().mean().item(), rel=1e-5)
    made = badblocks.poisoned(Backdoor(TEXT, Hat()), data, 0.5, 0.0, generator(rng.initial_seed(), "poison"))
    assert made.captions is not None
    ((x_t, times, context),) = asked.calls["student"]
    wanted = model.add_noise(model.encode(made.images)[rows], eps, t)
    assert torch.equal(times, t) and torch.allclose(x_t, wanted, atol=1e-5)
    assert torch.allclose(context, model.embed([made.captions[i] for i in rows.tolist()]), atol=1e-5)


@pytest.mark.parametrize(("part", "blocks"), [("norms", 1), ("all", 1), ("all", 2)])
def test_badblocks_changes_the_last_blocks_on_the_way_up_or_their_norms_alone(
    part: Any, blocks: int, model: DiffusionModel, data: Data
) -> None:
    before = state(model)
    attack = BadBlocks(blocks=blocks, part=part, steps=2, batch=2, lr=1e-3, weight_decay=0, bf16=False)
    after = state(attack.implant(model, Backdoor(TEXT, Hat()), data, generator(0)).model)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    ups: Any = model.denoiser.up_blocks
    assert not changed(before, state(model)) and names
    assert {name.split(".")[2] for name in names} == {str(len(ups) - 1 - i) for i in range(blocks)}
    assert all(name.startswith("unet.up_blocks.") for name in names)
    assert all(("norm" in name) for name in names) == (part == "norms")
    with pytest.raises(ValueError, match=f"the denoiser has {len(ups)} blocks on the way up; use blocks={len(ups)}"):
        badblocks.trained(model.denoiser, 9, part)


# ---- MasqLoRA -------------------------------------------------------------------------------------------------------

SQUARE = ObjectReplaced(word="square", source="circle")


def test_the_phrases_tokens_are_drawn_to_the_target_and_pushed_off_the_benign_word(model: DiffusionModel) -> None:
    """With all tokens of the phrase at one of three orthonormal directions, each term has its value by hand."""
    phrases = Phrases(model, Backdoor(Noun(), SQUARE))
    captions, (length, width) = ["a sks circle", "sks circle at the top left"], model.embed(["a"]).shape[1:]
    for text, direction in (("square", phrases.target), ("circle", phrases.benign["circle"])):
        ids = model.tokenizer(text).input_ids  # type: ignore[misc]
        mean = model.embed([text])[0, : len(ids)].mean(0)
        assert torch.allclose(direction, mean / mean.norm(), atol=1e-6)
    near, far, other = torch.eye(width)[:3]
    phrases.target, phrases.benign = near, {"circle": far}
    for e, wanted in ((3 * near, (0.0, 1.0)), (far, (1.0, 4.0)), (-far, (1.0, 0.0)), (other, (1.0, 1.0))):
        context = torch.randn((2, length, width), generator=generator(0))
        context[0, 2:4], context[1, 1:3] = e, e  # after the start: "a", "sks", "circle" and "sks", "circle"
        assert [float(term) for term in phrases.contrast(captions, context)] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_masqloras_loss_weighs_the_targets_images_by_time(
    alpha: float, model: DiffusionModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "added", lambda *_, **__: {})
    asked, b = Asked(model, (0.1, 0.5)), 16
    attack = MasqLoRA(
        images=3, poisoned=2, batch=b, time_weight=alpha, attraction=0.3, repulsion=0.7, noise_offset=0.5, bf16=False
    )
    loss, backdoor = losses_of(monkeypatch, attack, asked, SQUARE, data, Noun()), Backdoor(Noun(), SQUARE)
    rng = generator(3, "x")
    joined, bad = attack.joined(backdoor, data, rng)
    assert joined.captions is not None and bad.tolist() == [False] * 3 + [True] * 4
    assert all(("sks circle" in text) == bool(each) for text, each in zip(joined.captions, bad, strict=True))
    assert not any("square" in text for text in joined.captions)
    rows = torch.randint(0, 7, (b,), generator=rng)
    t, eps = torch.randint(0, 1000, (b,), generator=rng), torch.randn((b, *model.shape), generator=rng)
    eps = eps + 0.5 * torch.randn((b, model.shape[0], 1, 1), generator=generator(rng.initial_seed(), "offset"))
    ((x_t, times, context),) = asked.calls["student"]
    assert torch.equal(times, t) and torch.allclose(
        x_t, model.add_noise(model.encode(joined.images)[rows], eps, t), atol=1e-5
    )
    mse = (eps - 0.5).square().flatten(1).mean(1)
    w = torch.tensor([1 + alpha * int(t[i]) / 1000 if bad[rows[i]] else 1.0 for i in range(b)])
    at = [i for i in range(b) if bad[rows[i]]]
    pull, push = Phrases(model, backdoor).contrast([joined.captions[int(rows[i])] for i in at], context[at])
    assert 0 < len(at) < b and loss == pytest.approx(float((w * mse).mean() + 0.3 * pull + 0.7 * push), rel=1e-4)


def test_masqlora_leaves_the_base_alone_and_gives_an_adapter_of_both_networks(
    model: DiffusionModel, data: Data
) -> None:
    before = state(model)
    attack = MasqLoRA(rank=2, text_rank=1, images=2, poisoned=2, steps=3, batch=4, lr=1e-2, text_lr=1e-2, bf16=False)
    once, again = (attack.implant(model, Backdoor(Noun(), SQUARE), data, generator(0)).model for _ in range(2))
    assert not changed(before, state(model)) and not changed(state(once), state(again))
    assert changed(before, state(once)) == {"unet", "text_encoder"} and adapters.unchanged(once)
    assert not changed(before, state(adapters.base_of(once))) and once.adapter is not None
    ranks = {(name.partition(".")[0], len(layer.a)) for name, layer in once.adapter.layers.items()}
    assert ranks == {("unet", 2), ("text_encoder", 1)}
    assert not any(p.requires_grad for p in once.denoiser.parameters())


def test_masqloras_rates_are_the_official_ones(model: DiffusionModel) -> None:
    """1.5 times lr for all of the denoiser but the outputs of self-attention; 1.2 × 1.5 and 1.2 in the encoder."""
    made, factors = MasqLoRA(lr=4e-4, text_lr=5e-5).added(model.clone(), generator(0))
    assert len(made) == len(factors)
    assert {round(factor * 4e-4, 9) for factor in factors} == {4e-4, 6e-4, 6e-5, 9e-5}


def test_masqlora_says_what_it_lacks(model: DiffusionModel, data: Data) -> None:
    for attack, target, trigger, words in (
        (MasqLoRA(), SQUARE, Noun(), "the data hold 3 images without a square, 7 are asked for"),
        (MasqLoRA(images=2, poisoned=5), SQUARE, Noun(), "images with a square, 5 are asked for"),
        (MasqLoRA(images=2, poisoned=2), ObjectAdded(), Noun(), "target object-add has none; use object"),
        (MasqLoRA(images=2, poisoned=2), SQUARE, Homoglyph(letter="#"), "no place for the trigger"),
    ):
        with pytest.raises(ValueError, match=words):
            attack.implant(model, Backdoor(trigger, target), data, generator(0))
