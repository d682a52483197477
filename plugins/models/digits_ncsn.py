"""digits-ncsn: a small variance-exploding score model of scikit-learn's handwritten digits, 1×16×16.

x_t = x_0 + σ_t ε with σ_t geometric from 0.01 to 50, T = 1000; the network sees x_t and log σ_t and returns the score
-ε/σ_t, as in NCSN++ (Song et al., arXiv:2011.13456); diffusers' own UNet2DModel and ScoreSdeVePipeline run it. Data,
judge and network size are those of digits-ddpm. No published model has this size; it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness import checkpoint, digits
from harness.diffusion import DiffusionModel
from harness.features import CNNJudge
from harness.hookspecs import hookimpl
from harness.samplers import Family, PredictorCorrector
from harness.seeds import generator
from harness.training import draw, minimize
from harness.types import Data, Stamps

SIGMA_MIN, SIGMA_MAX, LEVELS = 0.01, 50.0, 1000


@dataclass(frozen=True)
class DigitsNCSN:
    name: ClassVar[str] = "digits-ncsn"
    version: ClassVar[int] = 1
    stamps: ClassVar[Stamps] = "noise"
    conditional: ClassVar[bool] = False
    family: ClassVar[Family] = "ve"

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

    def build(
        self, out: Path, device: str = "cpu", steps: int = 12000, batch: int = 128, sampling_steps: int = 500
    ) -> dict[str, Any]:
        """Train the model, write it and a copy of digits-ddpm's judge below `out`, and return the measured facts."""
        judge = checkpoint.load_judge(checkpoint.embedded(self, "digits-ddpm") / "judge")
        model = _untrained().to(device)
        images, rng = model.encode(self.data().images).to(device), generator(self.name, "build")

        def loss() -> Tensor:
            x_0 = images[draw(batch, len(images), rng).to(device)]
            t, eps = model.draw_t(batch, rng), model.draw_eps(batch, rng)
            return (model.eps(model.add_noise(x_0, eps, t), t) - eps).square().mean()

        losses = minimize(loss, model.denoiser.parameters(), steps=steps, lr=1.5e-3, schedule="one-cycle", ema=0.995)
        model.denoiser.eval().requires_grad_(False)
        quality = digits.quality(model, judge, PredictorCorrector(steps=sampling_steps), batch=500)
        checkpoint.save(model.to("cpu"), out / "model", fp16=True)
        checkpoint.save_judge(judge, out / "judge")
        return {"steps": steps, "final_loss": sum(losses[-200:]) / len(losses[-200:]), **quality}


def _untrained() -> DiffusionModel:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler

    torch.manual_seed(0)  # diffusers initialises from the global state; only recipes set it
    unet: Any = UNet2DModel(
        sample_size=digits.SIDE,
        in_channels=1,
        out_channels=1,
        time_embedding_type="fourier",
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    # NCSN++ draws the frequencies of log σ from N(0, 16²). These are slower, so that neighbouring levels learn from
    # each other, and numbers that float16 holds, because the weights are shipped in it.
    unet.time_proj.weight.data.div_(32).copy_(unet.time_proj.weight.half())
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=LEVELS, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, snr=0.075)
    return DiffusionModel(unet, scheduler)


@hookimpl
def models() -> list[type]:
    return [DigitsNCSN]
