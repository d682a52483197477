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
    latin = CODE.replace('"""What', '# coding: latin-1\n"""What', 1).encode("latin-1")
    assert sources.code_of(latin) == BARE


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"def f(:\n", b"'''"], ids=["binary", "syntax", "open string"])
def test_what_is_not_python_goes_by_its_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(content)
    assert sources.digest(path) == hashlib.sha256(content).hexdigest()


def test_code_that_published_rows_were_computed_with_keeps_its_digest(tmp_path: Path) -> None:
    earlier = json.loads(sources.EARLIER.read_text())
    path = Path(__file__).parents[1] / "plugins" / "targets" / "patch.py"
    code = hashlib.sha256(sources.code_of(path.read_bytes()).encode()).hexdigest()
    assert sources.digest(path) == earlier[code] != code
    (tmp_path / "patch.py").write_bytes(path.read_bytes() + b"\n# a word more\n")
    assert sources.digest(tmp_path / "patch.py") != earlier[code], "a blank line is code"
    (tmp_path / "patch.py").write_bytes(b"# a word more\n" + path.read_bytes())
    assert sources.digest(tmp_path / "patch.py") == earlier[code]
