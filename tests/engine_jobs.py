"""Job bodies for test_engine: what a job does is its spec's `do`. Imported inside the jobs' processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.diffusion.events import progress
from harness.runs.store import Store


def execute(spec: dict[str, Any], store: Store, out: Path) -> dict[str, Any]:
    """Do what the spec says, then write a value that follows from the needs' values."""
    if "trace" in spec:
        with Path(spec["trace"]).open("a") as file:
            file.write(spec["name"] + "\n")
    globals()[spec.get("do", "add")](spec, store)
    values = [json.loads((store.open_artifact(key) / "value.json").read_text()) for key in spec.get("needs", ())]
    value = sum(values) + spec.get("value", 1)
    (out / "value.json").write_text(json.dumps(value))
    return {"value": value}


def add(spec: dict[str, Any], store: Store) -> None:
    time.sleep(spec.get("seconds", 0.0))


def crash_once(spec: dict[str, Any], store: Store) -> None:
    """`flag` lies where every node and every store sees it: else it would crash once on each."""
    flag = Path(spec["flag"])
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), spec.get("signal", signal.SIGSEGV))


def crash(spec: dict[str, Any], store: Store) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(spec: dict[str, Any], store: Store) -> None:
    raise ValueError("box of side 14 does not fit")


def out_of_memory(spec: dict[str, Any], store: Store) -> None:
    raise MemoryError("no room")


def leave(spec: dict[str, Any], store: Store) -> None:
    os._exit(7)


def quit_interpreter(spec: dict[str, Any], store: Store) -> None:
    sys.exit(0)


def hang(spec: dict[str, Any], store: Store) -> None:
    for step in range(10**6):
        progress("hang", step, 0)
        time.sleep(0.05)


def stall(spec: dict[str, Any], store: Store) -> None:
    time.sleep(600)


def ignore_sigterm(spec: dict[str, Any], store: Store) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(15, 1); time.sleep(600)"])
    time.sleep(600)


def eat_memory(spec: dict[str, Any], store: Store) -> None:
    """More than any limit of these tests, however late the supervisor looks, and little enough for any machine."""
    hoard = b"x" * (300 * 2**20)
    hang(spec, store)
    assert hoard


def leave_a_child(spec: dict[str, Any], store: Store) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def show_environment(spec: dict[str, Any], store: Store) -> None:
    print("to the log", os.environ["OMP_NUM_THREADS"], os.getcwd())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == spec["cuda"]


def matmul(spec: dict[str, Any], store: Store) -> None:
    import torch

    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    a = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))
    spec["value"] = float((a @ a).sum())


def write_to_a_full_disk(spec: dict[str, Any], store: Store) -> None:
    if Path(spec["flag"]).exists():
        with open("/dev/full", "w") as file:
            file.write("x")


def lose_the_store(spec: dict[str, Any], store: Store) -> None:
    """As if the store's disk were full from now on, for the job's artifact and for its outcome."""
    if Path(spec["flag"]).exists():

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        os.fsync = full


def tick(spec: dict[str, Any], store: Store) -> None:
    """While `flag` is there say something now and then, by a clock that jumps."""
    clock, jump = time.time, spec["jump"]
    for step in range(10 if Path(spec["flag"]).exists() else 0):
        time.time = lambda: clock() + (jump if step % 2 else -jump)  # noqa: B023
        progress("tick", step + 1, 1000)
        time.sleep(0.3)


def learn(spec: dict[str, Any], store: Store) -> None:
    for step in range(20):
        progress("learn", step + 1, 20, loss=1 / (step + 1))
        time.sleep(spec.get("seconds", 0.0) / 20)
    while "until" in spec and not Path(spec["until"]).exists():
        time.sleep(0.02)
    print("learned")


def where(spec: dict[str, Any], store: Store) -> None:
    """Say in whose store it works, and wait for one that works in another."""
    told = Path(spec["told"])
    (told / str(store.root).replace("/", "|")).touch()
    while len(list(told.iterdir())) < spec["stores"]:
        time.sleep(0.05)


_model: str | None = None  # what this process has loaded


def use(spec: dict[str, Any], store: Store) -> None:
    """Load the model unless this process has it, note who did what, and go on with `then`."""
    global _model
    loads, _model = _model != spec["model"], spec["model"]
    with Path(spec["notes"]).open("a") as file:
        file.write(f"{spec['name']},{os.getpid()},{'loads' if loads else 'has'}\n")
    print("this is", spec["name"])
    globals()[spec.get("then", "add")](spec, store)


def meet(spec: dict[str, Any], store: Store) -> None:
    """Wait until as many jobs as `of` are here."""
    (Path(spec["folder"]) / spec["name"]).touch()
    while len(list(Path(spec["folder"]).iterdir())) < spec["of"]:
        time.sleep(0.02)


def change_the_environment(spec: dict[str, Any], store: Store) -> None:
    os.environ["BENCH_SPOILT"] = "1"


def fail_late(spec: dict[str, Any], store: Store) -> None:
    while not Path(spec["until"]).exists():
        time.sleep(0.02)
    raise ValueError("too late")


def out_of_gpu_memory(spec: dict[str, Any], store: Store) -> None:
    """The first time, as torch would say it."""
    flag = store.root / "was here"
    if not flag.exists():
        flag.touch()
        error = type("OutOfMemoryError", (RuntimeError,), {})
        cuda = SimpleNamespace(is_initialized=lambda: False)
        sys.modules["torch"] = SimpleNamespace(OutOfMemoryError=error, cuda=cuda)  # type: ignore[assignment]
        raise error("CUDA out of memory")
