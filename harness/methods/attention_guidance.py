"""Distillation of text-to-image denoisers guided by cross-attention maps: the losses of SKD-CAG and their training.

The method is that of "Sealing the Backdoor", arXiv:2508.18235, section 3 and appendix B. `GuidedDistillation` has a
field for every choice that the method leaves open. Its `distilled` trains with prompts and any rule that puts a trigger
into them, whether the trigger is given or found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from harness.diffusion import attention, gpu
from harness.diffusion.model import DiffusionModel
from harness.methods.distillation import Latents, LatentSource, distil
from harness.methods.parameters import Fraction, LearningRate, PositiveInt

Goal = Literal["gaussian", "uniform", "black", "random_words"]
Stamp = Callable[[str], str]  # prompt → prompt with the trigger
Neutral = Callable[[torch.Generator], Stamp]  # draws a rule that puts neutral words in the place of the trigger


@dataclass(frozen=True)
class GuidedDistillation:
    """L = α L_attn + (1-α) L_pred; see plugins/defenses/skd_cag.py for the terms."""

    target: Goal = "gaussian"  # the map G that the trigger's tokens should have
    alpha: Fraction = 0.5  # α, weight of the attention loss; paper's value
    steps: PositiveInt = 7500  # optimizer steps; the paper's 75 epochs of 100 prompts at batch 1
    batch: PositiveInt = 1  # prompts per step; released value
    lr: LearningRate = 1e-6  # AdamW; released value for 860 M weights, small models need about 1e-4
    latents: Latents = "noise"  # latents for the distillation; released: noise
    time_weight: Literal["none", "mul", "div"] = (
        "none"  # weight of L_attn: mul t/T of appendix B.2, div T/t as released
    )
    normalise: Literal["minmax", "none"] = "minmax"  # scaling of each token's map; released (the text names none)
    resolutions: tuple[int, ...] = ()  # sides of the maps that are used; () = all, as released
    layers: str = ""  # regular expression that matches in the names of the layers that are used; "" = all, as released
    side: PositiveInt = 16  # side to which maps are interpolated; released: 128 for latents of side 64
    attention_gradient: bool = True  # False = detached maps, as in the released code
    bf16: bool = True  # autocast of the forward pass

    def distilled(
        self, model: DiffusionModel, clean: Sequence[str], stamp: Stamp, neutral: Neutral | None, rng: torch.Generator
    ) -> tuple[DiffusionModel, dict[str, list[float]]]:
        """(a student that predicts for stamp(p) what `model` predicts for p, notes), for the prompts `clean`.

        neutral: needed for target "random_words" only. The notes contain both losses and the norms of their gradients
        at every 20th step, over all weights of the denoiser and over to_q and to_k alone. Raises ValueError if no layer
        fits `resolutions` and `layers`.
        """
        prompts = list(clean)
        source = LatentSource(self.latents, model, prompts, [stamp(p) for p in prompts], rng.initial_seed())
        guide = Guidance(self, model, prompts, stamp, neutral, rng)
        student, notes = model.clone(), _Notes()

        def loss(rows: Tensor, z: Tensor, t: Tensor) -> Tensor:
            attn, prediction = guide.losses(student, rows, z, t)
            if not self.attention_gradient:
                attn = attn.detach()
            notes.note(attn, prediction, student.denoiser)
            return self.alpha * attn + (1 - self.alpha) * prediction

        distil(student, loss, source, len(prompts), rng, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16)
        return student, notes.kept


class _Notes:
    """Both losses and the norms of their gradients (before α), every 20th step."""

    def __init__(self) -> None:
        self.step = 0
        self.kept: dict[str, list[float]] = {
            f"{term}_{what}": [] for term in ("attention", "prediction") for what in ("loss", "grad", "grad_qk")
        }

    def note(self, attn: Tensor, prediction: Tensor, denoiser: Any) -> None:
        if self.step % 20 == 0:
            names, params = zip(*denoiser.named_parameters(), strict=True)
            for term, value in (("attention", attn), ("prediction", prediction)):
                of_all, of_queries = _norms(names, _gradients(value, params))
                self.kept[f"{term}_loss"].append(value.item())
                self.kept[f"{term}_grad"].append(of_all)
                self.kept[f"{term}_grad_qk"].append(of_queries)
        self.step += 1


def _gradients(value: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients without freeing the graph; None for a parameter on which `value` does not depend."""
    if not value.requires_grad:
        return [None] * len(params)
    return torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)


def _norms(names: Sequence[str], grads: Sequence[Tensor | None]) -> tuple[float, float]:
    """The norms over all weights, and over to_q and to_k alone. Nobody else holds the gradients, which are as large as
    the network: they are gone before those of the next term are computed."""
    return _norm(grads), _norm(g for name, g in zip(names, grads, strict=True) if is_query_or_key(name))


def _norm(grads: Any) -> float:
    norms = [g.norm() for g in grads if g is not None]
    return torch.stack(norms).norm().item() if norms else 0.0


def is_query_or_key(name: str) -> bool:
    """Whether a parameter of a denoiser makes the queries of the image or the keys of the text: to_q or to_k of a
    cross-attention layer, to_q or add_k_proj of joint attention."""
    return any(f".{layer}." in name for layer in ("attn2.to_q", "attn2.to_k", "attn.to_q", "attn.add_k_proj"))


class Guidance:
    """The two losses of SKD-CAG for given prompts."""

    def __init__(
        self, spec: GuidedDistillation, model: DiffusionModel, clean: Sequence[str], stamp: Stamp,
        neutral: Neutral | None, rng: torch.Generator,
    ) -> None:  # fmt: skip
        if spec.target == "random_words" and neutral is None:
            raise ValueError("target 'random_words' needs words to put in the trigger's place; use another target")
        self.spec, self.teacher, self.rng, self.neutral, self.clean = spec, model, rng, neutral, clean
        triggered = [stamp(prompt) for prompt in clean]
        self.ids = real_tokens(model, triggered)
        with torch.no_grad():
            self.stamped, self.plain = model.embed(triggered), model.embed(clean)
        self.pairs = [align(a, b) for a, b in zip(real_tokens(model, clean), self.ids, strict=True)]

    def losses(self, student: DiffusionModel, rows: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(L_attn, L_pred), scalars in the student's graph, for the prompts at `rows` (B,)."""
        context, pairs = self._teacher_prompts(rows)
        with torch.no_grad(), attention.capture(self.teacher.denoiser) as maps:
            wanted = self.teacher.eps(z, t, context)
            theirs = self.token_maps(dict(maps))
        with attention.capture(student.denoiser) as maps:
            predicted = student.eps(z, t, self.stamped[gpu.sent(rows, self.stamped.device)])
            mine = self.token_maps(dict(maps))
        tokens = [len(self.ids[int(i)]) - 2 for i in rows]
        items = zip(mine, theirs, pairs, tokens, strict=True)
        per_item = torch.stack([self.attention_loss(*item) for item in items])
        return (per_item * self.time_weights(t)).mean(), student.error(predicted, wanted, t).mean()

    def time_weights(self, t: Tensor) -> Tensor | float:
        """Weight (B,) of L_attn at timesteps t (B,)."""
        if self.spec.time_weight == "none":
            return 1.0
        if self.spec.time_weight == "mul":
            return t.float() / self.teacher.T
        return self.teacher.T / t.float().clamp(min=1)  # the released division gives infinity at t = 0

    def _teacher_prompts(self, rows: Tensor) -> tuple[Tensor, list[Alignment]]:
        """The teacher's context and, for each row, how the student's prompt differs from the teacher's."""
        if self.spec.target != "random_words" or self.neutral is None:
            return self.plain[gpu.sent(rows, self.plain.device)], [self.pairs[int(i)] for i in rows]
        prompts = [self.neutral(self.rng)(self.clean[int(i)]) for i in rows]
        with torch.no_grad():
            context = self.teacher.embed(prompts)
        tokens = real_tokens(self.teacher, prompts)
        return context, [align(a, self.ids[i]) for a, i in zip(tokens, rows.tolist(), strict=True)]

    def attention_loss(self, mine: Tensor, theirs: Tensor, alignment: Alignment, tokens: int) -> Tensor:
        """L_attn of one prompt: `mine` and `theirs` (L, side, side) are maps by position, `tokens` is the number of
        tokens of T+p.
        """
        goal = self._goal(mine)
        terms = [(mine[j] - goal).square().mean() for j in alignment.added] if goal is not None else []
        pairs = alignment.shared if goal is not None else alignment.shared + alignment.replaced
        if pairs:
            i, j = zip(*pairs, strict=True)
            i, j = (gpu.sent(torch.tensor(each), mine.device) for each in (i, j))
            terms.append((theirs[i] - mine[j]).square().flatten(1).mean(1).sum())
        return torch.stack(terms).sum() / tokens

    def _goal(self, like: Tensor) -> Tensor | None:
        shape = like.shape[1:]
        if self.spec.target == "gaussian":
            return gpu.sent((torch.randn(shape, generator=self.rng) / 6 + 0.5).clamp(0, 1), like.device)
        if self.spec.target == "uniform":
            return gpu.sent(torch.rand(shape, generator=self.rng), like.device)
        return torch.zeros_like(like[0]) if self.spec.target == "black" else None

    def token_maps(self, maps: attention.Maps) -> Tensor:
        """(B, L, side, side): for each token the places that attend to it.

        Values are in [0, 1] with min-max scaling, otherwise probabilities times the number of tokens L (1 = even
        attention).
        """
        total: Tensor | float = 0.0
        used = 0
        for name, probabilities in maps.items():
            side = round(probabilities.shape[2] ** 0.5)
            if (self.spec.resolutions and side not in self.spec.resolutions) or not re.search(self.spec.layers, name):
                continue
            grid = probabilities.mean(1).transpose(1, 2).unflatten(2, (side, side))
            total = total + torch.nn.functional.interpolate(grid, size=(self.spec.side,) * 2, mode="bilinear")
            used += 1
        if used == 0:
            raise ValueError(
                f"no cross-attention layer has a side in {self.spec.resolutions} and a name with {self.spec.layers!r};"
                " use resolutions=() and layers=''"
            )
        assert isinstance(total, Tensor)
        if self.spec.normalise == "none":
            return total / used * total.shape[1]
        low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
        return (total - low) / (high - low + 1e-6)


def real_tokens(model: DiffusionModel, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt from BOS to the first EOS."""
    assert model.tokenizer is not None, "an unconditional model has no tokenizer"
    return [model.tokenizer(prompt).input_ids for prompt in prompts]


class Alignment(NamedTuple):
    """How one tokenised prompt differs from another.

    Positions that only the second has, pairs of positions of equal tokens, and pairs of positions of replaced tokens.
    """

    added: list[int]
    shared: list[tuple[int, int]]
    replaced: list[tuple[int, int]]


def align(source: list[int], goal: list[int]) -> Alignment:
    """How `goal` differs from `source`: token ids from BOS to EOS, which are not content."""
    added, shared, replaced = found = Alignment([], [], [])
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, source, goal, autojunk=False).get_opcodes():
        if tag == "equal":
            pairs = zip(range(a0, a1), range(b0, b1), strict=True)
            shared.extend((a, b) for a, b in pairs if 0 < a < len(source) - 1)
        else:
            added.extend(range(b0, b1))
            replaced.extend(zip(range(a0, a1), range(b0, b1), strict=False))
    return found
