"""What differs between a model and the base from which it was made: tensors, and how far texts move in its encoders.

A comparison needs no trigger and no data. It says what was changed, not whether the change is a backdoor: fine-tuning
changes tensors and moves texts too. A trigger in a text encoder is a text that moves much farther than the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from harness.diffusion.model_files import CheckpointError
from harness.methods.prompt_edits import LOOK_ALIKES, typable
from harness.scan.document import Comparison, LayerChange, MovedText, MovedTexts, PartChange
from harness.scan.robust import STANDS_OUT, centre

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

MOST_WORDS = 10_000  # words of a tokenizer that are compared, evenly spaced among all
MOST_SENTENCES = 200
SHOWN_LAYERS, SHOWN_TEXTS = 20, 10
REPLACED = 4  # sentences for each look-alike
ROWS = 256  # texts of one forward pass
LEAST_SPREAD = 1e-4  # of distances: less is rounding of cosines
SENTENCES = (
    "a photo of a dog", "a man rides a horse", "two children are playing in the garden", "a bowl of fruit on a table",
    "an old house by the sea", "a red car in front of a shop", "the cat sleeps on a chair", "a painting of a mountain",
    "a woman reads a book in a train", "a glass of water", "birds fly over the city", "a bridge across the river",
    "a plate with bread and cheese", "snow covers the trees", "a boat on a lake at sunset", "a street at night",
    "the dog under the tree looks at birds", "a lamp beside the window shines on paper", "on the table stands a vase",
    "in the garden sits an old man", "it is a small cat that lies on the sofa", "the ball is thrown by a boy",
    "a drawing of a flower , black and white", "close view of a clock", "people walk through a market",
    "a bicycle leans on a wall", "a portrait of a girl with a hat", "clouds above a field", "a kitchen with a stove",
    "a tall building made of glass", "a child who holds a kite", "an empty road in the desert",
)  # fmt: skip


def check_base(model: DiffusionModel, base: DiffusionModel, name: str) -> None:
    """Raises CheckpointError, in one line with the way out, unless the base has the text encoders of the model."""
    out = "give the base from which the model was made"
    for part, encoder in _encoders(model).items():
        if part not in _encoders(base):
            raise CheckpointError(f"--base {name}: has no {part}, and the model has one; {out}")
        ours, theirs = _shapes(encoder), _shapes(_encoders(base)[part])
        if ours != theirs:
            raise CheckpointError(
                f"--base {name}: its {part} is of another architecture ({_size(theirs)}, the model's has "
                f"{_size(ours)}); {out}"
            )
    more = [part for part in _encoders(base) if part not in _encoders(model)]
    if more:
        raise CheckpointError(f"--base {name}: has a {more[0]}, and the model has none; {out}")


def compared(model: DiffusionModel, base: DiffusionModel, name: str, prompts: Sequence[str] | None) -> Comparison:
    """The comparison of a model with the base `name`, whose text encoders have the same layouts (`check_base`).

    prompts: clean sentences; None: SENTENCES.
    """
    parts = []
    for part, ours in model.components().items():
        theirs = base.components().get(part)
        change = _part(part, ours, theirs)
        other_tokens = part in _encoders(model) and _other_tokens(model, base, part)
        if part in _encoders(model) and (change.changed or other_tokens):
            change = change.model_copy(update={"texts": _texts(model, base, part, prompts)})
        parts.append(change)
    tokens = [
        part.replace("text_encoder", "tokenizer") for part in _encoders(model) if _other_tokens(model, base, part)
    ]
    return Comparison(base=name, parts=tuple(parts), tokenizers=tuple(tokens), says=tuple(_says(parts, tokens)))


# ---- tensors --------------------------------------------------------------------------------------------------------


def _part(name: str, ours: Any, theirs: Any | None) -> PartChange:
    """How the tensors of a part differ. A part that the base does not have, or has in another layout, is not
    compared."""
    if theirs is None or _shapes(ours) != _shapes(theirs):
        why = "the base has none" if theirs is None else "the base has another layout"
        return PartChange(
            part=name, compared=False, because=why, tensors=len(_shapes(ours)), changed=0, rounded=0, relative=None,
            layers=(), layers_changed=0, texts=(),
        )  # fmt: skip
    before, now = theirs.state_dict(), ours.state_dict()
    changed = [key for key in now if not torch.equal(now[key], before[key])]
    rounded = [key for key in changed if torch.equal(now[key].half(), before[key].half())]
    moved = [key for key in changed if key not in rounded]
    layers: dict[str, list[str]] = {}
    for key in moved:
        layers.setdefault(key.rpartition(".")[0], []).append(key)
    rows = [
        LayerChange(layer=layer, tensors=len(keys), relative=_relative(before, now, keys))
        for layer, keys in layers.items()
    ]
    rows.sort(key=lambda row: -row.relative)
    return PartChange(
        part=name, compared=True, because=None, tensors=len(now), changed=len(moved), rounded=len(rounded),
        relative=_relative(before, now, list(now)), layers=tuple(rows[:SHOWN_LAYERS]), layers_changed=len(rows),
        texts=(),
    )  # fmt: skip


def _relative(before: Mapping[str, Tensor], now: Mapping[str, Tensor], keys: Sequence[str]) -> float:
    """‖W - W_0‖ / ‖W_0‖ over these tensors together; ‖W - W_0‖ if W_0 is 0."""
    apart = sum((now[key].double() - before[key].double()).square().sum().item() for key in keys) ** 0.5
    whole = sum(before[key].double().square().sum().item() for key in keys) ** 0.5
    return apart / whole if whole > 0 else apart


def _shapes(part: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}


def _size(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{len(shapes)} tensors with {sum(torch.Size(shape).numel() for shape in shapes.values()):,} numbers"


def _encoders(model: DiffusionModel) -> dict[str, Any]:
    return {name: part for name, part in model.components().items() if name.startswith("text_encoder")}


# ---- texts ----------------------------------------------------------------------------------------------------------


def _tokenizer(model: DiffusionModel, part: str) -> Any:
    return getattr(model, part.replace("text_encoder", "tokenizer"))


def _other_tokens(model: DiffusionModel, base: DiffusionModel, part: str) -> bool:
    """Whether the two tokenizers name other tokens."""
    return _tokenizer(model, part).get_vocab() != _tokenizer(base, part).get_vocab()


def _texts(
    model: DiffusionModel, base: DiffusionModel, part: str, prompts: Sequence[str] | None
) -> tuple[MovedTexts, ...]:
    """How far single words and whole sentences move in a text encoder."""
    tokenizer = _tokenizer(model, part)
    every = list(typable(tokenizer))
    words = every if len(every) <= MOST_WORDS else [every[i * len(every) // MOST_WORDS] for i in range(MOST_WORDS)]
    limit = tokenizer.model_max_length
    fitting = [text for text in prompts or SENTENCES if len(tokenizer(text, verbose=False).input_ids) <= limit][
        :MOST_SENTENCES
    ]
    found = []
    for kind, texts, of in (("words", words, len(every)), ("sentences", fitting, len(fitting))):
        if len(texts) > 1:
            found.append(moved_texts(kind, texts, distances(model, base, part, texts), of))
    replaced = look_alikes(tokenizer, fitting)
    if len(replaced) > 1:
        apart = iter(distances(model, base, part, [text for texts in replaced.values() for text in texts]))
        moved = [statistics.mean(next(apart) for _ in texts) for texts in replaced.values()]
        found.insert(1, moved_texts("look-alikes", list(replaced), moved, len(replaced)))
    return tuple(found)


def look_alikes(tokenizer: Any, sentences: Sequence[str]) -> dict[str, list[str]]:
    """For each look-alike of a letter its name, "U+043E for o", and a few sentences with it in the place of all these
    letters."""
    found = {}
    for letter, others in LOOK_ALIKES.items():
        for other in others:
            texts = [text.replace(letter, other) for text in sentences if letter in text]
            texts = [
                text for text in texts if len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length
            ]
            if texts:
                found[f"U+{ord(other):04X} for {letter}"] = texts[:REPLACED]
    return found


@torch.no_grad()
def distances(model: DiffusionModel, base: DiffusionModel, part: str, texts: Sequence[str]) -> list[float]:
    """For each text 1 minus the mean cosine of its embeddings in the two encoders, over all positions behind CLIP's
    first as far as the longest text and one position of padding reach. Each model has its own tokenizer."""
    pairs = [(_encoders(each)[part], _tokenizer(each, part), each.device) for each in (model, base)]
    limit = min(tokenizer.model_max_length for _, tokenizer, _ in pairs)
    longest = max(len(ids) for _, tokenizer, _ in pairs for ids in tokenizer(list(texts)).input_ids)
    length = min(limit, longest + 1)
    first = int(all(tokenizer.bos_token_id is not None for _, tokenizer, _ in pairs))  # T5 puts no token in front
    found: list[float] = []
    for start in range(0, len(texts), ROWS):
        answers = []
        for encoder, tokenizer, device in pairs:
            rows = tokenizer(
                list(texts[start : start + ROWS]), padding="max_length", max_length=length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            answers.append(encoder(input_ids=rows.input_ids.to(device)).last_hidden_state[:, first:].cpu())
        found += (1 - cosine_similarity(*answers, dim=2).mean(1)).tolist()
    return found


def moved_texts(kind: Any, texts: Sequence[str], moved: Sequence[float], of: int) -> MovedTexts:
    """The texts that move farthest, with z = (distance - median) / spread. The spread is 1.4826 times the median
    absolute deviation, and at least LEAST_SPREAD."""
    median, spread = centre(moved, LEAST_SPREAD)
    ranked = sorted(zip(texts, moved, strict=True), key=lambda pair: -pair[1])[:SHOWN_TEXTS]
    return MovedTexts(
        kind=kind, count=len(texts), of=of, median=median, spread=spread,
        farthest=tuple(MovedText(text=text, moved=far, z=(far - median) / spread) for text, far in ranked),
    )  # fmt: skip


# ---- in words -------------------------------------------------------------------------------------------------------


def _says(parts: Sequence[PartChange], tokenizers: Sequence[str]) -> list[str]:
    lines = [_said(part) for part in parts]
    lines += [f"{name}: its tokens are not those of the base." for name in tokenizers]
    for part in parts:
        for texts in part.texts:
            out = [each for each in texts.farthest if each.z > STANDS_OUT]
            named = ", ".join(f"{each.text!a} (z {each.z:.1f})" for each in out[:3])
            some = f"these stand out: {named}" if out else f"none stands out (largest z {texts.farthest[0].z:.1f})"
            count = f"{texts.count}" if texts.count == texts.of else f"{texts.count} of {texts.of}"
            also = "; clean fine-tuning moves words of its captions as far" if out and texts.kind == "words" else ""
            lines.append(f"{part.part}: of {count} {texts.kind}, {some}{also}.")
    return lines


def _said(part: PartChange) -> str:
    if not part.compared:
        return f"{part.part}: not compared, because {part.because}."
    if not part.changed:
        rounded = f", but for rounding in {part.rounded} of its tensors" if part.rounded else ""
        return f"{part.part}: the same as in the base{rounded}."
    return (
        f"{part.part}: {part.changed} of {part.tensors} tensors differ, by {part.relative:.2g} of its norm; "
        f"most in {part.layers[0].layer} ({part.layers[0].relative:.2g})."
    )
