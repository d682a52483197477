"""The process that starts job processes: it imports the heavy libraries once and forks from there.

    python -m harness.engine.forkserver CONTROL LIFELINE

CONTROL is a socket of JSON lines. From the driver: {"run": id, "request": {...}, "after": id or null} and {"kill": id,
"signal": n}; to it: {"started": id, "pid": n}, {"done": id} and {"exit": id, "code": n} (negative: the signal).
"done": the job is, and its process waits for one that comes "after" it; only where the request says "keep". LIFELINE is
the read end of a pipe whose only write end the driver holds: when the driver dies in any way, server and jobs see its
end and die too.
This process runs one thread and never touches CUDA; a job that has a GPU gets a fresh interpreter instead of a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Child:
    """A job's process. channel: a byte comes from it for each job that is done, and the next request goes to it."""

    pid: int
    channel: socket.socket | None


class Server:
    def __init__(self, control: socket.socket, lifeline: int) -> None:
        self.control = control
        self.lifeline = lifeline
        self.children: dict[int, Child] = {}
        self.selector = selectors.DefaultSelector()
        self.preloaded = False
        self.wake, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Work until the driver closes its end or dies."""
        for source in (self.control, self.wake, self.lifeline):
            self.selector.register(source, selectors.EVENT_READ)
        unread = b""
        while True:
            ready = [key.fileobj for key, _ in self.selector.select()]
            if self.wake in ready:
                os.read(self.wake, 4096)
                self._reap()
            if self.lifeline in ready:
                return
            for job, child in self.children.items():
                if child.channel in ready:
                    self._hear(job, child.channel)
            if self.control in ready:
                data = self.control.recv(65536)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if "run" in message:
            child = self.children.pop(message["after"], None)  # gone if it died while it waited
            if child is None or child.channel is None:
                self._start(message["run"], message["request"])
            else:
                self._hand(child, child.channel, message["run"], message["request"])
        elif message["kill"] in self.children:
            kill_tree(self.children[message["kill"]].pid, message["signal"])

    def _hand(self, child: Child, channel: socket.socket, job: int, request: dict[str, Any]) -> None:
        self.children[job] = child
        with contextlib.suppress(OSError):  # it has just died; `_reap` sees that next
            channel.sendall(json.dumps(request).encode() + b"\n")
        self._tell({"started": job, "pid": child.pid})

    def _hear(self, job: int, channel: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if channel.recv(1):
                self._tell({"done": job})
                return
        self.selector.unregister(channel)

    def _start(self, job: int, request: dict[str, Any]) -> None:
        fresh = request["gpu"] is not None
        if not fresh and not self.preloaded:
            preload(request["preload"], self._driver_lives)
            self.preloaded = True
        server = os.getpid()
        ours, theirs = socket.socketpair() if request["keep"] else (None, None)
        pid = os.fork()
        if pid == 0:
            try:
                if ours is not None:
                    ours.close()
                self._become(request, server, fresh, theirs)
            except BaseException:  # the child must never return into the server's loop
                traceback.print_exc()
            os._exit(120)
        with contextlib.suppress(OSError):  # the child does the same: whoever is first
            os.setpgid(pid, pid)
        self.children[job] = Child(pid, ours)
        if ours is not None and theirs is not None:
            theirs.close()
            self.selector.register(ours, selectors.EVENT_READ)
        self._tell({"started": job, "pid": pid})

    def _driver_lives(self) -> bool:
        return not select.select([self.lifeline], [], [], 0)[0]

    def _become(self, request: dict[str, Any], server: int, fresh: bool, channel: socket.socket | None) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for other in (self.control, *(child.channel for child in self.children.values())):
            if other is not None:
                other.close()
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        if fresh:
            files = [self.lifeline, *([] if channel is None else [channel.fileno()])]
            for file in files:
                os.set_inheritable(file, True)
            words = [str(self.lifeline), str(server), json.dumps(request), *map(str, files[1:])]
            command = [sys.executable, "-P", "-m", "harness.engine.child", *words]
            os.execve(sys.executable, command, os.environ | request["environment"])
        from harness.engine import child

        child.main(request, self.lifeline, server, channel)

    def _reap(self) -> None:
        for job, child in list(self.children.items()):
            done, status = os.waitpid(child.pid, os.WNOHANG)
            if done:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # what the job left running
                self._forget(child.channel)
                del self.children[job]
                self._tell({"exit": job, "code": os.waitstatus_to_exitcode(status)})

    def _forget(self, channel: socket.socket | None) -> None:
        if channel is not None:
            with contextlib.suppress(KeyError):  # its end was heard
                self.selector.unregister(channel)
            channel.close()

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the driver is gone; `serve` sees that next
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        for child in self.children.values():
            kill_tree(child.pid, signal.SIGKILL)


def preload(modules: list[str], wanted: Callable[[], bool] = lambda: True) -> None:
    """Import what jobs will want, while `wanted()`. A module that fails here fails again in the job that wants it."""
    for name in modules:
        if not wanted():
            return
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()


def kill_tree(pid: int, number: int) -> None:
    """Send a signal to the process group of `pid` and, for SIGKILL, to descendants that left the group."""
    strays: list[Any] = []
    if number == signal.SIGKILL:
        import psutil

        with contextlib.suppress(psutil.Error):
            strays = psutil.Process(pid).children(recursive=True)
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    for stray in strays:
        with contextlib.suppress(Exception):  # gone already
            stray.kill()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("harness.engine.child")  # once here instead of in every fork
    server = Server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    try:
        server.serve()
    except BaseException:
        traceback.print_exc()
    server.end()
    os._exit(0)  # taking all those libraries apart first would be seconds of nothing


if __name__ == "__main__":
    main()
