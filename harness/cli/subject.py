"""A model of one's own: what `bench scan`, `bench purify` and `bench calibrate` know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.common import as_json, plugin_files, strict_option

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.scan import Population
    from harness.types import Knowledge

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
    """Raises CheckpointError for what cannot be loaded, UnknownName for a plugin that there is not.

    population: a file of clean models; default: those beside the embedded weights.
    """
    import torch

    from harness import hub
    from harness.scan import read_population, signature

    plugin = None if like is None else registry.build("models", like)
    source = hub.Source(where, revision)
    directory = source.fetch()
    model = hub.load(hub.Source(str(directory)) if source.directory is None else source)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    populations = list(known_populations(registry)) if population is None else [read_population(population)]
    if plugin is not None:
        matching = [population for population in populations if population.model == plugin.name]
    else:
        matching = [population for population in populations if dict(population.signature) == signature(model)]
        plugin = registry.build("models", matching[0].model) if matching else None
    return Subject(where, directory, model, plugin, matching[0] if matching else None)


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
    from harness.types import Data, Knowledge

    rng, like, found = generator(seed, "knowledge"), subject.like, {}
    if data is not None:
        from harness import imagedata

        found["data"] = imagedata.read(data, ("train",), side_of(subject.model))
    elif like is not None and "data" in needs:
        whole: Data = like.data()
        share = min(len(whole), max(LEAST, round(SHARE * len(whole))))
        found["data"] = whole.rows(torch.randperm(len(whole), generator=rng)[:share])
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


def side_of(model: Any) -> int:
    """Pixels of the model's images."""
    side = model.shape[-1]
    return side if model.vae is None else side * 2 ** (len(model.vae.config.block_out_channels) - 1)


def listen(quiet: bool) -> None:
    from harness import events
    from harness.cli.build import progress_lines

    if not quiet:
        events.listen(progress_lines())
