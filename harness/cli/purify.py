"""`bench purify`: a defense on a model of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import loaded, print_json, writable
from harness.cli.subject import Subject, known, listen, model_options, opened, unmet

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 8  # samples in a row of the picture


@click.command(short_help="Clean a model of your own with a defense.")
@model_options
@click.option("--defense", required=True, metavar="DEFENSE", help="What cleans it, as in bench list defenses.")
@click.option("--trigger", metavar="TRIGGER", help="The trigger, for a defense that has to be told it.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
def purify(
    model: str, revision: str, like: str | None, population: Path | None, data: Path | None, prompts: Path | None,
    seed: int, device: str | None, files: tuple[Path, ...], strict: bool, as_json: bool, defense: str,
    trigger: str | None, out: Path,
) -> int:  # fmt: skip
    """Run DEFENSE on MODEL and write a diffusers directory with samples before and after.

    No purification proves that a backdoor is gone: scan the result, and look at its samples.
    """
    from harness import scan as scanning
    from harness.seeds import generator
    from harness.types import delivers

    folder = out.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty; name another directory")
    writable(out)
    registry = loaded(files, strict)
    cleaner = registry.build("defenses", defense)
    if "model" not in delivers(cleaner):
        raise click.UsageError(f"{defense} delivers no purified model but {', '.join(delivers(cleaner)) or 'nothing'}")
    subject = opened(model, revision, like, device, registry, population)
    missing = unmet(cleaner.needs, subject, {"data": data, "prompts": prompts, "trigger": trigger})
    if missing is not None:
        raise click.UsageError(f"{defense}: {missing}")
    knowledge = known(subject, data, prompts, seed, set(cleaner.needs))
    given = None if trigger is None else registry.build("triggers", trigger)
    inputs = scanning.inputs_of(subject.model, 2 * SHOWN, knowledge.prompts)
    knowledge = scanning.told(cleaner, replace(knowledge, trigger=given))
    before = scanning.pictures(subject.model, inputs)
    listen(as_json)
    done = cleaner.defend(subject.model, knowledge, generator(seed, "defense"))
    if done.model is None:
        says = {"directory": None, "defense": registry.canonical("defenses", defense), "suspicion": done.suspicion}
        print_json(says) if as_json else click.echo(f"{defense} found nothing to clean; nothing was written")
        return Exit.ok
    after = scanning.pictures(done.model, inputs)
    facts = _written(folder, subject, done.model, registry.canonical("defenses", defense), seed, before, after)
    if as_json:
        print_json(facts)
    else:
        click.echo(f"{folder}: {facts['loads']}; drift {facts['drift']:.4g}, samples in {facts['samples']}")
        click.echo("scan it again, and look at the samples: no purification proves that a backdoor is gone")
    return Exit.ok


def _written(
    folder: Path, subject: Subject, model: Any, defense: str, seed: int, before: Tensor, after: Tensor
) -> dict[str, Any]:
    """Write the purified model, its label and the samples; the facts."""
    from harness import checkpoint
    from harness.images import grid, save_png, to_unit

    drift = (to_unit(before) - to_unit(after)).square().mean().item()
    labels = {
        "purified_by": defense, "purified_from": Path(subject.name).name, "seed": str(seed), "drift": f"{drift:.6g}",
        "note": "purified by diffusion-defense-bench; a backdoor may remain",
    }  # fmt: skip
    checkpoint.save(model.to("cpu"), folder, labels)
    picture = grid([before[:SHOWN], after[:SHOWN]], max(1, 96 // before.shape[-1]))
    save_png(picture, folder / "before-and-after.png")
    stock = _stock_loads(folder)
    loads = "loads with stock diffusers" if stock else "pruned: loads with harness.checkpoint.load, not stock diffusers"
    return {
        "directory": folder, "loads": loads, "stock": stock, "drift": drift, "defense": defense,
        "samples": "before-and-after.png",
    }  # fmt: skip


def _stock_loads(folder: Path) -> bool:
    """Whether diffusers, left to itself, loads the denoiser that was written: not one that was pruned."""
    import json

    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["unet"][1]
    try:
        getattr(diffusers, name).from_pretrained(
            folder / "unet", local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (RuntimeError, ValueError, OSError):
        return False
    return True
