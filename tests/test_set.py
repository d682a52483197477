"""SET: scaled attention, what it does to the outputs of layers, and the one-class encoder of clean prompts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion import attention
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.types import Inputs, Knowledge
from plugins.defenses import set as plugin
from plugins.defenses.set import SET
from tests.oracles import tiny_mmdit, tiny_sd

PROMPTS = tuple(
    f"a {size} {colour} {shape} at the top left"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square")
)
CHEAP = SET(sampling_steps=6, first=2, scales=(0.3, 7.0), epochs=3)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


def queries(model: DiffusionModel, n: int = 3) -> Inputs:
    seeds = image_seeds(0, "set", n)
    return Inputs(image_noise(seeds, model.shape), PROMPTS[:n], seeds)


def by_hand(layer: Any, x: Tensor, context: Tensor, factor: float) -> Tensor:
    """softmax(λ Q Kᵀ / √d) V (B, heads, queries, channels) of one attention layer."""
    q, k, v = (
        part.unflatten(2, (layer.heads, -1)).transpose(1, 2)
        for part in (layer.to_q(x), layer.to_k(context), layer.to_v(context))
    )
    return (factor * torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[3] ** 0.5).softmax(-1) @ v


class Inputted:
    """What enters each attention layer of a denoiser, by name, in the order of forward passes."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.seen: dict[str, list[tuple[Any, Tensor, Tensor]]] = {}
        for name, layer in denoiser.named_modules():
            if name.endswith(("attn1", "attn2")):
                layer.register_forward_pre_hook(self.keeper(name), with_kwargs=True)

    def keeper(self, name: str) -> Any:
        def keep(layer: Any, given: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            context = options.get("encoder_hidden_states")
            self.seen.setdefault(name, []).append((layer, given[0], given[0] if context is None else context))

        return keep


def test_the_output_of_a_scaled_layer_is_that_of_the_scaled_softmax(sd: DiffusionModel) -> None:
    model = sd.clone()
    entered = Inputted(model.denoiser)
    asked, t = queries(model), torch.tensor([400] * 3)
    plain = model.eps(asked.noise, t, model.embed(asked.prompts or ()))
    with attention.scaled(model.denoiser, 7.0, lambda name, cross, queries: cross and queries == 64) as seen:
        moved = model.eps(asked.noise, t, model.embed(asked.prompts or ()))
    assert seen and all(name.endswith("attn2") for name in seen)
    for name, output in seen.items():
        torch.testing.assert_close(output, by_hand(*entered.seen[name][1], 7.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, moved)
    assert torch.equal(model.eps(asked.noise, t, model.embed(asked.prompts or ())), plain)


def test_maps_that_are_captured_meanwhile_are_the_scaled_ones(sd: DiffusionModel) -> None:
    asked, t = queries(sd), torch.tensor([400] * 3)
    with attention.scaled(sd.denoiser, 20.0, lambda *_: True) as seen, attention.capture(sd.denoiser) as maps:
        sd.eps(asked.noise, t, sd.embed(asked.prompts or ()))
    sharp = next(iter(maps.values())).max(-1).values.mean()
    with attention.capture(sd.denoiser) as maps:
        sd.eps(asked.noise, t, sd.embed(asked.prompts or ()))
    assert set(maps) < set(seen) and sharp > next(iter(maps.values())).max(-1).values.mean()


@pytest.mark.parametrize("layers", ["cross", "all"])
def test_the_features_are_mean_squares_between_runs_of_their_own(sd: DiffusionModel, layers: Any) -> None:
    """Computed from what entered each layer in each run: three runs of two steps, with guidance."""
    model, spec = sd.clone(), replace(CHEAP, layers=layers)
    asked = queries(model)
    entered = Inputted(model.denoiser)
    found = spec.features(model, asked)
    names = [
        name
        for name in sorted(entered.seen)
        if (name.endswith("attn1") and layers == "all")
        or (name.endswith("attn2") and "mid" not in name and entered.seen[name][0][1].shape[1] == 256)
    ]
    assert found.shape == (3, len(names), 4)
    expected = torch.empty(3, len(names), 4)
    for place, name in enumerate(names):
        runs = entered.seen[name]
        assert len(runs) == 6
        outputs = [by_hand(*given, factor)[3:] for given, factor in zip(runs, (1, 1, 0.3, 0.3, 7, 7), strict=True)]
        for step in range(2):
            for k in range(2):
                change = outputs[2 + 2 * k + step] - outputs[step]
                expected[:, place, 2 * step + k] = change.square().mean((1, 2, 3))
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-9)


def test_each_scale_follows_its_own_trajectory(sd: DiffusionModel) -> None:
    """The second step of a run starts where DDIM leads from the scaled answer of the first."""
    model, asked = sd.clone(), queries(sd)
    states: list[Tensor] = []
    model.denoiser.register_forward_pre_hook(lambda _, given: states.append(given[0][:3].clone()))
    CHEAP.outputs(model, asked, 7.0)
    scheduler = DDIM(steps=6).scheduler(model.scheduler.config)
    predict = DDIM(steps=6, guidance=7.5).predictor(sd, asked)
    with torch.no_grad(), attention.scaled(sd.denoiser, 7.0, CHEAP.chosen):
        out = predict(asked.noise, scheduler.timesteps[0])
    after = scheduler.step(out, scheduler.timesteps[0], asked.noise).prev_sample
    torch.testing.assert_close(states[1], after)


def test_without_scaling_nothing_moves(sd: DiffusionModel) -> None:
    assert SET(sampling_steps=4, first=2, scales=(1.0,)).features(sd, queries(sd)).abs().max() == 0


def test_the_encoder_is_two_layers_per_layer_then_mean_and_deviation_then_two_more() -> None:
    weights = plugin.initial(6, generator(0, "x"))
    features = torch.randn((5, 3, 6), generator=generator(0, "f"), dtype=torch.float64)

    def layer(name: str) -> nn.Linear:
        made = nn.Linear(*reversed(weights["w" + name].shape), bias="b" + name in weights, dtype=torch.float64)
        made.weight.data = weights["w" + name].detach()
        if "b" + name in weights:
            made.bias.data = weights["b" + name].detach()
        return made

    shared = nn.Sequential(layer("1"), nn.GELU(), layer("2"), nn.GELU())(features)
    pooled = torch.cat([shared.mean(1), shared.std(1, unbiased=False)], 1)
    expected = nn.Sequential(layer("3"), nn.GELU(), layer("4"))(pooled)
    torch.testing.assert_close(plugin.encoded(weights, features), expected)
    assert expected.shape == (5, 32) and "b4" not in weights
    assert all(weight.abs().max() <= weight.shape[-1] ** -0.5 for name, weight in weights.items() if name[0] == "w")


def test_the_loss_is_the_soft_boundary_of_deep_svdd() -> None:
    """Squared distances 1, 4 and 9 with R² = 3 and ν = 1/2: 3 + 2 (0 + 1 + 6) / 3."""
    z, centre = torch.tensor([[1.0, 0], [0, 2], [0, -3]]), torch.zeros(2)
    assert plugin.boundary_loss(z, centre, torch.tensor(3.0), 0.5).item() == pytest.approx(3 + 14 / 3)
    assert plugin.boundary_loss(z, centre, None, 0.5).item() == pytest.approx(14 / 3)


def test_the_centre_is_estimated_without_the_farthest_hundredth() -> None:
    z = torch.cat([torch.arange(199.0), torch.tensor([1e6])]).unsqueeze(1)
    assert plugin.central(z, torch.zeros(1)).item() == pytest.approx(sum(range(198)) / 198)


class Gaussian(SET):
    """Features that are Gaussian, and further out for prompts with "zq"."""

    def features(self, model: Any, inputs: Inputs) -> Tensor:
        rows = [torch.randn((3, 10), generator=generator(seed, "g"), dtype=torch.float64) for seed in inputs.seeds]
        far = torch.tensor([2.5 if "zq" in prompt else 1.0 for prompt in inputs.prompts or ()]).view(-1, 1, 1)
        return far * torch.stack(rows)


def asked_of_gaussian(text: str, n: int) -> Inputs:
    return Inputs(torch.zeros(n, 1, 1, 1), (text,) * n, image_seeds(1, text, n))


def test_held_out_prompts_give_the_false_alarm_rate_that_is_asked_for() -> None:
    """ν = 0.2; with 300 prompts behind the threshold and 600 after it the rate has a standard deviation of 0.028."""
    model: Any = SimpleNamespace(shape=(1, 1, 1), device=torch.device("cpu"))
    known = Knowledge(prompts=("clean",) * 600)
    done = Gaussian(nu=0.2, held_out=0.5, epochs=10, batch=100).defend(model, known, generator(0, "x"))
    assert done.screen is not None and done.screen_above is not None
    clean, far = (done.screen(asked_of_gaussian(text, 600)) for text in ("clean", "zq"))
    assert abs((clean > done.screen_above).double().mean().item() - 0.2) < 0.085
    assert (far > done.screen_above).double().mean() > 0.9
    assert len(done.notes["clean_scores"]) == 300


def test_training_learns_how_the_features_of_clean_prompts_depend_on_each_other() -> None:
    """Clean features come in pairs that nearly agree; the others have the same variances and do not. Compared are the
    mean squared distances to the centre."""

    def drawn(name: str, agree: bool) -> Tensor:
        features = torch.randn((200, 3, 10), generator=generator(1, name), dtype=torch.float64)
        first, second = features.split(5, 2)
        return torch.cat([first, (first + 0.1 * second) / 1.01**0.5 if agree else second], 2)

    clean, other = drawn("clean", True), drawn("other", False)

    def ratio(weights: plugin.Weights, centre: Tensor) -> float:
        with torch.no_grad():
            near, far = ((plugin.encoded(weights, f) - centre).square().sum(1).mean() for f in (clean, other))
        return (near / far).item()

    untrained = plugin.initial(10, generator(0, "x"))
    before = ratio(untrained, plugin.encoded(untrained, clean).detach().mean(0))
    assert ratio(*SET(epochs=5, batch=50).trained(clean, generator(0, "x"))) < before / 3


def test_a_prompt_is_judged_by_itself_and_repeats(sd: DiffusionModel) -> None:
    known = Knowledge(prompts=PROMPTS)
    once, again = (CHEAP.defend(sd, known, generator(0, "x")) for _ in range(2))
    assert once.screen is not None and again.screen is not None and once.screen_above == again.screen_above
    asked = queries(sd)
    together = once.screen(asked)
    alone = torch.cat([again.screen(asked[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-6)
    assert len(set(together.tolist())) == 3


def test_set_says_what_it_cannot_do(sd: DiffusionModel, tmp_path: Any) -> None:
    known = Knowledge(prompts=PROMPTS)
    with pytest.raises(ValueError, match="first=5 needs at least as many sampling_steps"):
        SET(sampling_steps=4).defend(sd, known, generator(0))
    with pytest.raises(ValueError, match="give it more prompts"):
        CHEAP.defend(sd, Knowledge(prompts=PROMPTS[:3]), generator(0))
    with pytest.raises(ValueError, match="set side="):
        replace(CHEAP, side=5).defend(sd, known, generator(0))
    with pytest.raises(TypeError, match="text-to-image UNet"):
        CHEAP.defend(tiny_mmdit(tmp_path), known, generator(0))
