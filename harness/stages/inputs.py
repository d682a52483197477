"""The noise and the prompts on which every model of a kind is evaluated."""

from __future__ import annotations

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.types import Inputs, Model

EVALUATION = "evaluation"  # name of the random stream


def evaluation_prompts(plugin: Model, n: int) -> tuple[str, ...] | None:
    """n prompts of the model's test split; None for an unconditional model."""
    return plugin.prompts("test", n, generator(0, EVALUATION))


def evaluation_inputs(plugin: Model, model: DiffusionModel, n: int) -> Inputs:
    """The n inputs of every cell; they are the first n of any larger set."""
    seeds = image_seeds(0, EVALUATION, n)
    return Inputs(image_noise(seeds, model.shape), evaluation_prompts(plugin, n), seeds)
