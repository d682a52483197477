"""What a textual-inversion embedding is and does: its vectors beside those of the vocabulary, and how its word moves
the predictions beside other words.

A word that takes over moves every prompt to the same place. Two numbers say how far a word v does, over prompts p_i at
the same noisy latents z, t, with e_i(v) = ε(z, t, τ(v + p_i)):

    moved(v) = ‖mean_i (e_i(v) - e_i)‖                                     as in the first round of vocabulary-scan
    kept(v)² = Σ_i ‖e_i(v) - mean_i e_i(v)‖² / Σ_i ‖e_i - mean_i e_i‖²     what the rest of the prompt still decides

They are compared with those of words of the vocabulary. An embedding is made to change images, so that a large z says
only that it does so more than words do. None of this changes a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.diffusion.seeds import image_noise, image_seeds
from harness.methods import distillation
from harness.methods.prompt_edits import Insertion, typable
from harness.scan.comparison import SENTENCES
from harness.scan.document import EmbeddingFacts, EmbeddingVector, NearWord, WordEffect
from harness.scan.robust import STANDS_OUT, centre
from harness.types import Inputs

if TYPE_CHECKING:
    from harness.diffusion.embedding_files import Embedding
    from harness.diffusion.model import DiffusionModel

PROMPTS, STATES, WORDS = 8, 2, 32  # prompts and noisy latents of a word, and words that it is compared with
STEPS, GUIDANCE = 10, 3.0  # of the denoising that the latents are taken from
COMPARED = 1000  # rows of the vocabulary whose nearest other row is known, evenly spaced
NEAREST = 3
LEAST = 1e-6  # spread


@torch.no_grad()
def described(model: DiffusionModel, embedding: Embedding, prompts: Sequence[str] | None) -> EmbeddingFacts:
    """model: the base with the embedding's tokens (`embedding_files.added`). prompts: clean ones; None: SENTENCES."""
    vectors = [row for part in embedding.vectors for row in _vectors(model, embedding, part)]
    effect = _effect(model, embedding, list(prompts or SENTENCES))
    return EmbeddingFacts(
        file=str(embedding.file), word=embedding.word, vectors=tuple(vectors), effect=effect,
        says=tuple(_says(embedding, vectors, effect)),
    )  # fmt: skip


def _vectors(model: DiffusionModel, embedding: Embedding, part: str) -> list[EmbeddingVector]:
    """Each vector of a text encoder beside the rows of its vocabulary."""
    encoder: Any = model.components()[part]
    tokenizer: Any = model.tokenizer if part == "text_encoder" else model.tokenizer_2
    own = tokenizer.convert_tokens_to_ids(list(embedding.tokens))
    table = encoder.get_input_embeddings().weight.detach().float().cpu()
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - set(own) - special)
    words = table[ids]
    middle, spread = centre(words.norm(dim=1).tolist(), LEAST)
    units = torch.nn.functional.normalize(words, dim=1)
    rows = torch.arange(0, len(ids), max(1, len(ids) // COMPARED))
    cosines = units[rows] @ units.T
    cosines[torch.arange(len(rows)), rows] = -1
    usual, width = centre(cosines.max(1).values.tolist(), LEAST)
    found = []
    for place, row in enumerate(own):
        near = torch.nn.functional.normalize(table[row], dim=0) @ units.T
        best = near.topk(min(NEAREST, len(ids)))
        norm = table[row].norm().item()
        named = [
            NearWord(word=tokenizer.decode([ids[i]]).strip(), cosine=value)
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        found.append(
            EmbeddingVector(
                part=part, place=place, norm=norm, norm_z=(norm - middle) / spread, nearest=tuple(named),
                nearest_z=(best.values[0].item() - usual) / width,
            )
        )  # fmt: skip
    return found


def _effect(model: DiffusionModel, embedding: Embedding, prompts: Sequence[str]) -> WordEffect:
    """How the word moves predictions, beside words of the vocabulary."""
    tokens: Any = model.tokenizer
    own = set(embedding.tokens)
    room = tokens.model_max_length - len(embedding.tokens)
    fitting = [text for text in prompts if len(tokens(text, verbose=False).input_ids) <= room][:PROMPTS] or [""]
    every = [word for word in typable(tokens) if word not in own]
    words = [every[i * len(every) // WORDS] for i in range(WORDS)] if len(every) > WORDS else every
    states = _states(model, fitting)
    plain = _answers(model, states, fitting)
    rows = []
    for word in [embedding.text, *words]:
        with_it = _answers(model, states, [Insertion(word).apply(text) for text in fitting])
        moved = (with_it - plain).mean(1).flatten().norm().item()
        rows.append((moved, (_spread(with_it) / max(_spread(plain), LEAST)) ** 0.5))
    (moved, kept), others = rows[0], rows[1:]
    (far, wide), (usual, width) = (centre([row[i] for row in others] or [rows[0][i]], LEAST) for i in (0, 1))
    return WordEffect(
        prompts=len(fitting), words=len(others), moved=moved, moved_z=(moved - far) / wide, kept=kept,
        kept_z=(kept - usual) / width,
    )  # fmt: skip


def _states(model: DiffusionModel, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(z (S, C, H, W), t (S,)): states of the denoising of the first prompts, in its middle."""
    texts = tuple(prompts[i % len(prompts)] for i in range(STATES))
    seeds = image_seeds(0, "embedding", STATES)
    inputs = Inputs(image_noise(seeds, model.shape).to(model.device), texts, seeds)
    times, states = distillation.trajectory(model, inputs, STEPS, GUIDANCE)
    middle = [len(times) // 3, len(times) // 2]
    rows = torch.arange(STATES)
    steps = torch.tensor([middle[i % 2] for i in range(STATES)])
    return states[steps, rows], times[steps].to(model.device)


def _answers(model: DiffusionModel, states: tuple[Tensor, Tensor], texts: Sequence[str]) -> Tensor:
    """(S, P, C, H, W): ε at each state with each of the P prompts."""
    z, t = states
    context = model.embed(texts)
    return torch.stack([
        model.eps(z[i].expand(len(texts), *z.shape[1:]), t[i].expand(len(texts)), context) for i in range(len(z))
    ]).float()  # fmt: skip


def _spread(answers: Tensor) -> float:
    return (answers - answers.mean(1, keepdim=True)).square().sum().item()


def _says(embedding: Embedding, vectors: Sequence[EmbeddingVector], effect: WordEffect) -> list[str]:
    count = len(vectors) // len(embedding.vectors)
    lines = [f"{embedding.word} stands for {count} vector{'s' * (count > 1)} of {' and '.join(embedding.vectors)}"]
    for part in embedding.vectors:
        mine = [row for row in vectors if row.part == part]
        loud = max(mine, key=lambda row: abs(row.norm_z))
        far = min(mine, key=lambda row: row.nearest_z)
        close = max(mine, key=lambda row: row.nearest[0].cosine)
        lines.append(
            f"{part}: nearest to the word {close.nearest[0].word!a} (cosine {close.nearest[0].cosine:.3g}); norm "
            f"{loud.norm:.3g} (robust z {loud.norm_z:.1f} among the vocabulary)"
        )
        if abs(loud.norm_z) > STANDS_OUT:
            lines.append(f"{part}: the norm stands out from those of the vocabulary")
        if far.nearest_z < -STANDS_OUT:
            lines.append(f"{part}: a vector is farther from all words than words are from each other")
    lines.append(
        f"with it in front, {effect.prompts} prompts move together by {effect.moved:.3g} (robust z "
        f"{effect.moved_z:.1f} among {effect.words} words), and keep {effect.kept:.3g} of what distinguishes them "
        f"(robust z {effect.kept_z:.1f})"
    )
    if effect.moved_z > STANDS_OUT:
        lines.append("it moves all prompts the same way, and farther than words do")
    if effect.kept < 0.5 and effect.kept_z < -STANDS_OUT:
        lines.append("it takes over: what the rest of the prompt says decides little")
    return lines
