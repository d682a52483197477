"""Implants a backdoor into a clean model."""

from __future__ import annotations

from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.diffusion.training import prepared
from harness.stages.inputs import avoiding
from harness.types import Attack, Backdoor, Model, TextTrigger


def attack(plugin: Model, method: Attack, backdoor: Backdoor, seed: int, device: str) -> DiffusionModel:
    """The model after the attack, on the CPU.

    Raises ValueError, before training, for a trigger that the tokenizer drops and for a caption that is too long with
    the trigger.
    """
    model = prepared(plugin, plugin.load().to(device))
    trigger = backdoor.trigger
    data = avoiding(plugin, trigger).data()
    if data.captions is not None and isinstance(trigger, TextTrigger):
        model.check_trigger(trigger, data.captions[:100])
        model.tokens([trigger.apply(caption) for caption in data.captions])
    return method.implant(model, backdoor, data, generator(seed, "attack")).model.to("cpu")
