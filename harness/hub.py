"""Models and data of others: a local directory or a repository of the Hugging Face hub, checked before it is loaded.

Only safetensors, configurations, tokenizer files and parquet are fetched; pickles and code are left where they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness import checkpoint
from harness.checkpoint import CheckpointError

if TYPE_CHECKING:
    from harness.diffusion import DiffusionModel

REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"
COMMIT = r"[0-9a-f]{40}"
MODEL_FILES = [
    "model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model*.safetensors*",
    "*/config.json", "*/scheduler_config.json", "*/diffusion_pytorch_model*.safetensors*", "*/model*.safetensors*",
    "tokenizer/*", "open_clip_*",
]  # fmt: skip
PASSED_OVER = ["*.fp16*", "*.non_ema*", "safety_checker/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py"]
DATA_FILES = ["*.parquet"]
MOST = 2**20  # a number in a network's configuration above this is a mistake or an attack
MOST_LAYERS = 256
LARGER = 20  # a pruned network's file holds a few times less than its configuration asks for, never so much less


@dataclass(frozen=True)
class Source:
    """Where a model or a data set comes from: `where` is a local directory or a hub id, owner/name."""

    where: str
    revision: str = "main"
    kind: Literal["model", "dataset"] = "model"

    @property
    def directory(self) -> Path | None:
        """The local directory, None for a hub id. Raises CheckpointError for what is neither."""
        path = Path(self.where).expanduser()
        if path.is_dir():
            if self.revision != "main":
                raise CheckpointError(f"{path}: a local directory has no revision '{self.revision}'; leave it out")
            return path
        if path.exists() or not re.fullmatch(REPOSITORY, self.where):
            what = "is a file" if path.is_file() else "no such directory"
            raise CheckpointError(f"{self.where}: {what}; give a directory, or a hub id such as google/ddpm-cifar10-32")
        return None

    def fetch(self) -> Path:
        """The directory with the files, downloaded into the hub's own cache where it is not local."""
        return self.directory or self._snapshot(False)

    def _snapshot(self, cached_only: bool) -> Path:
        import huggingface_hub

        patterns = MODEL_FILES if self.kind == "model" else DATA_FILES
        try:
            found = huggingface_hub.snapshot_download(
                self.where, repo_type=self.kind, revision=self.revision, allow_patterns=patterns,
                ignore_patterns=PASSED_OVER, local_files_only=cached_only,
            )  # fmt: skip
        except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
            raise self._unreachable(error) from error
        return Path(str(found))

    def _unreachable(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return CheckpointError(
            f"{self.kind} {self.where} at {self.revision} cannot be had from the hub ({reason}); "
            "give a local directory instead"
        )

    def identity(self) -> str:
        """What decides the content: the commit of a hub repository, a digest of a local directory."""
        directory = self.directory
        if directory is None:
            return f"hub:{self.kind}:{self.where}@{self.commit()}"
        return _digest(directory) if self.kind == "model" else _digest_of_files(directory)

    def commit(self) -> str:
        """The commit that the revision names, asked of the hub, or of its cache where the hub cannot be reached."""
        if re.fullmatch(COMMIT, self.revision):
            return self.revision
        import huggingface_hub

        try:
            found = huggingface_hub.HfApi().repo_info(self.where, revision=self.revision, repo_type=self.kind).sha
        except Exception as error:
            try:
                found = self._snapshot(True).name
            except CheckpointError:
                raise self._unreachable(error) from error
        return str(found)


def _digest(directory: Path) -> str:
    """sha256 of a model directory: its tensors, and every JSON file, because a configuration changes numbers too."""
    total = hashlib.sha256(checkpoint.digest(directory).encode())
    for path in sorted(directory.rglob("*.json")):
        if path.name != "bench.json":
            total.update(path.relative_to(directory).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def _digest_of_files(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()}|{content}\n".encode())
    return total.hexdigest()


# ---- loading what may be hostile ------------------------------------------------------------------------------------


def load(source: Source) -> DiffusionModel:
    """The model as fp32 on the CPU. Raises CheckpointError for what cannot be had, read safely or read completely."""
    directory = source.fetch()
    check(directory)
    try:
        model = checkpoint.load(directory)
    except ValueError as error:  # a prediction type, say, that no model here has
        raise CheckpointError(f"{directory}: {error}") from error
    classes = [k for k in ("num_class_embeds", "class_embed_type") if getattr(model.denoiser.config, k, None)]
    if classes:
        raise CheckpointError(f"{directory}: a denoiser that has to be told a class ({classes[0]}) is not supported")
    if getattr(model.denoiser.config, "sample_size", None) is None:
        raise CheckpointError(f"{directory}: the denoiser's config.json says no side (sample_size); fetch it again")
    if _product(list(model.shape)) > MOST:
        raise CheckpointError(f"{directory}: makes samples of {model.shape} numbers; at most {MOST:,} are read")
    return model


def check(directory: Path) -> None:
    """Raise CheckpointError for a directory that is empty, whose safetensors are damaged, or whose configuration asks
    for a network out of all proportion to its weights: building that could take all memory."""
    if not any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is empty; give a directory saved by a diffusers pipeline")
    held = {path: _numbers_held(path) for path in sorted(directory.rglob("*.safetensors"))}
    for path in sorted(directory.rglob("config.json")):
        config = checkpoint.json_object(path)
        _plausible(config, path)
        beside = sum(n for file, n in held.items() if file.parent == path.parent)
        asked = _numbers_asked(config, path)
        if beside and asked > LARGER * beside:
            raise CheckpointError(
                f"{path}: asks for a network of {asked:,} numbers where its safetensors hold {beside:,}; it lies"
            )


def left_alone(directory: Path) -> list[str]:
    """Files below `directory` that could run code if something loaded them; nothing here does."""
    suffixes = (*checkpoint.PICKLES, ".py")
    return [p.relative_to(directory).as_posix() for p in sorted(directory.rglob("*")) if p.suffix in suffixes]


def _numbers_held(path: Path) -> int:
    """Elements in a safetensors file, by its header, which must fit the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error
    return sum(_product(shape) for shape in shapes)


def _product(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _plausible(config: Mapping[str, Any], path: Path) -> None:
    for name, value in _numbers(config):
        most = MOST_LAYERS if "layers" in name else MOST
        if abs(value) > most:
            raise CheckpointError(f"{path}: {name} = {value:,} is not a network's; at most {most:,} is read")
    for name, value in config.items():
        if isinstance(value, list) and len(value) > MOST_LAYERS:
            raise CheckpointError(f"{path}: {name} lists {len(value):,} entries; at most {MOST_LAYERS} are read")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                yield name, item


def _numbers_asked(config: Mapping[str, Any], path: Path) -> int:
    """Parameters of the diffusers network that a configuration describes, built without memory; 0 for other parts."""
    import diffusers
    import torch

    name = str(config.get("_class_name", ""))
    if name not in ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL", "VQModel"):
        return 0
    try:
        with torch.device("meta"):
            network = getattr(diffusers, name).from_config(dict(config))
    except Exception as error:  # whatever a constructor says of arguments that do not fit together
        raise CheckpointError(f"{path}: describes no {name} that can be built: {error}") from error
    return sum(parameter.numel() for parameter in network.parameters())
