"""Networks whose layers have fewer channels than their config describes: which layers, and how to rebuild them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def fit(net: nn.Module) -> None:
    """Sets the channel numbers that layers and diffusers' blocks store to those of their weights."""
    for m in net.modules():
        kind, layer = type(m).__name__, _Layer(m)
        if isinstance(m, nn.Conv2d):
            m.out_channels, m.in_channels = m.weight.shape[0], m.weight.shape[1] * m.groups
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = m.weight.shape
        elif isinstance(m, nn.GroupNorm) and m.affine:
            m.num_channels = len(m.weight)
        elif isinstance(m, nn.LayerNorm) and m.elementwise_affine:
            m.normalized_shape = tuple(m.weight.shape)
        elif kind in ("Downsample2D", "Upsample2D") and isinstance(layer.conv, nn.Conv2d):
            layer.channels, layer.out_channels = layer.conv.weight.shape[1], layer.conv.weight.shape[0]
        elif kind == "ResnetBlock2D":
            layer.in_channels, layer.out_channels = layer.conv1.weight.shape[1], layer.conv2.weight.shape[0]
            for resize in (layer.upsample, layer.downsample):
                if type(resize).__name__ in (
                    "Downsample2D",
                    "Upsample2D",
                ):  # it has no weights
                    resize.channels = resize.out_channels = layer.in_channels
        elif kind == "Attention":
            layer.inner_dim, layer.query_dim = layer.to_q.weight.shape
            layer.inner_kv_dim, layer.cross_attention_dim = layer.to_k.weight.shape
            layer.out_dim = layer.to_out[0].weight.shape[0]


def _Layer(m: Any) -> Any:
    """The same module, without type checks."""
    return m


def reshaped(net: Any) -> dict[str, list[int]]:
    """name → shape of every weight whose shape differs from the network's config; {} for an unpruned network."""
    with torch.device("meta"):
        whole = {name: weight.shape for name, weight in type(net).from_config(net.config).state_dict().items()}
    return {name: list(w.shape) for name, w in net.state_dict().items() if name in whole and w.shape != whole[name]}


def reshape(net: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Gives the weights named in `shapes` empty tensors of these shapes, then calls `fit`.

    Raises ValueError for a name that the network does not have, or for a shape that is not the old one with fewer
    channels.
    """
    weights = dict(net.named_parameters())
    for name, shape in shapes.items():
        old = tuple(weights[name].shape) if name in weights else None
        smaller = (
            old is not None and len(shape) == len(old) and all(0 < n <= o for n, o in zip(shape, old, strict=True))
        )
        if not smaller:
            raise ValueError(f"{name} of shape {tuple(shape)} is no pruned form of this network's {old}")
        owner, _, own = name.rpartition(".")
        setattr(net.get_submodule(owner), own, nn.Parameter(torch.empty(shape), requires_grad=False))
    fit(net)
