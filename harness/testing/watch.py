"""Run a piece of a plugin in a forked process of its own and write down what it did: to the global state, to the disk,
to the network, to whoever called it. A process that hangs or dies takes nothing with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = (socket.AF_INET, socket.AF_INET6)
WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
NETWORK = {"socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"}
PEEKS = {
    "sys._getframe": "walks the frames of its caller",
    "sys._current_frames": "walks the frames of its caller",
    "gc.get_objects": "searches the interpreter's objects",
    "gc.get_referrers": "searches the interpreter's objects",
}


@dataclass
class Seen:
    """What a watched run did. `result` is what it returned, as JSON; `error` how it raised, with the plugin's line.

    ended: "returned", "raised", "interrupted", "hung" or "died". where: innermost line of the plugin when it ended
    badly. calls, events: uses of the denoiser, and calls of `progress`. global_state: names of what it changed. read:
    fields of the knowledge that a defense read.
    """

    ended: str = "died"
    result: Any = None
    error: str = ""
    where: str = ""
    seconds: float = 0.0
    calls: int = 0
    events: int = 0
    global_state: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    network: list[str] = field(default_factory=list)
    peeks: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def returned(self) -> bool:
        return self.ended == "returned"


@dataclass
class Watch:
    """What is noted while a run goes on. Interrupts the run as Ctrl-C does at the `interrupt`-th sign of life, counted
    over uses of the denoiser and progress events."""

    file: str
    store: str
    interrupt: int | None = None
    seen: Seen = field(default_factory=Seen)
    on: bool = False  # what the kit itself does before and after is not noted
    _busy: bool = False

    def tell(self, what: str) -> None:
        self.seen.peeks.append(what)

    def count(self, module: nn.Module) -> None:
        """Count each use of this network, and of its copies."""
        module.register_forward_pre_hook(_counter(self))

    def sign(self) -> None:
        """A sign of life: interrupts the run if it is the one."""
        if self.interrupt is not None and self.seen.calls + self.seen.events == self.interrupt:
            raise KeyboardInterrupt

    def progress(self, event: dict[str, Any]) -> None:
        self.seen.events += 1
        self.sign()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or not self.on:
            return
        self._busy = True
        try:
            self._note(event, arguments)
        finally:
            self._busy = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(*arguments)
        elif event in WRITES:
            self._wrote(arguments[0])
        elif event in NETWORK or (event == "socket.__new__" and arguments[1] in FAMILIES):
            self._line(self.seen.network, event)
            raise PermissionError("a plugin may not use the network")
        elif event in PEEKS and _caller() == self.file:
            self._line(self.seen.peeks, PEEKS[event])

    def _opened(self, path: Any, mode: Any, flags: int) -> None:
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            if not isinstance(path, int) and _inside(path, self.store):
                self._line(self.seen.peeks, "reads the store of the run")
            return
        self._wrote(path)

    def _wrote(self, path: Any) -> None:
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if not text or text == os.devnull or _inside(text, tempfile.gettempdir()):
            return
        if _inside(text, str(Path(self.store).parent)):
            self._line(self.seen.writes, os.path.relpath(text))
        else:
            self._line(self.seen.writes, str(Path(text).absolute()))
            raise PermissionError(f"a plugin may not write {text}")  # nor may a trial touch the user's files

    def _line(self, into: list[str], text: str) -> None:
        if len(into) < 20 and text not in into:
            into.append(text)


def _counter(watch: Watch) -> Callable[..., None]:
    def hook(*_: Any) -> None:  # a plain function: deep copies of the network share it
        if watch.on:
            watch.seen.calls += 1
            watch.sign()

    return hook


def _inside(path: Any, folder: str) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return Path(os.path.realpath(os.fsdecode(path))).is_relative_to(os.path.realpath(folder))
    return False


def _caller() -> str:
    """File of the innermost frame that is neither ours nor `inspect`'s."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, *_HELPERS):
        frame = frame.f_back
    return os.path.realpath(frame.f_code.co_filename)


_HELPERS = tuple(str(sys.modules[name].__file__) for name in ("traceback", "inspect") if name in sys.modules)


# ---- one run --------------------------------------------------------------------------------------------------------


def watched(
    work: Callable[[Watch], Any],
    file: str,
    seconds: float,
    interrupt: int | None = None,
    preload: Sequence[str] = (),
) -> Seen:
    """Do `work` in a forked process and say what it did. `file`: the plugin's. Ends it after `seconds`. `preload`:
    modules to import first.

    `work` prepares, then runs the plugin within `watching(watch)`, and returns something that is JSON.
    """
    with tempfile.TemporaryDirectory(prefix="bench-kit-") as folder:
        root = Path(os.path.realpath(folder))
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(work, root, Watch(os.path.realpath(file), str(root / "store"), interrupt), seconds, preload)
        code = _wait(pid, seconds + 10)
        return _outcome(root, os.path.realpath(file), code)


def _child(work: Callable[[Watch], Any], root: Path, watch: Watch, seconds: float, preload: Sequence[str]) -> None:
    """The forked process: never returns."""
    seen = watch.seen
    try:
        os.setpgid(0, 0)
        _settle(root)
        for name in preload:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        with (root / "stack.txt").open("w") as stack:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stack)
            started = time.perf_counter()
            try:
                seen.result = work(watch)
                seen.ended = "returned"
            except KeyboardInterrupt:
                seen.ended = "interrupted"
            except BaseException as error:
                seen.ended, seen.where = "raised", _place(error, watch.file)
                seen.error = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                traceback.print_exc()
            seen.seconds = time.perf_counter() - started
            faulthandler.cancel_dump_traceback_later()
        stray = [p for p in (root / "cwd", root / "home") for p in p.rglob("*") if p.is_file()]
        found = [str(p.relative_to(root / p.relative_to(root).parts[0])) for p in stray[:20]]
        seen.writes += [name for name in found if name not in seen.writes]
        (root / "seen.json").write_text(json.dumps(vars(seen)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _settle(root: Path) -> None:
    """An empty working directory, home, temporary directory and store; output to a file; one thread, since the threads
    of the parent's pool do not live here."""
    for name in ("cwd", "home", "tmp", "store"):
        (root / name).mkdir()
    (root / "store" / "record.json").write_text("{}")
    os.chdir(root / "cwd")
    os.environ |= {
        "HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "home"), "TMPDIR": str(root / "tmp"),
        "BENCH_STORE": str(root / "store"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(out, "w", closefd=False, buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)


def _wait(pid: int, seconds: float) -> int:
    """The exit status; -9 where the process had to be killed."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return -signal.SIGKILL


def _outcome(root: Path, file: str, code: int) -> Seen:
    output = (root / "output.txt").read_text(errors="replace")[-2000:] if (root / "output.txt").is_file() else ""
    if (root / "seen.json").is_file():
        return Seen(**{**json.loads((root / "seen.json").read_text()), "output": output})
    stack = (root / "stack.txt").read_text(errors="replace") if (root / "stack.txt").is_file() else ""
    if stack.strip() or code == -signal.SIGKILL:
        return Seen(ended="hung", where=_line_in(stack, file), output=output)
    return Seen(ended="died", error=f"the process ended with {code}", output=output)


def _line_in(stack: str, file: str) -> str:
    """ "line N, in NAME" of the innermost frame of `file` in a stack of faulthandler's."""
    for line in stack.splitlines():
        found = line.strip().removeprefix('File "').partition('", ')
        if found[1] and os.path.realpath(found[0]) == file:
            return found[2].replace(" in ", ", in ")
    return ""


def _place(error: BaseException, file: str) -> str:
    """ "line N, in NAME" of the innermost frame of `file` in the traceback of an error or of its cause."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.realpath(f.filename) == file]
    if error.__cause__ is not None and not frames:
        return _place(error.__cause__, file)
    return f"line {frames[-1].lineno}, in {frames[-1].name}" if frames else ""


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Note what happens inside: files, sockets, frames, progress, global state. Once in a process."""
    from harness.diffusion import events

    before, modules = global_state(), set(sys.modules)
    events.listen(watch.progress)
    sys.addaudithook(watch.audit)
    watch.on = True
    try:
        yield
    finally:
        watch.on = False
        events.listen(None)
        watch.seen.global_state = changed(before, global_state())
        watch.seen.imported = sorted(set(sys.modules) - modules)


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def global_state() -> dict[str, str]:
    """Fingerprints of what one part of a process can spoil for all others."""
    import numpy as np

    return {
        "torch's random state": _sha(torch.get_rng_state().numpy().tobytes()),
        "numpy's random state": _sha(repr(np.random.get_state()).encode()),
        "random's random state": _sha(repr(random.getstate()).encode()),
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's gradient mode": str(torch.is_grad_enabled()),
        "torch's number of threads": str(torch.get_num_threads()),
        "torch's deterministic mode": str(torch.are_deterministic_algorithms_enabled()),
        "the environment variables": _sha(repr(sorted(os.environ.items())).encode()),
        "the working directory": os.getcwd(),
        "sys.path": _sha(repr(sys.path).encode()),
    }


def stir(seed: int) -> None:
    """Put the global random states somewhere else."""
    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names whose fingerprints differ or that are on one side only."""
    return [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]


def fingerprint(value: Any) -> str:
    """A digest of tensors by their bytes, networks by their tensors, containers by their items, others by repr."""
    return _sha(json.dumps(_plain(value), sort_keys=True, default=repr).encode())


def network(model: Any, name: str = "model") -> dict[str, str]:
    """A fingerprint for each tensor of a DiffusionModel's networks, under a name for people."""
    tensors = {
        f"{name}.{part}.{key}": tensor
        for part, net in model.components().items()
        for key, tensor in net.state_dict().items()
    }
    trained = {
        f"{name}.{part}.{key}.requires_grad": str(parameter.requires_grad)
        for part, net in model.components().items()
        for key, parameter in net.named_parameters()
    }
    modes = {f"{name}.{part}.training": str(net.training) for part, net in model.components().items()}
    return {key: fingerprint(tensor) for key, tensor in tensors.items()} | trained | modes


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return [str(data.dtype), list(data.shape), _sha(data.view(-1).view(torch.uint8).numpy().tobytes())]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return _plain(vars(value)) if hasattr(value, "__dataclass_fields__") else type(value).__name__


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
