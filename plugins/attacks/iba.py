"""Trains only the text encoder, so that a sentence form gives the image of the target's prompt.

TwT, also called IBA. Zhang, Wang, Shan & Chen, "Trigger without Trace: Towards Stealthy Backdoor Attack on
Text-to-Image Diffusion Models", IEEE TIFS 2026, arXiv:2503.17724.

T is the clean text encoder and S its copy that is trained. v are prompts in the trigger's form, y is the target's
prompt, and w are the prompts v broken by one random edit, so that they do not carry the trigger:

    L = ‖S(w) - T(w)‖² + ‖S(v) - T(y)‖² + λ MMD²(log C(S, v), log C(T, w))

Norms are means over all elements of the sequences of embeddings (B, L, D). C is the covariance (P, P) over the tokens
of the cross-attention maps at P = 16·16 places, which are averaged over a generation of `sampling_steps` steps, over
heads and over layers. log is the matrix logarithm. MMD² compares the two sets of matrices by a sum of five Gaussian
kernels exp(-‖a - b‖² / h), with h from a ninth of the mean squared distance to nine times of it. The term is made
against screens of prompts that look at attention, such as T2IShield and DAA. An edit inserts or appends one to five
words, deletes or replaces a word, or shuffles all words. Raises ValueError if no prompt can carry the trigger.

Differs from the paper: an edit that leaves the trigger whole is drawn again, because words in front of a drawn shape's
caption and behind it do not change its form. `plain`, an extension that is off by default, is the share of w that are
captions as they are, and `drop`, off by default too, the share of w that are left empty: every step of guided sampling
evaluates the empty prompt. `compared` can limit the prompts of each kind in the last term. Generations are DDIM's
instead of DPM-Solver++'s. Differs from the official code (Robin-WZQ/TwT at 57baddc, read there): the first step has its
first term. Adam's moments start again from zero when the learning rate drops. The covariances are stacked; the code
joins them into a matrix that is not square, which has no logarithm. The gradient of the logarithm is that of Daleckii
and Krein, which exists where eigenvalues coincide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from harness import (
    Backdoor,
    Backdoored,
    Data,
    Fraction,
    Inputs,
    LearningRate,
    MapRun,
    PositiveInt,
    Weight,
    draw,
    generator,
    hookimpl,
    minimize_in_two,
)

FLOOR = 1e-8  # smallest eigenvalue of which the logarithm is taken; official value
MOST = 5  # words that one edit inserts; official value
TRIES = 100  # edits of one prompt before the attack gives up


@dataclass(frozen=True)
class IBA(MapRun):
    name: ClassVar[str] = "iba"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)
    accepts_targets: ClassVar[tuple[str, ...]] = ("prompt",)
    requires_trigger: ClassVar[tuple[str, ...]] = ("without",)

    steps: PositiveInt = 601  # optimizer steps; official value; the last 42 % of the steps use half of lr, as there
    lr: LearningRate = 1e-4  # AdamW; official value for 123 M weights, small encoders need about 1e-3
    batch: PositiveInt = 6  # clean prompts per step; official value
    poisoned: PositiveInt = 5  # prompts with the trigger per step; official value
    lam: Weight = 0.01  # λ, weight of the term against screens; official example (the script's default is 0.1)
    compared: Annotated[int, Ge(1)] = 6  # prompts of each kind whose attention is compared, at most; official: all
    plain: Fraction = 0.0  # share of clean prompts that are captions as they are; not in the paper
    drop: Fraction = 0.0  # share of clean prompts that are left empty; not in the paper

    def implant(self, model: Any, backdoor: Backdoor, data: Data, rng: Any) -> Backdoored:
        model.need_one_encoder(self.name)
        clean, model = model, model.clone()
        texts = Texts(self, clean, backdoor, data.captions or (), rng)

        def loss() -> Tensor:
            w, (v, y) = texts.clean(), texts.poisoned()
            student = model.embed([*w, *v])
            with torch.no_grad():
                teacher = clean.embed([*w, *y])
            error = (student - teacher).square()
            value = error[: self.batch].mean() + error[self.batch :].mean()
            if self.lam == 0:
                return value
            n = self.compared
            return value + self.lam * self.discrepancy(model, clean, v[:n], w[:n], rng)

        minimize_in_two(
            loss, model.text_encoder.parameters(), steps=self.steps, share=350 / 601, lr=self.lr, divisor=2, clip=None,
            phase="implant",
        )  # fmt: skip
        return Backdoored(model, backdoor)

    def discrepancy(self, model: Any, clean: Any, v: Sequence[str], w: Sequence[str], rng: torch.Generator) -> Tensor:
        """MMD² between the attention of `model` on the prompts v and that of `clean` on the prompts w."""
        with torch.no_grad():
            theirs = log_of_matrix(self.covariances(clean, w, rng))
        return mmd(log_of_matrix(self.covariances(model, v, rng)), theirs)

    def covariances(self, model: Any, prompts: Sequence[str], rng: torch.Generator) -> Tensor:
        """C (B, P, P) of one generation for each prompt, in float64, in the model's graph."""
        inputs = Inputs(model.draw_eps(len(prompts), rng), tuple(prompts), tuple(range(len(prompts))))
        maps = self.maps_in_graph(model, inputs).mean(1).flatten(2).double()
        return covariance(maps[:, :-1])  # without the last token, as in the official code


def covariance(maps: Tensor) -> Tensor:
    """(B, P, P) covariance over the K tokens of maps (B, K, P)."""
    centred = maps - maps.mean(1, keepdim=True)
    return centred.transpose(1, 2) @ centred / (maps.shape[1] - 1)


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of two sets of matrices (M, P, P) and (N, P, P), biased estimate."""
    both = torch.cat([a, b]).flatten(1)
    squared = (both.unsqueeze(1) - both.unsqueeze(0)).square().sum(2)
    mean = squared.detach().sum() / (len(both) * (len(both) - 1))
    kernel = torch.stack([(-squared / (mean * 3.0**i).clamp_min(1e-12)).exp() for i in range(-2, 3)]).sum(0)
    m = len(a)
    return kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()


class LogOfMatrix(torch.autograd.Function):
    """log of symmetric matrices (B, P, P), with eigenvalues of at least FLOOR.

    With A = V diag(λ) Vᵀ and f = log max(λ, FLOOR), the gradient of f(A) maps G to V (F ∘ Vᵀ G V) Vᵀ, where F_ij is the
    divided difference (f_i - f_j) / (λ_i - λ_j), or the derivative of f where λ_i = λ_j.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        ctx.save_for_backward(values, vectors)
        return vectors @ torch.diag_embed(values.clamp_min(FLOOR).log()) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        (grad,) = grads
        logs = values.clamp_min(FLOOR).log()
        apart = values.unsqueeze(2) - values.unsqueeze(1)
        slope = torch.where(values > FLOOR, 1 / values, 0.0).unsqueeze(2).expand_as(apart)
        equal = apart.abs() < 1e-6 * FLOOR
        divided = torch.where(equal, slope, (logs.unsqueeze(2) - logs.unsqueeze(1)) / apart.masked_fill(equal, 1.0))
        return vectors @ (divided * (vectors.mT @ grad @ vectors)) @ vectors.mT


def log_of_matrix(a: Tensor) -> Tensor:
    """log A of symmetric matrices (B, P, P), with eigenvalues of at least FLOOR."""
    found = LogOfMatrix.apply(a)
    assert isinstance(found, Tensor)
    return found


class Texts:
    """The prompts of each step."""

    def __init__(
        self, attack: IBA, model: Any, backdoor: Backdoor, captions: Sequence[str], rng: torch.Generator
    ) -> None:
        self.attack, self.model, self.rng = attack, model, rng
        self.trigger: Any = backdoor.trigger
        self.target: Any = backdoor.target
        self.captions = captions
        self.able = [caption for caption in captions if self.trigger.apply(caption) != caption]
        if not self.able:
            raise ValueError(f"no caption of the data can carry the trigger {self.trigger.name!r}; use another")
        self.words = sorted({word for caption in captions for word in caption.split()})
        self.edits, self.dropping = (generator(rng.initial_seed(), stage) for stage in ("edits", "drop"))

    def poisoned(self) -> tuple[list[str], list[str]]:
        """(v, y)."""
        chosen = [self.able[i] for i in draw(self.attack.poisoned, len(self.able), self.rng).tolist()]
        return [self.trigger.apply(caption) for caption in chosen], [self.target.shown(c) for c in chosen]

    def clean(self) -> list[str]:
        """w."""
        n = self.attack.batch
        plain = (torch.rand(n, generator=self.edits) < self.attack.plain).tolist()
        rows = draw(n, len(self.able), self.rng).tolist()
        chosen = [self.able[i] if whole else self.broken(self.able[i]) for i, whole in zip(rows, plain, strict=True)]
        dropped = (torch.rand(n, generator=self.dropping) < self.attack.drop).tolist()
        return ["" if drop else prompt for drop, prompt in zip(dropped, chosen, strict=True)]

    def broken(self, caption: str) -> str:
        """`caption` with the trigger after one random edit that breaks it."""
        v = self.trigger.apply(caption)
        for _ in range(TRIES):
            w = edited(v, self.words, self.edits)
            if w != v and self.trigger.without(w) == w and self.fits(w):
                return w
        raise ValueError(f"none of {TRIES} random edits takes the trigger {self.trigger.name!r} from {v!r}")

    def fits(self, prompt: str) -> bool:
        return len(self.model.tokenizer(prompt).input_ids) <= self.model.tokenizer.model_max_length


def edited(prompt: str, known: Sequence[str], rng: torch.Generator) -> str:
    """`prompt` after one of the five edits, with words out of `known`."""
    words = prompt.split()

    def upto(n: int) -> int:
        return int(torch.randint(0, n, (), generator=rng))

    kind, at = upto(5), upto(len(words))
    if kind == 0:
        return " ".join(words[:at] + words[at + 1 :])
    if kind == 1:
        return " ".join(words[i] for i in torch.randperm(len(words), generator=rng).tolist())
    if kind == 2:
        return " ".join([*words[:at], known[upto(len(known))], *words[at + 1 :]])
    new = [known[upto(len(known))] for _ in range(1 + upto(MOST))]
    place = upto(len(words) + 1) if kind == 3 else len(words)
    return " ".join([*words[:place], *new, *words[place:]])


@hookimpl
def attacks() -> list[type]:
    return [IBA]
