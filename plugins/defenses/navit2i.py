"""Detects prompts with a token that changes the denoiser's activations more than its meaning explains.

NaviT2I. Zhai et al., "Efficient Input-level Backdoor Defense on Text-to-Image Synthesis via Neuron Activation
Variation", ICCV 2025, arXiv:2503.06453. The token of a trigger shows this effect already at the first step.

    v_i = Σ_l mean |A_l(prompt) - A_l(prompt, token i padded)| / ‖τ(prompt) - τ(prompt, token i padded)‖₂
    score = max_i v_i / mean of the lowest 75 % of v

A_l are the outputs of every linear and convolutional layer of the denoiser (of convolutional layers the spatial mean)
at t = T-1, without guidance, on the query's own noise. i runs over the tokens that are not stop words.

The defense needs clean prompts, on which the threshold is calibrated. For τ it needs the model before the attack, of
which it uses only the text encoder; with `text_encoder="own"` it uses the text encoder of the suspect model instead. It
returns a screen. It costs one evaluation per token.

The code was read (zhaisf/NaviT2I at f78894d). Of the paper only the abstract and the summary of a third party could be
had. By both, the formulas above are the paper's and the code's. Differs from the paper, by that summary: the threshold
there is μ + 1.2 σ of clean scores, which `deviations=1.2` gives; the default flags the same share of clean prompts as
all other screens here. Differs from the official code:
- It calibrates nothing: a prompt is benign below 1.598, for Stable Diffusion 1.4. `calibrate=False` does that.
- One noise (seed 0) serves all queries; here each query has its own.
- The noise is that of an LMS scheduler of 50 steps: 14.6 times unit noise, scaled to 0.9977 of it before the network,
  at t = 999. Here it is unit noise.
- Stop words are those of NLTK's English list that are one token, and six marks. Here they are a short list of ours.
- A prompt of stop words alone ends in an error there, and here all its tokens are tried. With one token left, the mean
  is over nothing there and the prompt is flagged; here v is compared with itself and the score is 1.
- Layers of one and three dimensions and recurrent ones count too; the UNets here have none.
- In its run on VillanDiffusion, τ is the text encoder with the backdoor, which `text_encoder="own"` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from harness import Defended, Inputs, Knowledge, Share, hookimpl, prompt_screening

Deviations = Annotated[float, Ge(0)]
STOP_WORDS = (
    "a", "an", "the", "of", "at", "on", "in", "is", "are", "and", "or", "with", "to", "for", "by", "it", "its", "this",
    "that", "we", "here", ",", ".",
)  # fmt: skip


@dataclass(frozen=True)
class NaviT2I:
    name: ClassVar[str] = "navit2i"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    text_encoder: Literal["clean", "own"] = "clean"  # text encoder whose embeddings measure the meaning of a token;
    # released: clean
    lowest: Share = 0.75  # share of the smallest v with which the largest v is compared; published value
    calibrate: bool = True  # calibrate the threshold on clean prompts; False = use the published one
    false_positives: Share = 0.05  # share of clean prompts that the calibrated threshold flags, without deviations
    deviations: Deviations | None = None  # m of the threshold μ + m σ over clean scores; None = the share above; paper:
    # 1.2, by a summary
    published: float = 1.598  # prompts with a score below this are benign; for Stable Diffusion 1.4

    @property
    def needs(self) -> tuple[str, ...]:
        return ("prompts", "clean_model") if self.text_encoder == "clean" else ("prompts",)

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        model.need_one_encoder(self.name)
        trusted: Any = knowledge.clean_model if self.text_encoder == "clean" else model

        def screen(inputs: Inputs) -> Tensor:
            assert inputs.prompts is not None, "navit2i is for models that take prompts"
            rows = zip(inputs.noise, inputs.prompts, strict=True)
            return torch.tensor([self.score(variations(model, trusted, z, prompt)) for z, prompt in rows])

        if not self.calibrate:
            return Defended(screen=screen, screen_above=self.published)
        scores = prompt_screening.screened(screen, prompt_screening.benign(model, knowledge.prompts or (), rng))
        return Defended(screen=screen, screen_above=self.above(scores), notes={"clean_scores": scores.tolist()})

    def above(self, scores: Tensor) -> float:
        """The calibrated threshold, from the scores (N,) of clean prompts. σ is that of a fitted normal distribution,
        with N in its denominator."""
        if self.deviations is None:
            return prompt_screening.threshold(scores, self.false_positives)
        return (scores.double().mean() + self.deviations * scores.double().std(correction=0)).item()

    def score(self, v: Tensor) -> float:
        """max v over the mean of the lowest share of v (K,)."""
        kept = max(1, int(self.lowest * len(v)))
        return (v.max() / v.sort().values[:kept].mean().clamp_min(1e-12)).item()


@torch.no_grad()
def variations(model: Any, trusted: Any, z: Tensor, prompt: str) -> Tensor:
    """v (K,) of the K tokens of `prompt` that are not stop words, or of all tokens if there are no others."""
    ids = model.tokens([prompt])
    length = len(model.tokenizer(prompt).input_ids)
    every = range(1, length - 1)
    places = [i for i in every if model.tokenizer.decode([int(ids[0, i])]).strip() not in STOP_WORDS] or list(every)
    masked = ids.repeat(len(places) + 1, 1)
    for row, place in enumerate(places):
        masked[row + 1, place] = model.tokenizer.pad_token_id
    meaning = trusted.text_encoder(masked)[0]
    meant = (meaning[1:] - meaning[:1]).flatten(1).norm(dim=1)
    rows = z.unsqueeze(0).expand(len(masked), -1, -1, -1).to(model.device)
    t = torch.full((len(masked),), model.T - 1, device=model.device)
    with summed_changes(model.denoiser) as total:
        model.denoiser(rows, t, encoder_hidden_states=model.text_encoder(masked)[0])
    return (total[0] / meant.clamp_min(1e-12)).cpu()


@contextmanager
def summed_changes(denoiser: nn.Module) -> Iterator[list[Any]]:
    """Context in which entry 0 of the list sums mean |A(row i) - A(row 0)| over layers.

    Rows i ≥ 1 of a batch are compared with its row 0; the entry is a tensor (rows - 1,).
    """
    total: list[Any] = [0.0]

    def add(layer: nn.Module, given: Any, out: Tensor) -> None:
        out = out.float().mean((2, 3)) if isinstance(layer, nn.Conv2d) else out.float()
        total[0] = total[0] + (out[1:] - out[:1]).abs().flatten(1).mean(1)

    hooks = [m.register_forward_hook(add) for m in denoiser.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


@hookimpl
def defenses() -> list[type]:
    return [NaviT2I]
