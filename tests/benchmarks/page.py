"""What building the page of published records costs. No test.

    python -m tests.benchmarks.page [--results DIR]

Processor seconds of `bench leaderboard build` on the records in DIR, by default the published ones, each time in a
process of its own, Python's start included. seconds: with an empty cache directory. again_s: with what the first one
kept there, the verdicts of the random forests. records: how many there are. Prints a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def build(root: Path | None, out: Path) -> None:
    """Build the page in this process and print what it took."""
    from leaderboard import results, site

    done = site.build(results.read(root), out)
    print(json.dumps({"records": done["records"], "seconds": round(time.process_time(), 2)}))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path)
    words.add_argument("--here", type=Path, metavar="OUT", help="build once, in this process")
    told = words.parse_args()
    if told.here is not None:
        build(told.results, told.here)
        return
    given = [] if told.results is None else ["--results", str(told.results)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *given, "--here", str(Path(folder) / "page")]
        env = {**os.environ, "XDG_CACHE_HOME": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        runs = (subprocess.run(command, env=env, check=True, capture_output=True, text=True) for _ in range(2))
        first, again = (json.loads(run.stdout) for run in runs)
    print(json.dumps({**first, "again_s": again["seconds"]}))


if __name__ == "__main__":
    main()
