"""The provenance of a model that `bench build` made: what its training measured, in a file beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.diffusion.checkpoint import CheckpointError, json_object

FILE = "provenance.json"


def facts(folder: Path) -> dict[str, Any]:
    """What the training of the model in `folder` measured. Raises CheckpointError for a folder without provenance."""
    place = folder / FILE
    found = json_object(place).get("facts") if place.is_file() else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{place}: is no provenance; name a folder of bench build")
    return found
