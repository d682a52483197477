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

from harness import AroundAnother, Defended, Knowledge, OnChangedPrompts, Removal, hookimpl, prompt_edits


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

    def around(self, inner: Any) -> OnChangedPrompts:
        removal = Removal(self.text, self.instead)
        return OnChangedPrompts(
            inner, lambda model, inputs: [removal.apply(p) for p in inputs.prompts or ()], self.name
        )


@hookimpl
def defenses() -> list[type]:
    return [DropTrigger]


@hookimpl
def samplers() -> list[type]:
    return [WithoutTrigger]
