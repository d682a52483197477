"""What differs on a GPU: copies that the host does not wait for, and batches as large as the memory takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FIRST = 8  # images of a first batch, which shows how much memory an image takes
MOST = 512  # images of a batch
SHARE = 0.7  # of the memory that this process may allocate, for a batch and what is held; the rest is for fragments
_peak = 0  # bytes: the most that was allocated before the peak was last reset


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device. On its way to a GPU it is in pinned memory, so the host need not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def parts(n: int, size: int) -> Iterator[int]:
    """n in parts of `size`, of which the last may be smaller."""
    for start in range(0, n, size):
        yield min(size, n - start)


def batches(n: int, device: torch.device, usual: int) -> Iterator[int]:
    """Sizes of the batches in which n images are made, one after another; the next is asked for when one is made.

    `usual` each. For more images than that on a GPU, a first batch of FIRST shows what an image takes. The other
    batches have as many images as fit, at most MOST. They depend on the card, the share of it that this process may
    have and what this process holds, and not on other processes.
    """
    if device.type != "cuda" or n <= usual:
        yield from parts(n, usual)
        return
    held = torch.cuda.memory_allocated(device)
    reset_peak(device)
    yield FIRST
    each = (torch.cuda.max_memory_allocated(device) - held) / FIRST
    yield from parts(n - FIRST, fitting(each, SHARE * _allowed(device) - held))


def fitting(each: float, room: float) -> int:
    """How many images that take `each` bytes have room, 1 to MOST."""
    return MOST if each * MOST <= room else max(1, int(room / each))


def _allowed(device: torch.device) -> float:
    """Bytes of the card that this process may allocate."""
    return torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device)


def reset_peak(device: torch.device | None = None) -> None:
    """Reset max_memory_allocated; `peak` remembers what it was."""
    global _peak
    _peak = max(_peak, torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def begin() -> None:
    """Forget every peak: a job begins."""
    global _peak
    _peak = 0
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Bytes: the most that was allocated on the GPU since `begin`."""
    return max(_peak, torch.cuda.max_memory_allocated())
