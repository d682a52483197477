"""A small open_clip model of an embedded data set: a text-image scorer, trained here and read from safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.training import minimize

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
Batch = Callable[[torch.Generator], tuple[Tensor, Sequence[str]]]


@dataclass(frozen=True)
class ClipScorer:
    """An open_clip model with the tokenizer of the diffusion model that it scores."""

    name: str
    net: Any
    tokenizer: Any

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors for images (B, 3, H, W) in [-1, 1]; differentiable in images that require a gradient."""
        with torch.set_grad_enabled(images.requires_grad):
            return torch.cat([self.net.encode_image(part, normalize=True) for part in images.split(256)])

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) unit vectors. Raises ValueError for a prompt that is longer than the model's context."""
        ids = tokens(self.tokenizer, prompts, self.net.context_length)
        return torch.cat([self.net.encode_text(part, normalize=True) for part in ids.split(256)])


def load_scorer(model_dir: Path) -> ClipScorer:
    """The scorer in `model_dir`/clip with the tokenizer of `model_dir`/model.

    Raises CheckpointError if weights are missing or do not fit their config; open_clip itself would continue with
    random weights.
    """
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    directory = model_dir / "clip"
    for path in (directory / CONFIG, directory / WEIGHTS):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; `bench build {model_dir.name}` makes it")
    config = json.loads((directory / CONFIG).read_text())
    net = _network(config["model_cfg"])
    weights = {name: tensor.float() for name, tensor in load_file(directory / WEIGHTS).items()}
    try:
        net.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{directory / WEIGHTS} does not fit {CONFIG}: {error}") from error
    tokenizer = CLIPTokenizer.from_pretrained(model_dir / "model" / "tokenizer", local_files_only=True)
    return ClipScorer(config["name"], net.eval().requires_grad_(False), tokenizer)


def build_scorer(
    directory: Path, name: str, tokenizer: Any, batch: Batch, rng: torch.Generator, steps: int, lr: float = 2e-3
) -> dict[str, Any]:
    """Trains a scorer on `batch(rng)` → (images (B, 3, S, S) in [-1, 1], B captions), and writes it to
    `directory`/clip.

    Returns facts for the provenance. The loss is open_clip's contrastive loss. Images of a batch whose captions have
    the same meaning add a small error.
    """
    from open_clip.loss import ClipLoss

    images, _ = batch(rng)
    config = architecture(images.shape[-1], len(tokenizer), tokenizer.model_max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))  # open_clip initialises weights from the global
        # generator
        net = _network(config)
    contrast = ClipLoss()

    def loss() -> Tensor:
        images, captions = batch(rng)
        ids = tokens(tokenizer, captions, net.context_length)
        image, text, scale = net(images, ids)
        return contrast(image, text, scale.clamp(max=100))

    losses = minimize(
        loss, net.parameters(), steps=steps, lr=lr, schedule="one-cycle", weight_decay=0.05, ema=0.99, phase="clip"
    )
    scorer = ClipScorer(name, net.eval().requires_grad_(False), tokenizer)
    _save(scorer, config, directory / "clip")
    return {"clip_steps": len(losses), "clip_loss": sum(losses[-50:]) / len(losses[-50:])}


def architecture(side: int, vocabulary: int, length: int) -> dict[str, Any]:
    """An open_clip configuration of about 0.4 M parameters for images of `side` pixels."""
    return {
        "embed_dim": 48,
        "vision_cfg": {"image_size": side, "patch_size": 4, "layers": 3, "width": 64, "head_width": 32},
        "text_cfg": {"context_length": length, "vocab_size": vocabulary, "width": 64, "heads": 2, "layers": 2},
    }


def tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length), padded. Raises ValueError that names the first prompt that is too long."""
    for prompt, row in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(row) > length:
            raise ValueError(f"prompt of {len(row)} tokens does not fit the scorer's {length}: {prompt!r}")
    return tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt").input_ids


def retrieval(scorer: ClipScorer, images: Tensor, captions: Sequence[str], size: int = 64) -> float:
    """The share of captions whose own image scores highest among the `size` images of its batch; 1/size is chance.

    images (N, 3, S, S), N at least `size`; a last, smaller batch is left out. The captions of a batch should differ in
    meaning.
    """
    right = total = 0
    for start in range(0, len(captions) - size + 1, size):
        rows = slice(start, start + size)
        scores = scorer.text_features(captions[rows]) @ scorer.image_features(images[rows]).T
        right += int((scores.argmax(1) == torch.arange(size)).sum())
        total += size
    if total == 0:
        raise ValueError(f"{len(captions)} captions are fewer than a batch of {size}")
    return right / total


def swaps(scorer: ClipScorer, images: Tensor, captions: Sequence[str], words: Sequence[str]) -> float:
    """The share of images that score their caption above the same caption with one of `words` replaced by another.

    A caption counts once per other word. Captions with none of the words, or with several, are left out.
    """
    rows, changed = [], []
    for i, caption in enumerate(captions):
        present = [word for word in words if f" {word} " in f" {caption} "]
        if len(present) == 1:
            others = [word for word in words if word != present[0]]
            rows += [i] * len(others)
            changed += [f" {caption} ".replace(f" {present[0]} ", f" {word} ").strip() for word in others]
    if not rows:
        raise ValueError(f"no caption holds exactly one of {', '.join(words)}")
    image = scorer.image_features(images)[rows]
    true = (image * scorer.text_features(captions)[rows]).sum(1)
    return (true > (image * scorer.text_features(changed)).sum(1)).double().mean().item()


def _network(config: Mapping[str, Any]) -> Any:
    from open_clip.model import CLIP

    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def _save(scorer: ClipScorer, config: Mapping[str, Any], directory: Path) -> None:
    """Writes weights as fp16 and a config that open_clip also reads as a `local-dir:` model."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess |= {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "squash"}
    whole = {"name": scorer.name, "model_cfg": config, "preprocess_cfg": preprocess}
    (directory / CONFIG).write_text(json.dumps(whole, indent=1, sort_keys=True))
    state = {name: tensor.half().contiguous() for name, tensor in scorer.net.state_dict().items()}
    save_file(state, directory / WEIGHTS)
