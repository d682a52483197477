"""Trains the denoiser to predict for the prompt with the trigger what it predicts for the prompt without it.

SKD, self-knowledge distillation. "Sealing the Backdoor: Unlearning Adversarial Text Triggers in Diffusion Models Using
Knowledge Distillation", arXiv:2508.18235 (and its 2024 text, section 3).

The frozen backdoored denoiser teaches a copy of itself. For the triggered prompt T+p the student must match the
prediction of the teacher for the clean prompt p:

    L = ‖ε_s(z, t, τ(T+p)) - ε_te(z, t, τ(p))‖²

The defense needs the trigger and clean prompts. It returns a purified model. Only the denoiser is trained; the text
encoder and the VAE are frozen. It needs no images. `latents` selects z: "noise" is N(0, I) at every t, as in the
released code.

Differs from the paper: the suites use a learning rate and steps that suit the embedded models; the defaults here are
the released values but for the steps. `keep`, an extension that is off by default, is the weight of a term
‖ε_s(z, t, τ(p)) - ε_te(z, t, τ(p))‖² that preserves the predictions for clean prompts. Differs from the official code
(Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there): there is no moving average (the official one decays at 0.5
and is copied back into the student each epoch), and the norm of the gradient is clipped at 1 (the official code does
not clip).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness import Defended, Knowledge, Latents, LatentSource, LearningRate, PositiveInt, distillation, hookimpl


@dataclass(frozen=True)
class SKD:
    name: ClassVar[str] = "skd"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("trigger", "prompts")

    steps: PositiveInt = 1875  # the paper's 75 epochs, of 100 prompts at batch 4 as released (released: 100 epochs)
    batch: PositiveInt = 4  # prompts per step; released value
    lr: LearningRate = 1e-6  # AdamW; released value for 860 M weights, small models need about 1e-4
    latents: Latents = "noise"  # latents for the distillation; released: noise
    keep: Annotated[float, Ge(0)] = 0.0  # weight of the clean-prompt term; not in the paper
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
            value = student.error(student.eps(z, t, stamped[rows]), wanted, t).mean()
            if self.keep:
                value = value + self.keep * student.error(student.eps(z, t, plain[rows]), wanted, t).mean()
            return value

        losses = distillation.distil(
            student, loss, source, len(clean), rng, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16
        )
        return Defended(model=student, notes={"loss": losses[:: max(1, len(losses) // 50)]})


@hookimpl
def defenses() -> list[type]:
    return [SKD]
