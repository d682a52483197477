"""Models made from their architectures alone: part → configuration, with the class of the part as `_class_name`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.diffusion.model import DiffusionModel
from harness.diffusion.networks import built

Architecture = Mapping[str, Mapping[str, Any]]


def untrained(architecture: Architecture, tokenizer: Callable[[int], Any] | None = None) -> DiffusionModel:
    """The model that an architecture describes, on torch's default device, with random weights and frozen.

    The weights are always the same. tokenizer: the number of tokens → the tokenizer, of an architecture with a text
    encoder.
    """
    import diffusers

    def network(part: str) -> Any:
        if part not in architecture:
            return None
        config = dict(architecture[part])
        return built(config, config.pop("_class_name")).eval().requires_grad_(False)

    settings = dict(architecture["scheduler"])
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(0)
        denoiser = network("unet")
        vae = network("vqvae" if "vqvae" in architecture else "vae")
        text = network("text_encoder")
    tokens = None if text is None or tokenizer is None else tokenizer(text.config.vocab_size)
    return DiffusionModel(denoiser, scheduler, vae, text, tokens)
