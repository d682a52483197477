"""Defenses on models of images that are wider than high, or higher than wide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.scan import verdict
from harness.stages.knowledge import declared
from harness.testing import tiny
from harness.types import Data, Knowledge
from plugins.defenses.anp import ANP
from plugins.defenses.bias_scan import BiasScan
from plugins.defenses.diff_cleanse import DiffCleanse
from plugins.defenses.diff_pruning import DiffPruning
from plugins.defenses.disdet import DisDet
from plugins.defenses.elijah import Elijah
from plugins.defenses.magnitude_pruning import MagnitudePruning
from plugins.defenses.random_pruning import RandomPruning
from plugins.defenses.terd import TERD
from plugins.defenses.ufid import UFID
from plugins.triggers.box import Box

STEPS: dict[str, Any] = {"ratio": 0.3, "steps": 2, "batch": 4}
SEARCH: dict[str, Any] = {"sampling_steps": 3, "noises": 4, "iterations": 2}
SHORT: dict[str, Any] = {
    "diff-cleanse": DiffCleanse(tau=55, prune="always", synthetic=8, images=4, **SEARCH, **STEPS),
    "diff-cleanse on pixels": DiffCleanse(tau=55, prune="never", encoder="pixels", **SEARCH),
    "diff-cleanse, given the trigger": DiffCleanse(tau=55, invert=False, data="real", images=4, **STEPS),
    "diff-pruning": DiffPruning(images=4, **STEPS),
    "diff-pruning on its own images": DiffPruning(images=4, data="synthetic", synthetic=4, **STEPS),
    "magnitude-pruning": MagnitudePruning(**STEPS),
    "random-pruning": RandomPruning(**STEPS),
    "anp": ANP(iterations=2, batch=4, bf16=False),
    "terd": TERD(iterations=3, refinement=2, batch=4, sampling_steps=3),
    "terd with scale": TERD(iterations=2, refinement=2, batch=4, sampling_steps=3, scale=True),
    "elijah": Elijah(iterations=2, steps=2, batch=4, bf16=False),
    "bias-scan": BiasScan(starts=3, shifts=3, iterations=2, batch=4, patch=13),
    "disdet": DisDet(draws=40),
    "ufid": UFID(queries=2),
}
SHAPES = ((3, 16, 32), (1, 24, 16))


def oblong(shape: tuple[int, int, int]) -> DiffusionModel:
    """A random model of images of `shape`, with 60 timesteps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet2DModel(
            sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0], layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    schedule = DDPMScheduler(num_train_timesteps=60, beta_schedule="linear", clip_sample=False)
    return DiffusionModel(net.eval().requires_grad_(False), schedule)


@pytest.mark.parametrize("shape", SHAPES, ids=["3x16x32", "1x24x16"])
@pytest.mark.parametrize("which", SHORT)
def test_a_defense_works_on_images_that_are_not_square(which: str, shape: tuple[int, int, int]) -> None:
    defense, model, drawn = SHORT[which], oblong(shape), generator(0, "images")
    everything = Knowledge(
        trigger=Box(), data=Data(torch.rand((8, *shape), generator=drawn) * 2 - 1),
        encoder=lambda images: images.flatten(1)[:, ::7],
    )  # fmt: skip
    with declared(defense, everything) as known:
        done = defense.defend(model, known, generator(0, "x"))
        scores = None if done.screen is None else done.screen(tiny.inputs(model, 3))
    if done.model is not None:
        assert done.model.shape == shape
        answer = done.model.eps(torch.randn((2, *shape), generator=drawn), torch.tensor([3, 50]))
        assert answer.shape == (2, *shape) and answer.isfinite().all()
    if done.trigger is not None:
        assert done.trigger.shape == shape
    if scores is not None:
        assert scores.shape == (3,) and scores.isfinite().all()
    assert done.model is not None or done.suspicion is not None or scores is not None


@pytest.mark.parametrize("shape", SHAPES, ids=["3x16x32", "1x24x16"])
def test_a_scan_shows_images_that_are_not_square(shape: tuple[int, int, int]) -> None:
    model = oblong(shape)
    inputs = verdict.inputs_of(model, 2, None)
    assert verdict.pictures(model, inputs).shape == (2, *shape)
    assert verdict.pictures(model, inputs, torch.zeros(shape)).shape == (2, *shape)
