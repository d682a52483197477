"""Samplers: exact on data that is one image, different from each other, honest about their cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import (
    DDIM,
    DDPM,
    DEIS,
    PNDM,
    SAMPLERS,
    DPMSolver,
    DPMSolverPP,
    FlowEuler,
    FlowHeun,
    Heun,
    PredictorCorrector,
    UniPC,
)
from harness.diffusion.seeds import image_noise, image_seeds
from harness.registry import parse_spec
from harness.types import Inputs, TargetContext
from plugins.models.digits_ddpm import DigitsDDPM
from plugins.targets.fixed_image import Hat
from tests.oracles import (
    GaussianFlow,
    exploding,
    flowing,
    one_image_flow,
    one_image_model,
    one_image_ve_model,
    scheduler,
    tiny_flow,
    tiny_ncsn,
    tiny_sd,
    tiny_unet,
)

ORDERED = [cls(steps=20, order=order) for cls in (DEIS, DPMSolver, DPMSolverPP, UniPC) for order in (1, 2, 3)]
VP: list[Any] = [DDIM(steps=20), DDIM(steps=20, eta=1.0), DDPM(steps=20), PNDM(steps=20), Heun(steps=20), *ORDERED]
VE: list[Any] = [PredictorCorrector(steps=30), PredictorCorrector(steps=30, corrections=0)]
FLOW: list[Any] = [FlowEuler(steps=20), FlowHeun(steps=20)]
TO_SIGMA_MIN = (DEIS, DPMSolver)


def words(sampler: Any) -> str:
    extra = {k: getattr(sampler, k) for k in ("order", "eta", "corrections") if hasattr(sampler, k)}
    return f"{sampler.name}-{'-'.join(map(str, extra.values()))}"


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand((1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def inputs(model: DiffusionModel, n: int, prompts: tuple[str, ...] | None = None) -> Inputs:
    seeds = image_seeds(0, "test", n)
    return Inputs(image_noise(seeds, model.shape), prompts, seeds)


@torch.no_grad()
def run(sampler: Any, model: DiffusionModel, n: int = 3) -> Tensor:
    """Images as the sampler leaves them, not clamped."""
    return model.decode(sampler.run(model, inputs(model, n)))


def test_every_sampler_is_tested_here() -> None:
    assert {type(sampler) for sampler in VP + VE + FLOW} == set(SAMPLERS.values())
    assert all(parse_spec(f"{name}(steps=4)") == (name, {"steps": 4}) for name in SAMPLERS)


@pytest.mark.parametrize("sampler", [s for s in VP if type(s) not in TO_SIGMA_MIN], ids=words)
def test_every_sampler_returns_the_one_image_of_the_data(sampler: Any, image: Tensor) -> None:
    assert (run(sampler, one_image_model(image)) - image).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", [s for s in VP if type(s) in TO_SIGMA_MIN], ids=words)
def test_solvers_in_the_noise_end_at_t_0_of_the_one_image(sampler: Any, image: Tensor) -> None:
    """What they return is x at t = 0 with the noise of x_T: √ᾱ_0 y + √(1-ᾱ_0) ε, where x_T = √ᾱ_T y + √(1-ᾱ_T) ε."""
    model = one_image_model(image)
    first, last = scheduler().alphas_cumprod[[0, 999]].double()
    eps = (inputs(model, 3).noise.double() - last.sqrt() * image) / (1 - last).sqrt()
    wanted = first.sqrt() * image + (1 - first).sqrt() * eps
    tight = 2e-4 if sampler.order == 3 else 1e-5  # DEIS integrates order 3 in float32
    assert (run(sampler, model) - wanted).abs().max() < tight


@pytest.mark.parametrize("sampler", VE, ids=words)
def test_predictor_and_corrector_return_the_one_image_of_the_data(sampler: Any, image: Tensor) -> None:
    assert (run(sampler, one_image_ve_model(image)) - image).abs().max() < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("cls", [FlowEuler, FlowHeun])
def test_flow_samplers_return_the_one_image_of_the_data(cls: Any, steps: int, shift: float, image: Tensor) -> None:
    """Its velocity is constant along each path, so that steps of any length are exact."""
    assert (run(cls(steps=steps), one_image_flow(image, shift=shift)) - image).abs().max() < 1e-4


@pytest.mark.parametrize(("cls", "order"), [(FlowEuler, 1), (FlowHeun, 2)])
def test_the_error_of_a_flow_sampler_falls_with_its_order_on_gaussian_data(cls: Any, order: int, image: Tensor) -> None:
    """For data N(m, s²) the flow takes ε to m + s ε: quantiles stay quantiles. Three times the steps divide the error
    by about 3 or 9."""
    model = DiffusionModel(GaussianFlow(image, 0.5), flowing())
    wanted = image + 0.5 * inputs(model, 3).noise
    few, many = ((run(cls(steps=steps), model) - wanted).abs().max().item() for steps in (40, 120))
    assert few < 0.1 and few / many == pytest.approx(3**order, rel=0.25)


def test_the_levels_of_a_flow_are_those_of_the_stock_pipeline_and_the_models_shift() -> None:
    for shift in (1.0, 3.0):
        theirs = flowing(shift=shift)
        theirs.set_timesteps(10)
        ours = FlowEuler(steps=10).scheduler(flowing(shift=shift).config)
        assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(FlowHeun(steps=10).scheduler(theirs.config).sigmas[:1], theirs.sigmas[:1])
        assert FlowHeun(steps=10).scheduler(theirs.config).sigmas[1].item() == pytest.approx(theirs.sigmas[1].item())


@pytest.mark.parametrize("beta_end", [0.02, 0.012])
def test_every_sampler_has_the_betas_of_the_model(beta_end: float) -> None:
    """diffusers' from_config gives Heun other betas than the model's where the model's are its scheduler's defaults."""
    config = scheduler(beta_end=beta_end).config
    for sampler in VP:
        assert torch.allclose(sampler.scheduler(config).alphas_cumprod, scheduler(beta_end=beta_end).alphas_cumprod)
    assert Heun(steps=20).scheduler(scheduler().config).init_noise_sigma.item() == pytest.approx(157.41, abs=0.01)


@pytest.mark.slow
def test_no_two_samplers_give_equal_images() -> None:
    """Three pairs are one algorithm in other words: they agree up to rounding, and no others do."""
    model = tiny_unet()
    made = {words(s): run(s, model, 2) for s in VP}
    scale = max(images.abs().max().item() for images in made.values())
    same = {("ddim-0.0", "dpm-solver-pp-1"), ("ddim-1.0", "ddpm-"), ("deis-1", "dpm-solver-1")}
    for pair in itertools.combinations(made, 2):
        one, other = (made[name] for name in pair)
        assert not torch.equal(one, other), pair
        assert ((one - other).abs().max().item() < 1e-5 * scale) == (pair in same), pair


def test_no_two_samplers_of_flows_give_equal_images() -> None:
    samplers = [*FLOW, FlowEuler(steps=21), FlowHeun(steps=11)]
    made = [run(sampler, tiny_flow(), 2) for sampler in samplers]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(made, 2))


def test_no_two_samplers_of_exploding_models_give_equal_images() -> None:
    model = tiny_ncsn()
    samplers = [*VE, PredictorCorrector(steps=30, corrections=2), PredictorCorrector(steps=30, snr=0.15)]
    made = [run(sampler, model, 2) for sampler in samplers]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(made, 2))


@pytest.mark.parametrize("sampler", [*VP, *VE, *FLOW, PNDM(steps=10), Heun(steps=10)], ids=words)
def test_nfe_is_the_number_of_network_evaluations(sampler: Any, image: Tensor) -> None:
    made = {"vp": one_image_model, "ve": one_image_ve_model, "flow": one_image_flow}
    model = made[sampler.family](image)
    calls = []
    model.denoiser.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    run(sampler, model)
    assert calls == [3] * sampler.nfe


def test_pndm_and_heun_take_19_evaluations_for_10_steps() -> None:
    assert (PNDM(steps=10).nfe, Heun(steps=10).nfe, DDIM(steps=10).nfe) == (19, 19, 10)
    assert PredictorCorrector(steps=10).nfe == 20
    assert (FlowEuler(steps=10).nfe, FlowHeun(steps=10).nfe, FlowHeun(steps=1).nfe) == (10, 19, 1)


@pytest.mark.parametrize("sampler", VP + VE + FLOW, ids=words)
def test_a_scheduler_of_another_class_than_asked_for_is_refused(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    name = getattr(sampler, "scheduler_class", "ScoreSdeVeScheduler")
    other = diffusers.EulerDiscreteScheduler()  # type: ignore[attr-defined]
    monkeypatch.setattr(getattr(diffusers, name), "from_config", classmethod(lambda cls, *a, **k: other))
    with pytest.raises(TypeError, match=f"asked for {name}, got EulerDiscreteScheduler"):
        sampler.scheduler({"vp": scheduler, "ve": exploding, "flow": flowing}[sampler.family]().config)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [*VP[:2], DDPM(steps=20), *VP[3:5], *ORDERED[1::3]], ids=words)
def test_an_image_does_not_depend_on_its_batch(sampler: Any) -> None:
    model, judge = DigitsDDPM().load(), DigitsDDPM().judge()
    together, alone = (model.sample(inputs(model, 5), sampler, batch=size) for size in (5, 2))
    assert (together - alone).abs().max() < 1e-4
    distances = [Hat().distances(images, TargetContext(together, None)) for images in (together, alone)]
    assert all(torch.equal(*(each <= threshold for each in distances)) for threshold in (0.05, 0.1, 0.15, 0.2))
    assert torch.equal(*(judge.attributes(images)["digit"] for images in (together, alone)))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", VE, ids=words)
def test_an_image_of_an_exploding_model_does_not_depend_on_its_batch(sampler: Any) -> None:
    model = tiny_ncsn()
    together, alone = (model.sample(inputs(model, 5), sampler, batch=size) for size in (5, 2))
    assert (together - alone).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", FLOW, ids=words)
def test_an_image_of_a_flow_does_not_depend_on_its_batch(sampler: Any) -> None:
    model = tiny_flow()
    together, alone = (model.sample(inputs(model, 5), sampler, batch=size) for size in (5, 2))
    assert (together - alone).abs().max() < 1e-4


def test_a_langevin_step_is_that_of_diffusers_for_one_image() -> None:
    sampler, rngs = PredictorCorrector(steps=30, snr=0.2), [torch.Generator().manual_seed(k) for k in range(3)]
    x_t, score = (torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(k)) for k in (7, 8))
    theirs = sampler.scheduler(exploding().config)
    pairs = zip(x_t.split(1), (3 * score).split(1), rngs, strict=True)
    wanted = torch.cat([theirs.step_correct(s, x, generator=rng).prev_sample for x, s, rng in pairs])
    noise = torch.cat([torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(k)) for k in range(3)])
    assert torch.allclose(sampler.correct(x_t, 3 * score, noise), wanted, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", VP + FLOW, ids=words)
def test_clipping_the_predicted_x0_changes_the_path(sampler: Any) -> None:
    model = tiny_flow() if sampler.family == "flow" else tiny_unet()
    clipping = type(sampler)(**{**vars(sampler), "clip": True})
    kept, clipped = (run(s, model, 2) for s in (sampler, clipping))
    assert (kept - clipped).abs().max() > 1e-2
    assert clipped.abs().max() < kept.abs().max()


@pytest.mark.parametrize("sampler", [PNDM(steps=20, clip=True), DPMSolverPP(steps=20, clip=True)], ids=words)
def test_clipping_leaves_an_x0_inside_the_range_alone(sampler: Any, image: Tensor) -> None:
    assert (run(sampler, one_image_model(image)) - image).abs().max() < 1e-5


@pytest.mark.parametrize("cls", [FlowEuler, FlowHeun])
def test_clipping_a_flow_brings_an_x0_outside_the_range_to_its_border_and_leaves_others_alone(
    cls: Any, image: Tensor
) -> None:
    assert (run(cls(steps=20, clip=True), one_image_flow(image)) - image).abs().max() < 1e-4
    assert (run(cls(steps=20, clip=True), one_image_flow(3 * image)) - (3 * image).clamp(-1, 1)).abs().max() < 1e-4


def first_input(sampler: Any, model: DiffusionModel) -> Tensor:
    """What the network is given at the sampler's first step."""
    seen: list[Tensor] = []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(sampler, model)
    return seen[0]


@pytest.mark.slow
def test_the_starting_noise_is_the_unit_noise_times_the_schedulers_sigma() -> None:
    """A network of a variance-preserving model first sees the unit noise, whatever the scheduler makes of x_T."""
    noise = inputs(tiny_unet(), 3).noise
    for sampler in VP:
        assert torch.allclose(first_input(sampler, tiny_unet()), noise, rtol=1e-4, atol=1e-5)
    assert torch.equal(first_input(VE[0], tiny_ncsn()), 50 * noise)
    assert all(torch.equal(first_input(sampler, tiny_flow()), noise) for sampler in FLOW)


def test_a_sampler_of_the_other_family_is_refused() -> None:
    with pytest.raises(
        ValueError, match="ddim samples variance-preserving models, this one is variance-exploding; use"
    ):
        run(DDIM(steps=4), tiny_ncsn())
    with pytest.raises(ValueError, match="ve-pc samples variance-exploding models, this one is variance-preserving"):
        run(PredictorCorrector(steps=4), tiny_unet())
    with pytest.raises(ValueError, match=r"ddim samples .*, this one is flow-matching; use flow-euler, flow-heun"):
        run(DDIM(steps=4), tiny_flow())


def test_text_to_image_models_take_every_vp_sampler(tmp_path) -> None:
    model = tiny_sd(tmp_path)
    for sampler in (PNDM(steps=4), DPMSolverPP(steps=4), Heun(steps=4)):
        assert model.sample(inputs(model, 2, ("a red circle", "a blue square")), sampler).shape == (2, 3, 32, 32)
