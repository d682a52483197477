"""What a defender is given; one function draws it for a run, a scan and a purification."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.capabilities import PartlyKnownTrigger, encoders_of, offers
from harness.diffusion.seeds import generator
from harness.judges import public_encoders
from harness.types import KNOWLEDGE, PUBLIC_ENCODERS, Data, Defense, Judge, Knowledge, Model, Trigger

SHARE = 0.1  # of the training data that a defender has: a tenth, as in Elijah
LEAST = 16  # images of a defender's share, where a tenth would be fewer
PROMPTS = 100  # clean prompts of a defender (as in "Sealing the Backdoor")


class UndeclaredKnowledge(ValueError):
    """A defense failed on a field of its knowledge that its `needs` does not name, and that is therefore None."""


class Declared(Knowledge):
    """The knowledge of one defense. It notes which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in KNOWLEDGE:
            self.__dict__.setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"knowledge has no '{name}'; a defense can declare: {', '.join(KNOWLEDGE)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Knowledge):
            return NotImplemented
        return all(vars(self).get(name) == vars(other).get(name) for name in KNOWLEDGE)

    __hash__ = Knowledge.__hash__


def fields_read(knowledge: Declared) -> list[str]:
    """The names of the fields that were read so far."""
    return [name for name in KNOWLEDGE if name in vars(knowledge).get("_read", ())]


@contextmanager
def declared(defense: Defense, knowledge: Knowledge) -> Iterator[Declared]:
    """The part of `knowledge` that `defense` declares; all other fields are None.

    Raises UndeclaredKnowledge for an error within the context that comes from one of the others.
    """
    mine = Declared(**{name: getattr(knowledge, name) for name in KNOWLEDGE if name in defense.needs})
    try:
        yield mine
    except Exception as error:
        undeclared = [name for name in fields_read(mine) if name not in defense.needs]
        if not undeclared or not _of_none(error):
            raise
        fields = " and ".join(f"knowledge.{name}" for name in undeclared)
        names = ", ".join(f"'{name}'" for name in undeclared)
        raise UndeclaredKnowledge(
            f"defense '{defense.name}' reads {fields}, which it does not declare; add {names} to its `needs`"
        ) from error


def _of_none(error: Exception) -> bool:
    """Whether an error is about a None, as Python, torch and a plugin's own assertions say it."""
    return isinstance(error, AssertionError) or "None" in str(error)


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
    prompts. Raises LookupError for an encoder or a judge that the plugin does not have, CheckpointError for a public
    encoder whose package is missing.
    """
    given = given or Given()
    return Knowledge(
        trigger=known_part(given.trigger) if "trigger" in needs else None,
        data=(given.data or _data(plugin, seed)) if "data" in needs else None,
        prompts=(given.prompts or _prompts(plugin, seed)) if "prompts" in needs else None,
        clean_model=plugin.load().to(device) if plugin is not None and "clean_model" in needs else None,
        words=plugin.words() if plugin is not None and "words" in needs else None,
        encoder=encoder(plugin) if plugin is not None and "encoder" in needs else None,
        public_encoder=public_encoders.load(PUBLIC_ENCODERS[0]) if "public_encoder" in needs else None,
        judge=_judge(plugin) if plugin is not None and "judge" in needs else None,
    )


def known_part(trigger: Trigger | None) -> Trigger | None:
    """The trigger that a defender gets who is given `trigger`: the known part, of one that is known in part."""
    return trigger.known() if offers(trigger, PartlyKnownTrigger) else trigger


def _data(plugin: Model | None, seed: int) -> Data | None:
    if plugin is None:
        return None
    whole = plugin.data()
    share = min(len(whole), max(LEAST, math.ceil(SHARE * len(whole))))
    return whole.rows(torch.randperm(len(whole), generator=generator(seed, "knowledge"))[:share])


def _prompts(plugin: Model | None, seed: int) -> tuple[str, ...] | None:
    return None if plugin is None else plugin.prompts("train", PROMPTS, generator(seed, "knowledge"))


def _judge(plugin: Model) -> Judge:
    judge = plugin.judge()
    if judge is None:
        raise LookupError(f"model '{plugin.name}' has no judge for this defense; use another defense or another model")
    return judge


def encoder(plugin: Model) -> Callable[[Tensor], Tensor]:
    """The image encoder at hand for the images of a model: its CLIP-like scorer, otherwise the public encoder that the
    model names, otherwise its judge.

    The scorer of shapes-sd and the judge of the digits, which no public encoder knows, also score what the defender
    delivers. A defender who should not have them is given `public_encoder`.
    """
    scorer = plugin.scorer()
    if scorer is not None:
        return scorer.image_features
    public = encoders_of(plugin)
    if public:
        return public_encoders.load(public[0]).features
    judge = plugin.judge()
    if judge is None:
        raise LookupError(
            f"model '{plugin.name}' has no scorer, public encoder or judge: no image encoder for this defense"
        )
    return judge.features
