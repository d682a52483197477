"""From templates to pages: text escaped, hidden characters shown, a policy that admits our own scripts and no other."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from leaderboard import report, summary
from leaderboard.summary import Cell, Figure, Row
from leaderboard.tables import bare, ends, network_evaluations

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
        "shown": shown, "ends": lambda number, figure: ends(number, figure.percent), "bare": bare, "inside": inside,
        "slug": slug, "whisker": whisker, "nfe": nfe,
        "fixed": lambda x: "" if x is None else f"{x:.1f}", "inside_square": summary.judge,
        "megabytes": lambda x: "" if x is None else f"{x / 1e6:.0f}", "provenance": provenance,
    }  # fmt: skip
    return made


def _visible(value: Any) -> Any:
    """Text of records without characters that are obeyed or hidden."""
    return report.plain(value) if type(value) is str else value


def shown(value: float | None, figure: Figure) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value * (100 if figure.percent else 1):.{figure.digits}f}"


def inside(spec: str) -> str:
    """What stands between the brackets of a spec."""
    return spec.partition("(")[2].removesuffix(")")


def slug(spec: str) -> str:
    """A file name for a defense: its own where that is a plain one, else a hash."""
    name = bare(spec)
    return name if SAFE_NAME.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:12]


def nfe(cell: Cell) -> str:
    return ", ".join(map(str, network_evaluations(cell.records))) or "–"


def provenance(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a reader needs of a record's provenance."""
    found = found or {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted((found.get("versions") or {}).items()))
    machine = ("processor", "machine", "platform")
    state = {"True": " with uncommitted changes", "False": ""}.get(
        str(found.get("dirty")), " (unknown whether changed)"
    )
    return [
        ("commit", f"{found.get('commit') or 'unknown'}{state}"),
        ("machine", ", ".join([*(str(found[k]) for k in machine if found.get(k)), *(found.get("accelerators") or ())])),
        ("versions", versions),
        ("network evaluations", str(found.get("nfe") or "unknown")),
    ]


def whisker(row: Row, figure: Figure, kind: str) -> Markup:
    """Worst case with its interval, and the mean as an open dot, on a line from 0 to 1."""
    number = row.worst[figure.score]
    if math.isnan(number.value):
        return Markup("")
    at = [round(4 + 102 * min(1.0, max(0.0, x)), 1) for x in (number.value, number.low or 0, number.high or 0)]
    parts = [Markup('<path class="base" d="M4 10H106"/>')]
    if number.low is not None:
        parts.append(Markup('<path class="range {}" d="M{} 10H{}"/>').format(kind, at[1], at[2]))
    mean = round(4 + 102 * min(1.0, max(0.0, row.mean[figure.score])), 1)
    if len(row.cells) > 1:
        parts.append(Markup('<circle class="mean {}" cx="{}" cy="10" r="3.2"/>').format(kind, mean))
    parts.append(Markup('<circle class="{}" cx="{}" cy="10" r="4"/>').format(kind, at[0]))
    words = escape(f"{figure.title}: worst {shown(number.value, figure)}, mean {shown(row.mean[figure.score], figure)}")
    body = Markup("").join(parts)
    return Markup('<svg class="whisker" viewBox="0 0 110 20" role="img" aria-label="{}">{}</svg>').format(words, body)


def script_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from a PNG's header; (0, 0) for what is none."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return 0, 0
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        return 0, 0
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
