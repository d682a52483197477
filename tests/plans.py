"""Cells of the smallest model, and their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import registry
from harness.runs import planning
from harness.runs.suite import Suite
from harness.types import Cell
from tests.whole_runs import ATTACK


def cell(plugins: registry.Registry, **changes: Any) -> Cell:
    parts: dict[str, Any] = {
        "model": "digits-ddpm", "attack": ATTACK, "trigger": "box", "target": "hat", "defense": "finetune",
        "sampler": "ddim(steps=3)", "seed": 0, "n": 8,
    }  # fmt: skip
    parts |= changes
    kinds = {"model": "models", "attack": "attacks", "trigger": "triggers", "target": "targets"}
    kinds |= {"defense": "defenses", "sampler": "samplers"}
    made: dict[str, Any] = {k: plugins.canonical(kinds[k], v) if k in kinds else v for k, v in parts.items()}
    return Cell(**made)


def planned(
    plugins: registry.Registry, *cells: Cell, metrics: tuple[str, ...] = ("asr",), threads: int = 1
) -> planning.Plan:
    suite = Suite("t", "t", tuple(cells), (), metrics, Path("t.toml"))
    return planning.plan(suite, plugins, threads)
