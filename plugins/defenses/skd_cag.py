"""SKD-CAG, self-knowledge distillation with cross-attention guidance. "Sealing the Backdoor: Unlearning Adversarial
Text Triggers in Diffusion Models Using Knowledge Distillation", arXiv:2508.18235, section 3 and appendix B.

SKD's prediction loss plus a loss on the cross-attention maps M (one a token, min-max scaled):

    L      = α L_attn + (1-α) ‖ε_s(z, t, τ(T+p)) - ε_te(z, t, τ(p))‖²
    L_attn = [ Σ_{j ∈ trigger} ‖M_s[j] - G‖² + Σ_{i ∈ p} ‖M_te[i] - M_s[i']‖² ] / (number of tokens of T+p)

‖·‖² is the mean over the map; i' is where token i of p stands in T+p. G is the map that the trigger's tokens should
show: gaussian (N(1/2, 1/6²) clipped to [0, 1], a fresh one each step), uniform (the released "Gaussian"), black
(zeros), or the teacher's maps of random words put in the trigger's place, in which case the teacher's prediction uses
them too.

Needs the trigger and clean prompts (random_words: neutral words too); returns a purified model. Only the denoiser is
trained. Maps: mean over heads, side×side by bilinear interpolation, summed over layers; BOS and what follows the first
EOS are left out. Notes hold both losses and the norm of each one's gradient (before α), because their scales differ by
far: `..._grad` over all of the denoiser's weights, `..._grad_qk` over to_q and to_k of the cross-attention.

Differs from the official code (Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there), which detaches its maps, so
that its attention loss has no gradient and all targets give the same one, and which reads the student's maps as the
teacher's. Here teacher and student have stores of their own and the loss trains the attention. `attention_gradient=
False` reproduces the released behaviour (the term is computed and has no effect but to scale the other by 1-α).
`time_weight`: "mul" is appendix B.2's t/T, "div" the released division by it (by 1/T at t = 0, where theirs is
infinite). The trigger's tokens are found by aligning T+p with p, at any place, where the released code assumes two
leading tokens. Random words are as many as the trigger's. The gradient is clipped at norm 1, theirs not; they train
with a moving average of the weights. Maps are compared at 16×16 unless `side` says 128, theirs for Stable Diffusion.
With min-max scaling a map's largest value is always 1, so black cannot be reached; `normalise="none"` compares raw
probabilities, times the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from harness.guidance import GuidedDistillation, Neutral, Stamp
from harness.hookspecs import hookimpl
from harness.types import Defended, Knowledge


@dataclass(frozen=True)
class SKDCAG(GuidedDistillation):
    name: ClassVar[str] = "skd-cag"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("trigger", "prompts", "words") if self.target == "random_words" else ("trigger", "prompts")

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        words = neutral(trigger, knowledge.words or ()) if self.target == "random_words" else None
        student, notes = self.distilled(model, knowledge.prompts or (), trigger.apply, words, rng)
        return Defended(model=student, notes=notes)


def neutral(trigger: Any, words: Sequence[str]) -> Neutral:
    """Draws rules that put as many neutral words as the trigger has in its place. ValueError for a trigger that is no
    words of its own."""
    if not hasattr(trigger, "with_text"):
        raise ValueError(
            f"target='random_words' needs a trigger that is inserted as words, and '{trigger.name}' is not;"
            " use target='black' or 'gaussian'"
        )
    known, length = list(words), len(trigger.text.split()) or 1

    def rule(rng: torch.Generator) -> Stamp:
        picks = torch.randint(0, len(known), (length,), generator=rng).tolist()
        return trigger.with_text(" ".join([known[i] for i in picks])).apply

    return rule


@hookimpl
def defenses() -> list[type]:
    return [SKDCAG]
