"""A user's own model: what `bench scan`, `bench purify` and `bench calibrate` know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.common import as_json, check_device, hush_libraries, note, plugin_files, strict_option
from harness.cli.completion import Named

if TYPE_CHECKING:
    from harness.diffusion.embedding_files import Embedding
    from harness.diffusion.model import DiffusionModel
    from harness.judges.hub import Source
    from harness.registry import Registry
    from harness.scan.verdict import Population
    from harness.types import Data, Knowledge, Trigger


def config_option(command: Any) -> Any:
    """The option on the configurations that a single file does not hold."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="A diffusers directory with the configurations of a single-file MODEL that is not of Stable Diffusion 1 "
        "or SDXL; of FLUX also with the parts that the file does not hold.",
    )(command)


def model_options(command: Any) -> Any:
    """The argument MODEL, and the options on its kind and the data that fit it."""
    return click.argument("model")(options_of_kind(command))


def options_of_kind(command: Any) -> Any:
    """Options: which kind of model, and the data that fit it."""
    options = [
        click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of a hub model."),
        click.option(
            "--like",
            metavar="MODEL",
            type=Named("models"),
            help="The model plugin whose data, prompts and clean models fit MODEL.",
        ),
        click.option(
            "--population",
            type=click.Path(path_type=Path),
            help="Detection scores of clean models: a file that bench calibrate -o wrote.",
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="Clean training data: parquet or image files.",
        ),
        click.option("--prompts", type=click.Path(path_type=Path), help="A file of clean prompts, one per line."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the detectors or of the defense."),
        click.option("--device", default=None, metavar="NAME", help="Device such as cuda; default: cuda if available."),
        plugin_files,
        strict_option,
        as_json,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Subject:
    """The model under test, its origin, and the plugin that it is assumed to resemble. file: the one file that was
    given, a whole pipeline, an adapter or an embedding."""

    name: str
    directory: Path
    model: Any
    like: Any | None
    population: Population | None
    file: Path | None = None
    embedding: Embedding | None = None

    @property
    def adapted(self) -> bool:
        """Whether an adapter was given, and the model is its base with it."""
        return self.file is not None and self.model.adapter is not None

    @property
    def beside_a_base(self) -> bool:
        """Whether what was given is a model only with its base: an adapter or an embedding."""
        return self.adapted or self.embedding is not None


def opened(
    where: str, revision: str, like: str | None, device: str | None, registry: Registry, population: Path | None = None,
    base: str | None = None, config: Path | None = None,
) -> Subject:  # fmt: skip
    """The model at `where`. base: of an adapter or an embedding, the model that it is for. config: of a single file, a
    directory with the configurations, and of FLUX the parts, that it does not hold.

    Raises CheckpointError for a model that cannot be loaded, UnknownName for an unknown plugin, click.UsageError for a
    plugin of another kind of model and for a device that this machine does not have. population: a file of clean
    models; default: those next to the embedded weights.
    """
    import torch

    from harness.diffusion import single_file
    from harness.diffusion.model_files import CheckpointError
    from harness.judges import hub
    from harness.scan.verdict import read_population, signature

    check_device(device)
    hush_libraries()
    plugin = None if like is None else registry.build("models", like)
    adapter, embedding = hub.adapter_in(where), None
    word = None if adapter is not None else hub.embedding_in(where)
    if (adapter or word) is None:
        source = hub.Source(where, revision, config=config)
        directory = _fetched(source)
        model = hub.load(hub.Source(str(directory)) if source.directory is None else source)
        laid_out = single_file.origin(directory)
        file = None if laid_out is None else laid_out.file
    else:
        if base is None:
            what = "a low-rank adapter" if word is None else "a textual-inversion embedding"
            raise CheckpointError(f"{where}: {what}, which is a model only with its base; --base DIR names that")
        source = hub.Source(base)
        directory = _fetched(source)
        file = adapter or word
        if adapter is not None:
            model = hub.with_adapter(hub.Source(str(directory)), adapter)
        else:
            assert word is not None
            model, embedding = hub.with_embedding(hub.Source(str(directory)), word)
    if plugin is not None:
        _check_like(plugin, where, model, registry)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stored = list(known_populations(registry)) if population is None else [read_population(population)]
    populations = [_with_canonical_specs(each, registry) for each in stored]
    if plugin is not None:
        matching = [population for population in populations if population.model == plugin.name]
    else:
        matching = [population for population in populations if dict(population.signature) == signature(model)]
        plugin = registry.build("models", matching[0].model) if matching else None
    return Subject(where, directory, model, plugin, matching[0] if matching else None, file, embedding)


def _fetched(source: Source) -> Path:
    """The directory of a model. Raises CheckpointError; a name that is no directory may be a mistyped path."""
    from harness.diffusion.model_files import CheckpointError

    try:
        return source.fetch()
    except CheckpointError as error:
        if source.directory is not None:
            raise
        raise CheckpointError(f"{source.where}: no such directory, and as a hub id: {error}") from error


def say_what_was_read(directory: Path) -> None:
    """Lines on what was left alone or read in another way in the directory of a model, which a scan's report has."""
    from harness.judges import hub
    from harness.scan.remarks import remarks

    for line in (*remarks(directory), *hub.ignored(directory).sentences()):
        note(f"note: {line}")


def pictures(model: DiffusionModel, inputs: Any, where: str) -> Any:
    """Images (n, C, H, W) in [-1, 1] of the model at `where`. Raises CheckpointError where a layer fails."""
    from harness.diffusion.model_files import CheckpointError, short
    from harness.scan import verdict

    try:
        return verdict.pictures(model, inputs)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # sizes that do not fit together, most often
        raise CheckpointError(
            f"{where}: cannot be sampled ({short(error)}); its configs may be those of other weights"
        ) from None


def opened_base(where: str, name: str, model: DiffusionModel) -> DiffusionModel:
    """The base `name` at `where`, on the device of `model`. Raises CheckpointError, in one line that names the way out,
    for one that cannot be loaded or has other text encoders than the model."""
    from harness.diffusion.model_files import CheckpointError
    from harness.judges import hub
    from harness.scan.comparison import check_base

    try:
        source = hub.Source(where)
        directory = _fetched(source)
        base = hub.load(hub.Source(str(directory)) if source.directory is None else source)
    except CheckpointError as error:
        says = str(error)
        raise CheckpointError(f"--base {says if says.startswith(name) else f'{name}: {says}'}") from None
    check_base(model, base, name)
    return base.to(model.device)


def _with_canonical_specs(population: Population, registry: Registry) -> Population:
    """The population with the specs of its detectors as they are written today: a parameter that came later has its
    default. A detector that is not here keeps its spec."""
    from harness.registry import RegistryError

    suspicion = {}
    for spec, values in population.suspicion.items():
        try:
            suspicion[registry.canonical("defenses", spec)] = values
        except RegistryError:
            suspicion[spec] = values
    return replace(population, suspicion=suspicion)


def _check_like(plugin: Any, where: str, model: Any, registry: Registry) -> None:
    """Raises click.UsageError if only one of both takes prompts; the message names the plugins of the other kind."""
    if plugin.conditional == model.conditional:
        return
    ours, theirs = ("no prompts", "prompts") if plugin.conditional else ("prompts", "no prompts")
    fitting = [name for name, cls in registry.classes("models").items() if cls().conditional == model.conditional]
    raise click.UsageError(f"--like {plugin.name} takes {theirs}, {where} {ours}; name {' or '.join(fitting)}")


def known_populations(registry: Registry) -> Iterator[Population]:
    """The populations of clean models that are stored next to embedded weights."""
    from harness.diffusion.checkpoint import CheckpointError, embedded
    from harness.scan.verdict import POPULATION, read_population

    for name, cls in registry.classes("models").items():
        try:
            path = embedded(cls(), name) / POPULATION
        except CheckpointError:  # a model without embedded weights
            continue
        if path.is_file():
            yield read_population(path)


def unmet(needs: Sequence[str], subject: Subject, given: Mapping[str, Any]) -> str | None:
    """Which knowledge is missing, as text."""
    for need in needs:
        if need == "public_encoder":  # everybody has it
            continue
        if given.get(need) is not None or (subject.like is not None and need != "trigger" and need != "clean_model"):
            continue
        ways = {
            "data": "--data DIR or --like MODEL", "prompts": "--prompts FILE or --like MODEL",
            "trigger": "--trigger SPEC", "words": "--like MODEL", "encoder": "--like MODEL",
            "judge": "--like MODEL", "clean_model": "--base DIR",
        }  # fmt: skip
        possible = {*given, "words", "encoder", "judge"}
        way = f"give {ways[need]}" if need in ways and need in possible else "a scan has none"
        return f"it needs {need.replace('_', ' ')}: {way}"
    return None


def known(
    subject: Subject,
    data: Path | None,
    prompts: Path | None,
    seed: int,
    needs: set[str],
    trigger: Trigger | None = None,
    base: DiffusionModel | None = None,
) -> Knowledge:
    """The knowledge that the user gave; for the rest of `needs`, that of the model's plugin, drawn as in a run. base:
    the clean model."""
    from harness.judges import image_folders
    from harness.stages import knowledge

    given = knowledge.Given(trigger, prompts=None if prompts is None else _lines(prompts))
    if data is not None:
        read = image_folders.read(data, ("train",), pixels(subject.model)[1:])
        given = replace(given, data=_fitting(read, subject.model, f"--data {data}", "--like MODEL"))
    found = knowledge.draw(needs - {"clean_model"}, subject.like, seed, given)
    if data is None and subject.like is not None and found.data is not None:
        found = replace(
            found, data=_fitting(found.data, subject.model, f"the data of {subject.like.name}", "--data DIR")
        )
    return replace(found, clean_model=base) if "clean_model" in needs else found


def _lines(prompts: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise click.UsageError(f"--prompts {prompts}: no prompts in it")
    return tuple(line for line in lines if line)


def _fitting(data: Data, model: Any, given: str, other: str) -> Data:
    """The data in the channels of the model: colours become grey if it has one channel.

    Raises click.UsageError for images that do not fit.
    """
    from harness.diffusion.images import grey

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
    from harness.cli.build import progress_lines
    from harness.diffusion import events

    if not quiet:
        events.listen(progress_lines())
