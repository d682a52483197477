"""Which changes of a source file are changes of its code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from harness import sources

CODE = '''"""What it is.

# not a comment
"""

import os  # for nothing


class Rinse:
    """A class."""  # noqa

    amount = 3  # spoons; paper
    # of soap

    def rinse(self) -> str:
        """Rinses."""
        text = """# kept

            kept, too"""  # é
        return text + "é"; "left in"
'''
BARE = '''
import os


class Rinse:

    amount = 3

    def rinse(self) -> str:
        text = """# kept

            kept, too"""
        return text + "é"; "left in"
'''


def test_comments_and_docstrings_are_no_code() -> None:
    assert sources.code_of(CODE.encode()) == BARE


def test_a_docstring_beside_code_is_cut_out_of_its_line() -> None:
    assert sources.code_of('def f(): "é"; return 1  # one\n'.encode()) == "def f():; return 1\n"


def test_line_ends_and_the_encoding_do_not_matter() -> None:
    assert sources.code_of(CODE.replace("\n", "\r\n").encode("utf-8-sig")) == BARE
    assert sources.code_of(CODE.replace("\n", "\r").encode()) == BARE
    latin = CODE.replace('"""What', '# coding: latin-1\n"""What', 1).encode("latin-1")
    assert sources.code_of(latin) == BARE


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"def f(:\n", b"'''"], ids=["binary", "syntax", "open string"])
def test_what_is_not_python_goes_by_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(content)
    assert sources.digest(path) == hashlib.sha256(content).hexdigest()


def test_code_that_published_rows_were_computed_with_keeps_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rinse.py"
    path.write_text(CODE)
    code = sources.digest(path)
    monkeypatch.setattr(sources, "_earlier", lambda: {code: "of the whole file"})
    sources._digest.cache_clear()
    assert sources.digest(path) == "of the whole file"
    path.write_text("# a word more\n" + CODE)
    assert sources.digest(path) == "of the whole file"
    path.write_text("\n" + CODE)
    assert sources.digest(path) not in (code, "of the whole file"), "a blank line is code"


def test_the_table_of_earlier_digests_is_one_of_digests() -> None:
    earlier = json.loads(sources.EARLIER.read_text())
    assert len(earlier) > 60 and all(len(digest) == 64 for pair in earlier.items() for digest in pair)
