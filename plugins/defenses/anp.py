"""Prunes the channels of a denoiser that are most sensitive to adversarial perturbations of their weights.

ANP, adversarial neuron pruning. Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021,
arXiv:2110.14430, applied to a denoiser as BadDiffusion (arXiv:2212.05400) tried it.

Neurons are the output channels of the convolutions, y = W x + b. Backdoored neurons are sensitive: a small adversarial
perturbation of them raises the clean loss. The method therefore learns masks m that make the network robust to it,

    min over m in [0, 1] of  α L(m ⊙ W, b) + (1-α) max over δ, ξ in [-ε, ε] of L((m + δ) ⊙ W, (1 + ξ) ⊙ b)

and prunes the channels whose m is at most `threshold`: their W becomes 0 and their b stays. L is DDPM's ‖ε -
ε_θ(x_t, t)‖² on clean examples. The inner maximum takes `ascents` steps of ±ε/`ascents` along the sign of the gradient,
from a uniform start. The last layer is left out. The defense needs clean training examples. It returns a purified model
of the same shape.

Differs from the paper: L is the loss of a denoiser, not of a classifier. Neurons are the channels of a convolution, not
those of the BatchNorm that follows it. Differs from its code (csdongxian/ANP_backdoor at 85acbae, read there): δ and ξ
are clamped to [-ε, ε]; in the official code the random start can leave that range. Differs from BadDiffusion's code
(IBM/BadDiffusion at 717b321, known from notes, not read): that code has no masks and no pruning. It maximises the clean
loss over per-channel factors and offsets in [-4, 4] with Adam at 1e-4 for 5 epochs. It then observes whether clean
noise begins to give the target, which the defender must know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from harness import Defended, Examples, Fraction, Knowledge, PositiveInt, denoising_loss, hookimpl, loop, progress

LAST = "conv_out"  # its output channels are those of the image


@dataclass(frozen=True)
class ANP:
    name: ClassVar[str] = "anp"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ("data",)

    epsilon: Annotated[float, Ge(0)] = 0.4  # ε, bound of the perturbation; paper's value
    alpha: Fraction = 0.2  # α, weight of the unperturbed loss; paper's value
    ascents: PositiveInt = 1  # steps of the inner maximum; paper's value
    iterations: PositiveInt = 2000  # optimizer steps of the masks; paper's value
    lr: Annotated[float, Gt(0)] = 0.2  # learning rate of the masks: SGD with momentum 0.9; paper's value
    batch: PositiveInt = 128  # examples per step; paper's value
    threshold: Annotated[float, Ge(0), Le(1)] = 0.2  # channels with masks at most this are pruned; paper's value
    bf16: bool = True  # autocast of the forward passes

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        model = model.clone()
        layers = neurons(model.denoiser)
        masks, losses = self.masked(model, layers, Examples(model, knowledge.data), rng)
        pruned = prune(layers, masks, self.threshold)
        every = torch.cat(list(masks.values()))
        notes = {
            "pruned_channels": pruned / len(every),
            "mask_deciles": every.quantile(torch.linspace(0, 1, 11, device=every.device)).tolist(),
            "loss": losses[:: max(1, len(losses) // 100)],
        }
        return Defended(model=model, notes=notes)

    def masked(
        self, model: Any, layers: Mapping[str, nn.Conv2d], examples: Examples, rng: torch.Generator
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The masks, (C,) in [0, 1] for each layer, and the loss of every iteration."""
        masks = {name: torch.ones(layer.out_channels, device=model.device) for name, layer in layers.items()}
        tensors = [mask.requires_grad_(True) for mask in masks.values()]
        optimizer = torch.optim.SGD(tensors, lr=self.lr, momentum=0.9)
        losses = []
        for step in loop("masks", range(self.iterations)):
            batch = examples.batch(self.batch, rng)

            def clean_loss(delta: Mapping[str, Tensor], xi: Mapping[str, Tensor], batch: Any = batch) -> Tensor:
                with (
                    gated(layers, masks, delta, xi),
                    torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16),
                ):
                    return denoising_loss(model, batch)

            delta, xi = self.worst(masks, clean_loss, rng)
            loss = self.alpha * clean_loss({}, {}) + (1 - self.alpha) * clean_loss(delta, xi)
            for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
                tensor.grad = gradient
            optimizer.step()
            for tensor in tensors:
                tensor.data.clamp_(0, 1)
            losses.append(loss.item())
            progress("masks", step + 1, self.iterations, loss=losses[-1])
        return {name: mask.detach() for name, mask in masks.items()}, losses

    def worst(self, masks: Mapping[str, Tensor], loss: Any, rng: torch.Generator) -> tuple[dict[str, Tensor], ...]:
        """δ and ξ in [-ε, ε] that raise the loss, (C,) for each layer."""
        eps = self.epsilon
        found = [
            {name: eps * (2 * torch.rand(len(m), generator=rng) - 1).to(m) for name, m in masks.items()}
            for _ in range(2)
        ]
        for _ in range(self.ascents):
            leaves = [tensor.requires_grad_(True) for part in found for tensor in part.values()]
            signs = iter([gradient.sign() for gradient in torch.autograd.grad(loss(*found), leaves)])
            found = [
                {name: (x.detach() + eps / self.ascents * next(signs)).clamp(-eps, eps) for name, x in part.items()}
                for part in found
            ]
        return tuple(found)


def neurons(net: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions whose output channels are neurons, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and name != LAST}


@contextmanager
def gated(
    layers: Mapping[str, nn.Conv2d],
    masks: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    xi: Mapping[str, Tensor],
) -> Iterator[None]:
    """Context in which a layer computes (m + δ) ⊙ W x + (1 + ξ) ⊙ b. A layer without δ and ξ computes m ⊙ W x + b."""

    def hook(name: str) -> Any:
        def gate(layer: nn.Conv2d, inputs: Any, out: Tensor) -> Tensor:
            bias = out.new_zeros(out.shape[1]) if layer.bias is None else layer.bias
            factor, offset = masks[name] + delta.get(name, 0.0), bias * (1 + xi.get(name, 0.0))
            return factor.view(-1, 1, 1) * (out - bias.view(-1, 1, 1)) + offset.view(-1, 1, 1)

        return gate

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prune(layers: Mapping[str, nn.Conv2d], masks: Mapping[str, Tensor], threshold: float) -> int:
    """Sets the weights of channels with masks at most `threshold` to 0, in place. Returns the number of channels."""
    for name, layer in layers.items():
        layer.weight[masks[name] <= threshold] = 0
    return sum(int((mask <= threshold).sum()) for mask in masks.values())


@hookimpl
def defenses() -> list[type]:
    return [ANP]
