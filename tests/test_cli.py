import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import registry
from harness.cli import Exit, call
from harness.registry import Entry, Field, Index, PluginWarning
from harness.runs.suite import Dropped, Suite
from harness.types import Cell

MEASURED = """
import json, resource, sys
from harness.cli import call
code = call(sys.argv[1:])
use = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({"torch", "numpy", "diffusers", "transformers", "pydantic", "plugins"} & set(sys.modules))
told = {"code": code, "modules": len(sys.modules), "cpu": use.ru_utime + use.ru_stime, "heavy": heavy}
print(json.dumps(told), file=sys.stderr)
"""
ELIJAH = Entry(
    "defenses", "elijah", 2, "Elijah. Finds it.", "Elijah. Finds it.\n\nDiffers from the paper: no.",
    (Field("invert", "bool", "True", "find the trigger"), Field("steps", "int", "10", "")),
    {"accepts_triggers": ["noise"], "needs": ["data"]}, "plugins.defenses.elijah", "/x/elijah.py", "some-dist",
)  # fmt: skip
NONE = replace(ELIJAH, name="none", summary="No defense.", fields=(), facts={"needs": []})
Result = SimpleNamespace


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """bench(*words) → code, out, err."""

    def run(*words: str) -> Result:
        code = call(words)
        printed = capsys.readouterr()
        return Result(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (ELIJAH, NONE, replace(NONE, kind="attacks"))
    warning = PluginWarning("bad-dist", "bad.module", "/x/bad.py", "ImportError: no foo")
    monkeypatch.setattr(registry, "index", lambda **_: Index(entries, (warning,)))


def test_help_and_lists_are_quick_and_import_nothing_heavy(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def measured(*words: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", MEASURED, *words], env=env, capture_output=True, text=True)
        return json.loads(done.stderr.splitlines()[-1])

    measured("list", "defenses")  # derives the index
    for words in (["--help"], ["list", "defenses"], ["show", "none"], ["run", "--help"]):
        found = measured(*words)
        assert found["code"] == 0 and found["heavy"] == []
        assert found["modules"] < 350 and found["cpu"] < 5, f"bench {' '.join(words)}: 250 modules in about 0.2 s"


def test_lists_name_and_summarise(bench, indexed: None) -> None:
    found = bench("list", "defenses")
    assert found.code == 0
    assert found.out.splitlines() == ["elijah  Elijah. Finds it.", "none    No defense."]
    assert "bad.module of bad-dist left out: ImportError: no foo" in found.err
    assert [entry["name"] for entry in json.loads(bench("list", "defense", "--json").out)] == ["elijah", "none"]
    assert "attacks\n  none" in bench("list").out


def test_show_prints_docstring_parameters_needs_and_file(bench, indexed: None) -> None:
    out = bench("show", "elijah").out
    for part in ("defense elijah, version 2", "Differs from the paper", "needs: data", "/x/elijah.py", "some-dist"):
        assert part in out
    assert "invert = True  bool  find the trigger" in out
    both = bench("show", "none").out
    assert "attack none" in both and "defense none" in both
    assert "attack none" not in bench("show", "none", "--kind", "defense").out
    assert json.loads(bench("show", "elijah", "--json").out)[0]["fields"][0]["name"] == "invert"


def test_plugins_says_where_they_come_from(bench, indexed: None) -> None:
    out = bench("plugins").out
    assert "some-dist  plugins.defenses.elijah  2 defenses, 1 attack" in out
    assert out.endswith("3 plugins, 1 modules left out\n")
    assert len(json.loads(bench("plugins", "--json").out)["warnings"]) == 1


def test_plugins_names_those_of_others_before_the_built_in_ones(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = replace(NONE, distribution=registry.OWN, module="plugins.defenses.none")
    entries = (built_in, replace(ELIJAH, module="second"), replace(NONE, distribution="a-dist", module="first"))
    monkeypatch.setattr(registry, "index", lambda **_: Index(entries, ()))
    assert [line.split()[1] for line in bench("plugins").out.splitlines()[:3]] == [
        "first", "second", "plugins.defenses.none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["lst"], 2, "no command 'lst'; did you mean 'list'?"),
        (["list", "defnse"], 2, "no kind 'defnse'; did you mean 'defenses'?"),
        (["show", "elija"], 2, "no plugin named 'elija'; did you mean 'elijah'?"),
        (["show", "elija", "--kind", "defense"], 2, "no defense named 'elija'"),
        (["plan", "no-such-suite"], 2, "no suite 'no-such-suite'"),
        (["plan", "none.toml"], 2, "none.toml: no such suite file"),
        (["run", "--threads", "0"], 2, "--threads"),
        (["run", "--nope"], 2, "No such option"),
        (["list", "attacks", "--plugin-file", "none.py"], 2, "no such plugin file"),
        (["report", "/no/such/run/here"], 2, "here"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(bench, indexed: None, words: list[str], code: int, says: str) -> None:
    found = bench(*words)
    lines = [line for line in found.err.splitlines() if not line.startswith("warning:")]
    assert (found.code, found.out, len(lines)) == (code, "", 1)
    assert lines[0].startswith("bench: ") and says in lines[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (registry.PluginError("a plugin is broken"), Exit.plugin),
        (registry.InvalidSpec("a typo"), Exit.usage),
        (PermissionError(13, "Permission denied", "/x"), Exit.missing),
        (KeyboardInterrupt(), Exit.interrupted),
    ],
)
def test_every_kind_of_error_has_its_exit_code(
    bench, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def raises(**_: Any) -> Index:
        raise error

    monkeypatch.setattr(registry, "index", raises)
    found = bench("list")
    assert found.code == code and len(found.err.strip().splitlines()) == 1


def test_a_pipe_to_another_process_that_breaks_is_said_and_is_no_failed_cell(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(**_: Any) -> Index:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(registry, "index", raises)
    found = bench("list")
    assert (found.code, found.err) == (
        Exit.missing,
        "bench: the connection to another process broke; run the same command again\n",
    )


def test_a_pickled_checkpoint_is_a_missing_prerequisite(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.diffusion.checkpoint import CheckpointError

    def raises(**_: Any) -> Index:
        raise CheckpointError("model.bin: a pickle can run code")

    monkeypatch.setattr(registry, "index", raises)
    assert bench("list").code == Exit.missing


def test_a_bug_is_not_hidden_and_debug_shows_every_traceback(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(**_: Any) -> Index:
        raise KeyError("a bug")

    monkeypatch.setattr(registry, "index", raises)
    with pytest.raises(KeyError):
        bench("list")
    monkeypatch.setenv("BENCH_DEBUG", "1")
    with pytest.raises(registry.UnknownName):
        bench("list", "nonsense")


# ---- run and plan, with jobs of the tests' own


CELL = Cell("digits", "bad", "box", "hat", "none", "ddim", 0)


def record(error: str | None) -> dict[str, Any]:
    score = {
        "value": 0.5,
        "n": 10,
        "higher_is_better": False,
        "interval": [0.2, 0.8],
        "per_sample": None,
        "warning": None,
    }
    return {
        "key": "a" * 64, "cell": vars(CELL) | {}, "scores": {} if error else {"asr": score}, "warnings": [],
        "error": error, "attempts": [], "provenance": {}, "knowledge": [], "sheet": None,
    }  # fmt: skip


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None], None]:
    """Pretend that a suite of one cell was planned and computed; the record has this error."""
    from harness.cli import run
    from harness.runs import kept_plans, records
    from harness.runs.job import Job
    from harness.runs.record import Record
    from harness.runs.store import Store

    dropped = Dropped(replace(CELL, trigger="token"), "token stamps text, digits takes triggers in noise")
    suite = Suite("tiny", "Tiny", (CELL,), (dropped,), ("asr",), tmp_path / "tiny.toml")
    first = Job("1" * 64, "attack", "attack bad on digits", (), {}, 300.0)
    second = Job("a" * 64, "measure", "measure none", (first.key,), {}, 10.0)
    plan = Result(jobs={job.key: job for job in (first, second)}, cells=[])
    ready = run.Prepared(suite, plan, Store(tmp_path / "store"))

    def pretend(error: str | None) -> None:
        status = "failed" if error else "done"
        results = {first.key: Result(status="hit"), second.key: Result(status=status)}
        monkeypatch.setattr(run, "prepare", lambda *_, **__: ready)
        monkeypatch.setattr(kept_plans, "name_of", lambda *_: None)
        monkeypatch.setattr(run, "compute", lambda *_, **__: results)
        monkeypatch.setattr(records, "collect", lambda *_, **__: [Record.model_validate(record(error))])

    return pretend


def test_a_run_ends_with_table_places_and_summary(bench, prepared, tmp_path: Path) -> None:
    prepared(None)
    found = bench("run", "-o", str(tmp_path / "out"))
    assert found.code == Exit.ok
    for name in ("report.md", "report.json", "report.csv", "records"):
        assert str(tmp_path / "out" / name) in found.out
    assert found.out.splitlines()[-1] == "1 cells, 0 failed; jobs: 1 in the store, 1 computed, 0 failed, 0 skipped"
    again = bench("report", str(tmp_path / "out"))
    assert again.code == 0 and again.out.strip() in found.out
    assert json.loads(bench("report", str(tmp_path / "out"), "--json").out)["records"]


def test_a_row_is_said_when_its_cell_is_measured(tmp_path: Path) -> None:
    from harness.cli.row_lines import RowLines
    from harness.runs.execution import SCORES
    from harness.runs.job import Job
    from harness.runs.store import Store

    store, said, keys = Store(tmp_path), list[str](), [digit * 64 for digit in "abc"]
    scores = {"asr": 0.9844, "fd_ratio[digits]": 1.236, "attribute_accuracy": 0.5, "screen_auroc": None, "cost": 7.0}
    for key in keys[:2]:
        store.artifact(key).mkdir(parents=True)
        document = {name: {"value": value, "n": 8} for name, value in scores.items()}
        (store.artifact(key) / SCORES).write_text(json.dumps(document))
    tracks = dict(zip(keys, ("unconditional", "text-to-image", "text-to-image"), strict=True))
    plan: Any = Result(cells=[Result(key=key, track=track) for key, track in tracks.items()])
    rows = RowLines(plan, store, said.append)
    for key in keys:  # the last has no scores that could be read
        rows.finished(Job(key, "measure", f"measure none on {key[0]}", (), {}, 1.0), "done", None, 1.0, None)
    assert said == ["none on a: ASR 98.4 %, FD ratio 1.24", "none on b: ASR 98.4 %, Attributes 50.0 %"]
    rows.finished(Job(keys[0], "measure", "measure none on a", (), {}, 1.0), "hit", None, 0.0, None)
    rows.finished(Job("d" * 64, "attack", "attack", (), {}, 1.0), "done", None, 1.0, None)
    assert len(said) == 2, "what was there before, and what is no row, is not said"


def test_a_run_again_into_the_same_folder_leaves_its_own_records_and_the_users_files(
    bench, prepared, tmp_path: Path
) -> None:
    prepared(None)
    old, mine = (tmp_path / "out" / "records" / name for name in (f"{'b' * 64}.json", "my.json"))
    old.parent.mkdir(parents=True)
    for file in (old, mine):
        file.write_text("no JSON")
    assert bench("run", "-o", str(tmp_path / "out")).code == Exit.ok
    assert sorted(path.name for path in old.parent.iterdir()) == [f"{'a' * 64}.json", "my.json"]


@pytest.mark.parametrize("command", ["run", "retry"])
def test_what_cannot_be_written_is_said_before_anything_is_computed(
    bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    from harness.cli import run, status
    from harness.runs.store import Store

    def computed(*_: Any, **__: Any) -> Any:
        raise AssertionError("it went on")

    for module in (run, status):
        monkeypatch.setattr(module, "prepare", computed)
    store = Store(tmp_path / "store")
    settings = vars(run.Settings("local", None, "", 1.0, 1, 1.0, 1.0, None, 1))
    told = {"suite": "quick", "only": [], "sets": [], "files": []}
    driver = {"host": "elsewhere", "pid": 1, "started": 0.0}
    store.write_run("quick", {"driver": driver, "told": told, "settings": settings, "jobs": []})
    afile, here = tmp_path / "afile", ("--store", str(store.root))
    afile.write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records").write_text("")
    for name in ("packed/records/a.json.gz", "attested/reproduced/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    for out, why in (
        (afile, f"{afile}: cannot be written (Not a directory); name another with -o"),
        (tmp_path / "out", f"{tmp_path / 'out' / 'records'}: cannot be written (Not a directory)"),
        (Path("/proc/x"), "/proc/x: cannot be written"),
        (store.root, f"{store.root}: a store, whose records a report would replace; name another with -o"),
        (tmp_path / "packed", f"{tmp_path / 'packed'}: published results, which a report would replace; name another"),
        (tmp_path / "attested", "name another with -o, then bench leaderboard add"),
    ):
        found = bench(command, "quick", *here, "-o", str(out))
        assert (found.code, found.out, len(found.err.splitlines())) == (Exit.usage, "", 1) and why in found.err
    if command == "run":
        found = bench("run", "--store", "/proc/x")
        assert found.code == Exit.missing and "name another with --store or BENCH_STORE" in found.err


def test_a_run_with_a_failed_cell_exits_with_1(bench, prepared, tmp_path: Path) -> None:
    prepared("attack bad on digits failed: it raised")
    found = bench("run", "--json", "-o", str(tmp_path / "out"))
    assert found.code == Exit.failed
    said = json.loads(found.out)
    assert (said["suite"], said["failed_cells"], said["jobs"]) == ("tiny", 1, {"hit": 1, "failed": 1})
    assert bench("report", str(tmp_path / "out")).code == Exit.failed


def test_a_plan_says_hit_or_miss_and_why(bench, prepared) -> None:
    prepared(None)
    for words in (["plan"], ["run", "--dry-run"]):
        out = bench(*words).out
        assert "attack bad on digits  miss: never computed" in out
        assert "miss: needs attack bad on digits" in out
        assert "n/a, 1 cells: token stamps text" in out
        assert out.endswith("2 jobs, 0 in the store, 2 to compute, about 5 min of work\n")
    assert json.loads(bench("plan", "--json").out)["missing_s"] == 310


# ---- build and doctor


RECIPE = """
from dataclasses import dataclass
from typing import ClassVar
from harness.diffusion.events import progress
from harness.registry.hookspecs import hookimpl

def nothing(self, *_): raise NotImplementedError

@dataclass(frozen=True)
class Tiny:
    name: ClassVar[str] = "tiny-model"
    version: ClassVar[int] = 1
    modality: ClassVar[str] = "noise"
    conditional: ClassVar[bool] = False
    load = digest = data = prompts = attributes = words = judge = scorer = nothing

    def build(self, out):
        progress("train", 10, 10, loss=0.5)
        (out / "weights.txt").write_text("weights")
        return {"loss": 0.5}

@hookimpl
def models():
    return [Tiny]
"""


def test_build_writes_the_model_and_its_provenance(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "installed", list)
    (tmp_path / "tiny.py").write_text(RECIPE)
    words = ("build", "tiny-model", "--plugin-file", str(tmp_path / "tiny.py"))
    for out in (["-o", str(tmp_path / "out")], ["-o", str(tmp_path / "out")], []):
        found = bench(*words, *out)
        assert found.code == 0 and "train 10/10 loss 0.5" in found.err
        folder = tmp_path / "out" if out else tmp_path / "weights" / "tiny-model"
        assert (folder / "weights.txt").read_text() == "weights"
        assert json.loads((folder / "provenance.json").read_text())["facts"] == {"loss": 0.5}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    refused = bench(*words, "-o", str(tmp_path / "home"))
    assert refused.code == Exit.usage and "was not made by bench build" in refused.err
    assert (tmp_path / "home" / "letter.txt").is_file()


def test_an_exported_model_is_whole_and_the_one_that_the_plugin_loads(bench, tmp_path: Path) -> None:
    """In the package, a part of shapes-mmdit is in the folder of shapes-sd."""
    import torch
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    from harness.diffusion import checkpoint

    out = tmp_path / "whole"
    done = bench("export", "shapes-mmdit", "--json", "-o", str(out))
    says = json.loads(done.out)
    plugin = registry.load().build("models", "shapes-mmdit")
    assert done.code == 0 and says["digest"] == plugin.digest() and says["directory"] == str(out)
    assert json.loads((out / "bench.json").read_text())["model"] == "shapes-mmdit"
    for name, part in plugin.load().components().items():
        mine = checkpoint.load(out).components()[name].state_dict()
        assert all(torch.equal(mine[key], value) for key, value in part.state_dict().items())
    stock: Any = StableDiffusion3Pipeline
    stock.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    again = bench("export", "shapes-mmdit", "-o", str(out))
    assert again.code == Exit.usage and "is not empty; name another directory" in again.err


def test_doctor_checks_libraries_store_and_plugins(bench, indexed: None, tmp_path: Path) -> None:
    checks = {check["name"]: check for check in json.loads(bench("doctor", "--json", "--store", str(tmp_path)).out)}
    assert {"python", "torch", "store", "disk", "processors", "plugins"} <= set(checks)
    assert checks["store"]["state"] == "ok"
    blocked = tmp_path / "file"
    blocked.write_text("")
    found = bench("doctor", "--store", str(blocked / "store"))
    assert found.code == Exit.missing and "name another with --store or BENCH_STORE" in found.out


def test_a_written_record_names_its_sheet_relative_to_the_report(tmp_path: Path) -> None:
    from PIL import Image

    from harness.cli.run import _with_sheets
    from leaderboard.results import sheet_name
    from tests.records import changed, picture, record

    (tmp_path / "small.webp").write_bytes(picture())
    Image.new("RGB", (24, 16), (128, 128, 128)).save(tmp_path / "sheet.png")  # as a store has it
    made = [changed(record(f"{name}()"), sheet=str(tmp_path / name)) for name in ("small.webp", "sheet.png")]
    small, packed, none = _with_sheets([*made, record("b()", sheet=False)], tmp_path / "out")
    assert (small.sheet, none.sheet) == (sheet_name(picture()), None)
    assert (tmp_path / "out" / sheet_name(picture())).read_bytes() == picture()
    assert packed.sheet is not None and packed.sheet.endswith(".webp")
    assert Image.open(tmp_path / "out" / packed.sheet).format == "WEBP"
