"""Odd and hostile texts, files and options end in one documented error, never in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from harness.cli import Exit, call
from harness.registry import InvalidSpec, RegistryError, parse_spec, write_spec
from harness.runs import suite as suites
from harness.runs.record import Record
from leaderboard import results
from leaderboard.results import ResultsError

IGNORED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=IGNORED)
DEEP = 3000
NESTED = [
    "[" * DEEP,
    "[" * DEEP + "]" * DEEP,
    "(" * DEEP,
    "-" * DEEP + "1",
    "9" * 5000,
    "{" * DEEP,
    "'" + "a" * 50_000 + "'",
]
LITERALS = st.one_of(
    st.sampled_from(NESTED), st.text(max_size=40), st.text(alphabet="[](){}=,.-+'\"\\#0123eEjx_ \n", max_size=60)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@QUICK
@given(LITERALS)
def test_a_spec_is_read_or_refused(text: str) -> None:
    for spec in (text, f"x(a={text})", f"x({text})", f"x(a=1, b={text})"):
        try:
            name, parameters = parse_spec(spec)
        except InvalidSpec as error:
            assert "\n" not in str(error).strip("\n") or "\n" in spec
            continue
        assert parse_spec(write_spec(name, parameters))[0] == name if _writable(name, parameters) else True


def _writable(name: str, parameters: dict[str, Any]) -> bool:
    try:
        return len(write_spec(name, parameters)) < 20_000
    except RegistryError:
        return False


@QUICK
@given(LITERALS, st.sampled_from(["n", "seed", "model", "grid.0.n", "grid.9.n", "title", "metrics", "x", ""]))
def test_an_override_is_taken_or_refused(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "s.toml"
    axes = "\n".join(f'{axis} = ["x"]' for axis in suites.AXES)
    path.write_text(f"[[grid]]\n{axes}\n")
    try:
        suites.read(path, [f"{key}={text}"])
    except RegistryError as error:
        assert error.exit_code == Exit.usage


@QUICK
@given(st.one_of(LITERALS.map(lambda text: f"n = {text}"), st.text(max_size=80), st.just("a = " + "[" * DEEP)))
def test_a_suite_file_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RegistryError):
        suites.read(path)


def sealed(document: Any, folder: Path) -> Path:
    path = folder / f"{'0' * 64}.json"
    path.write_text(json.dumps(document))
    return path


@QUICK
@given(
    JSON, st.sampled_from(["cell", "scores", "attempts", "provenance", "knowledge", "sheet", "key", "warnings", "more"])
)
def test_a_record_is_read_or_refused(tmp_path: Path, value: Any, name: str) -> None:
    cell = {axis: "x" for axis in suites.AXES} | {"seed": 0, "trigger_given": "true", "n": 1}
    document = {"key": "0" * 64, "cell": cell, "scores": {}, "provenance": {}} | {name: value}
    document = json.loads(json.dumps(document), parse_constant=lambda _: None)
    path = sealed({**document, "digest": results.digest(document)}, tmp_path)
    try:
        record = results.read_record(path)
    except ResultsError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(record, Record)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[]", "null", "\ufeff{}", '{"a": NaN}', "", "\x00", '{"a":' * 50_000]
)
def test_a_results_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / f"{'0' * 64}.json"
    path.write_text(text)
    with pytest.raises(ResultsError):
        results.read_record(path)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "smoke", "--max-hours", "nan"),
        ("run", "smoke", "--timeout", "nan"),
        ("run", "smoke", "--stall", "inf"),
        ("run", "smoke", "--gpu-share", "nan"),
        ("run", "smoke", "--max-hours", "1e999"),
        ("run", "smoke", "--cpus", "0"),
        ("plan", "smoke", "--set", f"n={'[' * DEEP}"),
        ("plan", "smoke", "--set", f"n={'9' * 5000}"),
        ("plan", "no/such.toml"),
        ("store", "gc", "--older-than", "nan"),
    ],
)
def test_an_option_that_means_nothing_is_a_usage_error(words: tuple[str, ...], capsys: Any, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path)] if words[0] != "store" else []
    assert call([*words, *store]) == Exit.usage
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def alone(*words: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **environment: str) -> Any:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "BENCH_STORE")}
    command = [sys.executable, "-P", "-c", "import harness.cli; harness.cli.main()", *words]
    return subprocess.run(command, env=kept | environment, stdout=stdout, stderr=stderr, timeout=800)


def test_letters_that_a_terminal_does_not_know_are_escaped() -> None:
    done = alone("show", "elijah", PYTHONIOENCODING="latin-1", HOME="/nowhere")
    assert done.returncode == 0 and b"\\u" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has /dev/full")
def test_a_full_disk_behind_stderr_ends_nothing() -> None:
    with open("/dev/full", "wb") as full:
        done = alone("show", "nothing-of-this-name", stderr=full, HOME="/nowhere")
    assert done.returncode == Exit.usage
