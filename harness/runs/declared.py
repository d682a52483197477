"""What the plugins and the suite of a cell say of it, without weights and without a job: what a record claims of its
cell is held against this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from harness.capabilities import delivers, keeps_per_sample
from harness.judges.statistics import BEFORE
from harness.registry import KINDS, RegistryError
from harness.runs import planning, suite
from harness.runs.evaluations import nfe_of
from harness.runs.suite import AXES, Suite
from harness.types import Backdoor, Cell

if TYPE_CHECKING:
    from harness.registry import Registry
    from harness.runs.job import Job
    from harness.runs.record import Track

T = TypeVar("T")


class Unknown(LookupError):
    """What no plugin of this machine says, and why."""


@dataclass(frozen=True)
class Said:
    """Of a cell: the names of `Knowledge` that its defense needs, what the defense delivers, the track of its model,
    and how many network evaluations its sampler takes for one image."""

    needs: tuple[str, ...]
    delivers: tuple[str, ...]
    track: Track
    nfe: int


class Declared:
    """What the plugins of a registry say, and suites: the shipped ones, or those of the files in `suites` by name. Each
    answer is computed once."""

    def __init__(self, registry: Registry, suites: Mapping[str, Path] | None = None) -> None:
        self.registry, self.suites = registry, dict(suites or {})
        self._built, self._canonical = cache(registry.build), cache(registry.canonical)
        self.of, self.nfe = cache(self._of), cache(lambda spec: nfe_of(self._built("samplers", spec)))
        self._outlines = planning.Outlines(registry)
        self.counted = cache(self._counted)
        self.current = cache(self._current)
        self.suite = cache(self._suite)

    def names(self, kind: str) -> tuple[str, ...]:
        """The names of all plugins of a kind."""
        return tuple(self.registry.classes(kind))

    def canonical(self, cell: Cell) -> dict[str, str]:
        """Part of the cell → its spec with every default filled in. Raises Unknown."""
        return {
            part: _asked(lambda part=part, k=k: self._canonical(k, getattr(cell, part))) for part, k in AXES.items()
        }

    def _current(self, text: str) -> str:
        """A spec as it is written today: a parameter that came after it has its default. Other texts are unchanged."""
        name = text.partition("(")[0]
        for kind in KINDS if "(" in text else ():
            if name in self.registry.classes(kind):
                try:
                    return self._canonical(kind, text)
                except Exception:  # a plugin is anybody's
                    continue
        return text

    def _of(self, cell: Cell) -> Said:
        """Raises Unknown."""
        model, defense = (self._part(cell, part) for part in ("model", "defense"))
        track: Track = "text-to-image" if model.conditional else "unconditional"
        return _asked(lambda: Said(tuple(defense.needs), delivers(defense), track, self.nfe(cell.sampler)))

    def _part(self, cell: Cell, part: str) -> Any:
        return _asked(lambda: self._built(AXES[part], getattr(cell, part)))

    def distribution(self, kind: str, name: str) -> str:
        """Where the plugin of that name comes from, as records say it."""
        return PurePath(self.registry.distribution_of(kind, name)).name

    def keeps(self, metrics: Sequence[str]) -> frozenset[str]:
        """The scores of which these metrics (all standard ones for none) keep per-sample values in every row, without
        brackets. Raises Unknown."""
        asked = tuple(metrics) or suite.standard(self.registry)
        said = {name for m in asked for name in keeps_per_sample(_asked(lambda m=m: self._built("metrics", m)))}
        return frozenset(name for name in said if not name.endswith(BEFORE))

    def thresholds(self, cell: Cell, clean: Sequence[float]) -> tuple[str, Mapping[str, float]]:
        """The name of the hit threshold, and all thresholds of the cell's target. clean: the distances of the clean
        model's images, which calibrate them; NaN for images that did not count. Raises Unknown."""
        import torch

        from harness.types import TargetContext

        backdoor = _asked(lambda: Backdoor(self._part(cell, "trigger"), self._part(cell, "target")))
        kept, target = torch.tensor(clean, dtype=torch.float32), backdoor.target
        context: Any = TargetContext(_Unseen(), None, None)  # type: ignore[arg-type]
        found = _asked(lambda: type(target).thresholds(_Measured(target, kept), context))  # type: ignore[arg-type]
        return target.hit_threshold, {name: float(tau) for name, tau in found.items()}

    def _counted(self, model: str, trigger: str, target: str, n: int, evaluation_seed: int) -> tuple[bool, ...]:
        """Which of the n evaluated inputs count in rates. Raises Unknown."""
        from harness.judges.evidence import counted, reachable
        from harness.stages.inputs import avoiding, evaluation_prompts

        plugin, *pair = (
            _asked(lambda kind=kind, spec=spec: self._built(kind, spec))
            for kind, spec in (("models", model), ("triggers", trigger), ("targets", target))
        )
        prompts = _asked(lambda: evaluation_prompts(avoiding(plugin, pair[0]), n, evaluation_seed))
        judge = _asked(lambda: reachable(Backdoor(*pair), prompts)).target
        return tuple(map(bool, _asked(lambda: counted(judge, prompts, n).tolist())))

    def _suite(self, name: str) -> Suite:
        """The suite of that name, expanded. Raises Unknown."""
        return _asked(lambda: suite.load_suite(self.suites.get(name, name), self.registry))

    def jobs(self, cell: Cell, metrics: Sequence[str]) -> Mapping[str, Job]:
        """The jobs of a cell as they are planned today, but for weights and code. The keys are names only. Raises
        Unknown."""
        return _asked(lambda: self._outlines.jobs(cell, metrics))


def _asked(question: Callable[[], T]) -> T:
    """The answer of a plugin. Raises Unknown for whatever it raises: a plugin is anybody's."""
    try:
        return question()
    except Unknown:
        raise
    except RegistryError as error:
        raise Unknown(str(error)) from None
    except Exception as error:
        raise Unknown(f"{type(error).__name__}: {error}") from None


class _Unseen:
    """Images that a record does not hold."""

    def __getattr__(self, name: str) -> Any:
        raise Unknown("it looks at images, which a record does not hold")


class _Measured:
    """A target that answers with the distances that a record keeps."""

    def __init__(self, target: Any, kept: Any) -> None:
        self._target, self._kept = target, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def distances(self, images: Any, context: Any) -> Any:
        if not len(self._kept) or bool(self._kept.isnan().any()):
            raise Unknown("it is calibrated on distances that the record does not keep")
        return self._kept
