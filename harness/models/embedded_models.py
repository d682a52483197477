"""Base of the embedded unconditional models: weights, judge and provenance in the package, no prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.diffusion import checkpoint
from harness.diffusion.model import DiffusionModel
from harness.judges import classifiers, digits
from harness.judges.classifiers import CNNJudge
from harness.types import Data, Modality


class Embedded:
    """An unconditional model plugin whose folder of weights has its name."""

    name: ClassVar[str]
    modality: ClassVar[Modality] = "noise"
    conditional: ClassVar[bool] = False

    @property
    def folder(self) -> Path:
        return checkpoint.embedded(self, self.name)

    def load(self) -> DiffusionModel:
        return checkpoint.load(self.folder / "model")

    def digest(self) -> str:
        return checkpoint.digest(self.folder)

    def data(self) -> Data:
        raise NotImplementedError

    def reference(self) -> Tensor:
        raise NotImplementedError

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> None:
        return None

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return {}

    def words(self) -> tuple[str, ...]:
        return ()

    def judge(self) -> CNNJudge:
        return classifiers.load_judge(self.folder / "judge")

    def scorer(self) -> None:
        return None


class EmbeddedDigits(Embedded):
    """An embedded model of the handwritten digits, (1, 16, 16). Its data are 1200 digits, its reference 597 others."""

    def data(self) -> Data:
        return digits.split("train")

    def reference(self) -> Tensor:
        return digits.split("test").images
