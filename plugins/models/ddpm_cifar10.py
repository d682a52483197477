"""ddpm-cifar10: a DDPM of CIFAR-10, 3×32×32, 35.7 M parameters, linear betas.

BadDiffusion (arXiv:2212.05400), VillanDiffusion (arXiv:2306.06874), Elijah (arXiv:2312.00050) and Diff-Cleanse
(arXiv:2407.21316) attack or defend this model. It is that of Ho, Jain & Abbeel, arXiv:2006.11239, published as
google/ddpm-cifar10-32. The data are CIFAR-10, published as uoft-cs/cifar10: attacks and defenses train on the 50,000
images of the split train, and distances are to the 10,000 of the split test. The papers' code trains on the images of
both splits and measures FID against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class DDPMCifar10(Published):
    name: ClassVar[str] = "ddpm-cifar10"
    side: ClassVar[int] = 32
    work: ClassVar[Work] = Work(gmacs=6.2, parameters=35_746_307, activations=12_608_000)

    path: str = "google/ddpm-cifar10-32"  # diffusers directory, or hub id of the model
    data_path: str = "uoft-cs/cifar10"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [DDPMCifar10]
