"""A tiny suite, run by the command in a process of its own, and its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ATTACK = "villandiffusion(solver='ode', trigger_only=True, steps=2, batch=4)"
SUITE = f"""
title = "tiny"
metrics = ["asr", "drift", "frechet"]
[[grid]]
model = ["digits-ddpm"]
attack = ["none", "{ATTACK}"]
trigger = ["box"]
target = ["hat"]
defense = ["none", "finetune(steps=2, batch=4)"]
sampler = ["ddim(steps=2)"]
n = 4
"""


def bench(store: Path, *words: str) -> list[str]:
    return [sys.executable, "-P", "-c", "import harness.cli; harness.cli.main()", *words, "--store", str(store)]


def run(store: Path, *words: str, expect: int = 0, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The report that `bench run --json` prints."""
    command = bench(store, "run", *words, "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=env)
    assert done.returncode == expect, (done.stderr + done.stdout)[-2000:]
    return json.loads(done.stdout)


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{r['cell']['attack']} {r['cell']['defense']}": {
            name: (s["value"], s["per_sample"]) for name, s in r["scores"].items()
        }
        for r in report["records"]
    }


def unplaced(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What of the records may not depend on where and how often their jobs ran."""
    apart = ("provenance", "attempts", "sheet")
    return [{name: value for name, value in record.items() if name not in apart} for record in report["records"]]
