"""Computes the metrics from the evidence of a cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.capabilities import keeps_per_sample
from harness.judges.evidence import Evidence, Given, Verdict, Who, reachable
from harness.judges.statistics import BEFORE
from harness.methods.trigger_placement import found_text
from harness.stages.findings import Findings, found
from harness.stages.inputs import avoiding, evaluation_prompts
from harness.types import WRONG, Backdoor, Metric, Model, Score


def evidence(
    plugin: Model,
    backdoor: Backdoor,
    images: Mapping[tuple[Who, Given], Callable[[], Tensor]],
    *,
    n: int,
    evaluation_seed: int,
    attacked: bool,
    findings: Findings | None,
    given_trigger: bool,
    costs: Mapping[str, Mapping[str, float | None] | None],
) -> Evidence:
    """The evidence of a cell. given_trigger: whether the defense was given the trigger, and therefore found none."""
    inverted, verdict = None, Verdict()
    if findings is not None:
        if not given_trigger:
            trigger = found(findings.trigger)
            inverted = trigger if isinstance(trigger, Tensor) else found_text(trigger)
        verdict = Verdict(
            findings.suspicion, findings.flag_above, findings.features, findings.screen_above,
            {which: torch.tensor(scores, dtype=torch.float64) for which, scores in findings.screened.items()},
        )  # fmt: skip
    prompts = evaluation_prompts(avoiding(plugin, backdoor.trigger), n, evaluation_seed)
    return Evidence(
        images,
        reference=plugin.reference(),
        model=plugin,
        backdoor=reachable(backdoor, prompts),
        attacked=attacked,
        prompts=prompts,
        costs=costs,
        inverted=inverted,
        verdict=verdict,
        wrong_triggers=WRONG,
    )


def measure(metrics: Mapping[str, Metric], seen: Evidence) -> dict[str, Score]:
    """The scores of every metric (by its spec)."""
    scores: dict[str, Score] = {}
    owner: dict[str, str] = {}
    for name, metric in metrics.items():
        for score, value in checked_scores(name, metric.measure(seen), keeps_per_sample(metric)).items():
            if owner.setdefault(score, name) != name:
                raise ValueError(f"the metrics '{owner[score]}' and '{name}' both return a score '{score}'; rename one")
            scores[score] = value
    return scores


def _well_formed(metric: str, name: str, score: Score) -> Score:
    """Raises ValueError for a score that no record can hold."""
    if not isinstance(score.n, int) or score.n < 0:
        raise ValueError(f"metric '{metric}' says n = {score.n!r} for '{name}'; n is a number of samples")
    ends = score.interval
    if ends is not None and not (len(ends) == 2 and all(map(math.isfinite, ends)) and ends[0] <= ends[1]):
        raise ValueError(f"metric '{metric}' gave '{name}' the interval {ends!r}; give (low, high), or None")
    return score


def _finite(score: Score, metric: str) -> Score:
    """An infinite value is NaN with the reason; NaN without a reason gets one."""
    if math.isinf(score.value):
        return replace(score, value=math.nan, interval=None, warning=f"metric '{metric}' returned infinity")
    silent = math.isnan(score.value) and score.warning is None
    return replace(score, warning=f"metric '{metric}' returned NaN without a reason") if silent else score


def checked_scores(metric: str, scores: Mapping[str, Score], keeps: Collection[str] = ()) -> dict[str, Score]:
    """`scores` with a warning on every NaN that has none: unmeasured numbers always carry a reason. keeps: the scores,
    without brackets, that have to come with per-sample values. Scores of the attacked model come without."""
    checked = {}
    for name, score in scores.items():
        if not isinstance(score, Score):
            raise TypeError(
                f"metric '{metric}' gave {type(score).__name__} for '{name}'; a metric returns Score objects"
            )
        stem = name.partition("[")[0]
        if stem.endswith(BEFORE):
            score = replace(score, per_sample=None)
        elif stem in keeps and not score.per_sample and not math.isnan(score.value):
            raise ValueError(f"metric '{metric}' declares per-sample values of '{name}' and returned none")
        checked[name] = _finite(_well_formed(metric, name, score), metric)
    return checked
