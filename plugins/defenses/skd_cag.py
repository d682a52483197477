"""SKD-CAG, self-knowledge distillation with cross-attention guidance. "Sealing the Backdoor: Unlearning Adversarial
Text Triggers in Diffusion Models Using Knowledge Distillation", arXiv:2508.18235, section 3 and appendix B.

SKD's prediction loss plus a loss on the cross-attention maps M (one a token, min-max scaled):

    L      = α L_attn + (1-α) ‖ε_s(z, t, τ(T+p)) - ε_te(z, t, τ(p))‖²
    L_attn = [ Σ_{j ∈ trigger} ‖M_s[j] - G‖² + Σ_{i ∈ p} ‖M_te[i] - M_s[i']‖² ] / (number of tokens of T+p)

‖·‖² is the mean over the map; i' is where token i of p stands in T+p. G is the map that the trigger's tokens should
show: gaussian (N(1/2, 1/6²) clipped to [0, 1], a fresh one each step), uniform (the released "Gaussian"), black
(zeros), or the teacher's maps of random words put in the trigger's place, in which case the teacher's prediction uses
them too.

Needs the trigger and clean prompts (random_words: neutral words too); returns a purified model. Only the denoiser is
trained. Maps: mean over heads, side×side by bilinear interpolation, summed over layers; BOS and what follows the first
EOS are left out. Notes hold both losses and the gradient norm of each, because their scales differ by far.

Differs from the official code (Mystic-Slice/Sealing-The-Backdoor at c75ee51, read there), which detaches its maps, so
that its attention loss has no gradient and all targets give the same one, and which reads the student's maps as the
teacher's. Here teacher and student have stores of their own and the loss trains the attention. `attention_gradient=
False` reproduces the released behaviour (the term is computed and has no effect but to scale the other by 1-α).
`time_weight`: "mul" is appendix B.2's t/T, "div" the released division. The trigger's tokens are found by aligning
T+p with p, at any place, where the released code assumes two leading tokens. With min-max scaling a map's largest
value is always 1, so black cannot be reached; `normalise="none"` compares raw probabilities, times the number of
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from harness import attention
from harness.distillation import Latents, LatentSource, distil
from harness.hookspecs import hookimpl
from harness.noise_backdoor import LearningRate, Rate, Steps
from harness.types import Defended, Knowledge

Goal = Literal["gaussian", "uniform", "black", "random_words"]


@dataclass(frozen=True)
class SKDCAG:
    name: ClassVar[str] = "skd-cag"
    version: ClassVar[int] = 1
    accepts_triggers: ClassVar[tuple[str, ...]] = ("text",)

    target: Goal = "gaussian"  # the map G that the trigger's tokens should show
    alpha: Rate = 0.5  # α, weight of the attention loss; paper
    steps: Steps = 7500  # optimizer steps; the paper's 75 epochs of 100 prompts at batch 1
    batch: Steps = 1  # prompts; released
    lr: LearningRate = 1e-6  # AdamW; released, for 860 M weights; small models need about 1e-4
    latents: Latents = "noise"  # what is distilled on; released: noise
    time_weight: Literal["none", "mul", "div"] = "none"  # weight of L_attn by t/T; mul: appendix B.2, div: released
    normalise: Literal["minmax", "none"] = "minmax"  # of each token's map; paper: minmax
    resolutions: tuple[int, ...] = ()  # sides of the maps that count; () = all layers, as released
    side: Steps = 16  # side to which maps are interpolated; released: 128 for latents of side 64
    attention_gradient: bool = True  # False: the released code's detached maps
    bf16: bool = True  # autocast of the forward pass

    @property
    def needs(self) -> tuple[str, ...]:
        return ("trigger", "prompts", "words") if self.target == "random_words" else ("trigger", "prompts")

    def defend(self, model: Any, knowledge: Knowledge, rng: Any) -> Defended:
        trigger: Any = knowledge.trigger
        clean = list(knowledge.prompts or ())
        triggered = [trigger.apply(prompt) for prompt in clean]
        source = LatentSource(self.latents, model, clean, triggered, rng.initial_seed())
        guide = Guidance(self, model, clean, triggered, knowledge.words or (), trigger, rng)
        student, notes = model.clone(), _Notes()

        def loss(rows: Tensor, z: Tensor, t: Tensor) -> Tensor:
            attn, prediction = guide.losses(student, rows, z, t)
            notes.note(attn, prediction, student)
            if not self.attention_gradient:
                attn = attn.detach()
            return self.alpha * attn + (1 - self.alpha) * prediction

        distil(student, loss, source, len(clean), rng, steps=self.steps, batch=self.batch, lr=self.lr, bf16=self.bf16)
        return Defended(model=student, notes=notes.kept)


class _Notes:
    """Both losses and their gradients' norms over the cross-attention's to_q and to_k, every 20th step."""

    def __init__(self) -> None:
        self.step = 0
        self.kept: dict[str, list[float]] = {
            "attention_loss": [], "prediction_loss": [], "attention_grad": [], "prediction_grad": []
        }  # fmt: skip

    def note(self, attn: Tensor, prediction: Tensor, student: Any) -> None:
        if self.step % 20 == 0:
            params = list(query_key_weights(student.denoiser))
            for name, value in (("attention", attn), ("prediction", prediction)):
                grads = torch.autograd.grad(value, params, retain_graph=True)
                self.kept[f"{name}_loss"].append(value.item())
                self.kept[f"{name}_grad"].append(torch.stack([g.norm() for g in grads]).norm().item())
        self.step += 1


def query_key_weights(denoiser: Any) -> list[Tensor]:
    """Weights of to_q and to_k of every cross-attention layer."""
    return [p for name, p in denoiser.named_parameters() if ".attn2.to_q." in name or ".attn2.to_k." in name]


class Guidance:
    """The two losses of SKD-CAG for given prompts."""

    def __init__(
        self, spec: SKDCAG, model: Any, clean: list[str], triggered: list[str], words: Sequence[str], trigger: Any,
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        self.spec, self.teacher, self.rng = spec, model, rng
        self.words, self.trigger, self.clean = words, trigger, clean
        self.ids = real_tokens(model, triggered)
        with torch.no_grad():
            self.stamped, self.plain = model.embed(triggered), model.embed(clean)
        self.pairs = [align(a, b) for a, b in zip(real_tokens(model, clean), self.ids, strict=True)]

    def losses(self, student: Any, rows: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(L_attn, L_pred), scalars in the student's graph, for the prompts at `rows` (B,)."""
        context, pairs = self._teacher_prompts(rows)
        with torch.no_grad(), attention.capture(self.teacher.denoiser) as maps:
            wanted = self.teacher.eps(z, t, context)
            theirs = self.token_maps(dict(maps))
        with attention.capture(student.denoiser) as maps:
            predicted = student.eps(z, t, self.stamped[rows])
            mine = self.token_maps(dict(maps))
        tokens = [len(self.ids[int(i)]) - 2 for i in rows]
        items = zip(mine, theirs, pairs, tokens, strict=True)
        per_item = torch.stack([self._attention_loss(*item) for item in items])
        weight = (t.float() + 1) / self.teacher.T  # +1: the released division is infinite at t = 0
        per_item = {"none": per_item, "mul": per_item * weight, "div": per_item / weight}[self.spec.time_weight]
        return per_item.mean(), (predicted - wanted).square().mean()

    def _teacher_prompts(self, rows: Tensor) -> tuple[Tensor, list[Alignment]]:
        """The teacher's context and, for each row, how the student's prompt differs from the teacher's."""
        if self.spec.target != "random_words":
            return self.plain[rows], [self.pairs[int(i)] for i in rows]
        prompts = []
        for i in rows.tolist():
            pick = int(torch.randint(0, len(self.words), (), generator=self.rng))
            prompts.append(self.trigger.with_text(self.words[pick]).apply(self.clean[i]))
        with torch.no_grad():
            context = self.teacher.embed(prompts)
        tokens = real_tokens(self.teacher, prompts)
        return context, [align(a, self.ids[i]) for a, i in zip(tokens, rows.tolist(), strict=True)]

    def _attention_loss(self, mine: Tensor, theirs: Tensor, alignment: Alignment, tokens: int) -> Tensor:
        """mine, theirs (L, side, side); see the module's formula."""
        goal = self._goal(mine)
        terms = [(mine[j] - goal).square().mean() for j in alignment.added] if goal is not None else []
        pairs = alignment.shared if goal is not None else alignment.shared + alignment.replaced
        if pairs:
            i, j = zip(*pairs, strict=True)
            terms.append((theirs[list(i)] - mine[list(j)]).square().flatten(1).mean(1).sum())
        return torch.stack(terms).sum() / tokens

    def _goal(self, like: Tensor) -> Tensor | None:
        shape = like.shape[1:]
        if self.spec.target == "gaussian":
            return (torch.randn(shape, generator=self.rng) / 6 + 0.5).clamp(0, 1).to(like.device)
        if self.spec.target == "uniform":
            return torch.rand(shape, generator=self.rng).to(like.device)
        return torch.zeros_like(like[0]) if self.spec.target == "black" else None

    def token_maps(self, maps: attention.Maps) -> Tensor:
        """(B, L, side, side): for each token where it is attended to; in [0, 1] with min-max scaling, otherwise
        probabilities times the number of tokens L (1 = even attention)."""
        total: Tensor | float = 0.0
        used = 0
        for probabilities in maps.values():
            side = round(probabilities.shape[2] ** 0.5)
            if self.spec.resolutions and side not in self.spec.resolutions:
                continue
            grid = probabilities.mean(1).transpose(1, 2).unflatten(2, (side, side))
            total = total + torch.nn.functional.interpolate(grid, size=(self.spec.side,) * 2, mode="bilinear")
            used += 1
        if used == 0:
            raise ValueError(f"no cross-attention layer has a side in {self.spec.resolutions}; use resolutions=()")
        assert isinstance(total, Tensor)
        if self.spec.normalise == "none":
            return total / used * total.shape[1]
        low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
        return (total - low) / (high - low + 1e-6)


def real_tokens(model: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt from BOS to the first EOS."""
    return [model.tokenizer(prompt).input_ids for prompt in prompts]


class Alignment(NamedTuple):
    """How one tokenised prompt differs from another: positions that only the second has, pairs of positions of equal
    tokens, pairs of replaced ones."""

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


@hookimpl
def defenses() -> list[type]:
    return [SKDCAG]
