"""What is drawn of a table of defenses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
        return _drawn("ROC: true over false positives, in each defense's worst setting", _roc([r for r, _ in rows]))
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
        given = arguments(row.first.specs.defense)
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
    """The ROC of each defense that judges models, over all attacks that it met; a picture an architecture."""
    lines: dict[str, list[charts.Curve]] = defaultdict(list)
    for each in found:
        if (
            each.family == population.ALL
            or sum(p.defense == each.defense and p.model == each.model for p in found) == 1
        ):
            clean, attacked = _suspicions([records[key] for key in each.keys])
            lines[each.model].append(_curve(one_line(each.defense), clean, attacked))
    return [
        chart
        for model, drawn in lines.items()
        for chart in _drawn(f"ROC over models, {model}", lambda alone, drawn=drawn: _rates(drawn, "over models", alone))
    ]


def _suspicions(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """What was said of clean and of attacked models, each model once."""
    models: dict[bool, dict[tuple[str, ...], float]] = {True: {}, False: {}}
    for record in records:
        suspicion = record.value("suspicion")
        if not math.isnan(suspicion):
            models[bare(record.cell.attack) == "none"][population.model_of(record.cell)] = suspicion
    return list(models[True].values()), list(models[False].values())


def _roc(rows: Sequence[Row]) -> Draw:
    lines, names = [], _called(rows)
    for row in rows:
        cell = row.deciding.get("screen_auroc")
        values = samples(cell.records[0].scores, "screen_auroc") if cell is not None else []
        clean, triggered = values[: len(values) // 2], values[len(values) // 2 :]
        if clean and triggered:
            lines.append(_curve(names[row.first.specs.defense], clean, triggered))
    return lambda alone: _rates(lines, "of screening", alone)


def _curve(name: str, negatives: Sequence[float], positives: Sequence[float]) -> charts.Curve:
    """True over false positives in %, from (0, 0) to (100, 100)."""
    steps = [statistics.at(negatives, positives, tau) for tau in sorted({*negatives, *positives}, reverse=True)]
    points = [(0.0, 0.0), *((100 * p.fpr, 100 * p.tpr) for p in steps), (100.0, 100.0)]
    return charts.Curve(name, *zip(*points, strict=True))


def _rates(lines: Sequence[charts.Curve], of: str, alone: bool) -> str:
    x, y = charts.Axis("false positives %", 0, 100), charts.Axis("true positives %", 0, 100)
    return charts.curves(lines, x, y, f"ROC {of}", alone)
