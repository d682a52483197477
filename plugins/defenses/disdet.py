"""Detects inputs with a trigger by the distribution of their noise values, without using the model.

DisDet. Sui, Phan, Xiao, Zhang, Tang, Shi, Wang, Chen & Yuan, "DisDet: Exploring Detectability of Backdoor Attack on
Diffusion Models", TMLR 2025, arXiv:2402.02739. It is input-level detection by distribution discrepancy: the values of
clean noise follow N(0, 1), the values of a trigger do not.

    histogram:  s(x) = Σ_b p_b log(p_b / q_b)      p the shares of x's values in `bins` bins on [-4, 4], whose outer
                                                   ones take the tails; q those of N(0, 1)
    gaussian:   s(x) = (v + m² - 1 - log v) / 2    KL(N(m, v) ‖ N(0, 1)), m and v the mean and variance of x's values

An input is flagged if its score is above the `quantile` of the scores of `draws` clean noises. The defense needs
nothing, not even the model, and costs no network evaluation. It returns a screen. The scores ignore the positions of
the values. They therefore miss a trigger of few pixels that leaves the distribution of all values nearly unchanged,
such as TrojDiff's 3×3 patch.

Checked against the paper's abstract and summaries by others: its text was not available, and no code is released.
Differs from the paper in ways that are therefore not known. Abstract and summaries describe a score of distribution
discrepancy that is compared with the discrepancy of clean noise, and triggers that evade it through differentiable
histograms. Both scores, `bins`, `draws` and `quantile` are our interpretation of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from harness import Defended, Knowledge, PositiveInt, hookimpl

REACH = 4.0  # inner edges of the outermost bins, in standard deviations


@dataclass(frozen=True)
class DisDet:
    name: ClassVar[str] = "disdet"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    needs: ClassVar[tuple[str, ...]] = ()
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    score: Literal["histogram", "gaussian"] = "histogram"  # the discrepancy
    bins: Annotated[int, Ge(4)] = 64  # bins of the histogram
    draws: PositiveInt = 10_000  # clean noises from which the threshold is computed
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.999  # quantile of their scores above which an input is flagged

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        parts = [min(500, self.draws - start) for start in range(0, self.draws, 500)]
        clean = torch.cat([self.discrepancy(torch.randn((n, *model.shape), generator=rng)) for n in parts])
        return Defended(
            screen=lambda inputs: self.discrepancy(inputs.noise),
            screen_above=clean.quantile(self.quantile).item(),
            notes={"clean_mean": clean.mean().item()},
        )

    def discrepancy(self, noise: Tensor) -> Tensor:
        """(B,) discrepancy in nats, at least 0, of noise (B, C, H, W)."""
        values = noise.flatten(1).double()
        return gaussian(values) if self.score == "gaussian" else histogram(values, self.bins)


def gaussian(values: Tensor) -> Tensor:
    """(B,) KL divergence of the normal distribution with the mean and variance of values (B, N) from N(0, 1)."""
    mean, variance = values.mean(1), values.var(1, correction=0)
    return (variance + mean.square() - 1 - variance.log()) / 2


def histogram(values: Tensor, bins: int) -> Tensor:
    """(B,) KL divergence of the histogram of values (B, N) from that of N(0, 1)."""
    edges = torch.linspace(-REACH, REACH, bins + 1, dtype=values.dtype, device=values.device)
    below = torch.special.ndtr(edges[1:-1])
    normal = torch.cat([below, below.new_ones(1)]) - torch.cat([below.new_zeros(1), below])
    which = torch.bucketize(values, edges[1:-1])
    counts = values.new_zeros(len(values), bins).scatter_add(1, which, torch.ones_like(values))
    share = counts / values.shape[1]
    return torch.special.xlogy(share, share / normal).sum(1)


@hookimpl
def defenses() -> list[type]:
    return [DisDet]
