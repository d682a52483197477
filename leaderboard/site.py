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
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from harness.runs.jsonable import to_jsonable
from harness.runs.printable import one_line
from harness.runs.record import Dropped, Record, Track, bare
from leaderboard import (
    analysis,
    figures,
    headline,
    pages,
    paper_claims,
    paper_rankings,
    population,
    protocol as benchmark,
    report,
    rows,
)
from leaderboard.attestation import Attestation
from leaderboard.columns import TASK_WORDS, TASKS, TRACK_WORDS, TRACKS, Column, Task, of_view, possible
from leaderboard.figures import Figure
from leaderboard.headline import Head
from leaderboard.paper_claims import Verdict
from leaderboard.paper_rankings import Ranking
from leaderboard.population import Population
from leaderboard.recompute import LEVELS, Level, followed, level
from leaderboard.rendering import asset, environment, picture_size, policy, script_json, shown
from leaderboard.results import Results, ResultsError, protocol, state, write_text
from leaderboard.rows import BASELINES, Control, Number, PooledCell, Row, Section, Table, judge_of
from leaderboard.specs import inside

GIVEN_WORDS = (("any", "Any"), ("blind", "Blind"), ("given", "Given"))
SECTIONS: tuple[tuple[Section, str], ...] = (
    ("control", ""),
    ("blind", "Not given the trigger (blind)"),
    ("given", "Given the trigger"),
)
TABLES: tuple[Task, ...] = ("purification", "screening")  # tasks whose defenses stand in tables of their own
READING: dict[Task, str] = {
    "purification": "What is left of the attack after the defense, and what became of the model. Lower ASR is better.",
    "screening": "How well a defense tells inputs that carry the trigger from clean ones. Higher AUROC is better.",
    "detection": "How well a defense tells backdoored models from clean ones, over a population of models.",
    "attacks": "What the attacks do when nothing defends. Grey rows are clean models asked the same.",
}
PICTURES = 9  # contact sheets below a table
MARK = ".bench-page"  # a file that says that a folder's pages are ours


@dataclass(frozen=True)
class Origin:
    """What a page says of a record beyond its numbers. file: that holds it, from the repository's root."""

    file: str
    level: Level
    suites: tuple[str, ...]
    attested: Attestation | None


@dataclass(frozen=True)
class Picture:
    """path: relative to the page that shows it."""

    path: str
    width: int
    height: int


@dataclass(frozen=True)
class Caption:
    """A contact sheet with its words. id: of the cell that it leads to."""

    id: str
    sheet: Picture
    caption: str
    alt: str


@dataclass(frozen=True)
class Block:
    """A table of defenses as the page shows it, with its footnotes, charts and pictures."""

    table: Table
    notes: report.Notes
    charts: Sequence[Figure]
    pictures: Sequence[Caption]

    @property
    def parts(self) -> list[tuple[Section, str, list[Row]]]:
        """The rows of each section below its title."""
        return [(section, title, self.table.of(section)) for section, title in SECTIONS]

    @property
    def several(self) -> bool:
        return len(self.table.settings) > 1

    @property
    def width(self) -> int:
        return len(self.table.columns) + 6 + self.several


@dataclass(frozen=True)
class AttackTable:
    """What the attacks do to one model when nothing defends. judges: score → the judge in its brackets."""

    model: str
    cells: Sequence[PooledCell]
    judges: Mapping[str, str]


@dataclass(frozen=True)
class PopulationTable:
    """The statistics over models: (value, interval) in each field of the body."""

    head: Sequence[str]
    body: Sequence[Sequence[tuple[str, str]]]
    legend: str
    charts: Sequence[Figure]


@dataclass(frozen=True)
class View:
    """All that the index shows of one track and task."""

    track: Track
    task: Task
    columns: tuple[Column, ...]
    blocks: Sequence[Block] = ()
    population: PopulationTable | None = None
    rankings: Sequence[Ranking] = ()
    attacks: Sequence[AttackTable] = ()
    heads: Sequence[Head] = ()

    @property
    def title(self) -> str:
        return f"{TASK_WORDS[self.task]}: {TRACK_WORDS[self.track].lower()} models"

    @property
    def reading(self) -> str:
        return READING[self.task]

    @property
    def backdoored(self) -> int:
        """The most backdoored models that a defense of its head tables met."""
        return max((row.n for head in self.heads for row in head.rows), default=0)


@dataclass
class Site:
    """What is being written, and where."""

    out: Path
    cells: list[PooledCell]
    dropped: Sequence[Dropped]
    sheets: Mapping[str, Path]  # record key → its contact sheet
    names: Mapping[str, str]  # record key → where the page has it
    origins: Mapping[str, Origin]  # record key → where it comes from
    rankings: Sequence[Ranking]  # where papers rank what we have measured too
    claims: Sequence[Verdict]  # what papers claim, beside what we measured
    heads: Mapping[Track, Sequence[Head]]  # of each track
    environment: Environment
    analysed: set[str] = field(default_factory=set)  # keys of records with an analysis

    @property
    def records(self) -> list[Record]:
        return [record for cell in self.cells for record in cell.records]

    @cached_property
    def sizes(self) -> Mapping[Path, tuple[int, int]]:
        """Contact sheet → width and height."""
        return {path: picture_size(path) for path in set(self.sheets.values())}

    @cached_property
    def populations(self) -> list[Population]:
        return population.populations(self.cells)

    @cached_property
    def by_setting(self) -> list[Table]:
        return rows.by_setting(self.cells)

    @cached_property
    def by_task(self) -> Mapping[tuple[Track, Task], list[Table]]:
        return {(track, task): rows.by_task(self.cells, track, task) for track in TRACKS for task in TABLES}

    def level(self, cells: Iterable[PooledCell]) -> Level:
        """The least that any record of the cells was checked."""
        found = {self.origins[key].level for cell in cells for key in cell.keys}
        for known in LEVELS:
            if known in found:
                return known
        return "claimed"

    def suites(self, cell: PooledCell) -> list[str]:
        return list(dict.fromkeys(suite for key in cell.keys for suite in self.origins[key].suites))

    def sheet(self, key: str, root: str = "") -> Picture | None:
        if key not in self.sheets:
            return None
        return Picture(root + self.names[key], *self.sizes[self.sheets[key]])

    def page(self, name: str, template: str, root: str, scripts: Sequence[Markup] = (), **values: Any) -> None:
        """Render a page with the policy that admits its styles and scripts only. The page with scripts is one file;
        the many without share a style sheet."""
        styles = [asset("tabulator/tabulator.min.css"), asset("page.css")] if scripts else []
        values = {**values, "styles": styles, "scripts": scripts, "policy": policy(styles, scripts), "root": root}
        write_text(self.out / name, self.environment.get_template(template).render(values))


def build(every: Iterable[Results], out: Path, analyses: Path | None = None) -> dict[str, int]:
    """Write the site into `out`, which may exist, and return counts for people. Files of an earlier build that are not
    of this one are removed. analyses: a folder of folders that bench analyse wrote; each is copied and linked from the
    page of its cell. Raises OSError, and ResultsError for a folder that holds something but no page."""
    analysed = {} if analyses is None else analysis.found(analyses)
    found = [path for path in out.glob("*") if not path.name.startswith(".")]
    if found and not (out / MARK).is_file():
        raise ResultsError(f"{out}: holds files of another kind; name a new folder, or one with a page built earlier")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "A page that bench leaderboard build writes, and clears before it does.\n")
    site = _site(list(every), out)
    for old in ("cells", "defenses", "sheets", "charts", "analyses"):
        shutil.rmtree(out / old, ignore_errors=True)
    for new in ("cells", "defenses", "sheets", "charts"):
        (out / new).mkdir(parents=True)
    for key, folder in analysed.items():
        if any(key in cell.keys for cell in site.cells):
            analysis.copy(folder, out / "analyses" / key[:12])
            site.analysed.add(key)
    for name, path in {site.names[key]: path for key, path in site.sheets.items()}.items():
        shutil.copyfile(path, out / name)
    counts = _counts(site)
    _index(site, counts)
    for cell in site.cells:
        pages.cell_page(site, cell)
    for defense in _defenses(site.cells):
        pages.defense_page(site, defense)
    _files(site, counts)
    return counts


def _site(every: Sequence[Results], out: Path) -> Site:
    """Of a record that several suites hold, the first is taken."""
    records: dict[str, Record] = {}
    sheets: dict[str, Path] = {}
    files: dict[str, str] = {}
    suites: dict[str, tuple[str, ...]] = {}
    attested: dict[str, Attestation] = {}
    seals: dict[str, str] = {}
    for results in every:
        attested |= results.reproduced
        for record in results.records:
            key, sheet = record.key, results.sheet_file(record)
            suites[key] = (*suites.get(key, ()), results.suite)
            if key not in records and key in results.seals:
                seals[key] = results.seals[key]
            records.setdefault(key, record)
            files.setdefault(key, f"leaderboard/results/{results.suite}/records/{results.record_file(key).name}")
            if sheet is not None:
                sheets[key] = sheet
    origins: dict[str, Origin] = {}
    for key, record in records.items():
        seen = attested.get(key)
        checked = level(record.scores, seen is not None and seen.within, seals.get(key))
        origins[key] = Origin(files[key], checked, suites[key], seen)
    followed.save()
    dropped = [entry for results in every for entry in results.dropped]
    cells = rows.pooled(list(records.values()), dropped, suites)
    names = {key: f"sheets/{path.name}" for key, path in sheets.items()}
    ranked, claimed = paper_rankings.rankings(cells), paper_claims.verdicts(cells)
    named = benchmark.shipped().suite
    own = rows.part(cells, {key for key in records if named in suites[key]})
    heads: dict[Track, list[Head]] = {track: headline.published(cells, own, track) for track in TRACKS}
    return Site(out, cells, dropped, sheets, names, origins, ranked, claimed, heads, environment())


def _counts(site: Site) -> dict[str, int]:
    done = [cell for cell in site.cells if cell.state is None]
    levels = [site.origins[key].level for cell in done for key in cell.keys]
    return {
        "cells": len(site.cells),
        "records": len(site.records),
        "defenses": len({c.defense for c in done} - {"none"}),
        "attacks": len({c.attack for c in done} - {"none"}),
        "models": len({bare(c.specs.model) for c in done}),
        "recomputed": sum(level != "claimed" for level in levels),
        "reproduced": levels.count("reproduced"),
    }


def _defenses(cells: Sequence[PooledCell]) -> list[str]:
    """The plugins, each of which has a page with the cells of all its presets."""
    return sorted({cell.defense for cell in cells})


# ---- index ----------------------------------------------------------------------------------------------------------


def _index(site: Site, counts: Mapping[str, int]) -> None:
    views = [_view(site, track, task) for track in TRACKS for task in TASKS]
    first = max(views, key=lambda view: (view.backdoored, bool(view.blocks or view.attacks)))
    site.page(
        "index.html", "index.html.jinja", "", [asset("tabulator/tabulator.min.js"), asset("page.js")],
        site=site, views=views, counts=counts, start=first, data=Markup(_data(site)), defenses=_defenses(site.cells),
        tracks=TRACKS, tasks=TASKS, track_words=TRACK_WORDS, task_words=TASK_WORDS, given_words=GIVEN_WORDS,
        legend=paper_rankings.LEGEND, state=state(site.records), claims=paper_claims.by_paper(site.claims),
        claims_summary=paper_claims.summary(site.claims), claims_legend=paper_claims.LEGEND,
    )  # fmt: skip


def _view(site: Site, track: Track, task: Task) -> View:
    columns = of_view(track, task)
    if task in TABLES:
        blocks = [_block(site, table, task, index) for index, table in enumerate(site.by_task[track, task])]
        ranked = [each for each in site.rankings if each.track == track and task == "purification"]
        heads = site.heads[track] if task == "purification" else ()
        return View(track, task, columns, blocks, rankings=ranked, heads=heads)
    if task == "detection":
        return View(track, task, columns, population=_population(site, track))
    return View(track, task, columns, attacks=_attacks(site, track, columns))


def _block(site: Site, table: Table, task: Task, index: int) -> Block:
    drawn = figures.of_table(table, task)
    _write_charts(site, f"{table.track}-{task}-{index}", drawn)
    return Block(table, report.Notes(), drawn, _pictures(site, table))


def _write_charts(site: Site, name: str, drawn: Sequence[Figure]) -> None:
    for k, chart in enumerate(drawn):
        write_text(site.out / "charts" / f"{name}-{k}.svg", chart.file)


def _pictures(site: Site, table: Table) -> list[Caption]:
    """The contact sheets of the cells that decide the rows' worst cases."""
    found = []
    for row in table.rows:
        cell = row.deciding.get(table.columns[0].score)
        picture = site.sheet(cell.keys[0]) if cell is not None else None
        if cell is not None and picture is not None and cell.control is not Control.decoy:
            what, attack = bare(cell.short.defense), bare(cell.short.attack)
            caption = f"{cell.short.defense}, worst on {attack}"
            alt = f"images of {what} on {attack}, without and with the trigger"
            found.append(Caption(cell.id, picture, caption, alt))
    return found[:PICTURES]


def _attacks(site: Site, track: Track, columns: Sequence[Column]) -> list[AttackTable]:
    models: dict[str, list[PooledCell]] = {}
    for cell in site.cells:
        if cell.track == track and "attacks" in cell.tasks:
            models.setdefault(cell.model, []).append(cell)
    return [
        AttackTable(model, cells, {c.score: judge_of(cells[0].name(c.score)) for c in columns})
        for model, cells in models.items()
    ]


def _population(site: Site, track: Track) -> PopulationTable | None:
    cells = [cell for cell in site.cells if cell.track == track]
    keys = {key for cell in cells for key in cell.keys}
    found = [each for each in site.populations if keys.issuperset(each.keys)]
    if not found:
        return None
    drawn = figures.of_populations(found, {record.key: record for cell in cells for record in cell.records})
    _write_charts(site, f"{track}-detection", drawn)
    body = [[_parted(text) for text in population.cells(each)] for each in found]
    return PopulationTable(population.HEAD, body, population.LEGEND, drawn)


def _parted(text: str) -> tuple[str, str]:
    """A number apart from the interval behind it."""
    value, _, around = text.partition(" (")
    return value, around


def _data(site: Site) -> str:
    """The table of cells as JSON inside a script element: words by number, figures to five digits."""
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(one_line(text), len(words))

    lines = []
    for cell in site.cells:
        s = cell.short
        row: dict[str, Any] = {
            "id": cell.id, "r": cell.track, "k": cell.trigger_given is not None, "c": cell.control in BASELINES,
            "d": word(bare(s.defense)), "p": word(inside(s.defense)),
            "a": word(bare(s.attack)), "b": word(cell.attack),
            "w": word(f"{s.trigger} → {s.target}, {s.sampler}"), "m": word(cell.model), "t": word(cell.knows),
            "s": len(cell.seeds), "q": len(cell.doubts), "l": word(site.level([cell]) if cell.records else "–"),
            "v": {task: [_packed(cell.number(c.score), c) for c in of_view(cell.track, task)]
                  for task in cell.tasks},
        }  # fmt: skip
        if cell.state is not None:
            row["e"] = word(cell.state.kind)
        lines.append(row)
    columns = {
        f"{track}/{task}": [
            {"title": c.heading, "digits": c.digits, "percent": c.percent, "minor": c.minor}
            for c in of_view(track, task)
        ]
        for track in TRACKS for task in TASKS
    }  # fmt: skip
    return script_json({"words": list(words), "rows": lines, "columns": columns})


def _packed(number: Number, column: Column) -> list[float | None]:
    if math.isnan(number.value):
        return [None]
    return [_five(number.value), *(_five(end) for end in number.ends)]


def _five(value: float) -> float:
    return float(f"{value:.5g}")


# ---- other files ----------------------------------------------------------------------------------------------------


def _files(site: Site, counts: Mapping[str, int]) -> None:
    write_text(site.out / "page.css", asset("page.css"))
    write_text(site.out / "LEADERBOARD.md", markdown(site))
    write_text(site.out / "leaderboard.csv", report.comma_separated(site.records, site.by_setting, site.dropped))
    lines = ",\n".join(json.dumps(_entry(site, c), sort_keys=True, allow_nan=False) for c in site.cells)
    heads = json.dumps([headline.entry(head) for track in TRACKS for head in site.heads[track]])
    claims = ",\n".join(json.dumps(paper_claims.entry(each), sort_keys=True) for each in site.claims)
    totals = json.dumps(paper_claims.counts(site.claims))
    write_text(
        site.out / "leaderboard.json",
        f'{{"counts": {json.dumps(counts)},\n"heads": {heads},\n'
        f'"claims": {{"counts": {totals}, "lines": [\n{claims}\n]}},\n"cells": [\n{lines}\n]}}\n',
    )


def _entry(site: Site, cell: PooledCell) -> dict[str, Any]:
    """A cell in leaderboard.json: everything but per-sample values and attempts."""
    specs = {name: value for name, value in asdict(cell.specs).items() if name not in ("seed", "evaluation_seed")}
    return {
        "id": cell.id, "track": cell.track, "tasks": cell.tasks, "cell": specs, "knowledge": cell.knowledge,
        "trigger_given": cell.trigger_given, "control": cell.control,
        "state": None if cell.state is None else asdict(cell.state), "level": site.level([cell]),
        "doubts": to_jsonable(cell.doubts), "suites": site.suites(cell),
        "protocol": protocol(cell.records[0]) if cell.records else None,
        "seeds": {str(r.cell.seed): {"key": r.key, "scores": _brief(r)} for r in cell.records},
    }  # fmt: skip


def _brief(record: Record) -> dict[str, list[float]]:
    """The measured scores as [value, low, high]."""
    scores = record.scores.items()
    return {name: [s.value, *(possible(name, s.interval) or ())] for name, s in scores if not math.isnan(s.value)}


def _rankings(every: Sequence[Ranking]) -> list[str]:
    """Papers' orders beside ours, as Markdown."""
    parts = ["## Papers' orders and ours", paper_rankings.LEGEND] if every else []
    for each in every:
        lines = [f"- {report.escape(p.name)}: paper {p.entry.shown}, ours {p.shown}" for p in each.places]
        said = [f"Ours differs: {report.escape(words)}." for words in each.differences] or ["The same order."]
        title = f"### {report.escape(each.title)}: {report.escape(each.paper.title)}"
        parts += [title, "\n".join(lines), " ".join(said)]
    return parts


def markdown(site: Site) -> str:
    """LEADERBOARD.md: worst case and mean of each defense, then every cell."""
    from tabulate import tabulate

    parts = [
        "# Leaderboard",
        "The same numbers as index.html, as text. Worst case and mean over the settings of a table.",
    ]
    for track in TRACKS:
        parts += [part for head in site.heads[track] for part in headline.markdown(head)]
        for task in TABLES:
            for table in site.by_task[track, task]:
                numbers = [word for column in table.columns for word in _heads(column, table)]
                head = [report.escape(word) for word in ("letters", "defense", "knowledge", *numbers, "seeds")]
                parts += [
                    f"## {TASK_WORDS[task]}: {report.escape(table.model)}, {len(table.settings)} settings",
                    "; ".join(report.escape(words) for words in table.settings),
                    tabulate([_line(row, table) for row in table.rows], head, tablefmt="pipe", disable_numparse=True),
                    *([f"Letters: {report.escape(table.remark)}."] if table.remark else []),
                ]
    parts += _rankings(site.rankings)
    parts += paper_claims.markdown(site.claims)
    found = population.rendered(site.populations, report.escape)
    parts += ["## Detection of backdoored models", population.LEGEND, found] if found else []
    return "\n\n".join([*parts, "## Every cell", report.every_cell(site.by_setting, site.names)]) + "\n"


def _heads(column: Column, table: Table) -> tuple[str, str]:
    judge = f" [{table.judge(column)}]" if table.judge(column) else ""
    return f"{column.title}{judge}{' %' if column.percent else ''}, worst", "mean"


def _line(row: Row, table: Table) -> list[str]:
    numbers = [x for c in table.columns for x in (_with_ends(row.worst[c.score], c), shown(row.mean[c.score], c))]
    return [row.letters or "–", report.escape(row.defense), report.escape(row.knows), *numbers, str(row.seeds)]


def _with_ends(number: Number, column: Column) -> str:
    around = "–".join(shown(end, column) for end in number.ends)
    return f"{shown(number.value, column)} ({around})" if around else shown(number.value, column)
