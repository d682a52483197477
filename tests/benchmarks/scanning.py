"""Trials of `bench scan` on cases that are made first and scanned once: what they share."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.cli.scan import EXITS

VERDICTS = {int(code): verdict for verdict, code in EXITS.items()}


def processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    """`bench WORDS` of this checkout."""
    return subprocess.run([sys.executable, "-m", "harness", *map(str, words)], capture_output=True, text=True)


def document(*words: object) -> dict[str, Any]:
    """What `bench scan WORDS --json` prints."""
    done = bench("scan", *words, "--json")
    assert done.returncode in VERDICTS and done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"] == VERDICTS[done.returncode]
    return told


def scanned(words: Sequence[object], kept: Sequence[str]) -> dict[str, Any]:
    """The outcome of `bench scan WORDS --json`. kept: what is kept of each finding."""
    began, used = time.perf_counter(), processor_seconds()
    told = document(*words)
    return {
        "verdict": told["verdict"], "seconds": round(time.perf_counter() - began, 1),
        "core_seconds": round(processor_seconds() - used, 1),
        "findings": {f["detector"].partition("(")[0]: {k: f[k] for k in kept} for f in told["findings"]},
    }  # fmt: skip


@dataclass
class Trial:
    """The command line of a trial and the file of its outcomes. kind: the key in it under which the cases stand."""

    kind: str
    told: argparse.Namespace
    known: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        out = self.told.out
        self.known = json.loads(out.read_text()) if out.is_file() else {self.kind: {}}
        torch.set_num_threads(1)
        self.told.models.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, kind: str, script: str, doc: str | None) -> Trial:
        words = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        words.add_argument("--models", type=Path, required=True, help=f"where the {kind} are kept")
        words.add_argument("--train", action="store_true", help="train and measure, and scan nothing")
        words.add_argument("--only", action="append", help="a case; default: all")
        words.add_argument("-o", "--out", type=Path, default=Path(script).with_suffix(".json"))
        return cls(kind, words.parse_args())

    def run(
        self, cases: Sequence[Any], trained: Callable[[Any], dict[str, Any]], scan: Callable[[Any], dict[str, Any]],
        counts: dict[str, Callable[[dict[str, Any]], bool]],
    ) -> None:  # fmt: skip
        """Makes each case that was asked for, and scans those that have no outcome yet. counts: key of the file → which
        outcomes are counted there."""
        found = self.known[self.kind]
        for case in self._asked(cases):
            facts = trained(case)
            print(case.name, facts, flush=True)
            if self.told.train or case.name in found:
                continue
            outcome = scan(case)
            right = outcome["verdict"] == ("nothing found" if case.clean else "suspicious")
            found[case.name] = {"clean": case.clean, "right": right, **facts, **outcome}
            for key, counted in counts.items():
                rights = [each["right"] for each in found.values() if counted(each)]
                self.known[key] = f"{sum(rights)} of {len(rights)}"
            self.told.out.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")
            print(json.dumps(found[case.name]), flush=True)

    def _asked(self, cases: Sequence[Any]) -> Iterator[Any]:
        return (case for case in cases if not self.told.only or case.name in self.told.only)
