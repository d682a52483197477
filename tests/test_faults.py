"""What goes wrong on real machines, done on purpose: afterwards the results are those of a run to which nothing
happened, and no process is left. (Kills of jobs, of the fork server and of the driver, jobs that eat memory or ignore
SIGTERM, flipped bytes, two drivers that share the work: test_engine.)"""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.engine import child, failures, gpus, pace
from harness.engine.display import Silent
from harness.engine.driver import Interrupted, run
from harness.engine.gpus import PARTS, Card, Leases
from harness.engine.supervise import Limits
from harness.runs.job import Failure, Job
from harness.runs.store import MissingArtifact, Store, StoreError
from tests import engine_tools, whole_runs
from tests.engine_tools import (
    assert_all_gone,
    chain,
    digests,
    do,
    graph,
    job,
    jumping_clock,
    local,
    undisturbed,
    wait_for,
)

bodies, mark, orphans, store = engine_tools.bodies, engine_tools.mark, engine_tools.orphans, engine_tools.store
pytestmark = pytest.mark.usefixtures("bodies", "orphans")


# ---- classes and rules


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("no such box"), Failure.plugin),
        (RuntimeError("CUDA error: device-side assert triggered"), Failure.plugin),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Failure.environment),
        (OSError(errno.ENOSPC, "No space left on device"), Failure.environment),
        (OSError(errno.EISDIR, "Is a directory"), Failure.plugin),
        (ConnectionResetError("hub"), Failure.environment),
        (ModuleNotFoundError("No module named 'x'"), Failure.environment),
        (StoreError("no space left"), Failure.environment),
        (MissingArtifact("ab" * 32), Failure.data),
        (FileNotFoundError(errno.ENOENT, "No such file", "celeba"), Failure.data),
        (MemoryError(), Failure.memory),
        (ArithmeticError("the model's images hold NaN"), Failure.nan),
        (ZeroDivisionError(), Failure.plugin),
    ],
)
def test_an_exception_belongs_to_one_class(error: Exception, failure: Failure) -> None:
    assert failures.classify(error) is failure


def test_errors_of_torch_checkpoints_and_training_are_classed_where_those_are_loaded() -> None:
    import torch

    from harness.diffusion.checkpoint import CheckpointError
    from harness.diffusion.training import Diverged

    found = [failures.classify(error) for error in (torch.OutOfMemoryError(), CheckpointError("x"), Diverged("x"))]
    assert found == [Failure.oom, Failure.data, Failure.nan]


def test_every_class_has_its_rule_and_a_sentence_that_names_the_job() -> None:
    assert set(failures.RULES) == set(Failure)
    assert {failure for failure in Failure if failures.retries(failure, shares_gpus=True)} == {
        Failure.killed, Failure.oom, Failure.environment,
    }  # fmt: skip
    assert failures.retries(Failure.oom, shares_gpus=False) == 0
    assert "bench logs abcdefabcdef`" in (failures.advice("plugin error", "abcdef" * 9) or "")
    assert failures.advice("a word of another version", "ab" * 32) is None


def test_the_attempts_keep_class_and_advice(store: Store) -> None:
    failing = job("failing", do="fail")
    (attempt,) = do(store, failing)["failing"].attempts
    assert attempt["failure"] == "plugin error" and failing.key[:12] in attempt["advice"]


# ---- disk


@pytest.mark.parametrize("body", ["write_to_a_full_disk", "lose_the_store"])
def test_a_job_on_a_full_disk_fails_as_environment_and_the_next_run_completes(
    store: Store, tmp_path: Path, body: str
) -> None:
    full = tmp_path / "full"
    full.touch()
    jobs = [job("filler", do=body, value=4, flag=str(full))]
    jobs.append(job("after", *jobs))
    first = do(store, *jobs)
    assert first["filler"].failure is Failure.environment and first["after"].failure is Failure.skipped
    assert len(first["filler"].attempts) == 2  # one retry
    assert not list(store.root.glob("artifacts/??/.tmp*"))
    full.unlink()
    assert all(result.ok for result in do(store, *jobs).values())
    assert digests(store, jobs) == undisturbed(tmp_path, jobs)


def test_a_driver_on_a_full_disk_stops_with_one_error_and_leaves_nothing_running(
    store: Store, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = chain(tmp_path / "trace")
    written = []
    write = Store.write_attempts

    def full(self: Store, key: str, attempts: list[dict[str, Any]]) -> None:
        written.append(key)
        if len(written) > 4:
            raise StoreError("no space left")
        write(self, key, attempts)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_attempts", full)
        with pytest.raises(StoreError, match="no space left"):
            do(store, *jobs)
    assert_all_gone(mark)
    results = do(store, *jobs)
    assert all(result.ok for result in results.values())
    assert all(attempt["status"] != "running" for result in results.values() for attempt in result.attempts)
    assert digests(store, jobs) == undisturbed(tmp_path, jobs)


def test_half_written_artifacts_are_none(store: Store, tmp_path: Path) -> None:
    a, b, c = job("a", value=1), job("b", value=2), job("c", value=3)
    last = job("last", a, b, c)
    do(store, a, b, c)
    (store.artifact(a.key) / "manifest.json").unlink()  # killed between rename and sync, on a bad file system
    (store.artifact(b.key) / "value.json").write_text("")
    half = (store.artifact(c.key) / "manifest.json").read_text()
    (store.artifact(c.key) / "manifest.json").write_text(half[: len(half) // 2])
    draft = store.artifact(c.key).parent / ".tmp-4194305-bb"
    draft.mkdir()
    results = do(store, a, b, c, last)
    assert [result.status for result in results.values()] == ["done"] * 4
    assert digests(store, [a, b, c, last]) == undisturbed(tmp_path, [a, b, c, last])


def test_drafts_of_another_machine_on_a_shared_store_are_left_alone_for_a_week(store: Store) -> None:
    folder = store.artifact("ab" * 32).parent
    theirs, dead = folder / ".tmp-node7-1-aa", folder / ".tmp-4194305-bb"
    for draft in (theirs, dead):
        draft.mkdir(parents=True)
    assert store.gc(older_than=0) == [dead]
    assert store.gc(older_than=-8 * 86400) == [theirs]


# ---- output that cannot be written

SINKS = {  # what a shell makes of stdout and stderr, and whether a disk was full
    "both to a reader that left": ("2>&1 | head -c1 >/dev/null", False),
    "stdout to a reader that left": ("2>/dev/null | head -c1 >/dev/null", False),
    "stdout closed": ("2>/dev/null >&-", False),
    "stderr closed": (">/dev/null 2>&-", False),
    "everything closed": ("<&- >&- 2>&-", False),
    "stderr to a full disk": (">/dev/null 2>/dev/full", False),
    "stdout to a full disk": (">/dev/full", True),
    "both to a full disk": (">/dev/full 2>&1", True),
}


def into(sink: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """`command` with its output where `sink` of SINKS says; its own exit code, what it could say on stderr."""
    line = f"{shlex.join(command)} {SINKS[sink][0]}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=800, check=False)


PRINTS = """
import sys
import click
from harness import cli

@cli.bench.command()
@click.argument("trace")
def show(trace):
    print("a line of a plugin's", file=sys.stderr)
    for i in range(20000):
        cli.click.echo(f"line {i}")
    open(trace, "w").write("done")
    return int(sys.argv[2][-1])

cli.COMMANDS["prints"] = "x:y"
cli.bench.get_command = lambda ctx, name: show
cli.main()
"""


@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("sink", SINKS)
def test_output_that_cannot_be_written_ends_no_work_and_hides_no_outcome(
    sink: str, outcome: int, tmp_path: Path
) -> None:
    trace = tmp_path / f"trace-{outcome}"
    done = into(sink, [sys.executable, "-c", PRINTS, "prints", str(trace)])
    full = SINKS[sink][1]
    assert trace.is_file() and trace.read_text() == "done", done.stderr
    assert done.returncode == (outcome or (4 if full else 0))
    if sink == "stdout to a full disk":
        assert done.stderr.splitlines()[-1] == (
            "bench: stdout: No space left on device; the work is done, but not all of its output was written"
        )


def test_a_descriptor_that_is_closed_is_taken_by_no_file_of_ours(tmp_path: Path) -> None:
    code = "from harness.cli import streams; streams.install(); f = open('kept', 'w'); import os; os.write(1, b'x')"
    line = f"cd {tmp_path}; {shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], timeout=800, check=False).returncode == 0
    assert (tmp_path / "kept").read_text() == ""


def test_whoever_follows_a_run_leaves_when_nobody_reads_any_more(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys, time
        from types import SimpleNamespace
        from harness import cli
        from harness.cli import status
        status.opened = lambda store: None
        status.run_of = lambda where, suite: ("tiny", {"driver": {}})
        status.lives = lambda driver: True
        status._states = lambda where, run: [SimpleNamespace(state="running")]
        status._page = lambda *_: "a page"
        status.FOLLOW_S = 0.05
        cli.main()
    """)
    done = into("both to a reader that left", [sys.executable, "-c", code, "status", "--follow"])
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("sink", ["both to a reader that left", "both to a full disk"])
def test_a_run_whose_output_cannot_be_written_computes_stores_and_reports_everything(sink: str, tmp_path: Path) -> None:
    suite, root = tmp_path / "tiny.toml", tmp_path / "store"
    suite.write_text(whole_runs.SUITE)
    done = into(sink, whole_runs.bench(root, "run", str(suite)))
    assert done.returncode == (4 if SINKS[sink][1] else 0)
    report = json.loads((root / "runs" / "tiny" / "report.json").read_text())
    assert report and not any(record["error"] for record in report["records"])
    for command in (["status", "--json"], ["plan", str(suite)], ["report", "tiny"], ["run", str(suite)]):
        again = into(sink, whole_runs.bench(root, *command))
        assert again.returncode == (4 if SINKS[sink][1] else 0), command


@pytest.mark.slow
def test_a_scan_whose_verdict_nobody_reads_still_writes_its_page(tmp_path: Path) -> None:
    from harness.diffusion import checkpoint
    from tests.oracles import tiny_unet

    checkpoint.save(tiny_unet(), tmp_path / "m")
    short = "bias-scan(starts=1, shifts=1, iterations=2, batch=4)"
    scan = ["scan", str(tmp_path / "m"), "--detector", short, "--device", "cpu", "-o", str(tmp_path / "x.html")]
    main = [sys.executable, "-P", "-c", "import harness.cli; harness.cli.main()"]
    plain = subprocess.run([*main, *scan, "--json"], capture_output=True, timeout=800, check=False)
    (tmp_path / "x.html").unlink()
    done = into("both to a reader that left", [*main, *scan, "--json"])
    assert done.returncode == plain.returncode and (tmp_path / "x.html").is_file()


# ---- clocks and time


def test_clocks_that_jump_end_no_job(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = tmp_path / "jumping"
    flag.touch()
    ticking = job("ticking", do="tick", jump=7200.0, flag=str(flag))
    after = job("after", ticking, value=2)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping_clock())
        results = do(store, ticking, after, limits=Limits(stall_s=60))
    assert [result.error for result in results.values()] == [None, None]
    flag.unlink()
    assert digests(store, [ticking, after]) == undisturbed(tmp_path, [ticking, after])


def test_when_the_time_is_over_running_jobs_are_ended_and_the_next_run_goes_on(store: Store, mark: str) -> None:
    quick, slow, later = job("quick"), job("slow", seconds=600), job("later", value=2)
    with local(store, cpu_slots=1) as engine:
        run(graph(quick), store, engine)
        with pytest.raises(Interrupted, match=r"h are over with 1 of 3 jobs done"):
            run(graph(quick, slow, later), store, engine, max_seconds=1.0)
    assert_all_gone(mark)
    assert not store.has(slow.key)
    assert do(store, quick, later)["later"].ok


def test_a_job_known_to_take_longer_than_what_is_left_is_not_started(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = pace.Pace.learn
    monkeypatch.setattr(pace.Pace, "learn", lambda self, job, seconds: learn(self, job, 2000.0))
    first, second = (job(f"work, seed {seed}", method="work") for seed in (0, 1))
    with local(store) as engine:
        run(graph(first), store, engine)
        with pytest.raises(Interrupted, match="nothing more can be done") as caught:
            run(graph(first, second), store, engine, max_seconds=1000.0)
    assert caught.value.results[first.key].ok
    assert caught.value.results[second.key].failure is Failure.interrupted
    assert store.attempts(second.key) == []


def test_pace_learns_from_the_like_and_packs_the_rest_into_slots() -> None:
    known = pace.Pace()
    attack, like = (job(f"attack a on m, seed {seed}", method="attack a on m", estimate=100.0) for seed in (0, 1))
    assert known.expect(attack) == 100.0
    for seconds in (10.0, 30.0, 20.0):
        known.learn(attack, seconds)
    assert known.expect(like) == 20.0
    assert known.expect(job("attack b on m, seed 0", estimate=50.0)) == 10.0  # estimates were 5 times too long
    jobs = [(like, 0.0)] * 3 + [(attack, 15.0)]
    assert known.left(jobs, slots=2) == 40.0  # 20 + 20 beside 20 + 5
    assert known.left([], slots=2) == 0.0


# ---- two drivers


def test_a_job_that_fails_in_one_of_two_drivers_is_not_tried_by_the_other(store: Store) -> None:
    slow = fails_late(store)

    class Waiting(Silent):
        def note(self, text: str) -> None:
            if "another run is working on it" in text:
                Path(slow.spec["until"]).touch()

    code = "import sys; from tests.test_faults import other_driver; other_driver(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, str(store.root)]) as other:
        wait_for(lambda: store.attempts(slow.key))
        result = do(store, slow, listener=Waiting())["slow"]
        assert other.wait(120) == 0
    assert result.failure is Failure.plugin and len(result.attempts) == 1


@pytest.mark.parametrize("works", [False, True])
def test_another_run_is_said_to_work_on_a_job_once_and_only_if_it_does(store: Store, works: bool) -> None:
    """A driver that looks for room holds the lock of a job for a moment, too."""
    quick, said, held = job("quick", value=7), list[str](), threading.Event()
    looks = threading.Semaphore(0)

    class Counting(Store):
        """The driver reads the attempts each time that it finds the lock taken."""

        def attempts(self, key: str) -> list[dict[str, Any]]:
            looks.release()
            return super().attempts(key)

    if works:
        store.write_attempts(quick.key, [{"attempt": 1, "status": "running", "started": 0.0}])

    class Noting(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    def hold() -> None:
        with store.lock(quick.key):
            held.set()
            assert all(looks.acquire(timeout=60) for _ in range(3))

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    assert do(Counting(store.root), quick, listener=Noting())["quick"].ok
    holder.join()
    assert said == ["quick: another run is working on it; waiting for it"] * works


def fails_late(store: Store) -> Any:
    """A job that fails when the file of its `until` is there."""
    return job("slow", do="fail_late", until=str(store.root.parent / "go"))


def other_driver(root: str) -> None:
    sys.path.insert(0, engine_tools.TESTS)
    store = Store(Path(root))
    do(store, fails_late(store))


# ---- GPUs, without one


CARDS = [Card("GPU-aa", 0, "Card", 8 * 2**30), Card("GPU-ab", 1, "Card", 8 * 2**30)]


def test_cards_are_found_by_number_and_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-aa, 8192, Card'\necho '1, GPU-ab, 8192, Card'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpus.cards() == CARDS
    assert gpus.find(["1", "GPU-aa"]) == [CARDS[1], CARDS[0]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab")
    assert gpus.find(["all"]) == [CARDS[1]]
    for names, says in ((["7"], "no GPU '7'; there are 0 "), (["GPU-a"], "no GPU 'GPU-a'"), (["0", "GPU-aa"], "once")):
        with pytest.raises(ValueError, match=says):
            gpus.find(names)
    with pytest.raises(ValueError, match="run without --gpus"):
        gpus.find(["0"], [])


@pytest.mark.parametrize(("share", "jobs"), [(1.0, 1), (0.5, 2), (1 / 3, 3), (0.3, 3), (0.25, 4), (0.1, 10)])
def test_as_many_leases_fit_on_a_card_as_its_share_says(tmp_path: Path, share: float, jobs: int) -> None:
    leases = Leases(tmp_path)
    taken = [leases.take(CARDS[0], gpus.parts_of(share)) for _ in range(jobs)]
    assert all(taken) and leases.take(CARDS[0], gpus.parts_of(share)) is None
    assert leases.take(CARDS[1], PARTS) is not None
    if taken[0] is not None:
        taken[0].release()
    assert leases.take(CARDS[0], gpus.parts_of(share)) is not None


def test_a_lease_ends_with_its_holder_however_it_ends(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from harness.engine.gpus import Card, Leases
        lease = Leases(Path({str(tmp_path)!r})).take(Card("GPU-aa"), 90)
        print(lease is not None, flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        leases = Leases(tmp_path)
        assert leases.take(Card("GPU-aa"), 60) is None
        small = leases.take(Card("GPU-aa"), 30)
        assert small is not None and leases.take(Card("GPU-aa"), 1) is None
        holder.kill()
        holder.wait()
        assert leases.take(Card("GPU-aa"), 90) is not None


def test_two_engines_with_stores_of_their_own_share_the_cards(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases")
    engines = [local(Store(tmp_path / name), gpus=CARDS, gpu_share=0.5, leases=leases) for name in ("a", "b")]
    try:
        started = [engine.try_submit(job(f"{i}", do="stall"), 1) for i in range(3) for engine in engines]
        assert [handle and handle.gpu and handle.gpu["id"] for handle in started] == [
            "GPU-aa", "GPU-aa", "GPU-ab", "GPU-ab", None, None,
        ]  # fmt: skip
        engines[0].close()
        assert engines[1].try_submit(job("whole"), 1, whole_gpu=True) is None
        assert engines[1].try_submit(job("again", do="stall"), 1) is not None
    finally:
        for engine in engines:
            engine.close()


def test_a_job_on_a_part_of_a_card_may_allocate_that_part_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[float] = []
    cuda = SimpleNamespace(is_available=lambda: True, set_per_process_memory_fraction=caps.append)
    ignore = lambda *_, **__: None  # noqa: E731
    utils = SimpleNamespace(deterministic=SimpleNamespace())
    stub = SimpleNamespace(cuda=cuda, utils=utils, set_num_threads=ignore, use_deterministic_algorithms=ignore)
    monkeypatch.setitem(sys.modules, "torch", stub)
    for share in (0.25, 1.0):
        child._set_up_torch({"threads": 1, "gpu": {"id": "GPU-aa", "share": share}})
    assert caps == [0.25]
    cuda.is_available = lambda: False
    with pytest.raises(failures.NoDevice, match="run without --gpus"):
        child._set_up_torch({"threads": 1, "gpu": {"id": "GPU-aa", "share": 1.0}})


def test_a_job_out_of_gpu_memory_gets_a_card_to_itself_once(store: Store) -> None:
    shares: list[float] = []

    class Watching(Silent):
        def started(self, job: Job, attempt: int) -> None:
            shares.extend(handle.gpu["share"] for handle in engine.running if handle.gpu)

    thirsty = job("thirsty", do="out_of_gpu_memory")
    with local(store, gpus=CARDS, gpu_share=0.5, leases=Leases(store.root / "leases")) as engine:
        result = run(graph(thirsty), store, engine, listener=Watching())[thirsty.key]
    assert result.ok and [attempt["failure"] for attempt in result.attempts] == ["oom", None]
    assert shares == [0.5, 1.0]


@pytest.mark.slow
def test_one_flipped_byte_in_a_complete_store_is_mended_in_the_same_run(tmp_path: Path) -> None:
    """In every file that an artifact of a kind has, one after another; sizes stay as they were."""
    suite = tmp_path / "tiny.toml"
    suite.write_text(whole_runs.SUITE)
    root = tmp_path / "store"
    first = whole_runs.run(root, str(suite))
    store = Store(root)
    named = {
        "attack": "model/model_index.json",
        "defend": "defended.json",
        "sample": "images.safetensors",
        "measure": "scores.json",
    }
    damaged = []
    for key in list(store.keys()):
        path = store.artifact(key) / named[store.manifest(key)["kind"]]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
        damaged.append(path)
    again = whole_runs.run(root, str(suite))
    assert len({path.name for path in damaged}) == len(named)
    assert whole_runs.numbers(again) == whole_runs.numbers(first)
    for path in damaged:
        if path.name in ("defended.json", "scores.json"):  # what a record is made of
            assert store.verify(path.parent.name) == [], path
