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
from harness.methods.decoy_choice import led
from harness.stages.sample import sample
from harness.types import INERT, Backdoor, Inputs, Model, Sampler, TargetContext

TRIED = 32  # images of a candidate between two looks at whether it can still be inert


@dataclass(frozen=True)
class Tried:
    """A candidate on the attacked model: hits out of n images, and the cosine of its pattern with the trigger's. n is
    smaller than the number of inputs where the hits had already shown that the candidate is not inert."""

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
    the one of the other candidates with the smallest rate of hits."""

    given: str
    chosen: int
    inert: bool
    tried: tuple[Tried, ...]


def choose(
    plugin: Model, model: DiffusionModel, backdoor: Backdoor, sampler: Sampler, given: str, seed: int, inputs: Inputs,
    clean: Tensor,
) -> Choice:  # fmt: skip
    """Tries the candidates of the ladder in order on the attacked model, each on as many inputs as decide whether it is
    inert: on all of them if it is.

    inputs: n clean inputs; each candidate is stamped on them. clean: the clean model's images (n, C, H, W) of them, by
    which the target is judged.
    """
    judged, judge = reachable(backdoor, inputs.prompts), plugin.judge()
    counting = counted(judged.target, inputs.prompts, len(inputs))
    most = INERT * int(counting.sum())
    candidates = decoys.ladder(backdoor.trigger, given, seed)
    tried: list[Tried] = []
    place = -1
    for name, candidate in candidates:
        nothing = isinstance(candidate, decoys.NoText)  # no prompt changes, which `sample` would refuse
        hits = n = 0
        for start in range(0, len(inputs), TRIED):
            rows = slice(start, start + TRIED)
            part = inputs[rows]
            images = sample(model, part, sampler, [None if nothing else candidate])
            counts = judged.target.hits(images, TargetContext(clean[rows], part.prompts, judge))[counting[rows]]
            hits, n = hits + int(counts.sum()), n + len(counts)
            if hits > most:
                break
        tried.append(Tried(name, hits, n, decoys.cosine(backdoor.trigger, candidate, model.shape)))
        progress("control", len(tried), len(candidates))
        inert, place = led([each.rate for each in tried], place_of(given))
        if inert:
            return Choice(given, place, True, tuple(tried))
    return Choice(given, place, False, tuple(tried))
