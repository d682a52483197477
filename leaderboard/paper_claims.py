"""Each claim of the three papers, held against our rows: paper_claims.toml says what a paper claims, which rows decide
it and by which rule; this module applies the rule to pooled cells.

A row is a cell, a pair of cells on the same backdoored models, or a population of models, and each is judged alone:

    bound   a score, or its ratio to or difference from another one: the value is within the bound, and its 95 %
            interval within the outer end. It is beyond the bound if the whole interval is
    order   `leaderboard.paired` shows the first defense above the second one, or below it; two targets, which share
            no backdoored model, are apart if their intervals do not overlap
    alike   the 95 % interval of the paired difference lies within ± the margin. It is beyond if the whole interval is
    models  a statistic of `leaderboard.population`, within a bound, or of two defenses apart

A row needs three seeds of the attack's training, or three clean and three attacked models, to show anything. The claim
does not hold if a row is shown to be on the other side. It holds if every row is shown on the claim's side, rows with
fewer seeds aside whose value is there too, and if every attack, target and setting that the claim names has a row that
shows it. In any other case it is not shown.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harness.judges import statistics
from harness.runs import doubts
from harness.runs.record import Record, bare
from leaderboard import headline, paired, population, report, reported
from leaderboard.columns import possible
from leaderboard.paired import LEAST_SEEDS
from leaderboard.paper_rankings import BUDGET
from leaderboard.population import Estimate, Population
from leaderboard.recompute import SHARES
from leaderboard.reported import Paper, Strict, Text
from leaderboard.rows import Control, PooledCell
from leaderboard.specs import arguments

FILE = Path(__file__).parent / "paper_claims.toml"
Outcome = Literal["holds", "does not hold", "not shown", "not measured", "not testable"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "does not hold", "not shown", "not measured", "not testable")
Kind = Literal["removal", "utility", "robustness", "ablation", "detection", "adaptive", "cost"]
Statistic = Literal["accuracy", "auroc", "tpr", "undetected", "found"]

SIZE = (*BUDGET, "ema", "schedule", "rounding", "synthetic", "sampling_steps", "noises", "iterations", "bf16", "prune")
SHARED = (*BUDGET, "ratio")  # parameters that two different defenses of one comparison have equal
LOOSE = ("synthetic",)  # a parameter that two forms of one defense need not have equal
NOISE_ATTACKS = ("baddiffusion", "villandiffusion", "trojdiff", "invibackdoor")
ADAPTIVE = ("adaptive_weight", "spare", "drop", "rehearse")  # of attacks on noise that know the defense
ANY = "any"  # a parameter of any value that is not the default
OF_SEARCHES = ("found_asr",)  # scores of detectors; all others are of the defended model
ON_REMOVAL = ("asr", "removal")  # scores by which a ruined model looks clean
WORDS = {
    "asr": "ASR",
    "removal": "removal",
    "fd_ratio[]": "FD ratio",
    "drift_triggered": "drift with the trigger",
    "found_asr": "ASR of the found trigger",
    "fd_ratio[] / fd_ratio_before[]": "FD, ratio to the attacked model's",
    "attribute_drop − attribute_drop_before": "loss of attributes from the attacked model",
}
STATISTIC_WORDS: dict[Statistic, str] = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "tpr": "TPR at 5 % FPR",
    "undetected": "undetected ASR",
    "found": "ASR of the found trigger",
}
LEGEND = (
    "A claim holds or does not hold for our rows: small models, settings that suit them, and our data and judges. That "
    "says nothing of the paper's own models. Rows show something from three seeds of the attack's training on. “Not "
    "shown”: the intervals, or fewer than three seeds, leave the claim open. The bounds and margins are our reading of "
    "the claims: leaderboard/paper_claims.toml. An accuracy counts models; models whose training began with the same "
    "weights are no independent observations, so that its interval is too narrow where the initialisations are few."
)


# ---- the file -------------------------------------------------------------------------------------------------------

Names = tuple[Text, ...]


class Cells(Strict):
    """Where a claim is tested: specs, of which the named parameters count and no others. () stands for anything."""

    model: Names = ()
    attack: Names = ()
    trigger: Names = ()
    target: Names = ()
    sampler: Names = ()


class Criterion(Strict):
    """The fields are explained at the top of paper_claims.toml."""

    rule: Literal["bound", "order", "alike", "models"]
    defense: Names
    below: Names = ()
    free: Names = ()
    score: Text | None = None
    per: Text | None = None
    minus: Text | None = None
    at_most: float | None = None
    at_least: float | None = None
    end: float | None = None
    margin: Annotated[float, Field(gt=0)] | None = None
    targets: tuple[Text, Text] | None = None
    statistic: Statistic | None = None
    verdict: tuple[population.Rule, population.Rule] = ("own", "own")

    @model_validator(mode="after")
    def _has_what_its_rule_needs(self) -> Criterion:
        bounded = (self.at_most is None) != (self.at_least is None)
        if (self.rule == "models") == (self.statistic is None) or (self.rule == "models") != (self.score is None):
            raise ValueError("rule 'models' takes a statistic, every other rule a score")
        if self.rule in ("order", "alike") and bool(self.below) == (self.targets is not None):
            raise ValueError("two defenses are compared by `below`, two targets by `targets`: give one of them")
        if self.targets is not None and self.rule != "order":
            raise ValueError("`targets` belongs to rule 'order'")
        if (self.rule == "alike") != (self.margin is not None):
            raise ValueError("rule 'alike' needs a margin, and no other rule has one")
        if bounded != (self.rule == "bound" or (self.rule == "models" and not self.below)):
            raise ValueError("a bound needs at_most or at_least, an order neither")
        if bounded != (self.end is not None):
            raise ValueError("a bound needs `end`, how far the interval may reach")
        if (self.per or self.minus) and (self.rule != "bound" or (self.per and self.minus)):
            raise ValueError("`per` or `minus` belongs to rule 'bound'")
        if self.end is not None and (self.end < self.within if self.at_most is not None else self.end > self.within):
            raise ValueError("`end` lies on the claim's side of its bound")
        return self

    @property
    def within(self) -> float:
        return next(x for x in (self.at_most, self.at_least, math.nan) if x is not None)

    @property
    def measure(self) -> str:
        """What is measured, for people."""
        if self.statistic is not None:
            return STATISTIC_WORDS[self.statistic]
        name = next((f"{self.score} {sign} {x}" for sign, x in (("/", self.per), ("−", self.minus)) if x), self.score)
        return WORDS.get(name or "", name or "")

    @property
    def share(self) -> bool:
        """Whether the values are shares, shown in %."""
        stem = (self.score or "").partition("@")[0]
        return self.statistic not in (None, "auroc") or (
            self.per is None and stem in (*SHARES, "removal", "found_asr", "attribute_accuracy", "attribute_drop")
        )


class Claim(Strict):
    id: Text
    paper: Text
    where: Text
    read: Literal["paper", "abstract", "earlier text"]
    kind: Kind
    claim: Text
    not_testable: str = ""
    cells: Cells = Cells()
    test: Criterion | None = None

    @model_validator(mode="after")
    def _is_tested_or_says_why_not(self) -> Claim:
        if (self.test is None) != bool(self.not_testable):
            raise ValueError(f"{self.id}: give either a test, or not_testable with the reason")
        return self


class Claims(Strict):
    claim: tuple[Claim, ...]

    @model_validator(mode="after")
    def _each_once_and_of_a_known_paper(self) -> Claims:
        twice = [name for name, n in Counter(each.id for each in self.claim).items() if n > 1]
        if twice:
            raise ValueError(f"claim {twice[0]} stands twice")
        known = {paper.id for paper in reported.shipped().papers}
        for each in self.claim:
            if each.paper not in known:
                raise ValueError(f"{each.id} is of paper '{each.paper}', which reported.toml does not list")
        return self


def read(path: Path = FILE) -> Claims:
    """The file, checked. Raises ReportedError for the first thing that is wrong with it."""
    return reported.parsed(Claims, path)


@cache
def shipped() -> Claims:
    return read()


# ---- verdicts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A claim beside what we measured. measured: in words, "" for nothing. why: what leaves it open, or untested.
    cells: all that were looked at; deciding: those of the row that `measured` is about."""

    claim: Claim
    paper: Paper
    outcome: Outcome
    measured: str = ""
    why: str = ""
    cells: tuple[PooledCell, ...] = ()
    deciding: tuple[PooledCell, ...] = ()


@dataclass(frozen=True)
class Found:
    """One row. side: how far the value lies on the claim's side, negative beyond. shown: whether that is shown (True),
    the contrary (False), or neither."""

    cells: tuple[PooledCell, ...]
    words: str
    seeds: int
    side: float
    shown: bool | None
    why: str = ""

    @property
    def few(self) -> bool:
        return self.seeds < LEAST_SEEDS


FEW, FEW_MODELS = "fewer than three seeds", "fewer than three clean or backdoored models"
OPEN = "the interval leaves it open"
BROKEN = "the defense ruined the model"
NO_INTERVAL = "every value is the same, so that there is no interval"


def verdicts(cells: Sequence[PooledCell], claims: Claims | None = None) -> list[Verdict]:
    """Every claim, in the order of the file."""
    papers = reported.shipped()
    return [_verdict(claim, papers.paper(claim.paper), cells) for claim in (claims or shipped()).claim]


def counts(found: Sequence[Verdict]) -> dict[Outcome, int]:
    """How many claims have each outcome, also those that none has."""
    return {outcome: sum(each.outcome == outcome for each in found) for outcome in OUTCOMES}


def _verdict(claim: Claim, paper: Paper, cells: Sequence[PooledCell]) -> Verdict:
    test = claim.test
    if test is None:
        return Verdict(claim, paper, "not testable", why=claim.not_testable)
    rows = list(RULES[test.rule](claim.cells, test, cells))
    looked = tuple({cell.id: cell for row in rows for cell in row.cells}.values())
    if not rows:
        return Verdict(claim, paper, "not measured", why="no row measures it")
    outcome, deciding, why = _outcome(claim, test, rows)
    worst = min(deciding, key=lambda row: row.side)
    several = f"; the least favourable of {len(deciding)} rows" if len(deciding) > 1 else ""
    several += f"; {len(rows)} rows in all" if len(rows) > len(deciding) else ""
    return Verdict(claim, paper, outcome, worst.words + several, why, looked, worst.cells)


def _outcome(claim: Claim, test: Criterion, rows: Sequence[Found]) -> tuple[Outcome, Sequence[Found], str]:
    """The outcome, the rows that decide it, and what leaves it open."""
    against, for_ = ([row for row in rows if row.shown is side] for side in (False, True))
    if against:
        return "does not hold", against, ""
    open_ = [row for row in rows if row.shown is None and not (row.few and row.side >= 0)]
    if not open_ and not _missing(claim, test, for_):
        return "holds", for_, ""
    left = open_ or [row for row in rows if row.shown is None] or rows
    reasons = Counter(row.why for row in left if row.why)
    said = [why if len(rows) == 1 else f"{why} ({n} of {len(rows)} rows)" for why, n in reasons.items()]
    unmeasured = _missing(claim, test, rows)
    if unmeasured:
        said.append(f"no row of {', '.join(unmeasured)}")
    return "not shown", left, "; ".join(said)


def _missing(claim: Claim, test: Criterion, rows: Sequence[Found]) -> list[str]:
    """What the claim names and none of the rows has."""
    cells = [cell for row in rows for cell in row.cells]
    places = [(part, name) for part in Cells.model_fields for name in getattr(claim.cells, part)]
    places += [("target", name) for name in test.targets or ()]
    missing = [name for part, name in places if not any(_is(cell, part, name) for cell in cells)]
    free = (*SIZE, *test.free)
    for name in (*test.defense, *test.below):
        if not any(_is(cell, "defense", name, free) for cell in cells):
            missing.append(name)
    return missing


# ---- which cells ----------------------------------------------------------------------------------------------------


def _selected(cells: Sequence[PooledCell], where: Cells, defenses: Names, test: Criterion) -> list[PooledCell]:
    """The finished cells of some of the defenses at the place, in which the attack took; decoy controls are none, and
    neither are rows of detection alone, unless the score is a detector's."""
    found = []
    for cell in cells:
        defends = "purification" in cell.tasks or test.score in OF_SEARCHES
        if cell.state is not None or cell.control is Control.decoy or not defends or not _placed(cell, where):
            continue
        if any(_is(cell, "defense", name, (*SIZE, *test.free)) for name in defenses):
            took = tuple(record for record in cell.records if _took(record))
            if took:
                found.append(cell if len(took) == len(cell.records) else replace(cell, records=took))
    return found


def _placed(cell: PooledCell, where: Cells) -> bool:
    if bare(cell.specs.attack) == "none":
        return False
    for part in Cells.model_fields:
        names = getattr(where, part)
        if names and not any(_is(cell, part, name) for name in names):
            return False
    named = {parameter for name in where.attack for parameter in arguments(name)}
    changed = cell.changed("attack") if bare(cell.specs.attack) in NOISE_ATTACKS else {}
    return {name for name in ADAPTIVE if _value(changed.get(name, "0"))} <= named


def _took(record: Record) -> bool:
    """Whether the model was backdoored at all, as the head table has it; also if that was not measured."""
    return not record.value("asr_before") < headline.LIMITS.backdoored


def _is(cell: PooledCell, part: str, wanted: str, free: Sequence[str] | None = None) -> bool:
    """Whether a part of the cell is of this name, with the parameters that `wanted` names. free: the only parameters
    beside them that may differ from the defaults; None: all may."""
    spec = getattr(cell.specs, part)
    if bare(spec) != bare(wanted):
        return False
    changed, named = cell.changed(part), arguments(wanted)
    have = {**arguments(spec), **changed}
    for name, value in named.items():
        if _value(value) == ANY and _value(changed.get(name, "0")):
            continue
        if name not in have or _value(have[name]) != _value(value):
            return False
    return free is None or set(changed) <= {*named, *free}


@cache
def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- rules ----------------------------------------------------------------------------------------------------------


def _bound(where: Cells, test: Criterion, cells: Sequence[PooledCell]) -> Iterator[Found]:
    for cell in _selected(cells, where, test.defense, test):
        known = [(record, value) for record in cell.records if not math.isnan(value := _measured(record, test))]
        if known:
            value, ends = _over_seeds([r for r, _ in known], [x for _, x in known], test)
            words = f"{test.measure} {_shown(value, ends, test)}, {_seeds(len(known))}"
            yield _judged((cell,), words, len(known), value, ends, test)


def _judged(
    cells: tuple[PooledCell, ...], words: str, n: int, value: float, ends: tuple[float, float] | None, test: Criterion
) -> Found:
    """A value with its interval against the bound of a test. n: its seeds, or models of the rarer kind."""
    sign = 1 if test.at_most is not None else -1
    side = sign * (test.within - value)
    if n < LEAST_SEEDS:
        return Found(cells, words, n, side, None, FEW_MODELS if test.rule == "models" else FEW)
    if ends is None:
        return Found(cells, words, n, side, None, NO_INTERVAL)
    near, far = (ends[0], ends[1]) if sign > 0 else (-ends[1], -ends[0])
    within, end = sign * test.within, sign * (test.end if test.end is not None else math.nan)
    if near > within:
        return Found(cells, words, n, side, False)
    if side >= 0 and far <= end:
        ruined = test.score in ON_REMOVAL and any(map(_ruined, cells))
        return Found(cells, words, n, side, None if ruined else True, BROKEN if ruined else "")
    return Found(cells, words, n, side, None, OPEN)


def _ruined(cell: PooledCell) -> bool:
    return any(doubt.code in doubts.BROKEN for doubt in cell.doubts)


def _measured(record: Record, test: Criterion) -> float:
    value = record.value(test.score or "")
    if test.per is not None:
        base = record.value(test.per)
        return value / base if base else math.nan
    return value - record.value(test.minus) if test.minus is not None else value


def _over_seeds(
    records: Sequence[Record], values: Sequence[float], test: Criterion
) -> tuple[float, tuple[float, float] | None]:
    """The mean with the hull of its two intervals: over seeds, and over samples, which seeds that agree by chance would
    hide. A seed may have the samples of the others, so the samples of one seed count."""
    mean = math.fsum(values) / len(values)
    found = [ends for ends in (statistics.mean_interval(values), _over_samples(records, mean, test)) if ends]
    if not found:
        return mean, None
    hull = (min(low for low, _ in found), max(high for _, high in found))
    return mean, hull if test.per or test.minus else possible(test.score or "", hull)


def _over_samples(records: Sequence[Record], mean: float, test: Criterion) -> tuple[float, float] | None:
    if test.per is not None or test.minus is not None:
        return None
    scores = [record.scores[record.name_of(test.score or "")] for record in records]
    if (test.score or "").partition("@")[0] in (*SHARES, "removal"):
        n = min(score.n for score in scores)
        return statistics.wilson(round(min(1.0, max(0.0, mean)) * n), n) if n else None
    halves = [(score.interval[1] - score.interval[0]) / 2 for score in scores if score.interval is not None]
    return (mean - max(halves), mean + max(halves)) if len(halves) == len(scores) else None


def _order(where: Cells, test: Criterion, cells: Sequence[PooledCell]) -> Iterator[Found]:
    if test.targets is not None:
        yield from _targets(where, test, test.targets, cells)
        return
    for pair, made in _compared(where, test, cells):
        n, effect = len(made.by_seed), made.difference
        shown, why = (effect > 0) if made.differs else None, "" if made.differs else OPEN
        if n < LEAST_SEEDS:
            shown, why = None, FEW
        elif made.low is None:
            why = NO_INTERVAL
        if shown and test.score == "removal" and _ruined(pair[0]):
            shown, why = None, BROKEN
        yield Found(pair, _difference(made, test), n, effect, shown, why)


def _alike(where: Cells, test: Criterion, cells: Sequence[PooledCell]) -> Iterator[Found]:
    margin = test.margin or math.nan
    for pair, made in _compared(where, test, cells):
        n, side = len(made.by_seed), margin - abs(made.difference)
        shown, why = None, OPEN
        if n < LEAST_SEEDS:
            why = FEW
        elif made.low is None or made.high is None:
            why = NO_INTERVAL
        elif -margin <= made.low and made.high <= margin:
            shown, why = True, ""
        elif made.low > margin or made.high < -margin:
            shown, why = False, ""
        yield Found(pair, _difference(made, test), n, side, shown, why)


def _compared(
    where: Cells, test: Criterion, cells: Sequence[PooledCell]
) -> Iterator[tuple[tuple[PooledCell, PooledCell], paired.Comparison]]:
    """The cells of the first defenses beside those of the second ones on the same backdoored models, with the same
    budget, and alike but for what the test names."""
    first, second = (_selected(cells, where, names, test) for names in (test.defense, test.below))
    named = {parameter for name in (*test.defense, *test.below) for parameter in arguments(name)}
    for a, b in itertools.product(first, second):
        if a.id != b.id and (_comparable(a, b, named) or test.score in OF_SEARCHES):
            made = paired.difference(test.score or "", paired.placed(a.records), paired.placed(b.records), 1)
            if made is not None:
                yield (a, b), made


def _comparable(a: PooledCell, b: PooledCell, named: set[str]) -> bool:
    ours, theirs = arguments(a.specs.defense), arguments(b.specs.defense)
    shared = set(ours) & set(theirs) - named
    if bare(a.specs.defense) != bare(b.specs.defense):
        return all(ours[name] == theirs[name] for name in shared & set(SHARED))
    return all(ours[name] == theirs[name] for name in shared - set(LOOSE))


def _targets(where: Cells, test: Criterion, targets: tuple[str, str], cells: Sequence[PooledCell]) -> Iterator[Found]:
    """A defense on two targets, which are backdoors of different models: their intervals do not overlap."""
    plain = test.model_copy(update={"targets": None})
    sides = [_selected(cells, where.model_copy(update={"target": (t,)}), test.defense, test) for t in targets]
    for a, b in itertools.product(*sides):
        if a.specs.defense != b.specs.defense or any(
            getattr(a.specs, part) != getattr(b.specs, part) for part in ("model", "attack", "trigger", "sampler", "n")
        ):
            continue
        made = []
        for cell in (a, b):
            known = [(r, x) for r in cell.records if not math.isnan(x := _measured(r, plain))]
            made.append(
                (len(known), *_over_seeds([r for r, _ in known], [x for _, x in known], plain)) if known else ()
            )
        if all(made):
            (n, value, ends), (m, other, around) = made
            words = f"{test.measure} {_shown(value, ends, test)} against {_shown(other, around, test)}"
            yield _apart((a, b), f"{words}, {_seeds(min(n, m))}", min(n, m), (value, ends), (other, around))


Ends = tuple[float, float] | None


def _apart(
    cells: tuple[PooledCell, ...],
    words: str,
    n: int,
    above: tuple[float, Ends],
    below: tuple[float, Ends],
    few: str = FEW,
) -> Found:
    """Whether one value is above another one that is not paired with it: their intervals do not overlap."""
    side = above[0] - below[0]
    if n < LEAST_SEEDS:
        return Found(cells, words, n, side, None, few)
    if above[1] is None or below[1] is None:
        return Found(cells, words, n, side, None, NO_INTERVAL)
    if above[1][0] > below[1][1]:
        return Found(cells, words, n, side, True)
    if above[1][1] < below[1][0]:
        return Found(cells, words, n, side, False)
    return Found(cells, words, n, side, None, OPEN)


def _models(where: Cells, test: Criterion, cells: Sequence[PooledCell]) -> Iterator[Found]:
    first = list(_populations(where, test, test.defense, test.verdict[0], cells))
    second = list(_populations(where, test, test.below, test.verdict[1], cells)) if test.below else []
    if not test.below:
        for found, estimate, behind in first:
            words = f"{test.measure} {_of_models(found, estimate, test)}"
            yield _judged(behind, words, min(found.clean, found.attacked), estimate.value, _ends(estimate), test)
    for (one, a, ours), (other, b, theirs) in itertools.product(first, second):
        if (one.family, one.model) == (other.family, other.model):
            n = min(one.clean, one.attacked, other.clean, other.attacked)
            words = f"{test.measure} {_of_models(one, a, test)} against {_of_models(other, b, test)}"
            yield _apart((*ours, *theirs), words, n, (a.value, _ends(a)), (b.value, _ends(b)), FEW_MODELS)


def _populations(
    where: Cells, test: Criterion, defenses: Names, rule: population.Rule, cells: Sequence[PooledCell]
) -> Iterator[tuple[Population, Estimate, tuple[PooledCell, ...]]]:
    """The populations of the defenses over the attacks of the claim, one for each family that it names, else one for
    all. A forest knows the other families too."""
    everywhere = where.model_copy(update={"attack": ()}) if rule == "forest" else where
    chosen = [
        cell
        for cell in cells
        if cell.state is None and "detection" in cell.tasks and cell.control is not Control.decoy
        if any(_is(cell, "defense", name, (*SIZE, *test.free)) for name in defenses)
        if _placed(cell, everywhere) or _clean(cell, where)
    ]
    families = {bare(name) for name in where.attack}
    for found in population.populations(chosen):
        estimate = found.accuracy[rule] if test.statistic == "accuracy" else getattr(found, test.statistic or "")
        single = families if families else {population.ALL}
        if found.family in single and not math.isnan(estimate.value):
            behind = tuple(
                cell
                for cell in chosen
                if set(cell.keys) & set(found.keys)
                if not families or bare(cell.specs.attack) in {found.family, "none"}
            )
            yield found, estimate, behind


def _clean(cell: PooledCell, where: Cells) -> bool:
    clean = bare(cell.specs.attack) == "none"
    return clean and (not where.model or any(_is(cell, "model", name) for name in where.model))


RULES: Mapping[str, Callable[[Cells, Criterion, Sequence[PooledCell]], Iterator[Found]]] = {
    "bound": _bound,
    "order": _order,
    "alike": _alike,
    "models": _models,
}


# ---- words ----------------------------------------------------------------------------------------------------------


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def _shown(value: float, ends: Ends, test: Criterion) -> str:
    """ "98.4 % (96.1–99.4)"."""
    around = f" ({_figure(ends[0], test)}–{_figure(ends[1], test)})" if ends is not None else ""
    return f"{_figure(value, test)}{' %' if test.share else ''}{around}"


def _figure(value: float, test: Criterion) -> str:
    small = 0 < abs(value) < 1e-3
    text = f"{100 * value:.1f}" if test.share else f"{value:.5f}" if small else f"{value:.3g}"
    return text.replace("-", "−")


def _difference(made: paired.Comparison, test: Criterion) -> str:
    unit = " points" if test.share else ""
    around = (
        "" if made.low is None or made.high is None else f" ({_figure(made.low, test)} to {_figure(made.high, test)})"
    )
    sides = f"{_shown(made.a, None, test)} against {_shown(made.b, None, test)}"
    apart = f"{_figure(made.difference, test)}{unit}{around}"
    return f"{test.measure} {sides}, difference {apart}, {_seeds(len(made.by_seed))}"


def _ends(estimate: Estimate) -> Ends:
    return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


def _of_models(found: Population, estimate: Estimate, test: Criterion) -> str:
    return f"{_shown(estimate.value, _ends(estimate), test)}, {population.models_of(found)}"


def summary(found: Sequence[Verdict]) -> str:
    """ "52 claims: 3 hold, ..."."""
    parts = [
        f"{n} {'hold' if outcome == 'holds' else outcome.replace('does', 'do')}" for outcome, n in counts(found).items()
    ]
    return f"{len(found)} claims: {', '.join(parts)}"


def by_paper(found: Sequence[Verdict]) -> list[tuple[Paper, list[Verdict]]]:
    """The verdicts of each paper, in the order of the file."""
    papers = list(dict.fromkeys(each.paper for each in found))
    return [(paper, [each for each in found if each.paper == paper]) for paper in papers]


def markdown(found: Sequence[Verdict]) -> list[str]:
    """The claims as Markdown, a table for each paper."""
    from tabulate import tabulate

    parts = ["## Claims of the papers", f"{summary(found)}.", LEGEND]
    for paper, mine in by_paper(found):
        lines = [
            [
                report.escape(each.claim.where),
                report.escape(each.claim.claim),
                report.escape(each.measured or "–"),
                f"**{each.outcome}**" + (f": {report.escape(each.why)}" if each.why else ""),
                ", ".join(f"[{i}](cells/{cell.id}.html)" for i, cell in enumerate(each.cells, 1)) or "–",
            ]
            for each in mine
        ]
        head = ["where", "claimed", "measured here", "outcome", "rows"]
        parts += [
            f"### {report.escape(paper.title)}",
            tabulate(lines, head, tablefmt="pipe", disable_numparse=True),
        ]
    return parts


def entry(each: Verdict) -> dict[str, Any]:
    """A claim in leaderboard.json."""
    claim = each.claim
    return {
        "id": claim.id, "paper": claim.paper, "where": claim.where, "read": claim.read, "kind": claim.kind,
        "claim": claim.claim, "measured": each.measured, "outcome": each.outcome, "why": each.why,
        "cells": [cell.id for cell in each.cells], "deciding": [cell.id for cell in each.deciding],
    }  # fmt: skip
