"""What the work around the models' own calls costs now and at an earlier commit, measured in turn. No test.

    python -m tests.benchmarks.before_after --before DIR [--only PART ...] [--times 3] [--cells 10080] [-o FILE]
    python -m tests.benchmarks.before_after --table

DIR: a checkout of the earlier commit. The scripts of this folder run in both checkouts in turn, each time in a process
of its own that imports the packages of its checkout. FILE (default before_after.json beside this script) holds the
medians, and the later commit of each part; a part replaces its earlier values when it is done. Parts:

driver-JOBS: processor and busy milliseconds of the driver per job, and its memory at the end (driver.py, `within`).
planning: processor milliseconds per cell of a suite, and memory of the process (planning.py). quick: processor seconds
of `bench plan` for the suite quick of DIR, when nothing is kept in the cache directory and again. page: processor
seconds of `bench leaderboard build` with an empty cache directory and again, on the records that DIR publishes; the
code of DIR cannot read records with later fields. ddim: processor seconds of 64 images by those of diffusers' pipeline
(ddim.py).

load: of the machine at the end of each part; other programs slow both sides. Busy milliseconds are wall time. --table:
put the table into docs/scale.md and print it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tables import Place, markdown

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIDES = ("before", "after")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A line of the table. name: of the measured value within its part. words: what it is, with its unit."""

    name: str
    words: str
    digits: int


@dataclass(frozen=True)
class Part:
    """arguments: of the script, {cells} and {records} filled in. read: the line that the script printed → its values.
    times: repetitions at most."""

    script: str
    arguments: tuple[str, ...]
    figures: tuple[Figure, ...]
    read: Callable[[Row], Row]
    times: int = 99


def _driver(jobs: int, times: int) -> Part:
    figures = (
        Figure("cpu_ms", f"driver, {jobs:,} jobs: processor ms per job", 2),
        Figure("busy_ms", f"driver, {jobs:,} jobs: busy ms per job", 2),
        Figure("memory_mib", f"driver, {jobs:,} jobs: MiB at the end", 0),
    )
    return Part(
        "driver", ("--jobs", str(jobs)), figures, lambda row: {**row, "memory_mib": row["memory_mib"][-1]}, times
    )


PARTS: dict[str, Part] = {
    "driver-1000": _driver(1000, 3),
    "driver-3000": _driver(3000, 3),
    "driver-10000": _driver(10000, 1),
    "planning": Part(
        "planning", ("--only", "many", "--cells", "{cells}"),
        (Figure("ms", "planning: processor ms per cell", 2), Figure("memory_mib", "planning: MiB of the process", 0)),
        lambda row: {**row["many"], "ms": row["many"]["expand_ms"] + row["many"]["plan_ms"]}, 1,
    ),
    "quick": Part(
        "planning", ("--only", "quick", "--suite", "{suite}"),
        (
            Figure("first_s", "`bench plan` of the earlier `quick`, empty cache: processor seconds", 1),
            Figure("again_s", "`bench plan` of the earlier `quick`, again: processor seconds", 1),
        ),
        lambda row: row["quick"],
    ),
    "page": Part(
        "page", ("--results", "{records}"),
        (
            Figure("seconds", "`bench leaderboard build`, empty cache: processor seconds", 1),
            Figure("again_s", "`bench leaderboard build`, again: processor seconds", 1),
        ),
        lambda row: row,
    ),
    "ddim": Part(
        "ddim", ("--steps", "10", "--times", "2"),
        (Figure("ratio", "DDIM in fp32, 64 images, 10 steps: seconds by those of diffusers' pipeline", 2),),
        lambda row: row,
    ),
}  # fmt: skip


def measured(part: Part, checkout: Path, values: Mapping[str, object]) -> Row:
    """What the script of a part says in a checkout. Raises CalledProcessError."""
    command = [sys.executable, str(HERE / f"{part.script}.py"), *(word.format(**values) for word in part.arguments)]
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return part.read(json.loads(done.stdout.splitlines()[-1]))


def compared(part: Part, before: Path, times: int, cells: int) -> dict[str, Any]:
    """The medians of both sides, measured in turn, and of what they are."""
    published = before / "leaderboard"
    values = {"cells": cells, "records": published / "results", "suite": published / "suites" / "quick.toml"}
    rows: dict[str, list[Row]] = {side: [] for side in SIDES}
    for _ in range(min(times, part.times)):
        for side, checkout in zip(SIDES, (before, ROOT), strict=True):
            rows[side].append(measured(part, checkout, values))
    about = {name: rows["after"][0][name] for name in ("cells", "jobs", "records") if name in rows["after"][0]}
    found = {
        side: {
            figure.name: round(statistics.median(row[figure.name] for row in rows[side]), 3) for figure in part.figures
        }
        for side in SIDES
    }
    return {**about, "times": len(rows["after"]), **found, "load": round(os.getloadavg()[0], 1)}


def place() -> Place:
    return Place(ROOT / "docs" / "scale.md", "python -m tests.benchmarks.before_after --table")


def table(known: Mapping[str, Any]) -> str:
    """The figures of both sides in Markdown, and under which load they were measured."""
    rows: list[list[str]] = []
    for name, part in PARTS.items():
        found = known["parts"].get(name)
        if found is None:
            continue
        size = "".join(f", {found[what]:,} {what}" for what in ("cells", "records") if what in found)
        for figure in part.figures:
            old, new = (found[side][figure.name] for side in SIDES)
            values = [f"{value:.{figure.digits}f}" for value in (old, new)]
            rows.append(
                [f"{figure.words}{size}", *values, f"{old / new:.1f}", str(found["times"]), f"`{found['commit']}`"]
            )
    loads = [found["load"] for found in known["parts"].values()]
    head = ("figure", f"commit `{known['before']}`", "later", "ratio", "runs", "later commit")
    machine = f"The load of the machine, which has {known['cores']} cores, was {min(loads)} to {max(loads)}."
    return f"{markdown(head, rows)}\n\n{machine}"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--table", action="store_true")
    words.add_argument("--before", type=Path, metavar="DIR")
    words.add_argument("--commit", default="22dbe8b", help="of DIR, for the table")
    words.add_argument("--only", action="extend", nargs="+", choices=PARTS, metavar="PART")
    words.add_argument("--times", type=int, default=3)
    words.add_argument("--cells", type=int, default=10080)
    words.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    told = words.parse_args()
    if told.table:
        made = table(json.loads(told.out.read_text()))
        place().write(made)
        print(made)
        return
    if told.before is None:
        words.error("give --before DIR, a checkout of the earlier commit, or --table")
    known: dict[str, Any] = json.loads(told.out.read_text()) if told.out.is_file() else {"parts": {}}
    now = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    )
    known |= {"before": told.commit, "cores": os.cpu_count()}
    for name in told.only or PARTS:
        made = compared(PARTS[name], told.before.resolve(), told.times, told.cells)
        known["parts"][name] = {"commit": now.stdout.strip(), **made}
        print(name, json.dumps(known["parts"][name]), flush=True)
        told.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
