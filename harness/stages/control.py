"""Chooses the control trigger that a defender is given: the k-th candidate that does not activate the backdoor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from harness.capabilities import place_of
from harness.diffusion.events import progress
from harness.diffusion.model import DiffusionModel
from harness.judges.evidence import counted, reachable
from harness.methods import decoys
from harness.stages.sample import sample
from harness.types import INERT, Backdoor, Inputs, Model, Sampler, TargetContext


@dataclass(frozen=True)
class Tried:
    """A candidate on the attacked model: hits out of n images, and the cosine of its pattern with the trigger's."""

    name: str
    hits: int
    n: int  # 0 where the target applies to none
    cosine: float | None

    @property
    def rate(self) -> float:
        """NaN if the target applies to no image: nothing was measured, so the candidate is not inert."""
        return self.hits / self.n if self.n else math.nan


@dataclass(frozen=True)
class Choice:
    """The control trigger that defenses are given. chosen: its place in the ladder. inert: whether it activates the
    backdoor on at most 5 % of the images. The k-th decoy is the k-th inert candidate. If there are fewer than k, it is
    the one of the other candidates with the fewest hits."""

    given: str
    chosen: int
    inert: bool
    tried: tuple[Tried, ...]


def choose(
    plugin: Model, model: DiffusionModel, backdoor: Backdoor, sampler: Sampler, given: str, seed: int, inputs: Inputs,
    clean: Tensor,
) -> Choice:  # fmt: skip
    """Tries the candidates of the ladder in order on the attacked model.

    inputs: n clean inputs; each candidate is stamped on them. clean: the clean model's images (n, C, H, W) of them, by
    which the target is judged.
    """
    judged = reachable(backdoor, inputs.prompts)
    context = TargetContext(clean, inputs.prompts, plugin.judge())
    counting = counted(judged.target, inputs.prompts, len(inputs))
    candidates = decoys.ladder(backdoor.trigger, given, seed)
    tried: list[Tried] = []
    for name, candidate in candidates:
        nothing = isinstance(candidate, decoys.NoText)  # no prompt changes, which `sample` would refuse
        images = sample(model, inputs, sampler, [None if nothing else candidate])
        hits = judged.target.hits(images, context)[counting]
        cosine = decoys.cosine(backdoor.trigger, candidate, model.shape)
        tried.append(Tried(name, int(hits.sum()), len(hits), cosine))
        progress("control", len(tried), len(candidates))
        if sum(each.rate <= INERT for each in tried) == place_of(given):
            return Choice(given, len(tried) - 1, True, tuple(tried))
    active = [i for i, each in enumerate(tried) if not each.rate <= INERT]
    best = min(active, key=lambda i: (math.isnan(tried[i].rate), tried[i].rate))
    return Choice(given, best, False, tuple(tried))
