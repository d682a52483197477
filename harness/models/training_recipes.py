"""Parts of the recipes of embedded models: autoencoder, text encoder and judge of drawn shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.interrupted import Kept
from harness.diffusion.training import draw, minimize
from harness.judges import shapes
from harness.judges.classifiers import AttributeCNN, CNNJudge, train_judge

POSITIONS = 768  # of a batch at which the text encoder's heads predict, because the vocabulary is large


def train_text(
    states: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    tokenizer: Any,
    ids: Tensor,
    rng: torch.Generator,
    steps: int,
    *,
    width: int,
    batch: int = 128,
    device: torch.device | str = "cpu",
    kept: Kept | None = None,
) -> float:
    """Trains a text encoder to keep the whole text; the mean loss of its last 100 steps.

    states: tokens (B, L) → their hidden states (B, L, `width`). parameters: those of the encoder. ids: tokens (N, L) of
    captions. kept: as for `minimize`. From every position a linear head must predict the token there, the token before
    it, and which tokens occurred so far. A small encoder that is trained with the denoiser instead maps every word that
    changes nothing in the image to the same place. Stable Diffusion's encoder has seen text of all kinds, so its
    denoiser can be taught any word. Half of the texts are captions with every seventh token replaced, half are random
    tokens of the vocabulary. Each step predicts at POSITIONS random positions of the batch.
    """
    start, end, size, length = tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer), ids.shape[1]
    heads = nn.ModuleList(nn.Linear(width, size) for _ in range(3)).to(device)

    def texts() -> Tensor:
        rows = ids[draw(batch, len(ids), rng)]
        anything = torch.randint(0, size, rows.shape, generator=rng)
        inner = (rows != start) & (rows != end)
        rows = torch.where(inner & (torch.rand(rows.shape, generator=rng) < 1 / 7), anything, rows)
        long = torch.randint(2, length, (batch // 2, 1), generator=rng)
        place = torch.arange(length)
        rows[::2] = torch.where(place < long, anything[::2], end)
        rows[::2, 0] = start
        return rows.to(device)

    def loss() -> Tensor:
        rows = texts()
        at = torch.randint(0, rows.numel(), (POSITIONS,), generator=rng).to(rows.device)
        hidden = states(rows).flatten(0, 1)[at]
        own, before, bag = (head(hidden).float().log_softmax(1) for head in heads)
        row, place = at // length, at % length
        seen = torch.zeros_like(bag)
        earlier = torch.arange(length, device=rows.device) <= place.unsqueeze(1)
        seen.scatter_reduce_(1, rows[row], earlier.float(), "amax")
        seen[:, [start, end]] = 0
        seen = seen / seen.sum(1, keepdim=True).clamp(min=1)
        previous = rows[row, (place - 1).clamp(min=0)].unsqueeze(1)
        said = -own.gather(1, rows[row, place].unsqueeze(1)).mean() - before.gather(1, previous)[place > 0].mean()
        return said - (seen * bag).sum(1).mean()

    losses = minimize(
        loss, [*parameters, *heads.parameters()], steps=steps, lr=2e-3, schedule="one-cycle", weight_decay=0.01,
        phase="text", kept=kept,
    )  # fmt: skip
    return sum(losses[-100:]) / len(losses[-100:])


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
