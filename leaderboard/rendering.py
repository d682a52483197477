"""From templates to pages: text escaped, hidden characters shown, a policy that admits our own scripts and no other."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.runs.printable import one_line
from harness.runs.record import Record, bare
from leaderboard import rows
from leaderboard.columns import Column
from leaderboard.rows import Row
from leaderboard.specs import inside

ASSETS = Path(__file__).parent / "assets"
BESIDE = "'self' file:"
SAFE_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,60}")


@cache
def asset(name: str) -> Markup:
    """A style or script of ours, without the pointer to a source map."""
    text = (ASSETS / name).read_text(encoding="utf-8")
    return Markup(re.sub(r"(//|/\*)# sourceMappingURL=\S+( \*/)?\s*$", "", text))


def policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: these styles and scripts by hash (without styles: those beside the page), pictures
    from beside the page, nothing else."""

    def hashes(texts: Sequence[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    rules = ("default-src 'none'", f"script-src {hashes(scripts)}", f"style-src {hashes(styles) if styles else BESIDE}")
    return "; ".join((*rules, f"img-src {BESIDE}", "base-uri 'none'", "form-action 'none'"))


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(ASSETS / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_visible, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {
        "shown": shown, "bare": bare, "inside": inside, "slug": slug, "whisker": whisker,
        "nfe": lambda cell: ", ".join(map(str, cell.nfe)) or "–",
        "fixed": lambda x: "" if x is None else f"{x:.1f}", "judge_of": rows.judge_of,
        "megabytes": lambda x: "" if x is None else f"{x / 1e6:.0f}", "provenance": provenance,
    }  # fmt: skip
    return made


def _visible(value: Any) -> Any:
    """Text of records without characters that are obeyed or hidden."""
    return value if isinstance(value, Markup) else one_line(value)


def shown(value: float | None, column: Column) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value * (100 if column.percent else 1):.{column.digits}f}"


def slug(spec: str) -> str:
    """A file name for a defense: its own where that is a plain one, else a hash."""
    name = bare(spec)
    return name if SAFE_NAME.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:12]


def provenance(record: Record) -> list[tuple[str, str]]:
    """What a reader needs of a record's provenance."""
    found, model = record.provenance, rows.stated(record)
    versions = {"python": found.python, **found.versions}
    state = {True: " with uncommitted changes", False: "", None: " (unknown whether changed)"}[found.dirty]
    machine = (found.processor, found.machine, found.platform, *found.accelerators)
    return [
        ("model", f"version {model.version or 'unknown'}, sha256 {model.sha256 or 'unknown'}"),
        ("commit", f"{found.commit or 'unknown'}{state}"),
        ("machine", ", ".join(word for word in machine if word)),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)),
        ("network evaluations", str(found.nfe or "unknown")),
    ]


def whisker(row: Row, column: Column, kind: str) -> Markup:
    """Worst case with its interval, and the mean as an open dot, on a line from 0 to 1."""
    number, average = row.worst[column.score], row.mean[column.score]
    if math.isnan(number.value):
        return Markup("")
    worst, low, high, mean = (round(4 + 102 * min(1.0, max(0.0, x)), 1) for x in (number.value, *number.span, average))
    parts = [Markup('<path class="base" d="M4 10H106"/>')]
    if number.interval is not None:
        parts.append(Markup('<path class="range {}" d="M{} 10H{}"/>').format(kind, low, high))
    if len(row.cells) > 1:
        parts.append(Markup('<circle class="mean {}" cx="{}" cy="10" r="3.2"/>').format(kind, mean))
    parts.append(Markup('<circle class="{}" cx="{}" cy="10" r="4"/>').format(kind, worst))
    words = escape(f"{column.title}: worst {shown(number.value, column)}, mean {shown(average, column)}")
    body = Markup("").join(parts)
    return Markup('<svg class="whisker" viewBox="0 0 110 20" role="img" aria-label="{}">{}</svg>').format(words, body)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height from a WebP's header; (0, 0) for what is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=("WEBP",)) as picture:
            return picture.size
    except (OSError, Image.DecompressionBombError):
        return 0, 0
