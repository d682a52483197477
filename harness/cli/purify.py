"""`bench purify`: runs a defense on your own model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import echo, loaded, print_json, writable
from harness.cli.subject import Subject, config_option, known, listen, model_options, opened, unmet

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 8  # samples in a row of the picture


@click.command(short_help="Clean your own model with a defense.")
@model_options
@click.option("--defense", required=True, metavar="DEFENSE", help="The defense, as in bench list defenses.")
@click.option("--trigger", metavar="TRIGGER", help="The trigger, for a defense that needs it.")
@click.option("--base", metavar="DIR", help="Of an adapter (LoRA): the model that it is for, a directory or a hub id.")
@config_option
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
def purify(
    model: str, revision: str, like: str | None, population: Path | None, data: Path | None, prompts: Path | None,
    seed: int, device: str | None, files: tuple[Path, ...], strict: bool, as_json: bool, defense: str,
    trigger: str | None, base: str | None, config: Path | None, out: Path,
) -> int:  # fmt: skip
    """Run DEFENSE on MODEL and write a diffusers directory with samples before and after. MODEL is a diffusers
    directory, a .safetensors file, a hub id, or an adapter with --base. Of an adapter, its base with
    the adapter is cleaned, and a whole pipeline is written.

    No purification proves that a backdoor is removed: scan the result, and look at its samples.
    """
    from harness.capabilities import delivers, missing_of_trigger, offers
    from harness.diffusion.model_files import CheckpointError
    from harness.methods.learned_triggers import LearnedTrigger
    from harness.registry import PluginError
    from harness.scan import verdict as scanning

    folder = out.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty; name another directory")
    writable(out)
    registry = loaded(files, strict)
    cleaner = registry.build("defenses", defense)
    if "model" not in delivers(cleaner):
        raise click.UsageError(f"{defense} delivers no purified model but {', '.join(delivers(cleaner)) or 'nothing'}")
    subject = opened(model, revision, like, device, registry, population, base, config)
    missing = unmet(cleaner.needs, subject, {"data": data, "prompts": prompts, "trigger": trigger})
    if missing is not None:
        raise click.UsageError(f"{defense}: {missing}")
    given = None if trigger is None else registry.build("triggers", trigger)
    if given is not None and offers(given, LearnedTrigger):
        raise click.UsageError(
            f"the pattern of {given.name} is known to the run whose attack learned it alone; name a trigger that is "
            "fixed, or a defense that needs none"
        )
    if given is not None and (lacking := missing_of_trigger(cleaner, given)):
        raise click.UsageError(f"{defense} needs a trigger with {' and '.join(lacking)}, {trigger} has none")
    knowledge = known(subject, data, prompts, seed, {*cleaner.needs, "prompts"}, given)
    inputs = scanning.inputs_of(subject.model, 2 * SHOWN, knowledge.prompts)
    before = scanning.pictures(subject.model, inputs)
    if not bool(before.isfinite().all()):
        raise CheckpointError(f"{model}: the model's samples hold NaN or infinity; there is nothing to clean")
    listen(as_json)
    done = _cleaned(defense, cleaner, subject, knowledge, seed)
    if done.model is None:
        says = {"directory": None, "defense": registry.canonical("defenses", defense), "suspicion": done.suspicion}
        print_json(says) if as_json else echo(f"{defense} found nothing to clean; nothing was written")
        return Exit.ok
    after = scanning.pictures(done.model, inputs)
    if not bool(after.isfinite().all()):
        raise PluginError(f"{defense} returned a model whose samples hold NaN or infinity; nothing was written")
    facts = _written(folder, subject, done.model, registry.canonical("defenses", defense), seed, before, after)
    if as_json:
        print_json(facts)
    else:
        echo(f"{folder}: {facts['loads']}; drift {facts['drift']:.4g}, samples in {facts['samples']}")
        echo("scan it again, and look at the samples: no purification proves that a backdoor is gone")
    return Exit.ok


def _cleaned(defense: str, cleaner: Any, subject: Subject, knowledge: Any, seed: int) -> Any:
    """What the defense delivers. Raises PluginError where it fails, or leaves a model whose samples are not finite."""
    from harness.diffusion.seeds import generator
    from harness.registry import PluginError
    from harness.stages.knowledge import declared

    try:
        with declared(cleaner, knowledge) as mine:
            return cleaner.defend(subject.model, mine, generator(seed, "defense"))
    except Exception as error:
        says = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(f"{defense} failed on this model: {says}") from error


def _written(
    folder: Path, subject: Subject, model: Any, defense: str, seed: int, before: Tensor, after: Tensor
) -> dict[str, Any]:
    """Write the purified model, its label and the samples; the facts."""
    from harness.diffusion import checkpoint
    from harness.diffusion.images import grid, save_png, to_unit

    drift = (to_unit(before) - to_unit(after)).square().mean().item()
    labels = {
        "purified_by": defense, "purified_from": Path(subject.name).name, "seed": str(seed), "drift": f"{drift:.6g}",
        "note": "purified by diffusion-defense-bench; a backdoor may remain",
    }  # fmt: skip
    checkpoint.save(model.to("cpu"), folder, labels)
    picture = grid([before[:SHOWN], after[:SHOWN]], max(1, 96 // before.shape[-1]))
    save_png(picture, folder / "before-and-after.png")
    stock = _stock_loads(folder)
    loads = (
        "loads with stock diffusers"
        if stock
        else "pruned: loads with harness.diffusion.checkpoint.load, not stock diffusers"
    )
    return {
        "directory": folder, "loads": loads, "stock": stock, "drift": drift, "defense": defense,
        "samples": "before-and-after.png",
    }  # fmt: skip


def _stock_loads(folder: Path) -> bool:
    """Whether diffusers alone loads the denoiser that was written; it does not load a pruned one."""
    import json

    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    part = "transformer" if "transformer" in index else "unet"
    try:
        getattr(diffusers, index[part][1]).from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (RuntimeError, ValueError, OSError):
        return False
    return True
