"""Base of the published models: weights and data from the hub or from local directories, public judges.

Nothing is shipped, and nothing is fetched before it is needed. `path` and `data_path` are local directories or hub ids.
If the revision is a branch, the hub is queried for its commit when a run is planned; if it is a commit, it is not
queried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from harness.types import Data, Judge, Modality, TextImageScorer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from harness.diffusion.model import DiffusionModel

CLIP_WEIGHTS = "timm/vit_base_patch32_clip_224.openai"


@dataclass(frozen=True)
class Work:
    """What planning must know about a published network before it is downloaded, per image.

    gmacs: 1e9 multiply-additions of one evaluation, counted by torch's FlopCounterMode on the published architecture.
    parameters: of the denoiser. activations: numbers that its layers compute in one evaluation, which training stores.
    """

    gmacs: float
    parameters: int
    activations: int


@dataclass(frozen=True)
class Published:
    """A model plugin whose weights and data are published by others."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    modality: ClassVar[Modality] = "noise"
    conditional: ClassVar[bool] = False
    family: ClassVar[Literal["vp", "ve"]] = "vp"
    latent: ClassVar[bool] = False
    encoders: ClassVar[tuple[str, ...]] = ("efficientnet-lite0",)  # public encoders that know its pictures; () = none
    side: ClassVar[int]  # side in pixels, to which the data are resized
    splits: ClassVar[tuple[str, ...]] = ("train",)  # splits of the data on which attacks and defenses train
    reference_splits: ClassVar[tuple[str, ...]] = ("validation", "test")  # splits of the real images for distances;
    # every tenth image of the others, on which then nobody trains, where the data have none of them
    work: ClassVar[Work]
    architecture: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # part → its published configuration, for rehearsals

    path: str = ""  # diffusers directory, or hub id of the model
    revision: str = "main"  # branch, tag or commit of the model on the hub; a commit makes a run repeatable
    data_path: str = ""  # directory of parquet files or images, or hub id of the data set
    data_revision: str = "main"  # branch, tag or commit of the data set on the hub
    images: Annotated[int, Ge(0)] = 0  # training images that are read; 0 = all
    references: Annotated[int, Ge(0)] = 0  # real images for the Fréchet distance; 0 = all
    inception: str = "released"  # weights of Inception-v3: torch-fidelity's release, which alone gives
    # an FID, or a file; '' = no such judge
    clip: str = CLIP_WEIGHTS  # CLIP ViT-B/32 in open_clip's format: directory or hub id; '' = no CLIP
    checkpointing: bool = False  # training recomputes activations: a fraction of their memory, a third more time

    def load(self) -> DiffusionModel:
        from harness.judges import hub

        model = hub.load(hub.Source(self.path, self.revision))
        for what, have, wanted in (
            ("takes prompts", model.conditional, self.conditional),
            ("lets variance explode", model.family == "ve", self.family == "ve"),
            ("diffuses latents", model.vae is not None, self.latent),
        ):
            if have != wanted:
                one, other = (what, f"{self.name} does not") if have else (f"does not: {what}", self.name + " does")
                raise hub.CheckpointError(f"{self.path} {one}, {other}; name a fitting model")
        return model

    def digest(self) -> str:
        from harness.judges.hub import Source
        from harness.judges.pretrained_judges import inception_identity

        parts = [
            Source(self.path, self.revision).identity(),
            Source(self.data_path, self.data_revision, "dataset").identity(),
            inception_identity(self.inception),
            Source(self.clip).identity() if self.clip else "",
            *self.more_identities(),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def more_identities(self) -> tuple[str, ...]:
        """Everything else that the numbers depend on."""
        return ()

    def data(self) -> Data:
        return self._read(self.images, False)

    def reference(self) -> Tensor:
        return self._read(self.references, True).images

    def _read(self, most: int, reference: bool) -> Data:
        from harness.judges import image_folders
        from harness.judges.hub import Source

        folder = Source(self.data_path, self.data_revision, "dataset").fetch()
        if image_folders.has(folder, self.reference_splits):
            splits = self.reference_splits if reference else self.splits
            return image_folders.read(folder, splits, self.side, most)
        return image_folders.read(folder, self.splits, self.side, most, held_out=reference)

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...] | None:
        return None

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return {}

    def words(self) -> tuple[str, ...]:
        return ()

    def judge(self) -> Judge | None:
        from harness.judges.pretrained_judges import load_inception

        return load_inception(self.inception) if self.inception else None

    def scorer(self) -> TextImageScorer | None:
        from harness.judges.hub import Source
        from harness.judges.pretrained_judges import load_clip

        return load_clip(Source(self.clip)) if self.clip else None


@dataclass(frozen=True)
class Trainable(Published):
    """A pixel model of a published architecture that `bench build NAME -o DIRECTORY` trains from random weights on its
    data, with their mirror images unless `mirrored` is False. NAME(path='DIRECTORY/model') is then the model.
    """

    mirrored: ClassVar[bool] = True
    training_batch: ClassVar[int] = 128  # as in Ho, Jain & Abbeel, arXiv:2006.11239
    training_lr: ClassVar[float] = 2e-4  # theirs

    def build(self, out: Path, device: str = "cpu", minutes: float = 1440.0) -> dict[str, Any]:
        """Trains for about `minutes` in bf16 with an average of the weights (decay 0.9999), and writes the model below
        `out`. Returns the measured facts for provenance.json."""
        from harness.diffusion import checkpoint
        from harness.diffusion.interrupted import UNFINISHED
        from harness.diffusion.seeds import generator
        from harness.diffusion.training import Examples, prepared
        from harness.models.architectures import untrained
        from harness.models.real_data import content, train_denoiser, with_mirrored
        from harness.types import Data

        data = self.data()
        model = prepared(self, untrained(self.architecture).to(device))
        images = with_mirrored(data.images) if self.mirrored else data.images
        rng = generator(self.name, "build")
        trained = train_denoiser(
            model, Examples(model, Data(images)), rng, out / UNFINISHED, batch=self.training_batch,
            lr=self.training_lr, ema=0.9999, minutes=minutes,
        )  # fmt: skip
        checkpoint.save(model.to("cpu"), out / "model")
        return {**trained, "data": {"train": content(data)}}
