"""ddpm-celebahq: a DDPM of CelebA-HQ, 3×256×256, 113.7 M parameters, linear betas.

BadDiffusion (arXiv:2212.05400) and VillanDiffusion (arXiv:2306.06874) attack this model. It is that of Ho, Jain &
Abbeel, arXiv:2006.11239, published as google/ddpm-ema-celebahq-256. The data are CelebA-HQ, published as
jxie/celeba-hq, 30,000 images; distances are to those of its split validation, on which nobody trains here. They are
for research use only and are therefore never shipped. They take 24 GB of memory; set `images` to read fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class DDPMCelebAHQ(Published):
    name: ClassVar[str] = "ddpm-celebahq"
    side: ClassVar[int] = 256
    work: ClassVar[Work] = Work(gmacs=248.5, parameters=113_673_219, activations=577_039_744)

    path: str = "google/ddpm-ema-celebahq-256"  # diffusers directory, or hub id of the model
    data_path: str = "jxie/celeba-hq"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [DDPMCelebAHQ]
