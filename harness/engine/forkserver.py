"""The process that starts job processes: it imports the heavy libraries once and forks from there.

    python -m harness.engine.forkserver CONTROL LIFELINE

CONTROL is a socket of JSON lines. From the driver: {"run": id, "request": {...}} and {"kill": id, "signal": n}; to it:
{"started": id, "pid": n} and {"exit": id, "code": n} (negative: the signal). LIFELINE is the read end of a pipe
whose only write end the driver holds: when the driver dies in any way, server and jobs see its end and die too.
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
from typing import Any


class Server:
    def __init__(self, control: socket.socket, lifeline: int) -> None:
        self.control = control
        self.lifeline = lifeline
        self.pids: dict[int, int] = {}
        self.preloaded = False
        self.wake, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Work until the driver closes its end or dies."""
        selector = selectors.DefaultSelector()
        for source in (self.control, self.wake, self.lifeline):
            selector.register(source, selectors.EVENT_READ)
        unread = b""
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if self.wake in ready:
                os.read(self.wake, 4096)
                self._reap()
            if self.lifeline in ready:
                return
            if self.control in ready:
                data = self.control.recv(65536)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if "run" in message:
            self._start(message["run"], message["request"])
        elif message["kill"] in self.pids:
            kill_tree(self.pids[message["kill"]], message["signal"])

    def _start(self, job: int, request: dict[str, Any]) -> None:
        fresh = request["gpu"] is not None
        if not fresh and not self.preloaded:
            preload(request["preload"], self._driver_lives)
            self.preloaded = True
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._become(request, server, fresh)
            except BaseException:  # the child must never return into the server's loop
                traceback.print_exc()
            os._exit(120)
        with contextlib.suppress(OSError):  # the child does the same: whoever is first
            os.setpgid(pid, pid)
        self.pids[job] = pid
        self._tell({"started": job, "pid": pid})

    def _driver_lives(self) -> bool:
        return not select.select([self.lifeline], [], [], 0)[0]

    def _become(self, request: dict[str, Any], server: int, fresh: bool) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.control.close()
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        if fresh:
            os.set_inheritable(self.lifeline, True)
            command = [sys.executable, "-P", "-m", "harness.engine.child", str(self.lifeline), str(server)]
            os.execve(sys.executable, [*command, json.dumps(request)], os.environ | request["environment"])
        from harness.engine import child

        child.main(request, self.lifeline, server)

    def _reap(self) -> None:
        for job, pid in list(self.pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what the job left running
                del self.pids[job]
                self._tell({"exit": job, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the driver is gone; `serve` sees that next
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        for pid in self.pids.values():
            kill_tree(pid, signal.SIGKILL)


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
