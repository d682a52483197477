"""mnist-ddpm: a small DDPM of MNIST, 1×28×28, 1.05 M parameters.

The data are the first 17,435 images of MNIST's split train (ylecun/mnist on the hub). Distances are to the 10,000
images of its split test. Betas are linear from 1e-4 to 0.02 and T = 1000, as in Ho, Jain & Abbeel, arXiv:2006.11239. No
published model has this size; it was trained for this benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from harness import (
    DiffusionModel,
    Examples,
    RealData,
    denoising_loss,
    digits,
    generator,
    hookimpl,
    minimize,
    real_data,
)


@dataclass(frozen=True)
class MnistDDPM(RealData):
    name: ClassVar[str] = "mnist-ddpm"
    version: ClassVar[int] = 1
    hub_data: ClassVar[str] = "ylecun/mnist"
    side: ClassVar[int] = 28
    channels: ClassVar[int] = 1
    images: ClassVar[int] = 17_435

    def build(
        self, out: Path, device: str = "cpu", steps: int = 4000, batch: int = 64, judge_steps: int = 1500
    ) -> dict[str, Any]:
        """Trains model and judge, writes them below `out`, and returns the measured facts for provenance.json."""
        recipe = real_data.Recipe(self, out)
        recipe.train_judge("mnist-cnn", "digit", steps=judge_steps)
        model = _untrained().to(device)
        examples, rng = Examples(model, recipe.train), generator(self.name, "build")
        losses = minimize(
            lambda: denoising_loss(model, examples.batch(batch, rng)), model.denoiser.parameters(), steps=steps,
            lr=1.5e-3, schedule="one-cycle", ema=0.995, bf16=True, kept=recipe.kept("model", rng),
        )  # fmt: skip
        model.denoiser.eval().requires_grad_(False)
        return recipe.finished(
            model, {"steps": steps, "batch": batch, "final_loss": sum(losses[-200:]) / len(losses[-200:])}
        )


def _untrained() -> DiffusionModel:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    return DiffusionModel(digits.unet("positional", MnistDDPM.side), schedule)


@hookimpl
def models() -> list[type]:
    return [MnistDDPM]
