"""A training that goes on where it was stopped: its state in one safetensors file, written now and then."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOSSES, RNG = "losses", "rng"
ABOUT = "about"
UNFINISHED = ".unfinished"  # folder beside the files of a model that is being built: the states of its trainings


@dataclass
class Kept:
    """Where the state of a training is kept.

    path: the file. rng: the CPU generator from which the loss draws; its state is kept too, so that the batches after
    an interruption are those of a training without it. every: seconds between two writings.
    """

    path: Path
    rng: torch.Generator
    every: float = 60.0
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def write(self, training: Training, losses: Sequence[float]) -> None:
        """Replace the file by the state after len(losses) steps."""
        from safetensors.torch import save_file

        tensors = training.tensors() | {LOSSES: torch.tensor(losses, dtype=torch.float64), RNG: self.rng.get_state()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}")
        save_file(tensors, draft, {ABOUT: json.dumps(training.about(), sort_keys=True)})
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._last = time.monotonic()

    def read(self, training: Training) -> list[float]:
        """Put the training into the state of the file and return the losses so far; [] if there is no file, or one of a
        training with other settings or other networks, or one that cannot be read."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError):
            return []
        if about.get("settings") != training.about()["settings"] or not {LOSSES, RNG} <= set(tensors):
            return []
        training.restore(about, tensors)
        self.rng.set_state(tensors[RNG])
        return tensors[LOSSES].tolist()


@dataclass
class Training:
    """The parts of a training that change: parameters, AdamW, the schedule of its learning rate, the average of the
    parameters or None. settings: what two trainings must share for one to go on from the other's state."""

    params: list[Tensor]
    optimizer: Any
    schedule: Any
    average: Any | None
    settings: dict[str, Any]

    def about(self) -> dict[str, Any]:
        """What the file says in JSON: settings, schedule, learning rate and moments' decays, steps of the average."""
        kept = {key: value for key, value in self.schedule.state_dict().items() if _plain(value)}
        group = self.optimizer.param_groups[0]
        shapes = [list(p.shape) for p in self.params]
        return {
            "settings": json.loads(json.dumps(self.settings | {"shapes": shapes})),
            "schedule": kept,
            "group": {"lr": group["lr"], "betas": list(group["betas"])},
            "average": None if self.average is None else self.average.optimization_step,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Copies of parameters, moments and averages by name."""
        found = {f"weight.{i}": p.detach() for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            found |= {f"{key}.{i}": value for key, value in self.optimizer.state.get(p, {}).items()}
        if self.average is not None:
            found |= {f"average.{i}": p for i, p in enumerate(self.average.shadow_params)}
        return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}

    @torch.no_grad()
    def restore(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for i, p in enumerate(self.params):
            p.copy_(tensors[f"weight.{i}"])
            names = [name for name in tensors if name.endswith(f".{i}") and not name.startswith(("weight", "average"))]
            counted_on = p.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[p] = {
                name.rpartition(".")[0]: tensors[name].to(counted_on if name.startswith("step") else p.device)
                for name in names
            }
        if self.average is not None:
            for i, p in enumerate(self.average.shadow_params):
                p.copy_(tensors[f"average.{i}"])
            self.average.optimization_step = about["average"]
        self.schedule.load_state_dict(self.schedule.state_dict() | about["schedule"])
        self.optimizer.param_groups[0].update(lr=about["group"]["lr"], betas=tuple(about["group"]["betas"]))


def _plain(value: Any) -> bool:
    """Whether a value is the same after a way through JSON."""
    try:
        return json.loads(json.dumps(value)) == value and not (isinstance(value, float) and math.isnan(value))
    except (TypeError, ValueError):
        return False
