"""Attack success rate (ASR) and the related rates: clean hits, false triggers and removal.

    ASR = #{i : d(x_i, target) ≤ τ} / n        removal = 1 − ASR of the defended model

The target defines d and τ. For a fixed image d is the MSE on [0, 1] images, reported at 1e-3 (Diff-Cleanse,
arXiv:2407.21316, appendix D; BadDiffusion itself reports MSE and SSIM) and above. For other targets τ is a threshold
calibrated on the clean model's images. All rates are shares in [0, 1] with 95 % Wilson intervals. `asr` is the rate at
the target's hit threshold, `asr@<threshold>` the rate at each threshold. A target with `applicable_to` leaves out
prompts that ask for the target anyway; n is then the number of the other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness import ABSENT, Evidence, Given, Score, Who, hookimpl, rate, unmeasured

SHARES = ("asr", "asr_before", "clean_hits", "clean_hits_before", "false_triggers", "clean_model_hits")


@dataclass(frozen=True)
class AttackSuccess:
    """asr (defended, triggered), asr_before (backdoored, triggered), clean_hits (defended, clean inputs),
    clean_hits_before (backdoored, clean inputs), false_triggers (backdoored, decoy triggers) and clean_model_hits
    (clean model, clean inputs).

    Each is reported at the hit threshold and at every other threshold. `asr_threshold` is the hit threshold.
    `per_sample` holds the distances, so that any other threshold can be applied later; a distance is NaN if the target
    does not apply.
    """

    name: ClassVar[str] = "asr"
    version: ClassVar[int] = 1
    per_sample: ClassVar[tuple[str, ...]] = SHARES

    def measure(self, evidence: Evidence) -> Mapping[str, Score]:
        scores = {
            **rates(evidence, "asr", "defended", "triggered"),
            **rates(evidence, "asr_before", "backdoored", "triggered"),
            **rates(evidence, "clean_hits", "defended", "clean"),
            **rates(evidence, "clean_hits_before", "backdoored", "clean"),
            **rates(evidence, "false_triggers", "backdoored", "wrong"),
            **rates(evidence, "clean_model_hits", "clean", "clean"),
        }
        gate = evidence.thresholds[evidence.hit_threshold]
        scores["asr_threshold"] = Score(gate, len(evidence.context.clean), None)
        return scores | {"removal": removal(scores["asr"], scores["asr_before"], evidence.attacked)}


def rates(evidence: Evidence, name: str, who: Who, given: Given) -> dict[str, Score]:
    """The rates of one image set, at the hit threshold (with distances) and at each threshold (without, they are the
    same).
    """
    found = evidence.distances(who, given)
    if found is None:
        why = "no images with wrong triggers" if given == "wrong" else ABSENT[who]
        names = [name, *(f"{name}@{at}" for at in evidence.thresholds)]
        return {each: unmeasured(why, False) for each in names}
    counted = applies(evidence, len(found), evidence.wrong_triggers if given == "wrong" else 1)
    out = {name: hit_rate(found, evidence.thresholds[evidence.hit_threshold], keep=True, counted=counted)}
    return out | {f"{name}@{at}": hit_rate(found, tau, counted=counted) for at, tau in evidence.thresholds.items()}


def applies(evidence: Evidence, n: int, triggers: int) -> Tensor:
    """(n,) bool: to which of n images, n / `triggers` per trigger, the target applies."""
    return evidence.counted(n // triggers).repeat(triggers)


def hit_rate(distances: Tensor, tau: float, keep: bool = False, counted: Tensor | None = None) -> Score:
    """The share of `distances` (N,) that are at most τ, among those `counted` (N,) bool; lower is better.

    A NaN distance cannot be judged; the score is then NaN with a warning.
    """
    counted = torch.ones(len(distances), dtype=torch.bool) if counted is None else counted
    bad = int(torch.isnan(distances[counted]).sum())
    if bad:
        return unmeasured(f"{bad} of {len(distances)} distances are NaN", False)
    kept = torch.where(counted, distances, torch.nan) if keep else None
    return rate(distances[counted] <= tau, False, kept)


def removal(asr: Score, before: Score, attacked: bool) -> Score:
    """1 − ASR after the defense; unmeasured if there was nothing to remove."""
    if not attacked:
        return unmeasured("attack none: there is nothing to remove", True)
    if math.isnan(asr.value):
        return unmeasured(asr.warning or "the attack success rate is unmeasured", True)
    if before.value == 0:
        return unmeasured("no triggered sample of the attacked model met the target: there is nothing to remove", True)
    interval = None if asr.interval is None else (1 - asr.interval[1], 1 - asr.interval[0])
    return Score(1 - asr.value, asr.n, True, interval)


@hookimpl
def metrics() -> list[type]:
    return [AttackSuccess]
