"""What `bench list` and `bench show` say of a plugin, read from its class and its source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.registry.entry_points import file_of
from harness.registry.errors import PluginError
from harness.registry.specs import literal
from harness.types import Adaptive

FACTS = (
    "modality", "conditional", "kind", "accepts_models", "accepts_triggers", "accepts_targets", "needs", "delivers",
    "sets", "api",
)  # fmt: skip


CURES = {
    "ModuleNotFoundError": "install what it imports, or import it inside the function that uses it",
    "ImportError": "import a name that exists; `harness` lists those for plugins",
    "SyntaxError": "fix the line that Python names",
    "IndentationError": "fix the line that Python names",
    "SystemExit": "a module must not end the interpreter when it is imported",
}


@dataclass(frozen=True)
class PluginWarning:
    """A plugin module that was left out, and why."""

    distribution: str
    module: str
    file: str
    error: str
    fatal: bool = False  # importing it ends the process, so only another one may try

    def __str__(self) -> str:
        where = f" of {self.distribution}" if self.distribution != self.file else ""
        return f"plugin {self.module}{where} left out: {self.error} ({self.file}); {self.cure}"

    @property
    def cure(self) -> str:
        """What to do about it, by the kind of error."""
        for kind, cure in CURES.items():
            if self.error.startswith(kind):
                return cure
        return "fix it, then try: bench plugin check"


@dataclass(frozen=True)
class Field:
    """A parameter of a plugin, as text. `comment` is the comment that trails it in the source."""

    name: str
    type: str
    default: str
    comment: str


@dataclass(frozen=True)
class Entry:
    """What the lists show of one plugin. `facts`: those of `FACTS` that it declares."""

    kind: str
    name: str
    version: int
    summary: str
    docstring: str
    fields: tuple[Field, ...]
    facts: Mapping[str, Any]
    module: str
    file: str
    distribution: str


@dataclass(frozen=True)
class Index:
    """Every plugin that loads, every module that does not, and the attacks that know a defense."""

    entries: tuple[Entry, ...]
    warnings: tuple[PluginWarning, ...] = ()
    adaptive: tuple[Adaptive, ...] = ()

    def of_kind(self, kind: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == kind)


def describe(kind: str, cls: Any, distribution: str, alone: bool) -> Entry:
    """The entry of one plugin class, from the class and its source. alone: the only plugin of its module, so that the
    module's docstring speaks of it first."""
    instance = cls()
    declared = {name: getattr(instance, name) for name in FACTS if hasattr(instance, name)}
    facts = {name: list(value) if isinstance(value, tuple) else value for name, value in declared.items()}
    own, module = _docstrings(cls)
    shared = "" if cls.__module__.startswith("harness.") else module
    said = [text for text in ((module, own) if alone else (own, shared)) if text]
    first = " ".join(said[0].split("\n\n")[0].split()) if said else ""
    summary = first if len(first) <= 110 else first[:110].rsplit(" ", 1)[0] + " …"
    return Entry(
        kind, cls.name, cls.version, summary, "\n\n".join(said), tuple(_fields(cls)), facts,
        cls.__module__, file_of(cls.__module__), distribution,
    )  # fmt: skip


@cache
def _parsed(file: str) -> tuple[ast.Module, dict[int, tuple[int, str]], list[str]]:
    """Tree, comments (line → column, text) and lines of a source file."""
    path = Path(file)
    with path.open("rb") as stream:
        comments = {
            token.start[0]: (token.start[1], token.string.lstrip("# ").rstrip())
            for token in tokenize.tokenize(stream.readline)
            if token.type == tokenize.COMMENT
        }
    with tokenize.open(path) as text:
        source = text.read()
    return ast.parse(source), comments, source.splitlines()


def _class_node(cls: type) -> tuple[str, ast.ClassDef | None]:
    file = file_of(cls.__module__)
    try:
        tree = _parsed(file)[0]
    except (OSError, SyntaxError):
        return file, None
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    return file, next(nodes, None)


def _docstrings(cls: type) -> tuple[str, str]:
    """(of the class, of its module); from the source, since dataclass writes a docstring where there is none."""
    file, node = _class_node(cls)
    if node is None:
        return "", ""
    return ast.get_docstring(node) or "", ast.get_docstring(_parsed(file)[0]) or ""


def _fields(cls: Any) -> Iterator[Field]:
    for f in dataclasses.fields(cls):
        if f.init:
            kind, comment = _annotation(cls, f.name)
            default = getattr(cls(), f.name)
            yield Field(f.name, kind or str(f.type), _shown(default), comment)


def _shown(value: Any) -> str:
    try:
        return literal(value)
    except PluginError:
        return repr(value)


def _annotation(cls: type, name: str) -> tuple[str, str]:
    """(type, trailing comment) of a field as written in the nearest class that declares it."""
    for base in cls.__mro__:
        file, node = _class_node(base) if name in inspect.get_annotations(base) else ("", None)
        for statement in node.body if node is not None else []:
            if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", None) == name:
                return ast.unparse(statement.annotation), _comment(file, statement)
    return "", ""


def _comment(file: str, statement: ast.AnnAssign) -> str:
    """Comments on the statement's own lines, and on the comment lines that directly follow them."""
    _, comments, lines = _parsed(file)
    last = statement.end_lineno or statement.lineno
    said = [comments[line][1] for line in range(statement.lineno, last + 1) if line in comments]
    following = last + 1
    while said and following in comments and lines[following - 1].lstrip().startswith("#"):
        said.append(comments[following][1])
        following += 1
    return " ".join(said)
