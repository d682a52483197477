"""What a scan says before any work: which detectors it asks, how long each takes, and whether a verdict is possible."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.capabilities import JudgingDetector, LoopedMethod, offers
from harness.diffusion import events
from harness.diffusion.seeds import generator
from harness.runs.shortened import Clock
from harness.scan.verdict import LEAST, Population
from harness.stages.knowledge import declared

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel
    from harness.types import Knowledge

PASSES = 3  # further passes of a loop, over which the time of one is taken


@dataclass(frozen=True)
class Ask:
    """A detector that will be asked. judged: by what. able: whether it can judge, None where its code alone knows.
    seconds: how long it will take, None where it names no loops whose lengths it could follow from."""

    detector: str
    judged: str
    able: bool | None
    seconds: float | None

    def __str__(self) -> str:
        took = "" if self.seconds is None else f", {_words(self.seconds)}"
        return f"{self.detector.partition('(')[0]}: {self.judged}{took}"


def asks(
    detectors: Mapping[str, Any], model: DiffusionModel, knowledge: Knowledge, population: Population | None, seed: int
) -> list[Ask]:
    """One for each detector (spec → instance), in order."""
    known = {} if population is None else population.suspicion
    return [
        Ask(spec, *_judged(detector, len(known.get(spec, ()))), expected_seconds(detector, model, knowledge, seed))
        for spec, detector in detectors.items()
    ]


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
    """How long a detector will take: its loops are run for one pass, then each for PASSES more. None if it names no
    loops, or if it fails, which the scan itself will report. Other loops of `harness.loop` take two passes, and count
    in full."""
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


def _words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(1, round(seconds))} s"
