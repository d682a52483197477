"""[-1, 1] floats ↔ uint8 ↔ PNG. The only module that rescales images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] → [0, 1], clamped."""
    return (images.clamp(-1, 1) + 1) / 2


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → {0..255}, rounded to the nearest."""
    return (to_unit(images) * 255).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """{0..255} → [-1, 1]."""
    return images.float() / 127.5 - 1


def quantise(images: Tensor) -> Tensor:
    """The image after a round trip through 8 bits, in [-1, 1]."""
    return from_uint8(to_uint8(images))


def grey(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as (N, 1, H, W): the luma of ITU-R BT.601, as in Pillow's mode L."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def as_rgb(images: Tensor) -> Tensor:
    """(B, C, H, W) → (B, 3, H, W). What is neither grey nor RGB is shown as the mean over its channels."""
    if images.shape[1] == 3:
        return images
    return (images if images.shape[1] == 1 else images.mean(1, keepdim=True)).expand(-1, 3, -1, -1)


def save_png(image: Tensor, path: Path) -> None:
    """Writes one image (C, H, W) in [-1, 1] to a PNG file."""
    from torchvision.io import write_png

    write_png(to_uint8(image if image.shape[0] in (1, 3) else as_rgb(image[None])[0]), str(path))


def load_png(path: Path) -> Tensor:
    """Reads a PNG file as (C, H, W) in [-1, 1]."""
    from torchvision.io import read_image

    return from_uint8(read_image(str(path)))


def grid(rows: Sequence[Tensor], scale: int = 3, pad: int = 1) -> Tensor:
    """Rows of images (B, C, H, W), each in [-1, 1], as rows of one picture (3, H', W'), enlarged `scale` times."""
    from torchvision.utils import make_grid

    columns = max(len(row) for row in rows)
    blank = [torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])]) for row in rows]
    stacked = torch.cat([as_rgb(row.clamp(-1, 1)) for row in blank])
    big = torch.nn.functional.interpolate(stacked, scale_factor=scale, mode="nearest")
    return make_grid(big, nrow=columns, padding=pad * scale, pad_value=1.0)
