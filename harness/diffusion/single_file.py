"""A pipeline from one safetensors file in the key layout of the original releases of Stable Diffusion 1, 2 and SDXL.

The file is laid out as a diffusers directory, by diffusers' own converters, and that directory is read as any other:
harness.diffusion.checkpoint refuses what is missing, left over or of another shape. Configurations are not in the file.
Those of Stable Diffusion 1 and SDXL are here; for others a diffusers directory with the configurations is given.
"""

from __future__ import annotations

import atexit
import gzip
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.diffusion import networks
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
WORDS = 48_894  # merges of CLIP's vocabulary
PAD = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # in SDXL
ZIP, PICKLE = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SAFE = ".safetensors"

_LAID_OUT: dict[Path, SingleFile] = {}


@dataclass(frozen=True)
class SingleFile:
    """directory: the pipeline that was laid out. unread: tensors of the file that belong to no part of it."""

    file: Path
    directory: Path
    unread: tuple[str, ...]


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
    found = SingleFile(file, to, laid_out(file, config, to))
    _LAID_OUT[to] = found
    return found


def origin(directory: Path) -> SingleFile | None:
    """The file from which a directory was laid out; None for any other directory."""
    return _LAID_OUT.get(directory)


def laid_out(file: Path, config: Path | None, to: Path) -> tuple[str, ...]:
    """Write the pipeline of `file` into the folder `to`, and return the names of the tensors that it does not need."""
    from safetensors.torch import save_file

    files = ModelFiles.of_file(file)
    refuse_pickle(files, file)
    header = files.header(file.name)
    names = set(header.tensors)
    parts = configurations(names, {k: shape for k, (_, shape) in header.tensors.items()}, file, config)
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if "text_encoder_2" in parts else
                             "StableDiffusionPipeline"}  # fmt: skip
    read: set[str] = set()
    for part, given in parts.items():
        (to / part).mkdir(parents=True)
        cls = str(given.get("_class_name") or (given.get("architectures") or ["?"])[0])
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (to / part / name).write_text(json.dumps(given, indent=1, sort_keys=True))
        index[part] = ["transformers" if part.startswith("text") else "diffusers", cls]
        if part == "scheduler":
            continue
        if cls not in networks.STEMS:
            raise CheckpointError(
                f"{config or file}: its {part} is a {cls!r}, which is not supported for a single file"
            )
        mine = [name for name in names if name.startswith(_prefix(part, names))]
        read |= set(mine)
        held = files.tensors_of(file.name, mine)
        made = {key: value.contiguous() for key, value in _converted(part, held, given, cls, file).items()}
        save_file(made, to / part / f"{networks.STEMS[cls]}{SAFE}", {"format": "pt"})
    for part in ("tokenizer", "tokenizer_2") if "text_encoder_2" in parts else ("tokenizer",):
        _tokenizer(config, part, "text_encoder_2" in parts, to / part)
        index[part] = ["transformers", "CLIPTokenizer"]
    (to / "model_index.json").write_text(json.dumps(index, indent=1))
    return tuple(sorted(names - read - set(SCHEDULE)))


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
            f"{file}: no whole pipeline of Stable Diffusion 1, 2 or SDXL"
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
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: its {part} cannot be converted ({type(error).__name__}: {said}); fetch the file again, or give "
            "--config DIR with the configurations of its kind"
        ) from None


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
