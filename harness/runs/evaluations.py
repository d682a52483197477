"""How many network evaluations a sampler takes for one image.

Most samplers build a scheduler of diffusers to say so. That takes milliseconds, and the first one seconds, in which
diffusers is imported. So each sampler is asked once, and answers of this distribution's own samplers are kept for the
next process: they follow from the sampler's code, its parameters and the installed libraries.
"""

from __future__ import annotations

import sys
from typing import Any

from harness.registry import RegistryError, spec_of
from harness.registry.code_digest import closure
from harness.registry.index import distributions
from harness.registry.kept import derived, digest_of
from harness.runs.jsonable import canonical

OURS = ("harness", "plugins")  # packages whose samplers depend on nothing else

_asked: dict[tuple[type, str], Any] = {}


def nfe_of(sampler: Any) -> Any:
    """What `sampler.nfe` says, which is a whole number unless the sampler is at fault."""
    try:
        about = type(sampler), spec_of(sampler)
    except (RegistryError, TypeError, AttributeError):  # it has no spec by which it could be known again
        return sampler.nfe
    if about not in _asked:
        ours = about[0].__module__.partition(".")[0] in OURS
        _asked[about] = _kept(sampler, about[1]) if ours else sampler.nfe
    return _asked[about]


def _kept(sampler: Any, spec: str) -> Any:
    code = closure([type(sampler)])
    name = digest_of("nfe", sys.version, canonical(sorted(distributions())), canonical(code), spec)
    found = derived.find(name)
    if type(found) is int and found > 0:
        return found
    made = sampler.nfe
    if type(made) is int and made > 0:
        derived.keep(name, made)
    return made
