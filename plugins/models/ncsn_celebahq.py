"""ncsn-celebahq: a variance-exploding score model of CelebA-HQ, 3×256×256, 65.6 M parameters.

It is NCSN++ of Song et al., arXiv:2011.13456, published as google/ncsnpp-celebahq-256. VillanDiffusion
(arXiv:2306.06874) attacks a different network with σ up to 380 and 2000 levels. Pass the directory of that network as
`path` to use it; the levels are those of the model's own scheduler. The data are CelebA-HQ, published as
jxie/celeba-hq, 30,000 images; distances are to those of its split validation, on which nobody trains here; set
`images` to read fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from harness import Published, Work, hookimpl


@dataclass(frozen=True)
class NCSNCelebAHQ(Published):
    name: ClassVar[str] = "ncsn-celebahq"
    family: ClassVar[Literal["vp", "ve"]] = "ve"
    side: ClassVar[int] = 256
    work: ClassVar[Work] = Work(gmacs=266.7, parameters=65_574_549, activations=695_403_296)

    path: str = "google/ncsnpp-celebahq-256"  # diffusers directory, or hub id of the model
    data_path: str = "jxie/celeba-hq"  # directory of parquet files or images, or hub id of the data set


@hookimpl
def models() -> list[type]:
    return [NCSNCelebAHQ]
