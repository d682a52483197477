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
    DDIM,
    DiffusionModel,
    Examples,
    Kept,
    RealData,
    checkpoint,
    classifiers,
    denoising_loss,
    generator,
    hookimpl,
    interrupted,
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
        train, test = self.read("train", checked=False), self.read("test", checked=False)
        state = out / interrupted.UNFINISHED
        draws = generator(self.name, "judge")
        judge, judged = classifiers.class_judge(
            "mnist-cnn", train, test, "digit", draws, steps=judge_steps, kept=Kept(state / "judge.safetensors", draws)
        )
        model = _untrained().to(device)
        examples, rng = Examples(model, train), generator(self.name, "build")
        losses = minimize(
            lambda: denoising_loss(model, examples.batch(batch, rng)), model.denoiser.parameters(), steps=steps,
            lr=1.5e-3, schedule="one-cycle", ema=0.995, bf16=True, kept=Kept(state / "model.safetensors", rng),
        )  # fmt: skip
        model.denoiser.eval().requires_grad_(False)
        checkpoint.save(model, out / "model", fp16=True)
        classifiers.save_judge(judge, out / "judge")
        quality = classifiers.quality(model, judge, DDIM(steps=50))
        return {
            "steps": steps, "batch": batch, "final_loss": sum(losses[-200:]) / len(losses[-200:]),
            "data": {"train": real_data.content(train), "test": real_data.content(test)}, **judged, **quality,
        }  # fmt: skip


def _untrained() -> DiffusionModel:
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)  # diffusers initialises weights from the global generator; only recipes seed it
    network = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return DiffusionModel(network, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False))


@hookimpl
def models() -> list[type]:
    return [MnistDDPM]
