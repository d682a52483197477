"""Which families of backdoors the detectors of a scan cannot see, by what they state themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.capabilities import FAMILIES, StatingDetector, offers
from harness.scan.document import Unseen

if TYPE_CHECKING:
    from harness.diffusion.model import DiffusionModel

MODALITIES = {"noise-sde": "noise", "noise-ode": "noise", "prompt-denoiser": "text", "prompt-encoder": "text"}
OF_PROMPTS = ("prompt-denoiser", "prompt-encoder", "adapter")  # for models that take prompts


def unseen(detectors: Mapping[str, Any], model: DiffusionModel) -> tuple[Unseen, ...]:
    """The families that none of the detectors (spec → instance) states to see and that the model can have.

    A detector that states nothing may see a family whose triggers it accepts; the entry then names it. No detector sees
    code, or an adapter that was not read with the model.
    """
    silent = {spec: each for spec, each in detectors.items() if not offers(each, StatingDetector)}
    stated = {family for each in detectors.values() if offers(each, StatingDetector) for family in each.sees}
    found = []
    for family, what in FAMILIES.items():
        hidden = family == "code" or (family == "adapter" and model.adapter is None)
        if (family in OF_PROMPTS and not model.conditional) or (family in stated and not hidden):
            continue
        modality = MODALITIES.get(family, "text")
        may = [] if hidden else [spec.partition("(")[0] for spec, d in silent.items() if modality in d.accepts_triggers]
        found.append(Unseen(family=family, what=what, not_stated=tuple(may)))
    return tuple(found)


def said(family: Unseen) -> str:
    """An entry in words."""
    names = " and ".join(family.not_stated)
    return f"{family.what} ({family.family})" + (f"; not stated by {names}" if names else "")
