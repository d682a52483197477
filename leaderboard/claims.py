"""What a record claims, held against what the plugins of its cell and the suite say: knowledge, thresholds, which
inputs count, per-sample values, jobs, and the rows that must be there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from harness.capabilities import place_of
from harness.methods.decoy_choice import led
from harness.runs.declared import Declared, Unknown
from harness.runs.jsonable import to_jsonable
from harness.runs.printable import printable
from harness.runs.record import Record, bare, control_words
from harness.runs.suite import AXES
from harness.types import WRONG, Cell
from leaderboard import protocol, recompute
from leaderboard.recompute import SHARES
from leaderboard.results import Results
from leaderboard.wellformed import unverifiable

CLOSE = 1e-5  # relative, of thresholds that were computed in single precision
OF_RUN = ("version", "weights", "libraries")  # what of a plugin's identity no record can be held to
ALIKE = str.maketrans("01_.", "ol--")


def problems(record: Record, declared: Declared) -> tuple[list[str], list[str]]:
    """(what is wrong, what cannot be verified), in words."""
    wrong, open_ = [], []
    for question in (_names, _plugin, _kept, _counted, _thresholds, _control, _jobs):
        try:
            wrong += question(record, declared)
        except Unknown as error:
            open_.append(f"unverifiable: {printable(error)}")
    return wrong, list(dict.fromkeys(open_))


# ---- plugins --------------------------------------------------------------------------------------------------------


def _names(record: Record, declared: Declared) -> Iterator[str]:
    """A name that no plugin has must not look like one that a plugin has."""
    for part, kind in AXES.items():
        name, known = bare(getattr(record.cell, part)), declared.names(kind)
        near = [other for other in known if _skeleton(other) == _skeleton(name)]
        if name not in known and near:
            yield f"its {part} {printable(name)} looks like {near[0]}, and is none"
        source = record.provenance.sources.get(part)
        if source is not None and name in known and source.distribution != declared.distribution(kind, name):
            theirs = declared.distribution(kind, name)
            yield f"says that its {part} is of {printable(source.distribution)}; {name} is of {theirs}"


def _skeleton(name: str) -> str:
    return name.lower().translate(ALIKE).replace("i", "l").replace("-", "")


def _plugin(record: Record, declared: Declared) -> Iterator[str]:
    for part, spec in declared.canonical(record.cell).items():
        if spec != getattr(record.cell, part) and not unverifiable(record) and not _made_from(record, part):
            yield f"its {part} {printable(getattr(record.cell, part))} is not the whole spec, {printable(spec)}"
    said, made = declared.of(record.cell), record.provenance
    if set(record.knowledge) != set(said.needs):
        words = [", ".join(sorted(names)) or "nothing" for names in (record.knowledge, said.needs)]
        yield f"says that {bare(record.cell.defense)} was given {words[0]}; its plugin needs {words[1]}"
    if record.cell.trigger_given != "true" and "trigger" not in said.needs:
        yield f"says that {bare(record.cell.defense)} was given a control trigger; its plugin needs none"
    if set(made.delivers) != set(said.delivers):
        words = [", ".join(sorted(names)) or "nothing" for names in (made.delivers, said.delivers)]
        yield f"says that {bare(record.cell.defense)} delivers {words[0]}; its plugin says {words[1]}"
    if made.track is not None and made.track != said.track:
        yield f"says that its track is {made.track}; its model is of {said.track}"
    sampled = made.sampled.get("backdoored/triggered")
    if sampled is not None and (sampled.sampler, sampled.nfe) != (record.cell.sampler, said.nfe):
        yield f"says that {sampled.nfe} network evaluations made an image; its sampler takes {said.nfe}"


def _kept(record: Record, declared: Declared) -> Iterator[str]:
    keeps = declared.keeps(record.provenance.metrics)
    for name, score in record.scores.items():
        if name.partition("[")[0] in keeps and not score.per_sample and not math.isnan(score.value):
            yield f"{name} lacks its per-sample values, which its metric keeps"


def _counted(record: Record, declared: Declared) -> Iterator[str]:
    """The images that do not count in rates are those of the prompts in which the target has no say."""
    cell = record.cell
    counted = declared.counted(cell.model, cell.trigger, cell.target, cell.n, cell.evaluation_seed)
    for name in SHARES:
        score = record.scores.get(name)
        if score is None or not score.per_sample or math.isnan(score.value):
            continue
        wanted = counted
        if name == "false_triggers":
            wanted = counted[: math.ceil(cell.n / WRONG)] * WRONG
        left_out = [not math.isnan(value) for value in score.per_sample]
        if tuple(left_out) != wanted:
            yield f"{name} counts {sum(left_out)} images; its target and trigger count {sum(wanted)}, or others"


def _thresholds(record: Record, declared: Declared) -> Iterator[str]:
    """The thresholds are those of the target's plugin, and each rate is the share at most that."""
    clean = record.scores.get("clean_model_hits")
    recorded = recompute.value_of(record.scores, "asr_threshold")
    if clean is None or not clean.per_sample or math.isnan(recorded):
        return
    hit, taus = declared.thresholds(record.cell, clean.per_sample)
    if not math.isclose(recorded, taus[hit], rel_tol=CLOSE, abs_tol=CLOSE * 1e-3):
        yield f"asr_threshold is {recorded:.10g}; target {bare(record.cell.target)} has {taus[hit]:.10g}"
    for name in SHARES:
        if name in record.scores:
            for at in taus:
                yield from _rate(record, name, at, recorded if at == hit else taus[at])


def _rate(record: Record, name: str, at: str, tau: float) -> Iterator[str]:
    score = record.scores.get(f"{name}@{at}")
    if score is None:
        yield f"lacks {name}@{at}, a threshold of its target"
        return
    values = recompute.samples(record.scores, name)
    if values and not math.isnan(score.value):
        found = [share for share, _ in recompute.shares(values, tau) or ()]
        if not any(recompute.close(score.value, share) for share in found):
            yield f"{name}@{at} is {score.value:.10g}; at the threshold {tau:g} of its target it is {found[0]:.10g}"


def _control(record: Record, declared: Declared) -> Iterator[str]:
    """A control cell names the trigger that the defense was given, and the candidates that led to it."""
    given, control = record.cell.trigger_given, record.provenance.control
    if given == "true" or record.error:
        if control is not None and given == "true":
            yield "names a control trigger; its defense was given the true one"
        return
    if control is None:
        yield f"says that its defense was given {control_words(given)}, and names no control trigger"
        return
    rates = [each.hits / each.n if each.n else math.nan for each in control.tried]
    leads = {led(rates, place_of(given)), led(rates, 1)}  # 1: rows from before decoys had one ladder
    if control.given != given or (control.inert, control.chosen) not in leads:
        yield "its control trigger is not the one to which its candidates lead"
    if any(not 0 <= each.hits <= each.n for each in control.tried):
        yield "a candidate for its control trigger has more hits than images"


def _made_from(record: Record, part: str) -> bool:
    """Whether a job's key was computed from the spec as the cell writes it: a parameter came later."""
    spec, jobs = getattr(record.cell, part), record.provenance.jobs.values()
    said = [(job.ingredients or {}).get(part) for job in jobs]
    return any(isinstance(each, dict) and each.get("spec") == spec for each in said)


# ---- jobs -----------------------------------------------------------------------------------------------------------


def _jobs(record: Record, declared: Declared) -> Iterator[str]:
    """The jobs are those that the cell plans today, but for weights and code: ingredients by name, keys by place."""
    if unverifiable(record) or any(job.ingredients is None for job in record.provenance.jobs.values()):
        return
    mine = {key: dict(job.ingredients or {}) for key, job in record.provenance.jobs.items()}
    cell = _canonical(record.cell, declared)
    planned = {k: to_jsonable(j.ingredients) for k, j in declared.jobs(cell, record.provenance.metrics).items()}
    yield from _identities(mine)
    mine = {key: _current(ingredients, declared) for key, ingredients in mine.items()}
    paired = _paired(record, mine, planned)
    if len(paired) != len(planned) or set(paired.values()) != set(mine):
        yield f"has {len(mine)} jobs that are not the {len(planned)} of its cell"
        return
    for key, other in paired.items():
        wanted, found = _bare(renamed(planned[key], paired)), _bare(mine[other])
        if isinstance(wanted.get("inputs"), list):
            wanted["inputs"] = sorted(wanted["inputs"])
        odd = next((n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)), None)
        if odd is not None:
            kind = record.provenance.jobs[other].kind
            yield f"the {kind} job {other[:12]} was made from another {odd} than that of its cell"


def _paired(record: Record, mine: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, str]:
    """Planned key → the record's key: one job of each kind but sample, and image sets by their names."""
    measured = next(job for job in planned.values() if job["kind"] == "measure")
    sets = mine[record.key].get("samples") if record.key in mine else None
    found = {key: str(sets.get(name)) for name, key in measured["samples"].items()} if isinstance(sets, dict) else {}
    for kind in ("attack", "control", "defend", "measure"):
        keys, others = ([k for k, job in jobs.items() if job.get("kind") == kind] for jobs in (planned, mine))
        found |= dict(zip(keys, others, strict=False))
    return {key: other for key, other in found.items() if other in mine}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Ingredients with other keys for the jobs that they name."""
    if isinstance(value, dict):
        return {name: renamed(inner, names) for name, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def _bare(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """Ingredients but for what depends on the code and the machine of the run."""
    return {n: _stripped(v) for n, v in ingredients.items() if n not in ("code", "threads", "precision")}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stripped(inner) for name, inner in value.items() if name not in OF_RUN}
    return [_stripped(inner) for inner in value] if isinstance(value, list) else value


def _current(value: Any, declared: Declared) -> Any:
    """Ingredients with every spec as it is written today."""
    if isinstance(value, dict):
        return {name: _current(inner, declared) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_current(inner, declared) for inner in value]
    return declared.current(value) if isinstance(value, str) else value


def _identities(jobs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One plugin has one version and one set of weights in all jobs of a record."""
    known: dict[str, Any] = {}
    for ingredients in jobs.values():
        for part in ("model", "trigger", "target", "sampler"):
            said = ingredients.get(part)
            if isinstance(said, dict) and known.setdefault(f"{part} {said.get('spec')}", said) != said:
                yield f"its jobs do not agree on version or weights of the {part}"


# ---- suites ---------------------------------------------------------------------------------------------------------


def rows(suite: Results, declared: Declared) -> tuple[list[str], list[str]]:
    """(what is wrong, what cannot be verified): a row for each cell of the suite, none left out."""
    try:
        planned = declared.suite(suite.suite)
    except Unknown as error:
        return [], [f"unverifiable: which rows must be there is not known ({printable(error)})"]
    have = {_canonical(record.cell, declared) for record in suite.records if not planned.lacks(record.cell)}
    missing = [cell for cell in planned.cells if cell not in have]
    left_out = {cell for cell in (_canonical(entry.cell, declared) for entry in suite.dropped) if cell in planned.cells}
    wrong = [f"says that a row is left out, and suite {suite.suite} plans it: {_cell(cell)}" for cell in left_out]
    older = all(map(unverifiable, suite.records))  # sealed: none can be left out, and the suite has changed since
    partial = suite.suite == protocol.shipped().suite  # its table says how many of its cells are there
    wrong += [
        f"lacks a row of suite {suite.suite}: {_cell(cell)}; run the suite again"
        for cell in missing
        if not older and not partial
    ]
    extra = len(have - set(planned.cells))
    notes = [f"has {extra} rows that suite {suite.suite} does not plan"] if extra else []
    if partial:
        wrong += protocol.problems(planned, declared.current)
        notes += [f"{len(missing)} of {len(planned.cells)} cells are not computed yet"] if missing else []
    elif older and missing:
        here = f"{extra} of the rows here are not in suite {suite.suite} of today"
        notes = [f"{here}, which plans {len(missing)} others"]
    return wrong, notes


def _canonical(cell: Cell, declared: Declared) -> Cell:
    try:
        return Cell(**{**asdict(cell), **declared.canonical(cell)})
    except Unknown:
        return cell


def _cell(cell: Cell) -> str:
    decoy = "" if cell.trigger_given == "true" else f", given {control_words(cell.trigger_given)}"
    return (
        f"{printable(cell.defense)}{decoy} on {cell.model} attacked by {bare(cell.attack)} ({bare(cell.trigger)} to "
        f"{bare(cell.target)}, {bare(cell.sampler)}), seed {cell.seed}, n = {cell.n}"
    )
