"""Triggers that an attack learns: the pattern is a result of the attack, and does not follow from a spec.

An attack that learns its trigger returns it with the pattern. The attack's job stores the pattern beside the attacked
model, and every later job that needs the trigger reads it from there.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from harness.capabilities import Capability, TriggerDependentTarget, offers
from harness.types import NoiseTrigger

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FILE, TENSOR = "pattern.safetensors", "pattern"
MOST = 2**26  # numbers of a pattern that is read


@runtime_checkable
class LearnedTrigger(NoiseTrigger, Protocol):
    """One whose pattern an attack learns: planning asks for it, to take the pattern from the attack's job, and builds
    the trigger from its spec alone without it."""

    @property
    def other(self) -> int:
        """0 for the pattern that was learned, k for the k-th other trigger that is made of it."""
        ...

    def projected(self, pattern: Tensor) -> Tensor:
        """The nearest pattern (C, H, W) within the bound of the trigger."""
        ...

    def with_pattern(self, pattern: Tensor) -> NoiseTrigger:
        """The trigger with the pattern (C, H, W) that was learned. ValueError for one that is outside its bound."""
        ...


@runtime_checkable
class LearningAttack(Protocol):
    """An attack that learns its trigger: the suite and the kit ask for it, and keep learned triggers from an attack
    without it."""

    learns_trigger: ClassVar[bool]  # True


CAPABILITIES = (
    Capability(LearnedTrigger, ("triggers",), ("with_pattern",)),
    Capability(LearningAttack, ("attacks",), ("learns_trigger",)),
)


def learns(attack: object) -> bool:
    """Whether an attack learns its trigger."""
    return offers(attack, LearningAttack) and bool(attack.learns_trigger)


def unlearnable(attack: Any, trigger: Any, target: Any) -> str | None:
    """Why these three make no backdoor as far as learning is concerned, in words; None if they do."""
    if not offers(trigger, LearnedTrigger):
        if learns(attack):
            return f"{attack.name} learns its trigger, and {trigger.name} is fixed; use the trigger learned"
        return None
    if not learns(attack):
        return (
            f"{trigger.name} is the pattern that an attack learns, and {attack.name} learns none; use a trigger that "
            "is fixed, or an attack that learns one, such as invibackdoor"
        )
    if trigger.other:
        return f"{trigger.name}(other={trigger.other}) is made of the learned pattern for controls; use other=0"
    if offers(target, TriggerDependentTarget):
        return f"{target.name} is made of the trigger, and {trigger.name} has no pattern before the attack"
    return None


def pattern_of(attack: Any, trigger: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The pattern (C, H, W) of the trigger that an attack returned; None of an attack that learns none.

    Raises ValueError, naming the attack, where it has none or not one of `shape`.
    """
    if not learns(attack):
        return None
    try:
        return trigger.delta(shape)
    except ValueError as error:
        raise ValueError(
            f"attack '{attack.name}' learns its trigger and did not return the pattern ({error}); return "
            "Backdoored(model, replace(backdoor, trigger=backdoor.trigger.with_pattern(r)))"
        ) from None


def save(pattern: Tensor, folder: Path) -> None:
    """Write the pattern (C, H, W) into the new folder `folder`."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({TENSOR: pattern.detach().float().cpu().contiguous()}, folder / FILE)


def read(folder: Path, trigger: LearnedTrigger) -> NoiseTrigger:
    """`trigger` with the pattern in `folder`.

    Raises CheckpointError unless the folder holds one file with one float32 tensor (C, H, W) of finite values within
    the bound of the trigger.
    """
    import torch

    from harness.diffusion.model_files import CheckpointError, ModelFiles

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not there, so the attack stored no pattern; run the attack again")
    files = ModelFiles(folder)
    if set(files.sizes) != {FILE}:
        raise CheckpointError(f"{folder}: should hold {FILE} alone; run the attack again")
    held = files.header(FILE).tensors
    dtype, shape = held.get(TENSOR, ("", ()))
    if set(held) != {TENSOR} or dtype != "F32" or len(shape) != 3 or not 0 < prod(shape) <= MOST:
        raise CheckpointError(f"{files.path(FILE)}: is no pattern (C, H, W) in fp32; run the attack again")
    pattern = files.tensors(FILE)[TENSOR]
    if not torch.isfinite(pattern).all():
        raise CheckpointError(f"{files.path(FILE)}: holds NaN or infinity; run the attack again")
    try:
        return trigger.with_pattern(pattern)
    except ValueError as error:
        raise CheckpointError(f"{files.path(FILE)}: {error}; run the attack again") from None
