"""Fréchet and kernel distance, precision and recall of clean-input images against real ones, in features of encoders.

    FD = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)       (Heusel et al. 2017, arXiv:1706.08500), ≥ 0
    KD = MMD² with the kernel (x·y / d + 1)³           (Bińkowski et al. 2018, arXiv:1801.01401), about 0 for equal sets
    precision = share of images within the real images' manifold, recall = share of real images within the manifold of
    the images; a manifold is the union of balls up to the k-th neighbour    (Kynkäänniemi et al., arXiv:1904.06991)

The images are those of the utility set, the real ones are the model's reference, which nobody trains on.
torch-fidelity computes all four. Each encoder is registered as its feature extractor under the encoder's own name, and
the scores carry that name: `fd[digits-cnn]`, `kd[efficientnet-lite0]`. The encoders are the model's judge, the public
encoders that the model names, and those of the parameter `encoders`. Only Inception-v3 with its released weights gives
`fid` and `kid`. All scores depend on n and on the reference; compare them at equal n, reference and encoder only.

`fd_ratio` is the defended model's FD divided by the clean model's, `fd_increase` is the defended model's FD minus the
attacked model's, both at the same noise.

Intervals (95 %) are for other noise and the same reference. That of FD and of what follows from it is Student's with
the standard deviation over bootstrap resamples of the images; the same images are resampled for both models of a ratio
or a difference. That of KD is normal, with the standard error of the jackknife over the images that were sampled.
Those of precision and recall are Wilson's.

The public encoder takes 8 to 9 ms per image on one core: up to 19 s for 2048 images, and about a minute for three
models and 1000 real images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    ABSENT,
    Evidence,
    ImageEncoder,
    Score,
    Who,
    encoders_of,
    fidelity,
    generator,
    hookimpl,
    loop,
    public_encoders,
    rate,
    unmeasured,
)

FLOOR = 100  # number of images below which a distance is not informative; the Fréchet distance also requires one image
# per feature
LARGE = 512  # rank of the covariances above which the bootstrap has fewer resamples, because each takes a second
Z = 1.959964  # standard normal quantile of a 95 % interval
AFTER: dict[Who, str] = {"defended": "", "backdoored": "_before", "clean": "_clean"}  # ending of a model's scores
BETTER = {"fd": False, "kd": False, "precision": True, "recall": True}
COMPARED = ("fd_ratio", "fd_ratio_before", "fd_increase")
INCEPTION = "inception-v3"  # the judge whose distances are FID and KID


@dataclass(frozen=True)
class Frechet:
    """fd, kd, precision and recall (defended; _before: backdoored; _clean: clean model), fd_ratio, fd_ratio_before and
    fd_increase, each followed by [<encoder>]; fid and kid instead of fd and kd for Inception-v3.
    """

    name: ClassVar[str] = "frechet"
    version: ClassVar[int] = 4

    subset: Annotated[int, Ge(2)] = 250  # images per subset of the kernel distance, at most n and the reference's size;
    # torch-fidelity's default of 1000 is for 50k images
    neighbours: Annotated[int, Ge(1)] = 3  # k of precision and recall; the paper's value
    resamples: Annotated[int, Ge(2)] = 100  # of the bootstrap; a fifth of them for more than 512 images and features
    encoders: tuple[str, ...] = ()  # public encoders beside the judge and those that the model names, such as
    # efficientnet-lite2, which is independent of efficientnet-lite0

    def __post_init__(self) -> None:
        for name in self.encoders:
            public_encoders.parsed(name)

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        encoders = self.asked(evidence)
        if not encoders:
            why = f"model {evidence.model.name} has no judge and no public encoder to take features from"
            names = [name + end for name in BETTER for end in AFTER.values()]
            return {name: unmeasured(why, BETTER.get(name.split("_")[0], False)) for name in (*names, *COMPARED)}
        scores: dict[str, Score] = {}
        for encoder in encoders:
            found = self.against(evidence, encoder)
            scores |= {f"{named(name, encoder)}[{encoder.name}]": score for name, score in found.items()}
        return scores

    def asked(self, evidence: Evidence) -> list[ImageEncoder]:
        """The judge of the model and the public encoders, each once."""
        names = dict.fromkeys([*encoders_of(evidence.model), *self.encoders])
        judges: list[ImageEncoder] = [] if evidence.judge is None else [evidence.judge]
        return judges + [public_encoders.load(name) for name in names]

    def against(self, evidence: Evidence, encoder: ImageEncoder) -> dict[str, Score]:
        """All scores in the features of one encoder, without its name."""
        key = ("fidelity reference", encoder.name)
        reference = evidence.once(key, lambda: fidelity.extract_kept(encoder, evidence.reference))
        scores: dict[str, Score] = {}
        replicates: dict[Who, Tensor | None] = {}
        for who, end in AFTER.items():
            found, why = self.features(evidence, encoder, who)
            replicates[who] = None if found is None else self.replicates(found, reference)
            values = self.scores(found, reference, replicates[who], why)
            scores |= {name + end: score for name, score in values.items()}
        return scores | {
            "fd_ratio": compared(scores["fd"], scores["fd_clean"], replicates["defended"], replicates["clean"]),
            "fd_ratio_before": compared(
                scores["fd_before"], scores["fd_clean"], replicates["backdoored"], replicates["clean"]
            ),
            "fd_increase": compared(
                scores["fd"], scores["fd_before"], replicates["defended"], replicates["backdoored"], ratio=False
            ),
        }

    def features(self, evidence: Evidence, encoder: ImageEncoder, who: Who) -> tuple[Tensor | None, str]:
        """(N, D) features of a model's images, or None and the reason."""
        images = evidence.utility(who)
        if images is None:
            return None, ABSENT[who]
        if min(len(images), len(evidence.reference)) < 2:
            return None, "a distance needs at least two images on each side"
        extract = fidelity.extract if who == "defended" else fidelity.extract_kept  # the others are those of many cells
        return evidence.once(("fidelity", encoder.name, who), lambda: extract(encoder, images)), ""

    def replicates(self, found: Tensor, reference: Tensor) -> Tensor:
        """(B,) Fréchet distances of resampled images. Sets of equal size are resampled equally."""
        rank = min(*found.shape, len(reference))
        rounds = self.resamples if rank <= LARGE else max(2, self.resamples // 5)
        return bootstrap(found, reference, rounds)

    def scores(self, found: Tensor | None, reference: Tensor, replicates: Tensor | None, why: str) -> dict[str, Score]:
        """fd, kd, precision and recall of features (N, D) against those of the reference (M, D)."""
        if found is None or replicates is None:
            return {name: unmeasured(why, better) for name, better in BETTER.items()}
        n = len(found)
        subset = min(self.subset, n, len(reference))
        value = fidelity.frechet(found, reference)
        distance = fidelity.kernel(found, reference, subset)
        half = Z * fidelity.kernel_error(found, reference) if n > 2 else None
        near = None if half is None else (distance - half, distance + half)
        few = _few(n, max(FLOOR, found.shape[1]))
        precision, recall = fidelity.manifolds(found, reference, min(self.neighbours, n - 1, len(reference) - 1))
        return {
            "fd": Score(value, n, False, student(value, replicates), None, few),
            "kd": Score(distance, n, False, near, None, _few(n, FLOOR)),
            "precision": replace(_share(precision, n), warning=_few(n, FLOOR)),
            "recall": replace(_share(recall, len(reference)), warning=_few(n, FLOOR)),
        }


def named(score: str, encoder: ImageEncoder) -> str:
    """The name of a score in the features of an encoder: fid_ratio for fd_ratio in those of Inception-v3."""
    if encoder.name == INCEPTION and score.startswith(("fd", "kd")):
        return score[0] + "id" + score[2:]
    return score


def _few(n: int, least: int) -> str | None:
    return f"n = {n} is under the {least} images that this distance needs" if n < least else None


def _share(value: float, n: int) -> Score:
    hits = torch.arange(n) < round(value * n)
    return rate(hits, True)


def bootstrap(found: Tensor, reference: Tensor, rounds: int) -> Tensor:
    """(rounds,) Fréchet distances of resamples of `found` (N, D), with replacement, to the reference (M, D).

    The indices depend on N and the round alone. With Σ₁ = AᵀA and Σ₂ = F Fᵀ, tr (Σ₁Σ₂)^½ is the sum of the singular
    values of A F, which are the roots of the eigenvalues of the smaller one of its two Gram matrices. An image that was
    drawn c times is one row of A with the weight √c.
    """
    x, real = found.double(), reference.double()
    n, center, factor = len(x), real.mean(0), _factor(real)
    ahead, total = x @ factor, factor.square().sum()
    products = ahead @ ahead.T if n <= factor.shape[1] else None
    norms = (x - x.mean(0)).square().sum(1)
    rng = generator("frechet", "bootstrap", n)
    distances = []
    for _ in loop("bootstrap", range(rounds)):
        drawn = torch.randint(n, (n,), generator=rng)
        times = torch.bincount(drawn, minlength=n).double()
        mean = times @ x / n
        spread = (times @ norms - n * (mean - x.mean(0)).square().sum()) / (n - 1)
        gram = _weighted_gram(ahead, times) if products is None else _drawn_gram(products, times)
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        distances.append((mean - center).square().sum() + spread + total - 2 * cross)
    return torch.stack(distances).clamp(min=0)


def _drawn_gram(products: Tensor, times: Tensor) -> Tensor:
    """a aᵀ (K, K) for the rows of A that were drawn, centred and with their weights; products: all rows' (N, N)."""
    n = times.sum()
    rows = times.nonzero().flatten()
    across = products @ times / n  # of each row with the mean
    own = times @ across / n
    weights = (times[rows] / (n - 1)).sqrt()
    centred = products[rows][:, rows] - across[rows, None] - across[rows] + own
    return weights[:, None] * centred * weights


def _weighted_gram(rows: Tensor, times: Tensor) -> Tensor:
    """aᵀ a (K, K) for rows (N, K) of which each was drawn so many times."""
    n = times.sum()
    centred = rows - times @ rows / n
    return (centred.T * (times / (n - 1))) @ centred


def _centred(x: Tensor) -> Tensor:
    """(N, D) → A (N, D) with AᵀA the covariance of the rows."""
    return (x - x.mean(0)) / math.sqrt(len(x) - 1)


def _factor(x: Tensor) -> Tensor:
    """(D, K) with F Fᵀ the covariance of the rows of x (M, D), K the smaller one of D and M."""
    a = _centred(x)
    if len(x) <= x.shape[1]:
        return a.T
    values, vectors = torch.linalg.eigh(a.T @ a)
    return vectors * values.clamp(min=0).sqrt()


def student(value: float, replicates: Tensor) -> tuple[float, float] | None:
    """`value` ± the 97.5 % quantile of Student's t times the standard deviation of the replicates (B,); None if all are
    equal."""
    from scipy.stats import t

    deviation = replicates.std().item()
    if not deviation > 0 or not math.isfinite(deviation):
        return None
    half = float(t.ppf(0.975, len(replicates) - 1)) * deviation
    return value - half, value + half


def compared(one: Score, other: Score, first: Tensor | None, second: Tensor | None, ratio: bool = True) -> Score:
    """one / other, or one − other, with the interval over the paired replicates (B,); unmeasured if either is."""
    for score in (one, other):
        if score.value != score.value:
            return replace(score, n=0, interval=None)
    if ratio and other.value == 0:
        return unmeasured("the clean model's distance is 0", False)
    value = one.value / other.value if ratio else one.value - other.value
    interval = None
    if first is not None and second is not None and len(first) == len(second):
        interval = student(value, first / second if ratio else first - second)
    return Score(value, one.n, False, interval, None, one.warning)


@hookimpl
def metrics() -> list[type]:
    return [Frechet]
