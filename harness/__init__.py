"""What a plugin author imports. Nothing heavy is loaded before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOME = {
    "hookimpl": "hookspecs",
    **dict.fromkeys(
        ["Backdoor", "Backdoored", "Data", "Defended", "Inputs", "Knowledge", "Score", "TargetContext"], "types"
    ),
    **dict.fromkeys(["DDIM", "DDPM", "DiffusionModel"], "diffusion"),
    **dict.fromkeys(["Examples", "denoising_loss", "draw", "minimize"], "training"),
    **dict.fromkeys(["Evidence", "mean", "rate", "unmeasured"], "evidence"),
    "progress": "events",
}


def __dir__() -> list[str]:
    return sorted(HOME)


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'harness' has no attribute '{name}'; it offers {', '.join(sorted(HOME))}")
    return getattr(import_module(f"harness.{HOME[name]}"), name)
