"""Fréchet and kernel distance, precision and recall of two sets of images in the features of an encoder.

torch-fidelity computes all four. The encoder is registered as its feature extractor under the encoder's own name. What
each of them is: the metric `frechet`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.diffusion import images as images_module, kept_tensors
from harness.diffusion.events import progress
from harness.diffusion.images import from_uint8, to_uint8
from harness.judges import public_encoders
from harness.types import ImageEncoder, PerceptualEncoder

LAYER = "features"


def extract(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """(N, D) float64 features of [-1, 1] images by torch-fidelity, with the encoder as its registered extractor."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    if encoder.name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(encoder.name, _extractor_class())
    extractor = create_feature_extractor(
        encoder.name, [LAYER], cuda=False, verbose=False, encoder=encoder, n=len(images)
    )
    options = {"input1": _uint8_dataset(images), "batch_size": 256, "cuda": False, "cache": False}
    with torch.random.fork_rng(devices=[]):  # the library's data loader draws from the global generator
        found: Any = extract_featuresdict_from_input_id(1, extractor, save_cpu_ram=True, verbose=False, **options)
    return found[LAYER]


def extract_kept(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """`extract`, or what an earlier process kept of it: the reference of a model is the same in each of its cells, and
    the images of an attacked model are the same for each defense. Only the features of public encoders take long enough
    to be kept."""
    if not isinstance(encoder, public_encoders.PublicEncoder):
        return extract(encoder, images)
    of = ("features", *_identity(encoder), tuple(images.shape), _digest(to_uint8(images)))
    return kept_tensors.kept(of, lambda: extract(encoder, images), lambda found: len(found) == len(images))


def perceptual_kept(encoder: PerceptualEncoder, images: Tensor, others: Tensor) -> Tensor:
    """`encoder.perceptual`, or what an earlier process kept of it, for the images of an attacked model."""
    if not isinstance(encoder, public_encoders.PublicEncoder):
        return encoder.perceptual(images, others)
    sets = (images, others)
    of = ("perceptual", *_identity(encoder), *(part for each in sets for part in (tuple(each.shape), _digest(each))))
    return kept_tensors.kept(
        of, lambda: encoder.perceptual(images, others), lambda found: found.shape == images.shape[:1]
    )


def _identity(encoder: public_encoders.PublicEncoder) -> tuple[object, ...]:
    release = public_encoders.RELEASES[public_encoders.parsed(encoder.name)[0]]
    return (encoder.name, encoder.side, release.sha256, *_versions())


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    """What features depend on beside weights and images: the libraries, and the modules that prepare the images."""
    modules = (images_module.__file__, public_encoders.__file__, __file__)
    libraries = [importlib.metadata.version(name) for name in ("torch", "timm", "torch-fidelity")]
    return (*libraries, *(hashlib.sha256(Path(str(place)).read_bytes()).hexdigest() for place in modules))


def frechet(found: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two feature sets (N, D) and (M, D)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(each.double()) for each in (found, reference)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel(found: Tensor, reference: Tensor, subset: int) -> float:
    """Kernel distance of two feature sets: mean over 100 pairs of random subsets (seed fixed by the library). How much
    it varies over other images: `kernel_error`."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    options = {"kid_subsets": 100, "kid_subset_size": subset, "verbose": False}
    return kid_features_to_metric(found.double(), reference.double(), **options)[KEY_METRIC_KID_MEAN]


def kernel_error(found: Tensor, reference: Tensor) -> float:
    """Standard error of the kernel distance of feature sets (N, D) and (M, D), over other images and the same
    reference: the jackknife of the unbiased estimate from all pairs, with the kernel (x·y / D + 1)³ of torch-fidelity.
    N is at least 3."""
    x, real = found.double(), reference.double()
    n, m = len(x), len(real)
    own = (x @ x.T / x.shape[1] + 1) ** 3
    pairs = own.sum(1) - own.diagonal()  # of each image with the others
    across = ((x @ real.T / x.shape[1] + 1) ** 3).sum(1)
    without = (pairs.sum() - 2 * pairs) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / ((n - 1) * m)
    return ((n - 1) * without.var(correction=0)).sqrt().item()


def manifolds(found: Tensor, reference: Tensor, neighbours: int) -> tuple[float, float]:
    """(precision, recall) of two feature sets."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": neighbours, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    done = prc_features_to_metric(found.double(), reference.double(), **options)
    return float(done[KEY_METRIC_PRECISION]), float(done[KEY_METRIC_RECALL])


def facts(encoder: ImageEncoder, images: Tensor, reference: Tensor) -> dict[str, float]:
    """The four numbers for images (N, C, H, W) and real ones (M, C, H, W) in [-1, 1], each named for the encoder. The
    kernel distance is over subsets of at most 250 images, precision and recall are of the third neighbour."""
    found, real = extract(encoder, images), extract(encoder, reference)
    precision, recall = manifolds(found, real, 3)
    numbers = {
        "fd": frechet(found, real), "kd": kernel(found, real, min(250, len(found), len(real))),
        "precision": precision, "recall": recall,
    }  # fmt: skip
    return {f"{name}[{encoder.name}]": value for name, value in numbers.items()}


def _extractor_class() -> type:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class EncoderExtractor(FeatureExtractorBase):
        """Wraps an encoder in torch-fidelity's interface: (B, C, H, W) uint8 in, one layer of features out."""

        def __init__(self, name: str, features_list: list[str], encoder: ImageEncoder, n: int = 0, **_: object) -> None:
            super().__init__(name, features_list)
            self.encoder, self.done, self.n = encoder, 0, n

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
            features = self.encoder.features(from_uint8(input)).double()
            self.done += len(input)
            progress(f"features of {self.encoder.name}", self.done, max(self.n, self.done))
            return (features,)

    return EncoderExtractor


def _uint8_dataset(images: Tensor) -> Any:
    from torch.utils.data import Dataset

    data = to_uint8(images)

    class Images(Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> Tensor:
            return data[index]

    return Images()
