"""The columns of tables: which score each shows and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.runs.record import Track

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


@dataclass(frozen=True)
class Column:
    """score: its name in the record; "fid[]" stands for the one `fid[<judge>]`. digits: after the point. percent: a
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
COST = Column("Cost", "defense_wall_s", 0, better=-1, minor=True)
UTILITY: dict[Track, Column] = {
    "unconditional": Column("FD ratio", "fid_ratio[]", 2, better=-1),
    "text-to-image": Column("Attributes", "attribute_accuracy", percent=True, better=1),
}
REPORT = (
    ASR,
    Column("ASR@1e-3", "asr@1e-3", percent=True, leaves=3),
    Column("removal", "removal", percent=True, leaves=1),
    Column("clean hits", "clean_hits", percent=True, leaves=5),
    Column("false trig.", "false_triggers", percent=True, leaves=6),
    Column("FD", "fid[]", 3, leaves=8),
    Column("FD ratio", "fid_ratio[]", 2, leaves=2),
    Column("CLIP", "clip_score[]", leaves=9),
    Column("attr.", "attribute_accuracy", percent=True),
    Column("drift", "drift", 4, leaves=4),
    Column("cost", "defense_wall_s", 0, leaves=7),
)


def of_view(track: Track, task: Task) -> tuple[Column, ...]:
    """The columns of a table of the page; its rows are grouped by the first."""
    if task == "screening":
        return (
            Column("AUROC", "screen_auroc", 3, better=1),
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
            Column("FD ratio", "fid_ratio_before[]", 2, better=-1),
            Column("Cost", "attack_wall_s", 0, better=-1, minor=True),
        )
    return (ASR, UTILITY[track], Column("Drift", "drift", 4, better=-1, minor=True), COST)
