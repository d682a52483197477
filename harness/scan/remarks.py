"""What was read of a model's directory in another way than its publisher may think: sentences for a report.

None of it changes a verdict: weights of a variant, JSON with a byte order mark, settings that the installed diffusers
does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from harness.diffusion import checkpoint, networks
from harness.diffusion.model_files import ModelFiles

SHOWN = 5  # names of a list
LONGEST = 60  # characters of a name of others


def remarks(directory: Path) -> list[str]:
    """Sentences on a directory that `checkpoint.load` reads. Raises CheckpointError."""
    files = ModelFiles(directory)
    parts = checkpoint.parts_of(files)
    return [*_variants(files, parts), *_marked(files, directory), *_unknown(files, parts)]


def _variants(files: ModelFiles, parts: dict[str, tuple[str, str]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, (folder, cls) in parts.items():
        if cls in networks.STEMS and (variant := files.variant(folder, networks.STEMS[cls])):
            found.setdefault(variant, []).append(name)
    return [
        f"Of {_listed(names)}, the weights of the variant {variant} were read: there are none without a variant."
        for variant, names in found.items()
    ]


def _marked(files: ModelFiles, directory: Path) -> list[str]:
    marked = [name for name in checkpoint.read_files(directory) if name.endswith(".json") and files.marked(name)]
    if not marked:
        return []
    begin = "begins" if len(marked) == 1 else "begin"
    return [f"{_listed(marked)} {begin} with a byte order mark, which was passed over; diffusers does not read it."]


def _unknown(files: ModelFiles, parts: dict[str, tuple[str, str]]) -> list[str]:
    """Of networks and schedules of diffusers. A schedule's configuration often has settings of other schedulers."""
    of_schedules = {name for cls in checkpoint.PARTS["scheduler"] for name in networks.defaults(cls)}
    said = []
    for folder, cls in parts.values():
        schedule = cls.endswith("Scheduler")
        if not schedule and networks.STEMS.get(cls) != "diffusion_pytorch_model":
            continue
        place = f"{folder}/" if folder else ""
        place += "scheduler_config.json" if schedule else "config.json"
        known = of_schedules if schedule else set(networks.defaults(cls))
        names = [name for name in files.json(place) if name not in known and not name.startswith("_")]
        if names:
            version = metadata.version("diffusers")
            said.append(f"{place} has settings that diffusers {version} does not know: {_listed(names)}.")
    return said


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:LONGEST] for name in names[:SHOWN]) + more
