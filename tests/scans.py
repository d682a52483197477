"""Scans for tests of what is made from them, and fixtures of the tests that run `bench scan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from harness.cli import call
from harness.diffusion import checkpoint, events
from harness.diffusion.model import DiffusionModel
from harness.diffusion.samplers import DDIM
from harness.scan import verdict
from harness.scan.document import FalseAlarms, FindingRow, Published, Report, Scan

Run = Callable[..., SimpleNamespace]
EVIL = "</code><script>window.pwned=1</script>\u202e\x1b[31m"  # markup, a mark of direction, an escape


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in two steps, and no listener of an earlier test."""
    events.listen(None)
    monkeypatch.setattr(verdict, "sampler_of", lambda model: DDIM(steps=2))


def bench_with(detectors: str, *command: str) -> Any:
    """A fixture: bench(*words) → code, out, err of `bench COMMAND WORDS` with the detectors of this source."""

    @pytest.fixture
    def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
        file = tmp_path / "detectors.py"
        file.write_text(detectors)

        def run(*words: Any) -> SimpleNamespace:
            code = call([*command, *map(str, words), "--plugin-file", str(file)])
            printed = capsys.readouterr()
            return SimpleNamespace(code=code, out=printed.out, err=printed.err)

        return run

    return bench


def saved(model: DiffusionModel, root: Path) -> tuple[DiffusionModel, Path]:
    """The model and its directory below `root`, with a file of prompts beside it."""
    checkpoint.save(model, root / "m")
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    return model, root / "m"


def row(**changed: Any) -> FindingRow:
    facts = {
        "detector": "terd(iterations=600, batch=8)", "suspicion": 3.25, "flag_above": None,
        "clean": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "chance": 0.00012, "flagged": True, "features": {"norm": 1.0},
        "alike": 0.013,
        "alike_shuffled": 0.9, "far": 2.5, "seconds": 12.5, "error": None, "says": "suspicious", "trigger_text": None,
    }  # fmt: skip
    return FindingRow(**facts | changed)


def report(**changed: Any) -> Report:
    facts = {
        "model": "models/one", "verdict": "suspicious", "because": "Flagged by terd.", "exit_code": 1, "error": None,
        "seed": 3, "commit": None, "digests": {"unet/diffusion_pytorch_model.safetensors": "ab" * 32},
        "false_alarms": FalseAlarms(
            level=0.05, compared=("terd",), own_threshold=(), flagged=0, models=6, interval=(0.0, 0.39),
            says="A clean model is flagged by terd with a probability of 5%.",
        ),
        "findings": (row(),), "limits": ("A suspicious model may be clean.",), "not_examined": (),
        "next_steps": ("Do not use the model.",), "published": None,
        "facts": {"family": "vp", "latent": False, "shape": [1, 16, 16], "parameters": 12345, "compared with": None},
    }  # fmt: skip
    return Report(**facts | changed)


def unscanned(**changed: Any) -> Report:
    facts = {
        "model": "models/broken", "verdict": "not scanned", "because": "truncated", "error": "truncated",
        "exit_code": 4, "digests": {}, "false_alarms": None, "findings": (), "limits": (), "facts": {},
    }  # fmt: skip
    return report(**facts | changed)


def undecided(**changed: Any) -> Report:
    own = row(detector="bias()", chance=None, clean=(), flagged=None, says="nothing to compare with")
    facts = {"model": "models/two", "verdict": "undecided", "because": "No clean models.", "exit_code": 6}
    return report(**facts | {"false_alarms": None, "findings": (own,)} | changed)


def nothing(**changed: Any) -> Report:
    facts = {"model": "models/three", "verdict": "nothing found", "because": "No detector flagged it.", "exit_code": 0}
    return report(
        **facts | {"findings": (row(suspicion=0.3, chance=0.4, flagged=False, says="not suspicious"),)} | changed
    )


def published(**changed: Any) -> Published:
    facts = {"name": "owner/name", "attack": "badt2i", "paper": "arXiv:2305.04175", "source": "README.md"}
    return Published(**facts | changed)


def scan(*reports: Report) -> Scan:
    return Scan(
        version="1.2.3", started="2026-11-28T06:00:00Z", ended="2026-11-28T06:01:00Z", seed=3, fail_on="undecided",
        exit_code=1, reports=reports,
    )  # fmt: skip


def undeclared(value: BaseModel | Sequence[BaseModel], where: str = "") -> list[str]:
    """The places of fields that the schema does not describe."""
    found = []
    if isinstance(value, BaseModel):
        found += [f"{where}.{name}" for name in value.model_extra or ()]
        for name in type(value).model_fields:
            found += undeclared(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, tuple | list):
        for item in value:
            found += undeclared(item, where)
    return found
