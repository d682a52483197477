"""What an adapter is made of: the rank and the size of the change that it makes to each layer of its base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.scan.document import AdapterFacts, AdapterLayer
from harness.scan.robust import STANDS_OUT, centre

if TYPE_CHECKING:
    from harness.diffusion.adapters import Adapter, LowRank

SHOWN = 10
LEAST_SPREAD = 0.01  # of logarithms
TINY = 1e-12


@torch.no_grad()
def described(adapter: Adapter, file: str) -> AdapterFacts:
    """Rank, norm ‖ΔW‖, ‖ΔW‖ / ‖W‖ and spectral norm of each layer, and how far it stands out: a robust z of the
    logarithm of ‖ΔW‖ / ‖W‖ among the adapter's layers. The largest are kept."""
    rows = []
    for name, factors in adapter.layers.items():
        values = singular(factors)
        top = float(values[0]) if len(values) else 0.0
        rank = int((values > 1e-6 * max(top, TINY)).sum())
        norm = float(values.norm())
        relative = norm / max(float(adapter.base[name].double().norm()), TINY)
        rows.append((name, rank, norm, relative, top))
    logs = [math.log(max(relative, TINY)) for _, _, _, relative, _ in rows]
    middle, spread = centre(logs, LEAST_SPREAD)
    layers = [
        AdapterLayer(layer=name, rank=rank, norm=norm, relative=relative, spectral=top, z=(value - middle) / spread)
        for (name, rank, norm, relative, top), value in zip(rows, logs, strict=True)
    ]
    layers.sort(key=lambda layer: -layer.relative)
    ranks = [layer.rank for layer in layers]
    counts = Counter(name.partition(".")[0] for name in adapter.layers)
    return AdapterFacts(
        file=file, layers=len(layers), parts=dict(sorted(counts.items())), ranks=(min(ranks), max(ranks)),
        largest=tuple(layers[:SHOWN]), says=tuple(_says(layers, counts)),
    )  # fmt: skip


def singular(factors: LowRank) -> Tensor:
    """The singular values of ΔW = B A (out, in), descending, float64: those of R_B R_Aᵀ, which is no larger than the
    rank. ΔW itself is not decomposed."""
    (_, right), (_, left) = (torch.linalg.qr(each.double()) for each in (factors.b, factors.a.T))
    return torch.linalg.svdvals(right @ left.T)


def _says(layers: Sequence[AdapterLayer], counts: Counter[str]) -> list[str]:
    ranks = sorted({layer.rank for layer in layers})
    said = ", ".join(f"{number} of {part}" for part, number in sorted(counts.items()))
    width = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = [
        f"it changes {len(layers)} layers ({said}), {width}; the largest change is {layers[0].relative:.3g} times the "
        f"norm of its layer, {layers[0].layer}"
    ]
    out = [layer for layer in layers if layer.z > STANDS_OUT]
    if out:
        names = ", ".join(layer.layer for layer in out[:3])
        lines.append(f"{len(out)} of its layers stand out from the others (robust z above {STANDS_OUT:g}): {names}")
    return lines
