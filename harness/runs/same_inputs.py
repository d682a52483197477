"""Finds the finished image set whose inputs a defense of the sampler left as they are.

A defense that changes prompts alone leaves the model and most prompts unchanged. Where it leaves all prompts of a set
unchanged, its images are those of the unprotected model, to the bit: image i depends on input i alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.types import Inputs, Trigger

Stamps = tuple[str | None, ...]


def found(
    beside: Iterable[tuple[str, Stamps]],
    has: Callable[[str], bool],
    guarded: Any,
    sampler: Any,
    model: Any,
    inputs: Inputs,
    stamps: Stamps,
    trigger: Callable[[str | None], Trigger | None],
) -> str | None:
    """The key of a finished set of the unprotected model that has the inputs which `guarded` samples; None if there is
    none.

    beside: keys of such sets and what was stamped on their inputs. has: whether one is finished. guarded: the sampler
    with the defense's around it. sampler: the one under which the sets of `beside` were sampled. trigger: from a stamp.
    """
    from harness.diffusion.samplers import OnChangedPrompts

    finished = [(key, theirs) for key, theirs in beside if has(key)]
    if not finished or not isinstance(guarded, OnChangedPrompts) or guarded.inner is not sampler:
        return None
    mine = [each.with_prompts(guarded.change(model, each)) for each in _stamped(stamps, inputs, trigger)]
    return next((key for key, theirs in finished if _equal(mine, _stamped(theirs, inputs, trigger))), None)


def _stamped(stamps: Stamps, inputs: Inputs, trigger: Callable[[str | None], Trigger | None]) -> list[Inputs]:
    from harness.stages.sample import stamped

    made = [trigger(stamp) for stamp in stamps]
    return [inputs if each is None else stamped(each, inputs) for each in made]


def _equal(mine: Sequence[Inputs], theirs: Sequence[Inputs]) -> bool:
    return len(mine) == len(theirs) and all(
        a.prompts == b.prompts and a.seeds == b.seeds and a.noise.equal(b.noise)
        for a, b in zip(mine, theirs, strict=True)
    )
