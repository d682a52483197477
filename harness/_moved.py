"""Import paths of plugin API 1. Each still gives the module that took its place, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "attention": "diffusion.attention",
    "checkpoint": "diffusion.checkpoint",
    "clip": "judges.shapes_clip",
    "digits": "judges.digits",
    "distillation": "methods.distillation",
    "doubts": "runs.doubts",
    "editing": "methods.weight_edits",
    "embedded": "models.embedded_models",
    "estimate": "runs.estimates",
    "events": "diffusion.events",
    "evidence": "judges.evidence",
    "features": "judges.classifiers",
    "grid": "runs.suite",
    "guidance": "methods.attention_guidance",
    "hookspecs": "registry.hookspecs",
    "hub": "judges.hub",
    "imagedata": "judges.image_folders",
    "images": "diffusion.images",
    "inversion": "methods.inversion",
    "job": "runs.job",
    "jobs": "runs.execution",
    "noise_backdoor": "methods.noise_attacks",
    "pasting": "methods.corner_patches",
    "planning": "runs.planning",
    "points": "registry.entry_points",
    "prompts": "methods.prompt_edits",
    "pruning": "methods.pruning",
    "public": "judges.pretrained_judges",
    "published": "models.hub_models",
    "recipes": "models.training_recipes",
    "records": "runs.records",
    "roc": "judges.statistics",
    "samplers": "diffusion.samplers",
    "scanpage": "scan.report",
    "seeds": "diffusion.seeds",
    "shapes": "judges.shapes",
    "sources": "registry.code_digest",
    "stamping": "methods.trigger_placement",
    "store": "runs.store",
    "text_detection": "methods.prompt_screening",
    "training": "diffusion.training",
    "trojan": "methods.trojan",
}
# module → names that left it → where they are
RENAMED = {
    "harness.diffusion": {
        "DDIM": "harness.diffusion.samplers.DDIM",
        "DDPM": "harness.diffusion.samplers.DDPM",
        "SAMPLERS": "harness.diffusion.samplers.SAMPLERS",
        "DiffusionModel": "harness.diffusion.model.DiffusionModel",
    },
    "harness.judges.evidence": {
        "mean": "harness.judges.statistics.mean",
        "rate": "harness.judges.statistics.rate",
        "unmeasured": "harness.judges.statistics.unmeasured",
    },
    "harness.methods.noise_attacks": {
        "LearningRate": "harness.methods.parameters.LearningRate",
        "Rate": "harness.methods.parameters.Fraction",
        "Steps": "harness.methods.parameters.PositiveInt",
        "Weight": "harness.methods.parameters.Weight",
    },
}


def today(path: str) -> str:
    """The dotted path of a module, or of something in one, as it is now: harness.guidance.Goal →
    harness.methods.attention_guidance.Goal."""
    top, _, rest = path.partition(".")
    first, _, rest = rest.partition(".")
    if top == "harness" and first in MOVED:
        path = ".".join(filter(None, [top, MOVED[first], rest]))
    module, _, name = path.rpartition(".")
    return RENAMED.get(module, {}).get(name, path)


def old_names(module: str) -> Callable[[str], object]:
    """The `__getattr__` of a module: what left it, with a DeprecationWarning."""

    def get(name: str) -> object:
        new = RENAMED[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {new}; import from harness", DeprecationWarning, stacklevel=2)
        home, _, name = new.rpartition(".")
        return getattr(import_module(home), name)

    return get


class Moved(MetaPathFinder, Loader):
    """Finds `harness.OLD` for the names in `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "harness" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = today(spec.name)
        warnings.warn(f"{spec.name} is now {new}; import from harness", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        if new in RENAMED:
            vars(module).setdefault("__getattr__", old_names(new))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run. Importing has given the module the old path's spec; it gets its own again."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old paths importable."""
    if not any(type(finder).__name__ == "Moved" for finder in sys.meta_path):
        sys.meta_path.append(Moved())
