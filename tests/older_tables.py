"""The tables of the older studies in docs/results.md, and that of all published rows, made from the records.

python -m tests.older_tables            # rewrite all of them
python -m tests.older_tables style      # rewrite one
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from harness.registry import parse_spec
from harness.runs.record import Record, bare
from leaderboard import results, wellformed
from tests.tables import Place, markdown, measured, spread

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
# Parameters that the defenses of a table share; the text above the table has them.
SHARED = (
    *("steps", "batch", "lr", "schedule", "ema", "invert", "prune", "synthetic", "rounding"),
    *("sampling_steps", "noises", "iterations"),
)
SAMPLER = {"clip": "x0 clipped", "corrections": "with correction"}
PURIFIED = (("ASR %", "asr", 100, 1), ("hits without the trigger %", "clean_hits", 100, 1))
OF_TEXT = (*PURIFIED, ("attributes right %", "attribute_accuracy", 100, 1), ("drift", "drift", 1, 4))
OF_DIGITS = (*PURIFIED, ("recognised %", "recognised", 100, 1), ("drift", "drift", 1, 4))
DIGITS = 12  # of a commit
Column = tuple[str, str, float, int]  # title, score, factor, digits


def rows(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each suite: how many rows are published, and what can be checked of them."""
    lines = []
    for suite in every:
        commits = Counter((record.provenance.commit or "")[:DIGITS] for record in suite.records)
        older = sum(map(wellformed.unverifiable, suite.records))
        made = ", ".join(f"{commit} ({n})" for commit, n in sorted(commits.items()))
        lines.append([f"`{suite.suite}`", str(len(suite.records)), str(len(suite.records) - older), made])
    return markdown(("suite", "rows", "of these with verified keys", "commits (rows)"), lines)


def samplers(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each sampler of each attacked model that several samplers were tried on."""
    found = [r for s in every if s.suite in ("uncond", "ablation") for r in s.records if r.cell.defense == "none"]
    clean = {_place(r): r for r in found if bare(r.cell.attack) == "none"}
    rows = [
        [
            f"`{r.cell.model}`",
            f"`{bare(r.cell.attack)}`, {parse_spec(r.cell.attack)[1]['steps']} steps",
            _sampler(r),
            measured(r, "asr", 100, 1),
            measured(r, "asr@1e-3", 100, 1),
            measured(clean[_place(r)], "asr", 100, 1),
        ]
        for r in sorted(found, key=lambda r: (r.cell.model, r.cell.attack, r.cell.sampler))
        if bare(r.cell.attack) != "none"
    ]
    return markdown(("model", "attack", "sampler", "ASR %", "ASR % at 1e-3", "ASR %, clean model"), rows)


def _place(record: Record) -> tuple[str, ...]:
    cell = record.cell
    return cell.model, cell.trigger, cell.target, cell.sampler


def _sampler(record: Record) -> str:
    name, arguments = parse_spec(record.cell.sampler)
    odd = [words for key, words in SAMPLER.items() if arguments.get(key)]
    return ", ".join([f"`{name}`", f"{arguments['steps']} steps", *odd])


def style(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each defense of sealing-style, over its seeds."""
    return _purified(_attacked(every, "sealing-style"), OF_TEXT)


def alpha(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each weight of the attention loss, over its seeds."""
    return _purified(_attacked(every, "sealing-alpha"), OF_TEXT)


def pruning(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each variant of Diff-Cleanse that removes channels, with its controls."""
    found = _attacked(every, "ablation")
    return _purified([r for r in found if "prune='never'" not in r.cell.defense], OF_DIGITS, told=("steps",))


def inversion(every: Iterable[results.Results]) -> str:
    """Markdown: a row for each variant of the search of Diff-Cleanse, with its score on both models."""
    groups: dict[str, dict[bool, Record]] = defaultdict(dict)
    for record in (r for s in every if s.suite == "ablation" for r in s.records if "prune='never'" in r.cell.defense):
        groups[_defense(record)][bare(record.cell.attack) == "none"] = record
    scores = [[measured(pair[clean], "suspicion", 1, 2) for clean in (False, True)] for pair in groups.values()]
    rows = [[f"`{name}`", *found] for name, found in zip(groups, scores, strict=True)]
    return markdown(("defense", "score, backdoored model", "score, clean model"), sorted(rows))


def _attacked(every: Iterable[results.Results], suite: str) -> list[Record]:
    return [r for s in every if s.suite == suite for r in s.records if bare(r.cell.attack) != "none"]


def _purified(records: Sequence[Record], columns: Sequence[Column], told: Sequence[str] = ()) -> str:
    """told: the shared parameters that the name of a defense has here."""
    given: dict[str, list[Record]] = defaultdict(list)
    decoys: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        (decoys if record.cell.trigger_given == "decoy" else given)[_defense(record, told)].append(record)
    first = columns[0]
    extra = [f"{first[0]}, given a decoy"] if decoys else []
    rows = [
        [
            f"`{name}`",
            _over(mine, first),
            *([_over(decoys.get(name, ()), first)] if extra else []),
            *(_over(mine, column) for column in columns[1:]),
        ]
        for name, mine in sorted(given.items(), key=lambda item: (_rank(item[1][0]), item[0]))
    ]
    return markdown(["defense", first[0], *extra, *(title for title, *_ in columns[1:])], rows)


def _rank(record: Record) -> int:
    """Nothing done first, then fine-tuning, then blind defenses, then those that are given the trigger."""
    name = bare(record.cell.defense)
    return ("none", "finetune").index(name) if name in ("none", "finetune") else 2 + ("trigger" in record.knowledge)


def _defense(record: Record, told: Sequence[str] = ()) -> str:
    """The spec of a defense without the parameters that the defenses of a table share."""
    name, arguments = parse_spec(record.provenance.short["defense"])
    kept = {key: value for key, value in arguments.items() if key not in SHARED or key in told}
    words = ", ".join(f"{key}={value!r}" for key, value in kept.items())
    return f"{name}({words})" if words else name


def _over(records: Sequence[Record], column: Column) -> str:
    _, score, times, digits = column
    return spread([times * record.value(score) for record in records], digits)


TABLES: Mapping[str, Callable[[Sequence[results.Results]], str]] = {
    each.__name__: each for each in (rows, samplers, style, alpha, pruning, inversion)
}


def place(name: str) -> Place:
    """Where a table stands."""
    return Place(PAGE, f"python -m tests.older_tables {name}")


def main() -> None:
    every = results.read()
    for name in sys.argv[1:] or TABLES:
        place(name).write(TABLES[name](every))


if __name__ == "__main__":
    main()
