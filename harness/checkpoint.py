"""DiffusionModel ↔ a diffusers directory of safetensors. Pickles are refused: a model under test is hostile.

The config of a pruned network still describes the whole one, so stock diffusers refuses its weights. The shapes that
differ are in `pruned.json` beside them, and only where that file is do we let them differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from harness import pruning
from harness.diffusion import DiffusionModel
from harness.features import AttributeCNN, CNNJudge

PRUNED = "pruned.json"
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", PRUNED)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "vqvae": ("AutoencoderKL", "VQModel"),  # an LDMPipeline's name for it
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "ScoreSdeVeScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
}


class CheckpointError(ValueError):
    """A model directory that cannot be read safely and completely; the message names the file and the way out."""


def save(model: DiffusionModel, directory: Path, labels: dict[str, str] | None = None, fp16: bool = False) -> None:
    """Write `model` as a diffusers pipeline directory, safetensors only; stock diffusers loads it unless it is pruned.

    labels: written to `bench.json` beside it (a backdoored model says so there). fp16: halve the weights on disk.
    """
    import diffusers

    library: Any = diffusers
    if model.conditional:
        pipeline: Any = library.StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.denoiser,
            scheduler=model.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        cls = library.ScoreSdeVePipeline if model.family == "ve" else library.DDPMPipeline
        parts = {"unet": model.denoiser, "scheduler": model.scheduler}
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
    shapes = pruning.reshaped(model.denoiser)
    pruned = directory / "unet" / PRUNED
    pruned.unlink(missing_ok=True)
    if shapes:
        pruned.write_text(json.dumps(shapes, indent=0, sort_keys=True))
    if labels:
        (directory / "bench.json").write_text(json.dumps(labels, indent=1, sort_keys=True))


def load(directory: Path) -> DiffusionModel:
    """Read a pipeline directory as fp32 on the CPU, without running any code from it.

    Raises CheckpointError for a directory that holds weights only as pickles, names classes outside `PARTS`, lacks a
    part, or whose tensors do not fit its config.
    """
    index = _index(directory)
    parts: dict[str, Any] = {}
    for name, allowed in PARTS.items():
        library, cls = _named(index, name, directory)
        if library is None or cls is None:
            continue
        if cls not in allowed:
            raise CheckpointError(
                f"{directory / 'model_index.json'}: {name} is a {cls}; supported: {', '.join(allowed)}"
            )
        parts[name] = _part(_folder(directory, name), library, cls)
    if "unet" not in parts or "scheduler" not in parts:
        raise CheckpointError(
            f"{directory}: model_index.json names no unet or no scheduler; is it a diffusers pipeline?"
        )
    return DiffusionModel(
        parts["unet"],
        parts["scheduler"],
        parts.get("vae", parts.get("vqvae")),
        parts.get("text_encoder"),
        parts.get("tokenizer"),
    )


def _index(directory: Path) -> dict[str, Any]:
    path = directory / "model_index.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: no model_index.json; give a directory saved by a diffusers pipeline")
    return json_object(path)


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: a JSON {type(found).__name__}, not an object; fetch it again")
    return found


def _named(index: Mapping[str, Any], name: str, directory: Path) -> list[Any]:
    """The library and the class that the index names for a part; [None, None] for a part that the model has not."""
    entry = index.get(name) or [None, None]
    if not isinstance(entry, list) or len(entry) != 2:
        raise CheckpointError(
            f"{directory / 'model_index.json'}: {name} is no pair of library and class; fetch it again"
        )
    return entry


def _folder(directory: Path, name: str) -> Path:
    """Where a part is: in its own folder, or beside the index, as in the hub's older DDPM and NCSN++ repositories."""
    flat = {"unet": "config.json", "scheduler": "scheduler_config.json"}.get(name)
    own = directory / name
    return directory if flat is not None and not own.is_dir() and (directory / flat).is_file() else own


def _part(directory: Path, library: str, cls: str) -> Any:
    import diffusers
    import torch
    import transformers

    if not directory.is_dir():
        raise CheckpointError(f"{directory}: missing, though model_index.json names it")
    for path in (directory / name for name in CONFIGS):
        if path.is_file():
            json_object(path)
    weights = [p for p in directory.iterdir() if p.suffix == ".safetensors"]
    pickles = [p for p in directory.iterdir() if p.suffix in PICKLES]
    if pickles and not weights:
        raise CheckpointError(
            f"{pickles[0]}: a pickle can run code when it is loaded, so it is refused; "
            "convert it on a machine you can lose with save_pretrained(safe_serialization=True)"
        )
    try:
        owner = getattr(diffusers if library == "diffusers" else transformers, cls)
        if cls.endswith("Scheduler") or cls.startswith("CLIPTokenizer"):
            return owner.from_pretrained(directory, local_files_only=True)
        if (directory / PRUNED).is_file():
            return _pruned(directory, owner)
        part = owner.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers and transformers raise a dozen types for a bad directory
        raise CheckpointError(f"{directory}: cannot be loaded as {cls}: {error}") from error
    if cls == "VQModel" and "scaling_factor" not in json_object(directory / "config.json"):
        part.register_to_config(scaling_factor=1.0)  # latent diffusion's own; diffusers would put Stable Diffusion's
    return part.eval().requires_grad_(False)


def _pruned(directory: Path, owner: Any) -> Any:
    """A network whose channels `pruned.json` says were removed; every tensor has to be there, in that shape."""
    import torch
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):  # weights that are replaced at once are drawn from the global generator
        net = owner.from_config(owner.load_config(directory, local_files_only=True))
    pruning.reshape(net, json_object(directory / PRUNED))
    (weights,) = directory.glob("*.safetensors")
    net.load_state_dict(load_file(weights), strict=True)
    return net.float().eval().requires_grad_(False)


def digest(directory: Path) -> str:
    """sha256 over every tensor below `directory` (name, dtype, shape, bytes) and over tokenizer and scheduler files.

    Tensors, not weight files: a header that a library version writes differently does not change it.
    """
    from safetensors import safe_open

    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                for key in sorted(file.keys()):
                    tensor = file.get_tensor(key)
                    total.update(f"{name}|{key}|{tensor.dtype}|{tensor.shape}".encode())
                    total.update(tensor.tobytes())
        elif path.name in ("vocab.json", "merges.txt", "scheduler_config.json"):
            total.update(name.encode() + path.read_bytes())
    return total.hexdigest()


# ---- models shipped in a package --------------------------------------------------------------------------------


def embedded(owner: object, name: str) -> Path:
    """The directory `weights/<name>` beside the module that defines `owner`'s class."""
    package = type(owner).__module__.rpartition(".")[0]
    if not package:
        raise CheckpointError(f"model '{name}' is defined in a file outside a package, which has no embedded weights")
    path = Path(str(resources.files(package))) / "weights" / name
    if not path.is_dir():
        raise CheckpointError(f"{path}: the weights of '{name}' are missing; `bench build {name}` makes them")
    return path


def save_judge(judge: CNNJudge, directory: Path) -> None:
    """Write a judge as fp16 safetensors and its constructor's arguments as JSON."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"name": judge.name, **judge.net.arguments}))
    save_file({k: v.half().contiguous() for k, v in judge.net.state_dict().items()}, directory / "judge.safetensors")


def load_judge(directory: Path) -> CNNJudge:
    """Read a judge written by `save_judge`."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())
    name = config.pop("name")
    net = AttributeCNN(**config)
    net.load_state_dict({k: v.float() for k, v in load_file(directory / "judge.safetensors").items()})
    return CNNJudge(name, net.eval().requires_grad_(False))
