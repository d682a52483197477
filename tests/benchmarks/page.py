"""What building the page of published records costs. No test.

    python -m tests.benchmarks.page [--results DIR]

seconds: processor seconds of `bench leaderboard build` on the records in DIR, by default the published ones, with an
empty cache directory. records: how many there are. Prints a line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path)
    told = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # no forest is known yet
        from leaderboard import results, site

        start = time.process_time()
        done = site.build(results.read(told.results), Path(folder) / "page")
        print(json.dumps({"records": done["records"], "seconds": round(time.process_time() - start, 2)}))


if __name__ == "__main__":
    main()
