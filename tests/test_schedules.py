"""Schedules of diffusers: which are read, the noise levels that they give, and what other schedulers make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion import checkpoint, schedules
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import CheckpointError, ModelFiles
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import image_noise, image_seeds
from harness.testing import tiny
from harness.types import Inputs
from tests.oracles import tiny_sd

BETAS = {
    "linear": {"beta_start": 2e-4, "beta_end": 0.03},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}


def stock(cls: str) -> Any:
    import diffusers

    return getattr(diffusers, cls)


def read(folder: Path, cls: str, **config: Any) -> Any:
    """What is read of a directory with this configuration alone."""
    (folder / "scheduler").mkdir(exist_ok=True)
    text = json.dumps({"_class_name": cls, **config})
    (folder / "scheduler/scheduler_config.json").write_text(text)
    return schedules.read(ModelFiles(folder), "scheduler", cls)


def levels_of_ddim(made: Any) -> torch.Tensor:
    """ᾱ_t (T,) of the sampler with which a scan samples a model that has this scheduler."""
    return DDIM(steps=10).scheduler(made.config).alphas_cumprod


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("cls", schedules.OF_BETAS)
def test_the_levels_are_those_of_diffusers_and_of_ddpm(cls: str, kind: str, tmp_path: Path) -> None:
    config = {"num_train_timesteps": 500, "beta_schedule": kind, **BETAS[kind]}
    made = read(tmp_path, cls, **config)
    assert torch.equal(made.alphas_cumprod, stock(cls)(**config).alphas_cumprod)
    assert torch.equal(made.alphas_cumprod, stock("DDPMScheduler")(**config).alphas_cumprod)
    assert torch.equal(made.alphas_cumprod, levels_of_ddim(made))


@pytest.mark.parametrize("cls", schedules.OF_BETAS[8:])
def test_a_model_is_written_with_its_scheduler_and_stock_diffusers_loads_it(cls: str, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline  # type: ignore[attr-defined]

    config = {"num_train_timesteps": 40, "beta_start": 0.001, "beta_end": 0.2, "beta_schedule": "linear"}
    scheduler, seeds = read(tmp_path, cls, set_alpha_to_one=True, **config), image_seeds(0, "x", 2)  # PNDM's is False
    model = DiffusionModel(tiny.model("noise").denoiser, scheduler)
    inputs = Inputs(image_noise(seeds, model.shape), None, seeds)
    like = DiffusionModel(model.denoiser, stock("DDPMScheduler")(**config))
    images = model.sample(inputs, DDIM(steps=4))
    assert torch.equal(images, like.sample(inputs, DDIM(steps=4))), "the same betas give the same images"
    checkpoint.save(model, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert type(again.scheduler) is stock(cls) and torch.equal(images, again.sample(inputs, DDIM(steps=4)))
    theirs: Any = DDPMPipeline.from_pretrained(tmp_path / "m", local_files_only=True).scheduler
    assert type(theirs) is stock(cls) and torch.equal(theirs.alphas_cumprod, scheduler.alphas_cumprod)


def test_stable_diffusion_keeps_its_scheduler_too(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline  # type: ignore[attr-defined]

    model = tiny_sd(tmp_path / "tokens")
    model.scheduler = stock("KDPM2AncestralDiscreteScheduler").from_config(model.scheduler.config)
    checkpoint.save(model, tmp_path / "m")
    assert torch.equal(checkpoint.load(tmp_path / "m").scheduler.alphas_cumprod, model.scheduler.alphas_cumprod)
    theirs: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True).scheduler
    assert type(theirs).__name__ == "KDPM2AncestralDiscreteScheduler"
    assert torch.equal(theirs.alphas_cumprod, model.scheduler.alphas_cumprod)


@pytest.mark.parametrize("cls", [name for name in schedules.OF_BETAS if name not in ("DDPMScheduler", "LCMScheduler")])
def test_settings_of_sampling_change_no_level(cls: str, tmp_path: Path) -> None:
    spaced = {"use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1}
    plain, other = read(tmp_path, cls), read(tmp_path, cls, **spaced)
    assert torch.equal(plain.alphas_cumprod, other.alphas_cumprod)


@pytest.mark.parametrize("cls", schedules.OF_BETAS)
def test_levels_without_signal_at_the_end_are_those_of_the_class(cls: str, tmp_path: Path) -> None:
    """A class that does not know the setting ignores it, and so must the sampler that gets its configuration."""
    wanted = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    made, plain = read(tmp_path, cls, **wanted), read(tmp_path, cls)
    knows = "rescale_betas_zero_snr" in stock(cls)().config
    assert torch.equal(made.alphas_cumprod, plain.alphas_cumprod) is not knows
    assert torch.allclose(made.alphas_cumprod, levels_of_ddim(made), atol=2**-24), "diffusers may end at 2^-24, not 0"


@pytest.mark.parametrize("cls", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
def test_a_bound_that_there_is_none_is_read_as_diffusers_writes_it(cls: str, tmp_path: Path) -> None:
    file = tmp_path / "scheduler/scheduler_config.json"
    stock(cls)().save_pretrained(file.parent)
    assert '"lambda_min_clipped": -Infinity' in file.read_text()
    made = schedules.read(ModelFiles(tmp_path), "scheduler", cls)
    assert made.config.lambda_min_clipped == -math.inf and torch.equal(made.alphas_cumprod, stock(cls)().alphas_cumprod)
    file.write_text(file.read_text().replace("lambda_min_clipped", "flow_shift_2"))
    with pytest.raises(CheckpointError, match="-Infinity is no number"):
        schedules.read(ModelFiles(tmp_path), "scheduler", cls)


@pytest.mark.parametrize("rescaled", [False, True])
def test_betas_on_a_sigmoid_are_passed_on(rescaled: bool, tmp_path: Path) -> None:
    """Only DDPMScheduler and its parallel form know them."""
    config = {"beta_schedule": "sigmoid", "rescale_betas_zero_snr": rescaled}
    made = read(tmp_path, "DDPMScheduler", **config)
    assert torch.equal(made.alphas_cumprod, stock("DDPMScheduler")(**config).alphas_cumprod)
    assert torch.equal(made.alphas_cumprod, levels_of_ddim(made))


@pytest.mark.parametrize(
    ("cls", "config", "words"),
    [
        ("DEISMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas gives the noise levels of a flow"),
        ("DEISMultistepScheduler", {"solver_order": 10**9}, "solver_order is 1000000000; it should be a whole number"),
        ("UniPCMultistepScheduler", {"solver_order": True}, "solver_order is True"),
        ("SASolverScheduler", {"corrector_order": 10**9}, "corrector_order is 1000000000"),
        ("LCMScheduler", {"timestep_scaling": 1.0}, "timestep_scaling is 1.0; below 10 "),
        ("LCMScheduler", {"timestep_scaling": "10"}, "timestep_scaling is '10'"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "takes log σ instead of t",
        ),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "no beta_schedule 'exp'"),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "prediction_type 'sample'"),
    ],
)
def test_a_schedule_whose_levels_are_others_is_refused(
    cls: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, cls, **config)


def test_a_consistency_models_answer_is_noise_but_for_a_share_below_the_bound() -> None:
    """x_0 is c_out x̂_0 + c_skip x_t, and an ε-model's is x̂_0. The two differ by 1 - c_out and c_skip."""
    scheduler = stock("LCMScheduler")(timestep_scaling=schedules.LEAST_SCALING)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(1)
    assert skip < 0.0025 and 1 - out < 0.0013
    skip, _ = stock("LCMScheduler")(timestep_scaling=0.1).get_scalings_for_boundary_condition_discrete(1)
    assert skip > 0.9


def test_what_is_not_read_is_refused_by_its_levels() -> None:
    for cls in schedules.OF_SIGMAS:
        assert cls not in schedules.READ and "not those of betas" in schedules.refusal(cls)
    for cls in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler"):
        assert cls in schedules.OF_SIGMAS and not hasattr(stock(cls)(), "alphas_cumprod")
    assert schedules.refusal("IPNDMScheduler").startswith("supported: DDPMScheduler, ")
