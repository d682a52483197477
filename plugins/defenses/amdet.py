"""Detects backdoored text encoders by a search for a vector that makes all tokens of every prompt alike.

AMDET. Wang et al., "Assimilation Matters: Model-level Backdoor Detection in Vision-Language Pretrained Models",
arXiv:2512.00343. In a backdoored text encoder, the attention of all tokens to the trigger replaces their features by
the target's. The search looks for such a trigger as a free vector v (D,), which stands after the first embedding of
each prompt p. f is the encoder under test and g the clean one; both get the embeddings of the former:

    L(v) = -A(f(p+v)) + β cos(f(p), f(p+v)) + γ cos(g(p+v), f(p+v))
    A(F) = mean over i, j of cos(F_i, F_j)      cos(F, G) = mean over i of cos(F_i, G_i)      positions i, j = 1..L

It runs on one part of the prompts, and the other part judges what was found:

    loss      mean of L                                 assimilated  share of prompts with A > 0.8
    same      share with cos > 0.92 to the first one    unlike       share with cos < 0 to g's answer
    curved    share of positive eigenvalues of the Hessian of L of one prompt over v + a d_1 + b d_2, |a|, |b| ≤ 10,
              by finite differences, where d_1 is the descent direction and d_2 a random one orthogonal to it

A model is flagged if all five numbers pass the published thresholds, which are for CLIP ViT-L/14 and 77 tokens. The
suspicion is therefore the least of five margins, flagged above 0:

    -0.76 - (mean of L over the steps),  assimilated - 0.8,  same - 0.995,  unlike - 0.95,  curved - 0.8

With score='loss' the suspicion is -loss, for a comparison with clean encoders of another kind; it has no threshold.

The defense needs prompts and the clean model, of which it uses the text encoders. Of two encoders, the more suspicious
one counts. It returns the suspicion, the five numbers as features, and v in the notes. A backdoor in the denoiser alone
leaves the encoder as it is, and so does one that the two encoders share.

Differs from the official code (Robin-WZQ/AMDET at 9cd7731, read there): the code tests every second step and stops at
the first that passes; here all steps run, and one test follows. The code divides `same` by the number of prompts, here
by one less, because the first is compared with no other. The code has 3200 prompts for the search and 800 for the test;
here a defender has fewer, and the steps are as many. The text of the paper was not available.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import normalize

from harness import Defended, Knowledge, LearningRate, PositiveInt, Share, hookimpl, loop, progress

ASSIMILATED, SAME, UNLIKE = 0.8, 0.92, 0.0  # cosines; published values
LEVELS = {"loss": 0.76, "assimilated": 0.8, "same": 0.995, "unlike": 0.95, "curved": 0.8}  # published, for ViT-L/14
WEIGHT_DECAY = 1e-5  # published value
RADIUS = 10.0  # of the landscape, along unit directions; published value
FLAT = 1e-6  # eigenvalues up to this one are not positive; published value
ROWS = 64  # sequences of one forward pass of the landscape
LEAST = 3  # prompts: one for the search, two to compare


@dataclass(frozen=True)
class AMDET:
    name: ClassVar[str] = "amdet"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    needs: ClassVar[tuple[str, ...]] = ("prompts", "clean_model")
    delivers: ClassVar[tuple[str, ...]] = ("suspicion",)
    loops: ClassVar[tuple[str, ...]] = ("steps",)
    sees: ClassVar[tuple[str, ...]] = ("prompt-encoder",)

    steps: PositiveInt = 640  # steps of Adam; as many as 2 passes of the code over its 3200 prompts
    batch: PositiveInt = 10  # prompts per step; published value
    lr: LearningRate = 8e-2  # of Adam; published value
    beta: Annotated[float, Ge(0)] = 0.1  # β, weight of the likeness to the prompt without v; published value
    gamma: Annotated[float, Ge(0)] = 0.1  # γ, weight of the likeness to the clean encoder; published value
    held_out: Share = 0.2  # share of the prompts that judge v; published value
    grid: Annotated[int, Gt(2)] = 50  # places per side of the landscape; published value
    score: Literal["margin", "loss"] = "margin"  # suspicion: least margin to the published thresholds, or -loss. The
    # second is ours

    @property
    def flag_above(self) -> float | None:
        return 0.0 if self.score == "margin" else None

    def defend(self, model: Any, knowledge: Knowledge, rng: torch.Generator) -> Defended:
        prompts, clean = knowledge.prompts or (), knowledge.clean_model
        if len(prompts) < LEAST:
            raise ValueError(f"amdet needs at least {LEAST} prompts, and has {len(prompts)}; give it more")
        assert clean is not None, "amdet needs the clean model"
        if not all(weight.isfinite().all() for part in model.components().values() for weight in part.parameters()):
            raise ArithmeticError("the model has weights that are NaN or infinite")
        found = [
            self.examined(Pair(suspect, trusted, ids, suspected), rng)
            for suspect, trusted, ids, suspected in encoders(model, clean, prompts)
        ]
        suspicion, features, v = max(found, key=lambda each: (each[0] != each[0], each[0]))
        return Defended(
            suspicion=suspicion, flag_above=self.flag_above, features=features,
            notes={"vector": v.tolist(), "suspicion_of_each": [each[0] for each in found]},
        )  # fmt: skip

    def examined(self, pair: Pair, rng: torch.Generator) -> tuple[float, dict[str, float], Tensor]:
        """(suspicion, features, v) of one text encoder."""
        order = torch.randperm(len(pair.ids), generator=rng).to(pair.ids.device)
        held = min(len(order) - 1, max(2, round(self.held_out * len(order))))
        v, mean_loss = self.searched(pair, order[held:], rng)
        with torch.no_grad():
            features = self.statistics(pair, order[:held], v)
        features |= {"curved": curved(self.landscape(pair, order[:1], v, rng)), "mean_loss": mean_loss}
        suspicion = -features["loss"]
        if self.score == "margin":
            margins = [(-mean_loss if name == "loss" else features[name]) - level for name, level in LEVELS.items()]
            suspicion = torch.tensor(margins).min().item()
        return suspicion, features, v

    def searched(self, pair: Pair, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, float]:
        """v (D,) after the search on prompts `rows`, and the mean of L over its steps."""
        v = torch.randn(pair.width, generator=rng).to(pair.ids.device).requires_grad_(True)
        optimizer = torch.optim.Adam([v], lr=self.lr, weight_decay=WEIGHT_DECAY)
        queue, losses = rows[:0], []
        for step in loop("search", range(self.steps)):
            if len(queue) == 0:
                queue = rows[torch.randperm(len(rows), generator=rng).to(rows.device)]
            batch, queue = queue[: self.batch], queue[self.batch :]
            loss = self.loss(*pair.features(batch, v)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress("search", step + 1, self.steps, loss=losses[-1])
        return v.detach(), sum(losses) / len(losses)

    def loss(self, without: Tensor, with_v: Tensor, trusted: Tensor) -> Tensor:
        """L (B,) of f(p), f(p+v) and g(p+v), each (B, L, D)."""
        return -alike(with_v) + self.beta * cosine(without, with_v) + self.gamma * cosine(trusted, with_v)

    def statistics(self, pair: Pair, rows: Tensor, v: Tensor) -> dict[str, float]:
        """loss, assimilated, same and unlike, on prompts `rows`."""
        parts = [pair.features(part, v) for part in rows.split(ROWS)]
        without, with_v, trusted = (torch.cat(each) for each in zip(*parts, strict=True))
        like_first = cosine(with_v[1:], with_v[:1].expand_as(with_v[1:]))
        return {
            "loss": self.loss(without, with_v, trusted).mean().item(),
            "assimilated": (alike(with_v) > ASSIMILATED).double().mean().item(),
            "same": (like_first > SAME).double().mean().item(),
            "unlike": (cosine(with_v, trusted) < UNLIKE).double().mean().item(),
        }

    def landscape(self, pair: Pair, row: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
        """L (grid, grid) of the prompt `row` (1,) at v + a d_1 + b d_2."""
        v = v.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.loss(*pair.features(row, v)).sum(), v)
        down = normalize(-gradient, dim=0)
        across = torch.randn(pair.width, generator=rng).to(v)
        across = normalize(across - (across @ down) * down, dim=0)
        reach = torch.linspace(-RADIUS, RADIUS, self.grid).to(v)
        a, b = torch.meshgrid(reach, reach, indexing="ij")
        places = v.detach() + a.reshape(-1, 1) * down + b.reshape(-1, 1) * across
        with torch.no_grad():
            found = []
            for part in loop("landscape", places.split(ROWS)):
                found.append(self.loss(*pair.features(row.expand(len(part)), part)))
                progress("landscape", len(found) * ROWS, len(places))
        return torch.cat(found).view(self.grid, self.grid)


@dataclass(frozen=True)
class Pair:
    """An encoder under test, the clean one, token ids (N, L) of prompts, and f(p) (N, L, D) of them."""

    suspect: Any
    trusted: Any
    ids: Tensor
    suspected: Tensor

    @property
    def width(self) -> int:
        return self.suspected.shape[-1]

    def features(self, rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(f(p), f(p+v), g(p+v)), each (B, L, D), of prompts `rows` (B,); v (D,), or (B, D) with one for each row."""
        ids = self.ids[rows]
        given = with_vector(embedding_layer(self.suspect)(input_ids=ids), v)
        return self.suspected[rows], answers(self.suspect, ids, given), answers(self.trusted, ids, given)


def encoders(model: Any, clean: Any, prompts: Any) -> Iterator[tuple[Any, Any, Tensor, Tensor]]:
    """(suspect, clean encoder, token ids, f(p)) for each text encoder. Raises ValueError unless both models have the
    same encoders."""
    ours, theirs = model.components(), clean.components()
    for name, ids in token_ids(model, prompts).items():
        shapes = [
            {key: each.shape for key, each in part[name].state_dict().items()}
            for part in (ours, theirs)
            if name in part
        ]
        if len(shapes) < 2 or shapes[0] != shapes[1]:
            raise ValueError(
                f"amdet needs a clean encoder of the same architecture, and the clean model's {name} is another one; "
                "give the base from which the model was made"
            )
        with torch.no_grad():
            plain = torch.cat([answers(ours[name], part, None) for part in ids.split(ROWS)])
        yield ours[name], theirs[name], ids, plain


def token_ids(model: Any, prompts: Any) -> dict[str, Tensor]:
    """Token ids (N, L) for each CLIP text encoder of the model, by its name; T5's encoder is not examined."""
    found = {"text_encoder": model.tokens(prompts)}
    if model.text_encoder_2 is not None and not model.packed:
        length = found["text_encoder"].shape[1]
        padded = model.tokenizer_2(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
        found["text_encoder_2"] = padded.input_ids.to(model.device)
    return found


def embedding_layer(encoder: Any) -> Any:
    """The layer of a CLIP text encoder that adds embeddings of tokens and of positions."""
    return next(part for part in encoder.modules() if type(part).__name__ == "CLIPTextEmbeddings")


def with_vector(embeddings: Tensor, v: Tensor) -> Tensor:
    """Embeddings (B, L, D) with v, (D,) or (B, D), after the first; the last is left out."""
    put = v.expand(len(embeddings), -1).unsqueeze(1)
    return torch.cat([embeddings[:, :1], put, embeddings[:, 1:-1]], 1)


def answers(encoder: Any, ids: Tensor, given: Tensor | None) -> Tensor:
    """The last hidden state (B, L, D) of an encoder for embeddings `given` (B, L, D); those of `ids` where None."""
    with replaced(embedding_layer(encoder), given):
        return encoder(input_ids=ids).last_hidden_state


@contextmanager
def replaced(layer: Any, given: Tensor | None) -> Iterator[None]:
    """Context in which a layer returns `given`, unless it is None."""
    hook = layer.register_forward_hook(lambda layer, args, out: out if given is None else given)
    try:
        yield
    finally:
        hook.remove()


def alike(features: Tensor) -> Tensor:
    """A (B,) of features (B, L, D): the mean cosine of all pairs of positions, each with itself among them."""
    return normalize(features, dim=2).mean(1).square().sum(1)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """(B,) mean over positions of the cosines of features (B, L, D)."""
    return torch.nn.functional.cosine_similarity(one, other, dim=2).mean(1)


def curved(surface: Tensor) -> float:
    """Share of eigenvalues above 1e-6 among those of the Hessians at all inner places of a surface (H, W).

    The differences are not divided by the width of the grid. A Hessian of zeros is left out. NaN if the surface is flat
    everywhere or not finite.
    """
    s = surface.double()
    down, along = s[2:, 1:-1] - 2 * s[1:-1, 1:-1] + s[:-2, 1:-1], s[1:-1, 2:] - 2 * s[1:-1, 1:-1] + s[1:-1, :-2]
    both = (s[2:, 2:] - s[2:, :-2] - s[:-2, 2:] + s[:-2, :-2]) / 4
    hessians = torch.stack([torch.stack([down, both], -1), torch.stack([both, along], -1)], -2).flatten(0, 1)
    kept = hessians[(hessians != 0).flatten(1).any(1)]
    if not len(kept) or not bool(kept.isfinite().all()):
        return float("nan")
    return (torch.linalg.eigvalsh(kept.cpu()) > FLAT).double().mean().item()


@hookimpl
def defenses() -> list[type]:
    return [AMDET]
