"""Files of textual-inversion embeddings (Gal et al. 2023, arXiv:2208.01618): vectors that stand for one new word.

Three ways of writing them are read. diffusers: one tensor, whose name is the word. AUTOMATIC1111: one tensor
"emb_params", whose word is the file's name. SDXL: "clip_l" and "clip_g", for the first and the second text encoder,
whose word is the file's name. A tensor is one vector (D,) or several (n, D), which take n places of a prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.diffusion import tokenizer_files
from harness.diffusion.model_files import CheckpointError, ModelFiles

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

ONE, PAIR = "emb_params", {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
LONGEST = 100  # characters of a word


@dataclass(frozen=True)
class Embedding:
    """vectors: part, "text_encoder" or "text_encoder_2", → (n, D) float32, n the same for all. word: what a prompt
    says for it."""

    file: Path
    word: str
    vectors: Mapping[str, Tensor]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the n vectors, named as diffusers names them."""
        count = len(next(iter(self.vectors.values())))
        return (self.word, *(f"{self.word}_{i}" for i in range(1, count)))

    @property
    def text(self) -> str:
        """What stands in a prompt for all vectors."""
        return " ".join(self.tokens)


def is_embedding(files: ModelFiles, name: str) -> bool:
    """Whether a safetensors file holds an embedding and nothing else, as far as names and shapes say."""
    held = files.header(name).tensors
    named = set(held) == set(PAIR) or len(held) == 1
    return named and all(len(shape) in (1, 2) and shape[-1] for _, shape in held.values())


def read(files: ModelFiles, name: str) -> Embedding:
    """The embedding of a file. Raises CheckpointError for vectors that are none, and for a word that no prompt says."""
    path, held = files.path(name), files.header(name).tensors
    if not is_embedding(files, name):
        raise CheckpointError(f"{path}: holds no embedding, as diffusers, AUTOMATIC1111 or SDXL write it")
    (first, *_) = held
    word = path.stem if first == ONE or first in PAIR else first
    parts = PAIR if first in PAIR else {first: "text_encoder"}
    vectors = {part: value.float().reshape(-1, value.shape[-1]) for part, value in _named(files, name, parts)}
    counts = {len(value) for value in vectors.values()}
    if len(counts) != 1 or not min(counts):
        raise CheckpointError(f"{path}: has {' and '.join(map(str, sorted(counts)))} vectors; give as many for each "
                              "text encoder, and at least one")  # fmt: skip
    if not all(bool(value.isfinite().all()) for value in vectors.values()):
        raise CheckpointError(f"{path}: its vectors hold NaN or infinity; fetch it again")
    if not word.isprintable() or not 0 < len(word) <= LONGEST or any(c.isspace() for c in word):
        raise CheckpointError(
            f"{path}: its word is {word[:LONGEST]!a}; it should have 1 to {LONGEST} characters, and no blanks"
        )
    return Embedding(path, word, vectors)


def _named(files: ModelFiles, name: str, parts: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    held = files.tensors_of(name, list(parts))
    return [(part, held[key]) for key, part in parts.items()]


@torch.no_grad()
def added(base: DiffusionModel, embedding: Embedding) -> DiffusionModel:
    """A copy of the base whose tokenizers and text encoders know the embedding's tokens.

    Raises CheckpointError for vectors of another width than the text encoder's, for a model with another number of text
    encoders, and for tokens that the base's tokenizer has or that it does not keep whole.
    """
    encoders = {part: net for part, net in base.components().items() if part.startswith("text_encoder")}
    if set(encoders) != set(embedding.vectors):
        raise CheckpointError(
            f"{embedding.file}: holds vectors for {len(embedding.vectors)} text encoder"
            f"{'s' * (len(embedding.vectors) > 1)}, and the base has {len(encoders) or 'none'}; is it the base that "
            "the embedding is for?"
        )
    for part, vectors in embedding.vectors.items():
        width = _config(encoders[part]).hidden_size
        if vectors.shape[1] != width:
            raise CheckpointError(
                f"{embedding.file}: its vectors have {vectors.shape[1]} numbers, and the base's {part} takes {width}; "
                "is it the base that the embedding is for?"
            )
    model = base.clone()
    tokenizers = {"text_encoder": model.tokenizer, "text_encoder_2": model.tokenizer_2}
    made = {part: _taught(tokenizers[part], embedding) for part in embedding.vectors}
    for part, vectors in embedding.vectors.items():
        encoder: Any = model.components()[part]
        ids = made[part].convert_tokens_to_ids(list(embedding.tokens))
        table = encoder.get_input_embeddings()
        if max(ids) >= table.num_embeddings:
            encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
            table = encoder.get_input_embeddings()
        table.weight.data[ids] = vectors.to(table.weight)
        encoder.requires_grad_(False)
    return replace(model, tokenizer=made["text_encoder"], tokenizer_2=made.get("text_encoder_2"))


def _taught(tokenizer: Any, embedding: Embedding) -> Any:
    """A copy of the tokenizer with the embedding's tokens."""
    known = tokenizer.get_vocab()
    there = [token for token in embedding.tokens if token in known or f"{token}</w>" in known]
    if there:
        raise CheckpointError(f"{embedding.file}: its word {there[0]!a} is one of the base's tokens; rename it")
    if len(embedding.tokens) > tokenizer.model_max_length - 2:
        raise CheckpointError(
            f"{embedding.file}: has {len(embedding.tokens)} vectors, and a prompt has {tokenizer.model_max_length - 2} "
            "places"
        )
    with tempfile.TemporaryDirectory() as folder:  # a deep copy of transformers' CLIPTokenizer decodes otherwise
        tokenizer.save_pretrained(folder)
        made = tokenizer_files.load(ModelFiles(Path(folder)), "")
    made.add_tokens(list(embedding.tokens))
    ids = made.convert_tokens_to_ids(list(embedding.tokens))
    if made(embedding.text).input_ids[1:-1] != ids:
        raise CheckpointError(
            f"{embedding.file}: the base's tokenizer does not keep its word {embedding.word!a} whole; rename it"
        )
    return made


def _config(part: Any) -> Any:
    return part.config
