"""Derived pages of the documentation: a reference of every plugin, and the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import click

from harness.cli import bench
from harness.cli.common import words_of
from harness.registry import HOOKS, Entry

TITLES = {
    "models": "Models", "triggers": "Triggers", "targets": "Targets", "attacks": "Attacks", "defenses": "Defenses",
    "metrics": "Metrics", "samplers": "Samplers",
}  # fmt: skip


def reference(entries: Sequence[Entry]) -> dict[str, str]:
    """path → Markdown: one page per kind of plugin, from docstrings and fields. It contains no paths of files."""
    pages = {}
    for kind in HOOKS:
        mine = sorted((entry for entry in entries if entry.kind == kind), key=lambda entry: entry.name)
        rows = [f"| [`{entry.name}`](#{_anchor(entry)}) | {_cell(entry.summary)} |" for entry in mine]
        table = "\n".join(["| name | summary |", "|---|---|", *rows])
        parts = [f"# {TITLES[kind]}", table, *(_entry(entry) for entry in mine)]
        pages[f"reference/{kind}.md"] = "\n\n".join(parts) + "\n"
    return pages


def _anchor(entry: Entry) -> str:
    return f"{entry.kind[:-1]}-{entry.name}".replace(".", "-")


def _entry(entry: Entry) -> str:
    parts = [f"## `{entry.name}` {{ #{_anchor(entry)} }}"]
    parts += [f"```text\n{entry.docstring}\n```"] if entry.docstring else []
    facts = {name.replace("_", " "): words_of(value) for name, value in entry.facts.items()}
    facts["version"] = str(entry.version)
    parts.append("\n".join(f"- {name}: {words}" for name, words in facts.items()))
    if entry.fields:
        rows = [f"| `{f.name}` | `{_cell(f.default)}` | `{_cell(f.type)}` | {_cell(f.comment)} |" for f in entry.fields]
        parts.append("\n".join(["| parameter | default | type | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    """Text that can stand in a table cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def commands() -> str:
    """Markdown of every command: its help, its arguments and its options."""
    parts = [f"# Command line\n\n{_prose(bench)}"]
    parts += [_command(name, command) for name, command in _walk(bench, ())]
    return "\n\n".join(parts) + "\n"


def api(homes: Mapping[str, str]) -> str:
    """Markdown of what plugins import from `harness`: name → the module that holds it, or that it is a module of.

    Each module is a directive of mkdocstrings, which writes the signatures and docstrings of its names."""
    members: dict[str, list[str]] = {}
    for name, module in homes.items():
        members.setdefault(module, []).append(name)
    parts = [API]
    for module, names in sorted(members.items()):
        inner = [name for name in names if _is_module(f"{module}.{name}")]
        own = sorted(set(names) - set(inner))
        parts += [_directive(module, own)] if own else []
        parts += [_directive(f"{module}.{name}", None) for name in sorted(inner)]
    return "\n\n".join(parts) + "\n"


API = """# API

Everything that a plugin imports comes from `harness`: `from harness import Defended, Knowledge`. This page has the
names by the module in which they live. The modules themselves, such as `harness.digits`, are imported in the same
way."""


def _directive(module: str, names: list[str] | None) -> str:
    """The section of a module with the names, or with all that it defines."""
    shown = "" if names is None else f"\n      members: {names}"
    return f"## `{module}`\n\n::: {module}\n    options:\n      show_root_toc_entry: false{shown}"


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is no package
        return False


def _walk(group: click.Group, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None:
            continue
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from _walk(command, (*above, name))


def _command(name: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=f"bench {' '.join(name)}")
    usage = " ".join(["bench", *name, *command.collect_usage_pieces(context)])
    rows = [row for row in (parameter.get_help_record(context) for parameter in command.get_params(context)) if row]
    table = [f"| `{_cell(form)}` | {_cell(text)} |" for form, text in rows if not form.startswith("--help")]
    parts = [f"{'#' * (len(name) + 1)} bench {' '.join(name)}", f"```text\n{usage}\n```", _prose(command)]
    return "\n\n".join([*parts, *(["\n".join(["| option | |", "|---|---|", *table])] if table else [])])


def _prose(command: click.Command) -> str:
    return textwrap.dedent(command.help or "").replace("\b", "").strip()


def written(entries: Sequence[Entry]) -> Mapping[str, str]:
    """Every derived page by its path below docs/."""
    import harness

    return {**reference(entries), "commands.md": commands(), "reference/api.md": api(harness.homes())}
