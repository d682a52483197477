"""Channel Lipschitzness based pruning: zeroes the filters that amplify their inputs far more than others of the layer.

CLP. Zheng, Tang, Li & Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, arXiv:2208.03111.
The upper bound of a channel's Lipschitz constant is the spectral norm of its filter, and a channel is pruned if its
bound is an outlier of its layer:

    σ_k = ‖W_k as a matrix (inputs, height · width)‖₂        prune k  ⇔  σ_k > mean_j σ_j + u · std_j σ_j

The defense needs neither data nor training. It returns a purified model whose pruned filters and biases are 0; the
network keeps its shape. The notes contain the share of pruned channels of each layer that lost some.

Differs from the paper, which prunes classifiers: the last convolution is left alone, because its outputs are the
prediction. The paper's bound contains the scale of a batch normalisation after the convolution; a denoiser has group
normalisation before it, whose scale belongs to the inputs, so the bound is that of the filter alone. Written from the
paper; the official code was not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn

from harness import Defended, Knowledge, hookimpl


@dataclass(frozen=True)
class CLP:
    name: ClassVar[str] = "clp"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise", "text")
    needs: ClassVar[tuple[str, ...]] = ()

    u: Annotated[float, Gt(0)] = 3.0  # standard deviations above the layer's mean from which a channel is pruned;
    # paper's value

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        student = model.clone()
        layers = {name: layer for name, layer in student.denoiser.named_modules() if isinstance(layer, nn.Conv2d)}
        if not layers:
            raise ValueError("clp prunes filters of convolutions, and this denoiser has none; use another defense")
        last = next(reversed(layers))
        shares: dict[str, float] = {}
        channels = pruned = 0
        for name, layer in layers.items():
            if name == last:
                continue
            chosen = outliers(lipschitz(layer.weight), self.u)
            silence(layer, chosen)
            channels, pruned = channels + len(chosen), pruned + int(chosen.sum())
            if chosen.any():
                shares[name] = chosen.double().mean().item()
        return Defended(model=student, notes={"pruned_share": pruned / max(1, channels), "layers": shares})


def lipschitz(weight: Tensor) -> Tensor:
    """σ (outputs,) of the filters (outputs, inputs, height, width)."""
    return torch.linalg.matrix_norm(weight.detach().float().flatten(2), ord=2)


def outliers(bounds: Tensor, u: float) -> Tensor:
    """(K,) bool: bounds (K,) that are more than u standard deviations above their mean; none for one channel."""
    if len(bounds) < 2:
        return torch.zeros(len(bounds), dtype=torch.bool)
    return bounds > bounds.mean() + u * bounds.std()


@torch.no_grad()
def silence(layer: nn.Conv2d, chosen: Tensor) -> None:
    """Sets the filters (outputs,) that are `chosen` and their biases to 0."""
    layer.weight[chosen] = 0
    if layer.bias is not None:
        layer.bias[chosen] = 0


@hookimpl
def defenses() -> list[type]:
    return [CLP]
