"""The face over diffusers: both families of noise, text, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.diffusion import attention
from harness.diffusion.model import PIXELS, DiffusionModel, at_once
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import image_noise, image_seeds
from harness.stages.sample import PART, checked
from harness.types import Inputs
from tests.oracles import (
    exploding,
    flowing,
    one_image_flow,
    one_image_ve_model,
    scheduler,
    tiny_flow,
    tiny_mmdit,
    tiny_ncsn,
    tiny_sd,
    tiny_unet,
)


def inputs(model: DiffusionModel, n: int, prompts: tuple[str, ...] | None = None) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, model.shape), prompts, seeds)


def test_the_first_images_of_a_larger_set_are_those_of_a_smaller_one() -> None:
    model = tiny_unet()
    assert torch.equal(inputs(model, 3).noise, inputs(model, 9).noise[:3])


def test_alpha_is_the_ratio_of_neighbouring_alpha_bars() -> None:
    model = tiny_unet()
    t = torch.tensor([0, 1, 500, 999])
    betas = scheduler().betas[t].view(-1, 1, 1, 1)
    assert torch.allclose(model.alpha(t), 1 - betas, atol=1e-6)


def test_preserved_variance_is_one_and_exploding_signal_is_one() -> None:
    vp, ve, t = tiny_unet(), tiny_ncsn(), torch.tensor([0, 400, 999])
    assert torch.allclose(vp.signal(t) ** 2 + vp.sigma(t) ** 2, torch.ones(3, 1, 1, 1))
    assert torch.equal(ve.signal(t), torch.ones(3, 1, 1, 1))
    assert ve.sigma(t).flatten().tolist() == pytest.approx([0.01, 0.01 * 5000 ** (400 / 999), 50.0], rel=1e-6)
    for model in (vp, ve):
        assert model.T == 1000 and model.sigma(torch.tensor([-1])).item() == 0
        assert model.signal(torch.tensor([-1])).item() == 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_joins_image_and_noise_by_a_line_at_the_levels_of_diffusers(shift: float) -> None:
    model, theirs, t = tiny_flow(shift=shift), flowing(shift=shift), torch.tensor([0, 1, 500, 998, 999])
    assert torch.allclose(model.sigma(t).flatten(), theirs.sigmas.flip(0)[t], atol=1e-6)
    assert torch.allclose(model.signal(t) + model.sigma(t), torch.ones(5, 1, 1, 1))
    assert torch.allclose(model.time(t), theirs.timesteps.flip(0)[t], rtol=1e-6)
    assert torch.equal(model.timestep(model.time(torch.arange(1000))), torch.arange(1000))
    assert model.signal(torch.tensor([-1])).item() == 1 and model.sigma(torch.tensor([-1])).item() == 0
    x_0, eps = torch.randn(2, 3, 1, 16, 16)
    for step in (0, 500, 999):
        wanted = theirs.scale_noise(x_0, theirs.timesteps[[999 - step] * 3], eps)
        assert torch.allclose(model.add_noise(x_0, eps, torch.full((3,), step)), wanted, atol=1e-5)


def test_eps_of_a_flow_is_the_noise_in_it_and_its_error_is_that_of_the_velocity() -> None:
    image, t, eps = torch.rand(1, 8, 8) * 2 - 1, torch.tensor([0, 500, 998, 999]), torch.randn(4, 1, 8, 8)
    exact = one_image_flow(image)
    x_t = exact.add_noise(image.expand(4, -1, -1, -1), eps, t)
    assert (exact.eps(x_t, t) - eps).abs().max() < 1e-4
    model, x_t, x_0 = tiny_flow(), torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    eps = torch.randn(4, 1, 16, 16)
    x_t = model.add_noise(x_0, eps, t)
    v = model.denoiser(x_t, (t + 1).float()).sample
    error = model.error(model.eps(x_t, t), eps, t)
    assert torch.allclose(error[:3], (v - (eps - x_0)).square()[:3], rtol=1e-2, atol=1e-3)
    assert torch.equal(error[3], torch.zeros(1, 16, 16)), "at σ = 1 ε is x_t, whatever v is"
    vp = tiny_unet()
    assert torch.equal(vp.error(x_t, eps, t), (x_t - eps).square())


def test_exploding_noise_is_what_diffusers_adds_to_images_in_0_1() -> None:
    model, t = tiny_ncsn(), torch.tensor([0, 300, 999])
    images, eps = torch.rand(3, 1, 16, 16) * 2 - 1, torch.randn(3, 1, 16, 16)
    x_0 = model.encode(images)
    assert torch.allclose(x_0, (images + 1) / 2) and torch.allclose(model.decode(x_0), images, atol=1e-6)
    assert torch.allclose(model.add_noise(x_0, eps, t), exploding().add_noise(x_0, eps, t), rtol=1e-5, atol=1e-6)


def test_eps_of_an_exploding_model_is_the_noise_in_it_and_never_bfloat16() -> None:
    image = torch.rand(1, 8, 8) * 2 - 1
    model, t, eps = one_image_ve_model(image), torch.tensor([0, 500, 999]), torch.randn(3, 1, 8, 8)
    x_t = model.add_noise(model.encode(image.expand(3, -1, -1, -1)), eps, t)
    assert (model.eps(x_t, t) - eps).abs().max() < 1e-4
    unet, x_t = tiny_ncsn(), torch.randn(3, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = unet.eps(x_t, t)
    assert torch.equal(inside, unet.eps(x_t, t))


def test_models_outside_preserved_variance_have_no_alpha_and_says_what_to_use() -> None:
    for ask in (tiny_ncsn().alpha, tiny_ncsn().alpha_bar, tiny_flow().alpha, tiny_flow().alpha_bar):
        with pytest.raises(ValueError, match=r"use signal\(t\) and sigma\(t\)"):
            ask(torch.tensor([3]))


def test_the_frequencies_of_the_noise_level_are_never_trained() -> None:
    model = tiny_ncsn()
    before = model.denoiser.state_dict()["time_proj.weight"].clone()
    assert "time_proj.weight" not in dict(model.denoiser.named_parameters())
    assert torch.equal(before, model.clone().denoiser.state_dict()["time_proj.weight"])


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


def test_joint_attention_gives_what_diffusers_gives_and_is_a_distribution_over_text_and_image(tmp_path) -> None:
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    model = tiny_mmdit(tmp_path)
    net: Any = model.denoiser
    given = {
        "hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 36, 24), "pooled_projections": torch.randn(2, 14),
    }  # fmt: skip
    with attention.capture(net) as maps:
        captured = net(**given).sample
    with attention.capture(net, whole=True) as rows:
        net(**given)
    ours = net(**given).sample
    net.set_attn_processor(JointAttnProcessor2_0())
    assert torch.allclose(ours, net(**given).sample, atol=1e-5) and torch.allclose(ours, captured, atol=1e-5)
    assert {m.shape for m in maps.values()} == {(2, 2, 64, 36)} and len(maps) == 2
    for name, text in maps.items():
        assert rows[name].shape == (2, 2, 64, 36 + 64)
        assert torch.allclose(rows[name].sum(-1), torch.ones(()), atol=1e-5), "over text and image tokens"
        assert torch.equal(rows[name][..., :36], text) and 0 < text.sum(-1).max() < 1


def test_the_text_of_two_encoders_is_one_tensor_with_the_pooled_row_last(tmp_path) -> None:
    model = tiny_mmdit(tmp_path)
    first, second = model.text_encoder, model.text_encoder_2
    assert first is not None and second is not None
    prompts = ["a red circle", "a blue square and a star"]
    context, ids = model.embed(prompts), model.tokens(prompts)
    found = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
    sequence, pooled = model.parted(context)
    assert context.shape == (2, 37, 24)
    assert torch.equal(sequence, torch.cat([each.hidden_states[1] for each in found], -1))
    assert torch.equal(pooled, torch.cat([each.text_embeds for each in found], -1)) and pooled.shape == (2, 14)
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([0, 700])
    v = model.denoiser(
        hidden_states=x_t, timestep=(t + 1).float(), encoder_hidden_states=sequence, pooled_projections=pooled
    ).sample
    assert torch.allclose(model.eps(x_t, t, context), x_t + (1 - (t + 1) / 1000).view(-1, 1, 1, 1) * v, atol=1e-6)
    assert set(model.components()) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    twin = model.clone()
    assert not {p.data_ptr() for part in twin.components().values() for p in part.parameters()} & {
        p.data_ptr() for part in model.components().values() for p in part.parameters()
    }


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


def test_an_autoencoder_gets_few_large_images_at_once_and_many_small_ones() -> None:
    assert at_once(64, 32 * 32) == at_once(64, 128 * 128) == 64
    assert at_once(64, 512 * 512) == 4 and at_once(2, 512 * 512) == 2
    assert at_once(64, 4096 * 4096) == 1 and PIXELS // (512 * 512) == 4


def test_images_of_several_batches_are_those_of_one() -> None:
    model = tiny_unet()
    given = inputs(model, 7)
    parts = model.sample(given, DDIM(steps=2), batch=3)
    assert parts.shape == (7, *model.shape)
    # some processors round otherwise for other batch sizes, and x_0 at t = T is a small difference of large numbers
    torch.testing.assert_close(parts, model.sample(given, DDIM(steps=2), batch=7), rtol=0, atol=1e-3)
    assert (parts[0] - parts[1]).abs().max() > 0.1, "another image is no rounding"


def test_an_image_that_is_not_finite_is_found_in_every_part() -> None:
    images = torch.zeros(2 * PART + 1, 1, 2, 2)
    assert checked(images) is images
    images[-1, 0, 0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        checked(images)


@pytest.mark.parametrize(("steps", "wanted"), [(8, [(6, 0.4), (2, 0.04)]), (1, [(1, 0.4)])])
def test_a_training_at_two_rates_has_the_share_of_its_steps_at_the_first(
    steps: int, wanted: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.diffusion import training

    seen: list[tuple[int, float, Any]] = []
    monkeypatch.setattr(training, "minimize", lambda *_, steps, lr, clip: seen.append((steps, lr, clip)))
    training.minimize_in_two(lambda: torch.zeros(()), [], steps=steps, share=0.75, lr=0.4, divisor=10, clip=None)
    assert [(n, pytest.approx(rate)) for n, rate in wanted] == [(n, rate) for n, rate, _ in seen]
    assert all(clip is None for *_, clip in seen)


def test_each_parameter_can_have_a_rate_of_its_own() -> None:
    """AdamW's first step is the rate, whatever the gradient."""
    from harness.diffusion import training

    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    training.minimize(
        lambda: torch.stack([3 * p.sum() for p in params]).sum(), params, steps=1, lr=1e-2, factors=[1, 0.5, 2]
    )
    assert [p.item() for p in params] == pytest.approx([-1e-2, -5e-3, -2e-2], rel=1e-4)
