"""The report of `bench scan` as one HTML file: no scripts, nothing fetched, every text escaped. Names and texts in it
come from the model under test, which is hostile."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from harness.runs.printable import one_line
from harness.scan import families
from harness.scan.document import WORST_FIRST, FindingRow, Report, Scan

if TYPE_CHECKING:
    from jinja2 import Environment
    from torch import Tensor

Figures = Sequence[tuple[str, "Tensor"]]  # caption, picture (3, H, W) in [-1, 1]
NAMES = {
    "family": "noise",
    "latent": "denoises latents",
    "conditional": "takes prompts",
    "shape": "shape of what is denoised",
    "parameters": "weights of the denoiser",
    "level": "clean models that may be flagged",
    "its own label": "what its bench.json says, not believed",
}
FAMILIES = {"vp": "variance preserving", "ve": "variance exploding", "flow": "flow matching"}


def page(scan: Scan, figures: Sequence[Figures]) -> str:
    """The page of a scan. figures: for each report in turn, its captioned pictures."""
    style = _style()
    one = scan.reports[0] if len(scan.reports) == 1 else None
    return (
        _environment()
        .get_template("scan.html.jinja")
        .render(
            scan=scan, title=f"{one.model}: {one.verdict}" if one else f"Scan of {len(scan.reports)} models",
            figures=[[(caption, _image(picture)) for caption, picture in each] for each in figures],
            style=Markup(style), policy=escape(_policy(style)),
            published=any(report.published for report in scan.reports),
        )
    )  # fmt: skip


def _style() -> str:
    """The style sheet of the leaderboard, and what is added to it here."""
    shared = resources.files("leaderboard").joinpath("assets", "page.css").read_text(encoding="utf-8")
    own = resources.files("harness").joinpath("templates", "scan.css").read_text(encoding="utf-8")
    return shared + own


def _policy(style: str) -> str:
    """A Content-Security-Policy that admits this style sheet and pictures in the page itself, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("harness", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_visible, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {
        "kind": lambda verdict: str(verdict).split()[0],
        "bare": lambda spec: spec.partition("(")[0],
        "number": _number,
        "duration": _duration,
        "yardstick": _yardstick,
        "tried": lambda rows: [row for row in rows if row.alike is not None or row.trigger_text],
        "tally": _tally,
        "command": _command,
        "told": _told,
        "family": families.said,
    }
    return made


def _visible(value: Any) -> Any:
    """Text without characters that are obeyed or hidden."""
    return value if isinstance(value, Markup) else one_line(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _yardstick(row: FindingRow) -> str:
    """By what the score is judged, in words."""
    if row.error is not None:
        return "–"
    if row.clean:
        spread = f"{min(row.clean):.4g} to {max(row.clean):.4g} of {len(row.clean)} clean models"
        return spread if row.chance is None else f"{spread}; a clean model scores as high with p = {row.chance:.2g}"
    return "no clean models known" if row.flag_above is None else f"its own threshold: flags above {row.flag_above:.4g}"


def _tally(reports: Sequence[Report]) -> list[tuple[str, int]]:
    """Outcome → number of models, the worst first."""
    counts = [(verdict, sum(report.verdict == verdict for report in reports)) for verdict in WORST_FIRST]
    return [(verdict, count) for verdict, count in counts if count]


def _command(line: str) -> Markup:
    """A next step; the call of bench at its end is set as code."""
    step, found, call = line.partition(": bench ")
    if not found:
        return escape(one_line(line))
    return Markup("{}: <code>bench {}</code>").format(one_line(step), one_line(call))


def _told(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as a reader has them: no names of types, no brackets."""
    return [(NAMES.get(name, name), _value(name, value)) for name, value in facts.items()]


def _value(name: str, value: Any) -> str:
    if name == "level" and isinstance(value, float):
        return f"{value:.0%}"
    return FAMILIES.get(value, said(value)) if name == "family" else said(value)


def said(value: Any) -> str:
    """A fact in words: yes and no, "none", 1×16×16, 12,345."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        whole = all(isinstance(each, int) for each in value)
        return ("×" if whole else ", ").join(map(said, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {said(each)}" for name, each in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _image(image: Tensor) -> str:
    """A picture (3, H, W) in [-1, 1] as a data address."""
    from PIL import Image

    from harness.diffusion.images import to_uint8

    png = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
