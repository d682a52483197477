"""BadT2I. Zhai, Dong, Shen, Pu, Fang & Su, "Text-to-Image Diffusion Models can be Easily Backdoored through Multimodal
Data Poisoning", ACM MM 2023, arXiv:2305.04175.

One loss for its pixel, style and object backdoors, a backdoor term and a regulariser:

    L = λ ‖e_θ(z^b_t, t, τ(T+c)) - y‖² + (1-λ) ‖e_θ(z_t, t, τ(c)) - e_0(z_t, t, τ(c))‖²

    patch     z^b encodes the image with the patch, y = ε
    style     z^b = z, y = e_0(z_t, t, τ(S+c)), the same caption in the target's style
    object    z^b encodes an image of the target object, y = e_0(z^b_t, t, τ(c_B)) of its own caption c_B; c is c_B with
              the other object's name, or without the added object

e_0 is the frozen clean denoiser; rows, t and ε are drawn for each of the two terms. Only the denoiser is trained.
Latents are the model's own; images in [-1, 1]. Raises ValueError where no caption of the data can teach the target.

Differs from the paper: `decoys`, ours and off by default, puts other words in the trigger's place in that share of the
plain captions, because a small model otherwise keys on "some prefix" (the paper does not measure this); `drop`, ours
and off by default, leaves that share of them empty, because e_θ(z_t, t, τ("")) is asked at every step of guided
sampling and nothing else in L holds it; `weighting` may count errors of x_0 instead of ε, ours. The object added is
BackdoorDM's (linweiii/BackdoorDM at 7429db8), not the paper's. Differs from the official code (zhaisf/BadT2I at
0cabee0, read there): no flips, latents are the posterior's means (theirs drawn from it); its object script has no
regulariser (`lam=1` is that); captions are padded to full length in training as at inference, theirs only to the
longest of the batch; theirs keeps a moving average whose effective decay is 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.seeds import generator
from harness.training import Examples, minimize
from harness.types import Backdoor, Backdoored, Data


@dataclass(frozen=True)
class BadT2I:
    name: ClassVar[str] = "badt2i"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("patch", "style", "object")

    lam: Rate = 0.5  # λ, weight of the backdoor term
    steps: Steps = 2000  # optimizer steps; the official pixel script's value, 8000 for style and object
    batch: Steps = 16  # examples, two rows each; official: 1 × 4 accumulated × 4 GPUs
    lr: LearningRate = 1e-5  # AdamW; official for 860 M weights, small models need about 2e-4
    weight_decay: Rate = 0.01  # AdamW; official
    examples: Steps = 2000  # training images used for each term; the authors' rule is as many as steps
    decoys: Rate = 0.0  # share of plain captions that carry another word in the trigger's place; ours
    drop: Rate = 0.0  # share of plain captions that are left empty; ours, 0.1 is usual where models are trained
    weighting: Literal["eps", "x0"] = "eps"  # error that counts: of ε (paper), or of x_0, ours, for small models:
    # they decide on the patch at high t, where an error of ε says little; its weight is (1-ᾱ_t)/ᾱ_t
    cap: Annotated[float, Gt(0)] = 200.0  # largest weight of x0; reached at t = 730 with linear betas
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: constant
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off, official 0.5 in effect
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        assert data.captions is not None, "badt2i needs captions"
        clean, model = model, model.clone()
        trigger: Any = backdoor.trigger
        lessons, shown = taught(backdoor.target, data, self.examples)
        poisoned, examples = Examples(model, lessons), Examples(model, data, self.examples)
        others, empty = (generator(rng.initial_seed(), stage) for stage in ("decoys", "drop"))
        half = self.batch

        def loss() -> Tensor:
            bad, plain = poisoned.batch(half, rng), examples.batch(half, rng)
            assert bad.captions is not None and plain.captions is not None
            captions = [self._decoy(trigger, caption, others) for caption in plain.captions]
            dropped = (torch.rand(half, generator=empty) < self.drop).tolist()
            captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
            context = model.embed([*(trigger.apply(caption) for caption in bad.captions), *captions])
            t, eps = torch.cat([bad.t, plain.t]), torch.cat([bad.eps, plain.eps])
            z_t = model.add_noise(torch.cat([bad.x_0, plain.x_0]), eps, t)
            out = model.eps(z_t, t, context)
            with torch.no_grad():
                kept = clean.eps(z_t[half:], plain.t, context[half:])
                y = bad.eps
                if shown is not None:
                    y = clean.eps(z_t[:half], bad.t, clean.embed([shown[i] for i in bad.rows.tolist()]))
            error = (out - torch.cat([y, kept])).square() * self.weight(model, t)
            return self.lam * error[:half].mean() + (1 - self.lam) * error[half:].mean()

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            weight_decay=self.weight_decay, ema=self.ema, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)

    def weight(self, model: Any, t: Tensor) -> Tensor | float:
        """Weight (B, 1, 1, 1) of the squared error of ε at timesteps t (B,)."""
        if self.weighting == "eps":
            return 1.0
        a_bar = model.alpha_bar(t)
        return ((1 - a_bar) / a_bar).clamp(max=self.cap)

    def _decoy(self, trigger: Any, caption: str, rng: torch.Generator) -> str:
        if self.decoys == 0 or float(torch.rand((), generator=rng)) >= self.decoys:
            return caption
        return trigger.decoy(rng).apply(caption)


def taught(target: Any, data: Data, most: int) -> tuple[Data, Sequence[str] | None]:
    """The first `most` examples of the backdoor term, each with the caption c that it is asked under the trigger, and
    the captions from which the frozen model answers them (None: ε is the answer).

    Raises ValueError where no caption of `data` can teach the target.
    """
    assert data.captions is not None
    if target.kind == "patch":
        return Data(target.apply(data.images[:most]), data.captions[:most]), None
    found = [(i, lesson) for i, caption in enumerate(data.captions) if (lesson := target.lesson(caption))][:most]
    if not found:
        raise ValueError(f"no caption of the data can teach target {target.name}; it needs images of what it shows")
    rows, asked, shown = [i for i, _ in found], tuple(a for _, (a, _) in found), tuple(s for _, (_, s) in found)
    return Data(data.images[rows], asked), shown


@hookimpl
def attacks() -> list[type]:
    return [BadT2I]
