"""Takes the given trigger out of prompts before sampling: the control for defenses that are given a text trigger.

A control of our own for SKD-CAG (arXiv:2508.18235) and SAU (arXiv:2504.18563). Whoever knows the trigger can remove it
from every prompt, changes no weight, and gets the images of the prompt without it. A defense that is given the trigger
has to offer more than this, such as robustness to variants of the trigger.

The defense needs the trigger. It needs clean prompts to check that the trigger can be removed from a prompt again. It
returns a sampler that wraps the sampler of the cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from harness import AroundAnother, Defended, Inputs, Knowledge, Removal, hookimpl, prompt_edits


@dataclass(frozen=True)
class DropTrigger:
    name: ClassVar[str] = "drop-trigger"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("trigger", "prompts")
    requires_trigger: ClassVar[tuple[str, ...]] = ("text",)
    delivers: ClassVar[tuple[str, ...]] = ("sampler",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        removal = prompt_edits.removal_of(trigger, knowledge.prompts or ())
        return Defended(sampler=WithoutTrigger(removal.text, removal.instead))


@dataclass(frozen=True)
class WithoutTrigger(AroundAnother):
    """The cell's sampler (ddim if it is used alone) on prompts without the trigger; see the defense drop-trigger."""

    name: ClassVar[str] = "drop-trigger"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    text: str = "\u200b"  # the trigger to search for in prompts
    instead: str = ""  # the text that the trigger replaced; "" = none, the trigger is a separate word

    def around(self, inner: Any) -> Around:
        return Around(Removal(self.text, self.instead), inner)


@dataclass(frozen=True)
class Around:
    """The inner sampler on the inputs without the trigger."""

    removal: Removal
    inner: Any

    @property
    def nfe(self) -> int:
        return self.inner.nfe

    def run(self, model: Any, inputs: Inputs) -> Tensor:
        assert inputs.prompts is not None, "drop-trigger is for models that take prompts"
        return self.inner.run(model, inputs.with_prompts([self.removal.apply(prompt) for prompt in inputs.prompts]))


@hookimpl
def defenses() -> list[type]:
    return [DropTrigger]


@hookimpl
def samplers() -> list[type]:
    return [WithoutTrigger]
