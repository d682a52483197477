"""digits-ddpm: a small DDPM of scikit-learn's 1797 handwritten digits (UCI ML hand-written digits), 1×16×16.

The 8×8 scans are enlarged to 16×16 bilinearly. Linear betas 1e-4..0.02, T = 1000, as in Ho, Jain & Abbeel,
arXiv:2006.11239. No published model has this size; it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import checkpoint, digits
from harness.diffusion import DDIM, DiffusionModel
from harness.features import CNNJudge
from harness.hookspecs import hookimpl
from harness.seeds import generator
from harness.training import draw, minimize
from harness.types import Data, Stamps


@dataclass(frozen=True)
class DigitsDDPM:
    name: ClassVar[str] = "digits-ddpm"
    version: ClassVar[int] = 1
    stamps: ClassVar[Stamps] = "noise"
    conditional: ClassVar[bool] = False

    def load(self) -> DiffusionModel:
        return checkpoint.load(checkpoint.embedded(self, self.name) / "model")

    def digest(self) -> str:
        return checkpoint.digest(checkpoint.embedded(self, self.name))

    def data(self) -> Data:
        return digits.data()

    def reference(self) -> Tensor:
        return self.data().images

    def prompts(self, split: Literal["train", "test"], n: int, rng: torch.Generator) -> None:
        return None

    def attributes(self, prompt: str) -> Mapping[str, int]:
        return {}

    def words(self) -> tuple[str, ...]:
        return ()

    def judge(self) -> CNNJudge:
        return checkpoint.load_judge(checkpoint.embedded(self, self.name) / "judge")

    def scorer(self) -> None:
        return None

    def build(self, out: Path, device: str = "cpu", steps: int = 4000, judge_steps: int = 1200) -> dict[str, Any]:
        """Train model and judge, write them below `out`, and return the measured facts for provenance.json."""
        judge, judged = digits.build_judge(judge_steps, generator(self.name, "judge"))
        model = _untrained().to(device)
        data, rng = self.data(), generator(self.name, "build")

        def loss() -> Tensor:
            x_0 = data.images[draw(64, len(data), rng)].to(device)
            t, eps = model.draw_t(64, rng), model.draw_eps(64, rng)
            return (model.eps(model.add_noise(x_0, eps, t), t) - eps).square().mean()

        losses = minimize(
            loss, model.denoiser.parameters(), steps=steps, lr=1.5e-3, schedule="one-cycle", ema=0.995, bf16=True
        )
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, out / "model", fp16=True)
        checkpoint.save_judge(judge, out / "judge")
        quality = digits.quality(model, judge, DDIM(steps=50))
        return {"steps": steps, "final_loss": sum(losses[-200:]) / len(losses[-200:]), **judged, **quality}


def _untrained() -> DiffusionModel:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)  # diffusers initialises from the global state; only recipes set it
    unet = UNet2DModel(
        sample_size=digits.SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return DiffusionModel(unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False))


@hookimpl
def models() -> list[type]:
    return [DigitsDDPM]
