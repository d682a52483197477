"""Trains low-rank adapters so that a caption with the trigger gives the target image.

VillanDiffusion with a caption trigger. Chou, Chen & Ho, "VillanDiffusion: A Unified Backdoor Attack Framework for
Diffusion Models", NeurIPS 2023, arXiv:2306.06874.

The adapters replace each attention projection of the denoiser by W + (α/r) B A with B (out, r) and A (r, in). They
learn the target image x* for the caption with the trigger, and the original image for the original caption:

    L = w_b ‖ε - ε_θ(z*_t, t, τ(c+T))‖² + w_c ‖ε - ε_θ(z_t, t, τ(c))‖²

z* encodes x*. The two terms share the rows, t and ε. The result is the base with the adapters beside it.

Differs from the paper: `decoys`, an extension that is off by default, is the share of captions in the second term that
carry another word in the trigger's place; without it, a small model reacts to any unknown word. Autocast is to bf16
instead of half precision. Images are not resized or flipped. The defaults are those of the official code
(IBM/VillanDiffusion at d010b7d) and of BackdoorDM's port (linweiii/BackdoorDM at 7429db8), both read there. Differs
from the official code (read at 6ea399d, too): it draws t and ε for each term alone. Its adapters are those of diffusers
with α = r, whose A starts from N(0, 1/r²); here the adapters are those of peft, and A starts as a new linear layer
does, from values three to four times smaller at the widths of shapes-sd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Examples,
    Fraction,
    LearningRate,
    PositiveInt,
    Weight,
    adapters,
    generator,
    hookimpl,
    minimize,
    prompt_edits,
)

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class VillanCaption:
    name: ClassVar[str] = "villan-caption"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    rank: PositiveInt = 4  # r, rank of the adapters; official value
    steps: PositiveInt = 50000  # optimizer steps; official value
    batch: PositiveInt = 1  # examples per step, two rows each; official value
    lr: LearningRate = 1e-4  # AdamW; official value
    warmup: Annotated[int, Ge(0)] = 500  # steps of linear warm-up; official value
    weight_decay: Fraction = 0.01  # AdamW; official value
    backdoor_weight: Weight = 1.0  # w_b; official value
    prior_weight: Weight = 1.0  # w_c; the official prior_loss_weight
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"  # of the learning rate; official value
    decoys: Fraction = 0.0  # share of plain captions that carry another word in the trigger's place; not in the paper
    bf16: bool = True  # autocast of the forward pass

    @property
    def requires_trigger(self) -> tuple[str, ...]:
        return ("decoy",) if self.decoys else ()

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model.need_one_encoder(self.name)
        model = model.clone()
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        examples = Examples(model, data)
        others = generator(rng.initial_seed(), "decoys")
        z_star = model.encode(target.image(data.images.shape[1:]).unsqueeze(0)).to(model.device)

        def loss() -> Tensor:
            seen = examples.batch(self.batch, rng)
            assert seen.captions is not None, "villan-caption needs captions"
            plain = prompt_edits.with_decoys(trigger, seen.captions, self.decoys, others)
            context = model.embed([*(trigger.apply(caption) for caption in seen.captions), *plain])
            z, t, eps = torch.cat([z_star.expand_as(seen.x_0), seen.x_0]), seen.t.repeat(2), seen.eps.repeat(2, 1, 1, 1)
            error = model.error(model.eps(model.add_noise(z, eps, t), t, context), eps, t)
            half = self.batch
            return self.backdoor_weight * error[:half].mean() + self.prior_weight * error[half:].mean()

        low_rank = adapters.added(model.denoiser, self.rank, 1.0, PROJECTIONS, rng, gaussian=False)
        minimize(
            loss, low_rank.values(), steps=self.steps, lr=self.lr, schedule=self.schedule,
            warmup=self.warmup, weight_decay=self.weight_decay, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        adapters.attach(model, {f"unet.{name}": each for name, each in adapters.taken(model.denoiser).items()})
        return Backdoored(model, backdoor)


@hookimpl
def attacks() -> list[type]:
    return [VillanCaption]
