"""The face over diffusers: samplers against a denoiser whose answer is known, batches, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import attention
from harness.diffusion import DDIM, DDPM, SAMPLERS, DiffusionModel
from harness.seeds import image_noise, image_seeds
from harness.types import Inputs
from plugins.models.digits_ddpm import DigitsDDPM
from tests.oracles import one_image_model, scheduler, tiny_sd, tiny_unet


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand((1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def inputs(model: DiffusionModel, n: int, prompts: tuple[str, ...] | None = None) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, model.shape), prompts, seeds)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_returns_the_one_image_of_the_data(name: str, image: torch.Tensor) -> None:
    model = one_image_model(image)
    made = model.sample(inputs(model, 3), SAMPLERS[name](steps=50))
    assert (made - image).abs().max() < 0.02


def test_no_two_samplers_give_equal_images() -> None:
    model = tiny_unet()
    made = [model.sample(inputs(model, 2), cls(steps=5)) for cls in SAMPLERS.values()]
    for i, one in enumerate(made):
        assert all(not torch.equal(one, other) for other in made[i + 1 :])


def test_a_scheduler_of_another_class_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    monkeypatch.setattr(DDIMScheduler, "from_config", classmethod(lambda cls, *a, **k: scheduler()))
    with pytest.raises(TypeError, match="asked for DDIMScheduler, got DDPMScheduler"):
        DDIM(steps=4).scheduler(scheduler().config)


@pytest.mark.parametrize("sampler", [DDIM(steps=10), DDPM(steps=20)])
def test_an_image_does_not_depend_on_its_batch(sampler: DDIM | DDPM) -> None:
    model = DigitsDDPM().load()
    together, alone = (model.sample(inputs(model, 5), sampler, batch=size) for size in (5, 2))
    assert (together - alone).abs().max() < 1e-4


def test_the_first_images_of_a_larger_set_are_those_of_a_smaller_one() -> None:
    model = tiny_unet()
    assert torch.equal(inputs(model, 3).noise, inputs(model, 9).noise[:3])


def test_clipping_the_predicted_x0_changes_the_path() -> None:
    model = tiny_unet()
    kept, clipped = (model.sample(inputs(model, 2), DDIM(steps=5, clip=clip)) for clip in (False, True))
    assert not torch.equal(kept, clipped)


def test_alpha_is_the_ratio_of_neighbouring_alpha_bars() -> None:
    model = tiny_unet()
    t = torch.tensor([0, 1, 500, 999])
    betas = scheduler().betas[t].view(-1, 1, 1, 1)
    assert torch.allclose(model.alpha(t), 1 - betas, atol=1e-6)


def test_a_clone_shares_no_weight() -> None:
    model = tiny_unet()
    twin = model.clone()
    next(twin.denoiser.parameters()).data.add_(1)
    assert not torch.equal(next(twin.denoiser.parameters()), next(model.denoiser.parameters()))


def test_our_attention_gives_what_diffusers_gives_and_its_maps_sum_to_one(tmp_path) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet: Any = tiny_sd(tmp_path).denoiser
    x, t, c = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 36, 16)
    with attention.capture(unet) as maps:
        captured = unet(x, t, encoder_hidden_states=c).sample
    ours = unet(x, t, encoder_hidden_states=c).sample
    unet.set_attn_processor(AttnProcessor2_0())
    theirs = unet(x, t, encoder_hidden_states=c).sample
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours, captured, atol=1e-5)
    assert {m.shape[2] for m in maps.values()} == {256, 64}
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for m in maps.values())


def test_a_dropped_trigger_is_noticed(tmp_path) -> None:
    from plugins.triggers.text import Text

    model = tiny_sd(tmp_path)
    prompts = ("a small red circle at the top left on a black background",)
    for text in ("\u200b", "\u020f", "\u043e", "sks"):
        model.check_trigger(Text(text=text), prompts)
    with pytest.raises(ValueError, match="the tokenizer drops the trigger"):
        model.check_trigger(Text(text="\t"), prompts)


def test_a_prompt_that_is_too_long_is_named(tmp_path) -> None:
    model = tiny_sd(tmp_path)
    with pytest.raises(ValueError, match="does not fit the text encoder"):
        model.embed(["red " * 60])
