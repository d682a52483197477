"""The report of `bench scan` as one HTML file: no scripts, nothing fetched, every text escaped. Names and texts in it
come from the model under test, which is hostile."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from harness.runs.printable import printable

if TYPE_CHECKING:
    from torch import Tensor

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left }
img { image-rendering: pixelated; max-width: 100%; border: 1px solid #ccc } figure { margin: 1rem 0 }
.verdict { font-size: 1.5rem; padding: .5rem 1rem; border-left: .5rem solid #999; background: #f4f4f4 }
.suspicious { border-color: #b00 } .nothing { border-color: #285 } code { overflow-wrap: anywhere }
"""


def page(document: Mapping[str, Any], figures: Sequence[tuple[str, Tensor]]) -> str:
    """document: what `bench scan --json` prints. figures: (caption, picture (3, H, W) in [-1, 1])."""
    kind = str(document["verdict"]).split()[0]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        f"<title>{_text(document['model'])}: {_text(document['verdict'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>Scan of <code>{_text(document['model'])}</code></h1>",
        f'<p class="verdict {escape(kind)}">{_text(document["verdict"])}</p>',
        f"<p>{_text(document['because'])}</p>",
        "<h2>Detectors</h2>",
        _table(document["findings"]),
        "<h2>Samples</h2>",
        *(f"<figure><figcaption>{_text(caption)}</figcaption>{_image(image)}</figure>" for caption, image in figures),
        "<h2>What this scan cannot know</h2>",
        f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in document['limits'])}</ul>",
        "<h2>The model</h2>",
        _facts(document["facts"]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _text(value: Any) -> str:
    return escape(printable(value), quote=True)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(findings: Sequence[Mapping[str, Any]]) -> str:
    head = ("detector", "says", "suspicion", "clean models", "chance of a clean one", "own threshold", "images alike")
    rows = []
    for found in findings:
        clean = found["clean"]
        spread = f"{_number(min(clean))} to {_number(max(clean))} ({len(clean)})" if clean else "unknown"
        cells = (
            found["detector"], found["says"], _number(found["suspicion"]), spread, _number(found["chance"]),
            _number(found["flag_above"]), _number(found["alike"]),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>{''.join(rows)}</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _image(image: Tensor) -> str:
    from PIL import Image

    from harness.diffusion.images import to_uint8

    png = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(png, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
