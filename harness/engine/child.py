"""What happens inside a job's process: tie it to the driver's life, send output to its log, run, write the outcome.

Reached by a fork of the fork server (CPU), or by `python -m harness.engine.child LIFELINE SERVER REQUEST [CHANNEL]`
(GPU). With a CHANNEL the process may be handed jobs that share what it loaded. It offers itself after a job that ended
well and left the process as it was; after any other it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from harness.diffusion import events
from harness.engine.failures import STORE_LOST, NoDevice, classify
from harness.engine.forkserver import preload
from harness.runs.store import CorruptArtifact, MissingArtifact, Store, StoreError

Execute = Callable[[dict[str, Any], Store, Path], Mapping[str, Any]]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Start:
    """When a job began: the clock, and the processor time that this process had used by then."""

    clock: float
    cpu_s: float


def main(request: dict[str, Any], lifeline: int, server: int, channel: socket.socket | None) -> None:
    """Run the request's job, and those that come through the channel after it, and leave the process: status 0 after
    success, 1 after a written failure, STORE_LOST where not even the failure could be written."""
    die_with(server)
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()
    store = Store(Path(request["store"]))
    while _do(request, store):
        request = _next(channel)
    _leave(0)


def _do(request: dict[str, Any], store: Store) -> bool:
    """Do a job; whether another may follow it. Leaves the process if the job failed."""
    _redirect(request["log"])
    events.listen(_with_gpu_memory(events.file_sink(Path(request["events"]))))
    started = _start()
    before, outcome = None, {"ok": True, "failure": None, "error": None, "traceback": None, "corrupt": None}
    try:
        execute = _prepare(request)
        before = _settings() if request["keep"] else None
        _run(request, execute, store, started)
    except BaseException as error:  # the job boundary: whatever a plugin does ends up in the outcome
        traceback.print_exc()
        outcome |= _failed(error)
    outcome["cost"] = _cost(started)
    try:
        store.write_outcome(request["job"]["key"], request["attempt"], outcome)
    except (StoreError, OSError):
        traceback.print_exc()
        _leave(STORE_LOST)
    if not outcome["ok"]:
        _leave(1)
    return before is not None and before == _settings()


def _next(channel: socket.socket | None) -> dict[str, Any]:
    """Say that the job is done and wait for the next; where there is none, this process is killed."""
    assert channel is not None, "a request that says `keep` comes with a channel"
    _flush()
    channel.sendall(b".")
    with channel.makefile("rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):  # the fork server is gone
        _leave(0)
    return json.loads(line)


def _leave(status: int) -> NoReturn:
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log's disk is full, too
            stream.flush()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies (Linux); leave at once if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(121)


def _watch(lifeline: int) -> None:
    """Wait for the end of the driver's pipe, then kill the whole group: this process and whatever it started."""
    while os.read(lifeline, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _redirect(log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(out)
    os.close(null)
    faulthandler.enable(file=2)


def _prepare(request: dict[str, Any]) -> Execute:
    if request["gpu"] is not None:
        preload(request["preload"])
    module, _, name = request["execute"].partition(":")
    execute: Execute = getattr(importlib.import_module(module), name)
    _set_up_torch(request)
    return execute


def _run(request: dict[str, Any], execute: Execute, store: Store, started: Start) -> None:
    job = request["job"]

    def fill(out: Path) -> dict[str, Any]:
        facts = dict(execute(job["spec"], store, out))
        return facts | {"cost": _cost(started), "accelerator": _accelerator()}

    store.publish(job["key"], fill, {name: job[name] for name in ("kind", "label", "ingredients") if name in job})


def _set_up_torch(request: dict[str, Any]) -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_num_threads(request["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    if request["gpu"] is not None:
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for every empty tensor
        if not torch.cuda.is_available():
            raise NoDevice(f"GPU {request['gpu']['id']}: torch sees no CUDA device there; run without --gpus")
        if request["gpu"]["share"] < 1:
            torch.cuda.set_per_process_memory_fraction(request["gpu"]["share"])


def _settings() -> dict[str, Any] | None:
    """The settings of this process that a job could have changed for later jobs; None if they cannot be determined."""
    import psutil

    try:
        return _torch_settings() | {
            "threads": threading.active_count(),
            "processes": [process.pid for process in psutil.Process().children()],
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "path": list(sys.path),
            "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)],
        }
    except Exception:  # psutil's, a folder that is gone, two of torch's switches that contradict each other
        return None


def _torch_settings() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    backends, cuda = torch.backends, torch.backends.cuda
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "torch threads": torch.get_num_threads(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), backends.cudnn.deterministic),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.mkldnn.enabled),
        "precision": (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
    }


def _failed(error: BaseException) -> dict[str, Any]:
    text = f"the job ended the interpreter: {error!r}" if isinstance(error, SystemExit) else _words(error)
    return {
        "ok": False,
        "failure": classify(error).value,
        "error": text,
        "traceback": "".join(traceback.format_exception(error)),
        "corrupt": error.key if isinstance(error, (CorruptArtifact, MissingArtifact)) else None,
    }


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _with_gpu_memory(sink: events.Sink) -> events.Sink:
    """The sink, which also gets the bytes of GPU memory of this process with each event; unchanged without a GPU."""

    def told(event: dict[str, Any]) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            event = event | {"gpu_bytes": torch.cuda.memory_reserved()}
        sink(event)

    return told


def _accelerator() -> str | None:
    """Name of the GPU that this process computed on, None on a CPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_initialized() else None


def _start() -> Start:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        from harness.diffusion import gpu

        gpu.begin()
    return Start(time.perf_counter(), _cpu_s())


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def _cost(started: Start) -> dict[str, Any]:
    """Seconds and bytes of the job so far. The peak of main memory is the process's, jobs before this one included; the
    GPU's is None without a GPU, never 0."""
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_initialized()
    peak = None
    if torch is not None and cuda:
        from harness.diffusion import gpu

        with contextlib.suppress(RuntimeError):  # after a CUDA error nothing can be waited for
            torch.cuda.synchronize()
        peak = gpu.peak()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "wall_s": time.perf_counter() - started.clock,
        "cpu_s": _cpu_s() - started.cpu_s,
        "peak_rss_bytes": max(use.ru_maxrss for use in usage) * unit,
        "cuda_peak_bytes": peak,
    }


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _lifeline, _server, _request, *_channel = sys.argv[1:]
        _given = [socket.socket(fileno=int(file)) for file in _channel]
        main(json.loads(_request), int(_lifeline), int(_server), _given[0] if _given else None)
