"""Closed-form edits of the projections of the text in cross-attention and joint attention.

The form is that of TIME (Orgad, Kawar & Belinkov 2023, arXiv:2303.08084), with the weights of UCE (Gandikota et al.
2024, arXiv:2308.14761).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.diffusion.model import DiffusionModel


def projections(denoiser: Any) -> list[Tensor]:
    """The weights (out, D) of to_k and to_v of every cross-attention layer."""
    named = denoiser.named_parameters()
    return [p for name, p in named if ".attn2.to_k." in name or ".attn2.to_v." in name]


def joint_projections(denoiser: Any) -> list[tuple[Any, list[Tensor]]]:
    """For each block of a transformer with joint attention, in order: the layer whose input is the text's stream, and
    the weights (out, D) of the keys and values that are made of it (add_k_proj, add_v_proj)."""
    layers = [block.attn for block in denoiser.transformer_blocks]
    return [(layer.add_k_proj, [layer.add_k_proj.weight, layer.add_v_proj.weight]) for layer in layers]


@torch.no_grad()
def stream(model: DiffusionModel, block: int, states: Tensor, times: Tensor, context: Tensor) -> Tensor:
    """The text's stream (S·B·L, D) that reaches a block's projections at states x_t (S, B, C, H, W) and timesteps (S,).

    context (B, L + 1, D') from `embed`. Unlike the embeddings, the stream depends on t and, behind the first block, on
    the image and on the projections of the blocks before.
    """
    found: list[Tensor] = []
    layer, _ = joint_projections(model.denoiser)[block]
    hook = layer.register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(0, 1)))
    try:
        for x_t, t in zip(states, times, strict=True):
            model.eps(x_t, t.to(model.device).expand(len(x_t)), context)
    finally:
        hook.remove()
    return torch.cat(found)


def edited(weight: Tensor, k: Tensor, goal: Tensor, lam: float) -> Tensor:
    """W' (out, D) = argmin Σ_i ‖W' k_i - W goal_i‖² + λ ‖W' - W‖².

    W is (out, D), the keys k are (N, D), and `goal` (N, D) are the embeddings whose projections the keys get. Scale
    both embeddings of a pair by √w to give the pair the weight w.
    """
    identity = torch.eye(weight.shape[1]).to(weight)
    left = lam * weight + weight @ goal.T @ k
    return torch.linalg.solve(lam * identity + k.T @ k, left, left=False)
