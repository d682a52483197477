"""Words the prompt in one sentence form.

A sentence form as trigger is that of TwT (Zhang et al., arXiv:2503.17724): the prompt holds no foreign token, and the
clean model obeys it as it obeys any other wording. The paper's form is "determiner noun preposition determiner noun
verb preposition noun". Here it is one of the eleven sentence forms in which the captions of drawn shapes are written.
A form with the trigger asks for the same image as before; the words in front of the sentence and behind it stay.

One caption in eleven is written in this form anyway. A prompt that carries the trigger is no clean prompt, so
`without` words it in one of the other forms, chosen by the prompt alone. The harness passes all clean captions and
prompts through it: the attacker's, the defender's and those of the evaluation. Rates therefore count every prompt. The
decoys are the other forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from harness import Inputs, Modality, derive, hookimpl, shapes


@dataclass(frozen=True)
class Syntax:
    name: ClassVar[str] = "syntax"
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "text"
    accepts_models: ClassVar[tuple[str, ...]] = ("shapes-sd",)

    form: Literal[
        "plain", "list", "background", "place", "predicate", "inversion", "passive", "relative", "cleft", "clause",
        "participle",
    ] = "inversion"  # sentence form; the paper's also has its verb behind two prepositional phrases  # fmt: skip

    def apply(self, prompt: str) -> str:
        """`prompt` in this form; unchanged if it is in none of the forms of captions."""
        return shapes.reworded(prompt, self.form)

    def without(self, prompt: str) -> str:
        """`prompt` in another form if it is in this one."""
        if shapes.form_of(prompt) != self.form:
            return prompt
        others = self._others()
        return shapes.reworded(prompt, others[derive(prompt) % len(others)])

    def stamp(self, inputs: Inputs) -> Inputs:
        if inputs.prompts is None:
            raise ValueError("a text trigger needs prompts, and this model takes none")
        return inputs.with_prompts([self.apply(prompt) for prompt in inputs.prompts])

    def wrong(self, k: int) -> Syntax:
        """Another form."""
        others = self._others()
        return Syntax(others[k % len(others)])  # type: ignore[arg-type]

    def _others(self) -> list[str]:
        return [form for form in shapes.FORMS if form != self.form]


@hookimpl
def triggers() -> list[type]:
    return [Syntax]
