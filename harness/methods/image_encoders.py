"""Which image encoder a defense uses: the one at hand, or the public one. See harness.types.Knowledge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from harness.types import Knowledge

Choice = Literal["given", "public"]
NEEDED: dict[Choice, str] = {"given": "encoder", "public": "public_encoder"}  # what a defense then declares in `needs`


def chosen(knowledge: Knowledge, choice: Choice) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) in [-1, 1] → features (B, D)."""
    if choice == "public":
        assert knowledge.public_encoder is not None, "the harness gives the public encoder to who needs it"
        return knowledge.public_encoder.features
    assert knowledge.encoder is not None, "the harness gives an encoder to who needs it"
    return knowledge.encoder
