"""`bench export`: write the weights of a model plugin as a diffusers directory."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import click

from harness.cli import Exit
from harness.cli.common import (
    as_json,
    echo,
    empty_folder,
    hush_libraries,
    loaded,
    plugin_files,
    print_json,
    strict_option,
    whole_or_nothing,
    writable,
)
from harness.cli.completion import Named
from harness.registry import spec_of


@click.command(short_help="Write a model plugin's weights as a diffusers directory.")
@click.argument("model", type=Named("models"))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--fp16", is_flag=True, help="Write the weights in half precision.")
@plugin_files
@strict_option
@as_json
def export(model: str, out: Path, fp16: bool, files: tuple[Path, ...], strict: bool, as_json: bool) -> int:
    """Write MODEL, an embedded model or any other model plugin, as a directory that diffusers loads.

    The directory is whole, also where the package keeps a part of the model in the folder of another model. It can be
    given to `bench scan`, `bench purify` and diffusers.
    """
    folder = empty_folder(out)
    writable(out)
    plugin = loaded(files, strict).build("models", model)
    hush_libraries()
    from harness.diffusion import checkpoint

    labels = {
        "model": spec_of(plugin), "version": str(plugin.version), "digest": plugin.digest(),
        "diffusion-defense-bench": metadata.version("diffusion-defense-bench"),
    }  # fmt: skip
    loaded_model = plugin.load()
    with whole_or_nothing(folder):
        checkpoint.save(loaded_model, folder, labels, fp16)
    if as_json:
        print_json({"directory": folder, **labels})
    else:
        echo(f"{labels['model']} is in {folder}")
    return Exit.ok
