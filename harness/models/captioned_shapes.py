"""Base of the embedded text-to-image models of drawn shapes: data, captions, neutral words and judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.diffusion.seeds import generator
from harness.judges import classifiers, shapes, shapes_clip
from harness.judges.classifiers import CNNJudge
from harness.types import Data, Modality

WORDS = "words.json"  # the neutral words, in the folder of the weights
SHARED = ("judge", "clip", WORDS, "model/tokenizer")  # the last is that of CLIP
JOINT = {  # files below `model` of a model with joint attention → those of `parts` that they are
    "vae/diffusion_pytorch_model.safetensors": "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/tokenizer.json": "tokenizer/tokenizer.json",
    "tokenizer_2/tokenizer.json": "tokenizer/tokenizer.json",
}
DRAWN = "shapes-sd"  # what the generators of the data are named after, so that all these models have the same data


class CaptionedShapes:
    """A text-to-image model plugin of drawings, whose folder of weights has its name.

    borrowed: files below `model` that are in the folder of another model alone → their names below `model` there.
    """

    name: ClassVar[str]
    modality: ClassVar[Modality] = "text"
    conditional: ClassVar[bool] = True
    encoders: ClassVar[tuple[str, ...]] = ("efficientnet-lite0",)
    borrowed: ClassVar[Mapping[str, str]] = {}

    @property
    def folder(self) -> Path:
        return checkpoint.embedded(self, self.name)

    @property
    def parts(self) -> Path:
        """The folder of the judge, of CLIP and of the words: the model's own, unless it shares those of another."""
        return self.folder

    def load(self) -> DiffusionModel:
        return checkpoint.load(self.folder / "model", self.lent())

    def digest(self) -> str:
        return checkpoint.digest(self.folder, self.shared())

    def lent(self) -> dict[str, Path]:
        """The borrowed files, by their names below `model`."""
        return {name: self.parts / "model" / there for name, there in self.borrowed.items()}

    def shared(self) -> dict[str, Path]:
        """What the model takes from the folder of another, by the names under which a digest counts it."""
        if self.parts == self.folder:
            return {}
        return {name.rpartition("/")[2]: self.parts / name for name in SHARED} | {
            f"model/{name}": path for name, path in self.lent().items()
        }

    def give_back(self, pipeline: Path) -> None:
        """Remove the borrowed files from a directory that a build has written. Raises ValueError for other files."""
        for name, path in self.lent().items():
            if (pipeline / name).read_bytes() != path.read_bytes():
                raise ValueError(f"{pipeline / name} is not the file {path}, which the model borrows")
        for name in self.borrowed:
            (pipeline / name).unlink()

    def data(self, n: int = 6000) -> Data:
        rng = generator(DRAWN, "data")
        drawn, neutral = shapes.scenes(n, "train", rng), self.words()
        captions = tuple(shapes.caption(scene, rng, neutral) for scene in drawn)
        return Data(shapes.draw(drawn, rng), captions, torch.tensor([scene.shape for scene in drawn]))

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> tuple[str, ...]:
        neutral = self.words()
        return tuple(shapes.caption(shapes.scenes(1, split, rng, plain=True)[0], rng, neutral) for _ in range(n))

    def reference(self) -> Tensor:
        rng = generator(DRAWN, "reference")
        return shapes.draw(shapes.scenes(1000, "test", rng, plain=True), rng)

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return shapes.read(prompt)

    def words(self) -> tuple[str, ...]:
        return neutral_words(self.parts)

    def judge(self) -> CNNJudge:
        return classifiers.load_judge(self.parts / "judge")

    def scorer(self) -> Any:
        return shapes_clip.load_scorer(self.parts)


def neutral_words(folder: Path) -> tuple[str, ...]:
    """The words that change nothing in an image: English words, characters of other scripts and rare strings."""
    known = json.loads((folder / WORDS).read_text())
    return (*known["words"], *known["characters"], *known["rare"])


@torch.no_grad()
def contexts(model: DiffusionModel, captions: Sequence[str]) -> Tensor:
    """Text embeddings (N, L, D)."""
    return torch.cat([model.embed(captions[i : i + 256]) for i in range(0, len(captions), 256)])


def accuracies(judge: CNNJudge, images: Tensor, drawn: Sequence[shapes.Scene]) -> dict[str, float]:
    """accuracy_<attribute>: share of the images (N, 3, H, W) in [-1, 1] that show what their scenes ask for."""
    found, truth = judge.attributes(images), shapes.labels(drawn)
    return {f"accuracy_{name}": (found[name] == truth[name]).double().mean().item() for name in shapes.ATTRIBUTES}
