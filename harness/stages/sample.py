"""Samples images from a model for the evaluation inputs, with and without a trigger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.capabilities import AttackersSampler, WrappingSampler, offers
from harness.diffusion.model import DiffusionModel
from harness.methods.prompt_edits import Substitution
from harness.methods.trigger_placement import usable, with_found
from harness.types import Inputs, Sampler, Trigger

PART = 500  # images that are looked at together: what is computed of all at once takes several times their memory


def sample(model: DiffusionModel, inputs: Inputs, sampler: Sampler, triggers: Sequence[Trigger | None]) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of the inputs with each trigger in turn; None leaves the inputs unchanged.

    Raises ArithmeticError if an image is not finite.
    """
    found = [_stamped(model, inputs, sampler, trigger) for trigger in triggers]
    return checked(found[0] if len(found) == 1 else torch.cat(found))


def sample_found(
    model: DiffusionModel, inputs: Inputs, sampler: Sampler, trigger: Tensor | str | Substitution | None
) -> Tensor:
    """The same with a trigger that a defense found; (0, 1, 1, 1) if this model does not accept the trigger."""
    finite = not isinstance(trigger, Tensor) or bool(trigger.isfinite().all())
    if trigger is None or not finite or not usable(model, trigger):
        return torch.zeros(0, 1, 1, 1)
    return checked(model.sample(with_found(inputs, trigger), sampler))


def checked(images: Tensor) -> Tensor:
    """`images` unchanged. Raises ArithmeticError for NaN and infinity."""
    if not all(torch.isfinite(part).all() for part in images.split(PART)):
        raise ArithmeticError("the model's images hold NaN or infinity")
    return images


def _stamped(model: DiffusionModel, inputs: Inputs, sampler: Sampler, trigger: Trigger | None) -> Tensor:
    if trigger is None:
        return model.sample(inputs, sampler)
    if trigger.modality == "text":
        model.check_trigger(trigger, inputs.prompts or ())
    how = sampler.with_trigger(trigger) if offers(sampler, AttackersSampler) else sampler
    return model.sample(stamped(trigger, inputs), how)


def stamped(trigger: Trigger, inputs: Inputs) -> Inputs:
    """The inputs with the trigger. Raises ValueError, naming the trigger, for what is not as many inputs of the same
    shape, all finite."""
    found = trigger.stamp(inputs)
    if not isinstance(found, Inputs) or found.noise.shape != inputs.noise.shape or found.seeds != inputs.seeds:
        raise ValueError(f"trigger '{trigger.name}' stamped {inputs.noise.shape} inputs and returned others")
    if (found.prompts is None) != (inputs.prompts is None) or len(found.prompts or ()) != len(inputs.prompts or ()):
        raise ValueError(
            f"trigger '{trigger.name}' returned {len(found.prompts or ())} prompts for {len(inputs)} inputs"
        )
    if not torch.isfinite(found.noise).all():
        raise ArithmeticError(f"trigger '{trigger.name}' made noise of NaN or infinity")
    return found


def wrapped(sampler: Sampler, own: Sampler | None) -> Sampler:
    """The sampler of a model that a defense protects.

    It is `own`, which the defense returned, wrapped around the cell's `sampler` if `own` wraps samplers. An attacker's
    own reverse process stays: whoever runs it does not run the defender's sampler.
    """
    if own is None or offers(sampler, AttackersSampler):
        return sampler
    return own.around(sampler) if offers(own, WrappingSampler) else own
