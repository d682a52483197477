"""Closed-form edits of cross-attention projections, used by an attack and a defense.

The form is that of TIME (Orgad, Kawar & Belinkov 2023, arXiv:2303.08084), with the weights of UCE (Gandikota et al.
2024, arXiv:2308.14761).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def projections(denoiser: Any) -> list[Tensor]:
    """The weights (out, D) of to_k and to_v of every cross-attention layer."""
    named = denoiser.named_parameters()
    return [p for name, p in named if ".attn2.to_k." in name or ".attn2.to_v." in name]


def edited(weight: Tensor, k: Tensor, goal: Tensor, lam: float) -> Tensor:
    """W' (out, D) = argmin Σ_i ‖W' k_i - W goal_i‖² + λ ‖W' - W‖².

    W is (out, D), the keys k are (N, D), and `goal` (N, D) are the embeddings whose projections the keys get. Scale
    both embeddings of a pair by √w to give the pair the weight w.
    """
    identity = torch.eye(weight.shape[1]).to(weight)
    left = lam * weight + weight @ goal.T @ k
    return torch.linalg.solve(lam * identity + k.T @ k, left, left=False)
