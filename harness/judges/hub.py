"""Models and data of others: a local directory or a repository of the Hugging Face hub, checked before it is loaded.

Only safetensors, configurations, tokenizer files and parquet are fetched; pickles and code are left where they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.diffusion import adapter_files, adapters, checkpoint, embedding_files, single_file
from harness.diffusion.model_files import FOREIGN, PICKLES, CheckpointError, ModelFiles, local, short

if TYPE_CHECKING:
    from harness.diffusion.embedding_files import Embedding
    from harness.diffusion.model import DiffusionModel

REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"
COMMIT = r"[0-9a-f]{40}"
MODEL_FILES = [
    "model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model*.safetensors*",
    "*/config.json", "*/scheduler_config.json", "*/diffusion_pytorch_model*.safetensors*", "*/model*.safetensors*",
    "tokenizer/*", "tokenizer_2/*", "tokenizer_3/*", "open_clip_*",
]  # fmt: skip
PASSED_OVER = ["*.non_ema*", "safety_checker/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py"]
HALF = "*.fp16*"  # fetched only where a part has no other weights
DATA_FILES = ["*.parquet"]
WEIGHTS = (".safetensors", *FOREIGN)


@dataclass(frozen=True)
class Source:
    """Where a model or a data set comes from: `where` is a local directory, a safetensors file that holds a whole
    pipeline (harness.diffusion.single_file), or a hub id, owner/name. config: for such a file, a directory with the
    configurations, and of FLUX the parts, that it does not hold."""

    where: str
    revision: str = "main"
    kind: Literal["model", "dataset"] = "model"
    config: Path | None = None

    @property
    def directory(self) -> Path | None:
        """The local directory, None for a hub id. Raises CheckpointError for what is neither."""
        path = local(self.where)
        if path.is_dir():
            if self.revision != "main":
                raise CheckpointError(f"{path}: a local directory has no revision '{self.revision}'; leave it out")
            return path
        if path.is_file() and self.kind == "model":
            return single_file.opened(path, self.config).directory
        if path.exists() or not re.fullmatch(REPOSITORY, self.where):
            what = "is a file" if path.is_file() else "no such directory"
            raise CheckpointError(
                f"{self.where}: {what}; give a directory, a .safetensors file, or a hub id such as "
                "google/ddpm-cifar10-32"
            )
        return None

    def fetch(self) -> Path:
        """The directory with the files, downloaded into the hub's own cache where it is not local."""
        return self.directory or self._snapshot(False)

    def _snapshot(self, cached_only: bool) -> Path:
        found = self._downloaded([*PASSED_OVER, HALF], cached_only)
        if self.kind == "model" and (found / "model_index.json").is_file():
            try:
                checkpoint.read_files(found)
            except CheckpointError:
                found = self._downloaded(PASSED_OVER, cached_only)
        return found

    def _downloaded(self, passed_over: Sequence[str], cached_only: bool) -> Path:
        import huggingface_hub

        patterns = MODEL_FILES if self.kind == "model" else DATA_FILES
        try:
            found = huggingface_hub.snapshot_download(
                self.where, repo_type=self.kind, revision=self.revision, allow_patterns=patterns,
                ignore_patterns=list(passed_over), local_files_only=cached_only,
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
        whole = self.kind == "dataset" or not (directory / "model_index.json").is_file()
        return _digest_of_files(directory) if whole else _digest(directory)

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
    """sha256 over the files of a model directory that `load` reads."""
    return ModelFiles(directory).digest(checkpoint.read_files(directory))


def _digest_of_files(directory: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()}|{content}\n".encode())
    return total.hexdigest()


# ---- loading what may be hostile ------------------------------------------------------------------------------------


def load(source: Source) -> DiffusionModel:
    """The model as fp32 on the CPU, after one evaluation of it. Raises CheckpointError for what cannot be had, read
    safely or read completely, and for a network that answers with another shape or with NaN."""
    directory = source.fetch()
    model = checkpoint.load(directory)
    tried(model, directory)
    return model


def adapter_in(where: str) -> Path | None:
    """The file of a low-rank adapter that `where` is, or that alone makes up the directory `where`; None for anything
    else. Raises CheckpointError for a file that cannot be read."""
    path = _lone_file(where)
    return path if path is not None and adapter_files.is_adapter(ModelFiles.of_file(path), path.name) else None


def embedding_in(where: str) -> Path | None:
    """The same for the file of a textual-inversion embedding."""
    path = _lone_file(where)
    return path if path is not None and embedding_files.is_embedding(ModelFiles.of_file(path), path.name) else None


def _lone_file(where: str) -> Path | None:
    """The safetensors file that `where` is, or that alone is in a directory without a pipeline."""
    path = local(where)
    if path.is_dir() and not (path / "model_index.json").exists():
        held = sorted(path.glob("*.safetensors"))
        path = held[0] if len(held) == 1 else path
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    single_file.refuse_pickle(ModelFiles.of_file(path), path)
    return path


def with_adapter(source: Source, adapter: Path) -> DiffusionModel:
    """The model of `source`, the base, with an adapter's changes in its weights. Raises CheckpointError."""
    model = load(source)
    if model.adapter is not None:
        raise CheckpointError(f"{source.where}: has an adapter of its own; give the base without one")
    adapters.attach_file(ModelFiles.of_file(adapter), adapter.name, model)
    tried(model, adapter)
    return model


def with_embedding(source: Source, file: Path) -> tuple[DiffusionModel, Embedding]:
    """The model of `source`, the base, whose tokenizers and text encoders know the word of an embedding. Raises
    CheckpointError."""
    embedding = embedding_files.read(ModelFiles.of_file(file), file.name)
    return embedding_files.added(load(source), embedding), embedding


def tried(model: DiffusionModel, directory: Path) -> None:
    """Raise CheckpointError, naming `directory`, for a network that answers with another shape or with NaN, and for one
    that takes far more work than its weights and its size account for."""
    import torch

    from harness.diffusion.bounded_work import Bounded, TooMuchWork, most_for

    rng = torch.Generator().manual_seed(0)
    noise, t = torch.randn((2, *model.shape), generator=rng), torch.tensor([0, model.T // 2])
    try:
        with torch.no_grad():
            context = model.embed(["", "a"]) if model.conditional else None
            with Bounded(most_for(model.denoiser, noise[0, 0].numel(), len(noise))):
                eps = model.eps(noise, t, context)
            _try_autoencoder(model)
    except TooMuchWork as error:
        raise CheckpointError(f"{directory}: {error}; scan it with a smaller sample_size") from None
    except Exception as error:  # whatever a layer says of sizes that do not fit together
        raise CheckpointError(
            f"{directory}: the network cannot be evaluated ({short(error)}); its config may be that of other weights"
        ) from None
    if eps.shape != noise.shape:
        raise CheckpointError(f"{directory}: the network returns {tuple(eps.shape)} for {tuple(noise.shape)}")
    if not torch.isfinite(eps).all():
        raise CheckpointError(f"{directory}: the network returns NaN or infinity; fetch its weights again")


def _try_autoencoder(model: DiffusionModel) -> None:
    """Decode one latent without numbers, to see that the sizes fit and that the work is in proportion."""
    import torch

    from harness.diffusion.bounded_work import Bounded, most_for

    if model.vae is None:
        return
    vae: Any = model.vae
    _, height, width = model.shape
    places = height * width * 4 ** (len(vae.config.block_out_channels) - 1)
    with torch.device("meta"):  # torch's FakeTensorMode keeps forked processes from training ever after
        empty = type(vae).from_config(vae.config).eval()
        latent = torch.empty(1, *model.shape)
    with suppress(NotImplementedError), Bounded(most_for(vae, places, 1)):  # of a layer that needs the numbers
        empty.decode(latent)


@dataclass(frozen=True)
class Ignored:
    """Files of a model directory that were not read: that could run code, and weights of other models or of changes to
    this one: EMA weights, adapters, variants, other formats. tensors: of a single file, those that belong to no part of
    the pipeline. lacking: parts that a single file does not hold."""

    code: tuple[str, ...]
    weights: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """What a reader has to know about them."""
        said = []
        if self.code:
            said.append(f"Files that could run code were not opened: {_first(self.code)}.")
        if self.weights:
            said.append(
                "Other weights in the directory were not examined, so nothing is known of the model with them: "
                f"{_first(self.weights)}."
            )
        if self.tensors:
            said.append(f"Tensors that belong to no part of the pipeline were not examined: {_first(self.tensors)}.")
        if self.lacking:
            said.append(
                f"The file does not hold these parts: {_first(self.lacking)}. Those of the directory that --config "
                "names were taken, so nothing is known of the file's denoiser beside others."
            )
        return said


def _first(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ignored(directory: Path) -> Ignored:
    """What `load` leaves alone below `directory`, but for parts that make no image. Raises CheckpointError."""
    files = ModelFiles(directory)
    if (laid_out := single_file.origin(directory)) is not None:
        return Ignored((), (), laid_out.unread, tuple(sorted({name.partition("/")[0] for name in laid_out.beside})))
    read = set(checkpoint.read_files(directory))
    code = tuple(name for name in files.sizes if name.lower().endswith((*PICKLES, ".py")))
    weights = [name for name in files.sizes if name.lower().endswith(WEIGHTS) and name not in read]
    return Ignored(code, tuple(name for name in weights if name.partition("/")[0] not in checkpoint.IGNORED))
