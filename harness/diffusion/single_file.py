"""A pipeline from one safetensors file in the key layout of the original releases of Stable Diffusion 1, 2, SDXL, FLUX.

The file is laid out as a diffusers directory, by diffusers' own converters, and that directory is read as any other:
harness.diffusion.checkpoint refuses what is missing, left over or of another shape. Configurations are not in the file.
Those of Stable Diffusion 1 and SDXL are here; for others a diffusers directory with the configurations is given. Parts
that a file of FLUX does not hold, which are most of the time all but the denoiser, are those of that directory.
"""

from __future__ import annotations

import atexit
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.diffusion import flux_file, networks
from harness.diffusion.model_files import PICKLES, CheckpointError, ModelFiles
from harness.diffusion.single_file_layouts import LAYOUTS

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
WIDTH = UNET + "input_blocks.0.0.weight"
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "denoiser.sigmas",
)  # fmt: skip
FLUX = {
    "transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel", "scheduler": "FlowMatchEulerDiscreteScheduler",
}  # fmt: skip
WORDS = 48_894  # merges of CLIP's vocabulary
PAD = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # in SDXL
ZIP, PICKLE = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SAFE = ".safetensors"

_LAID_OUT: dict[Path, SingleFile] = {}


@dataclass(frozen=True)
class SingleFile:
    """directory: the pipeline that was laid out. unread: tensors of the file that belong to no part of it. beside:
    files of weights in `config` that were read because the file does not hold their parts, by name in the pipeline."""

    file: Path
    directory: Path
    unread: tuple[str, ...]
    beside: Mapping[str, Path]


def opened(file: Path, config: Path | None = None) -> SingleFile:
    """The pipeline of a file, laid out in a folder that is removed when the process ends; the same one if asked again.

    config: a diffusers directory with the configurations, for files that are not of Stable Diffusion 1 or SDXL. Raises
    CheckpointError.
    """
    facts = file.stat()
    return _opened(file.absolute(), config, (facts.st_size, facts.st_mtime_ns, facts.st_ino))


@cache
def _opened(file: Path, config: Path | None, _: tuple[int, int, int]) -> SingleFile:
    to = Path(tempfile.mkdtemp(prefix="bench-file-"))
    atexit.register(shutil.rmtree, to, ignore_errors=True)
    found = laid_out(file, config, to)
    _LAID_OUT[to] = found
    return found


def origin(directory: Path) -> SingleFile | None:
    """The file from which a directory was laid out; None for any other directory."""
    return _LAID_OUT.get(directory)


def laid_out(file: Path, config: Path | None, to: Path) -> SingleFile:
    """Write the pipeline of `file` into the folder `to`. Raises CheckpointError."""
    files = ModelFiles.of_file(file)
    refuse_pickle(files, file)
    shapes = {name: shape for name, (_, shape) in files.header(file.name).tensors.items()}
    if flux_file.is_flux(shapes):
        return _laid_out_flux(files, shapes, file, config, to)
    names = set(shapes)
    parts = configurations(names, shapes, file, config)
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if "text_encoder_2" in parts else
                             "StableDiffusionPipeline"}  # fmt: skip
    read: set[str] = set()
    for part, given in parts.items():
        index[part] = _configured(part, given, to)
        if part == "scheduler":
            continue
        cls = _class(given)
        if cls not in networks.STEMS:
            raise CheckpointError(
                f"{config or file}: its {part} is a {cls!r}, which is not supported for a single file"
            )
        mine = [name for name in names if name.startswith(_prefix(part, names))]
        held = files.tensors_of(file.name, mine)
        made = _converted(part, held, given, cls, file)
        read |= set(mine) - set(_passed_over(part, held, made))
        _write(made, cls, to / part)
    for part in ("tokenizer", "tokenizer_2") if "text_encoder_2" in parts else ("tokenizer",):
        _tokenizer(config, part, "text_encoder_2" in parts, to / part)
        index[part] = ["transformers", "CLIPTokenizer"]
    (to / "model_index.json").write_text(json.dumps(index, indent=1))
    return SingleFile(file, to, tuple(sorted(names - read - set(SCHEDULE))), {})


def _laid_out_flux(
    files: ModelFiles, names: Iterable[str], file: Path, config: Path | None, to: Path
) -> SingleFile:  # fmt: skip
    names = set(names)
    flux_file.check(names, file)
    absent = [part for part in flux_file.HELD if not flux_file.of_part(part, names)]
    lacks = "".join(f", no {flux_file.WORDS[part]}" for part in absent)
    if config is None:
        raise CheckpointError(
            f"{file}: a file of FLUX, which holds no configurations, no tokenizer of T5{lacks}; --config DIR names a "
            "diffusers directory of FLUX that has them"
        )
    given = ModelFiles(config)
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    read: set[str] = set()
    beside: dict[str, Path] = {}
    for part, cls in FLUX.items():
        place = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        if place not in given:
            raise CheckpointError(f"{config}: holds no {place}; give a diffusers directory of FLUX")
        settings = given.json(place)
        if _class(settings) != cls:
            raise CheckpointError(f"{config}: its {part} is a {_class(settings)!r}, FLUX's is a {cls}")
        index[part] = _configured(part, settings, to)
        if part == "scheduler":
            continue
        mine = flux_file.of_part(part, names)
        if not mine:
            beside |= _taken_over(part, cls, given, file, to)
            continue
        held = files.tensors_of(file.name, mine)
        try:
            made, unknown = flux_file.converted(part, held, settings)
        except Exception as error:
            raise _unconvertible(part, error, file) from None
        read |= set(mine) - set(unknown) - set(_passed_over(part, held, made))
        _write(made, cls, to / part)
    if "tokenizer_2/tokenizer.json" not in given:
        raise CheckpointError(f"{config}: holds no tokenizer_2/tokenizer.json; give a diffusers directory of FLUX")
    for part, cls in (("tokenizer", "CLIPTokenizer"), ("tokenizer_2", "T5TokenizerFast")):
        _tokenizer(config, part, False, to / part)
        index[part] = ["transformers", cls]
    (to / "model_index.json").write_text(json.dumps(index, indent=1))
    return SingleFile(file, to, tuple(sorted(names - read)), beside)


def _class(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])


def _configured(part: str, config: Mapping[str, Any], to: Path) -> list[str]:
    """Write the configuration of a part below `to`; its entry of model_index.json."""
    (to / part).mkdir(parents=True)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    (to / part / name).write_text(json.dumps(config, indent=1, sort_keys=True))
    return ["transformers" if part.startswith("text") else "diffusers", _class(config)]


def _write(tensors: Mapping[str, Tensor], cls: str, folder: Path) -> None:
    from safetensors.torch import save_file

    made = {key: value.contiguous() for key, value in tensors.items()}
    save_file(made, folder / f"{networks.STEMS[cls]}{SAFE}", {"format": "pt"})


def _passed_over(part: str, held: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the UNet or the autoencoder that the converter left out, because it knows no name for them.

    It hands on the others as they are, or as views.
    """
    if part not in ("unet", "vae"):
        return []
    used = {value.untyped_storage().data_ptr() for value in made.values()}
    return [name for name, value in held.items() if value.untyped_storage().data_ptr() not in used]


def _taken_over(part: str, cls: str, given: ModelFiles, file: Path, to: Path) -> dict[str, Path]:
    """Put the weights of a part that `file` lacks into the pipeline, without a copy where the system can; where they
    were, by their names in the pipeline. Raises CheckpointError where there are none."""
    if not any(name.endswith((SAFE, *PICKLES)) for name in given.folder(part)):
        raise CheckpointError(
            f"{file}: holds no {flux_file.WORDS[part]}, and {given.path(part)} no weights; --config DIR names a "
            "diffusers directory of FLUX that has them"
        )
    stem = networks.STEMS[cls]
    weights = given.weights(part, stem)
    index = [name for name in given.folder(part) if name.startswith(f"{part}/{stem}{SAFE}.index")]
    for name in [*weights, *index]:
        try:
            os.link(given.real(name), to / name, follow_symlinks=False)
        except OSError:  # another file system
            shutil.copyfile(given.real(name), to / name, follow_symlinks=False)
    return {name: given.real(name) for name in weights}


def refuse_pickle(files: ModelFiles, file: Path) -> None:
    """Raise CheckpointError for a pickle, whatever it is called, and for what is not called a safetensors file."""
    start = files.start(file.name)
    if start.startswith((ZIP, *PICKLE)) or file.suffix in PICKLES:
        raise CheckpointError(
            f"{file}: a pickle can run code when it is loaded, so it is refused; convert it on a machine you can lose "
            "to safetensors, and give that file"
        )
    if file.suffix != SAFE:
        raise CheckpointError(f"{file}: give a diffusers directory, a .safetensors file or a hub id")


def configurations(
    names: set[str], shapes: Mapping[str, tuple[int, ...]], file: Path, config: Path | None
) -> dict[str, dict[str, Any]]:
    """Part → its configuration. Raises CheckpointError for a file that is no whole pipeline in a known layout."""
    texts = [prefix for prefix in (CLIP, OPEN_CLIP, FIRST) if any(name.startswith(prefix) for name in names)]
    there = {
        "denoiser": WIDTH in names,
        "autoencoder": any(name.startswith(VAE) for name in names),
        "text encoder": bool(texts),
    }
    lacks = [what for what, held in there.items() if not held]
    if lacks or len(texts) != 1:
        raise CheckpointError(
            f"{file}: no whole pipeline of Stable Diffusion 1, 2 or SDXL, and none of FLUX"
            f"{' (it holds no ' + ' and no '.join(lacks) + ')' if lacks else ''}; give a diffusers directory, or put "
            "the part into one"
        )
    parts = {"unet", "vae", "text_encoder", "scheduler"} | ({"text_encoder_2"} if texts[0] == FIRST else set())
    if config is not None:
        given = ModelFiles(config)
        places = {p: f"{p}/{'scheduler_config' if p == 'scheduler' else 'config'}.json" for p in sorted(parts)}
        missing = [place for place in places.values() if place not in given]
        if missing:
            raise CheckpointError(
                f"{config}: holds no {missing[0]}; give a diffusers directory of a model of this kind"
            )
        return {part: given.json(place) for part, place in places.items()}
    layout = LAYOUTS["sdxl" if texts[0] == FIRST else "sd1"]
    usual = layout["unet"]
    width, channels = usual["block_out_channels"][0], usual["in_channels"]
    if texts[0] == OPEN_CLIP or shapes[WIDTH][:2] != (width, channels):
        raise CheckpointError(
            f"{file}: not of the sizes of Stable Diffusion 1 or SDXL, and a file does not hold its configurations; "
            "--config DIR names a diffusers directory that has them"
        )
    return {part: layout[part] for part in sorted(parts)}


def _prefix(part: str, names: set[str]) -> str:
    if part == "text_encoder":
        return next(prefix for prefix in (CLIP, OPEN_CLIP, FIRST) if any(name.startswith(prefix) for name in names))
    return {"unet": UNET, "vae": VAE, "text_encoder_2": SECOND}[part]


def _converted(part: str, held: dict[str, Tensor], config: dict[str, Any], cls: str, file: Path) -> dict[str, Tensor]:
    """The tensors of a part by their names in diffusers. Raises CheckpointError where the converter stumbles."""
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_utils as converters

    try:
        if part == "unet":
            return converters.convert_ldm_unet_checkpoint(held, config=config)
        if part == "vae":
            return converters.convert_ldm_vae_checkpoint(held, config=config)
        prefix = next(p for p in (CLIP, OPEN_CLIP, FIRST, SECOND) if next(iter(held)).startswith(p))
        if prefix in (CLIP, FIRST):
            return converters.convert_ldm_clip_checkpoint(held)
        with init_empty_weights():
            net = networks.built(config, cls)
        return converters.convert_open_clip_checkpoint(net, held, prefix=prefix)
    except Exception as error:  # a KeyError, most of the time: the converters expect whole files
        raise _unconvertible(part, error, file) from None


def _unconvertible(part: str, error: Exception, file: Path) -> CheckpointError:
    said = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{file}: its {part} cannot be converted ({type(error).__name__}: {said}); fetch the file again, or give "
        "--config DIR with the configurations of its kind"
    )


def _tokenizer(config: Path | None, part: str, two: bool, to: Path) -> None:
    """The tokenizer of the configurations if they have one, else CLIP's."""
    to.mkdir()
    if config is not None:
        files = ModelFiles(config)
        held = [name for name in files.sizes if name.startswith(f"{part}/") and name.endswith((".json", ".txt"))]
        for name in held:
            (to / Path(name).name).write_bytes(files.read(name))
        if held:
            return
    vocabulary, merges = clip_vocabulary()
    (to / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (to / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    pad = PAD[part] if two else PAD["tokenizer"]
    (to / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad}))


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary of 49,408 tokens and its merges, from the file that OpenCLIP ships."""
    import open_clip

    packed = Path(str(open_clip.__file__)).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : WORDS + 1]
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges
