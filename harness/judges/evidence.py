"""Evidence: the data of a cell that metrics read. Images, features and distances are computed once, on first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from harness.capabilities import ConditionalTarget, offers
from harness.diffusion.images import from_uint8, grid, to_uint8
from harness.types import Backdoor, Judge, Model, Target, TargetContext, TextImageScorer, TextTrigger

Who = Literal["clean", "backdoored", "defended"]
Given = Literal["clean", "triggered", "wrong", "found", "utility"]
WHO: tuple[Who, ...] = ("clean", "backdoored", "defended")
GIVEN: tuple[Given, ...] = ("clean", "triggered", "wrong", "found", "utility")
ABSENT = {
    "clean": "no images of the clean model",
    "backdoored": "no images of the attacked model",
    "defended": "the defense returned no model, or its images are missing",
}
T = TypeVar("T")
MOST_HELD = 4 * 2**30  # bytes of images that are kept: six sets of 10,000 images of 256 pixels would take 47 GB


@dataclass(frozen=True)
class Verdict:
    """The results of a defense except the model; see harness.types.Defended.

    screened: its scores of n clean and of n other, triggered inputs, (n,) each, by "clean" and "triggered".
    """

    suspicion: float | None = None
    flag_above: float | None = None
    features: Mapping[str, float] = field(default_factory=dict)
    screen_above: float | None = None
    screened: Mapping[str, Tensor] = field(default_factory=dict)


class Evidence:
    """The images of the clean, the backdoored and the defended model, and what is known about them.

    - images: for (who, given) a callable that returns (N, C, H, W) in [-1, 1]; row i is from the same noise and prompt
      in every set. `given` states whether the inputs carried no trigger, the cell's trigger, decoy triggers, or the
      trigger that the defense found; "utility" is a larger set of other clean inputs. The set of decoy triggers has
      m ≤ N rows for each of `wrong_triggers` triggers,
      one trigger after the other. The set of the found trigger exists only if a metric reads it; it has no rows if the
      defense found nothing usable.
    - reference: real images (M, C, H, W) of what the clean inputs ask for.
    - prompts: the N prompts without the trigger, None if unconditional.
    - attacked: False for attack `none`; `backdoor` then describes the backdoor for which the clean model is evaluated.
    - costs: for "attack" and "defense" wall_s, cpu_s, peak_rss_bytes, cuda_bytes (None on a CPU); None if not run. A
      defense that screens inputs also has screen_s, the wall time in seconds for one input.
    - verdict: the results of the defense for the model and for inputs.
    - inverted: the trigger that the defense found, (C, H, W) or text.
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
        self._held = 0  # bytes of the images in it

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()` on the first call with `key`, the same object afterwards."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def images(self, who: Who, given: Given) -> Tensor | None:
        """(N, C, H, W) in [-1, 1], or None if the cell has no such images. Raises KeyError for an unknown name.

        Sets beyond MOST_HELD bytes are read again at each call.
        """
        if who not in WHO or given not in GIVEN:
            raise KeyError(f"no images ({who!r}, {given!r}); who is one of {WHO}, given one of {GIVEN}")
        make, key = self._images.get((who, given)), ("images", who, given)
        if make is None or key in self._made:
            return self._made.get(key)
        images = make()
        if self._held + images.nbytes <= MOST_HELD:
            self._held += images.nbytes
            self._made[key] = images
        return images

    def utility(self, who: Who) -> Tensor | None:
        """The images of clean inputs for measures that compare sets of images: the utility set, or the images of the
        clean inputs where the cell has none. (M, C, H, W) in [-1, 1], None without images."""
        large = self.images(who, "utility")
        return self.images(who, "clean") if large is None else large

    @property
    def untouched(self) -> tuple[Who, Given]:
        """The images that show how a model without a backdoor answers the triggered inputs.

        They are the clean model's images of the same noise if the trigger is in the noise, and of the prompt without
        the trigger if it is in the text.
        """
        return "clean", "triggered" if self.backdoor.trigger.modality == "noise" else "clean"

    @cached_property
    def judge(self) -> Judge | None:
        return self.model.judge()

    @cached_property
    def scorer(self) -> TextImageScorer | None:
        return self.model.scorer()

    @cached_property
    def context(self) -> TargetContext:
        """The data on which the target's judge is calibrated: the clean model's images of clean inputs."""
        clean = self.images("clean", "clean")
        if clean is None:
            raise LookupError("the evidence has no images of the clean model; every cell must sample them")
        return TargetContext(clean, self.prompts, self.judge)

    @cached_property
    def thresholds(self) -> Mapping[str, float]:
        """The target's thresholds by name; `hit_threshold` is the one that decides."""
        return self.backdoor.target.thresholds(self.context)

    @property
    def hit_threshold(self) -> str:
        return self.backdoor.target.hit_threshold

    def distances(self, who: Who, given: Given) -> Tensor | None:
        """(N,) distance of each image to the target, smaller is closer; None if there are no images."""
        images = self.images(who, given)
        if images is None:
            return None
        context = self._aligned(len(images)) if given == "wrong" else self.context
        return self.once(("distances", who, given), lambda: self._distances(images, context))

    def _distances(self, images: Tensor, context: TargetContext) -> Tensor:
        target = self.backdoor.target
        found = target.distances(images, context)
        if tuple(found.shape) != (len(images),):
            raise ValueError(
                f"target '{target.name}' gave distances {tuple(found.shape)} for {len(images)} images; give one each"
            )
        return found

    def _aligned(self, n: int) -> TargetContext:
        """The context whose row i belongs to row i of n images of several decoy triggers."""
        if n % self.wrong_triggers:
            raise ValueError(f"{n} images do not divide into {self.wrong_triggers} wrong triggers of equal size")
        m, k = n // self.wrong_triggers, self.wrong_triggers
        prompts = None if self.prompts is None else self.prompts[:m] * k
        return TargetContext(self.context.clean[:m].repeat(k, 1, 1, 1), prompts, self.judge)

    def counted(self, n: int) -> Tensor:
        """(n,) bool: which of the first n images count."""
        return counted(self.backdoor.target, self.prompts, n)

    def features(self, who: Who, given: Given) -> Tensor | None:
        """(N, D) features by the judge; None without images or judge."""
        images, judge = self.images(who, given), self.judge
        if images is None or judge is None:
            return None
        return self.once(("features", who, given), lambda: judge.features(images))


def counted(target: Target, prompts: Sequence[str] | None, n: int) -> Tensor:
    """(n,) bool: which of the images of the first n prompts count. A target with `applicable_to` leaves out those of
    prompts that ask for it anyway."""
    if prompts is None or not offers(target, ConditionalTarget):
        return torch.ones(n, dtype=torch.bool)
    return target.applicable_to(prompts[:n])


class Reachable:
    """A target that also leaves out the prompts in which the trigger has no place."""

    def __init__(self, target: Target, trigger: TextTrigger) -> None:
        self._target, self._trigger = target, trigger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def applicable_to(self, prompts: Sequence[str]) -> Tensor:
        able = torch.tensor([self._trigger.apply(prompt) != prompt for prompt in prompts])
        target = self._target
        return able & target.applicable_to(prompts) if offers(target, ConditionalTarget) else able


def reachable(backdoor: Backdoor, prompts: Sequence[str] | None) -> Backdoor:
    """`backdoor`, with a Reachable target if the trigger has no place in some of the prompts."""
    trigger = backdoor.trigger
    if prompts is None or not isinstance(trigger, TextTrigger):
        return backdoor
    if all(trigger.apply(prompt) != prompt for prompt in prompts):
        return backdoor
    return Backdoor(trigger, cast(Any, Reachable(backdoor.target, trigger)))


# ---- contact sheet --------------------------------------------------------------------------------------------------


TILE = 96  # pixels of an image's width on a contact sheet, about


def contact_sheet(evidence: Evidence, k: int = 8) -> Tensor:
    """The first k images of each model without and with the trigger as one labelled picture (3, H, W) in [-1, 1].

    Each column has one starting noise and prompt. Sets that the cell does not have are left out.
    """
    sets = {(who, given): evidence.images(who, given) for who in WHO for given in ("clean", "triggered")}
    rows = {f"{who}, {given} input": _tiles(images[:k]) for (who, given), images in sets.items() if images is not None}
    if not rows:
        raise LookupError("no images for a contact sheet")
    scale = max(1, TILE // next(iter(rows.values())).shape[-1])
    picture = grid(list(rows.values()), scale=scale)
    margin = _labels(list(rows), picture.shape[1], first=scale)
    return torch.cat([margin, picture], dim=2)


def _tiles(images: Tensor) -> Tensor:
    """Images (B, C, H, W) that are wider than a tile, as wide as one."""
    height, width = images.shape[-2:]
    if width <= TILE:
        return images
    return torch.nn.functional.interpolate(images, size=(max(1, height * TILE // width), TILE), mode="area")


def _labels(words: Sequence[str], height: int, first: int) -> Tensor:
    """A white margin (3, height, 150) with one text next to each of equally high rows that begin at `first`."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, pitch = 150, (height - first) / len(words)
    page = Image.fromarray(to_uint8(torch.ones(height, width, 3)).numpy())
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(words):
        pen.text((6, first + (i + 0.5) * pitch), text, fill=(0, 0, 0), anchor="lm")
    return from_uint8(torch.from_numpy(np.array(page)).permute(2, 0, 1))
