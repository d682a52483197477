"""`bench purify`: runs a defense on your own model."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import (
    check_device,
    echo,
    empty_folder,
    loaded,
    outside,
    print_json,
    whole_or_nothing,
    writable,
)
from harness.cli.subject import (
    Subject,
    config_option,
    known,
    listen,
    model_options,
    opened,
    pictures,
    say_what_was_read,
    unmet,
)

if TYPE_CHECKING:
    from torch import Tensor

    from harness.scan.adapter_change import Change

SHOWN = 8  # samples in a row of the picture
FULL = 2**31  # a rank that no layer has


class Rank(click.ParamType):
    """A rank of at least 1; "full" is more than any layer has."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "full":
            return FULL
        try:
            found = int(value)
        except ValueError:
            found = 0
        if found < 1:
            self.fail(f"{value!r} is no rank; give a number of at least 1, or full", param, ctx)
        return found


@click.command(short_help="Clean your own model with a defense.")
@model_options
@click.option("--defense", required=True, metavar="DEFENSE", help="The defense, as in bench list defenses.")
@click.option("--trigger", metavar="TRIGGER", help="The trigger, for a defense that needs it.")
@click.option("--base", metavar="DIR", help="For an adapter (LoRA): its base, a directory or a hub id.")
@config_option
@click.option(
    "--rank",
    type=Rank(),
    metavar="N|full",
    help="For an adapter: the rank of each layer that is written; default: the adapter's, or the first of 2, 4, 8 ... "
    "times its largest rank that keeps 90 %.",
)
@click.option("--whole", is_flag=True, help="For an adapter: write the whole pipeline instead of an adapter.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
def purify(
    model: str, revision: str, like: str | None, population: Path | None, data: Path | None, prompts: Path | None,
    seed: int, device: str | None, files: tuple[Path, ...], strict: bool, as_json: bool, defense: str,
    trigger: str | None, base: str | None, config: Path | None, rank: int | None, whole: bool, out: Path,
) -> int:  # fmt: skip
    """Run DEFENSE on MODEL and write the purified model, samples before and after, and a model card. MODEL is a
    diffusers directory, a .safetensors file, a hub id, or an adapter with --base. Of an adapter, its base with the
    adapter is cleaned, and an adapter for the same base is written; with --whole, a pipeline.

    No purification proves that a backdoor is removed: scan the result, and look at its samples.
    """
    from harness.capabilities import delivers, missing_of_trigger, offers
    from harness.diffusion.model_files import CheckpointError
    from harness.judges import hub
    from harness.methods.learned_triggers import LearnedTrigger
    from harness.registry import PluginError
    from harness.scan import verdict as scanning

    folder = empty_folder(out)
    writable(out)
    check_device(device)
    outside(out, [model, base, config])
    registry = loaded(files, strict)
    cleaner = registry.build("defenses", defense)
    if "model" not in delivers(cleaner):
        raise click.UsageError(f"{defense} delivers no purified model but {', '.join(delivers(cleaner)) or 'nothing'}")
    if hub.embedding_in(model) is not None and hub.adapter_in(model) is None:
        raise click.UsageError(
            f"{model}: a textual-inversion embedding is a few vectors and no network, so that no defense can clean it; "
            "leave it out of your prompts or train it anew, and give the base itself to purify that"
        )
    subject = opened(model, revision, like, device, registry, population, base, config)
    if not subject.adapted and (rank is not None or whole):
        raise click.UsageError(f"{'--whole' if whole else '--rank'} is for an adapter, and {model} is a whole model")
    if rank is not None and whole:
        raise click.UsageError("--rank and --whole: a whole pipeline has no rank; give one of them")
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
    if not subject.beside_a_base:
        say_what_was_read(subject.directory)
    before = pictures(subject.model, inputs, model)
    if not bool(before.isfinite().all()):
        raise CheckpointError(f"{model}: the model's samples hold NaN or infinity; there is nothing to clean")
    listen(as_json)
    done = _cleaned(defense, cleaner, subject, knowledge, seed)
    if done.model is None:
        says = {"directory": None, "defense": registry.canonical("defenses", defense), "suspicion": done.suspicion}
        print_json(says) if as_json else echo(f"{defense} found nothing to clean; nothing was written")
        return Exit.ok
    result, change = done.model, None
    if subject.adapted and not whole:
        result, change = _as_adapter(defense, subject, done.model, rank)
    after = scanning.pictures(result, inputs)
    if not bool(after.isfinite().all()):
        raise PluginError(f"{defense} returned a model whose samples hold NaN or infinity; nothing was written")
    spec, facts = registry.canonical("defenses", defense), {}
    if change is not None:
        from harness.scan.adapter_change import left_over

        facts = _adapter_facts(change, left_over(subject.model, done.model, result, knowledge.prompts))
    origin = str(base) if base is None or not Path(base).exists() else Path(base).resolve().name  # no path is published
    with whole_or_nothing(folder):
        told = _written(folder, subject, result, facts, spec, seed, (before, after), origin if facts else None)
    if as_json:
        print_json(told)
    else:
        echo(f"{folder}: {told['loads']}; drift {told['drift']:.4g}, samples in {told['samples']}")
        for line in told.get("says", ()):
            echo(line)
        echo("scan it again, and look at the samples: no purification proves that a backdoor is gone")
    return Exit.ok


def _as_adapter(defense: str, subject: Subject, purified: Any, rank: int | None) -> tuple[Any, Change]:
    """The base with the adapter that is written, and that adapter."""
    from harness.diffusion import adapters
    from harness.registry import PluginError
    from harness.scan.adapter_change import change_from, onto, sufficient

    base = adapters.base_of(subject.model)
    try:
        if rank is None:
            change = sufficient(base, subject.model, purified)
        else:
            change = change_from(base, subject.model, purified, rank)
    except ValueError as error:
        raise PluginError(
            f"{defense} gives no adapter of the base: {error}; --whole writes the whole pipeline"
        ) from None
    if not change.layers:
        raise PluginError(f"{defense} took away all that the adapter changes: use the base; nothing was written")
    return onto(base, change), change


def _adapter_facts(change: Change, left: float) -> dict[str, Any]:
    from harness.scan import model_card

    facts = {
        "rank": change.rank, "layers": len(change.layers), "kept": change.kept, "purification": change.purification,
        "left": left, "added": list(change.added),
        "lost": [{"tensor": each.tensor, "relative": each.relative} for each in change.lost],
    }  # fmt: skip
    return facts | {"says": model_card.says(facts)}


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
    folder: Path, subject: Subject, model: Any, adapter: dict[str, Any], defense: str, seed: int,
    samples: tuple[Tensor, Tensor], base: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Write the purified model or adapter, its label, its card and the samples; the facts. adapter: facts about the
    adapter, empty for a whole model. base: of an adapter, what it is for."""
    from harness.diffusion import adapters, checkpoint
    from harness.diffusion.images import grid, save_png, to_unit
    from harness.scan import model_card

    before, after = samples
    drift = (to_unit(before) - to_unit(after)).square().mean().item()
    labels = {
        "purified_by": defense, "purified_from": Path(subject.name).name, "seed": str(seed), "drift": f"{drift:.6g}",
        "note": "purified by diffusion-defense-bench; a backdoor may remain",
    }  # fmt: skip
    if base is not None:
        numbers = {name: adapter[name] for name in ("rank", "kept", "purification", "left")}
        labels |= {"base": base, **{name: f"{value:.6g}" for name, value in numbers.items()}}
        adapters.save(model.adapter, folder, labels)
        (folder / "bench.json").write_text(json.dumps(labels, indent=1, sort_keys=True))
        stock = _stock_attaches(folder, model)
        loads = (
            f"an adapter of rank {adapter['rank']} for load_lora_weights of diffusers"
            if stock
            else "an adapter that bench scan --base reads, and stock diffusers does not"
        )
    else:
        checkpoint.save(model.to("cpu"), folder, labels, like=subject.directory)
        stock = _stock_loads(folder)
        loads = (
            "loads with stock diffusers"
            if stock
            else "pruned: loads with harness.diffusion.checkpoint.load, not stock diffusers"
        )
    picture = grid([before[:SHOWN], after[:SHOWN]], max(1, 96 // before.shape[-1]))
    save_png(picture, folder / "before-and-after.png")
    facts = {
        "directory": folder, "loads": loads, "stock": stock, "drift": drift, "defense": defense, "seed": seed,
        "samples": "before-and-after.png", "diffusers": metadata.version("diffusers"), **adapter,
    }  # fmt: skip
    model_card.write(folder, facts, subject.name, base)
    return facts


def _stock_attaches(folder: Path, model: Any) -> bool:
    """Whether diffusers alone attaches the adapter that was written to the denoiser, in all its layers there."""
    from harness.diffusion import adapters

    net: Any = adapters.base_of(model).denoiser
    part = "transformer" if model.joint else "unet"
    wanted = sum(name.startswith(f"{part}.") for name in model.adapter.layers)
    if not wanted:
        return True
    try:
        net.load_lora_adapter(
            folder, prefix=part, weight_name=Path(adapters.FILE).name, use_safetensors=True, local_files_only=True
        )
    except (RuntimeError, ValueError, OSError, KeyError):
        return False
    return sum(hasattr(layer, "lora_A") and hasattr(layer, "base_layer") for layer in net.modules()) == wanted


def _stock_loads(folder: Path) -> bool:
    """Whether diffusers alone loads the denoiser that was written; it does not load a pruned one."""
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
