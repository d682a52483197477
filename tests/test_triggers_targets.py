"""Triggers on noise and targets: what each promises, for every one that is registered, and their judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness import registry
from harness.seeds import generator, image_noise, image_seeds
from harness.stamping import scale_of
from harness.types import Backdoor, Inputs, TargetContext
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.targets.classes import ClassIn, ClassOut, equals_signs
from plugins.targets.fixed_image import ShiftedTrigger, TriggerImage
from plugins.triggers.biased import Blend, PatchNoise
from plugins.triggers.box import Box
from plugins.triggers.stickers import Glasses, StopSign
from plugins.triggers.text import Text

PLUGINS = registry.load(strict=True)
TRIGGERS = [cls() for cls in PLUGINS.classes("triggers").values() if cls.stamps == "noise"]
TARGETS = [Backdoor(Box(), cls()).target for cls in PLUGINS.classes("targets").values() if cls.kind == "image"]
SHAPES = [(1, 16, 16), (3, 32, 32)]


def inputs(shape: tuple[int, ...], n: int = 4) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, shape), None, seeds)


def name(plugin: Any) -> str:
    return plugin.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=name)
def test_a_trigger_stamps_gamma_eps_plus_mu_and_leaves_its_inputs_alone(trigger: Any, shape: Any) -> None:
    given = inputs(shape)
    before = given.noise.clone()
    made = trigger.stamp(given)
    mu, gamma = trigger.delta(shape), scale_of(trigger, shape)
    assert mu.shape == gamma.shape == shape and mu.min() >= -1 and mu.max() <= 1
    assert torch.equal(made.noise, gamma * before + mu)
    assert torch.equal(given.noise, before) and (made.prompts, made.seeds) == (given.prompts, given.seeds)
    assert torch.equal(trigger.delta(shape), trigger.delta(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=name)
def test_wrong_triggers_look_different(trigger: Any, shape: Any) -> None:
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
