"""Fréchet and kernel distance of clean-input images to the reference images, in the judge's features.

    FD = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)       (Heusel et al. 2017, arXiv:1706.08500), ≥ 0
    KD = MMD² with the kernel (x·y / d + 1)³           (Bińkowski et al. 2018, arXiv:1801.01401), about 0 for equal sets

torch-fidelity computes both. The judge is registered as its feature extractor under the judge's own name. The scores
are therefore `fid[<judge>]` and `kid[<judge>]`, never plain `fid`, which means Inception-v3. Both shrink towards 0 as n
grows; compare them at equal n only. `fid_ratio` is the defended model's FD divided by the clean model's, at the same n
and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import ABSENT, Evidence, Judge, Score, Who, from_uint8, hookimpl, to_uint8, unmeasured

FLOOR = 100  # number of images below which a distance is not informative; the Fréchet distance also requires one image
# per feature
LAYER = "features"


@dataclass(frozen=True)
class Frechet:
    """fid and kid (defended), fid_before (backdoored), fid_clean (clean model), fid_ratio and fid_ratio_before, each
    followed by [<judge>].
    """

    name: ClassVar[str] = "frechet"
    version: ClassVar[int] = 1

    subset: int = 100  # images per subset of the kernel distance, at most n; torch-fidelity's default of 1000 is for
    # 50k images

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        judge = evidence.judge
        if judge is None:
            why = f"model {evidence.model.name} has no judge to take features from"
            return {name: unmeasured(why, False) for name in ("fid", "kid", "fid_ratio")}
        after, kernel = self.distances(evidence, judge, "defended")
        before, _ = self.distances(evidence, judge, "backdoored")
        clean, _ = self.distances(evidence, judge, "clean")
        scores = {
            "fid": after,
            "kid": kernel,
            "fid_before": before,
            "fid_clean": clean,
            "fid_ratio": ratio(after, clean),
            "fid_ratio_before": ratio(before, clean),
        }
        return {f"{name}[{judge.name}]": score for name, score in scores.items()}

    def distances(self, evidence: Evidence, judge: Judge, who: Who) -> tuple[Score, Score]:
        """Fréchet and kernel distance of one model's clean-input images to the reference."""
        images = evidence.images(who, "clean")
        if images is None:
            return unmeasured(ABSENT[who], False), unmeasured(ABSENT[who], False)
        n = min(len(images), len(evidence.reference))
        if n < 2:
            why = "a distance needs at least two images on each side"
            return unmeasured(why, False), unmeasured(why, False)
        found = evidence.once(("fidelity", who), lambda: extract(judge, images))
        reference = evidence.once("fidelity reference", lambda: extract(judge, evidence.reference))
        scores = (
            (frechet(found, reference), max(FLOOR, found.shape[1])),
            (kernel(found, reference, min(self.subset, n)), FLOOR),
        )
        fid, kid = (Score(value, len(images), False, warning=_few(n, least)) for value, least in scores)
        return fid, kid


def _few(n: int, least: int) -> str | None:
    return f"n = {n} is under the {least} images that this distance needs" if n < least else None


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


def kernel(found: Tensor, reference: Tensor, subset: int) -> float:
    """Kernel distance of two feature sets, the mean over 100 pairs of random subsets (seed fixed by the library)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    options = {"kid_subsets": 100, "kid_subset_size": subset, "verbose": False}
    return kid_features_to_metric(found.double(), reference.double(), **options)[KEY_METRIC_KID_MEAN]


def ratio(after: Score, clean: Score) -> Score:
    """after / clean; unmeasured if either is unmeasured or the clean model's distance is 0."""
    for score in (after, clean):
        if score.value != score.value:
            return replace(score, n=0)
    if clean.value == 0:
        return unmeasured("the clean model's distance is 0", False)
    return Score(after.value / clean.value, after.n, False, warning=after.warning)


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
