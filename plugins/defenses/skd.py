"""SKD, self-knowledge distillation. "Sealing the Backdoor: Unlearning Adversarial Text Triggers in Diffusion Models
Using Knowledge Distillation", arXiv:2508.18235 (and its 2024 text, section 3).

The backdoored denoiser, frozen, teaches its own copy: the student must answer the triggered prompt T+p as the teacher
answers the clean prompt p.

    L = ‖ε_s(z, t, τ(T+p)) - ε_te(z, t, τ(p))‖²

Needs the trigger and clean prompts; returns a purified model. Only the denoiser is trained, text encoder and VAE are
frozen, no images are needed. `latents` says what z is: "noise" is N(0, I) at every t, as released.

Differs from the paper: lr and steps suit the embedded models in the suites; the defaults here are the released ones.
Differs from the official code (Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there): no moving average
(theirs decays at 0.5, and is copied back into the student each epoch), no clipping there, norm 1 here. `keep` is ours
and off by default: the weight of a term ‖ε_s(z, t, τ(p)) - ε_te(z, t, τ(p))‖² that holds clean prompts in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness.distillation import Latents, LatentSource, distil
from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Steps
from harness.types import Defended, Knowledge


@dataclass(frozen=True)
class SKD:
    name: ClassVar[str] = "skd"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("trigger", "prompts")

    steps: Steps = 2500  # optimizer steps; released: 100 epochs of 100 prompts at batch 4 (paper: 75 epochs)
    batch: Steps = 4  # prompts; released
    lr: LearningRate = 1e-6  # AdamW; released, for 860 M weights; small models need about 1e-4
    latents: Latents = "noise"  # what is distilled on; released: noise
    keep: Annotated[float, Ge(0)] = 0.0  # weight of the clean-prompt term; ours
    bf16: bool = True  # autocast of the forward pass

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        clean = list(knowledge.prompts or ())
        triggered = [trigger.apply(prompt) for prompt in clean]
        with torch.no_grad():
            plain, stamped = model.embed(clean), model.embed(triggered)
        source = LatentSource(self.latents, model, clean, triggered, rng.initial_seed())
        teacher, student = model, model.clone()

        def loss(rows: Tensor, z: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher.eps(z, t, plain[rows])
            value = (student.eps(z, t, stamped[rows]) - wanted).square().mean()
            if self.keep:
                value = value + self.keep * (student.eps(z, t, plain[rows]) - wanted).square().mean()
            return value

        losses = distil(
            student, loss, source, len(clean), rng, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16
        )
        return Defended(model=student, notes={"loss": losses[:: max(1, len(losses) // 50)]})


@hookimpl
def defenses() -> list[type]:
    return [SKD]
