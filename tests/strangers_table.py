"""The table of scans of strangers' models in docs/scan.md, made from the committed outcomes of the trial.

python -m tests.strangers_table      # rewrite the table in docs/scan.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tables import Place, markdown

ROOT = Path(__file__).parents[1]
PLACE = Place(ROOT / "docs" / "scan.md", "python -m tests.strangers_table")
OUTCOMES = ROOT / "tests" / "benchmarks" / "strangers.json"
HEAD = ("model", "ASR", "weights, millions", "`terd`", "`bias-scan`", "verdict", "core-seconds")


def outcomes() -> Mapping[str, Any]:
    return json.loads(OUTCOMES.read_text())


def table() -> str:
    """Markdown: a row for each model. A score that its detector flags is bold."""
    return markdown(HEAD, [_row(name, model) for name, model in outcomes()["models"].items()])


def _row(name: str, model: Mapping[str, Any]) -> list[str]:
    found = model["findings"]
    return [
        f"`{name}`",
        "clean" if model["clean"] else f"{model['asr']:.2f}",
        f"{model['parameters'] / 1e6:.2f}",
        _score(found["terd"], 4),
        _score(found["bias-scan"], 3),
        model["verdict"] if model["right"] else f"{model['verdict']}: wrong",
        f"{model['core_seconds']:.0f}",
    ]


def _score(finding: Mapping[str, Any], digits: int) -> str:
    words = f"{finding['suspicion']:.{digits}f}"
    return f"**{words}**" if finding["flagged"] else words


def main() -> None:
    PLACE.write(table())


if __name__ == "__main__":
    main()
