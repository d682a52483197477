"""What `bench scan` prints and writes: text, JSON, SARIF and HTML of one scan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from harness.cli import Exit
from harness.cli.common import columns, echo, naming
from harness.runs.jsonable import to_jsonable
from harness.runs.printable import one_line, printable, printable_json

if TYPE_CHECKING:
    from torch import Tensor

    from harness.scan.document import FindingRow, Report, Scan

ENDINGS = {".html": "html", ".htm": "html", ".json": "json", ".sarif": "sarif", ".txt": "text"}
WORST = (Exit.failed, Exit.bug, Exit.missing, Exit.plugin, Exit.usage, Exit.undecided, Exit.ok)  # of several models


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def scan_of(reports: Sequence[dict[str, Any]], started: str, seed: int, fail_on: str) -> Scan:
    """The document of a scan. Its exit code is the worst of its reports."""
    from harness.scan.document import Report, Scan

    made = tuple(Report.model_validate(to_jsonable(report)) for report in reports)
    codes = {report.exit_code for report in made}
    worst = next((code for code in WORST if code in codes), max(codes, default=Exit.ok))
    return Scan(
        version=version("diffusion-defense-bench"), started=started, ended=now(), seed=seed,
        fail_on=cast(Literal["suspicious", "undecided"], fail_on), exit_code=int(worst), reports=made,
    )  # fmt: skip


def show(
    scan: Scan,
    figures: Sequence[Sequence[tuple[str, Tensor]]],
    form: str | None,
    outs: Sequence[Path],
    quiet: bool,
    single: bool,
) -> None:
    """Print the scan, then write its files.

    form: what is printed, text by default; if a file of this format is written, text. single: JSON of the one report
    instead of the scan.
    """
    files = [(path, ENDINGS.get(path.suffix.lower(), form or "html")) for path in outs]
    printed = form if form is not None and form not in {kind for _, kind in files} else "text"
    render: dict[str, Callable[[], str]] = {
        "text": lambda: text(scan),
        "json": lambda: _json(scan.reports[0] if single else scan),
        "sarif": lambda: _sarif(scan),
        "html": lambda: _html(scan, figures),
    }
    failed = len(scan.reports) == 1 and scan.reports[0].error is not None
    if printed != "text":
        click.echo(render[printed](), nl=False)
    elif not quiet and not failed:  # one model that was not scanned is an error of the command
        echo(render["text"](), nl=False)
    for path, kind in files:
        place = path.expanduser()
        with naming(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(render[kind](), encoding="utf-8")
        if printed == "text" and not quiet:
            echo(f"report: {path}")


def _json(value: Report | Scan) -> str:
    return printable_json(json.dumps(to_jsonable(value), indent=1, ensure_ascii=False)) + "\n"


def _sarif(scan: Scan) -> str:
    from harness.scan.sarif import sarif

    return printable_json(json.dumps(sarif(scan), indent=1, ensure_ascii=False)) + "\n"


def _html(scan: Scan, figures: Sequence[Sequence[tuple[str, Tensor]]]) -> str:
    from harness.scan import report

    return report.page(scan, figures)


def text(scan: Scan) -> str:
    """The scan for a terminal: each report, and for several models a table."""
    lines = [line for report in scan.reports if report.error is None for line in _lines(report)]
    if len(scan.reports) > 1:
        lines += [*([""] if lines else []), _table(scan)]
    return printable("\n".join(lines) + "\n", keep="\n\t")


def _lines(report: Report) -> list[str]:
    from harness.scan import families

    lines = [f"{one_line(report.model)}: {report.verdict}. {one_line(report.because)}"]
    rows = [("detector", "suspicion", "clean models", "chance", "says")]
    for row in report.findings:
        spread = f"{min(row.clean):.4g} to {max(row.clean):.4g}" if row.clean else "unknown"
        numbers = ["" if value is None else f"{value:.4g}" for value in (row.suspicion, row.chance)]
        rows.append((row.detector.partition("(")[0], numbers[0], spread, numbers[1], one_line(row.says)))
    lines.append(columns(rows, indent="  "))
    lines += [shown for row in report.findings if (shown := _evidence(row))]
    if report.false_alarms is not None:
        lines.append(f"false alarms: {report.false_alarms.says}")
    if report.adapter is not None:
        lines.append(f"the adapter {one_line(report.adapter.file)}:")
        lines += [f"  {one_line(line)}" for line in report.adapter.says]
    if report.embedding is not None:
        lines.append(f"the embedding {one_line(report.embedding.file)}:")
        lines += [f"  {one_line(line)}" for line in report.embedding.says]
    if report.base is not None:
        lines.append(f"compared with {one_line(report.base.base)}:")
        lines += [f"  {one_line(line)}" for line in report.base.says]
    if report.unseen:
        lines.append("no detector asked here can see:")
        lines += [f"  {one_line(families.said(family))}" for family in report.unseen]
    lines += [f"- {one_line(line)}" for line in report.limits]
    lines += [f"next: {one_line(line)}" for line in report.next_steps]
    return lines


def _evidence(row: FindingRow) -> str:
    """What the images with a recovered trigger show, in a line; "" without a trigger."""
    if row.alike is None:
        return ""
    beside = "" if row.alike_shuffled is None else f" ({row.alike_shuffled:.2g} with its pixels shuffled)"
    far = "" if row.far is None else f", and they are {row.far:.2g} times as far from plain images as those are"
    name = row.detector.partition("(")[0]
    return f"  images with the trigger of {name}: they differ {row.alike:.2g} times as much as plain ones{beside}{far}"


def _table(scan: Scan) -> str:
    known = any(report.published for report in scan.reports)
    head = ("model", "attack", "paper", "verdict", "reason") if known else ("model", "verdict", "reason")
    rows: list[tuple[str, ...]] = [head]
    for report in scan.reports:
        told = report.published
        about = (told.attack if told else "", told.paper if told else "") if known else ()
        rows.append((one_line(report.model), *about, report.verdict, one_line(report.because)))
    counts = ", ".join(f"{sum(r.verdict == v for r in scan.reports)} {v}" for v in _verdicts(scan))
    return f"{columns(rows)}\n{len(scan.reports)} models: {counts}"


def _verdicts(scan: Scan) -> list[str]:
    from harness.scan.document import WORST_FIRST

    return [verdict for verdict in WORST_FIRST if any(report.verdict == verdict for report in scan.reports)]
