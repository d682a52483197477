"""Samplers that use the schedulers of diffusers, and the predictor-corrector sampler for variance-exploding models."""

from __future__ import annotations

from harness import SAMPLERS, hookimpl


@hookimpl
def samplers() -> list[type]:
    return list(SAMPLERS.values())
