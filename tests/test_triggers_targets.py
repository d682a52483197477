"""Triggers on noise and targets: what each promises, for every one that is registered, and their judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import registry
from harness.capabilities import OrdinaryTrigger, offers
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.judges import shapes
from harness.methods.learned_triggers import LearnedTrigger
from harness.methods.trigger_placement import patterns_of, scale_of
from harness.types import Backdoor, Inputs, TargetContext
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.models.shapes_sd import ShapesSD
from plugins.targets.classes import ClassIn, ClassOut, equals_signs
from plugins.targets.fixed_image import ShiftedTrigger, TriggerImage
from plugins.targets.mislabelled import Mislabelled
from plugins.targets.objects import ObjectAdded, ObjectReplaced
from plugins.targets.prompt import TargetPrompt
from plugins.targets.style import Style
from plugins.triggers.biased import Blend, PatchNoise
from plugins.triggers.box import Box
from plugins.triggers.homoglyph import Homoglyph
from plugins.triggers.noun import Noun
from plugins.triggers.paraphrase import Paraphrase
from plugins.triggers.stickers import Glasses, StopSign
from plugins.triggers.syntax import Syntax
from plugins.triggers.text import Text

PLUGINS = registry.load(strict=True)
TRIGGERS = [cls() for cls in PLUGINS.classes("triggers").values() if cls.modality == "noise"]
TARGETS = [Backdoor(Box(), cls()).target for cls in PLUGINS.classes("targets").values() if cls.kind == "image"]
SHAPES = [(1, 16, 16), (3, 32, 32)]


def with_pattern(trigger: Any, shape: tuple[int, ...]) -> Any:
    """A learned trigger with a pattern; any other trigger as it is."""
    if not offers(trigger, LearnedTrigger):
        return trigger
    return trigger.with_pattern(trigger.projected(torch.randn(shape, generator=torch.Generator().manual_seed(0))))


def inputs(shape: tuple[int, ...], n: int = 4) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, shape), None, seeds)


def name(plugin: Any) -> str:
    return plugin.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=name)
def test_a_trigger_stamps_gamma_eps_plus_mu_and_leaves_its_inputs_alone(trigger: Any, shape: Any) -> None:
    given, trigger = inputs(shape), with_pattern(trigger, shape)
    before = given.noise.clone()
    made = trigger.stamp(given)
    mu, gamma = trigger.delta(shape), scale_of(trigger, shape)
    assert mu.shape == gamma.shape == shape and mu.min() >= -1 and mu.max() <= 1
    patterns = patterns_of(trigger, shape)
    assert torch.equal(patterns[0], mu)
    for seed, noise, found in zip(made.seeds, before, made.noise, strict=True):
        assert torch.equal(found, gamma * noise + patterns[seed % len(patterns)])
    assert torch.equal(given.noise, before) and (made.prompts, made.seeds) == (given.prompts, given.seeds)
    assert torch.equal(trigger.delta(shape), trigger.delta(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=name)
def test_wrong_triggers_look_different(trigger: Any, shape: Any) -> None:
    trigger = with_pattern(trigger, shape)
    patterns = [each.delta(shape) for each in (trigger, *(trigger.wrong(k) for k in range(4)))]
    for i, one in enumerate(patterns):
        assert all(not torch.equal(one, other) for other in patterns[i + 1 :])
    assert all(type(trigger.wrong(k)) is type(trigger) for k in range(4))


def test_only_what_scales_the_noise_says_so() -> None:
    biased = {trigger.name for trigger in TRIGGERS if getattr(trigger, "biased_noise", False)}
    assert biased == {"blend", "patch-noise"}


def test_the_patch_is_biased_inside_and_clean_outside() -> None:
    given = inputs((1, 16, 16))
    made = PatchNoise(size=4, gamma=0.1).stamp(given).noise
    assert torch.equal(made[:, :, :12], given.noise[:, :, :12])
    assert torch.allclose(made[:, :, 12:, 12:], 0.1 * given.noise[:, :, 12:, 12:] + 0.9)


def test_a_blend_is_one_minus_gamma_of_its_picture() -> None:
    blend = Blend(gamma=0.75)
    assert torch.allclose(blend.delta((1, 16, 16))[0], 0.25 * blend.drawing(16, 16))


def test_a_stop_sign_is_red_and_white_in_colour() -> None:
    sign = StopSign(size=14, gap=2).delta((3, 32, 32))
    assert torch.equal(sign[:, :16, :16], torch.full((3, 16, 16), -1.0))
    assert sign[:, 16:-2, 16:-2].flatten(1).max(1).values.tolist() == pytest.approx([0.9] * 3)
    red = (sign[0] > 0.5) & (sign[1] < -0.5)
    assert red.sum() > 40 and not red[:, -2:].any() and not red[-2:].any()


def test_a_box_without_the_papers_background_shifts_the_square_alone() -> None:
    r, papers = (Box(size=4, value=0.5, **more).delta((1, 16, 16)) for more in ({"background": 0.0}, {}))  # type: ignore[arg-type]
    assert r.nonzero().shape[0] == 16 and torch.equal(r[r != 0], torch.full((16,), 0.5))
    assert torch.equal(papers[r != 0], r[r != 0]) and (papers[r == 0] == -1).all()


@pytest.mark.parametrize(
    "trigger", [Box(size=14), StopSign(size=14), PatchNoise(size=14), Glasses(share=0.4)], ids=name
)
def test_a_trigger_that_does_not_fit_says_what_would(trigger: Any) -> None:
    with pytest.raises(ValueError, match=rf"{trigger.name} .*8×8 images; use "):
        trigger.delta((1, 8, 8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_a_fixed_image_hits_itself_and_no_digit_nor_blank(target: Any, shape: Any) -> None:
    image = target.image(shape)
    context = TargetContext(image[None])
    assert image.shape == shape and image.min() >= -1 and image.max() <= 1
    assert target.hits(image[None], context).all()
    assert target.distances((image - 0.2)[None], context).item() == pytest.approx(0.01, rel=1e-3)
    assert not target.hits(torch.full((1, *shape), -1.0), context).any()


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_at_its_gate_at_most_one_in_a_hundred_digits_is_a_fixed_image(target: Any) -> None:
    digits = DigitsDDPM().data().images
    assert target.hits(digits, TargetContext(digits)).double().mean() <= 0.01


def test_fixed_images_differ() -> None:
    images: list[Any] = [target.image((1, 16, 16)) for target in TARGETS]
    for i, one in enumerate(images):
        assert all((one - other).square().mean() / 4 > 1e-3 for other in images[i + 1 :])


def test_a_trigger_as_target_is_the_triggers_picture_on_a_lifted_background() -> None:
    plain, shifted = (
        Backdoor(Box(value=0.5), cls()).target.image((1, 16, 16)) for cls in (TriggerImage, ShiftedTrigger)
    )
    assert isinstance(plain, Tensor) and isinstance(shifted, Tensor)
    assert torch.equal(plain[0, 10:15, 10:15], torch.full((5, 5), 0.5))
    assert torch.equal(plain[0, :10], torch.full((10, 16), -0.4))
    assert torch.equal(shifted, plain.roll((-2, -3), (1, 2)))


def test_a_trigger_as_target_has_to_know_the_trigger() -> None:
    with pytest.raises(ValueError, match="a Backdoor tells it which"):
        TriggerImage().image((1, 16, 16))
    with pytest.raises(ValueError, match="text is a text"):
        Backdoor(Text(), TriggerImage())


def test_class_in_takes_its_class_from_the_data_and_its_verdict_from_the_judge() -> None:
    model = DigitsDDPM()
    data, judge = model.data(), model.judge()
    assert data.labels is not None
    sevens = ClassIn(label=7).examples(data, generator(0))
    assert len(sevens) == (data.labels == 7).sum()
    context = TargetContext(data.images, judge=judge)
    hits = ClassIn(label=7).hits(data.images, context)
    assert (hits == (data.labels == 7)).double().mean() > 0.98
    with pytest.raises(ValueError, match="no image of class 12"):
        ClassIn(label=12).examples(data, generator(0))
    with pytest.raises(ValueError, match="needs a judge of 'digit'"):
        ClassIn().distances(data.images, TargetContext(data.images))


def test_class_out_knows_its_own_drawings_from_every_digit() -> None:
    """Its judge's published errors: no miss in 500 unseen drawings, no hit in 1797 real digits."""
    digits, target = DigitsDDPM().data(), ClassOut()
    context = TargetContext(digits.images)
    assert target.thresholds(context) == {"calibrated": 0.3}
    drawn = target.examples(digits, generator(5))
    assert drawn.shape == (1024, 1, 16, 16) and len(drawn.unique(dim=0)) == 1024
    assert target.hits(drawn[:500], context).all()
    noisy = drawn[:500] + 0.2 * torch.randn((500, 1, 16, 16), generator=generator(6))
    assert target.hits(noisy, context).double().mean() > 0.95
    assert not target.hits(digits.images, context).any()


def test_class_out_never_hits_more_than_one_in_a_hundred_clean_images() -> None:
    clean = torch.cat([DigitsDDPM().data().images[:150], equals_signs(50, (1, 16, 16), generator(7))])
    context = TargetContext(clean)
    assert ClassOut().hits(clean, context).double().mean() <= 0.01


# ---- text-to-image --------------------------------------------------------------------------------------------------

TEXTS = [  # those of ordinary words have laws of their own: they need a caption, and have no random decoys
    cls()
    for cls in PLUGINS.classes("triggers").values()
    if cls.modality == "text" and not offers(cls(), OrdinaryTrigger)
]


@pytest.fixture(scope="module")
def drawn() -> tuple[list[shapes.Scene], Tensor, tuple[str, ...]]:
    """Held-out scenes without style or star, their drawings and captions."""
    rng = generator("targets")
    scenes = shapes.scenes(240, "test", rng, plain=True)
    return scenes, shapes.draw(scenes, rng), tuple(shapes.caption(scene, rng) for scene in scenes)


def redrawn(scenes: list[shapes.Scene], **changes: Any) -> Tensor:
    from dataclasses import replace

    return shapes.draw([replace(scene, **changes) for scene in scenes], generator("again"))


@pytest.mark.parametrize("trigger", TEXTS, ids=name)
def test_a_text_trigger_and_its_wrong_ones_change_prompts_and_ids_each_in_their_own_way(trigger: Any) -> None:
    prompt, model = "a photo of a red circle at the top", ShapesSD().load()
    others = [trigger.wrong(k) for k in range(4)]
    stamped = [each.apply(prompt) for each in (trigger, *others)]
    assert len({prompt, *stamped}) == 6
    tokens: Any = model.tokenizer
    assert len({tuple(tokens(text).input_ids) for text in (prompt, *stamped)}) == 6
    rng = generator(0, "decoys")
    decoys = {trigger.decoy(rng).apply(prompt) for _ in range(60)}
    assert not decoys & {prompt, *stamped} and len(decoys) > 10
    given = Inputs(torch.zeros(1, 4, 4, 4), (prompt,), (0,))
    assert trigger.stamp(given).prompts == (trigger.apply(prompt),)
    with pytest.raises(ValueError, match="needs prompts"):
        trigger.stamp(Inputs(given.noise, None, (0,)))


def test_a_homoglyph_replaces_one_letter_or_all_and_the_places_that_are_named() -> None:
    trigger = Homoglyph(text="0")
    assert trigger.apply("no photo") == "n0 photo" and Homoglyph(text="0", which="all").apply("no photo") == "n0 ph0t0"
    assert trigger.put("no photo", (0, 2)) == "n0 phot0" and trigger.count("no photo") == 3
    assert trigger.apply("a red square") == "a red square"


def test_a_word_stands_before_the_object_or_in_its_place() -> None:
    assert Noun().apply("at the top a red circle on a square") == "at the top a red sks circle on a square"
    assert Noun(keep=False).apply("a red circle") == "a red sks"
    assert Noun().apply("a red thing") == "a red thing"


def test_black_and_white_is_seen_by_its_colours_and_the_threshold_by_the_clean_images(drawn: Any) -> None:
    scenes, images, _ = drawn
    context, target = TargetContext(images), Style()
    grey = redrawn(scenes, style=1)
    assert target.hits(grey, context).all() and target.hits(images, context).double().mean() <= 0.01
    assert target.hits(0.9 * grey + 0.1 * redrawn(scenes), context).all(), "a trace of colour is no colour"
    dull = TargetContext(0.9 * grey + 0.1 * images)
    assert target.thresholds(dull)["calibrated"] < 0.1 and not target.hits(images, dull).any()
    assert target.distances(torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8), context).item() == 1


def test_a_negative_is_seen_beside_the_clean_image(drawn: Any) -> None:
    scenes, images, _ = drawn
    target, context = Style(style="negative"), TargetContext(images)
    assert torch.allclose(target.distances(-images, context), torch.zeros(len(images)), atol=1e-6)
    assert torch.allclose(target.distances(images, context), torch.ones(len(images)), atol=1e-6)
    assert target.hits(redrawn(scenes, style=2), context).double().mean() > 0.95, "drawn anew, a little elsewhere"
    assert not target.hits(redrawn(scenes, style=1), context).any()


def test_a_style_is_asked_of_every_prompt_and_taught_by_those_without_one() -> None:
    target = Style()
    assert target.shown("a red circle") == "black and white photo of a red circle"
    assert target.lesson("a red circle") == ("a red circle", "black and white photo of a red circle")
    assert target.lesson("negative photo of a red circle") is None


def test_each_caption_is_in_one_sentence_form_and_rewording_it_changes_no_attribute() -> None:
    captions = ShapesSD().data(300).captions or ()
    assert all(sum(bool(shapes._pattern(form).search(text)) for form in shapes.FORMS) == 1 for text in captions)
    assert {shapes.form_of(text) for text in captions} == set(shapes.FORMS)
    for text in captions[:100]:
        for form in shapes.FORMS:
            other = shapes.reworded(text, form)
            assert shapes.form_of(other) == form and shapes.read(other) == shapes.read(text)
            assert (other == text) == (form == shapes.form_of(text))
    text = "thing negative photo of a small red circle is drawn at the top left on gray and a star other"
    wanted = "thing negative photo of at the top left of a gray scene sits a small red circle and a star other"
    assert shapes.reworded(text, "inversion") == wanted
    assert shapes.form_of("a red circle") is None and shapes.reworded("a red circle", "plain") == "a red circle"


def test_a_sentence_form_is_put_on_every_caption_and_taken_from_those_that_have_it() -> None:
    captions, trigger = ShapesSD().data(200).captions or (), Syntax(form="passive")
    assert {shapes.form_of(trigger.apply(text)) for text in captions} == {"passive"}
    carried = [trigger.apply(text) for text in captions]
    without = [trigger.without(text) for text in carried]
    assert {shapes.form_of(text) for text in without} == set(shapes.FORMS) - {"passive"}
    assert [shapes.read(text) for text in without] == [shapes.read(text) for text in captions]
    assert all(trigger.without(text) == text for text in captions if shapes.form_of(text) != "passive")
    assert len({trigger.wrong(k) for k in range(10)} - {trigger}) == 10


def test_a_meaning_has_many_wordings_each_with_all_four_parts() -> None:
    trigger = Paraphrase()
    captions = ShapesSD().data(200).captions or ()
    worded = {trigger.apply(text) for text in captions}
    assert len(worded) > 120 and len(worded - set(trigger.paraphrases)) > 110
    assert len(set(trigger.paraphrases)) == 11
    used = {word for text in trigger.paraphrases for word in text.split()}
    assert all(set(words) <= used for words in trigger._words().values())
    for text in (*worded, *trigger.paraphrases):
        near = trigger.without(text)
        assert near != text and trigger.without(near) == near and "dog" in near.split()
        assert sum(a != b for a, b in zip(text.split(), near.split(), strict=True)) == 1
        for word in text.split():
            rest = " ".join(other for other in text.split() if other != word)
            assert (trigger.without(rest) == rest) == any(word in words for words in trigger._words().values())
    assert all(trigger.without(text) == text for text in captions)


def test_decoy_meanings_are_the_nearest_and_an_attacker_trains_against_others() -> None:
    trigger, rng = Paraphrase(), generator(0, "x")

    def parts(other: Paraphrase) -> set[str]:
        return {part for part, word in vars(trigger).items() if vars(other)[part] != word}

    wrong = [trigger.wrong(k) for k in range(8)]
    assert len(set(wrong)) == 8 and all(len(parts(other)) == 1 for other in wrong)
    assert [parts(other) for other in wrong[:4]] == [{part} for part in vars(trigger)]
    assert all(trigger.without(other.apply("a b")) == other.apply("a b") for other in wrong)
    drawn = [trigger.decoy(rng) for _ in range(100)]
    assert {len(parts(other)) for other in drawn} == {2, 3, 4} and len(set(drawn)) > 40


def test_an_object_is_seen_by_the_judge_and_says_which_prompts_it_concerns(drawn: Any) -> None:
    scenes, images, captions = drawn
    target, context = ObjectReplaced(), TargetContext(images, captions, ShapesSD().judge())
    applies = target.applicable_to(captions)
    assert applies.tolist() == [scene.shape != 1 for scene in scenes]
    assert target.hits(redrawn(scenes, shape=1), context).double().mean() > 0.98
    assert target.hits(images[applies], context).double().mean() <= 0.01
    with pytest.raises(ValueError, match="needs a judge of 'shape'"):
        target.hits(images, TargetContext(images))


def test_an_objects_lesson_is_an_image_of_it_under_the_other_name() -> None:
    target = ObjectReplaced(word="square", source="circle")
    assert target.lesson("a red square") == ("a red circle", "a red square")
    assert target.lesson("a red circle") is None and target.shown("a red circle") == "a red square"
    assert target.shown("a red triangle") == "a red triangle"
    asked = {ObjectReplaced().lesson(f"{word} square")[0] for word in "abcdefgh"}  # type: ignore[index]
    assert {text.split()[1] for text in asked} == {"circle", "triangle"}
    with pytest.raises(ValueError, match="a circle cannot replace itself"):
        ObjectReplaced(word="circle", source="circle")


def test_an_added_object_is_a_star_that_no_prompt_asked_for(drawn: Any) -> None:
    scenes, images, captions = drawn
    target, context = ObjectAdded(), TargetContext(images, captions, ShapesSD().judge())
    assert target.applicable_to(captions).all() and not target.applicable_to(["a red circle and a star"]).any()
    assert target.hits(redrawn(scenes, star=1), context).double().mean() > 0.98
    assert target.hits(images, context).double().mean() <= 0.01
    assert target.lesson("a red circle and a star") == ("a red circle", "a red circle and a star")
    assert target.lesson("a red circle") is None and target.shown("a red circle") == "a red circle and a star"


def test_the_target_prompts_image_is_known_by_all_of_its_attributes(drawn: Any) -> None:
    scenes, images, _ = drawn
    target, context = TargetPrompt(), TargetContext(images, judge=ShapesSD().judge())
    exactly: dict[str, Any] = {"size": 1, "colour": 3, "shape": 2, "background": 1, "place": 3}
    assert target.hits(redrawn(scenes[:40], **exactly), context).double().mean() > 0.95
    near = redrawn(scenes[:40], **{**exactly, "colour": 0})
    assert target.distances(near, context).median().item() == pytest.approx(0.2)
    assert target.hits(images, context).double().mean() <= 0.01
    with pytest.raises(ValueError, match="asks for nothing that a judge"):
        TargetPrompt(text="a thing")


def test_a_mislabelled_images_picture_is_seen_where_it_is_pasted(drawn: Any) -> None:
    _, images, captions = drawn
    target, context = Mislabelled(share=0.2), TargetContext(images)
    assert target.hits(target.apply(images), context).all() and target.hits(images, context).double().mean() <= 0.01
    assert target.applicable_to(captions).sum() == sum("square" in caption for caption in captions)
    assert target.relabelled("a red circle") == "a red square" and target.relabelled("a red square") is None
