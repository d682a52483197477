"""`bench calibrate`: the scores of detectors on clean models, with which `bench scan` compares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from harness.cli import Exit
from harness.cli.common import (
    as_json,
    echo,
    hush_libraries,
    loaded,
    naming,
    note,
    outside,
    plugin_files,
    print_json,
    seconds,
    strict_option,
    writable,
)
from harness.cli.scan import applicable
from harness.cli.subject import Subject, known, listen, say_what_was_read
from harness.runs.jsonable import to_jsonable


@click.command(short_help="Measure the scores of detectors on clean models.")
@click.argument("model")
@click.option("--models", type=click.IntRange(5), default=10, show_default=True, help="Clean models to make.")
@click.option(
    "--clean", default="none(steps=300)", show_default=True, help="How to make them: attack `none` with steps."
)
@click.option(
    "--of",
    "directories",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Use these clean models instead.",
)
@click.option(
    "--detector", "detectors", multiple=True, metavar="DEFENSE", help="Detectors; default: those of bench scan."
)
@click.option("--seed", type=int, default=1000, show_default=True, help="Seed of the first clean model.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; default: next to the weights.")
@plugin_files
@strict_option
@as_json
def calibrate(
    model: str, models: int, clean: str, directories: tuple[Path, ...], detectors: tuple[str, ...], seed: int,
    out: Path | None, files: tuple[Path, ...], strict: bool, as_json: bool,
) -> int:  # fmt: skip
    """Compute the detection scores of clean models: of MODEL fine-tuned on clean data, or of the models of --of."""
    import torch

    from harness.diffusion import checkpoint
    from harness.diffusion.model_files import local
    from harness.scan import verdict as scanning

    registry = loaded(files, strict)
    if local(model).exists():
        raise click.UsageError(
            f"{model}: MODEL is a model plugin, such as digits-ddpm; name directories of clean models of its kind with "
            "--of"
        )
    plugin, attack = registry.build("models", model), registry.build("attacks", clean)
    if attack.name != "none" or not attack.steps:
        raise click.UsageError(
            f"--clean {clean}: give attack none with steps; without training all clean models are the same"
        )
    if directories and len(directories) < scanning.LEAST:
        raise click.UsageError(f"--of: {len(directories)} clean models are too few; give at least {scanning.LEAST}")
    path = out.expanduser() if out else checkpoint.embedded(plugin, plugin.name) / scanning.POPULATION
    writable(path, file=True)
    outside(path, directories, file=True)
    hush_libraries()
    for directory in directories:  # before hours of work on the first of them
        if directory.is_dir():
            checkpoint.read_files(directory)
    original = plugin.load().to("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(model, Path(), original, plugin, None)
    asked, skipped = applicable(subject, registry, detectors, given={})
    for line in skipped:
        note(line)
    listen(as_json)
    found: dict[str, list[float]] = {spec: [] for spec in asked}
    models = len(directories) or models
    for k in range(models):
        made = _read(directories[k], original) if directories else _made(attack, subject, seed + k)
        for finding in _of_clean(made, subject, asked, seed + k):
            if finding.suspicion is None:
                raise click.ClickException(f"{finding.detector} failed on a clean model: {finding.error}")
            found[finding.detector].append(finding.suspicion)
            note(
                f"clean model {k + 1}/{models}: {finding.detector} {finding.suspicion:.5g}, {seconds(finding.seconds)}"
            )
    how = {"given": models} if directories else {"attack": registry.canonical("attacks", clean)}
    values = {spec: tuple(values) for spec, values in found.items()}
    population = scanning.Population(plugin.name, scanning.signature(original), values, how | {"first_seed": seed})
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        scanning.write_population(population, path)
    if as_json:
        print_json({"file": path, **to_jsonable(population)})
    else:
        echo(f"{models} clean models of {plugin.name}: {path}")
    return Exit.ok


def _read(directory: Path, original: Any) -> Any:
    """The model of a diffusers directory, which must be of the same kind as the original."""
    from harness.judges import hub
    from harness.scan import verdict as scanning

    source = hub.Source(str(directory))
    model = hub.load(source).to(original.device)
    say_what_was_read(source.fetch())
    if scanning.signature(model) != scanning.signature(original):
        raise click.UsageError(f"--of {directory}: another kind of model, {scanning.signature(model)}")
    return model


def _made(attack: Any, subject: Subject, seed: int) -> Any:
    """A clean model. Attack `none` uses no backdoor, so it is given none."""
    from harness.diffusion.seeds import generator

    backdoor: Any = None
    return attack.implant(subject.model, backdoor, subject.like.data(), generator(seed, "attack")).model  # type: ignore[union-attr]


def _of_clean(model: Any, subject: Subject, asked: Mapping[str, Any], seed: int) -> list[Any]:
    """The findings of the detectors for one clean model.

    Each detector has its own seed, so that the population contains its noise too.
    """
    from harness.scan import verdict as scanning

    knowledge = known(subject, None, None, seed, {need for each in asked.values() for need in each.needs})
    return scanning.examine(asked, model, knowledge, None, seed)
