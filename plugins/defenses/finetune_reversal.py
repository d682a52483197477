"""Fine-tunes the denoiser on prompts with the trigger, so that the trigger loses its effect.

Fine-tune reversal is the baseline of "Sealing the Backdoor" (arXiv:2508.18235). Paper and code give it two meanings;
both are implemented.

mode = "data" (the paper's words: fine-tuning on the original images and the triggered prompts):

    L = ‖ε_θ(z_t, t, τ(T+c)) - ε‖²                                   needs the trigger and clean examples

mode = "distil" (the released code, Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there): the *clean* denoiser ε_0
teaches the attacked one on triggered prompts. It is an oracle, because it needs the model before the attack:

    L = ‖ε_θ(z, t, τ(T+p)) - ε_0(z, t, τ(T+p))‖²                     needs the trigger, prompts and the clean model

The defense returns a purified model. Only the denoiser is trained. z is N(0, I) at every t as in the released code,
unless `latents` selects other latents.

Differs from the released code: there is no moving average, and the norm of the gradient is clipped at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import (
    Defended,
    Examples,
    Knowledge,
    Latents,
    LatentSource,
    LearningRate,
    PositiveInt,
    distillation,
    hookimpl,
    minimize,
)


@dataclass(frozen=True)
class FinetuneReversal:
    name: ClassVar[str] = "finetune-reversal"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    mode: Literal["data", "distil"] = "data"  # the meaning of the paper or of the released code
    steps: PositiveInt = 1875  # optimizer steps, as many as SKD; released: 100 epochs of 100 prompts at batch 4, 2500
    batch: PositiveInt = 4  # examples or prompts per step; released value
    lr: LearningRate = 1e-6  # AdamW; released value for 860 M weights, small models need about 1e-4
    latents: Latents = "noise"  # latents on which mode "distil" trains; released: noise
    bf16: bool = True  # autocast of the forward pass

    @property
    def needs(self) -> tuple[str, ...]:
        return ("trigger", "data") if self.mode == "data" else ("trigger", "prompts", "clean_model")

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        student = model.clone()
        losses = (
            self.on_data(student, knowledge, rng) if self.mode == "data" else self.on_clean(student, knowledge, rng)
        )
        return Defended(model=student, notes={"loss": losses[:: max(1, len(losses) // 50)]})

    def on_data(self, student: Any, knowledge: Knowledge, rng: torch.Generator) -> list[float]:
        trigger: Any = knowledge.trigger
        examples = Examples(student, knowledge.data)

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            with torch.no_grad():
                context = student.embed([trigger.apply(caption) for caption in batch.captions or ()])
            z_t = student.add_noise(batch.x_0, batch.eps, batch.t)
            return student.error(student.eps(z_t, batch.t, context), batch.eps, batch.t).mean()

        return minimize(
            loss, student.denoiser.parameters(), steps=self.steps, lr=self.lr, weight_decay=0.01, bf16=self.bf16,
            phase="finetune",
        )  # fmt: skip

    def on_clean(self, student: Any, knowledge: Knowledge, rng: torch.Generator) -> list[float]:
        trigger: Any = knowledge.trigger
        teacher: Any = knowledge.clean_model
        clean = list(knowledge.prompts or ())
        triggered = [trigger.apply(prompt) for prompt in clean]
        with torch.no_grad():
            mine, theirs = student.embed(triggered), teacher.embed(triggered)
        source = LatentSource(self.latents, student, clean, triggered, rng.initial_seed())

        def loss(rows: Tensor, z: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher.eps(z, t, theirs[rows])
            return student.error(student.eps(z, t, mine[rows]), wanted, t).mean()

        return distillation.distil(
            student, loss, source, len(clean), rng, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16
        )


@hookimpl
def defenses() -> list[type]:
    return [FinetuneReversal]
