"""Sources of randomness: every generator is derived from names, so no result depends on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(*names: object) -> int:
    """A 63-bit seed that is a function of the names alone, e.g. derive(root_seed, "attack")."""
    text = "\x1f".join(str(name) for name in names).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(*names: object) -> torch.Generator:
    """A CPU generator seeded by the names. Noise is always drawn on the CPU, so that a GPU sees the same numbers."""
    return torch.Generator().manual_seed(derive(*names))


def image_seeds(root: int, stage: str, n: int) -> tuple[int, ...]:
    """One seed per image for n images; the seed of image i does not depend on n."""
    return tuple(derive(root, stage, i) for i in range(n))


def image_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Starting noise (B, *shape), row i from seeds[i] alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, "x_T")) for seed in seeds])
