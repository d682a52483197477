"""The noise and the prompts on which every model of a kind is evaluated.

They depend on the cell's evaluation seed alone, so all models of the cells with one evaluation seed get the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch

from harness.capabilities import OrdinaryTrigger, offers
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.types import Data, Inputs, Model, Stream, Trigger


class Avoiding:
    """A model plugin whose captions and prompts never carry `trigger`."""

    def __init__(self, plugin: Model, trigger: OrdinaryTrigger) -> None:
        self._plugin, self._trigger = plugin, trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin, name)

    def data(self) -> Data:
        data = self._plugin.data()
        return data if data.captions is None else replace(data, captions=self._without(data.captions))

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...] | None:
        drawn = self._plugin.prompts(split, n, rng)
        return None if drawn is None else self._without(drawn)

    def _without(self, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self._trigger.without(prompt) for prompt in prompts)


def avoiding(plugin: Model, trigger: Trigger | None) -> Model:
    """`plugin`, with captions and prompts that do not carry `trigger` if it is one that ordinary prompts may carry.

    A clean prompt is one without the trigger: what the attack trains as clean, what a defender holds and what the
    evaluation calls clean all come from this plugin.
    """
    return cast(Model, Avoiding(plugin, trigger)) if offers(trigger, OrdinaryTrigger) else plugin


def evaluation_prompts(plugin: Model, n: int, seed: int, stream: Stream = "evaluation") -> tuple[str, ...] | None:
    """n prompts of the model's test split; None for an unconditional model."""
    return plugin.prompts("test", n, generator(seed, stream))


def evaluation_inputs(plugin: Model, model: DiffusionModel, n: int, seed: int, stream: Stream = "evaluation") -> Inputs:
    """The n inputs of every cell with the evaluation seed `seed`; they are the first n of any larger set."""
    seeds = image_seeds(seed, stream, n)
    return Inputs(image_noise(seeds, model.shape), evaluation_prompts(plugin, n, seed, stream), seeds)
