"""`bench plugin new` and `bench plugin check`: create a plugin, and check it against the contract."""

from __future__ import annotations

import json
import re
import string
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import Exit
from harness.cli.common import Finite, as_json, columns, echo, index_of, loaded, note, plugin_files, print_json
from harness.cli.completion import Named
from harness.registry import KINDS, OWN, RegistryError, UnknownName, did_you_mean, kind_of, parse_spec, unknown_name
from harness.registry.hookspecs import API_VERSION
from harness.runs.jsonable import to_jsonable
from harness.types import KNOWLEDGE

if TYPE_CHECKING:
    from harness.registry import Registry

PARTS = {  # of the suite that tries a new plugin out; the plugin's own name takes the place of its kind
    "model": "digits-ddpm", "attack": "villandiffusion(solver='ode', trigger_only=True, steps=20, batch=16)",
    "trigger": "box", "target": "corner", "defense": "finetune(steps=4, batch=8)", "sampler": "ddim(steps=5)",
}  # fmt: skip
TEXT_PARTS = {  # of the suite of a plugin for models that take prompts
    "model": "shapes-sd", "attack": "rickrolling(steps=20, batch=8)", "trigger": "text", "target": "prompt",
    "defense": "finetune(steps=4, batch=4)", "sampler": "ddim(steps=5)",
}  # fmt: skip
SHORT = {"attack": "(steps=20, batch=16)", "sampler": "(steps=5)"}
SHAPES = {"detector": "defense", "screen": "defense", "prompt-filter": "defense", "text-attack": "attack"}  # template →
# the kind of plugin that it makes; each kind has a template of its own name too
OF_TEXT = ("prompt-filter", "text-attack")


@click.group(short_help="Create a plugin; check one against the contract.")
def plugin() -> None:
    """Create a plugin, and check it."""


# ---- new ------------------------------------------------------------------------------------------------------------


@plugin.command(short_help="Write a package with one plugin in it.")
@click.argument("name")
@click.option(
    "--kind", required=True, metavar="KIND",
    help="defense, detector, screen, prompt-filter, attack, text-attack, metric, model, trigger, target, sampler.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory to write; default: bench-NAME.")
@as_json
def new(name: str, kind: str, out: Path | None, as_json: bool) -> None:
    """Write a package for the plugin NAME: one module that works unchanged, its tests, and a suite to try it in."""
    template = kind if kind in SHAPES else _kind(kind)
    words = _words(name, SHAPES.get(template, template), TEXT_PARTS if template in OF_TEXT else PARTS)
    folder = (out or Path(words["package"])).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} exists and is not empty; name another directory with -o")
    texts = {
        "pyproject.toml": _filled("pyproject.toml", words),
        "README.md": _filled("README.md", words),
        f"{words['module']}.py": _filled(f"{template}.py", words),
        "tests/test_contract.py": _filled("test_contract.py", words),
        "try.toml": _filled("try.toml", words),
    }
    for file, text in texts.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    if as_json:
        print_json({"directory": folder, "files": list(texts), "module": words["module"], "class": words["cls"]})
        return
    echo(columns([(file, str(folder / file)) for file in texts]))
    echo(f"next: cd {folder} && pip install -e '.[test]' && bench plugin check {name}")


def _kind(word: str) -> str:
    """The kind of plugin that a word names. Raises UnknownName, which knows the templates too."""
    try:
        return kind_of(word)[:-1]
    except UnknownName:
        known = (*(kind[:-1] for kind in KINDS), *SHAPES)
        raise UnknownName(f"no kind '{word}'{did_you_mean(word, known)} kinds: {', '.join(known)}") from None


def _words(name: str, kind: str, parts_of_suite: Mapping[str, str]) -> dict[str, str]:
    """The values for the templates. Raises RegistryError for a name that no spec, module or registry accepts."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name):
        raise RegistryError(f"'{name}' cannot be a plugin's name; use letters, digits, '-' and '_', a letter first")
    taken = [entry for entry in index_of(()).of_kind(kind_of(kind)) if entry.name == name]
    if taken:
        raise RegistryError(
            f"{taken[0].distribution} has a {kind} '{name}' already ({taken[0].file}); use another name"
        )
    parts = re.split(r"[-_]", name)
    own = {kind: name + SHORT.get(kind, "")}
    defenses = ("none", parts_of_suite["defense"], {**parts_of_suite, **own}["defense"])
    return {
        "name": name,
        "kind": kind,
        "package": f"bench-{'-'.join(parts).lower()}",
        "module": f"bench_{'_'.join(parts).lower()}",
        "cls": "".join(part[:1].upper() + part[1:] for part in parts),
        "slug": "_".join(parts).lower(),
        "title": " ".join(parts).capitalize(),
        "api": str(API_VERSION),
        "knowledge": ", ".join(KNOWLEDGE),
        "defenses": ", ".join(f'"{spec}"' for spec in dict.fromkeys(defenses)),
        **{**parts_of_suite, **own},
    }


def _filled(file: str, words: dict[str, str]) -> str:
    text = (resources.files("harness") / "templates" / f"{file}.tmpl").read_text(encoding="utf-8")
    return string.Template(text).substitute(words)


# ---- check ----------------------------------------------------------------------------------------------------------


@plugin.command(short_help="Check plugins against the contract.")
@click.argument("what", nargs=-1, type=Named("any", presets=False))
@click.option("--kind", help="Only plugins of this kind, if several kinds have the name.")
@click.option("--seconds", type=Finite(1), help="Limit of one run on a tiny model; default: 60.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Report to write, .md or .json.")
@plugin_files
@as_json
def check(
    what: tuple[str, ...],
    kind: str | None,
    seconds: float | None,
    out: Path | None,
    files: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Check plugins against every law of their kind, on tiny random models.

    WHAT: names, specs (name(steps=20)) or plugin files; by default all plugins that are not built in. Parameters that
    determine the length of a run are made small unless a spec gives them. The exit code is 3 if a law is broken.
    """
    clock = Clock()
    if out is not None and out.suffix not in (".md", ".json"):
        raise click.UsageError(f"-o {out}: a report is .md or .json")
    paths = [Path(word) for word in what if word.endswith(".py")]
    specs = [word for word in what if not word.endswith(".py")]
    registry = loaded([*files, *paths], strict=False)
    chosen = list(_chosen(registry, specs, [*files, *paths], None if kind is None else kind_of(kind)))
    if not chosen:
        raise RegistryError(
            "no plugin to check: name one, or give a plugin file (bench plugins shows what is installed)"
        )
    reports = [_examined(registry, each, given, parameters, seconds, clock) for each, given, parameters in chosen]
    if out is not None:
        text = (
            json.dumps(to_jsonable(reports), indent=1, ensure_ascii=False)
            if out.suffix == ".json"
            else _markdown(reports)
        )
        out.expanduser().write_text(text + "\n", encoding="utf-8")
    if as_json:
        print_json(reports)
    else:
        echo("\n\n".join(map(_table, reports)))
    return Exit.plugin if any(law["state"] == "broken" for report in reports for law in report["laws"]) else Exit.ok


def _chosen(
    registry: Registry, specs: Sequence[str], files: Sequence[Path], kind: str | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, name, parameters) of the plugins to check. Raises UnknownName."""
    kinds = KINDS if kind is None else (kind,)
    for spec in specs:
        name, parameters = parse_spec(spec)
        found = [each for each in kinds if name in registry.classes(each)]
        if not found:
            known = [known for each in kinds for known in registry.classes(each)]
            raise unknown_name(kind or "plugins", name, dict.fromkeys(known), len(registry.warnings))
        yield from ((each, name, parameters) for each in found)
    if specs:
        return
    wanted = {str(path.resolve()) for path in files}
    for each in kinds:
        for name in registry.classes(each):
            owner = registry.distribution_of(each, name)
            if owner in wanted or (not files and owner != OWN):
                yield each, name, {}


class Clock:
    """Divides the wall time of a command among what it does one after another."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, or since the clock was made."""
        last, self._last = self._last, time.monotonic()
        return self._last - last


def _examined(
    registry: Registry, kind: str, name: str, parameters: dict[str, Any], seconds: float | None, clock: Clock
) -> dict[str, Any]:
    """The report on one plugin. Its time is the wall time; that of the first plugin holds the imports."""
    from harness.testing import checks

    cls = registry.find(kind, name)
    case = checks.case_of(kind, cls, parameters, registry, seconds or checks.SECONDS)
    what = f"checking {kind[:-1]} {name}"
    found = checks.examine_all(case, lambda place, laws, law: note(f"{what}, law {place} of {laws}: {law} ..."))
    return {
        "kind": kind[:-1],
        "name": name,
        "version": cls.version,
        "api": getattr(cls, "api", 1),
        "spec": checks.spec_of(case.plugin),
        "distribution": registry.distribution_of(kind, name),
        "file": case.file,
        "seconds": clock.lap(),
        "laws": [vars(law) for law in found],
    }


def _summary(report: dict[str, Any]) -> str:
    counts = Counter(law["state"] for law in report["laws"])
    said = ", ".join(f"{n} {state}" for state, n in counts.items())
    return f"{report['kind']} '{report['name']}' ({report['file']}): {said}; {report['seconds']:.0f} s"


def _table(report: dict[str, Any]) -> str:
    rows = [(law["state"], law["law"], law["says"]) for law in report["laws"]]
    return f"{_summary(report)}\n{columns(rows, '  ')}"


def _markdown(reports: Sequence[dict[str, Any]]) -> str:
    from tabulate import tabulate

    parts = ["# Contract checks"]
    for report in reports:
        rows = [(law["law"], law["state"], law["says"].replace("|", "\\|")) for law in report["laws"]]
        table = tabulate(rows, headers=("law", "state", "says"), tablefmt="github")
        parts.append(f"## {report['kind']} {report['name']}, version {report['version']}\n\n{_summary(report)}\n")
        parts.append(f"Checked as `{report['spec']}`, written for plugin API {report['api']}.\n\n{table}")
    return "\n\n".join(parts)
