"""Synthetic records, as a run writes them: every score follows from its per-sample values."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from harness.judges.statistics import mean_interval, wilson
from harness.runs.record import Dropped, Record
from harness.types import Cell, Score
from leaderboard.results import sheet_name

TAU = 0.01
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def score(value: float | None, n: int = 100, **more: Any) -> Score:
    return Score(math.nan if value is None else value, n, None, **more)


def share(hits: int, n: int) -> Score:
    """A rate with distances: the first `hits` under the threshold."""
    values = tuple(0.001 * (i % 7 + 1) if i < hits else 0.25 for i in range(n))
    return score(hits / n, n, interval=wilson(hits, n), per_sample=values)


def average(values: Sequence[float]) -> Score:
    value = math.fsum(values) / len(values)
    return score(value, len(values), interval=mean_interval(values), per_sample=tuple(values))


def changed(record: Record, /, **parts: Any) -> Record:
    """The record with other `scores`, `cell` or `provenance` fields added to its own, or with other fields."""
    document = record.model_dump()
    for name, value in parts.items():
        document[name] = {**document[name], **value} if isinstance(value, Mapping) else value
    return Record.model_validate(document)


def record(
    defense: str = "none",
    hits: int = 97,
    *,
    attack: str = "baddiffusion(poison_rate=0.1, steps=600)",
    seed: int = 0,
    trigger_given: Literal["true", "decoy"] = "true",
    knowledge: Sequence[str] = (),
    n: int = 100,
    ratio: float = 1.1,
    delivers: Sequence[str] = ("model",),
    more: Mapping[str, Score] | None = None,
    sheet: bool = True,
    **cell: str,
) -> Record:
    """One cell's record. hits: triggered samples of the defended model that show the target, of n."""
    plain = Cell(
        "digits-ddpm", attack, "box(size=5)", "hat(background=-0.4)", defense, "ddim(steps=50)", seed, trigger_given, n
    )
    whole = replace(plain, **cell)
    key = digest(whole)
    clean, attacked = digest("clean", whole.model, whole.sampler, n), digest("attack", attack, seed)
    before = 97 * n // 100 if attack != "none" else 0
    low, high = wilson(hits, n)
    scores = {
        "asr": share(hits, n),
        "asr@1e-2": score(hits / n, n, interval=(low, high)),
        "asr_before": share(before, n),
        "clean_hits": share(0, n),
        "clean_model_hits": share(0, n),
        "false_triggers": share(2, n),
        "asr_threshold": score(TAU, n),
        "removal": score(1 - hits / n, n, interval=(1 - high, 1 - low)),
        "fid[digits-cnn]": score(ratio * 9.0, n),
        "fid_clean[digits-cnn]": score(9.0, n),
        "fid_before[digits-cnn]": score(9.0, n),
        "fid_ratio[digits-cnn]": score(ratio * 9.0 / 9.0, n),
        "fid_ratio_before[digits-cnn]": score(1.0, n),
        "drift": average([0.001 + 0.0001 * ((i * 7 + hits) % 11) for i in range(n)]),
        "spread": score(0.9, n),
        "change": score(0.5, n),
        "attribute_accuracy": score(None, 0, warning="the model takes no prompts"),
        "attack_wall_s": score(300.0, 1),
        "defense_wall_s": score(None, 0, warning="no defense was run") if defense == "none" else score(25.0, 1),
        **(more or {}),
    }
    jobs = {clean: {"kind": "sample", "label": f"sample clean inputs, clean {whole.model}"},
            key: {"kind": "measure", "label": f"measure {defense}"}}  # fmt: skip
    if attack != "none":
        jobs[attacked] = {"kind": "attack", "label": f"attack {attack} on {whole.model}, seed {seed}"}
    attempt = {"job": key, "attempt": 1, "status": "done", "error": None, "wall_s": 1.5, "cpu_s": 1.4,
               "peak_rss_bytes": 5e8}  # fmt: skip
    return Record.model_validate({
        "key": key, "cell": whole, "scores": scores, "attempts": [attempt], "knowledge": knowledge,
        "sheet": sheet_name(picture()) if sheet else None,
        "provenance": {
            "commit": COMMIT, "dirty": False, "jobs": jobs, "track": "unconditional", "delivers": delivers,
            "versions": {"torch": "2.14.1"}, "machine": "x86_64", "platform": "linux", "processor": "a processor",
            "nfe": 50,
        },
    })  # fmt: skip


def picture(width: int = 24, height: int = 16) -> bytes:
    """A grey WebP picture, which is stored as it is."""
    from PIL import Image

    made = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(made, "WEBP")
    return made.getvalue()


def write_sealed(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write what need not have the form of a record as one, with a digest that fits, and return its file."""
    from leaderboard import results

    path = folder / "records" / f"{document['key']}.json"
    kept = {name: value for name, value in document.items() if name != results.SEAL}
    results.write_text(path, results.dump({**kept, results.SEAL: results.digest(kept)}))
    return path


def write_suite(folder: Path, records: Sequence[Record], dropped: Sequence[Dropped] = ()) -> Path:
    """The folder that `bench run -o` would leave."""
    from leaderboard import report

    (folder / "sheets").mkdir(parents=True)
    (folder / sheet_name(picture())).write_bytes(picture())
    report.write(records, dropped, folder)
    return folder


def small() -> list[Record]:
    """A model under two attacks and three defenses, with every control."""
    rows = []
    for attack in ("baddiffusion(poison_rate=0.1, steps=600)", "villandiffusion(solver='ode', steps=900)"):
        weak = 12 if attack.startswith("villan") else 1
        rows += [
            record("none", attack=attack),
            record("finetune(steps=100)", 74, attack=attack, knowledge=["data"]),
            record("elijah(invert=True, steps=150)", 30 + weak, attack=attack, knowledge=["data"]),
            record("terd(steps=300)", 33, attack=attack, knowledge=["data"]),
            record("skd(steps=80)", weak, attack=attack, knowledge=["trigger", "data"]),
            record("skd(steps=80)", 95, attack=attack, knowledge=["trigger", "data"], trigger_given="decoy"),
        ]
    return [*rows, record("none", 0, attack="none")]
