"""The tables of control triggers in docs/results.md, made from the published records of the suite `controls`.

python -m tests.controls_table      # rewrite the tables in docs/results.md
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.runs.record import Record, bare
from leaderboard import results
from tests.tables import Place, markdown

PLACE = Place(Path(__file__).parents[1] / "docs" / "results.md", "python -m tests.controls_table")
SUITE = "controls"
GIVEN = ("true", "decoy", "decoy-2", "decoy-3", "opposite", "zero")
WORDS = {"true": "the trigger", "decoy": "decoy 1", "decoy-2": "decoy 2", "decoy-3": "decoy 3", "opposite": "−r"}


def tables(every: Iterable[results.Results]) -> str:
    """Markdown: one table per attack, its defenses in rows, what they were given in columns."""
    found = [suite for suite in every if suite.suite == SUITE]
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for suite in found:
        for record in suite.records:
            groups[record.cell.model, record.cell.attack].append(record)
    return "\n\n".join(_table(groups[place]) for place in sorted(groups))


def _table(records: Sequence[Record]) -> str:
    first = records[0]
    given = [g for g in GIVEN if any(r.cell.trigger_given == g for r in records)]
    blind = sorted((r for r in records if "trigger" not in r.knowledge), key=lambda r: r.cell.defense != "none()")
    told = sorted({bare(r.cell.defense) for r in records if "trigger" in r.knowledge})
    head = f"`{bare(first.cell.attack)}` on `{bare(first.cell.model)}`: ASR % after the defense"
    rows = [["the control itself, on the attacked model", *(_own(records, g) for g in given), ""]]
    rows += [[f"`{bare(r.cell.defense)}`", *([""] * len(given)), _asr(r)] for r in blind]
    for name in told:
        mine = {r.cell.trigger_given: r for r in records if bare(r.cell.defense) == name}
        rows.append([f"`{name}`", *(_asr(mine[g]) if g in mine else "" for g in given), ""])
    return markdown([head, *(WORDS.get(g, g) for g in given), "no trigger"], rows)


def _asr(record: Record) -> str:
    """The success rate of the true trigger on the defended model, with its interval."""
    if record.error:
        return "failed"
    score = record.scores["asr"]
    low, high = score.interval or (score.value, score.value)
    return f"{100 * score.value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _own(records: Sequence[Record], given: str) -> str:
    """How often the chosen control trigger activates the backdoor of the attacked model, and its name."""
    if given == "true":
        value = next(r.value("asr_before") for r in records if "asr_before" in r.scores)
        return f"{100 * value:.1f}"
    found = [r.provenance.control for r in records if r.cell.trigger_given == given]
    made = [control for control in found if control is not None]
    if not made or any(control != made[0] for control in made):
        return "–"
    control = made[0]
    chosen = control.tried[control.chosen]
    name = "" if given in ("opposite", "zero") else f", `{chosen.name}`"
    return f"{100 * chosen.hits / chosen.n if chosen.n else 0:.1f}{name}"


def main() -> None:
    PLACE.write(tables(results.read()))


if __name__ == "__main__":
    main()
