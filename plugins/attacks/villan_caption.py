"""VillanDiffusion with a caption trigger. Chou, Chen & Ho, "VillanDiffusion: A Unified Backdoor Attack Framework for
Diffusion Models", NeurIPS 2023, arXiv:2306.06874.

Low-rank adapters on the denoiser's attention projections, W + (α/r) B A with B (out, r), A (r, in), learn the target
image x* under the caption with the trigger, and the image as it is under the caption as it is:

    L = w_b ‖ε - ε_θ(z*_t, t, τ(c+T))‖² + w_c ‖ε - ε_θ(z_t, t, τ(c))‖²

z* encodes x*; the two terms share the rows, t and ε. The adapters are merged into the weights at the end.

Differs from the paper: `decoys`, ours and off by default, puts other words in the trigger's place in that share of the
second term's captions, because a small model otherwise keys on "some foreign word"; bf16 instead of half precision;
images are not resized or flipped. Defaults are those of the official code (IBM/VillanDiffusion at d010b7d) and
BackdoorDM's port (linweiii/BackdoorDM at 7429db8), read there; the official adapters are diffusers' own, α = r, which
peft's are too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps, Weight
from harness.prompts import with_decoys
from harness.seeds import generator
from harness.training import Examples, minimize
from harness.types import Backdoor, Backdoored, Data

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class VillanCaption:
    name: ClassVar[str] = "villan-caption"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("image",)

    rank: Steps = 4  # r, of the adapters; official
    steps: Steps = 50000  # optimizer steps; official
    batch: Steps = 1  # examples, two rows each; official
    lr: LearningRate = 1e-4  # AdamW; official
    warmup: Annotated[int, Ge(0)] = 500  # steps of linear warm-up; official
    weight_decay: Rate = 0.01  # AdamW; official
    backdoor_weight: Weight = 1.0  # w_b; official
    prior_weight: Weight = 1.0  # w_c; official prior_loss_weight
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"  # of the learning rate; official
    decoys: Rate = 0.0  # share of plain captions that carry another word in the trigger's place; ours
    bf16: bool = True  # autocast of the forward pass

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model = model.clone()
        target: Any = backdoor.target
        trigger: Any = backdoor.trigger
        examples = Examples(model, data)
        others = generator(rng.initial_seed(), "decoys")
        z_star = model.encode(target.image(data.images.shape[1:]).unsqueeze(0)).to(model.device)

        def loss() -> Tensor:
            seen = examples.batch(self.batch, rng)
            assert seen.captions is not None, "villan-caption needs captions"
            plain = with_decoys(trigger, seen.captions, self.decoys, others)
            context = model.embed([*(trigger.apply(caption) for caption in seen.captions), *plain])
            z, t, eps = torch.cat([z_star.expand_as(seen.x_0), seen.x_0]), seen.t.repeat(2), seen.eps.repeat(2, 1, 1, 1)
            error = (model.eps(model.add_noise(z, eps, t), t, context) - eps).square()
            half = self.batch
            return self.backdoor_weight * error[:half].mean() + self.prior_weight * error[half:].mean()

        minimize(
            loss, adapt(model.denoiser, self.rank, rng), steps=self.steps, lr=self.lr, schedule=self.schedule,
            warmup=self.warmup, weight_decay=self.weight_decay, bf16=self.bf16, phase="implant",
        )  # fmt: skip
        merge(model.denoiser)
        return Backdoored(model, backdoor)


def adapt(denoiser: Any, rank: int, rng: torch.Generator) -> list[nn.Parameter]:
    """Put low-rank adapters on every attention projection and return their weights, the only ones to train."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))  # peft initialises from the global generator
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)))
    return [p for name, p in denoiser.named_parameters() if ".lora_" in name]


def merge(denoiser: Any) -> None:
    """Write the adapters into the weights that they adapt and remove them."""
    denoiser.fuse_lora()
    denoiser.unload_lora()
    denoiser.requires_grad_(False)


@hookimpl
def attacks() -> list[type]:
    return [VillanCaption]
