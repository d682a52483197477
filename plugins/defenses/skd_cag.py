"""Self-knowledge distillation that also guides the cross-attention maps of the trigger's tokens.

SKD-CAG. "Sealing the Backdoor: Unlearning Adversarial Text Triggers in Diffusion Models Using Knowledge Distillation",
arXiv:2508.18235; sections and appendices are those of its text of 2024. It adds a loss on the cross-attention maps M to
the prediction loss of SKD (section 3.1). There is one map per token:

    L      = α L_attn + (1-α) ‖ε_s(z, t, τ(T+p)) - ε_te(z, t, τ(p))‖²
    L_attn = [ Σ_{j ∈ trigger} ‖M_s[j] - G‖² + Σ_{i ∈ p} ‖M_te[i] - M_s[i']‖² ] / (number of tokens of T+p)

The text says that L_attn is the mean squared error between maps. The two sums, the division and the min-max scaling of
each map are those of the official code. With the scaling the largest value of a map is always 1: the loss then does not
depend on how much attention the trigger's tokens get, which `black` is meant to minimise. With `normalise='none'` it
does. ‖·‖² is the mean over the map. i' is the position of token i of p in T+p. G is the map that the trigger's tokens
should have: gaussian (N(1/2, 1/6²) clipped to [0, 1], drawn again at each step; the numbers are ours), uniform (the
released "Gaussian"), black (zeros), or random_words (the teacher's maps of random words in the trigger's place; the
teacher's prediction then uses these words too).

The defense needs the trigger and clean prompts, and returns a purified model. The random words are adjectives that the
model's tokenizer keeps whole, because each of them takes the place of one token.
Only the denoiser is trained. Maps are the mean over heads, resized to side×side by bilinear interpolation, and summed
over layers. BOS and what follows the first EOS are left out. The notes contain both losses and the norm of the gradient
of each (before α), because their scales differ widely: `..._grad` over all weights of the denoiser, `..._grad_qk` over
to_q and to_k of the cross-attention.

Differs from the official code (Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there): the official code detaches
its maps, so its attention loss has no gradient and all targets give the same result. It also reads the student's maps
as those of the teacher. Here teacher and student store their maps separately, and the loss trains the attention.
`attention_gradient=False` reproduces the released behaviour: the term is computed, and its only effect is to scale the
other term by 1-α. The gradient is clipped at norm 1; the official code does not clip, and trains with a moving average
of the weights. More differences: docs/methods/skd-cag.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from harness import Defended, GuidedDistillation, Knowledge, Neutral, RewordableTrigger, Stamp, hookimpl, offers

ADJECTIVES = (  # the official code draws from 108 adjectives; these are our own choice
    "able", "active", "alive", "amazing", "ancient", "angry", "awake", "aware", "awesome", "beautiful", "bitter",
    "bold", "brave", "brief", "broad", "busy", "calm", "careful", "cheap", "clean", "clear", "clever", "close",
    "cold", "common", "cool", "crazy", "curious", "daily", "dear", "deep", "direct", "dirty", "double", "dry",
    "early", "easy", "excited", "fair", "famous", "fast", "final", "fine", "firm", "flat", "free", "fresh",
    "friendly", "full", "funny", "gentle", "glad", "global", "good", "grand", "great", "happy", "hard", "heavy",
    "honest", "hot", "huge", "human", "hungry", "incredible", "kind", "late", "lazy", "legal", "local", "lonely",
    "loose", "loud", "lovely", "lucky", "mad", "magic", "modern", "narrow", "nice", "normal", "odd", "perfect",
    "plain", "polite", "poor", "popular", "private", "proud", "public", "quick", "quiet", "rare", "ready", "real",
    "rich", "royal", "sad", "safe", "serious", "sharp", "silent", "simple", "smart", "smooth", "soft", "special",
    "strange", "strong", "sweet", "tired", "true", "warm", "wild", "wise",
)  # fmt: skip


@dataclass(frozen=True)
class SKDCAG(GuidedDistillation):
    name: ClassVar[str] = "skd-cag"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    needs: ClassVar[tuple[str, ...]] = ("trigger", "prompts")

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("with_text",) if self.target == "random_words" else ()

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        words = neutral(trigger, adjectives(model.tokenizer)) if self.target == "random_words" else None
        student, notes = self.distilled(model, knowledge.prompts or (), trigger.apply, words, rng)
        return Defended(model=student, notes=notes)


def adjectives(tokenizer: Any) -> list[str]:
    """Those of ADJECTIVES that are one token. Raises ValueError if there is none."""
    found = [word for word in ADJECTIVES if len(tokenizer(word).input_ids) == 3]  # between the start and the end token
    if not found:
        raise ValueError("the tokenizer keeps no adjective whole; use target='black' or 'gaussian'")
    return found


def neutral(trigger: Any, words: Sequence[str]) -> Neutral:
    """Draws rules that put as many of `words` as the trigger has in the place of the trigger.

    Raises ValueError for a trigger that is not inserted as separate words.
    """
    if not offers(trigger, RewordableTrigger):
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
