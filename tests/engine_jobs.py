"""Job bodies for test_engine: what a job does is its spec's `do`. Imported inside the jobs' processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.events import progress
from harness.store import Store


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
    flag = store.root / "crashed"
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGSEGV)


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
    hoard = []
    for chunk in range(10**4):
        hoard.append(b"x" * 2**20)
        progress("hoard", chunk, 0)


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
