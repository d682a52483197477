"""Diff-Cleanse. Jiang Hao et al., "Diff-Cleanse: Identifying and Mitigating Backdoor Attacks in Diffusion Models",
arXiv:2407.21316.

Stage 1, black-box trigger inversion (BBTI). With noises ε_i fixed, X_0 = sample(ε + r), Z = E(X_0), H_i the entropy of
image i, Adam on r from N(0, 1):

    l = l_s + λ l_e      l_s = 1 - Σ_ij cos(Z_i, Z_j) / N²      l_e = Σ_i relu(H_i - κ₊) + relu(κ₋ - H_i)

The sampler is not differentiated: ∂X_0/∂X_T is a constant, so that r gets the batch's mean of ∂l/∂X_0. λ makes both
terms equally large. MSCR is the share of images in the largest set of which every two have a cosine above κ; a model
above the threshold is backdoored, and the search ends there.

Stage 2 prunes, with x_t = s_t x + σ_t ε (+ ρ_t r), L_t = ‖ε - ε_θ(x_t, t)‖², and p % of each layer's channels of the
largest I_b - I_c gone, one for inputs with r, one without:

    I(θ_i) = Σ_k |θ_ik Σ_{t>τ} ∂L_t/∂θ_ik|

and fine-tunes by loss_p = loss_c + loss_b = ‖ε - ε_θ(x_t, t)‖² + ‖ε_θ(x_t, t) - ε_θ'(x_t, t)‖² on clean images of the
model's own, θ' the model before pruning. Needs an image encoder and no data (with `invert=False` the trigger instead of
the encoder); delivers MSCR as suspicion, r, and a smaller model, with what the pruning realised in the notes.

Read beside it: on small models with a weak encoder natural triggers (plain, nearly black or saturated images) take
clean models above the threshold too (suite detection: 0.54 to 0.71). `encoder`, `through`, `bound`, `entropy_bounds`,
`restarts` are levers beyond the paper. 1-2 % of the channels is less than one of each normalisation group in most
layers: with rounding='down' mostly the time embedding is pruned, as with the released code.

Differs from the paper: MSCR is taken on held-out noises (`held_out=False`: on those of the search); l_e, on which
paper and code disagree, is the entropy of the grey levels in bits, and 8.5 bits are more than 256 levels have; where
variance explodes ρ_t is σ_t; `ratio` is one number for all models, where the paper takes the smallest that removes the
backdoor, which only who knows the backdoor can see. Differs from the released code (f1ae86e, known here by
description): that never updates r, compares pixels, prunes by -(I_b + I_c) (score='sum') with the true trigger
(invert=False), flips images at random and draws antithetic timesteps in the fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from harness.hookspecs import hookimpl
from harness.inversion import Through, cosines, descend, entropy, images_of, largest_cluster
from harness.noise_backdoor import Rate, Steps
from harness.pruning import Importance, Pruning, Rounding, accumulated, taylor
from harness.samplers import SAMPLERS
from harness.seeds import image_noise, image_seeds
from harness.stamping import scale_of
from harness.training import draw
from harness.types import Defended, Inputs, Knowledge

Encode = Callable[[Tensor], Tensor]
Bits = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class DiffCleanse(Pruning):
    name: ClassVar[str] = "diff-cleanse"
    version: ClassVar[int] = 1

    ratio: Annotated[float, Gt(0), Lt(1)] = 0.02  # channels asked to go from every layer; paper 0.01 to 0.02
    rounding: Rounding = "down"  # leave layers alone where the ratio is under a channel of each group; up: take one;
    # released: the released code's, between the two
    data: Literal["real", "synthetic"] = "synthetic"  # images to score and fine-tune on; synthetic = the model's own
    distil: bool = True  # loss_p = loss_c + loss_b; False: loss_c alone (the paper's table 4)
    invert: bool = True  # find the trigger; False = be told it
    prune: Literal["flagged", "always", "never"] = "flagged"  # whether stage 2 follows; never = detection alone
    sampler: Literal["ddim", "ddpm", "ve-pc"] = "ddim"  # of stage 1; paper: ddpm for BadDiffusion, else ddim
    sampling_steps: Steps = 50  # paper: 50 of ddim, 1000 of ddpm
    noises: Annotated[int, Ge(2)] = 100  # N, fixed; paper at 32 pixels
    iterations: Steps = 100  # at most; paper
    inversion_lr: Annotated[float, Gt(0)] = 0.1  # Adam; paper
    kappa: Annotated[float, Gt(0), Lt(1)] = 0.9  # cosine from which images are alike; paper, 0.75 for class targets
    threshold: Rate = 0.5  # MSCR above which a model is backdoored; paper
    entropy: bool = True  # the term l_e; the paper's table 3 leaves it out
    entropy_bounds: tuple[Bits, Bits] = (0.1, 8.5)  # κ₋, κ₊ in bits; paper
    restarts: Steps = 1  # searches from other starts and noises until one is above the threshold; paper 1
    held_out: bool = True  # MSCR on noises that the search did not see; False: paper
    encoder: Literal["given", "pixels"] = "given"  # E: the image encoder, or the pixels themselves (released code)
    through: Through = "straight"  # gradient of the sampler: a constant (paper), or sampler = through all its steps
    bound: Annotated[float, Ge(0)] = 0.0  # largest |r|, as of an image: 1; 0 = none (paper)
    spread: Annotated[float, Ge(0), Le(10)] = 1.0  # standard deviation of r at the start; paper
    tau: Annotated[int, Ge(0)] = 950  # τ, timesteps above which count in the scores; paper
    images: Steps = 16  # clean images that the scores are computed on; paper
    score: Literal["difference", "sum"] = "difference"  # I_b - I_c, or I_b + I_c as the released code has it

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
            r, mscr = self.inverted(model, knowledge.encoder, rng, notes)
        else:
            trigger: Any = knowledge.trigger
            r, mscr, gamma = trigger.delta(model.shape), None, scale_of(trigger, model.shape)
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
        """r (C, H, W) and the MSCR of its images, of the search whose MSCR is highest."""
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
                return self.mscr(encode(images_of(model, sampler, judged, self.bounded(r))))

        last: list[Tensor] = []

        def loss(r: Tensor) -> Tensor:
            images = images_of(model, sampler, fixed, self.bounded(r), self.through)
            z = encode(images)
            if not z.requires_grad:
                raise ValueError(
                    "the image encoder gives no gradient; use encoder='pixels' or a differentiable encoder"
                )
            l_s, l_e = 1 - cosines(z).mean(), self.entropy_loss(images)
            last[:] = [r.detach().clone()]
            for name, value in (("similarity_loss", l_s), ("entropy_loss", l_e)):
                curves[name].append(value.item())
            curves["mscr_of_search"].append(self.mscr(z))
            return balanced(l_s, l_e) if self.entropy else l_s

        def stop() -> bool:
            return curves["mscr_of_search"][-1] > self.threshold and mscr_of(last[0]) > self.threshold

        r = self.spread * torch.randn(model.shape, generator=rng).to(model.device)
        r, _ = descend(r, loss, lr=self.inversion_lr, iterations=self.iterations, stop=stop)
        return self.bounded(r), mscr_of(r), curves

    def noise(self, model: Any, rng: torch.Generator) -> Inputs:
        seeds = image_seeds(int(torch.randint(2**62, (), generator=rng)), "inversion", self.noises)
        return Inputs(image_noise(seeds, model.shape), None, seeds)

    def bounded(self, r: Tensor) -> Tensor:
        """r within the bound; its gradient is that of r."""
        return r + (r.clamp(-self.bound, self.bound) - r).detach() if self.bound else r

    def mscr(self, z: Tensor) -> float:
        return largest_cluster(z, self.kappa) / len(z)

    def entropy_loss(self, images: Tensor) -> Tensor:
        """l_e of images (N, C, H, W)."""
        low, high = self.entropy_bounds
        bits = entropy(images)
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
        """What torch-pruning keeps most of: I_c - I_b, so that the channels of the largest I_b - I_c go first."""
        if self.tau + 1 >= model.T:
            raise ValueError(f"tau={self.tau} leaves no timestep above it; the model has {model.T}: use a smaller tau")
        eps = model.draw_eps(len(x_0), rng)

        def score(noise: Tensor, r: Tensor) -> Importance:
            def loss(step: int) -> Tensor:
                t = torch.full((len(x_0),), step, device=model.device)
                x_t = model.add_noise(x_0, noise, t) + growth(model, t) * r
                return (eps - model.eps(x_t, t)).square().flatten(1).sum(1).mean()

            return taylor(model, accumulated(model, loss, range(self.tau + 1, model.T)))

        clean, backdoored = score(eps, torch.zeros_like(r)), score(gamma * eps, r)
        return difference(clean, backdoored) if self.score == "difference" else negative_sum(clean, backdoored)


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def balanced(l_s: Tensor, l_e: Tensor) -> Tensor:
    """l_s + λ l_e, λ such that both are equally large now, or 0 where there is nothing to balance."""
    return l_s + (l_s.detach() / l_e.detach()) * l_e if l_e > 0 else l_s


def growth(model: Any, t: Tensor) -> Tensor:
    """ρ_t (B, 1, 1, 1), the weight of r in x_t: linear in t from 2e-4 to 1 (paper), σ_t where variance explodes."""
    if model.family == "ve":
        return model.sigma(t)
    return (2e-4 + (1 - 2e-4) * t / (model.T - 1)).float().view(-1, 1, 1, 1)


def difference(clean: Importance, backdoored: Importance) -> Importance:
    """I_c - I_b, the negative of the paper's score: what is smallest is pruned."""
    return lambda group: None if (c := clean(group)) is None else c - backdoored(group)  # type: ignore[operator]


def negative_sum(clean: Importance, backdoored: Importance) -> Importance:
    """-(I_b + I_c)."""
    return lambda group: None if (c := clean(group)) is None else -(c + backdoored(group))  # type: ignore[operator]


@hookimpl
def defenses() -> list[type]:
    return [DiffCleanse]
