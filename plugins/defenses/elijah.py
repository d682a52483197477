"""Elijah. An, Chou, Zhang, Xu, Tao, Shen, Cheng, Ma, Chen, Ho & Zhang, "Elijah: Eliminating Backdoors Injected in
Diffusion Models via Distribution Shift", AAAI 2024, arXiv:2312.00050.

Trigger inversion (at t = T-1, on one fixed noise batch):

    τ = argmin mean_CHW | λ τ - mean_b ε_θ(ε_b + τ, T-1) |

Detection: `images` pictures are sampled from noise shifted by τ. Their uniformity is the trimmed mean of their
pairwise perceptual distances, their total variation Σ|∂x| + Σ|∂y| of a [0, 1] picture. A backdoored model's are all
the target: both numbers are small. The paper decides by a random forest on them where there are attacked models to
learn from, else by thresholds from clean models; either takes a population of models, so it is done over records
(`leaderboard.population`). Here: both features, and as suspicion minus the uniformity.

Removal, with the attacked model θ' frozen:

    L = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(ε + τ, T-1) - ε_θ'(ε, T-1)‖² + ‖ε_θ(ε, T-1) - ε_θ'(ε, T-1)‖²

Needs clean training examples, or with data='synthetic' none: it draws them from the attacked model. Returns a purified
model and τ (C, H, W), in the units of the starting noise. steps=0 inverts and detects only. With `invert=False` it is
told the trigger instead, γ ε + μ for a trigger that scales the noise, which separates what the removal does from what
the inversion finds.

Settings of the official code, by what is attacked (at 32 pixels; 50 noises at 128 pixels, 20 at 256):

    BadDiffusion            lam=0.5, start=(-1, 0), iterations=100; ddpm 1000;  lr 2e-4   the defaults, but for ddpm
    VillanDiffusion, ODE    lam=1.0, start=(-1, 1), iterations=10;  ddim 50;    lr 2e-5
    latent (ODE)            lam=1.0, start=(-1, 1), iterations=10, noises=40; unipc 20; lr 2e-4
    variance exploding      lam=0.5, start=(0, 1),  iterations=100; ve-pc 1000; lr 2e-5
    TrojDiff                lam=0.5, start=(0, 1),  iterations=100; the attacker's own sampler, true μ and γ in it

Detection needs a sampler under which the backdoor fires: under ddim, the default, pictures of a model that BadDiffusion
has attacked are a clean model's whatever τ is; say sampler='ddpm', sampling_steps=1000 there.
Where variance explodes x_T is σ_max (ε + τ). In its units the official 380/0.5 times the score is ε_θ / λ, so it is
the same equation.

Where it fails, by its own equation: λ is the attack coefficient c_T. BadDiffusion has c_T = 0.5, an ODE backdoor
c_T = 1, and there a network answers *any* constant shift with about itself: the loss is flat, τ wanders (`tau_moved`
in the notes is ‖τ - τ_start‖ / ‖τ_start‖) and finds nothing, and pictures from it are those of a clean model. Against
TrojDiff the ideal network sees (ε + τ - μ) / γ, so the fixed point is μ / (1 - λ γ), a multiple of the trigger. Removal
works with a wrong τ too: read `trigger_cosine` beside the ASR, and the row with a wrong trigger.

Differs from the paper: distance 'encoder' is one minus the cosine of the features of the public encoder, for models
without LPIPS weights at hand. Differs from the official code (njuaplusplus/Elijah at a8b3422, read there): LPIPS is
torchmetrics', with VGG-16's own max-pooling (theirs averages); a latent τ starts from uniform latents (theirs from an
encoded uniform picture); results are never cached under a checkpoint's name. Random forest and thresholds are not in
that code at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import normalize

from harness.diffusion import SAMPLERS
from harness.hookspecs import hookimpl
from harness.images import as_rgb, to_unit
from harness.inversion import descend
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.seeds import generator, image_seeds
from harness.stamping import scale_of
from harness.training import Examples, denoising_loss, minimize
from harness.types import Data, Defended, Inputs, Knowledge

TRIM = 4  # smallest and largest values left out of a mean; official code


@dataclass(frozen=True)
class Elijah:
    name: ClassVar[str] = "elijah"
    version: ClassVar[int] = 2
    accepts_triggers: ClassVar[tuple[str, ...]] = ("noise",)

    invert: bool = True  # find the trigger; False = be told it
    lam: Annotated[float, Gt(0)] = 0.5  # λ of the inversion; paper
    iterations: Steps = 100  # of the inversion; official code
    inversion_lr: Annotated[float, Gt(0)] = 0.1  # Adam; official code
    noises: Steps = 100  # fixed noise batch of the inversion; official at 32 pixels
    start: tuple[float, float] = (-1.0, 0.0)  # τ's start is uniform between these; official code
    detect: bool = False  # sample from shifted noise and deliver the features
    images: Annotated[int, Ge(2 * TRIM + 1)] = 16  # sampled for the features; official code
    distance: Literal["lpips", "encoder", "pixels"] = "lpips"  # between two of them: LPIPS (paper), 1 - cosine of the
    # public encoder's features, or the root mean square of the pixels' differences on [0, 1]
    sampler: Literal["ddim", "ddpm", "unipc", "ve-pc"] = "ddim"  # for the features, and for synthetic data
    sampling_steps: Annotated[int, Ge(2)] = 50  # of that sampler; official: ddpm 1000, ddim 50, unipc 20, ve-pc 1000
    steps: Annotated[int, Ge(0)] = 517  # of the removal; the official 11 epochs of 6000 images at batch 128; 0 = none
    data: Literal["real", "synthetic"] = "real"  # what the removal's first term is trained on
    synthetic_images: Steps = 512  # sampled from the attacked model where data is synthetic
    batch: Steps = 64  # examples; official 128
    lr: LearningRate = 2e-4  # AdamW without decay; official
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"  # of the learning rate; official: cosine with 500
    # steps of warm-up, which is nearly its whole run
    ema: Rate = 0.0  # decay of the weights' moving average; 0 = off
    bf16: bool = True  # autocast of the removal's forward pass

    @property
    def needs(self) -> tuple[str, ...]:
        wanted = {
            "data": self.steps > 0 and self.data == "real",
            "trigger": not self.invert,
            "encoder": self.detect and self.distance == "encoder",
        }
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def delivers(self) -> tuple[str, ...]:
        return tuple(name for name, on in (("model", self.steps > 0), ("suspicion", self.detect)) if on)

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        trigger: Any = knowledge.trigger
        gamma: Tensor | float = 1.0
        if self.invert:
            tau, notes = self.inverted(model, rng)
        else:
            tau, notes = trigger.delta(model.shape).to(model.device), {}
            gamma = scale_of(trigger, model.shape).to(model.device)

        def shift(eps: Tensor) -> Tensor:
            """Unit noise as the trigger leaves it: γ ε + τ."""
            return gamma * eps + tau

        features = self.features(model, shift, knowledge, rng) if self.detect else None
        return Defended(
            model=self.removed(model, shift, knowledge, rng) if self.steps > 0 else None,
            suspicion=None if features is None else -features["uniformity"],
            features=features,
            trigger=tau.cpu(),
            notes=notes,
        )

    def inverted(self, model: Any, rng: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """τ (C, H, W), and as notes the loss of every iteration and how far τ moved from its start."""
        noise = model.draw_eps(self.noises, rng)
        t = torch.full((self.noises,), model.T - 1, device=model.device)
        low, high = self.start
        start = (high + (low - high) * torch.rand(model.shape, generator=rng)).to(model.device)

        def loss(tau: Tensor) -> Tensor:
            return (self.lam * tau - model.eps(at_the_end(model, noise + tau), t).mean(0)).abs().mean()

        tau, losses = descend(start, loss, lr=self.inversion_lr, iterations=self.iterations)
        return tau, {"inversion_loss": losses, "tau_moved": ((tau - start).norm() / start.norm()).item()}

    def features(
        self, model: Any, shift: Callable[[Tensor], Tensor], knowledge: Knowledge, rng: torch.Generator
    ) -> dict[str, float]:
        """Uniformity and total variation of pictures from shifted noise. They draw from a generator of their own, so
        that the removal is the same with and without them."""
        noise = model.draw_eps(self.images, generator(rng.initial_seed(), "features"))
        images = self.sampled(model, shift(noise), derived(rng, "features"), "features")
        return {
            "uniformity": trimmed_mean(self.distances(images, knowledge.encoder)).item(),
            "total_variation": total_variation(images).mean().item(),
        }

    def distances(self, images: Tensor, encoder: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(N, N) pairwise distances of images (N, C, H, W) in [-1, 1]."""
        if self.distance == "lpips":
            return lpips(images)
        if self.distance == "pixels":
            flat = to_unit(images).flatten(1)
            return torch.cdist(flat, flat) / flat.shape[1] ** 0.5
        assert encoder is not None, "the harness gives an encoder to who needs it"
        unit = normalize(encoder(images), dim=1)
        return 1 - unit @ unit.T

    def sampled(self, model: Any, noise: Tensor, seed: int, phase: str) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] from unit noise (N, C, H, W)."""
        sampler = SAMPLERS[self.sampler](steps=self.sampling_steps)
        return model.sample(Inputs(noise, None, image_seeds(seed, phase, len(noise))), sampler, phase=phase)

    def examples(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Examples:
        """What the removal trains on: the clean data, or images of the attacked model itself."""
        if self.data == "real":
            return Examples(model, knowledge.data)
        noise = model.draw_eps(self.synthetic_images, generator(rng.initial_seed(), "synthetic"))
        return Examples(model, Data(self.sampled(model, noise, derived(rng, "synthetic"), "synthetic data")))

    def removed(self, model: Any, shift: Callable[[Tensor], Tensor], knowledge: Knowledge, rng: torch.Generator) -> Any:
        """A copy of `model` trained to answer shifted noise as it answers plain noise."""
        examples = self.examples(model, knowledge, rng)
        frozen, model = model, model.clone()
        last = torch.full((self.batch,), model.T - 1, device=model.device)

        def loss() -> Tensor:
            batch = examples.batch(self.batch, rng)
            shifted, plain = at_the_end(model, shift(batch.eps)), at_the_end(model, batch.eps)
            with torch.no_grad():
                wanted = frozen.eps(plain, last)
            answers = model.eps(torch.cat([shifted, plain]), last.repeat(2)).chunk(2)
            return denoising_loss(model, batch) + sum((answer - wanted).square().mean() for answer in answers)

        minimize(
            loss, model.denoiser.parameters(), steps=self.steps, lr=self.lr, schedule=self.schedule, ema=self.ema,
            bf16=self.bf16, phase="removal",
        )  # fmt: skip
        return model


def at_the_end(model: Any, noise: Tensor) -> Tensor:
    """x_T (B, C, H, W) of unit noise: the noise itself, σ_max times it where variance explodes."""
    return noise * model.sigma(torch.tensor([model.T - 1], device=noise.device)) if model.family == "ve" else noise


def derived(rng: torch.Generator, name: str) -> int:
    """A seed that is a function of `rng`'s own seed and a name."""
    return generator(rng.initial_seed(), name).initial_seed()


def trimmed_mean(distances: Tensor) -> Tensor:
    """The mean of a matrix (N, N), N > 2·TRIM, over its rows' means, each mean without its TRIM smallest and TRIM
    largest values. An image's distance to itself, 0, is among what is left out."""
    rows = distances.sort(dim=1).values[:, TRIM:-TRIM].mean(1)
    return rows.sort().values[TRIM:-TRIM].mean()


def total_variation(images: Tensor) -> Tensor:
    """(N,) Σ|x_ij - x_i,j+1| + Σ|x_ij - x_i+1,j| of images (N, C, H, W) in [-1, 1], on the [0, 1] scale."""
    unit = to_unit(images)
    down, across = (unit.diff(dim=d).abs().flatten(1).sum(1) for d in (2, 3))
    return down + across


def lpips(images: Tensor) -> Tensor:
    """(N, N) LPIPS of images (N, 1 or 3, H, W) in [-1, 1], on VGG-16. FileNotFoundError without its weights."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as perceptual

    rgb, n = as_rgb(images), len(images)
    i, j = torch.triu_indices(n, n, offset=1)
    try:
        upper = perceptual(rgb[i], rgb[j], net_type="vgg", reduction="none")
    except OSError as error:  # torch.hub could not fetch the weights
        raise FileNotFoundError(
            f"LPIPS needs torchvision's VGG-16 weights ({error}): put vgg16-397923af.pth into torch.hub's checkpoints "
            "folder, or use elijah(distance='encoder')"
        ) from error
    found = torch.zeros(n, n)
    found[i, j] = found[j, i] = upper.detach().cpu()
    return found


@hookimpl
def defenses() -> list[type]:
    return [Elijah]
