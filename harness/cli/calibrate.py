"""`bench calibrate`: what detectors say of clean models, for `bench scan` to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from harness.cli import Exit
from harness.cli.common import as_json, loaded, note, plugin_files, print_json, seconds, strict_option, writable
from harness.cli.scan import applicable
from harness.cli.subject import Subject, known, listen
from harness.store import plain


@click.command(short_help="Measure what detectors say of clean models.")
@click.argument("model")
@click.option("--models", type=click.IntRange(5), default=10, show_default=True, help="Clean models to make.")
@click.option("--clean", default="none(steps=300)", show_default=True, help="How: attack `none`, clean fine-tuning.")
@click.option(
    "--of",
    "directories",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Clean models that you have, instead.",
)
@click.option("--detector", "detectors", multiple=True, metavar="DEFENSE", help="Which; default: those of bench scan.")
@click.option("--seed", type=int, default=1000, show_default=True, help="Of the first clean model.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; default: beside the weights.")
@plugin_files
@strict_option
@as_json
def calibrate(
    model: str, models: int, clean: str, directories: tuple[Path, ...], detectors: tuple[str, ...], seed: int,
    out: Path | None, files: tuple[Path, ...], strict: bool, as_json: bool,
) -> int:  # fmt: skip
    """Fine-tune clean models of MODEL on clean data, or take those of --of, and store each detector's suspicion."""
    import torch

    from harness import checkpoint
    from harness import scan as scanning

    registry = loaded(files, strict)
    plugin, attack = registry.build("models", model), registry.build("attacks", clean)
    if attack.name != "none" or not attack.steps:
        raise click.UsageError(f"--clean {clean}: give attack none with steps; untrained, all clean models are one")
    if directories and len(directories) < scanning.LEAST:
        raise click.UsageError(f"--of: {len(directories)} clean models say little; give at least {scanning.LEAST}")
    path = out or checkpoint.embedded(plugin, plugin.name) / scanning.POPULATION
    writable(path, file=True)
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
    scanning.write_population(population, path)
    if as_json:
        print_json({"file": path, **plain(population)})
    else:
        click.echo(f"{models} clean models of {plugin.name}: {path}")
    return Exit.ok


def _read(directory: Path, original: Any) -> Any:
    """The model of a diffusers directory, which has to be of the original's kind."""
    from harness import hub
    from harness import scan as scanning

    model = hub.load(hub.Source(str(directory))).to(original.device)
    if scanning.signature(model) != scanning.signature(original):
        raise click.UsageError(f"--of {directory}: another kind of model, {scanning.signature(model)}")
    return model


def _made(attack: Any, subject: Subject, seed: int) -> Any:
    """A clean model. Attack `none` looks at no backdoor, so it is given none."""
    from harness.seeds import generator

    backdoor: Any = None
    return attack.implant(subject.model, backdoor, subject.like.data(), generator(seed, "attack")).model  # type: ignore[union-attr]


def _of_clean(model: Any, subject: Subject, asked: Mapping[str, Any], seed: int) -> list[Any]:
    """What the detectors say of one clean model, with a seed of their own for each, so that the population holds their
    noise too."""
    from harness import scan as scanning

    knowledge = known(subject, None, None, seed, {need for each in asked.values() for need in each.needs})
    return scanning.examine(asked, model, knowledge, None, seed)
