"""The noise and the prompts on which every model of a kind is evaluated.

They depend on the cell's evaluation seed alone, so all models of the cells with one evaluation seed get the same.
"""

from __future__ import annotations

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.types import Inputs, Model, Stream


def evaluation_prompts(plugin: Model, n: int, seed: int, stream: Stream = "evaluation") -> tuple[str, ...] | None:
    """n prompts of the model's test split; None for an unconditional model."""
    return plugin.prompts("test", n, generator(seed, stream))


def evaluation_inputs(plugin: Model, model: DiffusionModel, n: int, seed: int, stream: Stream = "evaluation") -> Inputs:
    """The n inputs of every cell with the evaluation seed `seed`; they are the first n of any larger set."""
    seeds = image_seeds(seed, stream, n)
    return Inputs(image_noise(seeds, model.shape), evaluation_prompts(plugin, n, seed, stream), seeds)
