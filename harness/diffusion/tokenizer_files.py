"""A CLIP tokenizer from its vocabulary and its merges alone, and a T5 tokenizer from its pieces alone: nothing else of
a stranger's tokenizer folder decides how a text becomes tokens."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from typing import Any

from harness.diffusion.model_files import MOST_TEXT, CheckpointError, ModelFiles

SPECIAL = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
           "pad_token": "<|endoftext|>"}  # fmt: skip
LONGEST = 1024  # tokens of a prompt
MOST_PIECES = 512  # of T5, where its config says nothing
MOST_WORDS = 2**19  # tokens of a vocabulary
NAMES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json")  # fmt: skip


def read(folder: str) -> list[str]:
    """The names of the files that may decide a tokenizer."""
    return [f"{folder}/{name}" if folder else name for name in NAMES]


def load(files: ModelFiles, folder: str) -> Any:
    """The tokenizer. Raises CheckpointError where the vocabulary is missing, or not whole."""
    from tokenizers import AddedToken
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    vocabulary, merges = _vocabulary(files, folder)
    config = _config(files, folder)
    special = _special(files, folder, config)
    longest = config.get("model_max_length", 77)
    if isinstance(longest, float) and longest > 1e20:  # transformers' way to say that there is no limit
        longest = 77
    if type(longest) is not int or not 2 <= longest <= LONGEST:
        raise CheckpointError(f"{files.path(folder)}: model_max_length is {longest!r}; 2 to {LONGEST} tokens are read")
    added = _added(files, folder, config)
    for name, token in special.items():
        if token not in vocabulary and token not in added:
            raise CheckpointError(f"{files.path(folder)}: its vocabulary has no {name} {token!r}; fetch it again")
    try:
        owner: Any = CLIPTokenizer
        made = owner(vocab=dict(vocabulary), merges=merges, model_max_length=longest, **special)
        for token, (index, options) in sorted(added.items(), key=lambda item: item[1][0]):
            if token not in special.values():
                made.add_tokens([AddedToken(token, **options)])
                if made.convert_tokens_to_ids(token) != index:
                    raise ValueError(f"the added token {token!r} has the number {index}, which another one has")
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"{files.path(folder)}: gives no tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    return made


def load_pieces(files: ModelFiles, folder: str) -> Any:
    """A T5 tokenizer (SentencePiece's unigram model) from the pieces and the normalisation in tokenizer.json.

    Raises CheckpointError where they are missing or none. A spiece.model alone is not read.
    """
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    where, whole = files.path(folder), _json(files, folder, "tokenizer.json")
    if whole is None:
        raise CheckpointError(
            f"{where}: no tokenizer.json; make it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    model = whole.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    pieces = [(p[0], p[1]) for p in found if _piece(p)] if isinstance(found, list) else []
    if not pieces or len(pieces) != len(found or ()) or len({piece for piece, _ in pieces}) != len(pieces):
        raise CheckpointError(f"{where}: its tokenizer.json has no pieces with scores, each once; fetch it again")
    config = _config(files, folder)
    longest = config.get("model_max_length", MOST_PIECES)
    if isinstance(longest, float) and longest > 1e20:
        longest = MOST_PIECES
    if type(longest) is not int or not 2 <= longest <= LONGEST:
        raise CheckpointError(f"{where}: model_max_length is {longest!r}; 2 to {LONGEST} tokens are read")
    try:
        charsmap = _charsmap(whole.get("normalizer"))
        extra = sum(piece.startswith("<extra_id_") for piece, _ in pieces)
        owner: Any = T5Tokenizer
        made = owner(vocab=pieces, _spm_precompiled_charsmap=charsmap, extra_ids=extra, model_max_length=longest)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{where}: gives no tokenizer: {' '.join(str(error).split())[:200]}") from None
    if len(made) != len(pieces):
        raise CheckpointError(f"{where}: its pieces lack <pad>, </s> or <unk>; fetch it again")
    return made


def _piece(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    return fits and isinstance(value[1], int | float) and math.isfinite(value[1])


def _charsmap(normalizer: Any) -> bytes | None:
    """SentencePiece's table of characters, of a normalizer or of one in a sequence of them."""
    given = normalizer if isinstance(normalizer, dict) else {}
    for each in [given, *(given.get("normalizers") or ())]:
        if isinstance(each, dict) and each.get("type") == "Precompiled":
            return base64.b64decode(str(each.get("precompiled_charsmap")), validate=True) or None
    return None


def _config(files: ModelFiles, folder: str) -> dict[str, Any]:
    place = f"{folder}/tokenizer_config.json" if folder else "tokenizer_config.json"
    return files.configuration(place, MOST_TEXT) if place in files else {}


def _json(files: ModelFiles, folder: str, name: str, most: int = MOST_TEXT) -> dict[str, Any] | None:
    place = f"{folder}/{name}" if folder else name
    return files.json(place, most) if place in files else None


def _vocabulary(files: ModelFiles, folder: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token → number, and the merges in order: from vocab.json and merges.txt, else from tokenizer.json."""
    vocabulary, whole = _json(files, folder, "vocab.json"), _json(files, folder, "tokenizer.json")
    merges_file = f"{folder}/merges.txt" if folder else "merges.txt"
    model = (whole or {}).get("model")
    inner = model if isinstance(model, dict) else {}
    if vocabulary is None:
        vocabulary = inner.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise CheckpointError(f"{files.path(folder)}: no vocabulary (vocab.json, or tokenizer.json); fetch it again")
    if len(vocabulary) > MOST_WORDS:
        raise CheckpointError(
            f"{files.path(folder)}: a vocabulary of {len(vocabulary):,} tokens; at most {MOST_WORDS:,} are read"
        )
    numbers = list(vocabulary.values())
    if any(type(n) is not int or n < 0 for n in numbers) or len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{files.path(folder)}: its vocabulary does not give each token a number of its own")
    if "vocab.json" in {name.rpartition("/")[2] for name in files.folder(folder)} and inner.get("vocab") is not None:
        _same(vocabulary, inner["vocab"], files, folder)
    if merges_file in files:
        try:
            lines = files.read(merges_file).decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise CheckpointError(f"{files.path(merges_file)}: is no text in UTF-8; fetch it again") from None
        merges: list[Any] = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    else:
        given = inner.get("merges")
        merges = [m.split(" ") if isinstance(m, str) else m for m in given] if isinstance(given, list) else []
    if any(not isinstance(m, list) or len(m) != 2 for m in merges):
        raise CheckpointError(f"{files.path(folder)}: its merges are no pairs of tokens; fetch it again")
    return vocabulary, [(str(a), str(b)) for a, b in merges]


def _same(vocabulary: Mapping[str, int], other: Any, files: ModelFiles, folder: str) -> None:
    if not isinstance(other, dict) or any(vocabulary.get(token) != number for token, number in other.items()):
        raise CheckpointError(f"{files.path(folder)}: vocab.json and tokenizer.json give other numbers; remove one")


def _text(value: Any) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and 0 < len(found) <= 100 else None


def _special(files: ModelFiles, folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    said = {**(_json(files, folder, "special_tokens_map.json") or {}), **config}
    return {name: _text(said.get(name)) or usual for name, usual in SPECIAL.items()}


def _added(files: ModelFiles, folder: str, config: Mapping[str, Any]) -> dict[str, tuple[int, dict[str, bool]]]:
    """Tokens beyond the vocabulary: text → (number, how it is found in a text)."""
    found: dict[str, tuple[int, dict[str, bool]]] = {}

    def take(index: Any, token: Any) -> None:
        text = _text(token)
        if text is None or type(index) is not int or len(found) > 1000:
            raise CheckpointError(f"{files.path(folder)}: an added token that is none; fetch it again")
        options = token if isinstance(token, dict) else {}
        flags = {k: options[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in options}
        found[text] = (index, {k: bool(v) for k, v in flags.items()})

    listed = (_json(files, folder, "tokenizer.json") or {}).get("added_tokens") or []
    numbered = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(numbered, dict):
        raise CheckpointError(f"{files.path(folder)}: its added tokens are no list of tokens; fetch it again")
    for token in listed:
        take(token.get("id") if isinstance(token, dict) else None, token)
    for index, token in numbered.items():
        take(int(index) if re.fullmatch(r"[0-9]{1,9}", index) else None, token)
    for token, index in (_json(files, folder, "added_tokens.json") or {}).items():
        if token not in found:
            take(index, token)
    return found
