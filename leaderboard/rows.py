"""Records → rows, for every reader: terminal, Markdown, CSV, JSON and the page.

A cell is pooled over the seeds of the attack's training. A parameter that a plugin gained later does not split it, and
models of different weights are never pooled. A table sets the rows of one model beside each other: those of
one setting (attack, trigger, target, sampler), or one row per defense over all the settings that it met, with the worst
case and the mean. A defense that met one attack is never placed beside one that met five.

Rows carry letters instead of ranks, which the data do not carry: two rows share a letter exactly where the rule of
`leaderboard.paired`, which `bench compare` applies too, does not show them to differ. Defenses that were given the
trigger have letters apart from blind ones.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.judges import statistics
from harness.runs import doubts
from harness.runs.jsonable import canonical
from harness.runs.record import Dropped, Record, Track, bare, control_name
from harness.types import Cell, Doubt, Score, TriggerGiven
from leaderboard import paired
from leaderboard.columns import ASR, AUROC, ON_CLEAN, REPORT, TASKS, TRACKS, Column, Task, of_view, possible
from leaderboard.specs import arguments, inside, newest, shortener

SETTING = ("model", "attack", "trigger", "target", "sampler")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Section = Literal["control", "blind", "given", "missing"]


class Control(StrEnum):
    """Rows that others are held against: nothing done, plain training on clean data, the defense given a control
    trigger."""

    none = "none"
    finetune = "finetune"
    decoy = "decoy"


DIGESTS = Path(__file__).parent / "digests.toml"
BASELINES = (Control.none, Control.finetune)


class Stated(NamedTuple):
    """What a record says of its model: version of the plugin, sha256 of the weights ("" where it does not say it)."""

    model: str
    version: int | None
    sha256: str


@dataclass(frozen=True)
class Number:
    """A score over seeds with its 95 % interval, which stays within the values that the score can have; NaN with the
    reason where it was not measured."""

    value: float
    interval: tuple[float, float] | None = None
    warning: str | None = None

    @property
    def span(self) -> tuple[float, float]:
        """The interval; without one the value alone."""
        return self.interval or (self.value, self.value)

    @property
    def ends(self) -> tuple[float, ...]:
        """The interval's ends, () for none."""
        return self.interval or ()


@dataclass(frozen=True)
class State:
    """Why a cell has no numbers: it failed, or the grid left it out."""

    kind: Literal["failed", "n/a"]
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


@dataclass(frozen=True)
class PooledCell:
    """A cell over its seeds. specs: of the first seed; short: the same with only what differs from the defaults.
    knowledge: what the defense was given, by the names of `harness.types.Knowledge`. weights: those of the model, for
    people; "" unless models of its name have several among the records that were pooled with it. on_clean: of a screen,
    the cell of the clean model in the same setting: what it tells there is the trigger and no backdoor."""

    id: str
    track: Track
    tasks: tuple[Task, ...]
    specs: Cell
    short: Cell
    knowledge: tuple[str, ...] = ()
    control: Control | None = None
    records: tuple[Record, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    state: State | None = None
    weights: str = ""
    on_clean: PooledCell | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.cell.seed for record in self.records)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.records)

    @property
    def trigger_given(self) -> TriggerGiven | None:
        """Which trigger the defense was given; None for a blind one."""
        return self.specs.trigger_given if "trigger" in self.knowledge else None

    @property
    def knows(self) -> str:
        """What the defense was given, for people."""
        if self.control is Control.decoy:
            return f"{control_name(self.specs.trigger_given)} (control)"
        if self.state is not None and not self.records:
            return "–"
        words = sorted(self.knowledge, key=lambda word: word != "trigger")
        return ", ".join(word.replace("_", " ") for word in words) or "none (blind)"

    @property
    def nfe(self) -> tuple[int, ...]:
        """Network evaluations of one sample, where known."""
        return tuple(sorted({r.provenance.nfe for r in self.records if r.provenance.nfe is not None}))

    @property
    def attack(self) -> str:
        """The name of the attack's plugin; `short` may name a preset of it."""
        return bare(self.specs.attack)

    @property
    def defense(self) -> str:
        """The name of the defense's plugin."""
        return bare(self.specs.defense)

    @property
    def variant(self) -> str:
        """What tells the defense from others of its plugin, for people: its preset, or the parameters that are not the
        defaults."""
        name = self.short.defense
        return inside(name) or ("" if name == self.defense else name)

    def changed(self, part: str) -> Mapping[str, str]:
        """The parameters of a part of the cell that are not the defaults, as far as the records tell."""
        told = self.records[0].provenance.short.get(part) if self.records else None
        return arguments(told or getattr(self.specs, part))

    @property
    def model(self) -> str:
        """The model, for people, with its weights where models of its name have several."""
        return f"{self.short.model}, {self.weights}" if self.weights else self.short.model

    @property
    def place(self) -> str:
        """The setting, for people."""
        return f"{self.short.attack}, {self.short.trigger} → {self.short.target}, {self.short.sampler}"

    def name(self, score: str) -> str:
        """The record's own name of a score, with the judge that it used."""
        return self.records[0].name_of(score) if self.records else score

    def number(self, score: str) -> Number:
        """The score over seeds."""
        if score not in self._numbers:
            self._numbers[score] = self._number(score)
        return self._numbers[score]

    @cached_property
    def _numbers(self) -> dict[str, Number]:
        """Those that were asked for: a page asks for most of them twice."""
        return {}

    def _number(self, score: str) -> Number:
        if self.state is not None:
            return Number(math.nan, warning=str(self.state))
        if score == AUROC.score + ON_CLEAN:
            beside = self.on_clean
            return (
                beside.number(AUROC.score) if beside else Number(math.nan, warning="the clean model was not screened")
            )
        number = pool([record.scores.get(record.name_of(score)) for record in self.records])
        return replace(number, interval=possible(score, number.interval))


@dataclass(frozen=True)
class Row:
    """A defense in one table, over one cell or several. worst, mean: score → number; deciding: score → the cell of the
    worst case. Of one cell all are that cell's. letters: rows of a table that share one are not shown to differ.
    uncompared: the row has no letters, only because it shares too few seeds with other rows."""

    cells: tuple[PooledCell, ...]
    worst: Mapping[str, Number]
    mean: Mapping[str, float]
    deciding: Mapping[str, PooledCell]
    letters: str = ""
    uncompared: bool = False

    @property
    def first(self) -> PooledCell:
        return self.cells[0]

    @property
    def defense(self) -> str:
        return self.first.short.defense

    @property
    def control(self) -> Control | None:
        return self.first.control

    @property
    def trigger_given(self) -> TriggerGiven | None:
        return self.first.trigger_given

    @property
    def knows(self) -> str:
        return self.first.knows

    @property
    def state(self) -> State | None:
        return self.first.state

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        return tuple(dict.fromkeys(doubt for cell in self.cells for doubt in cell.doubts))

    @property
    def seeds(self) -> int:
        return min(len(cell.seeds) for cell in self.cells)

    @property
    def section(self) -> Section:
        if self.state is not None:
            return "missing"
        if self.control in BASELINES:
            return "control"
        return "given" if self.trigger_given else "blind"


@dataclass(frozen=True)
class Table:
    """Rows that may be compared, in order: controls, blind defenses, those given the trigger, each followed by its
    decoy control, and what has no numbers. settings: what the rows share, for people."""

    track: Track
    model: str
    settings: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def of(self, section: Section) -> list[Row]:
        return [row for row in self.rows if row.section == section]

    @property
    def remark(self) -> str:
        """Why rows have no letters that could have some; "" where none lacks them for want of seeds."""
        left = sum(row.uncompared for row in self.rows)
        some = any(row.letters for row in self.rows)
        of = f" of {left} row{'s' if left > 1 else ''} without letters" if some else ""
        return f"{paired.FEW}{of}" if left else ""

    def judge(self, column: Column) -> str:
        """What stands in the brackets of the records' names of a score: judges never mix in a column unsaid."""
        names = {cell.name(column.score) for row in self.rows for cell in row.cells if cell.state is None}
        return "/".join(sorted({judge_of(name) for name in names} - {""})) if column.score.endswith("[]") else ""


def judge_of(name: str) -> str:
    """ "digits-cnn" of "fd[digits-cnn]"."""
    return name.partition("[")[2].rstrip("]")


# ---- pooling --------------------------------------------------------------------------------------------------------


def pool(scores: Sequence[Score | None]) -> Number:
    """One seed: the score with its own interval. Several: mean and t interval over seeds, which are the unit of
    variance; of seeds that all give the same value, the widest of their own intervals. Seeds that could not be measured
    make the mean unmeasured too."""
    for score in scores:
        if score is None or math.isnan(score.value):
            return Number(math.nan, warning=(score.warning if score else None) or "not measured")
    known = [score for score in scores if score is not None]
    if len(known) == 1:
        return Number(known[0].value, known[0].interval)
    values = [score.value for score in known]
    own = [score.interval for score in known if score.interval is not None]
    alike = (min(low for low, _ in own), max(high for _, high in own)) if len(own) == len(known) else None
    return Number(math.fsum(values) / len(values), statistics.mean_interval(values) or alike)


def pooled(
    records: Sequence[Record],
    dropped: Sequence[Dropped] = (),
    suites: Mapping[str, Collection[str]] | None = None,
) -> list[PooledCell]:
    """All cells, each once, in the order in which pages list them, with the specs that the newest records write.
    suites: record key → the suites that hold it; None: all are of one.

    Records that differ in their seed and evaluation seed alone are one cell, and one cell for each evaluation seed if
    a seed was evaluated with several. A failed record stands alone, and so does one whose cell and
    seed another version of the code has run too: those are no two seeds. Models of different weights are different
    models (`weights_of`).
    """
    written = newest(records, dropped)
    records = [record.model_copy(update={"cell": written(record.cell)}) for record in records]
    dropped = [replace(entry, cell=written(entry.cell)) for entry in dropped]
    weights, shorten, doubted = weights_of(records, suites), shortener(records, dropped), doubts.of(records)
    groups: dict[str, list[Record]] = defaultdict(list)
    several = _evaluated_again(records, weights)
    for record in records:
        of = weights[record.key]
        name = _identity(record.cell, record.key if record.error else of, _identity(record.cell, of) in several)
        again = any(record.cell.seed == other.cell.seed for other in groups.get(name, ()))
        groups[_identity(record.cell, record.key) if again else name].append(record)
    tracks = _tracks(records)
    made = [_cell(identity, group, tracks, shorten, doubted, weights) for identity, group in groups.items()]
    left = {_identity(entry.cell, f"n/a: {entry.reason}"): entry for entry in reversed(dropped)}
    for identity, entry in left.items():
        track, state = tracks.get(bare(entry.cell.model), TRACKS[0]), State("n/a", entry.reason)
        made.append(PooledCell(identity, track, TASKS[:1], entry.cell, shorten(entry.cell), state=state))
    clean = {_unattacked(cell): cell for cell in made if cell.attack == "none" and "screening" in cell.tasks}
    made = [cell if cell.attack == "none" else replace(cell, on_clean=clean.get(_unattacked(cell))) for cell in made]
    return sorted(made, key=_order)


def _unattacked(cell: PooledCell) -> tuple[Cell, str]:
    """What a cell has in common with that of the same defense on the clean model."""
    return replace(cell.specs, attack="none", seed=0, evaluation_seed=0), cell.weights


def part(cells: Iterable[PooledCell], keys: Collection[str]) -> list[PooledCell]:
    """Cells as far as their records have these keys."""
    kept = [(cell, tuple(record for record in cell.records if record.key in keys)) for cell in cells]
    return [replace(cell, records=records) for cell, records in kept if records]


def weights_of(records: Sequence[Record], suites: Mapping[str, Collection[str]] | None = None) -> dict[str, str]:
    """Record key → the weights of its model, for people: the version of the model's plugin, and digests where several
    weights have one version; "" for all of a model whose records say the same.

    Records say the version of the model's plugin and the sha256 of the weights, in the ingredients of their jobs; the
    older ones say nothing. How the sha256 is computed has changed, so that one version has several of them without a
    change of the weights: those that `digests.toml` lists, and those that one suite holds, are taken for the same.
    suites: as in `pooled`.
    """
    said = {record.key: stated(record) for record in records}
    alike: dict[Stated, set[Stated]] = {each: {each} for each in said.values()}
    first: dict[tuple[str, str, int | None, bool], Stated] = {}
    for key, each in said.items():
        beside = [f"the digest {_equal_digests().get(each.sha256, each.sha256)}"]
        beside += ["of any suite"] if suites is None else [f"of the suite {suite}" for suite in suites[key]]
        for place in beside:
            both = alike[each] | alike[first.setdefault((place, each.model, each.version, bool(each.sha256)), each)]
            alike.update(dict.fromkeys(both, both))
    digests = {each: _digests(group) for each, group in alike.items()}
    others: dict[str, set[tuple[int | None, str]]] = defaultdict(set)
    for each, words in digests.items():
        others[each.model].add((each.version, words))

    def named(each: Stated) -> str:
        version = "version not recorded" if each.version is None else f"version {each.version}"
        equal = [words for of, words in others[each.model] if of == each.version]
        return "" if len(others[each.model]) == 1 else version if len(equal) == 1 else f"{version}, {digests[each]}"

    return {key: named(each) for key, each in said.items()}


@cache
def _equal_digests() -> Mapping[str, str]:
    """Digest of weights → today's digest of the same weights, for those of `digests.toml`."""
    lists = tomllib.loads(DIGESTS.read_text(encoding="utf-8")).values()
    return {digest: same[0] for same in lists for digest in same}


def stated(record: Record) -> Stated:
    """What the ingredients of a record's jobs say of its model."""
    models = (job.ingredients.get("model") for job in record.provenance.jobs.values() if job.ingredients)
    model = next((model for model in models if isinstance(model, Mapping)), {})
    version, sha256 = model.get("version"), model.get("weights")
    known = version if isinstance(version, int) else None
    return Stated(record.cell.model, known, sha256 if isinstance(sha256, str) else "")


def _digests(group: Collection[Stated]) -> str:
    """ "weights 1a108d51e9ce", of weights that are taken for the same."""
    found = "/".join(sorted({each.sha256[:12] for each in group if each.sha256}))
    return f"weights {found}" if found else "weights not recorded"


def _evaluated_again(records: Iterable[Record], weights: Mapping[str, str]) -> set[str]:
    """Identities of the cells of which a seed was evaluated with several evaluation seeds."""
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    for record in records:
        seen[_identity(record.cell, weights[record.key]), record.cell.seed].add(record.cell.evaluation_seed)
    return {identity for (identity, _), seeds in seen.items() if len(seeds) > 1}


def _identity(cell: Cell, apart: str, evaluation: bool = False) -> str:
    """Twelve hex digits for the cell without its seed, and without its evaluation seed unless `evaluation`."""
    left_out = {"seed"} if evaluation else {"seed", "evaluation_seed"}
    specs = {name: value for name, value in asdict(cell).items() if name not in left_out}
    return hashlib.sha256(canonical([specs, apart]).encode()).hexdigest()[:12]


def _tracks(records: Iterable[Record]) -> dict[str, Track]:
    """Model name → its track, as its records say, else by what was measured."""
    found: dict[str, Track] = {}
    for record in records:
        asked = any(_measured(record, name) for name in record.scores if name.startswith(("attribute", "clip")))
        found[bare(record.cell.model)] = record.provenance.track or TRACKS[asked]
    return found


def _cell(
    identity: str,
    group: Sequence[Record],
    tracks: Mapping[str, Track],
    shorten: Callable[[Cell], Cell],
    doubted: Mapping[str, Sequence[Doubt]],
    weights: Mapping[str, str],
) -> PooledCell:
    group = sorted(group, key=lambda record: record.cell.seed)
    first = group[0]
    return PooledCell(
        id=identity,
        track=first.provenance.track or tracks[bare(first.cell.model)],
        tasks=_tasks(group),
        specs=first.cell,
        short=shorten(first.cell),
        knowledge=first.given,
        control=control_of(first.cell),
        records=tuple(group),
        doubts=tuple(dict.fromkeys(doubt for record in group for doubt in doubted[record.key])),
        state=State("failed", first.error) if first.error else None,
        weights=weights[first.key],
    )


def _tasks(group: Sequence[Record]) -> tuple[Task, ...]:
    """What the defense is for: by what it says it delivers, and by what was measured."""
    if control_of(group[0].cell) is Control.none:
        return ("purification", "attacks")
    delivers = {what for record in group for what in record.provenance.delivers}
    measured = {name for record in group for name in record.scores if _measured(record, name)}
    found = {"screening"} if "screen" in delivers or "screen_auroc" in measured else set()
    found |= {"detection"} if "suspicion" in delivers or "suspicion" in measured else set()
    found |= {"purification"} if not delivers or delivers & {"model", "sampler"} else set()
    return tuple(task for task in TASKS if task in found)


def _measured(record: Record, name: str) -> bool:
    return not math.isnan(record.scores[name].value)


def control_of(cell: Cell) -> Control | None:
    if cell.trigger_given != "true":
        return Control.decoy
    return next((control for control in BASELINES if bare(cell.defense) == control), None)


def _order(cell: PooledCell) -> tuple[Any, ...]:
    s = cell.short
    clean = cell.attack == "none"
    rank = BASELINES.index(cell.control) if cell.control in BASELINES else len(BASELINES)
    place = (cell.track != TRACKS[0], s.model, clean, s.attack, s.trigger, s.target, s.sampler)
    return (*place, cell.state is not None, rank, s.defense, cell.control is not None, cell.id)


# ---- tables ---------------------------------------------------------------------------------------------------------


def by_setting(cells: Iterable[PooledCell]) -> list[Table]:
    """One table per (model, attack, trigger, target, sampler), one row per cell, in the order of the cells."""
    groups: dict[tuple[str, ...], list[PooledCell]] = defaultdict(list)
    for cell in cells:
        groups[(cell.weights, *(getattr(cell.specs, part) for part in SETTING))].append(cell)
    return [
        _table(group[0].track, (group[0].place,), REPORT, [row([cell], REPORT) for cell in group], TASKS[0])
        for group in groups.values()
    ]


def by_task(cells: Iterable[PooledCell], track: Track, task: Task) -> list[Table]:
    """The tables of one view of the page, those over most settings first: one row per defense. The rows of a table met
    the same settings; controls are cut down to those."""
    columns = of_view(track, task)
    by_defense: dict[tuple[str, ...], list[PooledCell]] = defaultdict(list)
    for cell in cells:
        if cell.track == track and task in cell.tasks and cell.state is None and cell.attack != "none":
            by_defense[cell.specs.model, cell.weights, cell.specs.defense, cell.specs.trigger_given].append(cell)
    by_defense = {name: _once(group) for name, group in by_defense.items()}
    controls = [group for group in by_defense.values() if group[0].control in BASELINES]
    covered: dict[tuple[str, str, frozenset[tuple[Any, ...]]], list[list[PooledCell]]] = defaultdict(list)
    for group in by_defense.values():
        if group[0].control not in BASELINES:
            covered[group[0].specs.model, group[0].weights, frozenset(map(_setting, group))].append(group)
    made: list[tuple[tuple[Any, ...], Table]] = []
    for (model, weights, settings), groups in covered.items():
        mine = [group for group in controls if (group[0].specs.model, group[0].weights) == (model, weights)]
        beside = [[cell for cell in group if _setting(cell) in settings] for group in mine]
        whole = [group for group in beside if len({_setting(cell) for cell in group}) == len(settings)]
        words = tuple(dict.fromkeys(cell.place for cell in groups[0]))
        table = _table(track, words, columns, [row(group, columns) for group in (*whole, *groups)], task)
        made.append(((-len(settings), model, weights, sorted(settings)), table))
    return [table for _, table in sorted(made, key=lambda pair: pair[0])]


def _once(group: Iterable[PooledCell]) -> list[PooledCell]:
    """One cell for each setting: suites may measure the same attack with other utility sets. That of more seeds counts,
    then that of the larger set."""
    best: dict[tuple[Any, ...], PooledCell] = {}
    for cell in group:
        other = best.get(_setting(cell))
        if other is None or _weight(other) < _weight(cell):
            best[_setting(cell)] = cell
    return list(best.values())


def _weight(cell: PooledCell) -> tuple[int, int]:
    return len(cell.seeds), cell.specs.utility_n


def _setting(cell: PooledCell) -> tuple[Any, ...]:
    """Where a cell was measured, apart from the model."""
    return (*(getattr(cell.specs, part) for part in SETTING[1:]), cell.specs.n)


def row(cells: Sequence[PooledCell], columns: Sequence[Column]) -> Row:
    """A defense over its cells. A score that any cell lacks has neither worst case nor mean."""
    worst: dict[str, Number] = {}
    mean: dict[str, float] = {}
    deciding: dict[str, PooledCell] = {}
    for column in columns:
        found = [(cell.number(column.score), cell) for cell in cells]
        missing = next((number for number, _ in found if math.isnan(number.value)), None)
        if missing is not None:
            worst[column.score], mean[column.score] = missing, math.nan
            continue
        number, cell = max(found, key=lambda pair: (_loss(pair[0], column), pair[1].id))
        worst[column.score], deciding[column.score] = number, cell
        mean[column.score] = math.fsum(number.value for number, _ in found) / len(found)
    return Row(tuple(cells), worst, mean, deciding)


def _loss(number: Number, column: Column) -> float:
    """The value, turned so that more is worse."""
    return -number.value if column.better > 0 else number.value


def _table(
    track: Track, settings: tuple[str, ...], columns: tuple[Column, ...], rows: Sequence[Row], task: Task
) -> Table:
    return Table(track, rows[0].first.model, settings, columns, _arranged(rows, columns[0], task))


def _arranged(rows: Sequence[Row], by: Column, task: Task) -> tuple[Row, ...]:
    """The rows in a table's order, with their letters."""
    decoys: dict[str, list[Row]] = defaultdict(list)
    sections: dict[Section, list[Row]] = {"control": [], "blind": [], "given": [], "missing": []}
    for each in rows:
        if each.control is Control.decoy and each.state is None:
            decoys[each.first.specs.defense].append(each)
        else:
            sections[each.section].append(each)
    controls = sorted(sections["control"], key=lambda r: (BASELINES.index(r.control or Control.none), r.defense))
    out = [*controls]
    for each in (*lettered(sections["blind"], by, task), *lettered(sections["given"], by, task)):
        out += [each, *decoys.pop(each.first.specs.defense, ())]
    alone = [each for group in decoys.values() for each in group]
    return (*out, *alone, *sorted(sections["missing"], key=lambda r: (r.defense, r.control is not None)))


def lettered(rows: Sequence[Row], by: Column = ASR, task: Task = "purification") -> list[Row]:
    """`rows` from the best worst case to the worst, with `letters`; then those that cannot be ranked, without. A row
    has letters if it shares enough seeds with at least one other ranked row."""
    ranked = sorted((r for r in rows if _ranked(r, by, task)), key=lambda r: (_loss(r.worst[by.score], by), r.defense))
    rest = sorted((r for r in rows if not _ranked(r, by, task)), key=lambda r: r.defense)
    differ = _differing(ranked, by)
    able = [i for i, others in enumerate(differ) if others]
    found = letters([[k for k, j in enumerate(able) if not differ[i].get(j)] for i in able])
    for i, text in zip(able, found, strict=True):
        ranked[i] = replace(ranked[i], letters=text)
    alone = len(ranked) == 1 and ranked[0].seeds >= paired.LEAST_SEEDS
    return [*(replace(r, uncompared=not r.letters and not alone) for r in ranked), *rest]


def _differing(rows: Sequence[Row], by: Column) -> list[dict[int, bool]]:
    """For each row the rows that share enough seeds with it → whether they are shown to differ from it."""
    places = [paired.placed(record for cell in each.cells for record in cell.records) for each in rows]
    found: list[dict[int, bool]] = [{} for _ in rows]
    for i, j in itertools.combinations(range(len(rows)), 2):
        made = paired.difference(by.score, places[i], places[j], by.better)
        if made is not None and len(made.by_seed) >= paired.LEAST_SEEDS:
            found[i][j] = found[j][i] = made.differs
    return found


def _ranked(each: Row, by: Column, task: Task) -> bool:
    """Whether a row has letters: it was measured at this task, under an attack, and did not ruin the model."""
    broken = any(doubt.code in doubts.BROKEN for doubt in each.doubts)
    suits = each.control is None and task in each.first.tasks and bare(each.first.specs.attack) != "none"
    return suits and not broken and not math.isnan(each.worst[by.score].value)


def letters(alike: Sequence[Collection[int]]) -> list[str]:
    """For each row its letters, so that two rows share one exactly where each is in the other's `alike`: a letter for
    every largest set of rows that are all alike (a maximal clique), in the order of their first rows."""
    neighbours = [set(others) - {i} for i, others in enumerate(alike)]
    cliques = sorted(map(sorted, _cliques(set(), set(range(len(alike))), set(), neighbours)))
    return ["".join(_letter(k) for k, mine in enumerate(cliques) if i in mine) for i in range(len(alike))]


def _cliques(
    chosen: set[int], candidates: set[int], done: set[int], neighbours: Sequence[set[int]]
) -> Iterator[set[int]]:
    """The maximal cliques that hold all of `chosen`, some of `candidates` and none of `done` (Bron & Kerbosch 1973,
    with the pivot of Tomita et al. 2006)."""
    if not candidates and not done:
        yield chosen
        return
    pivot = max(candidates | done, key=lambda i: (len(candidates & neighbours[i]), -i))
    for i in sorted(candidates - neighbours[pivot]):
        near = neighbours[i]
        yield from _cliques(chosen | {i}, candidates & near, done & near, neighbours)
        candidates, done = candidates - {i}, done | {i}


def _letter(k: int) -> str:
    return LETTERS[k] if k < len(LETTERS) else f"({k + 1})"
