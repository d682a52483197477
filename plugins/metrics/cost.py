"""The cost of attack and defense: wall time, CPU time, peak resident memory and peak CUDA memory.

Times are in seconds, memory is in bytes. Both are measured in the job's own process. CUDA memory is unmeasured on a
CPU, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness import Evidence, Score, hookimpl, unmeasured

FIELDS = ("wall_s", "cpu_s", "peak_rss_bytes", "cuda_bytes")


@dataclass(frozen=True)
class Cost:
    """attack_<field> and defense_<field> for wall_s, cpu_s, peak_rss_bytes and cuda_bytes, and defense_screen_s.

    defense_screen_s is the wall time in seconds in which the defense screens one input. The evaluation of a screen is
    not in defense_wall_s and defense_cpu_s. It is in defense_peak_rss_bytes and defense_cuda_bytes.
    """

    name: ClassVar[str] = "cost"
    version: ClassVar[int] = 2

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        scores = {
            f"{step}_{field}": cost(evidence.costs.get(step), step, field)
            for step in ("attack", "defense")
            for field in FIELDS
        }
        return scores | {"defense_screen_s": cost(evidence.costs.get("defense"), "defense", "screen_s")}


def cost(costs: Mapping[str, float | None] | None, step: str, field: str) -> Score:
    if costs is None:
        return unmeasured(f"no {step} was run", False)
    value = costs.get(field)
    if value is None:
        why = {"cuda_bytes": "ran without CUDA", "screen_s": "the defense screens no inputs"}
        return unmeasured(why.get(field, f"{field} was not recorded"), False)
    return Score(float(value), 1, False)


@hookimpl
def metrics() -> list[type]:
    return [Cost]
