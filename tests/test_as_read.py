"""Directories that are read again as they were read: the settings of a schedule, and the samples with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.diffusion import checkpoint, schedules
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM, DEIS, DPMSolverPP, UniPC
from harness.diffusion.seeds import image_noise, image_seeds
from harness.testing import tiny
from harness.types import Inputs
from tests.oracles import tiny_sd

BETAS = {"num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.1}
SAID: dict[str, dict[str, Any]] = {
    "the betas alone": {},
    "all that changes samples": {
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
        "clip_sample": True, "clip_sample_range": 0.7, "thresholding": False, "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5, "prediction_type": "v_prediction", "rescale_betas_zero_snr": False,
        "variance_type": "fixed_large", "final_sigmas_type": "zero", "use_karras_sigmas": False,
        "beta_schedule": "scaled_linear",
    },
}  # fmt: skip
OURS = (DDIM(steps=4, spacing="leading"), DEIS(steps=4), DPMSolverPP(steps=4), UniPC(steps=4))
Sampled = torch.Tensor | str


def settings(folder: Path) -> dict[str, Any]:
    said = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    return {name: value for name, value in said.items() if name != "_diffusers_version"}


def say(folder: Path, cls: str, **config: Any) -> None:
    text = json.dumps({"_class_name": cls, **BETAS, **config})
    (folder / "scheduler/scheduler_config.json").write_text(text)


def ours(model: DiffusionModel) -> list[Sampled]:
    seeds = image_seeds(0, "x", 2)
    prompts = ("a red box", "a box") if model.conditional else None
    inputs = Inputs(image_noise(seeds, model.shape), prompts, seeds)

    def made(sampler: Any) -> Sampled:
        try:
            return model.sample(inputs, sampler)
        except Exception as error:  # of diffusers, of settings that its scheduler does not know
            return repr(error)

    return [made(sampler) for sampler in OURS]


def theirs(folder: Path, **options: Any) -> Sampled:
    """What the pipeline of a directory makes with stock diffusers."""
    import diffusers

    library: Any = diffusers
    pipeline = library.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    try:
        return pipeline(num_inference_steps=4, generator=rng, output_type="pt", **options).images
    except TypeError as error:  # DDPMPipeline hands a generator to schedulers that take none
        return repr(error)


def assert_same(one: Sampled, other: Sampled) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
    else:
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
@pytest.mark.parametrize("cls", schedules.OF_BETAS)
def test_a_schedule_is_written_as_it_was_read_and_gives_the_same_samples(
    cls: str, said: dict[str, Any], tmp_path: Path
) -> None:
    import diffusers

    library: Any = diffusers
    scheduler = getattr(library, cls)(**BETAS)
    library.DDPMPipeline(unet=tiny.model("noise").denoiser, scheduler=scheduler).save_pretrained(tmp_path / "a")
    say(tmp_path / "a", cls, **said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that the class does not know
        model = checkpoint.load(tmp_path / "a")
        checkpoint.save(model, tmp_path / "b")
        again = checkpoint.load(tmp_path / "b")
        for before, after in zip(ours(model), ours(again), strict=True):
            assert_same(before, after)
        assert_same(*(theirs(tmp_path / name, batch_size=2) for name in "ab"))
    unknown = {schedules.ZERO_SNR} - set(scheduler.config)  # which the class ignores
    assert settings(tmp_path / "b") == {k: v for k, v in settings(tmp_path / "a").items() if k not in unknown}


@pytest.mark.parametrize("cls", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_what_the_pipeline_of_stable_diffusion_changes_in_its_schedule_is_not_written(cls: str, tmp_path: Path) -> None:
    checkpoint.save(tiny_sd(tmp_path / "tokens"), tmp_path / "a")
    index = json.loads((tmp_path / "a/model_index.json").read_text())
    (tmp_path / "a/model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", cls]}))
    say(tmp_path / "a", cls, steps_offset=0, **({"clip_sample": True} if cls == "DDIMScheduler" else {}))
    model = checkpoint.load(tmp_path / "a")
    before = ours(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpoint.save(model, tmp_path / "b")
        assert_same(*(theirs(tmp_path / name, prompt="a red box", guidance_scale=2.0) for name in "ab"))
    assert model.scheduler.config.steps_offset == 0, "the model in memory stays as it is"
    for one, other in zip(before, ours(checkpoint.load(tmp_path / "b")), strict=True):
        assert_same(one, other)
    assert settings(tmp_path / "b") == settings(tmp_path / "a")


def test_the_pipelines_class_is_kept_if_its_parts_are_the_same(tmp_path: Path) -> None:
    import diffusers

    library: Any = diffusers
    net, scheduler = tiny.model("noise").denoiser, library.DDIMScheduler(**BETAS)
    library.DDIMPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path / "a")
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "b", like=tmp_path / "a")
    again = library.DiffusionPipeline.from_pretrained(tmp_path / "b", local_files_only=True)
    assert type(again) is library.DDIMPipeline
    checkpoint.save(tiny_sd(tmp_path / "tokens"), tmp_path / "text")
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "c", like=tmp_path / "text")
    assert json.loads((tmp_path / "c/model_index.json").read_text())["_class_name"] == "DDPMPipeline"
