"""Train a denoiser of about 9 million parameters on CIFAR-10, for the suite `cifar10-small` or one of your own.

    python examples/train_cifar10.py DATA OUT [--minutes 10] [--device cuda] [--batch 256]

DATA is a directory in the layout that uoft-cs/cifar10 has on the hub (plain_text/train-*.parquet). OUT is the diffusers
directory to write: a DDPMPipeline that `ddpm-cifar10(path=OUT)` loads. The network predicts ε. It is half as wide as
google/ddpm-cifar10-32 and has the same betas. It is trained with Adam at a learning rate of 3e-4, and the saved weights
are an exponential moving average (decay 0.999).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from harness import DiffusionModel, Examples, checkpoint, denoising_loss, generator, image_folders, minimize


def untrained() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(64, 128, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=128,
        norm_num_groups=32, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("data", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--minutes", type=float, default=10.0)
    words.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    words.add_argument("--batch", type=int, default=256)
    words.add_argument("--images", type=int, default=0, help="0: all")
    asked = words.parse_args()
    torch.manual_seed(0)
    model = DiffusionModel(untrained(), DDPMScheduler(num_train_timesteps=1000)).to(asked.device)
    examples = Examples(model, image_folders.read(asked.data, ("train",), 32, asked.images))
    rng = generator("cifar10-small", "train")
    end = time.monotonic() + 60 * asked.minutes

    def late(step: int, loss: float) -> bool:
        if step % 500 == 0:
            print(f"step {step}, loss {loss:.4f}", flush=True)
        return time.monotonic() > end

    losses = minimize(
        lambda: denoising_loss(model, examples.batch(asked.batch, rng)), model.denoiser.parameters(),
        steps=10**7, lr=3e-4, ema=0.999, bf16=True, stop=late,
    )  # fmt: skip
    size = sum(p.numel() for p in model.denoiser.parameters())
    print(f"{size / 1e6:.1f} M parameters, {len(losses)} steps, loss {sum(losses[-100:]) / 100:.4f}")
    checkpoint.save(model, asked.out)


if __name__ == "__main__":
    main()
