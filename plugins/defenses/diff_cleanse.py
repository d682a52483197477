"""Inverts the trigger by the similarity of the generated images, then prunes the channels that respond to it.

Diff-Cleanse. Jiang Hao et al., "Diff-Cleanse: Identifying and Mitigating Backdoor Attacks in Diffusion Models",
arXiv:2407.21316. Stage 1 is black-box trigger inversion (BBTI). The noises ε_i are fixed, X_0 = sample(ε + r), Z =
E(X_0), and H_i is the entropy of image i. Adam minimises over r, from N(0, 1):

    l = l_s + λ l_e      l_s = 1 - Σ_ij cos(Z_i, Z_j) / N²      l_e = Σ_i relu(H_i - κ₊) + relu(κ₋ - H_i)

The sampler is not differentiated: ∂X_0/∂X_T is a constant, so the gradient of r is the mean of ∂l/∂X_0 over the batch.
λ makes both terms equally large. MSCR is the share of images in the largest set in which every two images have a cosine
above κ. A model with an MSCR above the threshold is backdoored (algorithm 1; in the text at the threshold too).

Stage 2 prunes. With x_t = s_t x + σ_t ε (+ ρ_t r) and L_t = ‖ε - ε_θ(x_t, t)‖², it removes the p % of the channels of
each layer whose I_b - I_c is largest; I_b is computed on inputs with r, I_c on inputs without r:

    I(θ_i) = Σ_k |θ_ik Σ_{t≥τ} ∂L_t/∂θ_ik|      t from 0; equation 9 has t > τ, counted from 1

It then fine-tunes on clean images sampled from the model itself; θ' is the model before pruning:

    loss_p = loss_c + loss_b = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(x_t, t) - ε_θ'(x_t, t)‖²

The encoder E is CLIP in the paper. `encoder='given'` is the model's scorer if it has one, which is CLIP for the papers'
models, else the public encoder that a model of pictures names, else the features of its judge. That judge also scores
the defender; 'public' and 'pixels' do without it.

The defense needs an image encoder and no data; with `invert=False` it needs the trigger instead of the encoder. It
returns MSCR as the suspicion, r, and a smaller model. The notes hold the curves of the search and what was pruned.
With `bounds='data'` the defense needs clean images too.

Differs from the paper: equation 5 counts the pairs above κ, which can be more than the images; here a set of images is
counted. The images of a search come from a clean sampler on ε + r, because a defender does not know how an attack
samples; algorithm 1 samples as the attack does, which is another thing for TrojDiff alone. MSCR is that after a fixed
number of iterations, because a search that ends at the threshold (`stop=True`, the paper's algorithm 1) ends with the
threshold as its result. MSCR is measured on held-out noises (`held_out=False`: on the noises of the search). The paper
gives no formula of the entropy; here it is that of 256 grey levels in bits, at most 8, so that κ₊ = 8.5 is never
reached. In variance-exploding models ρ_t is σ_t. `ratio` is one number for all models; the paper takes the smallest
ratio that removes the backdoor, which only someone who knows the backdoor can determine. `judged`, `start`, `bounds`,
`within`: with options of ours. Differs from the released code (f1ae86e, known from a description): that code never
updates r, compares pixels, prunes by -(I_b + I_c) (score='sum') with the true trigger (invert=False), flips images at
random and draws antithetic timesteps in the fine-tuning. Behaviour on small models: docs/methods/diff-cleanse.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    generator,
    hookimpl,
    image_encoders,
    image_noise,
    image_seeds,
    inversion,
    pruning,
)

Encode = Callable[[Tensor], Tensor]
Bits = Annotated[float, Ge(0)]
ELIJAH_LAMBDA, ELIJAH_LR = 0.5, 0.1  # of the search for a start; official values for BadDiffusion
TERD_LR, TERD_BATCH = 0.5, 16  # of the search for a start; official values at 32 pixels
FULL = 0.9  # share of the pixels that the scaling of TERD's start leaves within [-1, 1]


@dataclass(frozen=True)
class DiffCleanse(Pruning):
    name: ClassVar[str] = "diff-cleanse"
    version: ClassVar[int] = 1
    loops: ClassVar[tuple[str, ...]] = ("iterations",)

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
    bounds: Literal["fixed", "data"] = "fixed"  # κ₋ and κ₊: `entropy_bounds`, or quantiles of the entropy of the clean
    # images that the defense is given
    within: bool = False  # MSCR counts only images whose entropy is within the bounds, so that a set of black images is
    # none; the paper counts all
    quantiles: tuple[Fraction, Fraction] = (0.01, 0.99)  # these quantiles
    start: Literal["random", "elijah", "terd", "oracle"] = "random"  # r at the start: random (paper), the trigger that
    # Elijah's loss leads to, the one to which TERD's loss draws mirrored starts, scaled to the range of an image, or
    # half the true trigger, for experiments that need a search that cannot miss
    start_iterations: PositiveInt = 100  # iterations towards that start; officially 100 (elijah) and 3000 (terd)
    restarts: PositiveInt = 1  # number of searches, from different starts and noises; the highest MSCR counts; paper: 1
    stop: bool = False  # end at the first MSCR above the threshold, as in the paper. It saves time. The MSCR is then
    # that of the end and no longer tells how far the model is above the threshold
    judged: Literal["last", "best"] = (
        "last"  # the r of a search that counts: the last, or that with the highest MSCR on
    )
    # the noises of the search
    held_out: bool = True  # measure MSCR on noises that the search did not use; False = paper
    encoder: Literal["given", "public", "pixels"] = "given"  # E: the image encoder at hand (above), efficientnet-lite0,
    # or the pixels themselves (released code)
    through: Through = "straight"  # gradient of the sampler: straight = a constant (paper); sampler = through all its
    # steps
    bound: Annotated[float, Ge(0)] = 0.0  # largest |r|; 1 is the range of an image; 0 = no bound (paper)
    spread: Annotated[float, Ge(0), Le(10)] = 1.0  # standard deviation of r at the start; paper's value
    tau: Annotated[int, Ge(0)] = 950  # τ, the first timestep over which the scores sum, from 0; paper's value
    images: PositiveInt = 16  # clean images on which the scores are computed; paper's value
    score: Literal["difference", "sum"] = "difference"  # I_b - I_c, or I_b + I_c as in the released code

    def __post_init__(self) -> None:
        if not self.invert and self.prune == "never":
            raise ValueError("invert=False with prune='never' leaves nothing to do; set one of them")
        if self.entropy_bounds[0] > self.entropy_bounds[1]:
            raise ValueError(f"entropy_bounds={self.entropy_bounds} are in the wrong order")
        if self.quantiles[0] >= self.quantiles[1]:
            raise ValueError(f"quantiles={self.quantiles} are in the wrong order")

    @property
    def needs(self) -> tuple[str, ...]:
        asks = {
            "trigger": not self.invert or self.start == "oracle",
            "encoder": self.invert and self.encoder == "given",
            "public_encoder": self.invert and self.encoder == "public",
            "data": (self.prune != "never" and self.data == "real") or (self.invert and self.bounds == "data"),
        }
        return tuple(name for name, asked in asks.items() if asked)

    @property
    def delivers(self) -> tuple[str, ...]:
        return ("model",) * (self.prune != "never") + ("suspicion",) * self.invert

    @property
    def sees(self) -> tuple[str, ...]:
        """Detection judges images, and a backdoor activates under samplers of its kind alone."""
        return ("noise-ode",) if self.sampler == "ddim" else ("noise-sde",)

    @property
    def flag_above(self) -> float:
        return self.threshold

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        notes: dict[str, Any] = {}
        if self.invert:
            r, mscr = self.inverted(model, knowledge, rng, notes)
        else:
            trigger: Any = knowledge.trigger
            r, mscr = trigger.delta(model.shape), None
        found = Defended(
            suspicion=mscr,
            trigger=r.cpu(),
            features=None
            if mscr is None
            else {"mscr": mscr, "mscr_at_start": notes["searches"][0]["mscr_of_search"][0]},
            notes=notes,
            flag_above=None if mscr is None else self.flag_above,
        )
        flagged = mscr is None or mscr > self.flag_above
        if self.prune == "never" or (self.prune == "flagged" and not flagged):
            return found
        purified = self.cleansed(model, r.to(model.device), knowledge, rng, notes)
        return replace(found, model=purified)

    # ---- stage 1 --------------------------------------------------------------------------------------------------
    def inverted(
        self, model: Any, knowledge: Knowledge, rng: torch.Generator, notes: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """r (C, H, W) and the MSCR of its images, from the search with the highest MSCR."""
        encode: Encode = _pixels if self.encoder == "pixels" else image_encoders.chosen(knowledge, self.encoder)
        low, high = notes["entropy_bounds"] = self.bounds_of(knowledge)
        began, searches, best = time.perf_counter(), [], None
        for k in range(self.restarts):
            search = Search(self, model, encode, (low, high), rng)
            r, mscr = search.run(self.started(model, knowledge, k, rng))
            searches.append(search.curves | {"mscr": mscr})
            if best is None or mscr > best[1]:
                best = r, mscr
            if self.stop and mscr > self.threshold:
                break
        notes |= {"searches": searches, "inversion_s": time.perf_counter() - began}
        assert best is not None
        return best

    def bounds_of(self, knowledge: Knowledge) -> tuple[float, float]:
        """κ₋ and κ₊ in bits."""
        if self.bounds == "fixed":
            return self.entropy_bounds
        data: Any = knowledge.data
        low, high = inversion.entropy(data.images).quantile(torch.tensor(self.quantiles)).tolist()
        return low, high

    def started(self, model: Any, knowledge: Knowledge, k: int, rng: torch.Generator) -> Tensor:
        """r at the start of the k-th search, (C, H, W). Odd k start from the opposite side of 0."""
        if self.start == "random":
            return self.spread * torch.randn(model.shape, generator=rng).to(model.device)
        if self.start == "oracle":
            trigger: Any = knowledge.trigger
            return trigger.delta(model.shape).to(model.device) / 2
        side = (-1.0) ** (k + 1)
        if self.start == "elijah":
            noise = model.draw_eps(self.noises, rng)
            tau, _ = inversion.descend(
                side * torch.rand(model.shape, generator=rng).to(model.device),
                lambda tau: inversion.shift_loss(model, noise, tau, ELIJAH_LAMBDA), lr=ELIJAH_LR,
                iterations=self.start_iterations, phase="start",
            )  # fmt: skip
            return tau
        seed = int(torch.randint(2**62, (), generator=rng))
        mu = sum(self.reversed_from(model, sign, seed) for sign in (1.0, -1.0))
        return -side * (mu / mu.abs().quantile(FULL).clamp_min(torch.finfo().tiny)).clamp(-1, 1)  # type: ignore[union-attr]

    def reversed_from(self, model: Any, sign: float, seed: int) -> Tensor:
        """μ of TERD's estimation from -sign · U[0, 1); the two signs mirror each other, noises included."""
        begun, loss = inversion.mirrored_search(model, (sign,), TERD_BATCH, generator(seed, "start"))
        mu, _, _ = inversion.descend_reversed(
            begun, torch.ones_like(begun), loss, iterations=self.start_iterations, lr=TERD_LR, phase="start"
        )
        return mu[0]

    def noise(self, model: Any, rng: torch.Generator) -> Inputs:
        seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "inversion", self.noises)
        return Inputs(image_noise(seeds, model.shape), None, seeds)

    def bounded(self, r: Tensor) -> Tensor:
        """r clamped to the bound; its gradient is that of r."""
        return r + (r.clamp(-self.bound, self.bound) - r).detach() if self.bound else r

    def mscr(self, z: Tensor) -> float:
        return inversion.largest_cluster(z, self.kappa) / len(z)

    # ---- stage 2 --------------------------------------------------------------------------------------------------
    def cleansed(self, model: Any, r: Tensor, knowledge: Knowledge, rng: torch.Generator, notes: dict[str, Any]) -> Any:
        """A pruned and fine-tuned copy of `model`."""
        start = time.perf_counter()
        student = model.clone()
        examples = self.examples(student, knowledge, rng)
        notes["images_s"] = time.perf_counter() - start
        start = time.perf_counter()
        x_0 = examples.latents[draw(self.images, len(examples.latents), rng)]
        importance = self.importance(student, x_0, r, rng)
        notes["scoring_s"] = time.perf_counter() - start
        return self.tuned(self.pruned(student, importance, notes), model, examples, rng, notes)

    def importance(self, model: Any, x_0: Tensor, r: Tensor, rng: torch.Generator) -> Importance:
        """The score that torch-pruning keeps most of: I_c - I_b, so that the channels of the largest I_b - I_c are
        pruned first.
        """
        if self.tau >= model.T:
            raise ValueError(
                f"tau={self.tau} leaves no timestep; the model counts from 0 to {model.T - 1}: use a smaller tau"
            )
        eps = model.draw_eps(len(x_0), rng)

        def score(r: Tensor) -> Importance:
            def loss(step: int) -> Tensor:
                t = torch.full((len(x_0),), step, device=model.device)
                x_t = model.add_noise(x_0, eps, t) + growth(model, t) * r
                return (eps - model.eps(x_t, t)).square().flatten(1).sum(1).mean()

            return pruning.taylor(model, pruning.accumulated(model, loss, range(self.tau, model.T)))

        clean, backdoored = score(torch.zeros_like(r)), score(r)
        return difference(clean, backdoored) if self.score == "difference" else negative_sum(clean, backdoored)


class Search:
    """One descent from a start: its noises, and curves over its iterations."""

    def __init__(
        self, spec: DiffCleanse, model: Any, encode: Encode, bounds: tuple[float, float], rng: torch.Generator
    ) -> None:
        self.spec, self.model, self.encode, self.bounds = spec, model, encode, bounds
        self.sampler = SAMPLERS[spec.sampler](steps=spec.sampling_steps)
        self.fixed, held_out = (spec.noise(model, rng) for _ in range(2))
        self.judged = held_out if spec.held_out else self.fixed
        self.curves: dict[str, list[float]] = {"similarity_loss": [], "entropy_loss": [], "mscr_of_search": []}
        self.last = self.best = torch.zeros(model.shape)

    def run(self, start: Tensor) -> tuple[Tensor, float]:
        """(r, its MSCR)."""
        spec = self.spec
        stop = self.above if spec.stop else None
        r, _ = inversion.descend(start, self.loss, lr=spec.inversion_lr, iterations=spec.iterations, stop=stop)
        if spec.judged == "best":
            r = self.best
        return spec.bounded(r), self.mscr_of(r)

    def loss(self, r: Tensor) -> Tensor:
        spec = self.spec
        images = inversion.images_of(self.model, self.sampler, self.fixed, spec.bounded(r), spec.through)
        z = self.encode(images)
        if not z.requires_grad:
            raise ValueError("the image encoder gives no gradient; use encoder='pixels' or a differentiable encoder")
        l_s, l_e = 1 - inversion.cosines(z).mean(), entropy_loss(images, self.bounds)
        for name, value in (("similarity_loss", l_s), ("entropy_loss", l_e)):
            self.curves[name].append(value.item())
        self.follow(r.detach().clone(), images.detach(), z)
        return balanced(l_s, l_e) if spec.entropy else l_s

    def follow(self, r: Tensor, images: Tensor, z: Tensor) -> None:
        """Keeps r and the MSCR of its images, whose features are z.

        The MSCR takes time, so it is measured at the start alone if no later one decides anything.
        """
        seen, self.last = self.curves["mscr_of_search"], r
        if seen and not self.spec.stop and self.spec.judged == "last":
            return
        mscr = self.mscr(images, z)
        if not seen or mscr > max(seen):
            self.best = r
        seen.append(mscr)

    def above(self) -> bool:
        """Whether the last r is above the threshold on the noises of the search and on those that judge."""
        threshold = self.spec.threshold
        return self.curves["mscr_of_search"][-1] > threshold and self.mscr_of(self.last) > threshold

    @torch.no_grad()
    def mscr_of(self, r: Tensor) -> float:
        images = inversion.images_of(self.model, self.sampler, self.judged, self.spec.bounded(r))
        return self.mscr(images, self.encode(images))

    def mscr(self, images: Tensor, z: Tensor) -> float:
        if not self.spec.within:
            return self.spec.mscr(z)
        low, high = self.bounds
        bits = inversion.entropy(images)
        inside = (bits >= low) & (bits <= high)
        if not inside.any():
            return 1 / len(z)  # as for images of which no two are alike
        return inversion.largest_cluster(z[inside], self.spec.kappa) / len(z)


def entropy_loss(images: Tensor, bounds: tuple[float, float]) -> Tensor:
    """l_e of images (N, C, H, W) for the bounds (κ₋, κ₊) in bits."""
    low, high = bounds
    bits = inversion.entropy(images)
    return (torch.relu(bits - high) + torch.relu(low - bits)).sum()


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
