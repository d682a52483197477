"""What a scan says before any work: which detectors it asks, how long each takes, and whether a verdict is possible."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.capabilities import CountingDetector, JudgingDetector, LoopedMethod, offers
from harness.diffusion import events
from harness.diffusion.seeds import generator
from harness.runs.shortened import Clock
from harness.scan.verdict import LEAST, Population
from harness.stages.knowledge import declared

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel
    from harness.types import Knowledge

ROWS, FEW_ROWS = 16, 4  # of a batch on a GPU and on a CPU, by which the time of an evaluation is taken
PASSES = 3  # further passes of a loop, over which the time of one is taken


@dataclass(frozen=True)
class Ask:
    """A detector that will be asked. judged: by what. able: whether it can judge, None where its code alone knows.
    seconds: how long it will take, None where it counts nothing and names no loops whose lengths it could follow from.
    evaluations: of the network at most, None where it does not count them."""

    detector: str
    judged: str
    able: bool | None
    seconds: float | None
    evaluations: int | None = None

    def __str__(self) -> str:
        counted = "" if self.evaluations is None else f", at most {self.evaluations:,} network evaluations"
        took = "" if self.seconds is None else f", {_words(self.seconds)}"
        return f"{self.detector.partition('(')[0]}: {self.judged}{counted}{took}"


def asks(
    detectors: Mapping[str, Any], model: DiffusionModel, knowledge: Knowledge, population: Population | None, seed: int
) -> list[Ask]:
    """One for each detector (spec → instance), in order."""
    known = {} if population is None else population.suspicion
    return [
        Ask(
            spec, *_judged(detector, len(known.get(spec, ()))), expected_seconds(detector, model, knowledge, seed),
            evaluations(detector, model, knowledge),
        )
        for spec, detector in detectors.items()
    ]  # fmt: skip


def _judged(detector: Any, clean: int) -> tuple[str, bool | None]:
    if clean >= LEAST:
        return f"compared with {clean} clean models", True
    if not offers(detector, JudgingDetector):
        return "by its own threshold, if it has one", None
    if detector.flag_above is None:
        return f"cannot judge without the scores of {LEAST} clean models: bench calibrate, --population FILE", False
    return f"suspicious above {detector.flag_above:g}, its own threshold", True


def outlook(asked: Sequence[Ask]) -> str:
    """Whether a verdict is possible, in a sentence."""
    if any(ask.able for ask in asked):
        return "A verdict is possible."
    if any(ask.able is None for ask in asked):
        return "A verdict is possible only if a detector has a threshold of its own."
    return (
        "No verdict is possible: no detector that is asked can judge. See bench scan --help, --population and --like."
    )


def expected_seconds(detector: Any, model: DiffusionModel, knowledge: Knowledge, seed: int) -> float | None:
    """How long a detector will take: by the time of one evaluation if it counts them; otherwise its loops are run for
    one pass, then each for PASSES more. None if it names no loops, or if it fails, which the scan itself will report.
    Other loops of `harness.loop` take two passes, and count in full."""
    counted = evaluations(detector, model, knowledge)
    if counted is not None:
        one = _seconds_of_one(model, bool(getattr(detector, "bf16", False)))
        return None if one is None else counted * one
    if not offers(detector, LoopedMethod):
        return None
    whole = {name: int(getattr(detector, name)) for name in detector.loops}
    method: Any = detector  # a frozen dataclass, as every plugin
    short = replace(method, **{name: min(1, length) for name, length in whole.items()})
    clock = Clock(None, "defend")
    clock.time = time.monotonic

    def seconds(each: Any) -> float:
        began = clock.now()[1]
        with declared(each, knowledge) as mine:
            each.defend(model, mine, generator(seed, "defense"))
        return clock.now()[1] - began

    heard = events.listener()
    events.listen(None)
    events.shorten(clock.shorten)
    try:
        seconds(short)  # what is loaded once counts for no pass
        least = total = seconds(short)
        for name, length in whole.items():
            if length > 1:
                more = min(PASSES, length - 1)
                total += max(0.0, seconds(replace(short, **{name: 1 + more})) - least) / more * (length - 1)
    except Exception:
        return None
    finally:
        events.shorten(None)
        events.listen(heard)
    return total


def evaluations(detector: Any, model: DiffusionModel, knowledge: Knowledge) -> int | None:
    """How many network evaluations a detector makes at most; None if it does not count them, or if it fails."""
    if not offers(detector, CountingDetector):
        return None
    method: Any = detector
    try:
        with declared(method, knowledge) as mine:
            return method.evaluations(model, mine)
    except Exception:
        return None


def _seconds_of_one(model: DiffusionModel, bf16: bool) -> float | None:
    """The time of one evaluation of the network, in a batch, with the embedding of its prompt. None if it fails, which
    the scan itself will report."""
    import torch

    rows = ROWS if model.device.type == "cuda" else FEW_ROWS
    noise = torch.randn((rows, *model.shape), generator=generator(0, "ahead")).to(model.device)
    t = torch.full((rows,), model.T // 2, device=model.device)
    began = 0.0
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for _ in range(2):  # what is loaded once counts for nothing
            began = time.monotonic()
            try:
                context = model.embed(["a"] * rows) if model.conditional else None
                model.eps(noise, t, context).sum().item()
            except Exception:
                return None
    return (time.monotonic() - began) / rows


def _words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(1, round(seconds))} s"
