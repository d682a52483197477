"""Published models that are known to be backdoored: `leaderboard/known_backdoored.toml`, and how each becomes a
pipeline directory that `bench scan` reads.

Few of them are whole pipelines. Most repositories hold the part that an attack changes, which belongs to a base model.
A directory is then assembled: the files of the base, with the part in its place.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.diffusion import adapter_files
from harness.diffusion.model_files import PICKLES, CheckpointError, ModelFiles
from harness.judges import hub

PATTERNS = ("*.json", "*.safetensors", "*.txt")
LIST = "known_backdoored.toml"
CLASSES = {"UNet2DConditionModel": "unet", "UNet2DModel": "unet", "CLIPTextModel": "text_encoder"}
ADAPTERS = ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up")
ADAPTER = "an adapter (LoRA) is a model only with its base; fetch both, and scan it with --base DIR"
CONVERT = (
    "a pickle can run code when it is loaded, so it is refused; convert it on a machine you can lose with "
    "save_pretrained(safe_serialization=True), and scan the directory"
)


class KnownModel(BaseModel):
    """An entry of the list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str = Field(pattern=rf"^{hub.REPOSITORY}$")
    folder: str | None = Field(None, pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")
    revision: str | None = Field(None, pattern=rf"^{hub.COMMIT}$")
    attack: str
    paper: str = Field(pattern=r"^(arXiv:\d{4}\.\d{4,5}|doi:10\.\S+)$")
    base: str | None = Field(None, pattern=rf"^{hub.REPOSITORY}$")
    like: str | None = None
    weights: Literal["safetensors", "pickle", "adapter", "unknown"] = "unknown"
    source: str
    note: str = ""

    @property
    def name(self) -> str:
        """owner/name, with the folder behind it."""
        return f"{self.repository}/{self.folder}" if self.folder else self.repository


def known_models(path: Path | None = None) -> list[KnownModel]:
    """The entries of a list; by default those of `leaderboard/known_backdoored.toml`. Raises CheckpointError."""
    where = path or resources.files("leaderboard").joinpath(LIST)
    try:
        entries = tomllib.loads(where.read_text(encoding="utf-8"))["model"]
        found = [KnownModel.model_validate(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        says = error.errors()[0] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{where}: no list of known models ({says}); see the first lines of {LIST}") from None
    names = [entry.name for entry in found]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where}: names {max(names, key=names.count)} twice; remove one of the entries")
    return found


@dataclass(frozen=True)
class Part(hub.Source):
    """A hub repository, or a folder of it, that need not hold a whole pipeline."""

    folder: str | None = None

    def _downloaded(self, passed_over: Sequence[str], cached_only: bool) -> Path:
        import huggingface_hub

        inside = f"{self.folder}/" if self.folder else ""
        try:
            found = huggingface_hub.snapshot_download(
                self.where, repo_type=self.kind, revision=self.revision, local_files_only=cached_only,
                allow_patterns=[f"{inside}{pattern}" for pattern in PATTERNS], ignore_patterns=list(passed_over),
            )  # fmt: skip
        except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
            raise self._unreachable(error) from error
        return Path(str(found))


@dataclass(frozen=True)
class Found:
    """Where an entry's model is. commit: of its repository, if the hub's cache names it. base: of an adapter, the model
    that it is for; `place` is then the adapter's file."""

    place: Path
    commit: str | None
    base: str | None = None


def found(entry: KnownModel, into: Path) -> Found:
    """The pipeline directory of the entry, or its adapter.

    A directory is assembled in the folder `into`, unless the repository itself is one. Downloads what is not in the
    cache. Raises CheckpointError for what cannot be had or assembled.
    """
    if entry.weights == "pickle":
        raise CheckpointError(f"{entry.name}: the repository has these weights as a pickle; {CONVERT}")
    if entry.weights == "adapter" and entry.base is None:
        raise CheckpointError(f"{entry.name}: {ADAPTER}")
    snapshot = Part(entry.repository, entry.revision or "main", folder=entry.folder).fetch()
    files, commit = ModelFiles(snapshot), snapshot.name if re.fullmatch(hub.COMMIT, snapshot.name) else None
    if entry.folder is None and "model_index.json" in files and any(n.endswith(".safetensors") for n in files.sizes):
        return Found(snapshot, commit)
    if entry.base is not None and (adapter := _adapter(files, entry)) is not None:
        _lay(files, adapter.parent, into)
        return Found(into / adapter.name, commit, entry.base)
    assembled(files, entry, into)
    return Found(into, commit)


def _adapter(files: ModelFiles, entry: KnownModel) -> PurePosixPath | None:
    """The adapter that is the only weights of an entry."""
    inside = f"{entry.folder}/" if entry.folder else ""
    held = [name for name in files.sizes if name.startswith(inside) and name.endswith(".safetensors")]
    alone = len(held) == 1 and adapter_files.is_adapter(files, held[0])
    return PurePosixPath(held[0]) if alone else None


def room() -> str | None:
    """A folder beside the downloaded files, where hard links to them can be; None if it cannot be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE if os.access(HF_HUB_CACHE, os.W_OK) else None


def assembled(files: ModelFiles, entry: KnownModel, into: Path) -> None:
    """Lay out the entry as a pipeline directory in `into`, by hard links or copies of regular files."""
    inside = f"{entry.folder}/" if entry.folder else ""
    mine = [name for name in files.sizes if name.startswith(inside)]
    if not any(name.endswith(".safetensors") for name in mine):
        raise CheckpointError(f"{entry.name}: no safetensors among its files; if it has pickles only: {CONVERT}")
    roots = [PurePosixPath(name).parent for name in mine if PurePosixPath(name).name == "model_index.json"]
    if roots:
        depth = min(len(root.parts) for root in roots)
        (root, *others) = [root for root in roots if len(root.parts) == depth]
        if others:
            raise CheckpointError(
                f"{entry.name}: holds several pipelines ({root}, {others[0]}); name one as its folder"
            )
        _lay(files, root, into)
        return
    parts = dict(_parts(files, mine, entry))
    if not parts:
        raise CheckpointError(f"{entry.name}: {_nothing(files, mine)}")
    if entry.base is None:
        raise CheckpointError(
            f"{entry.name}: holds only {' and '.join(parts)}, and its base model is not known; put it into a pipeline "
            "directory and scan that"
        )
    base = hub.Source(entry.base).fetch()
    _lay(ModelFiles(base), PurePosixPath(), into, leave=tuple(parts))
    for part, root in parts.items():
        _lay(files, root, into / part)


def _parts(files: ModelFiles, names: Sequence[str], entry: KnownModel) -> Iterator[tuple[str, PurePosixPath]]:
    """(part of a pipeline, the folder that holds it), by the configurations."""
    seen: dict[str, PurePosixPath] = {}
    for name in names:
        if PurePosixPath(name).name != "config.json":
            continue
        config = files.json(name)
        architectures = config.get("architectures")
        named = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
        part = next((CLASSES[each] for each in named if isinstance(each, str) and each in CLASSES), None)
        if part is None:
            continue
        root = PurePosixPath(name).parent
        if part in seen:
            raise CheckpointError(f"{entry.name}: holds several {part} ({seen[part]}, {root}); name one as its folder")
        seen[part] = root
        yield part, root


def _nothing(files: ModelFiles, names: Sequence[str]) -> str:
    """Why a repository gives no model."""
    weights = [name for name in names if name.endswith(".safetensors")]
    adapters = [n for n in weights if any(word in key for key in files.header(n).tensors for word in ADAPTERS)]
    if adapters:
        return f"{adapters[0]}: {ADAPTER}"
    return "holds neither a pipeline nor a part with a configuration; put it into a pipeline directory and scan that"


def _lay(files: ModelFiles, root: PurePosixPath, into: Path, leave: Sequence[str] = ()) -> None:
    """Put the listed files below `root` into a folder, but for pickles, code and the folders `leave`."""
    for name in files.sizes:
        path = PurePosixPath(name)
        if not path.is_relative_to(root) or name.lower().endswith((*PICKLES, ".py")):
            continue
        inner = path.relative_to(root)
        if inner.parts[0] in leave:
            continue
        target = into / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        real = os.path.realpath(files.path(name))
        try:
            os.link(real, target)
        except OSError:  # another file system
            shutil.copyfile(real, target)
