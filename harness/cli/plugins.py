"""`bench list`, `bench show`, `bench plugins`: the available plugins, without importing them."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path

import click

from harness.cli.common import (
    as_json,
    columns,
    echo,
    index_of,
    plugin_files,
    print_json,
    strict_option,
    terminal_width,
    words_of,
)
from harness.cli.completion import Kind, Named
from harness.registry import KINDS, OWN, Entry, kind_of, presets, unknown_name
from harness.runs.printable import clipped


@click.command("list", short_help="Models, attacks, defenses ..., suites, adaptive attacks.")
@click.argument("kind", required=False, type=Kind())
@plugin_files
@as_json
def list_(kind: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """List plugins of KIND: models, triggers, targets, attacks, defenses, metrics, samplers; or suites; or presets; or
    adaptive, the attacks that know a defense.

    Without KIND, list every plugin.
    """
    if kind == "adaptive":
        _list_adaptive(files, as_json)
        return
    if kind in ("suite", "suites"):
        _list_suites(as_json)
        return
    if kind in ("preset", "presets"):
        _list_presets(as_json)
        return
    kinds = KINDS if kind is None else (kind_of(kind),)
    entries = [entry for entry in index_of(files).entries if entry.kind in kinds]
    if as_json:
        print_json(entries)
        return
    for i, each in enumerate(kinds):
        rows = [(entry.name, entry.summary) for entry in entries if entry.kind == each]
        if kind is None:
            echo(f"{'' if i == 0 else chr(10)}{each}")
        echo(columns(rows, "  " if kind is None else "") or "none")


def _list_adaptive(files: tuple[Path, ...], as_json: bool) -> None:
    known = index_of(files).adaptive
    if as_json:
        print_json(known)
        return
    parts = [(each.defense, ", ".join(filter(None, (each.attack, each.trigger, each.target))), each) for each in known]
    echo(columns([(name, specs or "none", each.because) for name, specs, each in parts]) or "none")


def _list_suites(as_json: bool) -> None:
    from harness.runs.suite import read, suites

    drafts = [read(path) for path in suites().values()]
    if as_json:
        print_json([{"name": draft.name, "title": draft.title, "file": draft.path} for draft in drafts])
    else:
        echo(columns([(draft.name, draft.title) for draft in drafts]) or "none")


def _list_presets(as_json: bool) -> None:
    named = list(presets.shipped().values())
    if as_json:
        print_json(named)
    else:
        echo(columns([(preset.kind[:-1], preset.name, preset.spec) for preset in named]) or "none")


@click.command(short_help="Docstring, parameters, needs and file of a plugin.")
@click.argument("name", type=Named("any"))
@click.option("--kind", help="Only the plugin of this kind, if several kinds have the name.")
@plugin_files
@as_json
def show(name: str, kind: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Show the docstring of a plugin, its parameters, what it needs and accepts, and its file; or a preset."""
    wanted = None if kind is None else kind_of(kind)
    chosen = [p for p in presets.shipped().values() if p.name == name and wanted in (None, p.kind)]
    if chosen:
        if as_json:
            print_json(chosen)
        else:
            echo("\n\n".join(map(_preset, chosen)))
        return
    index = index_of(files)
    known = [entry for entry in index.entries if wanted in (None, entry.kind)]
    found = [entry for entry in known if entry.name == name]
    if not found:
        named = [p.name for p in presets.shipped().values() if wanted in (None, p.kind)]
        names = dict.fromkeys([*(entry.name for entry in known), *named])
        raise unknown_name(wanted or "plugins", name, names, len(index.warnings))
    if as_json:
        print_json(found)
    else:
        echo("\n\n".join(map(_described, found)))


def filled(text: str) -> str:
    """A docstring with its prose in lines that fit the terminal. Indented formulas and lists stay as they are."""
    width = terminal_width()
    if width is None or width >= max(map(len, text.splitlines())):
        return text
    parts = text.split("\n\n")
    return "\n\n".join(p if any(line[:1] == " " for line in p.splitlines()) else textwrap.fill(p, width) for p in parts)


def _preset(preset: presets.Preset) -> str:
    seeds = " ".join(map(str, preset.seeds))
    head = f"preset of the {preset.kind[:-1]} {preset.spec.partition('(')[0]}: {preset.name}"
    reasons = "\n".join(f"  {key}: {reason}" for key, reason in preset.why.items())
    return f"{head}\n\n{preset.spec}\n\n{filled(reasons)}\n\nchosen on the seeds {seeds}: {preset.chosen}"


def _described(entry: Entry) -> str:
    parts = [f"{entry.kind[:-1]} {entry.name}, version {entry.version}"]
    parts += [filled(entry.docstring)] if entry.docstring else []
    facts = {name.replace("_", " "): words_of(value) for name, value in entry.facts.items()}
    parts += ["\n".join(f"{name}: {words}" for name, words in facts.items())] if facts else []
    if entry.fields:
        wide = terminal_width()
        if wide is None:
            rows = [(f"{f.name} = {f.default}", f.type, f.comment) for f in entry.fields]
            parts.append(f"parameters:\n{columns(rows, '  ')}")
        else:  # a parameter on a line of its own, and below it what it is
            lines = ["parameters:"]
            for f in entry.fields:
                lines.append(f"  {clipped(f'{f.name} = {f.default}', wide - 2)}")
                lines += [f"      {line}" for line in textwrap.wrap(f"{f.comment} ({f.type})", wide - 6)]
            parts.append("\n".join(lines))
    parts.append(f"from {entry.distribution}: {entry.file}")
    return "\n\n".join(parts)


@click.command(short_help="Where plugins come from; what could not be loaded.")
@plugin_files
@strict_option
@as_json
def plugins(files: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    """Show where plugins come from, those of other distributions and files first, and which could not be loaded (on
    stderr)."""
    index = index_of(files, strict)
    if as_json:
        print_json(index)
        return
    counts: dict[tuple[str, str], Counter[str]] = {}
    for entry in index.entries:
        counts.setdefault((entry.distribution, entry.module), Counter())[entry.kind] += 1
    places = sorted(counts, key=lambda place: (place[0] == OWN, place))
    rows = [(*place, _counted(counts[place])) for place in places]
    echo(columns(rows) or "none; is the distribution installed?")
    echo(f"{len(index.entries)} plugins, {len(index.warnings)} modules left out")


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{n} {kind if n > 1 else kind[:-1]}" for kind, n in kinds.items())
