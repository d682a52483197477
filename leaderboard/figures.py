"""What is drawn of a table of defenses."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from harness.judges import statistics
from harness.runs.printable import one_line
from harness.runs.record import Record, bare
from leaderboard import charts, columns, population
from leaderboard.columns import Task
from leaderboard.population import Population
from leaderboard.recompute import samples
from leaderboard.rows import Control, Row, Table
from leaderboard.specs import arguments, short_of

Draw = Callable[[bool], str]
STEPS = ("steps", "iterations")  # parameters that say how long a defense trains
POINTS = 3  # budgets of a defense from which on they are a curve


@dataclass(frozen=True)
class Figure:
    """A chart: inside a page, and as a file of its own."""

    svg: Markup
    file: str
    caption: str


def of_table(table: Table, task: Task) -> list[Figure]:
    """What is drawn of a table: purification's ASR against utility, cost against
    removal, and ASR and utility against training steps; screening's ROC."""
    rows = [(r, r.section) for r in table.rows if r.control is not Control.decoy]
    if task == "screening":
        caption = "ROC: true over false positives, in each defense's worst setting, mean over its seeds"
        return _drawn(caption, _roc([r for r, _ in rows]))
    names = _called(r for r, _ in rows)
    utility = columns.UTILITY[table.track]
    percent = 100 if utility.percent else 1
    judge = f" [{table.judge(utility)}]" if table.judge(utility) else ""
    y = charts.Axis(
        f"{utility.title}{judge}{' %' if utility.percent else ''}, worst", None, 100 if utility.percent else None
    )
    x = charts.Axis("ASR after the defense %, worst", 0, 100)
    against = [
        charts.Point(
            names[r.first.specs.defense], 100 * r.worst["asr"].value, percent * r.worst[utility.score].value, kind
        )
        for r, kind in rows
    ]
    cost = [
        charts.Point(names[r.first.specs.defense], r.mean["defense_wall_s"], 100 - 100 * r.mean["asr"], kind)
        for r, kind in rows
    ]
    better = "bottom left" if utility.better < 0 else "top left"
    spent, gone = charts.Axis("cost of the defense, s (log)", log=True), charts.Axis("removal %, mean", 0, 100)
    return [
        *_drawn(
            f"Attack against utility: the {better} is good.",
            lambda alone: charts.scatter(against, x, y, "ASR against utility", alone),
        ),
        *_drawn(
            "What removal costs: the top left is good.",
            lambda alone: charts.scatter(cost, spent, gone, "cost against removal", alone),
        ),
        *_budgets([row for row, _ in rows], y, utility.score, percent),
    ]


def _budgets(rows: Sequence[Row], y: charts.Axis, score: str, percent: int) -> list[Figure]:
    """ASR and utility against the steps of a defense's training, for defenses of which a table has three budgets or
    more."""
    groups: dict[str, dict[float, Row]] = defaultdict(dict)
    for row in rows:
        given = dict(arguments(row.first.specs.defense))
        steps = next((given.pop(name) for name in STEPS if name in given), "")
        if steps.isdecimal() and int(steps):
            rest = ", ".join(f"{name}={value}" for name, value in given.items())
            groups[f"{bare(row.first.specs.defense)}({rest})"][int(steps)] = row
    several = {spec: sorted(found.items()) for spec, found in groups.items() if len(found) >= POINTS}
    names = {spec: one_line(_spoken(short)) for spec, short in short_of(several).items()}

    def curves(value: Callable[[Row], float]) -> list[charts.Curve]:
        found = []
        for spec, points in several.items():
            known = [(steps, value(row)) for steps, row in points if math.isfinite(value(row))]
            if len(known) >= POINTS:
                found.append(charts.Curve(names[spec], *zip(*known, strict=True)))
        return found

    x = charts.Axis("optimizer steps (log)", log=True)
    left = charts.Axis("ASR after the defense %, worst", 0, 100)
    asr, kept = curves(lambda row: 100 * row.worst["asr"].value), curves(lambda row: percent * row.worst[score].value)
    return [
        *_drawn(
            "What is left after how much training.", lambda alone: charts.curves(asr, x, left, "ASR and budget", alone)
        ),
        *_drawn(
            "What the training does to utility.", lambda alone: charts.curves(kept, x, y, "utility and budget", alone)
        ),
    ]


def _called(rows: Iterable[Row]) -> dict[str, str]:
    """Canonical spec of a defense → its name, with the parameters in which the rows of that name differ."""
    given = {r.first.specs.defense: r.defense for r in rows}
    shortest = short_of(given.values())
    return {full: one_line(_spoken(shortest[short])) for full, short in given.items()}


def _spoken(spec: str) -> str:
    """A spec as a chart has room for it: "skd-cag black" of "skd-cag(target='black')"."""
    given = [value.strip("'") if value[0] == "'" else f"{name}={value}" for name, value in arguments(spec).items()]
    return " ".join([bare(spec), *given])


def _drawn(caption: str, draw: Draw) -> list[Figure]:
    inside = draw(False)
    return [Figure(Markup(inside), draw(True) + "\n", caption)] if inside else []


def of_populations(found: Sequence[Population], records: Mapping[str, Record]) -> list[Figure]:
    """The ROC of each defense that judges models, over all attacks that it met and over the models that its AUROC
    counts; a picture an architecture."""
    lines: dict[str, list[charts.Curve]] = defaultdict(list)
    for each in found:
        if each.family == population.ALL or sum(p.keys == each.keys for p in found) == 1:
            subjects, _ = population.subjects_of([records[key] for key in each.keys])
            clean = [subject.suspicion for subject in subjects if subject.family is None]
            attacked = [subject.suspicion for subject in subjects if subject.family is not None]
            lines[each.model].append(_curve(one_line(each.defense), [_steps(clean, attacked)]))
    return [
        chart
        for model, drawn in lines.items()
        for chart in _drawn(f"ROC over models, {model}", lambda alone, drawn=drawn: _rates(drawn, "over models", alone))
    ]


def _roc(rows: Sequence[Row]) -> Draw:
    lines, names = [], _called(rows)
    for row in rows:
        cell = row.deciding.get("screen_auroc")
        seeds = [samples(record.scores, "screen_auroc") for record in cell.records] if cell is not None else []
        halves = [(values[: len(values) // 2], values[len(values) // 2 :]) for values in seeds]
        if halves and all(clean and triggered for clean, triggered in halves):
            lines.append(_curve(names[row.first.specs.defense], [_steps(*half) for half in halves]))
    return lambda alone: _rates(lines, "of screening", alone)


def _steps(negatives: Sequence[float], positives: Sequence[float]) -> list[tuple[float, float]]:
    """The corners (false, true positives) in % of a ROC, from (0, 0) to (100, 100)."""
    found = [statistics.at(negatives, positives, tau) for tau in sorted({*negatives, *positives}, reverse=True)]
    return [(0.0, 0.0), *((100 * p.fpr, 100 * p.tpr) for p in found), (100.0, 100.0)]


def _curve(name: str, each: Sequence[Sequence[tuple[float, float]]]) -> charts.Curve:
    """The mean of ROCs: at each share of false positives the mean of their true positives (Fawcett 2006, vertical
    averaging), so that the area below it is the mean of theirs."""
    shares = sorted({x for corners in each for x, _ in corners})
    ends = [[_at(corners, x) for corners in each] for x in shares]
    points = [(x, fmean(side)) for x, found in zip(shares, ends, strict=True) for side in zip(*found, strict=True)]
    return charts.Curve(name, *zip(*dict.fromkeys(points), strict=True))


def _at(corners: Sequence[tuple[float, float]], x: float) -> tuple[float, float]:
    """The lowest and the highest true positives of a ROC at a share of false positives."""
    i, j = bisect_left(corners, (x,)), bisect_right(corners, (x, math.inf))
    if i < j:
        return corners[i][1], corners[j - 1][1]
    (before, low), (after, high) = corners[i - 1], corners[i]
    between = low + (high - low) * (x - before) / (after - before)
    return between, between


def _rates(lines: Sequence[charts.Curve], of: str, alone: bool) -> str:
    x, y = charts.Axis("false positives %", 0, 100), charts.Axis("true positives %", 0, 100)
    return charts.curves(lines, x, y, f"ROC {of}", alone)
