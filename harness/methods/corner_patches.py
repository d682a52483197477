"""Small pictures in a corner of images: their position, and how certainly they are present."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Corner = Literal["top left", "top right", "bottom left", "bottom right"]


def corner(place: Corner, share: float, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a box in a corner. Its sides are `share` of the image's, at least one pixel."""
    h, w = max(1, round(height * share)), max(1, round(width * share))
    y, x = 0 if "top" in place else height - h, 0 if "left" in place else width - w
    return slice(y, y + h), slice(x, x + w)


def dissimilarity(part: Tensor, pattern: Tensor) -> Tensor:
    """(B,) 1 - NCC, the normalised cross-correlation, of (B, C, h, w) with (C, h, w).

    0 = the same up to brightness and contrast, 1 = unrelated, 2 = inverted. It detects a faint pattern as well as a
    strong one.
    """
    seen, wanted = part.flatten(1), pattern.to(part).flatten()
    seen, wanted = seen - seen.mean(1, keepdim=True), wanted - wanted.mean()
    return 1 - (seen @ wanted) / (seen.norm(dim=1) * wanted.norm()).clamp_min(1e-6)


def at_most_one_percent(clean: Tensor, most: float) -> float:
    """The largest threshold, at most `most`, for which at most 1 % of the distances of clean images (N,) are hits."""
    return min(most, torch.quantile(clean, 0.01, interpolation="lower").item() - 1e-6)
