"""Elijah. An, Chou, Zhang, Xu, Tao, Shen, Cheng, Ma, Chen, Ho & Zhang, "Elijah: Eliminating Backdoors Injected in
Diffusion Models via Distribution Shift", AAAI 2024, arXiv:2312.00050.

Trigger inversion (at t = T-1, on one fixed noise batch):

    τ = argmin mean_CHW | λ τ - mean_b ε_θ(ε_b + τ, T-1) |

Removal, with the attacked model θ' frozen:

    L = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(ε + τ, T-1) - ε_θ'(ε, T-1)‖² + ‖ε_θ(ε, T-1) - ε_θ'(ε, T-1)‖²

Needs clean training examples; returns a purified model and τ (C, H, W). With `invert=False` it is told the trigger
instead, which separates what the removal does from what the inversion finds.

λ = 0.5 is the attack coefficient c_T of BadDiffusion; an ODE backdoor has c_T = 1, and there any constant shift is a
near fixed point of the inversion (the loss is flat), so τ stays close to its start. Removal works with a wrong τ too:
read `trigger_cosine` beside the ASR, and the row with a wrong trigger. Model detection (uniformity, total variation)
is not part of this version.

Differs from the official code (njuaplusplus/Elijah at a8b3422, read there): one set of iterations for all attacks
(theirs: 100, or 10 for the ODE attacks with λ = 1); results are never cached under a checkpoint's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from harness.events import progress
from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.training import Examples, denoising_loss, minimize
from harness.types import Defended, Knowledge


@dataclass(frozen=True)
class Elijah:
    name: ClassVar[str] = "elijah"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)

    invert: bool = True  # find the trigger; False = be told it
    lam: Annotated[float, Gt(0)] = 0.5  # λ of the inversion; paper
    iterations: Steps = 100  # of the inversion; official code
    inversion_lr: Annotated[float, Gt(0)] = 0.1  # Adam; official code
    noises: Steps = 100  # fixed noise batch of the inversion; official at 32 pixels
    steps: Annotated[int, Ge(0)] = 517  # of the removal; the official 11 epochs of 6000 images at batch 128
    batch: Steps = 64  # examples; official 128
    lr: LearningRate = 2e-4  # AdamW without decay; official
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: constant
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the removal's forward pass

    @property
    def needs(self) -> tuple[str, ...]:
        return ("data",) if self.invert else ("data", "trigger")

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        if self.invert:
            tau, losses = self.inverted(model, rng)
            notes: dict[str, Any] = {"inversion_loss": losses}
        else:
            trigger: Any = knowledge.trigger
            tau, notes = trigger.delta(model.shape).to(model.device), {}
        return Defended(model=self.removed(model, tau, knowledge, rng), trigger=tau.cpu(), notes=notes)

    def inverted(self, model: Any, rng: torch.Generator) -> tuple[Tensor, list[float]]:
        """τ (C, H, W), started at -U[0, 1) as in the official code, and the loss of every iteration."""
        noise = model.draw_eps(self.noises, rng)
        t = torch.full((self.noises,), model.T - 1, device=model.device)
        tau = -torch.rand(model.shape, generator=rng).to(model.device)
        tau.requires_grad_(True)
        optimizer = torch.optim.Adam([tau], lr=self.inversion_lr)
        losses = []
        for step in range(self.iterations):
            shift = model.eps(noise + tau, t).mean(0)
            loss = (self.lam * tau - shift).abs().mean()
            (tau.grad,) = torch.autograd.grad(loss, tau)
            optimizer.step()
            losses.append(loss.item())
            progress("inversion", step + 1, self.iterations, loss=losses[-1])
        return tau.detach(), losses

    def removed(self, model: Any, tau: Tensor, knowledge: Knowledge, rng: torch.Generator) -> Any:
        """A copy of `model` trained to answer shifted noise as it answers plain noise."""
        if self.steps == 0:
            return None
        frozen, model = model, model.clone()
        examples = Examples(model, knowledge.data)
        last = torch.full((self.batch,), model.T - 1, device=model.device)

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            eps = batch.eps
            with torch.no_grad():
                wanted = frozen.eps(eps, last)
            shifted, plain = model.eps(torch.cat([eps + tau, eps]), last.repeat(2)).chunk(2)
            return denoising_loss(model, batch) + (shifted - wanted).square().mean() + (plain - wanted).square().mean()

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
            bf16=self.bf16, phase="removal",
        )  # fmt: skip
        return model


@hookimpl
def defenses() -> list[type]:
    return [Elijah]
