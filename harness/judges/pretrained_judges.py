"""Public judges: Inception-v3 as in FID, and CLIP ViT-B/32. Their weights are fetched or given, never shipped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.images import as_rgb, to_uint8
from harness.diffusion.model_files import short
from harness.judges.hub import Source

RELEASED = "released"  # the weights of the torch-fidelity release: the 2015 network of the first FID
OTHER = "inception-v3-other"  # the judge with weights that are not known to be those
POOL = "2048"
BATCH = 64


@dataclass(frozen=True)
class InceptionJudge:
    """The 2048 pooled features of Inception-v3 as torch-fidelity computes them: a Fréchet distance of these features is
    FID if the weights are the released ones. With others the judge has another name (OTHER), and its distance is `fd`.

    It has none of the classes of this benchmark, so it returns no attributes.
    """

    network: Any
    name: str = "inception-v3"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 2048) for images (B, 1 or 3, H, W) in [-1, 1], through 8 bits."""
        device = next(self.network.parameters()).device
        parts = to_uint8(as_rgb(images)).split(BATCH)
        return torch.cat([self.network(part.to(device))[0].cpu() for part in parts])

    def attributes(self, images: Tensor) -> Mapping[str, Tensor]:
        return {}


def load_inception(weights: str = RELEASED) -> InceptionJudge:
    """The judge from a .safetensors file, a .pth state dict (read as tensors only), or torch-fidelity's release.

    The release is downloaded once and checked against the digest in its name. A file is the release if it has that
    digest. Raises CheckpointError.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The library unpickles its input without restrictions, so it gets bytes that this module wrote.
    ours = io.BytesIO()
    torch.save(_inception_state(weights), ours)
    ours.seek(0)
    try:
        network: Any = FeatureExtractorInceptionV3("inception-v3", [POOL], feature_extractor_weights_path=ours)
    except RuntimeError as error:
        raise CheckpointError(f"{weights}: not the weights of FID's Inception-v3: {error}") from error
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    return InceptionJudge(network) if _is_release(weights) else InceptionJudge(network, OTHER)


def _is_release(weights: str) -> bool:
    """Whether these are the released weights: a file whose sha256 begins as the release's name ends is the release."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return weights == RELEASED or inception_identity(weights).startswith(Path(URL_INCEPTION_V3).stem.split("-")[-1])


def _inception_state(weights: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if weights == RELEASED:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        path = Path(weights).expanduser()
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # HTTP, pickle, safetensors and the system each raise their own errors
        raise CheckpointError(
            f"Inception-v3 weights '{weights}' cannot be had ({short(error)}); "
            "give a .safetensors or .pth file, or inception='' to do without FID"
        ) from error


def inception_identity(weights: str) -> str:
    """What the numbers depend on: the name of the release, or the digest of the file. Raises CheckpointError."""
    if weights in ("", RELEASED):
        return weights
    path = Path(weights).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{weights}: no such file; inception='' does without FID")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class OpenClip:
    """An open_clip network with its own tokenizer and preprocessing."""

    name: str
    network: Any
    tokenizer: Any
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors for images (B, 1 or 3, H, W) in [-1, 1], resized bicubically; differentiable in them."""
        device = next(self.network.parameters()).device
        mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        done = []
        for part in as_rgb(images).split(BATCH):
            sized = torch.nn.functional.interpolate(
                (part.to(device) + 1) / 2, size=(self.side, self.side), mode="bicubic", antialias=True
            ).clamp(0, 1)
            done.append(self.network.encode_image((sized - mean) / std, normalize=True).cpu())
        return torch.cat(done)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) unit vectors; prompts are cut to CLIP's 77 tokens, as by CLIP's own tokenizer."""
        device = next(self.network.parameters()).device
        ids = self.tokenizer(list(prompts)).to(device)
        return torch.cat([self.network.encode_text(part, normalize=True).cpu() for part in ids.split(BATCH)])


def load_clip(source: Source) -> OpenClip:
    """The scorer in a directory in open_clip's format (open_clip_config.json, open_clip_model.safetensors).

    Raises CheckpointError if it is missing or does not fit; open_clip itself would continue with random weights.
    """
    from open_clip import SimpleTokenizer
    from open_clip.model import CLIP
    from safetensors.torch import load_file

    directory = source.fetch()
    places = directory / "open_clip_config.json", directory / "open_clip_model.safetensors"
    for place in places:
        if not place.is_file():
            raise CheckpointError(f"{place} is missing; clip='' does without a CLIP score")
    try:
        config = json.loads(places[0].read_text())
        cfg, pre = config["model_cfg"], config["preprocess_cfg"]
        network = CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], quick_gelu=cfg.get("quick_gelu", False))
        network.load_state_dict({k: v.float() for k, v in load_file(places[1]).items()}, strict=True)
        size = pre.get("size", cfg["vision_cfg"]["image_size"])
        side, mean, std = size if isinstance(size, int) else size[-1], tuple(pre["mean"]), tuple(pre["std"])
    except Exception as error:
        raise CheckpointError(f"{directory}: cannot be read as an open_clip network: {short(error)}") from error
    network = network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = SimpleTokenizer(context_length=cfg["text_cfg"].get("context_length", 77))
    return OpenClip("clip-vit-b32", network, tokens, side, mean, std)
