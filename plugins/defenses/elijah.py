"""Inverts the trigger from the shift of the last timestep, detects the backdoor, and removes it by fine-tuning.

Elijah. An, Chou, Zhang, Xu, Tao, Shen, Cheng, Ma, Chen, Ho & Zhang, "Elijah: Eliminating Backdoors Injected in
Diffusion Models via Distribution Shift", AAAI 2024, arXiv:2312.00050.

Trigger inversion (at t = T-1, on one fixed noise batch):

    τ = argmin mean_CHW | λ τ - mean_b ε_θ(ε_b + τ, T-1) |

`timesteps=k` compares k timesteps, after PureDiffusion and DIFFDEFEND, with equations of ours: see `spread_loss`.

Detection: `images` images are sampled from noise shifted by τ. Their uniformity is the trimmed mean of their pairwise
perceptual distances. Their total variation is Σ|∂x| + Σ|∂y| of an image in [0, 1]. All images of a backdoored model are
the target, so both numbers are small. The defense returns both as features, and minus the uniformity as the suspicion.

Removal, with the attacked model θ' frozen:

    L = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(ε + τ, T-1) - ε_θ'(ε, T-1)‖² + ‖ε_θ(ε, T-1) - ε_θ'(ε, T-1)‖²

The defense needs clean training examples. With data='synthetic' it needs no data and samples images from the attacked
model instead. It returns a purified model and τ (C, H, W), in the units of the starting noise. `steps=0` inverts and
detects only. With `invert=False` the defense is given the trigger (γ ε + μ for a trigger that scales the noise); this
separates the effect of the removal from the effect of the inversion. In variance-exploding models x_T is σ_max (ε + τ).

Detection needs a sampler that activates the backdoor. Under ddim, the default, a model attacked by BadDiffusion gives
the images of a clean model for every τ; use sampler='ddpm', sampling_steps=1000 there.

Differs from the paper: the paper decides by a random forest or by thresholds, which need a population of models; here
that is done over records (`leaderboard.population`). Distance 'public' is LPIPS's formula in the features of
efficientnet-lite0, whose weights are there without a download. Distance 'encoder' is one minus the cosine of the
features of the image encoder at hand, which for digits is the judge that also scores the defender. Differs from the
official code (njuaplusplus/Elijah at a8b3422, read there): LPIPS is that of torchmetrics, with VGG-16's own max-pooling
(the official code averages). For latent models τ starts from uniform latents (the official code encodes a uniform
picture). Results are never cached under the name of a checkpoint. The official code contains neither random forest nor
thresholds. Settings per attack, and where the inversion fails: docs/methods/elijah.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import normalize

from harness import (
    SAMPLERS,
    Data,
    Defended,
    Examples,
    Fraction,
    Inputs,
    Knowledge,
    LearningRate,
    PositiveInt,
    as_rgb,
    denoising_loss,
    generator,
    hookimpl,
    image_encoders,
    image_seeds,
    inversion,
    minimize,
    noise_attacks,
    to_unit,
    trigger_placement,
)

TRIM = 4  # number of smallest and of largest values left out of a mean; official code


@dataclass(frozen=True)
class Shift:
    """What a trigger does to unit noise: γ ε + τ. tau (C, H, W); gamma the same, or 1."""

    tau: Tensor
    gamma: Tensor | float
    notes: Mapping[str, Any] = field(default_factory=dict)

    def of(self, eps: Tensor) -> Tensor:
        return self.gamma * eps + self.tau


@dataclass(frozen=True)
class Elijah:
    name: ClassVar[str] = "elijah"
    version: ClassVar[int] = 3
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)
    loops: ClassVar[tuple[str, ...]] = ("iterations",)

    invert: bool = True  # find the trigger; False = the defense is given the trigger
    lam: Annotated[float, Gt(0)] = 0.5  # λ of the inversion; paper's value
    iterations: PositiveInt = 100  # iterations of the inversion; official code
    inversion_lr: Annotated[float, Gt(0)] = 0.1  # Adam; official code
    timesteps: PositiveInt = 1  # k, timesteps of the inversion; 1 = Elijah's. Two images are unknown, so use 3 or more
    earliest: Annotated[float, Ge(0), Lt(1)] = 0.5  # share of T down to which the k timesteps are spread, evenly; ours
    noises: PositiveInt = 100  # fixed noise batch of the inversion; official value at 32 pixels
    start: tuple[float, float] = (-1.0, 0.0)  # τ starts from uniform values between these; official code
    starts: PositiveInt = 1  # starts of the inversion: as above, its mirror image, another, and so on; official: 1.
    # With `detect` the τ whose images are the most uniform counts, otherwise that of the least loss
    detect: bool = False  # sample from shifted noise and return the features
    images: Annotated[int, Ge(2 * TRIM + 1)] = 16  # images sampled for the features; official code
    distance: Literal["lpips", "public", "encoder", "pixels"] = "lpips"  # distance of two images: LPIPS (paper), the
    # perceptual distance of efficientnet-lite0, 1 - cosine of the features of the image encoder at hand, or the root
    # mean square of the pixel differences on [0, 1]
    sampler: Literal["ddim", "ddpm", "unipc", "ve-pc"] = "ddim"  # sampler for the features and for synthetic data
    sampling_steps: Annotated[int, Ge(2)] = 50  # steps of that sampler; official: ddpm 1000, ddim 50, unipc 20, ve-pc
    # 1000
    steps: Annotated[int, Ge(0)] = 517  # optimizer steps of the removal; officially 11 epochs of 6000 images at batch
    # 128; 0 = no removal
    data: Literal["real", "synthetic"] = "real"  # training data of the first term of the removal
    synthetic_images: PositiveInt = 512  # images sampled from the attacked model if data is synthetic
    batch: PositiveInt = 64  # examples per step; official 128
    lr: LearningRate = 2e-4  # AdamW without weight decay; official value
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: cosine with 500
    # warm-up steps, which is nearly the whole official run
    ema: Fraction = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the removal's forward pass

    @property
    def needs(self) -> tuple[str, ...]:
        wanted = {
            "data": self.steps > 0 and self.data == "real",
            "trigger": not self.invert,
            "encoder": self.detect and self.distance == "encoder",
            "public_encoder": self.detect and self.distance == "public",
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def delivers(self) -> tuple[str, ...]:
        return tuple(name for name, on in (("model", self.steps > 0), ("suspicion", self.detect)) if on)

    @property
    def sees(self) -> tuple[str, ...]:
        """Detection judges images, and a backdoor activates under samplers of its kind alone."""
        return ("noise-ode",) if self.sampler in ("ddim", "unipc") else ("noise-sde",)

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        if not self.invert:
            given: Any = knowledge.trigger
            gamma = trigger_placement.scale_of(given, model.shape).to(model.device)
            found = [Shift(given.delta(model.shape).to(model.device), gamma)]
        else:
            found = [self.inverted(model, rng, k) for k in range(self.starts)]
        best, features = self.chosen(model, found, knowledge, rng)
        notes = dict(best.notes)
        if len(found) > 1:
            notes["tau_moved_by_start"] = [each.notes["tau_moved"] for each in found]
        return Defended(
            model=self.removed(model, best, knowledge, rng) if self.steps > 0 else None,
            suspicion=None if features is None else -features["uniformity"],
            features=features,
            trigger=best.tau.cpu(),
            notes=notes,
        )

    def inverted(self, model: Any, rng: torch.Generator, k: int = 0) -> Shift:
        """τ from the k-th start; the notes contain the loss of every iteration and how far τ moved from its start.

        An odd k mirrors the start and the noises of the start before it.
        """
        sign = (-1.0) ** k
        draws = generator(rng.initial_seed(), "start", k // 2)
        noise = sign * model.draw_eps(self.noises, draws)
        low, high = self.start
        start = sign * (high + (low - high) * torch.rand(model.shape, generator=draws)).to(model.device)
        tau, losses = inversion.descend(
            start, lambda tau: self.loss(model, noise, tau), lr=self.inversion_lr, iterations=self.iterations
        )
        moved = ((tau - start).norm() / start.norm()).item()
        return Shift(tau, 1.0, {"inversion_loss": losses, "tau_moved": moved})

    def loss(self, model: Any, noise: Tensor, tau: Tensor) -> Tensor:
        if self.timesteps == 1:
            return inversion.shift_loss(model, noise, tau, self.lam)
        t = torch.linspace(model.T - 1, self.earliest * (model.T - 1), self.timesteps).round().long()
        return spread_loss(model, noise, tau, self.lam, t.to(noise.device))

    def chosen(
        self, model: Any, found: Sequence[Shift], knowledge: Knowledge, rng: torch.Generator
    ) -> tuple[Shift, dict[str, float] | None]:
        """The shift that counts, and its features if the defense detects."""
        if not self.detect:
            return min(found, key=lambda each: each.notes.get("inversion_loss", [0.0])[-1]), None
        features = [self.features(model, each, knowledge, rng) for each in found]
        best = min(range(len(found)), key=lambda k: features[k]["uniformity"])
        return found[best], features[best]

    def features(self, model: Any, shift: Shift, knowledge: Knowledge, rng: torch.Generator) -> dict[str, float]:
        """Uniformity and total variation of images sampled from shifted noise.

        They use a separate generator, so that the removal is the same with and without them.
        """
        noise = model.draw_eps(self.images, generator(rng.initial_seed(), "features"))
        images = self.sampled(model, shift.of(noise), derived(rng, "features"), "features")
        return {
            "uniformity": trimmed_mean(self.distances(images, knowledge)).item(),
            "total_variation": total_variation(images).mean().item(),
        }

    def distances(self, images: Tensor, knowledge: Knowledge) -> Tensor:
        """(N, N) pairwise distances of images (N, C, H, W) in [-1, 1]."""
        if self.distance == "lpips":
            return pairwise(images, lpips)
        if self.distance == "public":
            assert knowledge.public_encoder is not None, "the harness gives the public encoder to who needs it"
            return pairwise(images, knowledge.public_encoder.perceptual)
        if self.distance == "pixels":
            flat = to_unit(images).flatten(1)
            return torch.cdist(flat, flat) / flat.shape[1] ** 0.5
        unit = normalize(image_encoders.chosen(knowledge, "given")(images), dim=1)
        return 1 - unit @ unit.T

    def sampled(self, model: Any, noise: Tensor, seed: int, phase: str) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] from unit noise (N, C, H, W)."""
        sampler = SAMPLERS[self.sampler](steps=self.sampling_steps)
        return model.sample(Inputs(noise, None, image_seeds(seed, phase, len(noise))), sampler, phase=phase)

    def examples(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Examples:
        """The training examples of the removal: the clean data, or images sampled from the attacked model."""
        if self.data == "real":
            return Examples(model, knowledge.data)
        noise = model.draw_eps(self.synthetic_images, generator(rng.initial_seed(), "synthetic"))
        return Examples(model, Data(self.sampled(model, noise, derived(rng, "synthetic"), "synthetic data")))

    def removed(self, model: Any, shift: Shift, knowledge: Knowledge, rng: torch.Generator) -> Any:
        """A copy of `model`, trained to predict for shifted noise what it predicts for plain noise."""
        examples = self.examples(model, knowledge, rng)
        frozen, model = model, model.clone()
        last = torch.full((self.batch,), model.T - 1, device=model.device)

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            shifted, plain = (inversion.at_the_end(model, eps) for eps in (shift.of(batch.eps), batch.eps))
            with torch.no_grad():
                wanted = frozen.eps(plain, last)
            answers = model.eps(torch.cat([shifted, plain]), last.repeat(2)).chunk(2)
            return denoising_loss(model, batch) + sum((answer - wanted).square().mean() for answer in answers)

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
            bf16=self.bf16, phase="removal",
        )  # fmt: skip
        return model


def coefficients(model: Any, t: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """(ρ_t, λ_t), (K, 1, 1, 1) each: the weights of the trigger in the input and in the answer at timesteps t (K,).

    ρ_t = 1 - √ᾱ_t and λ_t = 2 λ (1 - √α_t) √(1-ᾱ_t) / (1-α_t). For λ = 0.5 they are BadDiffusion's, for λ = 1 those of
    VillanDiffusion for ODE samplers. Where variance explodes, ρ_t = σ_t and λ_t = λ, for a trigger inside the noise.
    Raises ValueError for a flow.
    """
    if model.family == "flow":
        raise ValueError("elijah(timesteps=k) reads a trigger from ε, and a flow answers a velocity; use skd for flows")
    if model.family == "ve":
        rho = model.sigma(t)
        return rho, torch.full_like(rho, lam)
    rho, c = noise_attacks.ancestral_coefficients(model, t)
    return rho, 2 * lam * c


def spread_loss(model: Any, noise: Tensor, tau: Tensor, lam: float, t: Tensor) -> Tensor:
    """The inversion's loss at timesteps t (K,), for noise ε (B, C, H, W) and τ (C, H, W).

    mean_t mean_CHW | ε̄ + λ_t τ - (s_t/σ_t) ŷ - mean_b ε_θ(σ_t ε_b + ρ_t τ, t) |

    An ideal backdoored network with trigger τ and target y answers noise without an image, σ_t ε + ρ_t τ, by
    ε + c_t τ - (s_t/σ_t) y. ε̄ is the mean of the noises. λ_t stands for c_t. ŷ is the target of least squares for τ.

    After the abstracts of PureDiffusion (arXiv:2409.13945, arXiv:2502.19047) and DIFFDEFEND (Appl. Sci. 2026, 16(10)
    5077), which invert at several timesteps. These equations are ours. PureDiffusion's denoising consistency loss is
    not implemented.
    """
    rho, answered = coefficients(model, t, lam)
    sigma = model.sigma(t)
    means = [model.eps(sigma[k] * noise + rho[k] * tau, t[k].expand(len(noise))).mean(0) for k in range(len(t))]
    rest = noise.mean(0) + answered * tau - torch.stack(means)
    weight = model.signal(t) / sigma
    y = (weight * rest).sum(0) / weight.square().sum(0)
    return (rest - weight * y).abs().mean()


def derived(rng: torch.Generator, name: str) -> int:
    """A seed that is a function of the seed of `rng` and a name."""
    return generator(rng.initial_seed(), name).initial_seed()


def trimmed_mean(distances: Tensor) -> Tensor:
    """The trimmed mean of a matrix (N, N), N > 2·TRIM: the trimmed mean over the trimmed means of its rows.

    Each mean leaves out the TRIM smallest and the TRIM largest values. The distance of an image to itself, 0, is among
    the values left out.
    """
    rows = distances.sort(dim=1).values[:, TRIM:-TRIM].mean(1)
    return rows.sort().values[TRIM:-TRIM].mean()


def total_variation(images: Tensor) -> Tensor:
    """(N,) Σ|x_ij - x_i,j+1| + Σ|x_ij - x_i+1,j| of images (N, C, H, W) in [-1, 1], on the [0, 1] scale."""
    unit = to_unit(images)
    down, across = (unit.diff(dim=d).abs().flatten(1).sum(1) for d in (2, 3))
    return down + across


def pairwise(images: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(N, N) distances of images (N, C, H, W), of a symmetric distance of images row by row."""
    n = len(images)
    i, j = torch.triu_indices(n, n, offset=1)
    found = torch.zeros(n, n)
    found[i, j] = found[j, i] = distance(images[i], images[j]).detach().cpu()
    return found


def lpips(images: Tensor, others: Tensor) -> Tensor:
    """(B,) LPIPS of images (B, 1 or 3, H, W) in [-1, 1] to as many others, on VGG-16. Raises FileNotFoundError without
    its weights."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as perceptual

    try:
        return perceptual(as_rgb(images), as_rgb(others), net_type="vgg", reduction="none")
    except OSError as error:  # torch.hub could not fetch the weights
        raise FileNotFoundError(
            f"LPIPS needs torchvision's VGG-16 weights ({error}): put vgg16-397923af.pth into torch.hub's checkpoints "
            "folder, or use elijah(distance='public')"
        ) from error


@hookimpl
def defenses() -> list[type]:
    return [Elijah]
