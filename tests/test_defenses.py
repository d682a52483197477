"""Defenses: inversion against a planted shift, and what defenses leave alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, DDPM, PNDM, Heun, PredictorCorrector
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.diffusion.training import Examples
from harness.methods.pruning import prune
from harness.types import Data, Inputs, Knowledge
from plugins.defenses import anp, clp, fine_pruning
from plugins.defenses.anp import ANP
from plugins.defenses.clip import Clip, Clipping
from plugins.defenses.elijah import Elijah
from plugins.defenses.fine_pruning import FinePruning
from plugins.defenses.finetune import Finetune
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.triggers.box import Box
from tests.oracles import PlantedShift, one_image_model, scheduler, tiny_unet

FAST = {"steps": 2, "batch": 2, "lr": 1e-3, "bf16": False}


def weights(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_elijah_recovers_a_planted_shift() -> None:
    r = Box().delta((1, 16, 16))
    model = DiffusionModel(PlantedShift(r, c=0.5), scheduler())
    found = Elijah(iterations=400, inversion_lr=0.02, noises=600).inverted(model, generator(0, "x"))
    losses = found.notes["inversion_loss"]
    assert torch.nn.functional.cosine_similarity(found.tau.flatten(), r.flatten(), dim=0) > 0.99
    assert losses[-1] < losses[0]


def test_elijah_told_the_trigger_does_not_search_for_it() -> None:
    told = replace(Elijah(), invert=False, **FAST)
    data = Data(torch.rand(8, 1, 16, 16) * 2 - 1)
    assert told.needs == ("data", "trigger") and Elijah().needs == ("data",)
    done = told.defend(tiny_unet(), Knowledge(data=data, trigger=Box()), generator(0, "x"))
    assert isinstance(done.trigger, torch.Tensor) and torch.equal(done.trigger, Box().delta((1, 16, 16)))


@pytest.mark.parametrize(
    "defense",
    [
        Finetune(**FAST),
        replace(Elijah(), iterations=2, noises=4, **FAST),
        ANP(iterations=2, batch=2, lr=100.0, bf16=False),
        FinePruning(ratio=0.5, batches=1, **FAST),
    ],
    ids=lambda defense: defense.name,
)
def test_unconditional_defenses_leave_their_model_alone_and_repeat(defense) -> None:
    model, known = tiny_unet(), Knowledge(data=Data(torch.rand(8, 1, 16, 16) * 2 - 1))
    before = weights(model)
    once, again = (defense.defend(model, known, generator(3, "x")).model for _ in range(2))
    assert same(before, weights(model)) and same(weights(once), weights(again))
    changed = {name: w for name, w in weights(once).items() if w.shape != before[name].shape}
    assert changed or not same(before, weights(once))


# ---- clip -----------------------------------------------------------------------------------------------------------


def inputs(n: int = 4) -> Inputs:
    seeds = image_seeds(0, "clip", n)
    return Inputs(image_noise(seeds, (1, 16, 16)), None, seeds)


def test_clipping_the_predicted_x_0_is_the_samplers_own_clip() -> None:
    model, wrapped = tiny_unet(), Clipping(x_t=False, x_0=True).around(DDIM(steps=4))
    assert wrapped.clip and wrapped.name == "ddim"
    assert torch.equal(model.sample(inputs(), wrapped), model.sample(inputs(), DDIM(steps=4, clip=True)))


@pytest.mark.parametrize("inner", [DDIM(steps=4), DDPM(steps=4), PNDM(steps=4), Heun(steps=4)], ids=lambda s: s.name)
def test_clipping_x_t_keeps_every_state_after_the_first_in_range(inner: Any) -> None:
    seen: list[Tensor] = []
    model = tiny_unet()
    model.denoiser.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    wrapped = Clipping().around(inner)
    assert wrapped.nfe == inner.nfe and wrapped.name == inner.name
    images = wrapped.run(model, inputs())
    assert images.abs().max() <= 1 and len(seen) == inner.nfe
    largest = torch.stack([x.abs().max() for x in seen[1:]])
    assert (largest <= 1 + 1e-6).all() and seen[0].abs().max() > 1
    plain: list[Tensor] = []
    model = tiny_unet()
    model.denoiser.register_forward_pre_hook(lambda net, args: plain.append(args[0]))
    inner.run(model, inputs())
    assert max(x.abs().max() for x in plain[1:]) > 1


def test_heun_is_clipped_in_x_t_and_keeps_its_images_apart() -> None:
    model = DigitsDDPM().load()
    apart = [model.sample(inputs(8), each).std(0).mean() for each in (Heun(steps=8), Clipping().around(Heun(steps=8)))]
    assert apart[1] > apart[0] / 2


@pytest.mark.parametrize("clipping", [Clipping(), Clipping(x_t=False, x_0=True)], ids=["x_t", "x_0"])
def test_latents_are_not_clipped(clipping: Clipping) -> None:
    with pytest.raises(ValueError, match="latents have no range"):
        clipping.around(DDIM(steps=2)).run(cast(Any, SimpleNamespace(vae=object(), family="vp")), inputs())


def test_one_clipped_step_is_the_plain_step_clamped() -> None:
    model = one_image_model(torch.full((1, 16, 16), 3.0))
    out = Clipping().around(DDIM(steps=1)).run(model, inputs())
    torch.testing.assert_close(out, DDIM(steps=1).run(model, inputs()).clamp(-1, 1))
    assert (out == 1).all()


def test_clip_delivers_a_registered_sampler_and_refuses_what_it_cannot_clip() -> None:
    from harness import registry

    plugins = registry.load(strict=True)
    sampler = Clip(x_0=True).defend(None, Knowledge(), None).sampler
    assert plugins.build("samplers", registry.spec_of(sampler)) == sampler == Clipping(x_t=True, x_0=True)
    assert Clip.delivers == ("sampler",)
    with pytest.raises(ValueError, match="nothing to clip"):
        Clip(x_t=False)
    with pytest.raises(ValueError, match="variance-preserving models, not ve-pc"):
        Clipping().around(PredictorCorrector())


# ---- anp ------------------------------------------------------------------------------------------------------------


def test_a_gated_convolution_scales_its_weights_and_its_bias_apart() -> None:
    """y = (m + δ) ⊙ W x + (1 + ξ) ⊙ b, computed here from scaled weights."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 5, 5)
    m, delta, xi = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.4, 0.0, -0.4])
    other = nn.Conv2d(2, 3, 3, padding=1)
    assert layer.bias is not None and other.bias is not None
    other.weight.data = (m + delta).view(-1, 1, 1, 1) * layer.weight.data
    other.bias.data = (1 + xi) * layer.bias.data
    plain = layer(x)
    with anp.gated({"a": layer}, {"a": m}, {"a": delta}, {"a": xi}):
        torch.testing.assert_close(layer(x), other(x))
    with anp.gated({"a": layer}, {"a": torch.ones(3)}, {}, {}):
        torch.testing.assert_close(layer(x), plain)
    assert torch.equal(layer(x), plain)


class Sensitive(nn.Module):
    """ε(x) = x as relu(x) - relu(-x). A third channel, relu(4x - 12), sleeps on noise; a perturbation wakes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1, bias=False)
        self.conv_in.weight.data = torch.tensor([1.0, -1.0, 4.0]).view(3, 1, 1, 1)
        self.conv_in.bias = nn.Parameter(torch.tensor([0.0, 0.0, -12.0]))
        self.conv_out.weight.data = torch.tensor([1.0, -1.0, 3.0]).view(1, 3, 1, 1)
        self.config = SimpleNamespace(in_channels=1, sample_size=8)
        self.requires_grad_(False)

    def forward(self, x_t: Tensor, t: Tensor, **unused: Any) -> Any:
        return SimpleNamespace(sample=self.conv_out(torch.relu(self.conv_in(x_t))))


def test_anp_prunes_the_channel_that_a_perturbation_wakes_and_keeps_those_that_work() -> None:
    model, known = DiffusionModel(Sensitive(), scheduler()), Knowledge(data=Data(torch.zeros(8, 1, 8, 8)))
    done = ANP(iterations=100, lr=0.02, batch=16, bf16=False).defend(model, known, generator(0, "x"))
    assert done.model is not None
    before, after = (dict(m.denoiser.named_parameters())["conv_in.weight"].flatten() for m in (model, done.model))
    assert after.tolist() == [1.0, -1.0, 0.0] and before.tolist() == [1.0, -1.0, 4.0]
    assert done.notes["pruned_channels"] == pytest.approx(1 / 3)


def test_the_worst_perturbation_stays_in_its_bounds_and_raises_the_loss() -> None:
    layer, target = nn.Conv2d(1, 4, 1), torch.zeros(2, 4, 3, 3)
    layer.requires_grad_(False)
    masks = {"a": torch.ones(4, requires_grad=True)}
    x = torch.randn((2, 1, 3, 3), generator=generator(0, "x"))

    def loss(delta: Any, xi: Any) -> Tensor:
        with anp.gated({"a": layer}, masks, delta, xi):
            return (layer(x) - target).square().mean()

    delta, xi = ANP(ascents=3).worst(masks, loss, generator(1, "x"))
    assert max(delta["a"].abs().max(), xi["a"].abs().max()) <= 0.4
    assert loss(delta, xi) > loss({}, {})


# ---- fine-pruning ---------------------------------------------------------------------------------------------------


def parts(block: Any) -> tuple[Any, Any]:
    """What normalises and what reads the channels inside a ResNet block."""
    return block.norm2, block.conv2


def test_fine_pruning_removes_the_channels_that_clean_inputs_leave_dormant() -> None:
    """Of every two channels between a block's convolutions one is silenced by its normalisation: those go."""
    model = tiny_unet()
    blocks = [m for m in model.denoiser.modules() if type(m).__name__ == "ResnetBlock2D"]
    for block in blocks:
        norm, _ = parts(block)
        norm.weight.data[:], norm.bias.data[:] = 1.0, 0.5
        norm.weight.data[::2], norm.bias.data[::2] = 0.0, 0.0
    data = Data(torch.rand(8, 1, 16, 16) * 2 - 1)
    found = fine_pruning.mean_activations(model, Examples(model, data), 1, 8, generator(0, "x"))
    realised = prune(model, fine_pruning.dormancy(found), ratio=0.5, scope="inner")
    for block in blocks:
        norm, conv2 = parts(block)
        assert norm.bias.tolist() == [0.5] * 4
        assert conv2.weight.shape[1] == norm.num_channels == 4
    assert 0 < realised["parameters"] < 1
    assert model.sample(inputs(), DDIM(steps=2)).shape == (4, 1, 16, 16)


def test_activations_are_averaged_over_batches_as_readers_get_them() -> None:
    first, last = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1)
    net = nn.Sequential(first, nn.ReLU(), last)
    sums: Any = {}
    with torch.no_grad(), fine_pruning.watched(net, sums):
        x = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4)
        net(x)
        net(2 * x)
    assert sums[first].tolist() == [3.0, 9.0]
    expected = sum(torch.relu(first(k * x)).mean((0, 2, 3)) for k in (1, 2))
    torch.testing.assert_close(sums[last], expected)


# ---- clp ------------------------------------------------------------------------------------------------------------


def test_clp_silences_filters_whose_spectral_norm_is_an_outlier_of_their_layer() -> None:
    weight = torch.randn(32, 4, 3, 3, generator=generator(0, "x"))
    weight[5] *= 20
    bounds = clp.lipschitz(weight)
    assert bounds[7] == pytest.approx(torch.linalg.svdvals(weight[7].flatten(1))[0].item(), rel=1e-5)
    assert clp.outliers(bounds, 3.0).nonzero().flatten().tolist() == [5]
    assert not clp.outliers(torch.tensor([4.0]), 3.0).any()


def test_clp_changes_nothing_but_outliers_and_leaves_the_prediction_alone() -> None:
    model = tiny_unet()
    convolutions = [layer for layer in model.denoiser.modules() if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        convolutions[0].weight[1] *= 50
        convolutions[-1].weight[0] *= 50
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    done = clp.CLP(u=2.0).defend(model, Knowledge(), generator(0, "x"))
    assert done.model is not None and done.notes["pruned_share"] > 0
    after = [layer for layer in done.model.denoiser.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert not after[0].weight[1].any() and torch.equal(after[-1].weight, convolutions[-1].weight)
    assert all(torch.equal(before[name], value) for name, value in model.denoiser.state_dict().items())
