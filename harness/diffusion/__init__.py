"""Diffusion models: their forward process, samplers, training, images and checkpoints."""

from harness import _moved

globals()["__getattr__"] = _moved.old_names(
    __name__
)  # not as a `def`, which would hide misspelt names from type checkers
