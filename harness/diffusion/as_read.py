"""What a written model directory keeps of the directory that the model was read from: the settings of the schedule that
were said there, and the class of the pipeline.

diffusers writes a schedule with the defaults of its class. A sampler of another class takes them for settings of the
model, and its own defaults where nothing is said: `set_alpha_to_one` is False in PNDMScheduler and True in
DDIMScheduler.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from harness.diffusion import schedules
from harness.diffusion.model_files import ModelFiles

DEFAULTED = "_use_default_values"  # diffusers' name for the settings that a scheduler's config did not say
OVERRIDDEN = ("steps_offset", "clip_sample")  # settings that StableDiffusionPipeline changes in its scheduler
INDEX = "model_index.json"


def keep_schedule(directory: Path, read: Mapping[str, Any]) -> None:
    """Rewrite the schedule in `directory` without the defaults that were filled in, and with the settings that were
    read. read: the config of the scheduler before it was written."""
    if read.get(schedules.EVEN):  # of FLUX, which has another form in memory
        return
    place = directory / "scheduler" / "scheduler_config.json"
    written = json.loads(place.read_text(encoding="utf-8"))
    said = {name: value for name, value in written.items() if name not in read.get(DEFAULTED, ())}
    _rewrite(place, said | {name: read[name] for name in OVERRIDDEN if name in said})


def keep_class(directory: Path, like: Path, imageless: Collection[str]) -> None:
    """Name the class of the pipeline in `like` in the index of `directory`, if both have the same parts. imageless:
    parts that make no image and do not count."""
    before = ModelFiles(like)
    if INDEX not in before:
        return
    place = directory / INDEX
    index, other = json.loads(place.read_text(encoding="utf-8")), before.json(INDEX)
    if _parts(index) - set(imageless) == _parts(other) - set(imageless) and "_class_name" in other:
        _rewrite(place, {**index, "_class_name": other["_class_name"]})


def _parts(index: Mapping[str, Any]) -> set[str]:
    """The names of the parts that an index says are there."""
    return {name for name, entry in index.items() if isinstance(entry, list) and entry and entry[-1] is not None}


def _rewrite(place: Path, document: Mapping[str, Any]) -> None:
    """Write JSON as diffusers does."""
    place.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
