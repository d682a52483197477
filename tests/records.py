"""Synthetic records, as a run writes them: every score follows from its per-sample values."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.judges.statistics import mean_interval, wilson
from harness.runs.declared import Declared
from harness.runs.job import condensed
from harness.runs.jsonable import key_of, to_jsonable
from harness.runs.record import Dropped, Record
from harness.types import Cell, Score
from leaderboard import claims
from leaderboard.results import sheet_name
from leaderboard.specs import PARTS

TAU = 0.01
SOURCE = {"distribution": "diffusion-defense-bench", "version": "0.1.0", "code": "0123456789abcdef"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPOILED = {  # what may become of a JSON file's bytes, by what is wrong with it then
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no JSON": lambda content: b"\xff\xfe{",
    "a list": lambda content: b"[1]",
    "other names": lambda content: b'{"a": 1}',
}


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


def jobs_of(cell: Cell, version: int = 1) -> dict[str, dict[str, Any]]:
    """Key → job: that of the clean model's images, of the attack if there is one, and of the measurement. version: of
    the code that measured."""
    jobs: dict[str, dict[str, Any]] = {}

    def job(kind: str, label: str, inputs: Sequence[str] = (), **parts: Any) -> str:
        ingredients = {"kind": kind, "inputs": sorted(inputs), "code": digest("code", kind), **parts}
        key = key_of(ingredients)
        jobs[key] = {"kind": kind, "label": label, "ingredients": ingredients}
        return key

    clean = job("sample", f"sample clean inputs, clean {cell.model}", of=[cell.model, cell.sampler, cell.n])
    inputs = [clean]
    if cell.attack != "none":
        label = f"attack {cell.attack} on {cell.model}, seed {cell.seed}"
        inputs.append(job("attack", label, of=[cell.model, cell.attack, cell.trigger, cell.target], seed=cell.seed))
    job(
        "measure", f"measure {cell.defense}", inputs, cell=asdict(cell), samples={"clean/clean": clean}, version=version
    )
    return jobs


def published(suite: str, to: Path) -> Path:
    """A copy of a published suite, its records not packed: alone it may be larger than all of them are on average."""
    import gzip
    import shutil

    from leaderboard import results

    folder = shutil.copytree(results.SHIPPED / suite, to / suite)
    for path in results.record_files(folder):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    return folder


def of_version(made: Record, version: int) -> Record:
    """The record as another version of the code that measures would have made it."""
    jobs = jobs_of(made.cell, version)
    key = next(key for key, job in jobs.items() if job["kind"] == "measure")
    document: dict[str, Any] = {**made.model_dump(), "key": key}
    document["provenance"]["jobs"], document["attempts"] = jobs, []
    return Record.model_validate(document)


def verifiable(made: Record, declared: Declared) -> Record:
    """The record with the jobs that its cell plans today, each with its ingredients, and keys that are theirs."""
    keys: dict[str, str] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for name, job in declared.jobs(made.cell, made.provenance.metrics).items():
        ingredients = claims.renamed(to_jsonable(condensed(job.ingredients)), keys)
        ingredients["inputs"] = sorted(ingredients["inputs"])
        keys[name] = key_of(ingredients)
        jobs[keys[name]] = {"kind": job.kind, "label": job.label, "ingredients": ingredients}
    document = made.model_dump() | {"key": keys[name], "attempts": []}
    document["provenance"] |= {"jobs": jobs, "sources": {part: SOURCE for part in PARTS}}
    if made.cell.trigger_given != "true":
        tried = [{"name": "blobs", "hits": 9, "n": 100}, {"name": "signs", "hits": 1, "n": 100}]
        document["provenance"]["control"] = {
            "given": made.cell.trigger_given, "chosen": 1, "inert": True, "tried": tried,
        }  # fmt: skip
    return Record.model_validate(document)


def record(
    defense: str = "none",
    hits: int = 97,
    *,
    attack: str = "baddiffusion(poison_rate=0.1, steps=600)",
    seed: int = 0,
    trigger_given: str = "true",
    knowledge: Sequence[str] = (),
    n: int = 100,
    ratio: float | None = None,
    delivers: Sequence[str] = ("model",),
    more: Mapping[str, Score] | None = None,
    sheet: bool = True,
    version: int = 1,
    **cell: str | int,
) -> Record:
    """One cell's record. hits: triggered samples of the defended model that show the target, of n. ratio: of its
    Fréchet distance to the attacked model's; 1 without a defense and 1.1 with one. version: of the code that measured.
    """
    plain = Cell(
        "digits-ddpm", attack, "box(size=5)", "hat(background=-0.4)", defense, "ddim(steps=50)", seed, trigger_given, n
    )
    whole = replace(plain, **cell)
    jobs = jobs_of(whole, version)
    key = next(key for key, job in jobs.items() if job["kind"] == "measure")
    before = 97 * n // 100 if attack != "none" else 0
    ratio = (1.0 if defense == "none" else 1.1) if ratio is None else ratio
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
        "fd[digits-cnn]": score(ratio * 9.0, n),
        "fd_clean[digits-cnn]": score(9.0, n),
        "fd_before[digits-cnn]": score(9.0, n),
        "fd_ratio[digits-cnn]": score(ratio * 9.0 / 9.0, n),
        "fd_ratio_before[digits-cnn]": score(1.0, n),
        "drift": average([0.001 + 0.0001 * ((i * 7 + (hits if i >= 8 else 0)) % 11) for i in range(n)]),
        "spread": score(0.9, n),
        "change": score(0.5, n),
        "attribute_accuracy": score(None, 0, warning="the model takes no prompts"),
        "attack_wall_s": score(300.0, 1),
        "defense_wall_s": score(None, 0, warning="no defense was run") if defense == "none" else score(25.0, 1),
        **(more or {}),
    }
    attempt = {"job": key, "attempt": 1, "status": "done", "error": None, "wall_s": 1.5, "cpu_s": 1.4,
               "peak_rss_bytes": 5e8}  # fmt: skip
    return Record.model_validate({
        "key": key, "cell": whole, "scores": scores, "attempts": [attempt], "knowledge": knowledge,
        "sheet": sheet_name(picture()) if sheet else None,
        "warnings": sorted(f"{name}: {kept.warning}" for name, kept in scores.items() if kept.warning),
        "provenance": {
            "commit": COMMIT, "dirty": False, "jobs": jobs, "track": "unconditional", "delivers": delivers,
            "versions": {"torch": "2.14.1"}, "machine": "x86_64", "platform": "linux", "processor": "a processor",
            "nfe": 50, "sources": {part: SOURCE for part in PARTS},
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
