"""Detects prompts with a trigger by how attention answers when its logits are scaled.

SET. Li et al., "Scaling Exposes the Trigger: Input-Level Backdoor Detection in Text-to-Image Diffusion Models via
Cross-Attention Scaling", arXiv:2604.12446. Prompts with a trigger answer to scaled attention otherwise than clean ones.

Each scale λ has a run of its own over the first steps of DDIM, from the noise of the query:

    P_λ = softmax(λ Q Kᵀ / √d)        F_l(s, λ) = mean (P_λ V - P_1 V)²        at step s, in layer l

Each P V is that of its own run. The mean is over heads, positions and channels of the conditional half. F is
standardised on the clean prompts. An encoder z = φ(F) (`encoded`) is trained on them as a soft-boundary Deep SVDD (Ruff
et al., ICML 2018), whose centre c and radius R hold all but the share ν of them:

    L = R² + 1/ν · mean relu(‖z - c‖² - R²)        score = ‖z - c‖²

The defense needs clean prompts, for the encoder and for the threshold, which is the (1-ν) quantile of clean scores. It
returns a screen. A query costs 1 + (number of scales) evaluations with guidance per step, 30 as published.

Differs from the official code, known from notes and not read: the code also scales every self-attention, as
`layers='all'` does; the paper's abstract speaks of cross-attention. That P_1 V is from a run of its own follows from
the number of evaluations in these notes. Ours are: the prompts per step of training; R², which is the (1-ν) quantile of
‖z - c‖², set before each epoch after the warm-up, as in Deep SVDD; the loss of the warm-up, mean ‖z - c‖²; and
`held_out`. Of the paper only the abstract was available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import gelu, linear

from harness import (
    Defended,
    Inputs,
    Knowledge,
    LearningRate,
    MapRun,
    PositiveInt,
    Share,
    attention,
    hookimpl,
    loop,
    progress,
    prompt_screening,
    usual,
)

HIDDEN, CODE = 64, 32  # widths of the encoder
WARM_UP = 5  # epochs before R² counts, after which c is estimated again
DROPPED = 0.01  # share of the farthest prompts without which c is estimated again
LEAST = 4  # clean prompts
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class SET(MapRun):
    name: ClassVar[str] = "set"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts",)
    delivers: ClassVar[tuple[str, ...]] = ("screen",)

    scales: tuple[Annotated[float, Gt(0)], ...] = (0.2, 0.3, 7.0, 10.0, 20.0)  # λ; published values
    first: PositiveInt = 5  # sampling steps that are run, of `sampling_steps`; published value
    layers: Literal["cross", "all"] = (
        "cross"  # attention that is scaled and read: the cross-attention of side `side` on
    )
    # the way down and up (abstract), or this and every self-attention (code)
    nu: Share = 0.05  # ν, share of clean prompts outside the boundary; published value
    epochs: PositiveInt = 100  # passes over the clean prompts after 5 of warm-up; published value
    batch: PositiveInt = 32  # clean prompts per step of training; ours
    lr: LearningRate = 1e-3  # Adam with weight decay 1e-4 and a cosine schedule; published value
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the clean prompts that only the threshold sees; 0 = the
    # threshold is that of the prompts on which the encoder was trained, which flags more than the share ν of new clean
    # prompts. Ours

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if self.first > self.sampling_steps:
            raise ValueError(f"first={self.first} needs at least as many sampling_steps, not {self.sampling_steps}")
        known = prompt_screening.benign(model, knowledge.prompts or (), rng)
        kept = len(known) - round(self.held_out * len(known))
        if kept < LEAST or (self.held_out and kept == len(known)):
            raise ValueError(
                f"set needs {LEAST} clean prompts to learn from, and some to hold out; give it more prompts"
            )
        features = torch.cat([self.features(model, known[i : i + 50]) for i in range(0, len(known), 50)])
        mean, deviation = features[:kept].mean(0), features[:kept].std(0).clamp_min(1e-12)
        seen = (features - mean) / deviation
        weights, centre = self.trained(seen[:kept], rng)

        def scored(standardised: Tensor) -> Tensor:
            with torch.no_grad():
                return (encoded(weights, standardised) - centre).square().sum(1)

        def screen(inputs: Inputs) -> Tensor:
            return scored((self.features(model, inputs) - mean) / deviation)

        scores = scored(seen[kept:] if self.held_out else seen)
        above = prompt_screening.threshold(scores, self.nu)
        return Defended(screen=screen, screen_above=above, notes={"clean_scores": scores.tolist()})

    @torch.no_grad()
    def features(self, model: Any, inputs: Inputs) -> Tensor:
        """F (B, L, S·T) of L layers, S steps and T scales, the scales of a step side by side."""
        plain = self.outputs(model, inputs, 1.0)
        moved = []
        for scale in self.scales:
            steps = self.outputs(model, inputs, scale)
            moved.append([_distances(*pair) for pair in zip(steps, plain, strict=True)])
        return torch.stack([each for step in zip(*moved, strict=True) for each in step], 2).double().cpu()

    def outputs(self, model: Any, inputs: Inputs, scale: float) -> list[list[Tensor]]:
        """For each of the first steps and each layer P V of the conditional half, (B, heads, queries, channels).

        Raises ValueError if no cross-attention on the way down and up has the side that is asked for.
        """
        sampler = usual(model, self.sampling_steps, guidance=self.guidance)
        scheduler = sampler.scheduler(model.scheduler.config)
        predict = sampler.predictor(model, inputs)
        x_t, found = inputs.noise.to(model.device), []
        with attention.scaled(model.denoiser, scale, self.chosen) as seen:
            for t in scheduler.timesteps[: self.first]:
                with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
                    out = predict(x_t, t).float()
                if not any(_crosses(name) for name in seen):
                    raise ValueError(
                        f"no cross-attention on the way down or up has maps of side {self.side}; set side="
                    )
                found.append([seen[name][-len(inputs) :] for name in sorted(seen)])
                x_t = scheduler.step(out, t, x_t).prev_sample
        return found

    def chosen(self, layer: str, cross: bool, queries: int) -> bool:
        if not cross:
            return self.layers == "all"
        return not layer.startswith("mid_block") and queries == self.side**2

    def trained(self, seen: Tensor, rng: torch.Generator) -> tuple[Weights, Tensor]:
        """The encoder's weights and the centre c (CODE,), from standardised features (N, L, S·T)."""
        weights = initial(seen.shape[2], rng)
        optimizer = torch.optim.Adam(weights.values(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_UP + self.epochs)
        with torch.no_grad():
            centre = encoded(weights, seen).mean(0)
        for epoch in loop("encoder", range(WARM_UP + self.epochs)):
            if epoch == WARM_UP:
                centre = central(encoded(weights, seen).detach(), centre)
            with torch.no_grad():
                far = (encoded(weights, seen) - centre).square().sum(1)
            radius = far.quantile(1 - self.nu) if epoch >= WARM_UP else None
            for rows in torch.randperm(len(seen), generator=rng).split(self.batch):
                loss = boundary_loss(encoded(weights, seen[rows]), centre, radius, self.nu)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            progress("encoder", epoch + 1, WARM_UP + self.epochs)
        return {name: weight.detach() for name, weight in weights.items()}, centre


def _crosses(layer: str) -> bool:
    return layer.endswith("attn2")


def _distances(scaled: Sequence[Tensor], plain: Sequence[Tensor]) -> Tensor:
    """(B, L) mean squares of the differences of two lists of L outputs (B, heads, queries, channels)."""
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in zip(scaled, plain, strict=True)], 1)


def initial(width: int, rng: torch.Generator) -> Weights:
    """Weights of the encoder for S·T = width features, uniform within ±1/√(inputs), as torch's linear layers."""
    sizes = {"1": (HIDDEN, width), "2": (HIDDEN, HIDDEN), "3": (HIDDEN, 2 * HIDDEN), "4": (CODE, HIDDEN)}
    found = {}
    for name, (rows, columns) in sizes.items():
        for kind, shape in (("w", (rows, columns)), ("b", (rows,))):
            if (kind, name) != ("b", "4"):  # without a bias the encoder cannot answer the centre to everything
                uniform = torch.rand(shape, generator=rng, dtype=torch.float64)
                found[kind + name] = ((2 * uniform - 1) / columns**0.5).requires_grad_(True)
    return found


def encoded(weights: Weights, features: Tensor) -> Tensor:
    """z (B, CODE) of features (B, L, S·T): each layer by the same two linear layers, then mean and deviation over
    layers by two more."""
    w = weights
    each = gelu(linear(gelu(linear(features, w["w1"], w["b1"])), w["w2"], w["b2"]))
    pooled = torch.cat([each.mean(1), each.var(1, correction=0).clamp_min(1e-12).sqrt()], 1)
    return linear(gelu(linear(pooled, w["w3"], w["b3"])), w["w4"])


def boundary_loss(z: Tensor, centre: Tensor, radius: Tensor | None, nu: float) -> Tensor:
    """R² + 1/ν · mean relu(‖z - c‖² - R²) of z (B, D), c (D,) and R², a number; mean ‖z - c‖² where R² is None."""
    far = (z - centre).square().sum(1)
    return far.mean() if radius is None else radius + (far - radius).relu().mean() / nu


def central(z: Tensor, centre: Tensor) -> Tensor:
    """The mean (D,) of z (N, D) without the DROPPED share that is farthest from `centre`, one at least."""
    far = (z - centre).square().sum(1)
    dropped = max(1, round(DROPPED * len(z)))
    return z[far.argsort()[:-dropped]].mean(0)


@hookimpl
def defenses() -> list[type]:
    return [SET]
