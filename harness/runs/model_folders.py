"""Models as directories that are read again as they were read: with the same samples, by this harness and by diffusers.

It stands beside `harness.diffusion.checkpoint`, which writes the directory, because it changes no number of a model
whose schedule says all of its settings, as those of the shipped models do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel
    from harness.diffusion.model_files import ModelFiles

DEFAULTED = "_use_default_values"  # diffusers' name for the settings that a scheduler's config did not say
OVERRIDDEN = ("steps_offset", "clip_sample")  # settings that StableDiffusionPipeline changes in its scheduler
INDEX = "model_index.json"


def save(
    model: DiffusionModel, directory: Path, labels: dict[str, str] | None = None, fp16: bool = False,
    like: Path | None = None,
) -> None:  # fmt: skip
    """`checkpoint.save`, with the settings of the schedule that were read, and no others.

    diffusers writes a schedule with the defaults of its class. A sampler of another class takes them for settings of
    the model, and its own defaults where nothing is said: `set_alpha_to_one` is False in PNDMScheduler and True in
    DDIMScheduler. like: the directory that the model was read from, whose class of pipeline is kept if it has the same
    parts; its defaults, such as the number of steps, are those of the class.
    """
    from harness.diffusion import checkpoint, schedules
    from harness.diffusion.model_files import ModelFiles

    read = model.scheduler
    model.scheduler = copy.deepcopy(read)  # the pipeline changes it
    try:
        checkpoint.save(model, directory, labels, fp16)
    finally:
        model.scheduler = read
    if not read.config.get(schedules.EVEN):
        place = directory / "scheduler" / "scheduler_config.json"
        _rewrite(place, _as_read(json.loads(place.read_text()), read.config))
    if like is not None:
        _keep_class(directory / INDEX, ModelFiles(like))


def _as_read(written: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The written settings without the defaults that were filled in, and with those that were read."""
    said = {name: value for name, value in written.items() if name not in read.get(DEFAULTED, ())}
    return said | {name: read[name] for name in OVERRIDDEN if name in said}


def _keep_class(place: Path, before: ModelFiles) -> None:
    """Name the pipeline of another directory, which was read as a model, in the index `place` if both have the same
    parts."""
    if INDEX not in before:
        return
    index, other = json.loads(place.read_text(encoding="utf-8")), before.json(INDEX)
    if _parts(index) == _parts(other) and "_class_name" in other:
        _rewrite(place, {**index, "_class_name": other["_class_name"]})


def _parts(index: Mapping[str, Any]) -> set[str]:
    """The names of the parts that an index says are there and that make images."""
    from harness.diffusion.checkpoint import IGNORED

    there = {name for name, entry in index.items() if isinstance(entry, list) and entry[-1] is not None}
    return there - set(IGNORED)


def _rewrite(place: Path, document: Mapping[str, Any]) -> None:
    """Write JSON as diffusers does."""
    place.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
