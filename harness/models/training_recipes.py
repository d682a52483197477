"""Parts of the recipes of embedded models: autoencoder and judge of drawn shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.diffusion.training import draw, minimize
from harness.judges import shapes
from harness.judges.classifiers import AttributeCNN, CNNJudge, train_judge


def train_vae(
    vae: Any, images: Tensor, rng: torch.Generator, steps: int, batch: int = 64, cell: int = 2
) -> dict[str, float]:
    """Trains an AutoencoderKL on images (N, 3, S, S) in [-1, 1] by L1 with a small KL term, and returns facts.

    A third of each batch carries random patches of `cell` pixels, because a backdoor's target must survive decoding.
    The scaling factor makes the standard deviation of the latents 1. Trains on the device of the weights; `rng` is on
    the CPU.
    """
    device = next(vae.parameters()).device

    def some() -> Tensor:
        return shapes.patched(images[draw(batch, len(images), rng)], rng, cell).to(device)

    def loss() -> Tensor:
        x = some()
        latent = vae.encode(x).latent_dist
        z = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=rng).to(device)
        return (vae.decode(z).sample - x).abs().mean() + 1e-5 * latent.kl().mean() / 64

    minimize(loss, vae.parameters(), steps=steps, lr=1e-3, schedule="one-cycle", ema=0.995, phase="vae")
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        test = torch.cat([some() for _ in range(8)])
        z = vae.encode(test).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
        error = (vae.decode(z).sample - test).square().mean().item()
    return {"vae_mse": error, "vae_steps": steps, "scaling_factor": vae.config.scaling_factor}


def shapes_judge(
    name: str, rng: torch.Generator, steps: int, heads: dict[str, int], side: int = shapes.SIDE, width: int = 24
) -> tuple[CNNJudge, dict[str, float]]:
    """A judge of the attributes in `heads`, with its accuracy on 2000 clean drawings.

    It is trained on noisy drawings, some of them with patches.
    """
    net = AttributeCNN(3, side, heads, width=width, dim=64)

    def batch(rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = shapes.scenes(48, "train" if torch.rand((), generator=rng) < 0.8 else "test", rng)
        images = shapes.patched(shapes.draw(drawn, rng, side), rng)
        images = images + 0.15 * torch.rand((48, 1, 1, 1), generator=rng) * torch.randn(images.shape, generator=rng)
        known = shapes.labels(drawn)
        return images, {head: known[head] for head in heads}

    train_judge(net, batch, rng, steps=steps)
    judge = CNNJudge(name, net.eval())
    drawn = shapes.scenes(1500, "train", rng) + shapes.scenes(500, "test", rng)
    found, truth = judge.attributes(shapes.draw(drawn, rng, side)), shapes.labels(drawn)
    return judge, {
        f"judge_accuracy_{head}": (found[head] == truth[head])[truth[head] >= 0].double().mean().item()
        for head in heads
    }
