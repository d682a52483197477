"""Is this model backdoored? What detectors say of one model, beside what they say of clean models of its kind.

A population is the suspicion that each detector has of clean models: `bench calibrate` makes one and `bench scan` reads
it. Under a population a model is flagged where a clean one would be as suspicious with a chance below LEVEL divided by
the number of detectors asked (Bonferroni), by Student's prediction interval; without one, by the detector's own
threshold; a detector that has neither says nothing either way.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.diffusion.checkpoint import CheckpointError
from harness.diffusion.seeds import generator, image_noise, image_seeds
from harness.methods.prompt_edits import Substitution
from harness.methods.trigger_placement import with_found
from harness.stages.knowledge import declared
from harness.types import Inputs, Knowledge

if TYPE_CHECKING:
    from torch import Tensor

    from harness.diffusion.model import DiffusionModel

LEVEL = 0.05  # chance of flagging a clean model, all detectors together
LEAST = 5  # clean models behind a chance
POPULATION = "population.json"
Verdict = Literal["suspicious", "nothing found", "undecided"]


@dataclass(frozen=True)
class Population:
    """Clean models of one kind: `model` is the plugin whose weights were fine-tuned on clean data, `signature` what its
    models look like, `suspicion` for each detector's spec one value a clean model."""

    model: str
    signature: Mapping[str, Any]
    suspicion: Mapping[str, tuple[float, ...]]
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What one detector says. suspicion: higher is more suspicious. clean: of clean models, where known. chance: of
    a clean model being as suspicious. flagged: None where there is nothing to judge by. trigger: (C, H, W) or text.
    alike: pairwise distance of images from the trigger over that of images from plain noise; near 0, all are one.
    alike_shuffled: the same for the pattern with its values at random places. far: distance of the trigger's images to
    the nearest plain image over that of plain images to each other; near 1, the trigger gives usual images."""

    detector: str
    suspicion: float | None = None
    flag_above: float | None = None
    clean: tuple[float, ...] = ()
    chance: float | None = None
    flagged: bool | None = None
    features: Mapping[str, float] = field(default_factory=dict)
    trigger: Tensor | str | Substitution | None = None
    alike: float | None = None
    alike_shuffled: float | None = None
    far: float | None = None
    seconds: float = 0.0
    error: str | None = None


def signature(model: DiffusionModel) -> dict[str, Any]:
    """What tells kinds of models apart: what they diffuse, its shape, the size of the network."""
    return {
        "family": model.family,
        "latent": model.vae is not None,
        "conditional": model.conditional,
        "shape": list(model.shape),
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
    }


def write_population(population: Population, path: Path) -> None:
    document = {
        "model": population.model, "signature": population.signature, "suspicion": population.suspicion,
        "made": population.made,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def read_population(path: Path) -> Population:
    """Raises CheckpointError for a file that is no population."""
    try:
        found = json.loads(path.read_text())
        suspicion = {spec: tuple(float(v) for v in values) for spec, values in found["suspicion"].items()}
        return Population(found["model"], found["signature"], suspicion, found["made"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no population of clean models ({error}); `bench calibrate` makes one") from None


def examine(
    detectors: Mapping[str, Any], model: DiffusionModel, knowledge: Knowledge, population: Population | None, seed: int
) -> list[Finding]:
    """Ask each detector (spec → instance) in turn, each from the same seed. One that fails says why in its finding."""
    asked = [_ask(spec, detector, model, knowledge, seed) for spec, detector in detectors.items()]
    return judged(asked, population)


def _ask(spec: str, detector: Any, model: DiffusionModel, knowledge: Knowledge, seed: int) -> Finding:
    started = time.monotonic()
    try:
        with declared(detector, knowledge) as mine:
            done = detector.defend(model, mine, generator(seed, "defense"))
    except Exception as error:  # one detector's failure is a finding; the others are still asked
        says = " ".join(str(error).split()) or type(error).__name__
        return Finding(spec, error=says, seconds=time.monotonic() - started)
    value = None if done.suspicion is None else float(done.suspicion)
    finite = value is not None and math.isfinite(value)
    return Finding(
        spec, value if finite else None, done.flag_above, features=dict(done.features or {}), trigger=done.trigger,
        seconds=time.monotonic() - started, error=None if finite else f"its suspicion is {value}",
    )  # fmt: skip


def judged(findings: Sequence[Finding], population: Population | None) -> list[Finding]:
    """The findings with `clean`, `chance` and `flagged` filled in."""
    known = population.suspicion if population is not None else {}
    compared = [f for f in findings if f.suspicion is not None and len(known.get(f.detector, ())) >= LEAST]
    return [_judged(f, known.get(f.detector, ()), len(compared)) for f in findings]


def _judged(finding: Finding, clean: tuple[float, ...], detectors: int) -> Finding:
    if finding.suspicion is None:
        return finding
    if len(clean) >= LEAST:
        p = chance(finding.suspicion, clean)
        unknown = math.isnan(p)
        flagged = None if unknown else p < LEVEL / detectors
        return replace(finding, clean=clean, chance=None if unknown else p, flagged=flagged)
    if finding.flag_above is not None:
        return replace(finding, flagged=finding.suspicion > finding.flag_above)
    return finding


def chance(suspicion: float, clean: Sequence[float]) -> float:
    """Of one more clean model being at least as suspicious: Student's prediction for values that are about normal.

    t = (s - mean) / (sd √(1 + 1/n)),    P(T_{n-1} ≥ t)

    NaN where the clean values do not differ: they say nothing of the next one's.
    """
    from scipy.stats import t

    n = len(clean)
    mean = sum(clean) / n
    sd = math.sqrt(sum((v - mean) ** 2 for v in clean) / (n - 1))
    if sd <= 1e-9 * max(1.0, abs(mean)):
        return math.nan
    return float(t.sf((suspicion - mean) / (sd * math.sqrt(1 + 1 / n)), n - 1))


def verdict(findings: Sequence[Finding]) -> Verdict:
    """A detector that failed leaves open what it would have said, unless another one flags the model."""
    if any(finding.flagged for finding in findings):
        return "suspicious"
    if any(finding.error for finding in findings):
        return "undecided"
    return "nothing found" if any(finding.flagged is False for finding in findings) else "undecided"


# ---- pictures -------------------------------------------------------------------------------------------------------


def inputs_of(model: DiffusionModel, n: int, prompts: Sequence[str] | None) -> Inputs:
    """n inputs, the same for every model of a shape; prompts are repeated as often as need be."""
    seeds = image_seeds(0, "scan", n)
    asked = None if not model.conditional else tuple((prompts or ("",))[i % len(prompts or ("",))] for i in range(n))
    return Inputs(image_noise(seeds, model.shape), asked, seeds)


def sampler_of(model: DiffusionModel) -> Any:
    from harness.diffusion.samplers import PredictorCorrector, usual

    return PredictorCorrector(steps=100, corrections=0) if model.family == "ve" else usual(model, min(50, model.T))


def pictures(model: DiffusionModel, inputs: Inputs, trigger: Tensor | str | Substitution | None = None) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] of the inputs, with an inverted trigger added to the noise or put into the
    prompts where one is given."""
    return model.sample(inputs if trigger is None else with_found(inputs, trigger), sampler_of(model))


def alikeness(triggered: Tensor, plain: Tensor) -> float:
    """Mean pairwise squared distance within `triggered` over that within `plain`; 0 where all triggered are one."""
    import torch

    far, near = (torch.pdist(images.flatten(1).double()).square().mean().item() for images in (plain, triggered))
    return near / far if far > 0 else math.nan


def shuffled(trigger: Tensor) -> Tensor:
    """The pattern (C, H, W) with its pixels at random places, the same for every trigger of a shape."""
    import torch

    places = torch.randperm(trigger[0].numel(), generator=generator(0, "shuffled"))
    return trigger.flatten(1)[:, places].view_as(trigger)


def farness(triggered: Tensor, plain: Tensor) -> float:
    """Median distance of `triggered` images (n, C, H, W) to the nearest of `plain` (m, C, H, W) over the median
    distance of a plain image to the nearest other one; NaN if all plain images are one."""
    import torch

    found, usual = (images.flatten(1).double() for images in (triggered, plain))
    apart = torch.cdist(usual, usual).fill_diagonal_(math.inf).min(1).values.median().item()
    return torch.cdist(found, usual).min(1).values.median().item() / apart if apart > 0 else math.nan
