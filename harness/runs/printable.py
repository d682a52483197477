"""Texts of others made harmless: the one function between a foreign string and a terminal or a page."""

from __future__ import annotations

import json
import unicodedata


def printable(text: object, keep: str = "") -> str:
    """`text` with every character that a terminal obeys or that nobody sees as its number: controls (C0, C1, escape),
    marks of direction, invisible and unassigned ones, and blanks other than the space. keep: those to leave."""
    words = str(text)
    if words.isprintable():
        return words
    return "".join(c if c == " " or c in keep or _visible(c) else _numbered(c) for c in words)


def printable_json(text: str) -> str:
    """JSON text in which such characters are escaped as JSON has it, beyond the first plane by a pair of surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c in " \n" or _visible(c) else json.dumps(c)[1:-1] for c in text)


def one_line(text: object) -> str:
    """`printable`, with line breaks and tabs as spaces."""
    words = str(text)
    if words.isprintable():  # so it has none
        return words
    return printable(" ".join(words.split("\n")).replace("\t", " ").replace("\r", " "))


def clipped(text: str, width: int) -> str:
    """`text` in at most `width` characters: of a longer one the beginning and, as long, the end."""
    kept = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - kept]}…{text[-kept:]}"


def _visible(c: str) -> bool:
    return unicodedata.category(c)[0] not in "CZ"


def _numbered(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 2**16 else f"\\U{ord(c):08x}"
