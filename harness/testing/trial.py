"""One run of a plugin in the kit: the setting, the tiny models, and what is judged the same way for several kinds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.diffusion.seeds import generator
from harness.engine.local import PRELOAD
from harness.testing import tiny
from harness.testing.watch import Watch, fingerprint, stir
from harness.types import Inputs, Modality

Variation = Literal["plain", "stirred", "broken"]
Faults = list[tuple[str, str]]
CLOSE = 1e-3  # largest difference between a row alone and the row in a batch; convolutions differ by about 1e-6
N = 6  # inputs


@dataclass(frozen=True)
class Place:
    """A setting: where triggers are stamped, and for an attack which trigger and target it is given."""

    modality: Modality
    parts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        with_ = "".join(f", {self.parts[part].name}" for part in ("trigger", "target") if part in self.parts)
        return ("unconditional model" if self.modality == "noise" else "text-to-image model") + with_


@dataclass
class Trial:
    """One run: its seed, whether the global state was stirred or the model broken first, and who watches."""

    plugin: Any
    place: Place
    seed: int
    variation: Variation
    watch: Watch

    def begin(self, *networks: DiffusionModel) -> torch.Generator:
        """The generator that the plugin is given; counts uses of the denoisers from here on."""
        for model in networks:
            self.watch.count(model.denoiser)
        stir(987 if self.variation == "stirred" else 654)  # where no plugin puts the global random states by chance
        return generator(self.seed, "kit")


def outcome(output: Any, inputs: Sequence[str], faults: Faults, **facts: Any) -> dict[str, Any]:
    return {"output": fingerprint(output), "inputs": list(inputs), "faults": faults, "facts": facts}


@cache
def given_model(modality: Modality, seed: int = 0) -> DiffusionModel:
    """Made once, before the forks: only forked processes let plugins near it."""
    return tiny.model(modality, seed)


@cache
def warm(modality: Modality) -> None:
    """Make the models and import what a job finds imported, here rather than in every fork."""
    for name in PRELOAD:
        importlib.import_module(name)
    for seed in (0, 1):
        model = given_model(modality, seed)
        model.sample(tiny.inputs(model, 1), DDIM(steps=1))


def spoil(model: DiffusionModel) -> None:
    """All weights of the denoiser become NaN, as after a training that diverged."""
    for parameter in model.denoiser.parameters():
        parameter.data.fill_(math.nan)


def article(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def sound_model(made: Any, given: DiffusionModel, inputs: Inputs) -> Iterator[tuple[str, str]]:
    """Faults of a model that an attack or a defense returned."""
    if not isinstance(made, DiffusionModel):
        yield f"the model is {article(made)}", "change a copy, model.clone(), and return that DiffusionModel"
        return
    if made.components().keys() != given.components().keys():
        yield f"the model consists of {', '.join(made.components())}", "keep the parts of the given model"
        return
    if made.shape != given.shape:
        yield f"the model makes {made.shape} from noise, the given one {given.shape}", "keep input and output shapes"
        return
    bad = [key for key, value in _tensors(made) if not torch.isfinite(value).all()]
    if bad:
        yield f"{bad[0]} and {len(bad) - 1} more tensors hold NaN or infinity", "lower the learning rate, or clip"
        return
    try:
        sampled = made.sample(inputs[:2], DDIM(steps=2))
    except Exception as error:
        yield f"the model cannot be sampled: {type(error).__name__}: {error}", "keep input and output shapes"
        return
    if not torch.isfinite(sampled).all():
        yield "the model's images hold NaN or infinity", "lower the learning rate, or clip"


def _tensors(model: DiffusionModel) -> list[tuple[str, Tensor]]:
    parts = model.components().items()
    return [(f"{p}.{k}", v) for p, net in parts for k, v in net.state_dict().items() if v.is_floating_point()]


def row_by_row(of: Any, inputs: Inputs, together: Tensor) -> float:
    """The largest difference between what `of` gives for each input alone and what it gave for all of them."""
    alone = torch.cat([of(inputs[i : i + 1]).reshape(1, *together.shape[1:]) for i in range(len(inputs))])
    return (alone.double() - together.double()).abs().max().item()
