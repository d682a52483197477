"""Fréchet and kernel distance, precision and recall of clean-input images against real images, in the judge's features.

    FD = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)       (Heusel et al. 2017, arXiv:1706.08500), ≥ 0
    KD = MMD² with the kernel (x·y / d + 1)³           (Bińkowski et al. 2018, arXiv:1801.01401), about 0 for equal sets
    precision = share of images within the real images' manifold, recall = share of real images within the manifold of
    the images; a manifold is the union of balls up to the k-th neighbour    (Kynkäänniemi et al., arXiv:1904.06991)

The images are those of the utility set, the real ones are the model's reference, which nobody trains on.
torch-fidelity computes all four. The judge is registered as its feature extractor under the judge's own name. The
scores are therefore `fid[<judge>]` and so on, never plain `fid`, which means Inception-v3. All depend on n and on the
reference; compare them at equal n and reference only.

`fid_ratio` is the defended model's FD divided by the clean model's, `fid_increase` is the defended model's FD minus the
attacked model's, both at the same noise.

Intervals (95 %) are for other noise and the same reference. That of FD and of what follows from it is Student's with
the standard deviation over bootstrap resamples of the images; the same images are resampled for both models of a ratio
or a difference. That of KD has the standard deviation over random subsets, times the root of subset size over n.
Those of precision and recall are Wilson's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness import ABSENT, Evidence, Judge, Score, Who, from_uint8, generator, hookimpl, rate, to_uint8, unmeasured

FLOOR = 100  # number of images below which a distance is not informative; the Fréchet distance also requires one image
# per feature
LAYER = "features"
LARGE = 512  # features above which the bootstrap has fewer resamples, because each takes seconds
Z = 1.959964  # standard normal quantile of a 95 % interval
AFTER: dict[Who, str] = {"defended": "", "backdoored": "_before", "clean": "_clean"}  # ending of a model's scores
BETTER = {"fid": False, "kid": False, "precision": True, "recall": True}
COMPARED = ("fid_ratio", "fid_ratio_before", "fid_increase")


@dataclass(frozen=True)
class Frechet:
    """fid, kid, precision and recall (defended; _before: backdoored; _clean: clean model), fid_ratio, fid_ratio_before
    and fid_increase, each followed by [<judge>].
    """

    name: ClassVar[str] = "frechet"
    version: ClassVar[int] = 2

    subset: Annotated[int, Ge(2)] = 250  # images per subset of the kernel distance, at most n and the reference's size;
    # torch-fidelity's default of 1000 is for 50k images
    neighbours: Annotated[int, Ge(1)] = 3  # k of precision and recall; the paper's value
    resamples: Annotated[int, Ge(2)] = 100  # of the bootstrap; a fifth of them for more than 512 features

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        judge = evidence.judge
        if judge is None:
            why = f"model {evidence.model.name} has no judge to take features from"
            names = [name + end for name in BETTER for end in AFTER.values()]
            return {name: unmeasured(why, BETTER.get(name.split("_")[0], False)) for name in (*names, *COMPARED)}
        reference = evidence.once("fidelity reference", lambda: extract(judge, evidence.reference))
        scores: dict[str, Score] = {}
        replicates: dict[Who, Tensor | None] = {}
        for who, end in AFTER.items():
            found, why = self.features(evidence, judge, who)
            replicates[who] = None if found is None else self.replicates(found, reference)
            values = self.scores(found, reference, replicates[who], why)
            scores |= {name + end: score for name, score in values.items()}
        scores |= {
            "fid_ratio": compared(scores["fid"], scores["fid_clean"], replicates["defended"], replicates["clean"]),
            "fid_ratio_before": compared(
                scores["fid_before"], scores["fid_clean"], replicates["backdoored"], replicates["clean"]
            ),
            "fid_increase": compared(
                scores["fid"], scores["fid_before"], replicates["defended"], replicates["backdoored"], ratio=False
            ),
        }
        return {f"{name}[{judge.name}]": score for name, score in scores.items()}

    def features(self, evidence: Evidence, judge: Judge, who: Who) -> tuple[Tensor | None, str]:
        """(N, D) features of a model's images, or None and the reason."""
        images = evidence.utility(who)
        if images is None:
            return None, ABSENT[who]
        if min(len(images), len(evidence.reference)) < 2:
            return None, "a distance needs at least two images on each side"
        return evidence.once(("fidelity", who), lambda: extract(judge, images)), ""

    def replicates(self, found: Tensor, reference: Tensor) -> Tensor:
        """(B,) Fréchet distances of resampled images. Sets of equal size are resampled equally."""
        rounds = self.resamples if found.shape[1] <= LARGE else max(2, self.resamples // 5)
        return bootstrap(found, reference, rounds)

    def scores(self, found: Tensor | None, reference: Tensor, replicates: Tensor | None, why: str) -> dict[str, Score]:
        """fid, kid, precision and recall of features (N, D) against those of the reference (M, D)."""
        if found is None or replicates is None:
            return {name: unmeasured(why, better) for name, better in BETTER.items()}
        n = len(found)
        subset = min(self.subset, n, len(reference))
        value = frechet(found, reference)
        distance, spread = kernel(found, reference, subset)
        half = Z * spread * math.sqrt(subset / n)
        few = _few(n, max(FLOOR, found.shape[1]))
        precision, recall = manifolds(found, reference, min(self.neighbours, n - 1, len(reference) - 1))
        return {
            "fid": Score(value, n, False, student(value, replicates), None, few),
            "kid": Score(distance, n, False, (distance - half, distance + half), None, _few(n, FLOOR)),
            "precision": replace(_share(precision, n), warning=_few(n, FLOOR)),
            "recall": replace(_share(recall, len(reference)), warning=_few(n, FLOOR)),
        }


def _few(n: int, least: int) -> str | None:
    return f"n = {n} is under the {least} images that this distance needs" if n < least else None


def _share(value: float, n: int) -> Score:
    hits = torch.arange(n) < round(value * n)
    return rate(hits, True)


def extract(judge: Judge, images: Tensor) -> Tensor:
    """(N, D) float64 features of [-1, 1] images by torch-fidelity, with the judge as its registered extractor."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    if judge.name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(judge.name, _extractor_class())
    extractor = create_feature_extractor(judge.name, [LAYER], cuda=False, verbose=False, judge=judge)
    options = {"input1": _uint8_dataset(images), "batch_size": 256, "cuda": False, "cache": False}
    with torch.random.fork_rng(devices=[]):  # the library's data loader draws from the global generator
        found: Any = extract_featuresdict_from_input_id(1, extractor, save_cpu_ram=True, verbose=False, **options)
    return found[LAYER]


def frechet(found: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two feature sets (N, D) and (M, D)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(each.double()) for each in (found, reference)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def bootstrap(found: Tensor, reference: Tensor, rounds: int) -> Tensor:
    """(rounds,) Fréchet distances of resamples of `found` (N, D), with replacement, to the reference (M, D).

    The indices depend on N and the round alone. tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of
    Σ₂^½ Σ₁ Σ₂^½, which is symmetric.
    """
    x, real = found.double(), reference.double()
    center, covariance = real.mean(0), _covariance(real)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    rng = generator("frechet", "bootstrap", len(x))
    distances = []
    for _ in range(rounds):
        picked = x[torch.randint(len(x), (len(x),), generator=rng)]
        sigma = _covariance(picked)
        cross = torch.linalg.eigvalsh(root @ sigma @ root).clamp(min=0).sqrt().sum()
        mean = (picked.mean(0) - center).square().sum()
        distances.append(mean + sigma.trace() + covariance.trace() - 2 * cross)
    return torch.stack(distances).clamp(min=0)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def student(value: float, replicates: Tensor) -> tuple[float, float] | None:
    """`value` ± the 97.5 % quantile of Student's t times the standard deviation of the replicates (B,); None if all are
    equal."""
    from scipy.stats import t

    deviation = replicates.std().item()
    if not deviation > 0 or not math.isfinite(deviation):
        return None
    half = float(t.ppf(0.975, len(replicates) - 1)) * deviation
    return value - half, value + half


def kernel(found: Tensor, reference: Tensor, subset: int) -> tuple[float, float]:
    """Kernel distance of two feature sets: mean and standard deviation over 100 pairs of random subsets (seed fixed by
    the library)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    options = {"kid_subsets": 100, "kid_subset_size": subset, "verbose": False}
    done = kid_features_to_metric(found.double(), reference.double(), **options)
    return done[KEY_METRIC_KID_MEAN], done[KEY_METRIC_KID_STD]


def manifolds(found: Tensor, reference: Tensor, neighbours: int) -> tuple[float, float]:
    """(precision, recall) of two feature sets."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": neighbours, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    done = prc_features_to_metric(found.double(), reference.double(), **options)
    return float(done[KEY_METRIC_PRECISION]), float(done[KEY_METRIC_RECALL])


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


def _extractor_class() -> type:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class JudgeExtractor(FeatureExtractorBase):
        """Wraps a judge in torch-fidelity's extractor interface: (B, C, H, W) uint8 in, one layer of features out."""

        def __init__(self, name: str, features_list: list[str], judge: Judge, **_: object) -> None:
            super().__init__(name, features_list)
            self.judge = judge

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return LAYER

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, input: Tensor) -> tuple[Tensor]:
            if input.dtype != torch.uint8:
                raise TypeError(f"the extractor takes uint8 images, not {input.dtype}")
            return (self.judge.features(from_uint8(input)).double(),)

    return JudgeExtractor


def _uint8_dataset(images: Tensor) -> Any:
    from torch.utils.data import Dataset

    data = to_uint8(images)

    class Images(Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Tensor:
            return data[index]

    return Images()


@hookimpl
def metrics() -> list[type]:
    return [Frechet]
