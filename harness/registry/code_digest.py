"""The code on which a number depends: one digest per module in the import closure of a plugin.

The closure of a module contains the modules that it imports, the modules that these import, and so on. Only modules in
the plugin's own package, next to it, in `plugins`, or in the deciding part of the harness (`DECIDING`) are included.
The closure is read from syntax trees, so nothing is imported for it. Imports inside functions count; imports under
TYPE_CHECKING do not. A name that is imported from `harness` itself leads to the module in which it is defined.

A digest leaves out comments, docstrings and empty lines, so that wording can change without a new computation.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import harness
from harness import _moved
from harness.registry.entry_points import alias_of, installed, places
from harness.registry.kept import derived, digest_of

HARNESS = Path(harness.__file__).resolve().parent
SUFFIXES = (*EXTENSION_SUFFIXES, ".py")  # as Python tries them
DECIDING = ("types", "capabilities", "diffusion", "methods", "judges", "models", "stages")
DIGITS = 16  # hex digits of a module's digest
Place = tuple[int, int]  # line from 1, character from 0


def closure(classes: Iterable[type], modules: Iterable[str] = ()) -> dict[str, str]:
    """Module → digest of all code that these plugin classes, base classes included, and modules depend on.

    Modules of a plugin's own package are named from its top on (".defenses.hush"), so that it does not matter under
    which name the package was imported; those of the harness and of `plugins` have their full names. Where two packages
    have a module of one name, both digests stand under it.
    """
    wanted = {base.__module__ for cls in classes for base in cls.__mro__} | set(modules)
    digests: dict[str, set[str]] = defaultdict(set)
    for name in wanted:
        for label, one in _closure(name).items():
            digests[label].add(one)
    return {label: " ".join(sorted(digests[label])) for label in sorted(digests)}


@cache
def _closure(name: str) -> Mapping[str, str]:
    tree = Tree.around(name)
    return {} if tree is None else tree.closure(name)


class Tree:
    """Source files by module name. roots: top-level name → folders of the package, or file of the module. own: the
    top-level name of the plugin's package, `called` so in keys."""

    def __init__(self, roots: Mapping[str, Sequence[Path]], own: str | None = None, called: str = "") -> None:
        self.roots, self.own, self.called = dict(roots), own, called

    @classmethod
    def around(cls, module: str) -> Tree | None:
        """The files that may count for a loaded module; None for a library's."""
        top = module.partition(".")[0]
        roots = {"harness": [HARNESS]}
        if any(_is_ours(home) for home in places("plugins")):
            roots["plugins"] = [HARNESS.with_name("plugins")]
        if top in roots:
            return cls(roots)
        homes = _homes(sys.modules.get(top))
        if not homes or top in sys.stdlib_module_names or (_installed(homes[0]) and not _relatives(top)):
            return None
        return cls({**roots, top: homes}, own=top, called="plugins" if _is_ours(homes[0]) else "")

    def closure(self, *modules: str) -> dict[str, str]:
        """Label → digest of these modules and of all that they import."""
        digests: dict[str, str] = {}
        left = [name for module in modules for name in _with_packages(module)]
        seen = set(left)
        while left:
            name = left.pop()
            file = self.file(name)
            if file is None:
                continue
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            digests[self.label(name)], targets = _read(file.read_bytes(), package)
            new = {part for target in targets for part in _with_packages(self._at_home(target))} - seen
            seen |= new
            left += new
        return digests

    def label(self, name: str) -> str:
        """The name of a module in a key."""
        top, dot, rest = name.partition(".")
        return f"{self.called}{dot}{rest}" or "." if top == self.own else name

    def file(self, name: str) -> Path | None:
        """The source of a module that counts, or its compiled file; None for any other, and for a name that is no
        module."""
        top, *rest = name.split(".")
        if top == "harness" and (not rest or rest[0] not in DECIDING):
            return None
        for root in self._roots(top):
            path = root.joinpath(*rest)
            names = [path / "__init__.py"]
            if root.is_file():
                names = [] if rest else [root]
            elif rest:
                names += [path.with_name(path.name + suffix) for suffix in SUFFIXES]
            for file in names:
                if file.is_file():
                    return file
        return None

    def _roots(self, top: str) -> Sequence[Path]:
        """Where a top-level name lies. A module beside the plugin's own counts too, if it is no library and Python
        would import it from there."""
        if top not in self.roots and self.own is not None:
            beside = self.roots[self.own][0].resolve().parent
            near = [home for home in places(top) if home.parent == beside] if top not in sys.stdlib_module_names else []
            self.roots[top] = near if not _installed(beside) or top in _relatives(self.own) else []
        return self.roots.get(top, ())

    def _at_home(self, target: str) -> str:
        """`harness.minimize` → the module that holds it; an old import path → the new one."""
        top, _, path = target.partition(".")
        first, _, rest = path.partition(".")
        if top != "harness":
            return target
        homes = harness.homes()
        if first in homes and self.file(f"harness.{first}") is None:
            return f"{homes[first]}.{first}.{rest}".rstrip(".")
        return _moved.today(target)


def _with_packages(name: str) -> list[str]:
    """a.b.c → a, a.b, a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _homes(module: object) -> list[Path]:
    """Folders of a loaded package, more than one of a namespace package; the file of a module."""
    places, file = list(getattr(module, "__path__", ())), getattr(module, "__file__", None)
    return [Path(place) for place in places or ([file] if file else [])]


def _is_ours(home: Path) -> bool:
    return home.resolve() == HARNESS.with_name("plugins")


def _installed(place: Path) -> bool:
    """Whether a place is that of installed libraries."""
    return bool({"site-packages", "dist-packages"} & set(place.parts))


@cache
def _relatives(top: str) -> frozenset[str]:
    """The top-level names of the distributions that register plugins of this top-level package; none for a library."""
    points = [point for point in installed() if top in (point.module.partition(".")[0], alias_of(point))]
    names = {top} if points else set()
    for point in points:
        names |= {file.parts[0].removesuffix(".py") for file in (point.dist and point.dist.files) or ()}
    return frozenset(names)


@cache
def _read(content: bytes, package: str) -> tuple[str, tuple[str, ...]]:
    """A source's digest and what it imports, as dotted names. Parsing takes milliseconds per source, so that both are
    kept for the next process."""
    name = digest_of(_version(), package, content)
    found = derived.find(name)
    match found:
        case [str(kept), [*names]] if all(isinstance(each, str) for each in names):
            return kept, tuple(names)
    made = digest(content), _targets(content, package)
    derived.keep(name, made)
    return made


@cache
def _version() -> str:
    """What digests and imports depend on beside the source: this module, and how Python reads sources."""
    return digest_of(sys.version, Path(__file__).read_bytes())


@cache
def _targets(content: bytes, package: str) -> tuple[str, ...]:
    """What a source imports, as dotted names: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`, also for a
    `b.c` that stands anywhere after `from a import b`."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return ()
    bound: dict[str, list[str]] = defaultdict(list)
    targets = []
    for name, target in _imported(tree, package):
        bound[name].append(target)
        targets.append(target)
    for chain in _chains(tree):
        first, *rest = chain
        targets += [".".join([target, *rest]) for target in bound.get(first, ())]
    return tuple(dict.fromkeys(targets))


def _imported(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """(the name that an import binds, what it stands for), and ("", module) for the whole of what is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            yield from _imported(ast.Module(child.orelse, []), package)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield "", alias.name
                top = alias.name.partition(".")[0]
                yield alias.asname or top, alias.name if alias.asname else top
        elif isinstance(child, ast.ImportFrom):
            base = _absolute("." * child.level + (child.module or ""), package)
            yield from ((alias.asname or alias.name, f"{base}.{alias.name}") for alias in child.names)
        else:
            if isinstance(child, ast.Call) and (name := _named_in(child)) is not None:
                yield "", _absolute(name, package)
            yield from _imported(child, package)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name | ast.Attribute) and ast.unparse(test).endswith("TYPE_CHECKING")


def _absolute(name: str, package: str) -> str:
    """`..a` in package x.y → x.a."""
    level = len(name) - len(name.lstrip("."))
    above = package.split(".")[: max(len(package.split(".")) - level + 1, 0)] if level else []
    return ".".join([*above, *([name[level:]] if name[level:] else [])])


def _named_in(call: ast.Call) -> str | None:
    """The module in `import_module("a.b")` and `__import__("a.b")`."""
    called = ast.unparse(call.func).rpartition(".")[2]
    name = call.args[0] if call.args and called in ("import_module", "__import__") else None
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def _chains(tree: ast.AST) -> Iterator[list[str]]:
    """`a.b.c` as ["a", "b", "c"], wherever it stands in the code."""
    for node in ast.walk(tree):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if names and isinstance(node, ast.Name):
            yield [node.id, *names]


@cache
def digest(content: bytes) -> str:
    """Hex digits that stay while only comments and docstrings change; of the bytes if it is no Python."""
    with suppress(SyntaxError, ValueError, tokenize.TokenError):
        content = code_of(content).encode()
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def code_of(content: bytes) -> str:
    """The source without comments, docstrings and lines that hold nothing else. Raises SyntaxError."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    cuts = sorted([*_idle(text), *_docstrings(ast.parse(content), lines)], reverse=True)
    for (first, start), (last, end) in cuts:
        left = lines[first - 1][:start].rstrip(" \t") + lines[last - 1][end:].lstrip(" \t")
        lines[first - 1 : last] = [left] if left.strip() else []
    return "\n".join(lines)


def _idle(text: str) -> Iterator[tuple[Place, Place]]:
    """Where comments and empty lines stand; those inside strings are none."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.NL and not token.line.strip()):
            yield token.start, (token.start[0], token.end[1] - (token.type == tokenize.NL))


def _docstrings(tree: ast.Module, lines: list[str]) -> Iterator[tuple[Place, Place]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                end = first.end_lineno or first.lineno
                yield (
                    (first.lineno, _characters(lines[first.lineno - 1], first.col_offset)),
                    (end, _characters(lines[end - 1], first.end_col_offset or 0)),
                )


def _characters(line: str, octets: int) -> int:
    return len(line.encode()[:octets].decode())
