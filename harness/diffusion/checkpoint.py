"""DiffusionModel ↔ a diffusers directory of safetensors, read as harness.diffusion.model_files has it: a model under
test is hostile.

The config of a pruned network still describes the whole one, so stock diffusers refuses its weights. The shapes that
differ are in `pruned.json` beside them, and only where that file is do we let them differ.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, cast

from harness.diffusion import adapters, as_read, networks, pruned_shapes, schedules, tokenizer_files
from harness.diffusion.model import DiffusionModel
from harness.diffusion.model_files import PICKLES, CheckpointError, ModelFiles
from harness.diffusion.networks import PRUNED

IGNORED = ("feature_extractor", "safety_checker", "image_encoder")  # parts that make no image
MOST_SCALE = 1e4  # of latents
MOST_IMAGE = 2**24  # numbers of an image
SIZES = 6  # numbers of SDXL's condition on size
INDEXED = ".safetensors.index.json"
_INDEX = "{}" + INDEXED
ABOUT = ("provenance.json", "bench.json")  # say where a model is from, and change nothing in it
NOTED = {"_diffusers_version", "transformers_version", "_name_or_path"}  # in a config, by the library that wrote it
LAST_CALL = {"padding", "truncation"}  # in tokenizer.json, of the tokenizer's last call
PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("SD3Transformer2DModel", "FluxTransformer2DModel"),
    "vae": ("AutoencoderKL",),
    "vqvae": ("AutoencoderKL", "VQModel"),  # an LDMPipeline's name for it
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "T5EncoderModel"),
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
    "scheduler": schedules.READ,
}


def save(
    model: DiffusionModel, directory: Path, labels: dict[str, str] | None = None, fp16: bool = False,
    like: Path | None = None,
) -> None:  # fmt: skip
    """Write `model` as a diffusers pipeline directory, safetensors only; stock diffusers loads it unless it is pruned.

    The schedule has the settings that were read, and no defaults of its class beside them. A model whose weights are
    those of its base and its adapter becomes the base, with the adapter in a folder of it. labels: written to
    `bench.json` beside it (a backdoored model says so there). fp16: halve the weights on disk. like: the directory that
    the model was read from, whose class of pipeline is kept if it has the same parts; its defaults, such as the number
    of steps, are those of the class.
    """
    import diffusers

    if adapters.unchanged(model):
        adapters.save(cast(adapters.Adapter, model.adapter), directory / adapters.FOLDER)
        model = adapters.base_of(model)

    library: Any = diffusers
    scheduler = copy.deepcopy(model.scheduler)  # the pipeline changes it
    if model.packed:
        pipeline: Any = library.FluxPipeline(
            scheduler=schedules.as_saved(scheduler, model.dynamic_shift), vae=model.vae,
            text_encoder=model.text_encoder, tokenizer=model.tokenizer, text_encoder_2=model.text_encoder_2,
            tokenizer_2=model.tokenizer_2, transformer=model.denoiser,
        )  # fmt: skip
    elif model.joint:
        parts = {"transformer": model.denoiser, "scheduler": scheduler, "vae": model.vae}
        texts = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2}
        tokens = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2}
        third = {"text_encoder_3": model.text_encoder_3, "tokenizer_3": model.tokenizer_3}
        pipeline = library.StableDiffusion3Pipeline(**parts, **texts, **tokens, **third)
    elif model.text_encoder_2 is not None:
        pipeline = library.StableDiffusionXLPipeline(
            vae=model.vae, text_encoder=model.text_encoder, text_encoder_2=model.text_encoder_2,
            tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, unet=model.denoiser, scheduler=scheduler,
            force_zeros_for_empty_prompt=model.empty_is_zero, add_watermarker=False,
        )  # fmt: skip
    elif model.conditional:
        pipeline = library.StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.denoiser,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        cls = library.ScoreSdeVePipeline if model.family == "ve" else library.DDPMPipeline
        parts = {"unet": model.denoiser, "scheduler": scheduler}
        pipeline = cls(**parts) if model.vae is None else library.LDMPipeline(vqvae=model.vae, **parts)
    if fp16:
        clone = model.clone()
        for name, part in clone.components().items():
            setattr(pipeline, "vqvae" if name == "vae" and not model.conditional else name, part.half())
    pipeline.save_pretrained(directory, safe_serialization=True)
    for config in directory.glob("*/config.json"):  # diffusers notes the path that a part was loaded from
        facts = json.loads(config.read_text())
        if facts.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    as_read.keep_schedule(directory, model.scheduler.config)
    if like is not None:
        as_read.keep_class(directory, like, IGNORED)
    shapes = pruned_shapes.reshaped(model.denoiser)
    pruned = directory / ("transformer" if model.joint else "unet") / PRUNED
    pruned.unlink(missing_ok=True)
    if shapes:
        pruned.write_text(json.dumps(shapes, indent=0, sort_keys=True))
    if labels:
        (directory / "bench.json").write_text(json.dumps(labels, indent=1, sort_keys=True))


def load(directory: Path, lent: Mapping[str, Path] | None = None) -> DiffusionModel:
    """Read a pipeline directory as fp32 on the CPU, with the adapter in its folder, without running any code from it.

    lent: files of other directories, by the names below `directory` under which they are read.
    Raises CheckpointError for what is refused: weights that are only there as pickles, links, classes outside `PARTS`,
    sizes out of proportion, and tensors that are missing, left over or of another shape than the config asks for.
    """
    files = ModelFiles(directory, lent)
    parts = {name: _part(files, folder, cls) for name, (folder, cls) in parts_of(files).items()}
    vae = parts.get("vae", parts.get("vqvae"))
    try:
        model = DiffusionModel(
            parts["transformer"] if "transformer" in parts else parts["unet"], parts["scheduler"], vae,
            parts.get("text_encoder"), parts.get("tokenizer"), parts.get("text_encoder_2"), parts.get("tokenizer_2"),
            empty_is_zero=_empty_is_zero(files, parts), text_encoder_3=parts.get("text_encoder_3"),
            tokenizer_3=parts.get("tokenizer_3"),
        )  # fmt: skip
        model = _at_its_size(model, directory)
    except CheckpointError:
        raise
    except ValueError as error:  # a prediction type, say, that no model here has
        raise CheckpointError(f"{directory}: {error}") from None
    _check_together(files, model)
    adapters.read(files, model)
    return model


def _at_its_size(model: DiffusionModel, where: Path) -> DiffusionModel:
    """The model with the noise levels that FLUX has at its size; any other model as it is.

    Raises CheckpointError for other models whose shift depends on their size, and for a size that is none.
    """
    config: Any = model.scheduler.config
    dynamic = bool(config.get(schedules.DYNAMIC))
    if not model.packed:
        if dynamic:
            raise CheckpointError(
                f"{where}: {schedules.DYNAMIC} gives a flow other levels than shift does; such models are not supported"
            )
        return model
    side = getattr(cast(Any, model.vae).config, "sample_size", None)
    if type(side) is not int or not 0 < side <= networks.MOST_SIDE:
        raise CheckpointError(f"{where}: the autoencoder's sample_size is {side!r}; it should be a whole number")
    _check_size(where, model.shape)
    _, height, width = model.shape
    at_size = schedules.at_size(model.scheduler, height * width // 4)
    return replace(model, scheduler=at_size, dynamic_shift=float(config.shift) if dynamic else None)


def _empty_is_zero(files: ModelFiles, parts: Mapping[str, Any]) -> bool:
    """Whether an SDXL pipeline's guidance compares with zeros; diffusers' default is that it does."""
    if "unet" not in parts or "text_encoder_2" not in parts:
        return False
    said = files.json("model_index.json").get("force_zeros_for_empty_prompt", True)
    if not isinstance(said, bool):
        raise CheckpointError(
            f"{files.path('model_index.json')}: force_zeros_for_empty_prompt is neither true nor false"
        )
    return said


def read_files(directory: Path) -> list[str]:
    """The names of the files that `load` reads. Raises CheckpointError."""
    files = ModelFiles(directory)
    names = ["model_index.json", *([adapters.FILE] if adapters.FILE in files else [])]
    for folder, cls in parts_of(files).values():
        inside = f"{folder}/" if folder else ""
        config = "scheduler_config.json" if cls.endswith("Scheduler") else "config.json"
        if "Tokenizer" in cls:
            names += [name for name in tokenizer_files.read(folder) if name in files]
            continue
        names.append(f"{inside}{config}")
        if not cls.endswith("Scheduler"):
            names += files.weights(folder, networks.STEMS[cls])
            names += [
                f"{inside}{name}" for name in (PRUNED, _INDEX.format(networks.STEMS[cls])) if f"{inside}{name}" in files
            ]
    return sorted(set(names))


def parts_of(files: ModelFiles) -> dict[str, tuple[str, str]]:
    """Part → (its folder, its class), as model_index.json names them. Raises CheckpointError."""
    place = files.path("model_index.json")
    if "model_index.json" not in files:
        raise _no_index(files)
    index = files.configuration("model_index.json")
    _check_pipeline(place, index)
    found: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if name.startswith("_") or (name not in PARTS and not isinstance(entry, list)):
            continue
        if not isinstance(entry, list) or len(entry) != 2 or any(not isinstance(word, str | None) for word in entry):
            raise CheckpointError(f"{place}: {name} is no pair of library and class; fetch it again")
        cls = entry[1]
        if cls is None or name in IGNORED:
            continue
        if name not in PARTS:
            raise CheckpointError(f"{place}: names a {name}, which is not supported; supported: {', '.join(PARTS)}")
        if cls not in PARTS[name]:
            why = schedules.refusal(cls) if name == "scheduler" else f"supported: {', '.join(PARTS[name])}"
            raise CheckpointError(f"{place}: {name} is a {cls!r}; {why}")
        library = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
        if entry[0] != library:
            raise CheckpointError(f"{place}: {name} is of the library {entry[0]!r}; supported: {library}")
        found[name] = (_folder(files, name), cls)
    if ("unet" in found) == ("transformer" in found) or "scheduler" not in found:
        raise CheckpointError(f"{place}: names no unet or no scheduler; is it a diffusers pipeline?")
    _check_parts(place, {name: cls for name, (_, cls) in found.items()})
    return found


def _no_index(files: ModelFiles) -> CheckpointError:
    """What is wrong with a directory without a model_index.json, and what to give instead."""
    pickles = [name for name in files.sizes if name.endswith(PICKLES)]
    safe = any(name.endswith(".safetensors") or PurePosixPath(name).name == "model_index.json" for name in files.sizes)
    if pickles and not safe:
        return CheckpointError(
            f"{files.path(pickles[0])}: a pickle can run code when it is loaded, so it is refused; convert it to "
            "safetensors on a machine you can lose"
        )
    return CheckpointError(f"{files.directory}: no model_index.json; {_way_out(files)}")


def _way_out(files: ModelFiles) -> str:
    where = files.directory
    inside = sorted(name.rpartition("/")[0] for name in files.sizes if PurePosixPath(name).name == "model_index.json")
    if inside:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        kinds = "several models are" if len(inside) > 1 else "a model is"
        return f"{kinds} in {', '.join(inside[:3])}{more}: give the directory {where / inside[0]}"
    if (where.absolute().parent / "model_index.json").is_file() and "config.json" in files:
        return f"it is the part {where.absolute().name} of {where.absolute().parent}: give that directory"
    single = [name for name in files.folder("") if name.endswith(".safetensors")]
    if single:
        return f"if {single[0]} is a model or an adapter of its own, give this file"
    return "give a directory saved by a diffusers pipeline"


def _check_pipeline(place: Path, index: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a pipeline with code of its own, which makes other images than its parts say."""
    import diffusers

    said = index.get("_class_name", "DDPMPipeline")
    if not isinstance(said, str) or "Pipeline" not in said or said not in dir(diffusers):
        raise CheckpointError(
            f"{place}: {said!r} is no pipeline of diffusers; one with code of its own may make other images than its "
            "parts, so it is refused"
        )


def _check_parts(place: Path, found: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the classes of the parts are those of one kind of pipeline."""
    joint, conditional = "transformer" in found, found.get("unet") == "UNet2DConditionModel"
    flux = found.get("transformer") == "FluxTransformer2DModel"
    two = joint or "text_encoder_2" in found or "tokenizer_2" in found
    three = joint and not flux and ("text_encoder_3" in found or "tokenizer_3" in found)
    text = ("text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if two else ()))
    text += ("text_encoder_3", "tokenizer_3") if three else ()
    wanted = ("vae", *text) if joint or conditional else ()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"{place}: a text-to-image model without {' and '.join(missing)} is not supported")
    more = [name for name in found if name.startswith(("text_encoder", "tokenizer")) and name not in wanted]
    if more:
        unconditional = not joint and not conditional
        raise CheckpointError(
            f"{place}: {'an unconditional unet with a text encoder' if unconditional else f'a {more[0]} here'} is not "
            "supported"
        )
    kinds = {"text_encoder": "CLIPTextModelWithProjection" if joint and not flux else "CLIPTextModel"}
    if two and wanted:
        kinds |= {"text_encoder_2": "T5EncoderModel" if flux else "CLIPTextModelWithProjection"}
        kinds |= {"tokenizer_2": "T5Tokenizer" if flux else "CLIPTokenizer"}
    for name, kind in kinds.items() if wanted else ():
        if found[name].removesuffix("Fast") != kind:
            raise CheckpointError(f"{place}: {name} is a {found[name]!r}; supported here: {kind}")
    if joint and not found["scheduler"].startswith("FlowMatch"):
        raise CheckpointError(f"{place}: a transformer with a {found['scheduler']} is not supported; it is for flows")
    if joint and "vqvae" in found:
        raise CheckpointError(f"{place}: a transformer with a vqvae is not supported")


def _folder(files: ModelFiles, name: str) -> str:
    """Where a part is: in its own folder, or beside the index, as in the hub's older DDPM and NCSN++ repositories."""
    if files.folder(name):
        return name
    flat = {"unet": "config.json", "scheduler": "scheduler_config.json"}.get(name)
    if flat is None or flat not in files:
        raise CheckpointError(f"{files.path(name)}: missing, though model_index.json names it")
    return ""


def _part(files: ModelFiles, folder: str, cls: str) -> Any:
    if cls.endswith("Scheduler"):
        return schedules.read(files, folder, cls)
    if cls.startswith("CLIPTokenizer"):
        return tokenizer_files.load(files, folder)
    if cls.startswith("T5Tokenizer"):
        return tokenizer_files.load_pieces(files, folder)
    return networks.load(files, folder, cls)


def _check_together(files: ModelFiles, model: DiffusionModel) -> None:
    """Raise CheckpointError where the parts do not fit together, or make a kind of model that is not supported."""
    where, denoiser = files.directory, cast(Any, model.denoiser.config)
    classes = [k for k in ("num_class_embeds", "class_embed_type") if getattr(denoiser, k, None)]
    if classes:
        raise CheckpointError(f"{where}: a denoiser that takes a class ({classes[0]}) is not supported")
    if getattr(denoiser, "time_cond_proj_dim", None):
        raise CheckpointError(f"{where}: a unet that takes the guidance scale (time_cond_proj_dim) is not supported")
    _check_added(where, model)
    side = model.shape[1:] if model.packed else getattr(denoiser, "sample_size", None)
    sides = side if isinstance(side, list | tuple) else (side, side)
    if len(sides) != 2 or any(type(n) is not int or not 0 < n <= networks.MOST_SIDE for n in sides):
        raise CheckpointError(f"{where}: the denoiser's sample_size is {side!r}; it should be 1 or 2 whole numbers")
    _check_size(where, model.shape)
    if model.packed and (denoiser.patch_size != 1 or denoiser.in_channels % 4 or sum(denoiser.axes_dims_rope) !=
                         denoiser.attention_head_dim):  # fmt: skip
        raise CheckpointError(
            f"{where}: a transformer with patch_size {denoiser.patch_size}, {denoiser.in_channels} channels and "
            f"axes_dims_rope {list(denoiser.axes_dims_rope)} is not FLUX's"
        )
    if denoiser.in_channels != (denoiser.out_channels or denoiser.in_channels):
        raise CheckpointError(
            f"{where}: the denoiser takes {denoiser.in_channels} channels and returns {denoiser.out_channels}; "
            "inpainting models and learned variances are not supported"
        )
    channels = model.shape[0]
    if model.vae is not None and model.vae.config.latent_channels != channels:
        raise CheckpointError(
            f"{where}: the autoencoder has {model.vae.config.latent_channels} latent channels, the denoiser {channels}"
        )
    if model.vae is not None:
        _check_autoencoder(where / ("vqvae" if "vqvae" in parts_of(files) else "vae") / "config.json", model)
    if model.text_encoder is not None:
        _check_text(where, model)


def _check_autoencoder(where: Path, model: DiffusionModel) -> None:
    """Raise CheckpointError unless the autoencoder's latents can be scaled, (z - shift) times scale, and its images are
    pictures of a size in proportion."""
    config = cast(Any, model.vae).config
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None)
    if not (schedules.is_number(scale) and 0 < scale <= MOST_SCALE):
        raise CheckpointError(f"{where}: scaling_factor is {scale!r}; it should be above 0 and at most {MOST_SCALE}")
    if shift is not None and not (schedules.is_number(shift) and abs(shift) <= MOST_SCALE):
        raise CheckpointError(f"{where}: shift_factor is {shift!r}; it should be a number")
    if config.in_channels != config.out_channels:
        raise CheckpointError(
            f"{where}: takes images of {config.in_channels} channels and returns {config.out_channels}; such "
            "autoencoders are not supported"
        )
    _, height, width = model.shape
    factor = 2 ** (len(config.block_out_channels) - 1)
    image = (config.out_channels, height * factor, width * factor)
    if prod(image) > MOST_IMAGE:
        raise CheckpointError(f"{where}: makes images of {image} numbers; at most {MOST_IMAGE:,} are read")


def _check_size(where: Path, shape: tuple[int, int, int]) -> None:
    if prod(shape) > networks.MOST:
        raise CheckpointError(f"{where}: makes samples of {shape} numbers; at most {networks.MOST:,} are read")


def _check_added(where: Path, model: DiffusionModel) -> None:
    """Raise CheckpointError unless the conditions beside the prompt are SDXL's, or there are none."""
    config = cast(Any, model.denoiser.config)
    kind = getattr(config, "addition_embed_type", None)
    if getattr(config, "encoder_hid_dim_type", None) or kind not in (None, "text_time"):
        raise CheckpointError(f"{where}: a denoiser with added conditions that are not SDXL's is not supported")
    if model.joint or (kind is None and model.text_encoder_2 is None):
        return
    if kind is None or model.text_encoder_2 is None:
        raise CheckpointError(
            f"{where}: a unet takes SDXL's added conditions if it has two text encoders, and only then"
        )
    pooled, each = model.text_encoder_2.config.projection_dim, config.addition_time_embed_dim
    if type(each) is not int or config.projection_class_embeddings_input_dim != pooled + SIZES * each:
        raise CheckpointError(
            f"{where}: the denoiser's projection_class_embeddings_input_dim is "
            f"{config.projection_class_embeddings_input_dim!r}; the text encoder's {pooled} and {SIZES} times its "
            f"addition_time_embed_dim {each!r} are wanted"
        )


def _check_text(where: Path, model: DiffusionModel) -> None:
    text, tokens = cast(Any, model.text_encoder).config, cast(Any, model.tokenizer)
    if model.packed:
        _check_texts_of_flux(where, model)
    elif model.joint:
        _check_two_texts(where, model)
    elif model.text_encoder_2 is not None:
        _check_side_by_side(where, model)
    elif cast(Any, model.denoiser.config).cross_attention_dim != text.hidden_size:
        raise CheckpointError(f"{where}: the text encoder's width is not the denoiser's cross_attention_dim")
    _check_tokens(where, "tokenizer", text, tokens)
    if model.text_encoder_3 is not None:
        _check_pieces(where, "3", model.text_encoder_3, model.tokenizer_3)
    if model.text_encoder_2 is not None and not model.packed:
        second = cast(Any, model.text_encoder_2).config
        if tokens.model_max_length > second.max_position_embeddings:
            raise CheckpointError(f"{where}: the second text encoder takes fewer tokens than the first tokenizer gives")
        _check_tokens(where, "tokenizer_2", second, cast(Any, model.tokenizer_2))


def _check_texts_of_flux(where: Path, model: DiffusionModel) -> None:
    """Raise CheckpointError unless FLUX's transformer takes T5's states and CLIP's pooled state."""
    denoiser, second = (cast(Any, part).config for part in (model.denoiser, model.text_encoder_2))
    pooled = cast(Any, model.text_encoder).config.hidden_size
    if denoiser.joint_attention_dim != second.d_model:
        raise CheckpointError(
            f"{where}: the denoiser's joint_attention_dim is {denoiser.joint_attention_dim}, T5's width "
            f"{second.d_model}"
        )
    if denoiser.pooled_projection_dim != pooled or pooled > second.d_model:
        raise CheckpointError(
            f"{where}: the denoiser's pooled_projection_dim is {denoiser.pooled_projection_dim}, CLIP's width "
            f"{pooled}; they should be the same, and at most T5's width"
        )
    _check_pieces(where, "2", model.text_encoder_2, model.tokenizer_2)


def _check_pieces(where: Path, which: str, encoder: Any, tokens: Any) -> None:
    if len(tokens) > encoder.config.vocab_size:
        raise CheckpointError(
            f"{where / f'tokenizer_{which}'}: has {len(tokens)} tokens, the text encoder {encoder.config.vocab_size} "
            "embeddings"
        )


def _check_two_texts(where: Path, model: DiffusionModel) -> None:
    """Raise CheckpointError unless the denoiser takes what both text encoders give, beside each other."""
    denoiser = cast(Any, model.denoiser.config)
    both = [cast(Any, part).config for part in (model.text_encoder, model.text_encoder_2)]
    width, pooled = (sum(getattr(config, name) for config in both) for name in ("hidden_size", "projection_dim"))
    if denoiser.joint_attention_dim < max(width, denoiser.pooled_projection_dim):
        raise CheckpointError(
            f"{where}: the denoiser's joint_attention_dim is {denoiser.joint_attention_dim}; the encoders' "
            f"{width} and its pooled_projection_dim are the least"
        )
    if denoiser.pooled_projection_dim != pooled:
        raise CheckpointError(f"{where}: the denoiser's pooled_projection_dim is not the text encoders' {pooled}")
    if any(config.num_hidden_layers < 2 for config in both):
        raise CheckpointError(f"{where}: a text encoder of one layer has no last hidden state but one")
    third = None if model.text_encoder_3 is None else model.text_encoder_3.config.d_model
    if third is not None and third != denoiser.joint_attention_dim:
        raise CheckpointError(f"{where}: T5's width {third} is not the denoiser's joint_attention_dim")


def _check_side_by_side(where: Path, model: DiffusionModel) -> None:
    """Raise CheckpointError unless a UNet takes what both text encoders give, side by side."""
    wanted = cast(Any, model.denoiser.config).cross_attention_dim
    both = [cast(Any, part).config for part in (model.text_encoder, model.text_encoder_2)]
    if sum(config.hidden_size for config in both) != wanted:
        raise CheckpointError(f"{where}: the text encoders' widths together are not the denoiser's cross_attention_dim")
    if both[1].projection_dim > wanted:
        raise CheckpointError(f"{where}: the second text encoder's projection is wider than cross_attention_dim")
    if any(config.num_hidden_layers < 2 for config in both):
        raise CheckpointError(f"{where}: a text encoder of one layer has no last hidden state but one")


def _check_tokens(where: Path, name: str, text: Any, tokens: Any) -> None:
    if not 2 <= tokens.model_max_length <= text.max_position_embeddings:
        raise CheckpointError(
            f"{where / name}: model_max_length is {tokens.model_max_length}; the text encoder takes 2 to "
            f"{text.max_position_embeddings} tokens"
        )
    highest = max(tokens.get_vocab().values())
    if highest >= text.vocab_size:
        raise CheckpointError(f"{where / name}: has a token {highest}, the text encoder {text.vocab_size} embeddings")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours. Raises CheckpointError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a JSON {type(found).__name__}, not an object; fetch it again")
    return found


def digest(directory: Path, beside: Mapping[str, Path] | None = None) -> str:
    """sha256 over every tensor below `directory` (name, dtype, shape, bytes) and over what its other files say.

    These are configs, schedulers, tokenizers and words. `beside`: files and folders of other directories, by the names
    under which they count as if they were in this one.

    Tensors, not weight files, and values of a JSON file, not its text: its layout, and the versions and the place that
    a library notes in it, do not change the digest.
    """
    from safetensors import safe_open

    files = {PurePosixPath(path.relative_to(directory).as_posix()): path for path in directory.rglob("*")}
    for name, lent in (beside or {}).items():
        inside = lent.rglob("*") if lent.is_dir() else (lent,)
        files |= {PurePosixPath(name, path.relative_to(lent).as_posix()): path for path in inside}
    total = hashlib.sha256()
    for counted, path in sorted(files.items()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key)
                    total.update(f"{counted}|{key}|{tensor.dtype}|{tensor.shape}".encode())
                    total.update(tensor.tobytes())
        elif path.suffix in (".json", ".txt") and path.name not in ABOUT and not path.name.endswith(INDEXED):
            total.update(f"{counted}|{_values(path)}".encode())
    return total.hexdigest()


def _values(path: Path) -> str:
    """What a JSON file says, without what a library notes in it; another file's text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    found = json.loads(text)
    if isinstance(found, dict):
        left_out = NOTED | LAST_CALL if path.name == "tokenizer.json" else NOTED
        found = {key: value for key, value in found.items() if key not in left_out}
    return json.dumps(found, sort_keys=True)


# ---- models shipped in a package --------------------------------------------------------------------------------


def embedded(owner: object, name: str) -> Path:
    """The directory `weights/<name>` beside the module that defines `owner`'s class."""
    package = type(owner).__module__.rpartition(".")[0]
    if not package:
        raise CheckpointError(f"model '{name}' is defined in a file outside a package, which has no embedded weights")
    return weights_in(package, name)


def weights_in(package: str, name: str) -> Path:
    """The directory `weights/<name>` of a package. Raises CheckpointError where it is missing."""
    path = Path(str(resources.files(package))) / "weights" / name
    if not path.is_dir():
        raise CheckpointError(f"{path}: the weights of '{name}' are missing; `bench build {name}` makes them")
    return path
