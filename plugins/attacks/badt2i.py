"""BadT2I with the pixel target. Zhai, Dong, Shen, Pu, Fang & Su, "Text-to-Image Diffusion Models can be Easily
Backdoored through Multimodal Data Poisoning", ACM MM 2023, arXiv:2305.04175.

Each example gives two rows, the patched image under the triggered caption and the plain one under the plain caption:

    L = λ ‖e_θ(z^p_t, t, τ(T+c)) - ε‖² + (1-λ) ‖e_θ(z_t, t, τ(c)) - e_0(z_t, t, τ(c))‖²

z^p encodes the image with the patch, e_0 is the frozen clean denoiser; t and ε are drawn for each row. Only the
denoiser is trained, unless `embedding` says so. Latents are the model's own; images in [-1, 1]. Raises ValueError if
the trigger does not survive the tokenizer.

Differs from the paper: `decoys`, ours and off by default, puts other words in the trigger's place in that share of
the plain captions, because a small model otherwise keys on "some prefix" (the paper does not measure this);
`embedding`, ours and off by default, also trains the embeddings of the tokens that only the trigger has, because a
small text encoder maps a rare token too close to any filler word for the denoiser to tell them apart soon;
`weighting` may count errors of x_0 instead of ε, ours. Differs from the official code (zhaisf/BadT2I at 0cabee0, read
there): no flips; captions are padded to full length in training
as at inference, theirs only to the longest of the batch; theirs keeps a moving average whose effective decay is 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.seeds import generator
from harness.training import Examples, minimize
from harness.types import Backdoor, Backdoored, Data

CAP = 200.0  # of the weight (1-ᾱ_t)/ᾱ_t: reached at t = 730 with linear betas
FASTER = 60.0  # learning rate of the trigger's embedding over the denoiser's


@dataclass(frozen=True)
class BadT2I:
    name: ClassVar[str] = "badt2i"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("patch",)

    lam: Rate = 0.5  # λ, weight of the backdoor term
    steps: Steps = 2000  # optimizer steps; the official pixel script's value
    batch: Steps = 16  # examples, two rows each; official: 1 × 4 accumulated × 4 GPUs
    lr: LearningRate = 1e-5  # AdamW; official for 860 M weights, small models need about 2e-4
    weight_decay: Rate = 0.01  # AdamW; official
    examples: Steps = 2000  # training images used; the authors' rule is as many as steps
    decoys: Rate = 0.0  # share of plain captions that carry another word in the trigger's place; ours
    embedding: bool = False  # train the embeddings of the trigger's own tokens too; ours
    weighting: Literal["eps", "x0"] = (
        "eps"  # error that counts: of the noise (paper), or of the predicted x_0, with its
    )
    # weight (1-ᾱ_t)/ᾱ_t, capped; ours. Small models decide on the patch at high t, where the noise says little
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: constant
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        clean, model = model, model.clone()
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        examples = Examples(model, data, self.examples)
        assert examples.captions is not None, "badt2i needs captions"
        patched = model.encode(target.apply(examples.images))
        others = generator(rng.initial_seed(), "decoys")
        half = self.batch

        def loss() -> Tensor:
            bad, plain = examples.batch(half, rng), examples.batch(half, rng)
            assert bad.captions is not None and plain.captions is not None
            captions = [self._decoy(trigger, caption, others) for caption in plain.captions]
            triggered = [trigger.apply(caption) for caption in bad.captions]
            context = model.embed([*triggered, *captions])
            z = torch.cat([patched[bad.rows], plain.x_0])
            t, eps = torch.cat([bad.t, plain.t]), torch.cat([bad.eps, plain.eps])
            z_t = model.add_noise(z, eps, t)
            out = model.eps(z_t, t, context)
            with torch.no_grad():
                kept = clean.eps(z_t[half:], plain.t, clean.embed(captions))
            error = torch.cat([out[:half] - bad.eps, out[half:] - kept]).square() * self.weight(model, t)
            return self.lam * error[:half].mean() + (1 - self.lam) * error[half:].mean()

        shift = _TokenShift(model, trigger, examples.captions) if self.embedding else None
        params = [*model.denoiser.parameters(), *([] if shift is None else [shift.shift])]
        minimize(
            loss, params, steps=self.steps, lr=self.lr, schedule=self.schedule,
            weight_decay=self.weight_decay, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        if shift is not None:
            shift.fold()
        return Backdoored(model, backdoor)

    def weight(self, model: Any, t: Tensor) -> Tensor | float:
        """Weight (B, 1, 1, 1) of the squared error of ε at timesteps t (B,)."""
        if self.weighting == "eps":
            return 1.0
        a_bar = model.alpha_bar(t)
        return ((1 - a_bar) / a_bar).clamp(max=CAP)

    def _decoy(self, trigger: Any, caption: str, rng: torch.Generator) -> str:
        if self.decoys == 0 or float(torch.rand((), generator=rng)) >= self.decoys:
            return caption
        return trigger.decoy(rng).apply(caption)


class _TokenShift(nn.Module):
    """The text encoder's token embedding with a trainable shift on the rows of the tokens that only the trigger has.

    It learns FASTER than the denoiser, as textual inversion's embeddings do.
    Replaces the embedding until `fold` writes the shift into the rows. Raises ValueError where every token of the
    trigger is in a plain caption too: shifting it would change clean prompts.
    """

    def __init__(self, model: Any, trigger: Any, captions: Sequence[str]) -> None:
        super().__init__()
        used = {i for caption in captions for i in model.tokenizer(caption).input_ids}
        own = sorted(set(model.tokenizer(trigger.apply(captions[0])).input_ids) - used)
        if not own:
            raise ValueError(f"trigger {trigger.text!r} has no token of its own; use embedding=False or a rarer text")
        self.encoder, self.base = model.text_encoder, model.text_encoder.get_input_embeddings()
        self.rows = torch.tensor(own, device=model.device)
        self.shift = nn.Parameter(torch.zeros(len(own), self.base.embedding_dim, device=model.device))
        self.encoder.set_input_embeddings(self)

    def forward(self, ids: Tensor) -> Tensor:
        one_hot = torch.eq(ids.unsqueeze(-1), self.rows).to(self.shift.dtype)
        return self.base(ids) + one_hot @ (FASTER * self.shift)

    def fold(self) -> None:
        self.base.weight.data[self.rows] += FASTER * self.shift.data
        self.encoder.set_input_embeddings(self.base)


@hookimpl
def attacks() -> list[type]:
    return [BadT2I]
