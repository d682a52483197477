"""Charts as static SVG: points with their names beside them, and curves. Text is escaped; colours are CSS classes, so
that one picture serves a light and a dark page. `standalone` adds the colours for use as a file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 204, 16, 46  # margins; names stand in the right one
MOST = 14  # names that fit beside each other
LINE = 19  # height of a name
STYLE = """
svg{font:13px system-ui,sans-serif}
.axis{stroke:#8a8f98;fill:none}.grid{stroke:#8a8f98;stroke-opacity:.2}.tick,.label{fill:#5b616b}.name{fill:#1c2024}
.lead{stroke:#8a8f98;stroke-opacity:.55;fill:none}.blind{fill:#1f6fb2}.given{fill:#b3591b}.control{fill:#8a8f98}
.curve{fill:none;stroke-width:2}.s0{stroke:#1f6fb2}.s1{stroke:#b3591b}.s2{stroke:#2c7d4f}.s3{stroke:#8646a8}
.s4{stroke:#a8324a}.s5{stroke:#6b7280}
@media(prefers-color-scheme:dark){.tick,.label{fill:#a3aab5}.name{fill:#e6e8eb}.blind{fill:#62b0f0}.given{fill:#f0975a}
.s0{stroke:#62b0f0}.s1{stroke:#f0975a}.s2{stroke:#6cc792}.s3{stroke:#c79be0}.s4{stroke:#ee8296}.s5{stroke:#a3aab5}}
"""


@dataclass(frozen=True)
class Point:
    """kind: "blind" (not given the trigger), "given" or "control"; each has a shape of its own."""

    name: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Axis:
    """label: with its unit. low, high: ends; the data's own where None. log: powers of ten."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Curve:
    name: str
    x: Sequence[float]
    y: Sequence[float]


def scatter(points: Sequence[Point], x: Axis, y: Axis, title: str, standalone: bool = False) -> str:
    """Points, each with its name at the right and a line to it; of more than 14 the rest has a tooltip only."""
    points = [p for p in points if _drawable(p.x, x) and _drawable(p.y, y)]
    if not points:
        return ""
    to_x, ticks_x = _scale(x, [p.x for p in points], LEFT, WIDTH - RIGHT)
    to_y, ticks_y = _scale(y, [p.y for p in points], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, ticks_x, ticks_y, to_x, to_y)
    places = [(to_x(p.x), to_y(p.y)) for p in points]
    named = sorted(range(len(points)), key=lambda i: (points[i].kind == "control", i))[:MOST]
    named.sort(key=lambda i: (places[i][1], -places[i][0]))  # so that the lines of equal heights do not cross
    heights = spread([places[i][1] for i in named], LINE, TOP + 6, HEIGHT - BOTTOM)
    for i, height in zip(named, heights, strict=True):
        across, up = places[i]
        edge = WIDTH - RIGHT + 14
        parts.append(f'<path class="lead" d="M{_n(across)} {_n(up)}L{edge - 6} {_n(height)}h4"/>')
        parts.append(f'<text class="name" x="{edge}" y="{_n(height + 4)}">{escape(_short(points[i].name))}</text>')
    for point, (across, up) in zip(points, places, strict=True):
        parts.append(_mark(point, across, up, f"{x.label} {point.x:.4g}, {y.label} {point.y:.4g}"))
    return _svg(parts, title, standalone)


def curves(lines: Sequence[Curve], x: Axis, y: Axis, title: str, standalone: bool = False) -> str:
    """Up to 6 curves, told apart by colour, dashes and the names at the right."""
    if not lines:
        return ""
    to_x, ticks_x = _scale(x, [v for line in lines for v in line.x], LEFT, WIDTH - RIGHT)
    to_y, ticks_y = _scale(y, [v for line in lines for v in line.y], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, ticks_x, ticks_y, to_x, to_y)
    for i, line in enumerate(lines[:6]):
        path = "L".join(f"{_n(to_x(a))} {_n(to_y(b))}" for a, b in zip(line.x, line.y, strict=True))
        dash = f' stroke-dasharray="{7 - i} {i + 1}"' if i else ""
        parts.append(f'<path class="curve s{i}"{dash} d="M{path}"><title>{escape(line.name)}</title></path>')
        edge, height = WIDTH - RIGHT + 14, TOP + 14 + i * LINE
        parts.append(f'<path class="curve s{i}"{dash} d="M{edge} {height - 4}h18"/>')
        parts.append(f'<text class="name" x="{edge + 24}" y="{height}">{escape(_short(line.name))}</text>')
    return _svg(parts, title, standalone)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near `wanted`, in their order, at least `gap` apart and between low and high where that is possible."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    found: list[float] = []
    for i in order:
        found.append(max(wanted[i], low if not found else found[-1] + gap))
    ceiling = high
    for k in reversed(range(len(found))):
        found[k] = min(found[k], ceiling)
        ceiling = found[k] - gap
    out = [0.0] * len(wanted)
    for k, i in enumerate(order):
        out[i] = found[k]
    return out


# ---- parts ----------------------------------------------------------------------------------------------------------


def _drawable(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (not axis.log or value > 0)


def _scale(
    axis: Axis, values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
        last = max(last, first + 1)
        ticks = [10.0**k for k in range(first, last + 1)]
        return lambda v: start + (end - start) * (math.log10(v) - first) / (last - first), ticks
    ticks = nice(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    return lambda v: start + (end - start) * (v - low) / (high - low), ticks


def nice(low: float, high: float) -> list[float]:
    """Four to eight round numbers that span low to high."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _frame(
    x: Axis,
    y: Axis,
    ticks_x: Sequence[float],
    ticks_y: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> list[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in ticks_y:
        parts.append(f'<path class="grid" d="M{LEFT} {_n(to_y(value))}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{_n(to_y(value) + 4)}" text-anchor="end">{value:g}</text>')
    for value in ticks_x:
        parts.append(f'<text class="tick" x="{_n(to_x(value))}" y="{floor + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{_n(middle)}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turn = f'transform="rotate(-90 14 {_n((TOP + floor) / 2)})"'
    parts.append(
        f'<text class="label" x="14" y="{_n((TOP + floor) / 2)}" text-anchor="middle" {turn}>{escape(y.label)}</text>'
    )
    return parts


def _mark(point: Point, x: float, y: float, words: str) -> str:
    """A circle (blind), a diamond (given the trigger) or a square (control), with a tooltip."""
    tip = f"<title>{escape(point.name)}: {escape(words)}</title>"
    if point.kind == "blind":
        return f'<circle class="blind" cx="{_n(x)}" cy="{_n(y)}" r="5">{tip}</circle>'
    if point.kind == "given":
        return f'<path class="given" d="M{_n(x)} {_n(y - 6.5)}l6.5 6.5l-6.5 6.5l-6.5 -6.5z">{tip}</path>'
    return f'<rect class="control" x="{_n(x - 4.5)}" y="{_n(y - 4.5)}" width="9" height="9">{tip}</rect>'


def _short(name: str) -> str:
    return name if len(name) <= 25 else name[:24] + "…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _svg(parts: Sequence[str], title: str, standalone: bool) -> str:
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    style = f"<style>{STYLE}</style>" if standalone else ""
    head = f'<svg{space} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"{head}{style}{''.join(parts)}</svg>"
