"""What of a source file its numbers depend on: all but comments and docstrings, so that a word can be mended without
computing anything anew.

earlier_sources.json keeps the keys of published rows: they were computed while a key held the digest of the whole file.
It says for the code of each such file what that digest was. Code that came later is not in it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

EARLIER = Path(__file__).with_name("earlier_sources.json")
Place = tuple[int, int]  # line from 1, character from 0


def digest(file: Path) -> str:
    """64 hex digits that stay while only comments and docstrings of `file` change; of its bytes if it is no Python."""
    return _digest(file.read_bytes())


@cache
def _digest(content: bytes) -> str:
    try:
        code = code_of(content).encode()
    except (SyntaxError, ValueError, tokenize.TokenError):
        return hashlib.sha256(content).hexdigest()
    found = hashlib.sha256(code).hexdigest()
    return _earlier().get(found, found)


def code_of(content: bytes) -> str:
    """The source without comments and docstrings, nor the lines that held nothing else. Raises SyntaxError."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    cuts = sorted([*_comments(text), *_docstrings(ast.parse(content), lines)], reverse=True)
    for (first, start), (last, end) in cuts:
        left = lines[first - 1][:start].rstrip(" \t") + lines[last - 1][end:].lstrip(" \t")
        lines[first - 1 : last] = [left] if left.strip() else []
    return "\n".join(lines)


def _comments(text: str) -> Iterator[tuple[Place, Place]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start, token.end


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


@cache
def _earlier() -> dict[str, str]:
    return json.loads(EARLIER.read_text())
