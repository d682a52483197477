"""`bench compare`: two defenses on the same backdoored models and the same samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from harness.cli.common import as_json, columns, echo, print_json
from harness.cli.leaderboard import read_results, results_option
from harness.registry import RegistryError, did_you_mean
from harness.types import CONTROL

if TYPE_CHECKING:
    from harness.runs.record import Record
    from leaderboard.paired import Comparison

OWN = "; your own run: --results DIR"


@click.command(short_help="Paired differences of two defenses, with intervals and corrected p values.")
@click.argument("a")
@click.argument("b")
@click.option("--score", "scores", multiple=True, help="A score's name in the records, such as asr@1e-3; repeatable.")
@results_option
@as_json
def compare(a: str, b: str, scores: tuple[str, ...], root: Path | None, as_json: bool) -> None:
    """Compare A with B wherever both met the same attack, seed and samples.

    A and B are defenses as the tables show them (skd-cag, "skd-cag(target='black')"), followed by :decoy, :opposite or
    :zero for its control with another trigger, or the first digits of a record's key. The difference A - B and its
    interval come first; p values are corrected after Holm over all lines, intervals are not corrected. One seed: exact
    McNemar (Wilcoxon for means); several: Student's t over seeds, or the samples' own interval where that is wider. A
    and B are shown to differ from three seeds on, if the interval excludes 0: the rule of the tables' letters.
    """
    from leaderboard import paired
    from leaderboard.results import distinct

    every = read_results(root)
    records = {record.key: record for suite in every for record in suite.records}
    elsewhere = OWN if root is None else ""
    one, other = (chosen(list(records.values()), text, elsewhere) for text in (a, b))
    distinct(every, {record.key for record in (*one, *other)})
    try:
        found = paired.compare(one, other, scores or paired.DEFAULT_SCORES)
    except ValueError as error:
        raise RegistryError(str(error)) from None
    if not found:
        asked = ", ".join(scores or paired.DEFAULT_SCORES)
        raise RegistryError(f"{a} and {b} meet nowhere: no setting and seed in which both have measured {asked}")
    if as_json:
        print_json(found)
        return
    for setting in dict.fromkeys(each.setting for each in found):
        echo(", ".join(f"n = {value}" if name == "n" else str(value) for name, value in setting))
        lines = [_line(each) for each in found if each.setting == setting]
        head = ("score", "A - B", "95 % interval", "A", "B", "p (Holm)", "test", "over", "shown to differ")
        echo(columns([head, *lines], "  "))
    for remark in dict.fromkeys(each.note for each in found if each.note):
        echo(f"note: {remark}")


def _line(each: Comparison) -> tuple[str, ...]:
    interval = "none" if each.low is None else f"{each.low:+.4g} to {each.high:+.4g}"
    p = "none" if each.p_holm is None else f"{each.p_holm:.3g}"
    numbers = (f"{each.difference:+.4g}", interval, f"{each.a:.4g}", f"{each.b:.4g}", p)
    return (each.score, *numbers, each.test, f"{each.n} {each.unit}", "yes" if each.differs else "no")


def chosen(records: Sequence[Record], text: str, elsewhere: str = "") -> list[Record]:
    """The records that `text` names. Raises RegistryError for none, and for a name of several variants.

    elsewhere: ends the message with where other records may be.
    """
    if re.fullmatch(r"[0-9a-f]{8,64}", text):
        found = [record for record in records if record.key.startswith(text)]
        return found or _unknown(records, text, elsewhere)
    name, colon, control = text.rpartition(":")
    given, name = (control, name) if colon and re.fullmatch(CONTROL, control) else ("true", text)
    rows = [record for record in records if record.cell.trigger_given == given]
    for names in (_canonical, _short):
        exact = [record for record in rows if names(record) == name]
        if exact:
            return exact
    loose = [record for record in rows if _canonical(record).partition("(")[0] == name]
    variants = sorted({_short(record) for record in loose})
    if len(variants) > 1:
        raise RegistryError(f"'{text}' has several variants here; name one: {'; '.join(variants)}{elsewhere}")
    return loose or _unknown(rows, text, elsewhere)


def _canonical(record: Record) -> str:
    return record.cell.defense


def _short(record: Record) -> str:
    return record.provenance.short.get("defense", _canonical(record))


def _unknown(records: Sequence[Record], text: str, elsewhere: str) -> NoReturn:
    known = sorted({_canonical(record).partition("(")[0] for record in records})
    raise RegistryError(f"no rows of '{text}'{did_you_mean(text, known)} there are: {', '.join(known)}{elsewhere}")
