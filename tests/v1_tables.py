"""The tables of the benchmark v1 in docs/results.md, made from its published records.

python -m tests.v1_tables      # rewrite the tables in docs/results.md
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from harness.registry import presets
from harness.runs.record import Record, bare
from leaderboard import headline, protocol, results
from tests.tables import Place, markdown, spread

PLACE = Place(Path(__file__).parents[1] / "docs" / "results.md", "python -m tests.v1_tables")
SCREENS = ("AUROC", "screen_auroc", 1, 2), ("TPR at 1 % FPR, %", "screen_tpr@1%fpr", 100, 0)
UTILITY = ("attributes right %", "attribute_accuracy", 100, 1), ("FD ratio", "fd_ratio[]", 1, 2)
Column = tuple[str, str, float, int]  # title, score, factor, digits
Setting = tuple[str, str, str, str]


def tables(every: Iterable[results.Results]) -> str:
    """Markdown: of each setting one table of the defenses that return a model, and one of the screens. Values are means
    over the seeds, with the lowest and the highest where they differ."""
    found = _settings(every)
    return "\n\n".join(part for place in sorted(found) for part in _both(place, *found[place]))


def of_setting(every: Iterable[results.Results], place: Setting) -> str:
    """Markdown: the table of the defenses that return a model in one setting."""
    return _both(place, *_settings(every)[place])[0]


def _settings(every: Iterable[results.Results]) -> dict[Setting, tuple[list[Record], list[Record]]]:
    """Setting → the records of the attacked models, and those of the clean model in the same setting."""
    found = [record for suite in every if suite.suite == protocol.shipped().suite for record in suite.records]
    settings: dict[Setting, list[Record]] = defaultdict(list)
    for record in found:
        if bare(record.cell.attack) != "none":
            settings[_setting(record)].append(record)
    return {place: (records, [r for r in found if _like(r, records[0])]) for place, records in settings.items()}


def _setting(record: Record) -> Setting:
    cell = record.cell
    return bare(cell.model), _name(record, "attack"), bare(cell.trigger), bare(cell.target)


def _like(record: Record, attacked: Record) -> bool:
    """Whether a record is of the clean model under the trigger, target and sampler of an attacked one."""
    mine, other = record.cell, attacked.cell
    places = ("model", "trigger", "target", "sampler")
    return bare(mine.attack) == "none" and all(getattr(mine, part) == getattr(other, part) for part in places)


def _name(record: Record, part: str) -> str:
    """The preset, or the plugin, of an attack or a defense."""
    short = record.provenance.short.get(part) or getattr(record.cell, part)
    return bare(presets.named(f"{part}s", short))


def _both(place: Setting, attacked: Sequence[Record], clean: Sequence[Record]) -> list[str]:
    model, attack, trigger, target = place
    screens = [r for r in attacked if r.cell.trigger_given == "true" and not math.isnan(r.value("screen_auroc"))]
    others = [
        r for r in attacked if bare(r.cell.defense) == "none" or {"model", "sampler"} & set(r.provenance.delivers)
    ]
    head = f"`{attack}` on `{model}`, trigger `{trigger}`, target `{target}`"
    tables = [_purifiers(head, others, clean)] if others else []
    return [*tables, *([_screens(head, screens, clean)] if screens else [])]


def _purifiers(head: str, attacked: Sequence[Record], clean: Sequence[Record]) -> str:
    utility = UTILITY[all(math.isnan(r.value(UTILITY[0][1])) for r in attacked)]
    rows = [[head, "knowledge", "cleaned", "ASR %", "ASR %, given a decoy", utility[0], "cost"]]
    groups: dict[str, list[Record]] = defaultdict(list)
    decoys: dict[str, list[Record]] = defaultdict(list)
    for record in attacked:
        (decoys if record.cell.trigger_given == "decoy" else groups)[_name(record, "defense")].append(record)
    if plain := [r for r in clean if bare(r.cell.defense) == "none"]:
        rows.append(["clean model", "", "", _over(plain, "asr", 100, 1), "", _over(plain, *utility[1:]), ""])
    for name, mine in sorted(groups.items(), key=lambda item: _order(item[1])):
        rows.append(
            [
                f"`{name}`",
                ", ".join(sorted(mine[0].given, key=lambda word: word != "trigger")).replace("_", " ") or "–",
                _cleaned(mine),
                _over(mine, "asr", 100, 1),
                _over(decoys[name], "asr", 100, 1) if name in decoys else "",
                _over(mine, *utility[1:]),
                _cost(mine),
            ]
        )
    return markdown(rows[0], rows[1:])


def _order(records: Sequence[Record]) -> tuple[bool, bool, str]:
    """Nothing done first, then blind defenses, then those that are given the trigger."""
    return bare(records[0].cell.defense) != "none", "trigger" in records[0].knowledge, _name(records[0], "defense")


def _cleaned(records: Sequence[Record]) -> str:
    judged = [found for record in records if (found := headline.cleaned(record)) is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else ""


def _cost(records: Sequence[Record]) -> str:
    """The time of the defense, divided by that of the attack, mean over the seeds."""
    ratios = [ratio for record in records if not math.isnan(ratio := headline.cost_ratio(record))]
    return f"{fmean(ratios):.2f}" if ratios and bare(records[0].cell.defense) != "none" else ""


def _screens(head: str, attacked: Sequence[Record], clean: Sequence[Record]) -> str:
    rows = [[head, "knowledge", *(f"{title}{of}" for title, *_ in SCREENS for of in ("", ", clean model"))]]
    for name in sorted({_name(r, "defense") for r in attacked}):
        pair = [[r for r in each if _name(r, "defense") == name] for each in (attacked, clean)]
        knows = ", ".join(pair[0][0].given).replace("_", " ") or "–"
        rows.append([f"`{name}`", knows, *(_over(each, *column[1:]) for column in SCREENS for each in pair)])
    return markdown(rows[0], rows[1:])


def _over(records: Sequence[Record], score: str, times: float, digits: int) -> str:
    """The mean over the seeds, and the lowest and the highest where they differ."""
    return spread([times * value for r in records if not math.isnan(value := r.value(score))], digits)


def main() -> None:
    PLACE.write(tables(results.read()))


if __name__ == "__main__":
    main()
