"""The columns of tables: which score each shows and how."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from harness.runs.record import Track
from harness.types import PUBLIC_ENCODERS

Task = Literal["purification", "screening", "detection", "attacks"]
TASKS: tuple[Task, ...] = ("purification", "screening", "detection", "attacks")
TRACKS: tuple[Track, ...] = ("unconditional", "text-to-image")
TRACK_WORDS: dict[Track, str] = {"unconditional": "Unconditional", "text-to-image": "Text‑to‑image"}
TASK_WORDS: dict[Task, str] = {
    "purification": "Purification",
    "screening": "Screening",
    "detection": "Detection",
    "attacks": "Attacks",
}


_RANGES: dict[tuple[float, float], tuple[str, ...]] = {  # possible values of scores, by the stems of their names
    (0.0, 1.0): (
        "asr", "found_asr", "clean_hits", "clean_model_hits", "false_triggers", "attribute_accuracy", "class_balance",
        "both", "mismatch", "precision", "recall", "recognised", "flagged", "screen_auroc", "screen_tpr",
        "screen_fpr", "trigger_match", "trigger_ratio",
    ),
    (0.0, math.inf): (
        "fd", "fd_ratio", "fid", "fid_ratio", "drift", "change", "feature", "perceptual", "perceptual_distance",
        "target_mse", "spread", "trigger_l2", "asr_threshold",
    ),
    (-1.0, 1.0): ("target_ssim", "trigger_cosine", "attribute_drop"),
    (-math.inf, 1.0): ("removal",),
    (-100.0, 100.0): ("clip_score", "clip_similarity", "target_clip_score"),
}  # fmt: skip
_BY_STEM = {stem: ends for ends, stems in _RANGES.items() for stem in stems}


@cache  # asked for every interval on the page, of a few hundred names
def bounds(score: str) -> tuple[float, float]:
    """The least and the greatest value that a score of this name can have: 0 and 1 of a share, 0 and infinity of a
    distance, of seconds and of bytes. Both are infinite for a name that is not known here."""
    if re.split(r"[\[@.]", score)[0].endswith(("_s", "_bytes")):
        return 0.0, math.inf
    return _BY_STEM.get(_stem(score), (-math.inf, math.inf))


_WHOLE = {  # scores of all n images of a cell, by the stems of their names
    "drift", "change", "clip_score", "clip_similarity", "perceptual", "perceptual_distance", "target_mse",
    "target_ssim", "target_clip_score", "asr_threshold",
}  # fmt: skip
_OF_SETS = {  # scores of the utility set as a whole
    "fd", "fd_ratio", "kd", "fid", "fid_ratio", "kid", "precision", "spread", "recognised", "class_balance",
}  # fmt: skip


def whole(score: str) -> bool:
    """Whether a score of this name is of all images of a cell, so that its n is the cell's."""
    return "@" not in score and "." not in score and _stem(score) in _WHOLE


def of_sets(score: str) -> bool:
    """Whether a score of this name compares sets of images, so that its n is that of the cell's utility set, or the
    cell's where there is none."""
    return _stem(score) in _OF_SETS


def _stem(score: str) -> str:
    return re.sub(r"(_triggered|_clean)?(_before)?$", "", re.split(r"[\[@.]", score)[0])


def possible(score: str, interval: Sequence[float] | None) -> tuple[float, float] | None:
    """The interval within the score's bounds: Student's interval of a mean can reach beyond them."""
    if interval is None:
        return None
    least, most = bounds(score)
    low, high = (min(most, max(least, end)) for end in interval)
    return low, high


@dataclass(frozen=True)
class Column:
    """score: its name in the record; "fd[]" stands for the one `fd[<judge>]`. digits: after the point. percent: a
    share shown in %. better: -1 lower, +1 higher, 0 neither. minor: left out where a screen is narrow. leaves: how soon
    it goes when a terminal is narrow, 0 never. interval: shown in the report, too."""

    title: str
    score: str
    digits: int = 1
    percent: bool = False
    better: Literal[-1, 0, 1] = 0
    minor: bool = False
    leaves: int = 0
    interval: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return self.title + (" %" if self.percent else " s" if self.score.endswith("_wall_s") else "")


ASR = Column("ASR", "asr", percent=True, better=-1, interval=True)
AUROC = Column("AUROC", "screen_auroc", 3, better=1)
ON_CLEAN = "_clean"  # ends the name of a screen's score on the clean model under the same trigger: another cell's
RANKING = {each.score: each.better for each in (ASR, AUROC)} | {"removal": 1}  # what rows are compared by
COST = Column("Cost", "defense_wall_s", 0, better=-1, minor=True)
UTILITY: dict[Track, Column] = {
    "unconditional": Column("FD ratio", "fd_ratio[]", 2, better=-1),
    "text-to-image": Column("Attributes", "attribute_accuracy", percent=True, better=1),
}
DRIFT = (
    Column("Drift", "drift", 4, better=-1, minor=True),
    Column("Drift, triggered", "drift_triggered", 4, better=-1, minor=True),
)
REPORT = (
    ASR,
    Column("ASR@1e-3", "asr@1e-3", percent=True, leaves=3),
    Column("removal", "removal", percent=True, leaves=1),
    Column("clean hits", "clean_hits", percent=True, leaves=5),
    Column("false trig.", "false_triggers", percent=True, leaves=6),
    Column("FD", "fd[]", 3, leaves=8),
    Column("FD ratio", "fd_ratio[]", 2, leaves=2),
    Column("FD ratio, public", f"fd_ratio[{PUBLIC_ENCODERS[0]}]", 2, leaves=10),
    Column("CLIP", "clip_score[]", leaves=9),
    Column("attr.", "attribute_accuracy", percent=True),
    Column("drift", "drift", 4, leaves=4),
    Column("drift, trig.", "drift_triggered", 4, leaves=5),
    Column("cost", "defense_wall_s", 0, leaves=7),
)


def of_view(track: Track, task: Task) -> tuple[Column, ...]:
    """The columns of a table of the page; its rows are grouped by the first."""
    if task == "screening":
        return (
            AUROC,
            Column("AUROC, clean model", AUROC.score + ON_CLEAN, 3),
            Column("TPR at 1 % FPR", "screen_tpr@1%fpr", percent=True, better=1),
            Column("TPR, own threshold", "screen_tpr", percent=True, better=1, minor=True),
            Column("FPR, own threshold", "screen_fpr", percent=True, better=-1, minor=True),
            COST,
        )
    if task == "detection":
        return (
            Column("Suspicion", "suspicion", 4),
            Column("Flagged", "flagged", percent=True),
            Column("ASR", "asr", percent=True, minor=True),
            COST,
        )
    if task == "attacks":
        return (
            Column("ASR", "asr_before", percent=True),
            Column("ASR at MSE 1e-3", "asr_before@1e-3", percent=True, minor=True),
            Column("False triggers", "false_triggers", percent=True, better=-1),
            Column("FD ratio", "fd_ratio_before[]", 2, better=-1),
            Column("Drift", "drift_before", 4, better=-1, minor=True),
            Column("Cost", "attack_wall_s", 0, better=-1, minor=True),
        )
    return (ASR, UTILITY[track], *DRIFT, COST)
