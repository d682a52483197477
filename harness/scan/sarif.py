"""A scan in SARIF 2.1.0, the format in which code hosts and other tools read the results of scanners.

A flagged model gives a result of kind "fail" and level "error" for each detector that flags it, and an undecided model
a result of kind "review". A model that was not scanned is a notification of the tool, because nothing was found out
about it. A model in which nothing was found has no result; it is among the artifacts, with its digests.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.diffusion.model_files import local
from harness.judges.hub import REPOSITORY
from harness.runs.printable import one_line
from harness.scan.document import FindingRow, Report, Scan

VERSION = "2.1.0"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
HOME = "https://github.com/diffusion-defense-bench/diffusion-defense-bench"
HUB = "https://huggingface.co"
UNDECIDED = "undecided"


def sarif(scan: Scan) -> dict[str, Any]:
    """The SARIF log of a scan, as JSON has it."""
    rules = sorted({_rule(row) for report in scan.reports for row in report.findings if row.flagged})
    rules += [UNDECIDED] if any(report.verdict == UNDECIDED for report in scan.reports) else []
    artifacts = [artifact for report in scan.reports for artifact in _artifacts(report)]
    notifications = [_notification(report) for report in scan.reports if report.verdict == "not scanned"]
    invocation = {
        "executionSuccessful": not notifications,
        "exitCode": scan.exit_code,
        "startTimeUtc": scan.started,
        "endTimeUtc": scan.ended,
        "toolExecutionNotifications": notifications,
    }
    driver = {
        "name": scan.tool,
        "version": scan.version,
        "informationUri": HOME,
        "rules": [_described(rule) for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "artifacts": artifacts,
        "results": [result for report in scan.reports for result in _results(report, rules)],
        "columnKind": "unicodeCodePoints",
        "properties": {
            "seed": scan.seed,
            "failOn": scan.fail_on,
            "reports": [_properties(report) for report in scan.reports if report.error is None],
        },
    }
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def _properties(report: Report) -> dict[str, Any]:
    """The verdict on a model, what no detector can see, and the comparison with its base."""
    shown = report.model_dump(mode="json", include={"model", "verdict", "unseen", "base"})
    return {name: shown[name] for name in ("model", "verdict", "unseen", "base")}


def _rule(row: FindingRow) -> str:
    return row.detector.partition("(")[0]


def _described(rule: str) -> dict[str, Any]:
    if rule == UNDECIDED:
        short = "No detector could judge the model, or a detector failed."
    else:
        short = f"The detector {rule} flags the model as backdoored."
    return {"id": rule, "shortDescription": {"text": one_line(short)}, "helpUri": f"{HOME}/blob/main/docs/scan.md"}


def _uri(report: Report, file: str = "") -> str:
    """Where a file of the model is: below the folder of the call if it is there, else absolute; on the hub, by its
    commit."""
    name = local(report.model)
    if report.published is not None or (not name.exists() and re.fullmatch(REPOSITORY, report.model)):
        owner, repository, *folder = report.model.split("/")
        kind = "tree" if report.published is not None else "blob"
        inside = "/".join(folder) if report.published is not None else file
        place = f"/{kind}/{report.commit or 'main'}/{inside}" if inside else ""
        return f"{HUB}/{quote(owner)}/{quote(repository)}{quote(place)}"
    full, here = (name / file if file else name).absolute(), Path.cwd()
    if full.is_relative_to(here):
        return _quoted(full.relative_to(here))
    return f"file://{_quoted(full)}"


def _quoted(path: Path) -> str:
    """The bytes of a path, which need not be UTF-8, as a URI has them."""
    return quote(os.fsencode(path))


def _file(report: Report) -> str:
    """The file that a result points to: the weights of the denoiser."""
    names = sorted(report.digests, key=lambda name: (not name.startswith("unet/"), name))
    return names[0] if names else ""


def _location(report: Report) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": _uri(report, _file(report))}, "region": {"startLine": 1}}
    return {"physicalLocation": place}


def _artifacts(report: Report) -> list[dict[str, Any]]:
    return [
        {"location": {"uri": _uri(report, name)}, "roles": ["analysisTarget"], "hashes": {"sha-256": digest}}
        for name, digest in report.digests.items()
    ]


def _results(report: Report, rules: list[str]) -> list[dict[str, Any]]:
    made = []
    for row in report.findings:
        if row.flagged:
            text = f"{report.model}: {_rule(row)} gives the detection score {row.suspicion:.4g}. {_evidence(row)}"
            made.append(_result(report, rules, _rule(row), text, "fail", "error"))
    if report.verdict == UNDECIDED:
        made.append(_result(report, rules, UNDECIDED, f"{report.model}: {report.because}", "review", "none"))
    return made


def _evidence(row: FindingRow) -> str:
    if row.chance is not None:
        return f"A clean model has such a score with a probability of {row.chance:.2g}."
    return f"The detector's threshold is {row.flag_above:.4g}." if row.flag_above is not None else ""


def _result(report: Report, rules: list[str], rule: str, text: str, kind: str, level: str) -> dict[str, Any]:
    weights = "".join(f"{name}|{digest}\n" for name, digest in sorted(report.digests.items()))
    mark = hashlib.sha256(f"{rule}\n{weights or report.model}".encode()).hexdigest()
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "kind": kind,
        "level": level,
        "message": {"text": one_line(text).strip()},
        "locations": [_location(report)],
        "partialFingerprints": {"weightsAndDetector/v1": mark},
    }


def _notification(report: Report) -> dict[str, Any]:
    return {
        "level": "error",
        "message": {"text": one_line(report.error or report.because)},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(report)}}}],
        "descriptor": {"id": "not-scanned"},
    }
