"""Docstrings are short, and use words that a reader of the field knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = 40
AVOIDED = re.compile(r"\b(told|anew)\b", re.IGNORECASE)
PARTS = (  # folders and files whose docstrings avoid these words
    "plugins", "harness/types.py", "harness/methods", "harness/diffusion", "harness/judges", "harness/models",
    "harness/stages", "harness/registry", "harness/engine", "harness/scan", "harness/testing",
)  # fmt: skip


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module and of its classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "module"), text


def found(part: str) -> list[tuple[str, str]]:
    """(place, docstring) of every docstring in a file or below a folder."""
    path = ROOT / part
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [
        (f"{file.relative_to(ROOT)}: {name}", text) for file in files for name, text in docstrings(file.read_text())
    ]


def test_docstrings_of_modules_classes_and_functions_are_found() -> None:
    source = '"""A."""\nclass C:\n    """B."""\n    async def f(self):\n        """Told anew."""\n'
    texts = dict(docstrings(source))
    assert texts == {"module": "A.", "C": "B.", "f": "Told anew."}
    assert AVOIDED.findall(texts["f"]) == ["Told", "anew"]


@pytest.mark.parametrize("folder", ["harness", "plugins"])
def test_no_docstring_has_more_than_40_lines(folder: str) -> None:
    texts = found(folder)
    assert len(texts) > 100
    assert [place for place, text in texts if len(text.splitlines()) > LINES] == []


@pytest.mark.parametrize("part", PARTS)
def test_docstrings_avoid_words_that_readers_stumble_over(part: str) -> None:
    texts = found(part)
    assert texts
    assert [place for place, text in texts if AVOIDED.search(text)] == []


def test_docstrings_name_only_pages_that_exist() -> None:
    named = {
        page for _, text in [*found("plugins"), *found("harness")] for page in re.findall(r"docs/[\w/-]+\.md", text)
    }
    assert "docs/methods/elijah.md" in named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []
    assert {f"docs/methods/{page.name}" for page in (ROOT / "docs/methods").glob("*.md")} <= named
