"""What a defender is given; one function draws it for a run, a scan and a purification."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diffusion.seeds import generator
from harness.types import Data, Knowledge, Model, Trigger

SHARE, LEAST = 0.1, 512  # clean training data of a defender: a tenth of the data (as in Elijah), at least this many
PROMPTS = 100  # clean prompts of a defender (as in "Sealing the Backdoor")


@dataclass(frozen=True)
class Given:
    """Knowledge that is available and is not drawn: a user's own data and prompts, the trigger."""

    trigger: Trigger | None = None
    data: Data | None = None
    prompts: tuple[str, ...] | None = None


def draw(
    needs: Collection[str],
    plugin: Model | None,
    seed: int,
    given: Given | None = None,
    device: torch.device | str = "cpu",
) -> Knowledge:
    """The knowledge that `needs` names: taken from `given` if available, otherwise drawn from `plugin`, otherwise None.

    A separate generator that depends only on `seed` draws each kind, so the other needs of a defense do not change its
    prompts. Raises LookupError for an encoder that the plugin does not have.
    """
    given = given or Given()
    return Knowledge(
        trigger=given.trigger if "trigger" in needs else None,
        data=(given.data or _data(plugin, seed)) if "data" in needs else None,
        prompts=(given.prompts or _prompts(plugin, seed)) if "prompts" in needs else None,
        clean_model=plugin.load().to(device) if plugin is not None and "clean_model" in needs else None,
        words=plugin.words() if plugin is not None and "words" in needs else None,
        encoder=encoder(plugin) if plugin is not None and "encoder" in needs else None,
    )


def _data(plugin: Model | None, seed: int) -> Data | None:
    if plugin is None:
        return None
    whole = plugin.data()
    share = min(len(whole), max(LEAST, math.ceil(SHARE * len(whole))))
    return whole.rows(torch.randperm(len(whole), generator=generator(seed, "knowledge"))[:share])


def _prompts(plugin: Model | None, seed: int) -> tuple[str, ...] | None:
    return None if plugin is None else plugin.prompts("train", PROMPTS, generator(seed, "knowledge"))


def encoder(plugin: Model) -> Callable[[Tensor], Tensor]:
    """The public image encoder for the images of a model: its CLIP-like scorer, otherwise its judge."""
    scorer = plugin.scorer()
    if scorer is not None:
        return scorer.image_features
    judge = plugin.judge()
    if judge is None:
        raise LookupError(f"model '{plugin.name}' has no scorer and no judge: no image encoder for this defense")
    return judge.features
