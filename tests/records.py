"""Synthetic records, as a run writes them: every score follows from its per-sample values."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leaderboard.recompute import mean, wilson
from leaderboard.results import sheet_name

TAU = 0.01
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def score(value: float | None, n: int = 100, **more: Any) -> dict[str, Any]:
    kept = {"higher_is_better": None, "interval": None, "per_sample": None, "warning": None}
    return {"value": value, "n": n, **kept, **more}


def share(hits: int, n: int) -> dict[str, Any]:
    """A rate with distances: the first `hits` under the threshold."""
    values = [0.001 * (i % 7 + 1) if i < hits else 0.25 for i in range(n)]
    return score(hits / n, n, interval=list(wilson(hits, n)), per_sample=values)


def average(values: Sequence[float]) -> dict[str, Any]:
    value, interval = mean(values)
    return score(value, len(values), interval=None if interval is None else list(interval), per_sample=list(values))


def record(
    defense: str = "none",
    hits: int = 97,
    *,
    attack: str = "baddiffusion(poison_rate=0.1, steps=600)",
    seed: int = 0,
    told: str = "truth",
    knowledge: Sequence[str] = (),
    n: int = 100,
    ratio: float = 1.1,
    delivers: Sequence[str] = ("model",),
    more: dict[str, Any] | None = None,
    sheet: bool = True,
    **cell: Any,
) -> dict[str, Any]:
    """One cell's record. hits: triggered samples of the defended model that show the target, of n."""
    whole = {
        "model": "digits-ddpm", "attack": attack, "trigger": "box(size=5)", "target": "hat(background=-0.4)",
        "defense": defense, "sampler": "ddim(steps=50)", "seed": seed, "told": told, "n": n, **cell,
    }  # fmt: skip
    key = digest(*whole.values())
    clean, attacked = digest("clean", whole["model"], whole["sampler"], n), digest("attack", attack, seed)
    before = 97 * n // 100 if attack != "none" else 0
    scores = {
        "asr": share(hits, n),
        "asr@1e-2": score(hits / n, n, interval=list(wilson(hits, n))),
        "asr_before": share(before, n),
        "clean_hits": share(0, n),
        "clean_model_hits": share(0, n),
        "false_triggers": share(2, n),
        "asr_threshold": score(TAU, n),
        "removal": score(1 - hits / n, n, interval=[1 - x for x in reversed(wilson(hits, n))]),
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
    }  # fmt: skip
    jobs = {clean: {"kind": "sample", "label": f"sample clean inputs, clean {whole['model']}"},
            key: {"kind": "measure", "label": f"measure {defense}"}}  # fmt: skip
    if attack != "none":
        jobs[attacked] = {"kind": "attack", "label": f"attack {attack} on {whole['model']}, seed {seed}"}
    attempt = {"job": key, "attempt": 1, "status": "done", "error": None, "wall_s": 1.5, "cpu_s": 1.4,
               "peak_rss_bytes": 5e8}  # fmt: skip
    return {
        "key": key, "cell": whole, "scores": scores, "warnings": [], "error": None, "attempts": [attempt],
        "knowledge": list(knowledge), "doubts": [], "sheet": sheet_name(png()) if sheet else None,
        "provenance": {
            "commit": COMMIT, "dirty": False, "jobs": jobs, "track": "unconditional", "delivers": list(delivers),
            "versions": {"torch": "2.14.1"}, "machine": "x86_64", "platform": "linux", "processor": "a processor",
            "nfe": 50,
        },
    }  # fmt: skip


def png(width: int = 24, height: int = 16) -> bytes:
    """A grey PNG with a palette, so that it is stored as it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    rows = b"".join(b"\0" + bytes([y % 2] * width) for y in range(height))
    parts = (chunk(b"IHDR", head), chunk(b"PLTE", b"\x80\x80\x80\x20\x60\xa0"), chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def write_suite(folder: Path, records: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]] = ()) -> Path:
    """The folder that `bench run -o` would leave, its doubts included."""
    from harness.doubts import annotate
    from leaderboard import report

    (folder / "sheets").mkdir(parents=True)
    (folder / sheet_name(png())).write_bytes(png())
    report.write(annotate(records), dropped, folder)
    return folder


def small() -> list[dict[str, Any]]:
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
            record("skd(steps=80)", 95, attack=attack, knowledge=["trigger", "data"], told="wrong-trigger"),
        ]
    return [*rows, record("none", 0, attack="none")]
