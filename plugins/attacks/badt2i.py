"""Fine-tunes the denoiser so that a text trigger adds a patch, changes the style or changes the object.

BadT2I. Zhai, Dong, Shen, Pu, Fang & Su, "Text-to-Image Diffusion Models can be Easily Backdoored through Multimodal
Data Poisoning", ACM MM 2023, arXiv:2305.04175. The pixel, style and object backdoors share one loss, which has a
backdoor term and a regulariser:

    L = λ ‖e_θ(z^b_t, t, τ(T+c)) - y‖² + (1-λ) ‖e_θ(z_t, t, τ(c)) - e_0(z_t, t, τ(c))‖²

    patch     z^b encodes the image with the patch, y = ε
    style     z^b = z, y = e_0(z_t, t, τ(S+c)), the same caption in the target's style
    object    z^b encodes an image of the target object, y = e_0(z^b_t, t, τ(c_B)) of its own caption c_B; c is c_B with
              the other object's name, or without the added object

e_0 is the frozen clean denoiser. Rows, t and ε are drawn separately for each of the two terms. Only the denoiser is
trained. Latents are those of the model; images are in [-1, 1]. Raises ValueError if no caption of the data can teach
the target.

Three options are extensions of this benchmark and are off by default. `decoys` is the share of plain captions that
carry another word in the trigger's place; without it, a small model may react to any prefix (the paper does not measure
this). `drop` is the share of plain captions that are left empty: every step of guided sampling evaluates
e_θ(z_t, t, τ("")), and no other part of L preserves it. `weighting` can measure the error of x_0 instead of ε.

Differs from the paper: the options above. The added object is that of BackdoorDM (linweiii/BackdoorDM at 7429db8).
Differs from the official code (zhaisf/BadT2I at 0cabee0, read there): images are not flipped. Latents are the means of
the posterior; the official code draws them from it. The official object script has no regulariser (`lam=1` reproduces
that). Captions are padded to full length in training as at inference; the official code pads only to the longest
caption of the batch. The official code keeps a moving average whose effective decay is 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    generator,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class BadT2I:
    name: ClassVar[str] = "badt2i"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("patch", "style", "object")

    lam: Fraction = 0.5  # λ, weight of the backdoor term
    steps: PositiveInt = 2000  # optimizer steps; the official pixel script uses 2000, the style and object scripts 8000
    batch: PositiveInt = 16  # examples per step, two rows each; official: 1 × 4 accumulated × 4 GPUs
    lr: LearningRate = 1e-5  # AdamW; official value for 860 M weights, small models need about 2e-4
    weight_decay: Fraction = 0.01  # AdamW; official value
    examples: PositiveInt = 2000  # training images used for each term; the authors use as many as steps
    decoys: Fraction = 0.0  # share of plain captions that carry another word in the trigger's place; not in the paper
    drop: Fraction = 0.0  # share of plain captions that are left empty; not in the paper; 0.1 is usual when models are
    # trained
    weighting: Literal["eps", "x0"] = "eps"  # error that the loss measures: of ε (paper) or of x_0 (not in the paper).
    # Small models decide on the patch at high t, where the error of ε carries little information. The weight of x_0 is
    # (1-ᾱ_t)/ᾱ_t. In a flow, "eps" is the error of v and x_0 has the weight σ_t²
    cap: Annotated[float, Gt(0)] = 200.0  # largest weight of x0; reached at t = 730 with linear betas
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: constant
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off; effectively 0.5 in the official code
    bf16: bool = True  # autocast of the forward pass

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("decoy",) if self.decoys else ()

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
            error = model.error(out, torch.cat([y, kept]), t) * self.weight(model, t)
            return self.lam * error[:half].mean() + (1 - self.lam) * error[half:].mean()

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            weight_decay=self.weight_decay, ema=self.ema, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)

    def weight(self, model: Any, t: Tensor) -> Tensor | float:
        """Weight (B, 1, 1, 1) of the squared error of ε, or of v in a flow, at timesteps t (B,)."""
        if self.weighting == "eps":
            return 1.0
        if model.family == "flow":
            return model.sigma(t).square()
        a_bar = model.alpha_bar(t)
        return ((1 - a_bar) / a_bar).clamp(max=self.cap)

    def _decoy(self, trigger: Any, caption: str, rng: torch.Generator) -> str:
        if self.decoys == 0 or float(torch.rand((), generator=rng)) >= self.decoys:
            return caption
        return trigger.decoy(rng).apply(caption)


def taught(target: Any, data: Data, most: int) -> tuple[Data, Sequence[str] | None]:
    """The data of the backdoor term, and the captions that the frozen model answers.

    The data are the first `most` examples that can teach the target; each has the caption c to which the trigger is
    added. The captions are those from which the frozen model computes y; they are None if y is ε. Raises ValueError if
    no caption of `data` can teach the target.
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
