"""Evidence: what metrics see of a cell. Image sets, features and distances are made when first asked for, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from harness.images import from_uint8, grid, to_uint8
from harness.types import Backdoor, Judge, Model, Score, TargetContext, TextImageScorer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Who = Literal["clean", "backdoored", "defended"]
Given = Literal["clean", "triggered", "wrong", "found"]
WHO: tuple[Who, ...] = ("clean", "backdoored", "defended")
GIVEN: tuple[Given, ...] = ("clean", "triggered", "wrong", "found")
ABSENT = {
    "clean": "no images of the clean model",
    "backdoored": "no images of the attacked model",
    "defended": "the defense returned no model, or its images are missing",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """What a defense said beside its model; see harness.types.Defended.

    screened: its scores of n clean and of n other, triggered inputs, (n,) each, by "clean" and "triggered".
    """

    suspicion: float | None = None
    flag_above: float | None = None
    features: Mapping[str, float] = field(default_factory=dict)
    screen_above: float | None = None
    screened: Mapping[str, Tensor] = field(default_factory=dict)


class Evidence:
    """The images of the clean, the backdoored and the defended model, and what is known about them.

    images: for (who, given) a call that returns (N, C, H, W) in [-1, 1], row i from the same noise and prompt in every
        set; given says whether the inputs carried no trigger, the cell's trigger, wrong ones, or the one that the
        defense found. The wrong set holds m ≤ N rows of each of `wrong_triggers` triggers, one trigger after the other.
        The found set is there only where a metric reads it, and has no rows where the defense found nothing usable.
    reference: real images (M, C, H, W) of what the clean inputs ask for. prompts: the N unstamped prompts, None if
        unconditional.
    attacked: False for attack `none`, where `backdoor` still says what was asked of the clean model.
    costs: for "attack" and "defense" wall_s, cpu_s, peak_rss_bytes, cuda_bytes (None on a CPU); None where not run.
        A defense that screens inputs also has screen_s, wall seconds for one input.
    verdict: what the defense said of the model and of inputs.
    inverted: the trigger that the defense found, (C, H, W) or text.
    """

    def __init__(
        self,
        images: Mapping[tuple[Who, Given], Callable[[], Tensor]],
        *,
        reference: Tensor,
        model: Model,
        backdoor: Backdoor,
        attacked: bool,
        prompts: Sequence[str] | None = None,
        costs: Mapping[str, Mapping[str, float | None] | None] | None = None,
        inverted: Tensor | str | None = None,
        verdict: Verdict | None = None,
        wrong_triggers: int = 1,
    ) -> None:
        self._images = images
        self.reference = reference
        self.model = model
        self.backdoor = backdoor
        self.attacked = attacked
        self.prompts = None if prompts is None else tuple(prompts)
        self.costs = costs or {}
        self.inverted = inverted
        self.verdict = verdict or Verdict()
        self.wrong_triggers = wrong_triggers
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()` on the first call with `key`, the same object afterwards."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def images(self, who: Who, given: Given) -> Tensor | None:
        """(N, C, H, W) in [-1, 1], or None where the cell has no such images. Raises KeyError for another name."""
        if who not in WHO or given not in GIVEN:
            raise KeyError(f"no images ({who!r}, {given!r}); who is one of {WHO}, given one of {GIVEN}")
        make = self._images.get((who, given))
        return None if make is None else self.once(("images", who, given), make)

    @property
    def untouched(self) -> tuple[Who, Given]:
        """Which images say what a model without a backdoor makes of the triggered inputs: the clean model's of the same
        noise where the trigger is in the noise, and of the prompt without the trigger where it is in the text."""
        return "clean", "triggered" if self.backdoor.trigger.stamps == "noise" else "clean"

    @cached_property
    def judge(self) -> Judge | None:
        return self.model.judge()

    @cached_property
    def scorer(self) -> TextImageScorer | None:
        return self.model.scorer()

    @cached_property
    def context(self) -> TargetContext:
        """What the target's judge is calibrated on: the clean model's images of clean inputs."""
        clean = self.images("clean", "clean")
        if clean is None:
            raise LookupError("the evidence has no images of the clean model; every cell must sample them")
        return TargetContext(clean, self.prompts, self.judge)

    @cached_property
    def thresholds(self) -> Mapping[str, float]:
        """The target's thresholds by name; `gate` is the one that decides."""
        return self.backdoor.target.thresholds(self.context)

    @property
    def gate(self) -> str:
        return self.backdoor.target.gate

    def distances(self, who: Who, given: Given) -> Tensor | None:
        """(N,) distance of each image to the target, smaller is closer; None where there are no images."""
        images = self.images(who, given)
        if images is None:
            return None
        context = self._aligned(len(images)) if given == "wrong" else self.context
        return self.once(("distances", who, given), lambda: self.backdoor.target.distances(images, context))

    def _aligned(self, n: int) -> TargetContext:
        """The context whose row i belongs to row i of n images of several wrong triggers."""
        if n % self.wrong_triggers:
            raise ValueError(f"{n} images do not divide into {self.wrong_triggers} wrong triggers of equal size")
        m, k = n // self.wrong_triggers, self.wrong_triggers
        prompts = None if self.prompts is None else self.prompts[:m] * k
        return TargetContext(self.context.clean[:m].repeat(k, 1, 1, 1), prompts, self.judge)

    def counted(self, n: int) -> Tensor:
        """(n,) bool: the images that the target has a say in; one with `applies` leaves out prompts that ask for it."""
        ask = getattr(self.backdoor.target, "applies", None)
        return torch.ones(n, dtype=torch.bool) if ask is None or self.prompts is None else ask(self.prompts[:n])

    def features(self, who: Who, given: Given) -> Tensor | None:
        """(N, D) features by the judge; None without images or judge."""
        images, judge = self.images(who, given), self.judge
        if images is None or judge is None:
            return None
        return self.once(("features", who, given), lambda: judge.features(images))


class Reachable:
    """A target that has no say in prompts in which the trigger has no place, beside those it leaves out itself."""

    def __init__(self, target: Any, trigger: Any) -> None:
        self._target, self._trigger = target, trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def applies(self, prompts: Sequence[str]) -> Tensor:
        ask = getattr(self._target, "applies", None)
        able = torch.tensor([self._trigger.apply(prompt) != prompt for prompt in prompts])
        return able if ask is None else able & ask(prompts)


def reachable(backdoor: Backdoor, prompts: Sequence[str] | None) -> Backdoor:
    """`backdoor`, its target Reachable where the trigger has no place in some of the prompts."""
    trigger: Any = backdoor.trigger
    if prompts is None or trigger.stamps != "text" or all(trigger.apply(prompt) != prompt for prompt in prompts):
        return backdoor
    return Backdoor(trigger, cast(Any, Reachable(backdoor.target, trigger)))


# ---- scores ---------------------------------------------------------------------------------------------------------


def unmeasured(why: str, higher_is_better: bool | None = None) -> Score:
    """The score of what could not be measured: NaN with the reason."""
    return Score(math.nan, 0, higher_is_better, warning=why)


def rate(hits: Tensor, higher_is_better: bool | None, per_sample: Tensor | None = None) -> Score:
    """The share of True in `hits` (N,) with its 95 % Wilson interval. NaN for N = 0."""
    from scipy.stats import binomtest

    n = len(hits)
    if n == 0:
        return unmeasured("no samples", higher_is_better)
    k = int(hits.sum())
    low, high = binomtest(k, n).proportion_ci(method="wilson")
    kept = None if per_sample is None else tuple(per_sample.double().tolist())
    return Score(k / n, n, higher_is_better, (float(low), float(high)), kept)


def mean(values: Tensor, higher_is_better: bool | None) -> Score:
    """The mean of `values` (N,) with its 95 % t interval (None where all are equal). NaN for N = 0, and with a
    warning where any value is not finite."""
    n = len(values)
    if n == 0:
        return unmeasured("no samples", higher_is_better)
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        return unmeasured(f"{bad} of {n} values are not finite", higher_is_better)
    values = values.double()
    return Score(values.mean().item(), n, higher_is_better, mean_interval(values.tolist()), tuple(values.tolist()))


def mean_interval(values: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of a mean by Student's t; None for fewer than two values or for equal ones."""
    import numpy as np
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    low, high = t.interval(0.95, len(x) - 1, loc=x.mean(), scale=x.std(ddof=1) / math.sqrt(len(x)))
    return float(low), float(high)


# ---- contact sheet --------------------------------------------------------------------------------------------------


def contact_sheet(evidence: Evidence, k: int = 8) -> Tensor:
    """The first k images of each model without and with the trigger as one labelled picture (3, H, W) in [-1, 1].

    A column is one starting noise and prompt. Sets that the cell does not have are left out.
    """
    sets = {(who, given): evidence.images(who, given) for who in WHO for given in ("clean", "triggered")}
    rows = {f"{who}, {given} input": images[:k] for (who, given), images in sets.items() if images is not None}
    if not rows:
        raise LookupError("no images for a contact sheet")
    scale = max(1, 96 // next(iter(rows.values())).shape[-1])
    picture = grid(list(rows.values()), scale=scale)
    margin = _labels(list(rows), picture.shape[1], first=scale)
    return torch.cat([margin, picture], dim=2)


def _labels(words: Sequence[str], height: int, first: int) -> Tensor:
    """A white margin (3, height, 150) with one text beside each of equally high rows that begin at `first`."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, pitch = 150, (height - first) / len(words)
    page = Image.fromarray(to_uint8(torch.ones(height, width, 3)).numpy())
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(words):
        pen.text((6, first + (i + 0.5) * pitch), text, fill=(0, 0, 0), anchor="lm")
    return from_uint8(torch.from_numpy(np.array(page)).permute(2, 0, 1))
