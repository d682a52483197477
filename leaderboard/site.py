"""The published page, from records alone and byte for byte the same each time: index.html, a page a cell, a page a
defense, LEADERBOARD.md, leaderboard.json, leaderboard.csv, contact sheets and charts. It needs no network, no server.

Every text that comes from a record is data. Jinja2 escapes it, scripts see it as JSON and write it as text, and a
Content-Security-Policy lets nothing run but what this module put there, by its hash.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from leaderboard import orders, pages, population, report, summary
from leaderboard.drawings import drawings, population_drawings
from leaderboard.rendering import asset, environment, inside, png_size, policy, script_json, shown
from leaderboard.results import Results, ResultsError, write_text
from leaderboard.summary import TASK_WORDS, TASKS, TRACK_WORDS, TRACKS, Block, Cell, Figure, Row
from leaderboard.tables import CONTROLS, Number, bare, ends

TOLD_WORDS = (("any", "Any"), ("blind", "Not told"), ("told", "Told"))
READING = {
    "purification": "What is left of the attack after the defense, and what became of the model. Lower ASR is better.",
    "screening": "How well a defense tells inputs that carry the trigger from clean ones. Higher AUROC is better.",
    "detection": "How well a defense tells backdoored models from clean ones, over a population of models.",
    "attacks": "What the attacks do when nothing defends. Grey rows are clean models asked the same.",
}
PICTURES = 9  # contact sheets below a table
MARK = ".bench-page"  # a file that says that a folder's pages are ours


@dataclass
class Notes:
    """Doubts of a table's rows, each once, in the order of first use."""

    words: list[str] = field(default_factory=list)

    def marks(self, row: Row) -> str:
        found = []
        for words in row.doubts:
            if words not in self.words:
                self.words.append(words)
            found.append(report.letter(self.words.index(words)))
        return ", ".join(found) or "none"


@dataclass(frozen=True)
class Part:
    """Rows of one kind in a table. told: "blind" or "told" where the choice of a view hides it."""

    title: str
    kind: str
    told: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Picture:
    """path: relative to the page that shows it."""

    path: str
    width: int
    height: int


@dataclass
class Site:
    """What is being written, and where."""

    out: Path
    cells: list[Cell]
    results: Sequence[Results]
    sheets: Mapping[str, Path]  # record key → its contact sheet
    names: Mapping[str, str]  # record key → where the page has it
    orders: Sequence[orders.Order]  # where papers rank what we have measured too
    files: Mapping[str, str]  # record key → the file that holds it, from the repository's root
    environment: Environment

    def sheet(self, key: str, root: str = "") -> Picture | None:
        if key not in self.sheets:
            return None
        return Picture(root + self.names[key], *png_size(self.sheets[key]))

    def page(self, name: str, template: str, root: str, scripts: Sequence[Markup] = (), **values: Any) -> None:
        """Render a page with the policy that admits its styles and scripts only. The page with scripts is one file;
        the many without share a style sheet."""
        styles = [asset("tabulator/tabulator.min.css"), asset("page.css")] if scripts else []
        values = {**values, "styles": styles, "scripts": scripts, "policy": policy(styles, scripts), "root": root}
        write_text(self.out / name, self.environment.get_template(template).render(values))


def build(every: Iterable[Results], out: Path) -> dict[str, int]:
    """Write the site into `out`, which may exist, and return counts for people. Files of an earlier build that are not
    of this one are removed. Raises OSError, and ResultsError for a folder that holds something but no page."""
    found = [path for path in out.glob("*") if not path.name.startswith(".")]
    if found and not (out / MARK).is_file():
        raise ResultsError(f"{out}: holds files of another kind; name a new folder, or one with a page built earlier")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "A page that bench leaderboard build writes, and clears before it does.\n")
    results = list(every)
    made = summary.cells(results)
    drawn = {record["key"]: suite.sheet_file(record) for suite in results for record in suite.records}
    sheets = {key: path for key, path in drawn.items() if path is not None}
    for old in ("cells", "defenses", "sheets", "charts"):
        shutil.rmtree(out / old, ignore_errors=True)
        (out / old).mkdir(parents=True)
    files = {
        record["key"]: f"leaderboard/results/{suite.suite}/records/{suite.record_file(record['key']).name}"
        for suite in results
        for record in suite.records
    }
    names = {key: f"sheets/{path.name}" for key, path in sheets.items()}
    site = Site(out, made, results, sheets, names, orders.orders(made), files, environment())
    for name, path in {names[key]: path for key, path in sheets.items()}.items():
        shutil.copyfile(path, out / name)
    counts = _counts(made)
    _index(site, counts)
    for cell in made:
        pages.cell_page(site, cell)
    for defense in _defenses(made):
        pages.defense_page(site, defense)
    _files(site, counts)
    return counts


def _counts(cells: Sequence[Cell]) -> dict[str, int]:
    done = [cell for cell in cells if cell.records and not cell.state]
    levels = [level for cell in done for level in cell.levels]
    return {
        "cells": len(cells),
        "records": sum(len(cell.records) for cell in cells),
        "defenses": len({bare(c.short["defense"]) for c in done} - {"none"}),
        "attacks": len({bare(c.short["attack"]) for c in done} - {"none"}),
        "models": len({bare(c.short["model"]) for c in done}),
        "recomputed": sum(level != "claimed" for level in levels),
        "reproduced": levels.count("reproduced"),
    }


def _defenses(cells: Sequence[Cell]) -> list[str]:
    return sorted({bare(cell.short["defense"]) for cell in cells})


# ---- index ----------------------------------------------------------------------------------------------------------


def _index(site: Site, counts: Mapping[str, int]) -> None:
    views = [_view(site, track, task) for track in TRACKS for task in TASKS]
    first = next((v for v in views if v["blocks"] or v["attacks"]), views[0])
    site.page(
        "index.html", "index.html.jinja", "", [asset("tabulator/tabulator.min.js"), asset("page.js")],
        views=views, counts=counts, start=first, data=Markup(_data(site.cells)), defenses=_defenses(site.cells),
        tracks=TRACKS, tasks=TASKS, track_words=TRACK_WORDS, task_words=TASK_WORDS, told_words=TOLD_WORDS,
        legend=orders.LEGEND,
    )  # fmt: skip


def _view(site: Site, track: str, task: str) -> dict[str, Any]:
    figures = summary.figures_of(track, task)
    own = task in ("purification", "screening")
    return {
        "track": track,
        "task": task,
        "title": f"{TASK_WORDS[task]}: {TRACK_WORDS[track].lower()} models",
        "reading": READING[task],
        "figures": figures,
        "whisker": own,
        "blocks": [_block(site, b, track, task, i) for i, b in enumerate(_tables(site, track, task))] if own else [],
        "population": _population(site, track) if task == "detection" else None,
        "orders": [each for each in site.orders if each.track == track] if task == "purification" else [],
        "attacks": _attacks(site, track, figures) if task == "attacks" else [],
    }


def _tables(site: Site, track: str, task: str) -> list[Block]:
    return summary.blocks(site.cells, track, task)


def _block(site: Site, block: Block, track: str, task: str, index: int) -> dict[str, Any]:
    figures = summary.figures_of(track, task)
    several = len(block.words) > 1
    drawn = drawings(block, track, task)
    for k, chart in enumerate(drawn):
        write_text(site.out / "charts" / f"{track}-{task}-{index}-{k}.svg", chart["file"])
    parts = (
        Part("", "control", "", block.controls),
        Part("Not told the trigger", "blind", "blind", block.blind),
        Part("Told the trigger", "told", "told", block.told),
    )
    return {
        "model": block.model,
        "words": block.words,
        "judges": block.judges,
        "parts": parts,
        "width": len(figures) + 6 + several,
        "notes": Notes(),
        "charts": drawn,
        "pictures": _pictures(site, block, figures[0]),
    }


def _pictures(site: Site, block: Block, by: Figure) -> list[dict[str, Any]]:
    """The contact sheets of the cells that decide the rows' worst cases."""
    found = []
    for row in [*block.controls, *block.blind, *block.told]:
        cell = row.deciding.get(by.score)
        picture = site.sheet(cell.keys[0]) if cell is not None else None
        if cell is not None and picture is not None and cell.control != "wrong trigger":
            what = bare(cell.short["defense"])
            caption = f"{cell.short['defense']}, worst on {bare(cell.short['attack'])}"
            alt = f"images of {what} on {bare(cell.short['attack'])}, without and with the trigger"
            found.append({"id": cell.id, "sheet": picture, "caption": caption, "alt": alt})
    return found[:PICTURES]


def _attacks(site: Site, track: str, figures: Sequence[Figure]) -> list[dict[str, Any]]:
    models: dict[str, list[Cell]] = {}
    for cell in site.cells:
        if cell.track == track and "attacks" in cell.tasks:
            models.setdefault(cell.short["model"], []).append(cell)
    return [
        {"model": model, "cells": cells, "judges": {f.score: summary.judge(cells[0].name(f.score)) for f in figures}}
        for model, cells in models.items()
    ]


def _population(site: Site, track: str) -> dict[str, Any] | None:
    """The statistics over models: head and body of a table, and the ROC curves."""
    records = [record for cell in site.cells if cell.track == track for record in cell.records]
    found = population.populations(records)
    if not found:
        return None
    drawn = population_drawings(found, {record["key"]: record for record in records})
    for k, chart in enumerate(drawn):
        write_text(site.out / "charts" / f"{track}-detection-{k}.svg", chart["file"])
    body = [[text.partition(" (")[::2] for text in population.cells(each)] for each in found]
    return {"head": population.HEAD, "body": body, "legend": population.LEGEND, "charts": drawn}


def _data(cells: Sequence[Cell]) -> str:
    """The table of cells as JSON inside a script element: words by number, figures to five digits."""
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(report.plain(text), len(words))

    rows = []
    for cell in cells:
        s = cell.short
        row: dict[str, Any] = {
            "id": cell.id, "r": cell.track, "k": cell.knows, "c": cell.control in CONTROLS,
            "d": word(bare(s["defense"])), "p": word(inside(s["defense"])),
            "a": word(bare(s["attack"])), "b": word(bare(s["attack"])),
            "w": word(f"{s['trigger']} → {s['target']}, {s['sampler']}"), "m": word(s["model"]), "t": word(cell.told),
            "s": len(cell.seeds), "q": len(cell.doubts), "l": word(cell.level if cell.records else "–"),
            "v": {task: [_packed(cell.figure(f.score), f) for f in summary.figures_of(cell.track, task)]
                  for task in cell.tasks},
        }  # fmt: skip
        if cell.state:
            row["e"] = word(cell.state.partition(":")[0])
        rows.append(row)
    figures = {
        f"{track}/{task}": [
            {"title": f.title + (" %" if f.percent else " s" if f.score.endswith("_wall_s") else ""),
             "digits": f.digits, "percent": f.percent, "minor": f.minor}
            for f in summary.figures_of(track, task)
        ]
        for track in TRACKS for task in TASKS
    }  # fmt: skip
    return script_json({"words": list(words), "rows": rows, "figures": figures})


def _packed(number: Number, figure: Figure) -> list[float | None]:
    if math.isnan(number.value):
        return [None]
    return [_five(number.value), *(_five(end) for end in ends(number, figure.percent))]


def _five(value: float) -> float:
    return float(f"{value:.5g}")


# ---- other files ----------------------------------------------------------------------------------------------------


def _files(site: Site, counts: Mapping[str, int]) -> None:
    records = [record for cell in site.cells for record in cell.records]
    dropped = [entry for results in site.results for entry in results.dropped]
    write_text(site.out / "page.css", asset("page.css"))
    write_text(site.out / "LEADERBOARD.md", markdown(site, records, dropped, site.names))
    write_text(site.out / "leaderboard.csv", report.comma_separated(records, dropped))
    lines = ",\n".join(json.dumps(_entry(c), sort_keys=True, allow_nan=False) for c in site.cells)
    write_text(site.out / "leaderboard.json", f'{{"counts": {json.dumps(counts)},\n"cells": [\n{lines}\n]}}\n')


def _entry(cell: Cell) -> dict[str, Any]:
    """A cell in leaderboard.json: everything but per-sample values and attempts."""
    return {
        "id": cell.id, "track": cell.track, "tasks": cell.tasks, "cell": dict(cell.full), "told": cell.told,
        "trigger_known": cell.knows, "control": cell.control, "state": cell.state, "level": cell.level,
        "doubts": cell.doubts, "protocol": cell.protocol, "suites": cell.suites,
        "seeds": {str(r["cell"]["seed"]): {"key": r["key"], "scores": _brief(r)} for r in cell.records},
    }  # fmt: skip


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """The measured scores as [value, low, high]."""
    scores = (record.get("scores") or {}).items()
    return {n: [s["value"], *(s.get("interval") or ())] for n, s in scores if s.get("value") is not None}


def _orders(every: Sequence[orders.Order]) -> list[str]:
    """Papers' orders beside ours, as Markdown."""
    parts = ["## Papers' orders and ours", orders.LEGEND] if every else []
    for each in every:
        lines = [f"- {report.escape(p.name)}: paper {p.entry.shown}, ours {p.shown}" for p in each.places]
        said = [f"Ours differs: {report.escape(words)}." for words in each.differences] or ["The same order."]
        title = f"### {report.escape(each.title)}: {report.escape(each.paper.title)}"
        parts += [title, "\n".join(lines), " ".join(said)]
    return parts


def markdown(site: Site, records: Sequence[Any], dropped: Sequence[Any], sheets: Mapping[str, str]) -> str:
    """LEADERBOARD.md: worst case and mean of each defense, then every cell."""
    from tabulate import tabulate

    parts = [
        "# Leaderboard",
        "The same numbers as index.html, as text. Worst case and mean over the settings of a table.",
    ]
    for track in TRACKS:
        for task in ("purification", "screening"):
            for block in _tables(site, track, task):
                figures = summary.figures_of(track, task)
                head = ["group", "defense", "told", *(x for f in figures for x in _heads(f, block)), "seeds"]
                body = [_line(row, figures) for row in (*block.controls, *block.blind, *block.told)]
                parts += [
                    f"## {TASK_WORDS[task]}: {report.escape(block.model)}, {len(block.words)} settings",
                    "; ".join(report.escape(words) for words in block.words),
                    tabulate(body, [report.escape(word) for word in head], tablefmt="pipe", disable_numparse=True),
                ]
    parts += _orders(site.orders)
    found = population.rendered(records, report.escape)
    parts += ["## Detection of backdoored models", population.LEGEND, found] if found else []
    return (
        "\n\n".join(parts)
        + "\n\n"
        + report.markdown(records, dropped, sheets).replace("# Leaderboard", "## Every cell", 1)
    )


def _heads(figure: Figure, block: Block) -> tuple[str, str]:
    judge = f" [{block.judges[figure.score]}]" if block.judges[figure.score] else ""
    unit = " %" if figure.percent else ""
    return f"{figure.title}{judge}{unit}, worst", "mean"


def _line(row: Row, figures: Sequence[Figure]) -> list[str]:
    numbers = [x for f in figures for x in (_with_ends(row.worst[f.score], f), shown(row.mean[f.score], f))]
    return [row.group or "–", report.escape(row.first.defense), report.escape(row.first.told), *numbers, str(row.seeds)]


def _with_ends(number: Number, figure: Figure) -> str:
    around = "–".join(shown(end, figure) for end in ends(number, figure.percent))
    return f"{shown(number.value, figure)} ({around})" if around else shown(number.value, figure)
