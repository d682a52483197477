"""A model of one's own: what `bench scan`, `bench purify` and `bench calibrate` know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.common import as_json, check_device, plugin_files, strict_option

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.scan import Population
    from harness.types import Data, Knowledge

SHARE, LEAST = 0.1, 512  # clean data that a defense is given, as in a run
PROMPTS = 100


def model_options(command: Any) -> Any:
    """Which model, what kind it is, and what is known that fits it."""
    options = [
        click.argument("model"),
        click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of a hub model."),
        click.option("--like", metavar="MODEL", help="The plugin whose data, prompts and population fit this model."),
        click.option(
            "--population", type=click.Path(path_type=Path), help="Clean models, as bench calibrate -o wrote."
        ),
        click.option("--data", type=click.Path(path_type=Path), help="Clean data: parquet files or pictures."),
        click.option("--prompts", type=click.Path(path_type=Path), help="Clean prompts, one a line."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of detectors and purifications."),
        click.option("--device", default=None, metavar="NAME", help="Such as cuda; default: cuda where there is one."),
        plugin_files,
        strict_option,
        as_json,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Subject:
    """The model under test, where it was found, and the plugin that it is taken to be like."""

    name: str
    directory: Path
    model: Any
    like: Any | None
    population: Population | None


def opened(
    where: str, revision: str, like: str | None, device: str | None, registry: Registry, population: Path | None = None
) -> Subject:
    """Raises CheckpointError for what cannot be loaded, UnknownName for a plugin that there is not, click.UsageError
    for one of another kind of model and for a device that this machine does not have.

    population: a file of clean models; default: those beside the embedded weights.
    """
    import torch

    from harness import hub
    from harness.scan import read_population, signature

    check_device(device)
    plugin = None if like is None else registry.build("models", like)
    source = hub.Source(where, revision)
    directory = source.fetch()
    model = hub.load(hub.Source(str(directory)) if source.directory is None else source)
    if plugin is not None:
        _check_like(plugin, where, model, registry)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    populations = list(known_populations(registry)) if population is None else [read_population(population)]
    if plugin is not None:
        matching = [population for population in populations if population.model == plugin.name]
    else:
        matching = [population for population in populations if dict(population.signature) == signature(model)]
        plugin = registry.build("models", matching[0].model) if matching else None
    return Subject(where, directory, model, plugin, matching[0] if matching else None)


def _check_like(plugin: Any, where: str, model: Any, registry: Registry) -> None:
    """Raise click.UsageError where only one of both takes prompts; it names the plugins of the other kind."""
    if plugin.conditional == model.conditional:
        return
    ours, theirs = ("no prompts", "prompts") if plugin.conditional else ("prompts", "no prompts")
    fitting = [name for name, cls in registry.classes("models").items() if cls().conditional == model.conditional]
    raise click.UsageError(f"--like {plugin.name} takes {theirs}, {where} {ours}; name {' or '.join(fitting)}")


def known_populations(registry: Registry) -> Iterator[Population]:
    """The populations of clean models that lie beside embedded weights."""
    from harness.checkpoint import CheckpointError, embedded
    from harness.scan import POPULATION, read_population

    for name, cls in registry.classes("models").items():
        try:
            path = embedded(cls(), name) / POPULATION
        except CheckpointError:  # a model without embedded weights
            continue
        if path.is_file():
            yield read_population(path)


def unmet(needs: Sequence[str], subject: Subject, given: Mapping[str, Any]) -> str | None:
    """Which knowledge is missing, in words."""
    for need in needs:
        if given.get(need) is not None or (subject.like is not None and need != "trigger" and need != "clean_model"):
            continue
        ways = {
            "data": "--data DIR or --like MODEL", "prompts": "--prompts FILE or --like MODEL",
            "trigger": "--trigger SPEC", "words": "--like MODEL", "encoder": "--like MODEL",
        }  # fmt: skip
        way = f"give {ways[need]}" if need in ways and need in {*given, "words", "encoder"} else "a scan has none"
        return f"it needs {need.replace('_', ' ')}: {way}"
    return None


def known(subject: Subject, data: Path | None, prompts: Path | None, seed: int, needs: set[str]) -> Knowledge:
    """What the user gave, and for the rest of `needs` what the model that this one is like has."""
    import torch

    from harness.seeds import generator
    from harness.types import Knowledge

    rng, like, found = generator(seed, "knowledge"), subject.like, {}
    if data is not None:
        from harness import imagedata

        read = imagedata.read(data, ("train",), pixels(subject.model)[-1])
        found["data"] = _fitting(read, subject.model, f"--data {data}", "--like MODEL")
    elif like is not None and "data" in needs:
        whole: Data = like.data()
        share = min(len(whole), max(LEAST, round(SHARE * len(whole))))
        some = whole.rows(torch.randperm(len(whole), generator=rng)[:share])
        found["data"] = _fitting(some, subject.model, f"the data of {like.name}", "--data DIR")
    if prompts is not None:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
        found["prompts"] = tuple(line for line in lines if line)
        if not found["prompts"]:
            raise click.UsageError(f"--prompts {prompts}: no prompts in it")
    elif like is not None and subject.model.conditional:
        found["prompts"] = like.prompts("train", PROMPTS, rng)
    if like is not None and "words" in needs:
        found["words"] = like.words()
    if like is not None and "encoder" in needs:
        scorer, judge = like.scorer(), like.judge()
        found["encoder"] = scorer.image_features if scorer is not None else judge.features
    return Knowledge(**found)


def _fitting(data: Data, model: Any, given: str, other: str) -> Data:
    """The data in the model's channels: colours become grey where it has one. Raises click.UsageError for images that
    do not fit."""
    from harness.images import grey

    wanted, images = pixels(model), data.images
    if images.shape[1] == 3 and wanted[0] == 1:
        images = grey(images)
    if images.shape[1:] != wanted:
        has, takes = _sides(images.shape[1:]), _sides(wanted)
        raise click.UsageError(f"{given}: images of {has} do not fit a model of {takes}; give others with {other}")
    return replace(data, images=images)


def pixels(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the model's images."""
    channels, height, width = model.shape
    if model.vae is None:
        return channels, height, width
    config = model.vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    return config.in_channels, height * scale, width * scale


def _sides(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def listen(quiet: bool) -> None:
    from harness import events
    from harness.cli.build import progress_lines

    if not quiet:
        events.listen(progress_lines())
