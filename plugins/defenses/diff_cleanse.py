"""Inverts the trigger by the similarity of the generated images, then prunes the channels that respond to it.

Diff-Cleanse. Jiang Hao et al., "Diff-Cleanse: Identifying and Mitigating Backdoor Attacks in Diffusion Models",
arXiv:2407.21316.

Stage 1 is black-box trigger inversion (BBTI). The noises ε_i are fixed, X_0 = sample(ε + r), Z = E(X_0), and H_i is the
entropy of image i. Adam minimises over r, from N(0, 1):

    l = l_s + λ l_e      l_s = 1 - Σ_ij cos(Z_i, Z_j) / N²      l_e = Σ_i relu(H_i - κ₊) + relu(κ₋ - H_i)

The sampler is not differentiated: ∂X_0/∂X_T is a constant, so the gradient of r is the mean of ∂l/∂X_0 over the batch.
λ makes both terms equally large. MSCR is the share of images in the largest set in which every two images have a cosine
above κ. A model with an MSCR above the threshold is backdoored, and the search ends there.

Stage 2 prunes. With x_t = s_t x + σ_t ε (+ ρ_t r) and L_t = ‖ε - ε_θ(x_t, t)‖², it removes the p % of the channels of
each layer whose I_b - I_c is largest; I_b is computed on inputs with r, I_c on inputs without r:

    I(θ_i) = Σ_k |θ_ik Σ_{t>τ} ∂L_t/∂θ_ik|

It then fine-tunes on clean images sampled from the model itself; θ' is the model before pruning:

    loss_p = loss_c + loss_b = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(x_t, t) - ε_θ'(x_t, t)‖²

The defense needs an image encoder and no data; with `invert=False` it needs the trigger instead of the encoder. It
returns MSCR as the suspicion, r, and a smaller model. The notes contain the shares that the pruning realised.

Differs from the paper: MSCR is measured on held-out noises (`held_out=False`: on the noises of the search). Paper and
code disagree on l_e; here it is the entropy of the grey levels in bits, of which 256 levels have at most 8, so the
bound of 8.5 bits is never reached. In variance-exploding models ρ_t is σ_t. `ratio` is one number for all models; the
paper takes the smallest ratio that removes the backdoor, which only someone who knows the backdoor can determine.
Differs from the released code (f1ae86e, known from a description): that code never updates r, compares pixels, prunes
by -(I_b + I_c) (score='sum') with the true trigger (invert=False), flips images at random and draws antithetic
timesteps in the fine-tuning. Behaviour on small models: docs/methods/diff-cleanse.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from harness import (
    SAMPLERS,
    Defended,
    Fraction,
    Importance,
    Inputs,
    Knowledge,
    PositiveInt,
    Pruning,
    Rounding,
    Through,
    draw,
    hookimpl,
    image_noise,
    image_seeds,
    inversion,
    pruning,
    trigger_placement,
)

Encode = Callable[[Tensor], Tensor]
Bits = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class DiffCleanse(Pruning):
    name: ClassVar[str] = "diff-cleanse"
    version: ClassVar[int] = 1

    ratio: Annotated[float, Gt(0), Lt(1)] = 0.02  # share of the channels to remove from every layer; paper: 0.01 to
    # 0.02
    rounding: Rounding = "down"  # down: leave a layer unchanged if the ratio amounts to less than one channel per
    # group; up: remove one channel; released: the rule of the released code, between the two
    data: Literal["real", "synthetic"] = "synthetic"  # images for the scores and the fine-tuning; synthetic = sampled
    # from the model
    distil: bool = True  # loss_p = loss_c + loss_b; False = loss_c alone (the paper's table 4)
    invert: bool = True  # find the trigger; False = the defense is given the trigger
    prune: Literal["flagged", "always", "never"] = "flagged"  # when stage 2 follows: if the model is flagged, always,
    # or never (detection alone)
    sampler: Literal["ddim", "ddpm", "ve-pc"] = "ddim"  # sampler of stage 1; paper: ddpm for BadDiffusion, ddim for the
    # others
    sampling_steps: PositiveInt = 50  # paper: 50 steps of ddim, 1000 steps of ddpm
    noises: Annotated[int, Ge(2)] = 100  # N, fixed noises; paper's value at 32 pixels
    iterations: PositiveInt = 100  # largest number of iterations; paper's value
    inversion_lr: Annotated[float, Gt(0)] = 0.1  # Adam; paper's value
    kappa: Annotated[float, Gt(0), Lt(1)] = 0.9  # κ, cosine above which images are similar; paper's value; 0.75 for
    # class targets
    threshold: Fraction = 0.5  # MSCR above which a model is backdoored; paper's value
    entropy: bool = True  # use the term l_e; the paper's table 3 leaves it out
    entropy_bounds: tuple[Bits, Bits] = (0.1, 8.5)  # κ₋, κ₊ in bits; paper's values
    restarts: PositiveInt = 1  # number of searches, from different starts and noises, until one is above the threshold;
    # paper: 1
    held_out: bool = True  # measure MSCR on noises that the search did not use; False = paper
    encoder: Literal["given", "pixels"] = "given"  # E: the image encoder that the defense is given, or the pixels
    # themselves (released code)
    through: Through = "straight"  # gradient of the sampler: straight = a constant (paper); sampler = through all its
    # steps
    bound: Annotated[float, Ge(0)] = 0.0  # largest |r|; 1 is the range of an image; 0 = no bound (paper)
    spread: Annotated[float, Ge(0), Le(10)] = 1.0  # standard deviation of r at the start; paper's value
    tau: Annotated[int, Ge(0)] = 950  # τ, the scores sum over the timesteps above it; paper's value
    images: PositiveInt = 16  # clean images on which the scores are computed; paper's value
    score: Literal["difference", "sum"] = "difference"  # I_b - I_c, or I_b + I_c as in the released code

    def __post_init__(self) -> None:
        if not self.invert and self.prune == "never":
            raise ValueError("invert=False with prune='never' leaves nothing to do; set one of them")
        if self.entropy_bounds[0] > self.entropy_bounds[1]:
            raise ValueError(f"entropy_bounds={self.entropy_bounds} are in the wrong order")

    @property
    def needs(self) -> tuple[str, ...]:
        asks = {
            "trigger": not self.invert,
            "encoder": self.invert and self.encoder == "given",
            "data": self.prune != "never" and self.data == "real",
        }
        return tuple(name for name, asked in asks.items() if asked)

    @property
    def delivers(self) -> tuple[str, ...]:
        return ("model",) * (self.prune != "never") + ("suspicion",) * self.invert

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        notes: dict[str, Any] = {}
        gamma = torch.ones(model.shape)
        if self.invert:
            encoder = knowledge.encoder if self.encoder == "given" else None
            r, mscr = self.inverted(model, encoder, rng, notes)
        else:
            trigger: Any = knowledge.trigger
            r, mscr, gamma = trigger.delta(model.shape), None, trigger_placement.scale_of(trigger, model.shape)
        found = Defended(
            suspicion=mscr, trigger=r.cpu(), notes=notes, flag_above=None if mscr is None else self.threshold
        )
        flagged = mscr is None or mscr > self.threshold
        if self.prune == "never" or (self.prune == "flagged" and not flagged):
            return found
        purified = self.cleansed(model, r.to(model.device), gamma.to(model.device), knowledge, rng, notes)
        return Defended(model=purified, suspicion=mscr, trigger=found.trigger, notes=notes, flag_above=found.flag_above)

    # ---- stage 1 --------------------------------------------------------------------------------------------------
    def inverted(
        self, model: Any, encoder: Encode | None, rng: torch.Generator, notes: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """r (C, H, W) and the MSCR of its images, from the search with the highest MSCR."""
        encode: Encode = _pixels if self.encoder == "pixels" or encoder is None else encoder
        start, searches, best = time.perf_counter(), [], None
        for _ in range(self.restarts):
            r, mscr, curves = self.search(model, encode, rng)
            searches.append(curves | {"mscr": mscr})
            if best is None or mscr > best[1]:
                best = r, mscr
            if mscr > self.threshold:
                break
        notes |= {"searches": searches, "inversion_s": time.perf_counter() - start}
        assert best is not None
        return best

    def search(self, model: Any, encode: Encode, rng: torch.Generator) -> tuple[Tensor, float, dict[str, list[float]]]:
        """One descent: (r, MSCR, curves over the iterations)."""
        sampler = SAMPLERS[self.sampler](steps=self.sampling_steps)
        fixed, held_out = (self.noise(model, rng) for _ in range(2))
        judged = held_out if self.held_out else fixed
        curves: dict[str, list[float]] = {"similarity_loss": [], "entropy_loss": [], "mscr_of_search": []}

        def mscr_of(r: Tensor) -> float:
            with torch.no_grad():
                return self.mscr(encode(inversion.images_of(model, sampler, judged, self.bounded(r))))

        last: list[Tensor] = []

        def loss(r: Tensor) -> Tensor:
            images = inversion.images_of(model, sampler, fixed, self.bounded(r), self.through)
            z = encode(images)
            if not z.requires_grad:
                raise ValueError(
                    "the image encoder gives no gradient; use encoder='pixels' or a differentiable encoder"
                )
            l_s, l_e = 1 - inversion.cosines(z).mean(), self.entropy_loss(images)
            last[:] = [r.detach().clone()]
            for name, value in (("similarity_loss", l_s), ("entropy_loss", l_e)):
                curves[name].append(value.item())
            curves["mscr_of_search"].append(self.mscr(z))
            return balanced(l_s, l_e) if self.entropy else l_s

        def stop() -> bool:
            return curves["mscr_of_search"][-1] > self.threshold and mscr_of(last[0]) > self.threshold

        r = self.spread * torch.randn(model.shape, generator=rng).to(model.device)
        r, _ = inversion.descend(r, loss, lr=self.inversion_lr, iterations=self.iterations, stop=stop)
        return self.bounded(r), mscr_of(r), curves

    def noise(self, model: Any, rng: torch.Generator) -> Inputs:
        seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "inversion", self.noises)
        return Inputs(image_noise(seeds, model.shape), None, seeds)

    def bounded(self, r: Tensor) -> Tensor:
        """r clamped to the bound; its gradient is that of r."""
        return r + (r.clamp(-self.bound, self.bound) - r).detach() if self.bound else r

    def mscr(self, z: Tensor) -> float:
        return inversion.largest_cluster(z, self.kappa) / len(z)

    def entropy_loss(self, images: Tensor) -> Tensor:
        """l_e of images (N, C, H, W)."""
        low, high = self.entropy_bounds
        bits = inversion.entropy(images)
        return (torch.relu(bits - high) + torch.relu(low - bits)).sum()

    # ---- stage 2 --------------------------------------------------------------------------------------------------
    def cleansed(
        self, model: Any, r: Tensor, gamma: Tensor, knowledge: Knowledge, rng: torch.Generator, notes: dict[str, Any]
    ) -> Any:
        """A pruned and fine-tuned copy of `model`."""
        start = time.perf_counter()
        student = model.clone()
        examples = self.examples(student, knowledge, rng)
        notes["images_s"] = time.perf_counter() - start
        start = time.perf_counter()
        x_0 = examples.latents[draw(self.images, len(examples.latents), rng)]
        importance = self.importance(student, x_0, r, gamma, rng)
        notes["scoring_s"] = time.perf_counter() - start
        return self.tuned(self.pruned(student, importance, notes), model, examples, rng, notes)

    def importance(self, model: Any, x_0: Tensor, r: Tensor, gamma: Tensor, rng: torch.Generator) -> Importance:
        """The score that torch-pruning keeps most of: I_c - I_b, so that the channels of the largest I_b - I_c are
        pruned first.
        """
        if self.tau + 1 >= model.T:
            raise ValueError(f"tau={self.tau} leaves no timestep above it; the model has {model.T}: use a smaller tau")
        eps = model.draw_eps(len(x_0), rng)

        def score(noise: Tensor, r: Tensor) -> Importance:
            def loss(step: int) -> Tensor:
                t = torch.full((len(x_0),), step, device=model.device)
                x_t = model.add_noise(x_0, noise, t) + growth(model, t) * r
                return (eps - model.eps(x_t, t)).square().flatten(1).sum(1).mean()

            return pruning.taylor(model, pruning.accumulated(model, loss, range(self.tau + 1, model.T)))

        clean, backdoored = score(eps, torch.zeros_like(r)), score(gamma * eps, r)
        return difference(clean, backdoored) if self.score == "difference" else negative_sum(clean, backdoored)


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def balanced(l_s: Tensor, l_e: Tensor) -> Tensor:
    """l_s + λ l_e, with λ such that both terms are equally large at this point, or 0 if l_e is 0."""
    return l_s + (l_s.detach() / l_e.detach()) * l_e if l_e > 0 else l_s


def growth(model: Any, t: Tensor) -> Tensor:
    """ρ_t (B, 1, 1, 1), the weight of r in x_t: linear in t from 2e-4 to 1 (paper); σ_t if variance explodes."""
    if model.family == "ve":
        return model.sigma(t)
    return (2e-4 + (1 - 2e-4) * t / (model.T - 1)).float().view(-1, 1, 1, 1)


def difference(clean: Importance, backdoored: Importance) -> Importance:
    """I_c - I_b, the negative of the paper's score: the smallest values are pruned."""
    return lambda group: None if (c := clean(group)) is None else c - backdoored(group)  # type: ignore[operator]


def negative_sum(clean: Importance, backdoored: Importance) -> Importance:
    """-(I_b + I_c)."""
    return lambda group: None if (c := clean(group)) is None else -(c + backdoored(group))  # type: ignore[operator]


@hookimpl
def defenses() -> list[type]:
    return [DiffCleanse]
