"""`bench status`, `logs` and `retry`, the event file and what is shown while a run lasts."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from harness.cli import Exit, call, run as cli_run, status as cli_status
from harness.engine.display import Bars, Both, EventFile, Lines, describe
from harness.engine.driver import run
from harness.runs.job import Job
from harness.runs.store import Store
from harness.runs.suite import Suite
from tests import engine_tools
from tests.engine_tools import do, graph, job, local, wait_for
from tests.records import SPOILED, changed, record, write_suite

bodies, store = engine_tools.bodies, engine_tools.store
pytestmark = pytest.mark.usefixtures("bodies")
SETTINGS = cli_run.Settings("local", None, "", 1.0, 2, 100.0, 50.0, None, 1)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], store: Store) -> Callable[..., Any]:
    def run(*words: str) -> Any:
        code = call([*words, "--store", str(store.root)])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


def remember(
    store: Store, *jobs: Job, pid: int | None = None, name: str = "tiny", out: Path | None = None
) -> cli_run.Prepared:
    """Note a run as `bench run -o OUT` does; `pid`: of its driver."""
    plan = SimpleNamespace(jobs=graph(*jobs), cells=[])
    ready = cli_run.Prepared(Suite(name, name, (), (), ("asr",), Path("tiny.toml")), plan, store)
    cli_run._remember(ready, SETTINGS, {"suite": name, "only": ["a=b"], "sets": ["n=1"], "files": [], "out": out})
    if pid is not None:
        run = store.run(name) or {}
        store.write_run(name, run | {"driver": {"host": socket.gethostname(), "pid": pid, "started": time.time()}})
    return ready


def test_status_after_the_fact_says_how_each_job_ended(store: Store, bench: Callable[..., Any]) -> None:
    good, bad = job("good"), job("bad", do="fail")
    jobs = [good, bad, job("after", bad), job("never", value=8)]
    do(store, good, bad)
    store.write_attempts(jobs[3].key, [{"attempt": 1, "status": "running", "started": time.time()}])
    remember(store, *jobs, pid=4194305)
    found = bench("status")
    assert found.code == Exit.failed
    assert "tiny: over, process 4194305" in found.out
    assert "4 jobs: 1 done, 1 failed, 1 skipped, 1 lost" in found.out
    assert "bad: plugin error ValueError: box of side 14 does not fit" in found.out
    assert f"bench logs {bad.key[:12]}" in found.out
    assert "never: its driver died; the next run tries it again" in found.out
    for each, state in zip(jobs, ("done", "failed", "skipped", "lost"), strict=True):
        assert f"  {state:<7} {each.key[:10]} {each.label}" in found.out
    assert found.out.endswith("\nunfinished: bench retry tiny resumes it\n")
    said = json.loads(bench("status", "tiny", "--json").out)
    assert [each["state"] for each in said["jobs"]] == ["done", "failed", "skipped", "lost"]
    assert said["running"] is False
    missing = bench("status", "other")
    assert missing.code == Exit.usage and "there are tiny" in missing.err


def test_of_many_jobs_status_shows_those_that_went_wrong_and_with_all_every_one(
    store: Store, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = job("good"), job("bad", do="fail")
    do(store, good, bad)
    remember(store, good, bad, pid=4194305)
    assert "--all" not in bench("status").out and "good" in bench("status", "tiny.toml").out
    monkeypatch.setattr(cli_status, "LISTED", 1)
    brief, whole = bench("status").out, bench("status", "--all").out
    assert "2 jobs: 1 done, 1 failed; --all shows each" in brief and bad.key[:10] in brief
    assert good.key[:10] not in brief and good.key[:10] in whole and "--all" not in whole
    assert "unfinished" not in brief + whole


def test_status_and_logs_of_a_run_that_is_alive(store: Store, bench: Callable[..., Any]) -> None:
    until = store.root.parent / "until"
    learning = job("learning", do="learn", estimate=300.0, until=str(until))
    remember(store, learning, pid=os.getpid())
    events = EventFile(store.run_events("tiny"), every=0.0)

    def compute() -> None:
        with local(store) as engine:
            run(graph(learning), store, engine, listener=events)

    thread = threading.Thread(target=compute)
    thread.start()
    place, told = store.events_path(learning.key), store.run_events("tiny")
    wait_for(lambda: place.exists() and place.read_text().endswith("\n"))  # the file is there before its first line
    wait_for(lambda: '"remaining"' in told.read_text())
    out = bench("status").out
    assert "tiny: running" in out and "1 running" in out and re.search(r"about \d min left", out)
    assert "learning: learn " in out and ", loss " in out
    until.touch()
    followed = bench("logs", learning.key[:8], "-f")  # ends with the job
    thread.join()
    assert (followed.out, followed.err) == ("learned\n", "")
    assert bench("logs", learning.key[:8], "--attempt", "1").out == "learned\n"
    assert "1 done" in bench("status", "-f").out


def test_logs_names_what_is_wrong_with_a_key(store: Store, bench: Callable[..., Any]) -> None:
    done = job("done")
    do(store, done)
    for words, says in (
        (["ffffffffff"], "no job's key begins"),
        ([done.key[:9], "--attempt", "7"], "no log of attempt 7"),
    ):
        found = bench("logs", *words)
        assert found.code == Exit.usage and says in found.err


def test_logs_of_a_job_that_printed_nothing_say_so(store: Store, bench: Callable[..., Any]) -> None:
    quiet = job("quiet")
    do(store, quiet)
    store.log_path(quiet.key, 1).write_text("")
    found = bench("logs", quiet.key)
    assert (found.code, found.out) == (Exit.ok, "")
    assert found.err == f"job {quiet.key[:12]} printed nothing in attempt 1\n"


def test_retry_writes_the_report_where_the_run_did_unless_told_otherwise(
    store: Store, bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = remember(store, job("good"), out=tmp_path / "first")
    went: list[Any] = []
    monkeypatch.setattr(cli_status, "prepare", lambda *_: ready)
    monkeypatch.setattr(cli_run, "engine_of", lambda store, settings: local(store))
    monkeypatch.setattr(cli_status, "publish", lambda ready, results, out, *_: went.append(out) or Exit.ok)
    monkeypatch.chdir(tmp_path)
    for words in ([], ["-o", "second"], []):
        assert bench("retry", "tiny", *words, "--json").code == Exit.ok
    assert went == [tmp_path / "first", tmp_path / "second", tmp_path / "second"]


def test_report_finds_the_last_run_wherever_its_report_went(
    store: Store, bench: Callable[..., Any], tmp_path: Path
) -> None:
    assert "no run tiny in" in (none := bench("report", "tiny").err) and "compute one with bench run" in none
    measured = job("measure")
    row = changed(record(sheet=False), key=measured.key)
    write_suite(tmp_path / "first", [row])
    remember(store, measured, out=tmp_path / "first")
    assert json.loads(bench("report", "tiny", "--json").out)["records"][0]["key"] == measured.key
    typo = bench("report", "tinny")
    assert typo.code == Exit.usage and "no run tinny" in typo.err and "did you mean 'tiny'? there are tiny" in typo.err
    assert [path.name for path in (store.root / "runs").iterdir()] == ["tiny"], "looking makes no folder"
    remember(store, job("other"), out=tmp_path / "first")
    other = bench("report", "tiny")
    assert other.code == Exit.usage and "not the report of the last run of tiny; bench retry" in other.err
    remember(store, measured)
    assert "no report.json; compute it with bench run" in bench("report", "tiny").err


SPOILED_RUN = SPOILED | {
    "other types": lambda content: content.replace(b'"driver": {', b'"driver": 3, "former": {'),
}


@pytest.mark.parametrize("spoil", SPOILED_RUN.values(), ids=SPOILED_RUN)
def test_a_run_that_cannot_be_read_is_named_by_every_command_that_needs_it(
    store: Store, bench: Callable[..., Any], spoil: Callable[[bytes], bytes]
) -> None:
    remember(store, job("a"))
    path = store.root / "runs" / "tiny" / "run.json"
    path.write_bytes(spoil(path.read_bytes()))
    gc = ("store", "gc", "--older-than", "1")  # else it might remove what a run that goes on needs
    for words in (("status",), ("report", "tiny"), ("retry", "tiny"), ("store", "explain", "abcd"), gc):
        found = bench(*words)
        assert (found.code, found.out, len(found.err.splitlines())) == (Exit.missing, "", 1)
        assert found.err.startswith(f"bench: {path}: no run that can be read (")
        assert found.err.endswith("; remove it, and run the suite again\n")


def test_attempts_that_cannot_be_read_are_none(store: Store, bench: Callable[..., Any]) -> None:
    failed = job("bad", do="fail")
    do(store, failed)
    remember(store, failed, pid=4194305)
    (store.job_dir(failed.key) / "attempts.json").write_text("[1]")
    found = bench("status")
    assert found.code == Exit.ok and "1 jobs: 1 waiting" in found.out


def test_a_run_of_another_version_is_not_tried_again_with_its_options(store: Store, bench: Callable[..., Any]) -> None:
    remember(store, job("a"))
    run = store.run("tiny") or {}
    store.write_run("tiny", run | {"settings": {"threads": 1, "retries": 2}})
    found = bench("retry", "tiny")
    assert found.code == Exit.usage and "tiny was run by another version" in found.err


def test_retry_runs_again_what_failed_as_it_was_run(
    store: Store, bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.touch()
    bad, other = job("bad", do="write_to_a_full_disk", flag=str(full)), job("other", do="fail")
    after = job("after", bad)
    ready = remember(store, bad, other, after)
    do(store, bad, other, after)
    full.unlink()
    asked: list[Any] = []
    published: list[Any] = []
    monkeypatch.setattr(cli_status, "prepare", lambda *words: asked.append(words) or ready)
    monkeypatch.setattr(cli_run, "engine_of", lambda store, settings: asked.append(settings) or local(store))
    monkeypatch.setattr(cli_status, "publish", lambda ready, results, *_: published.append(results) or Exit.ok)
    assert bench("retry", "tiny", after.key[:9], "--timeout", "700", "--json").code == Exit.ok
    suite, only, sets, threads, root, *_ = asked[0]
    assert (suite, only, sets, threads, root) == ("tiny", ["a=b"], ["n=1"], 1, store.root)
    assert asked[1] == cli_run.Settings("local", None, "", 1.0, 2, 700.0, 50.0, None, 1)
    statuses = {each.label: published[0][each.key].status for each in (bad, other, after)}
    assert statuses == {"bad": "done", "other": "failed", "after": "done"}
    assert len(store.attempts(other.key)) == 1  # it was not asked for
    assert bench("retry").code == Exit.ok and len(store.attempts(other.key)) == 2


def test_gpus_that_are_not_there_are_refused_before_anything_is_remembered(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="run without --gpus"):
        cli_run.engine_of(store, cli_run.Settings("local", None, "0", 1.0, None, 100.0, 50.0, None, 1))


@pytest.mark.parametrize("gpus", ["0,1", "2", "GPU-aa", "all,0"])
def test_under_ray_cards_that_are_named_are_a_usage_error_with_the_way_out(store: Store, gpus: str) -> None:
    says = f"--gpus {gpus}: Ray itself chooses the cards; give --gpus all"
    with pytest.raises(click.UsageError, match=says) as caught:
        cli_run.engine_of(store, cli_run.Settings("ray", None, gpus, 1.0, None, 100.0, 50.0, None, 1))
    assert "\n" not in caught.value.message


def test_the_event_file_has_one_object_a_line(store: Store, tmp_path: Path) -> None:
    path, until = tmp_path / "events.jsonl", tmp_path / "until"
    events = EventFile(path, every=0.0)
    learning, bad = job("learning", do="learn", until=str(until)), job("bad", do="fail")

    class Heard(Lines):
        def progress(self, job: Job, event: Any) -> None:
            until.touch()

    do(store, learning, bad, listener=Both(events, Heard(io.StringIO())))
    events.close()
    told = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [each["event"] for each in told]
    assert (
        kinds[0] == "planned"
        and kinds[-1] == "closed"
        and {"started", "progress", "remaining", "finished"} <= set(kinds)
    )
    assert len({each["run"] for each in told}) == 1 and all(each["ts"] > 0 for each in told)
    (failed,) = (each for each in told if each.get("status") == "failed")
    assert failed["job"] == bad.key and "box of side" in failed["error"] and "bench logs" in failed["advice"]
    assert any(each["event"] == "progress" and "loss" in each and each["job"] == learning.key for each in told)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_bars_keep_their_numbers_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    bars, long = Bars(io.StringIO()), job("measure finetune(steps=4, batch=8) on digits-ddpm attacked by x, seed 17")
    bars.planned(1234, 12)
    bars.started(long, 1)
    bars.progress(long, {"ts": 1.0, "phase": "train", "step": 345, "total": 600, "loss": 0.03125})
    bars.remaining(36000.0)
    with bars.bars.console.capture() as shown:
        bars.bars.console.print(bars.bars.get_renderable())
    bars.close()
    above, below = shown.get().splitlines()
    assert "12/1234" in above and "about 10:00:00 left" in above
    assert below.startswith("measure") and ": train" in below and "345/600" in below and "loss 0.03125" in below


def test_bars_show_loss_gpu_memory_and_the_time_left() -> None:
    event = {"ts": 1.0, "phase": "train", "step": 3, "total": 6, "loss": 0.03125, "gpu_bytes": 3 * 2**30}
    assert describe(event) == "train 3/6, loss 0.03125, GPU 3.0 GiB"
    assert describe({"phase": "hang", "step": 3, "total": 0}) == "hang 3/?"
    bars, learning = Bars(io.StringIO()), job("learning")
    bars.planned(4, 1)
    bars.started(learning, 2)
    bars.progress(learning, event)
    bars.remaining(725.0)
    overall, mine = bars.bars.tasks
    bars.close()
    assert (overall.completed, overall.total, overall.fields["facts"]) == (1, 4, "about 0:12:05 left")
    assert mine.description == "learning: train" and (mine.completed, mine.total) == (3, 6)
    assert mine.fields["facts"] == "loss 0.03125, GPU 3.0 GiB"
