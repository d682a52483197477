"""Places jobs on a Ray cluster (extra `ray`): one that runs, one inside a Slurm allocation, or one of its own.

Ray only finds room. On the node that has it, a Ray task runs the job under the same supervisor as the local engine does
and streams its progress back; graph, retries and records stay with the driver. A node that sees the driver's store
works in it. Any other keeps a store of its own (BENCH_NODE_STORE, else a temporary folder), gets the artifacts that its
jobs need through Ray's object store, and hands back what they made; both sides check every byte's digest.

Ray finds its address and token by itself (RAY_ADDRESS, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH); we never print them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from harness.engine.failures import classify
from harness.engine.local import EXECUTE, PRELOAD, most_memory, processors
from harness.engine.supervise import Handle, Limits, Outcome, Supervisor
from harness.runs.job import Failure, Job
from harness.runs.store import CorruptArtifact, MissingArtifact, Store, StoreError

PATIENCE_S = 60.0  # how long a cluster may be without a node on which a job fits
LOOK_S = 2.0  # between two looks at the cluster's nodes
PARCELS = 16  # artifacts kept ready in Ray's object store


class ClusterError(RuntimeError):
    """No Ray, no cluster, or no node left on which a job fits."""


class Damaged(StoreError):
    """An artifact whose bytes are not those that were sent."""


@dataclass(frozen=True)
class Parcel:
    """An artifact on its way: its manifest and its files' bytes (uint8 arrays, which Ray does not copy)."""

    manifest: Mapping[str, Any]
    files: Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """The task of a node.

    parcels: the artifacts by key, as Ray references that are fetched only if they are missing; None if none were sent.
    """

    job: Job
    attempt: int
    root: str
    token: str
    execute: str
    preload: tuple[str, ...]
    threads: int
    limits: Limits
    share: float
    paths: tuple[str, ...]
    parcels: Mapping[str, Any] | None


@dataclass(frozen=True)
class News:
    """What a node says while it works, and at the end. missing: artifacts without which it cannot begin."""

    node: str
    event: Mapping[str, Any] | None = None
    outcome: Outcome | None = None
    parcel: Parcel | None = None
    log: bytes | None = None
    missing: tuple[str, ...] = ()


class RayEngine:
    """Jobs on a Ray cluster.

    address: HOST:PORT, "auto" (one that runs on this machine), "local" (one of our own, ended with us); default:
    RAY_ADDRESS, else "local". threads: processors of one job. cpus: the most processors to use at once. gpu_share: of a
    GPU for each job, 0 for none. Raises ValueError for demands that no node can meet, ClusterError without a cluster.
    """

    def __init__(
        self,
        store: Store,
        *,
        address: str | None = None,
        threads: int = 1,
        cpus: int | None = None,
        gpu_share: float = 0.0,
        limits: Limits | None = None,
        execute: str = EXECUTE,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        if threads < 1 or not 0 <= gpu_share <= 1:
            raise ValueError(f"{threads} threads and {gpu_share} of a GPU: give at least 1, and 0 to 1")
        self.store, self.threads, self.cpus, self.gpu_share = store, threads, cpus, gpu_share
        self.limits, self.execute, self.preload = limits or Limits(), execute, tuple(preload)
        self._tasks: dict[int, tuple[Handle, Any]] = {}
        self._parcels: OrderedDict[str, Any] = OrderedDict()
        self._apart = False  # whether a node without the driver's store was met
        self._stillborn: list[tuple[Handle, Outcome]] = []
        self._count = 0
        self._looked, self._room = -LOOK_S, 0
        self._roomless: float | None = None
        self.ray = _connect(address, cpus)
        self._do = self.ray.remote(do)
        try:
            self._refuse_the_impossible()
        except BaseException:
            self.close()
            raise

    @property
    def slots(self) -> int:
        """The number of jobs that can run at once on the nodes that are alive."""
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            fits = sum(self._fits(cpus, gpus) for _, cpus, gpus in self._nodes())
            self._room = min(fits, max(1, self.cpus // self.threads)) if self.cpus else fits
        return self._room

    @property
    def shares_gpus(self) -> bool:
        return 0 < self.gpu_share <= 0.5

    @property
    def spares_gpus(self) -> bool:
        """No: a job that uses no GPU leaves it to Ray, and takes one of the slots."""
        return False

    @property
    def running(self) -> list[Handle]:
        return [handle for handle, _ in (*self._tasks.values(), *self._stillborn)]

    @property
    def kept(self) -> tuple[()]:
        """None: here every job has a process of its own."""
        return ()

    def release(self) -> None:
        """Nothing to end."""

    def try_submit(self, job: Job, attempt: int, *, whole_gpu: bool = False) -> Handle | None:
        """Hand the job to Ray, or None while the cluster is full. Raises ClusterError when it stays without room."""
        slots = self.slots
        self._mind_the_room(slots)
        if len(self._tasks) >= slots:
            return None
        self._count += 1
        handle = Handle(job, attempt, self._count)
        try:
            self._send(handle, (1.0 if whole_gpu else self.gpu_share) if job.on_gpu else 0.0)
        except (CorruptArtifact, MissingArtifact) as error:  # found while packing what the job needs
            self._stillborn.append((handle, _unfit(error)))
        return handle

    def wait(self, timeout: float) -> list[tuple[Handle, Outcome]]:
        """The jobs that ended, after at most `timeout` seconds."""
        if self._stillborn:
            ended, self._stillborn = self._stillborn, []
            return ended
        if not self._tasks:
            time.sleep(timeout)
            return []
        streams = {stream: number for number, (_, stream) in self._tasks.items()}
        ready, _ = self.ray.wait(list(streams), num_returns=1, timeout=timeout, fetch_local=False)
        ended = []
        for stream in ready:
            handle, outcome = self._tasks[streams[stream]][0], self._hear(streams[stream], stream)
            if outcome is not None:
                self._tasks.pop(handle.number, None)
                ended.append((handle, outcome))
        return ended

    def cancel(self, handle: Handle, grace: float | None = None) -> None:
        """End a job and all it started; it comes out of `wait` as interrupted. Its worker is killed with it: Ray knows
        no gentler way that always works, so there is no grace."""
        if handle.verdict is None and handle.number in self._tasks:
            handle.verdict = Failure.interrupted, "interrupted"
            self.ray.cancel(self._tasks[handle.number][1], force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it was our own; jobs that run are killed with their workers."""
        for handle in self.running:
            self.cancel(handle)
        self._tasks.clear()
        self._parcels.clear()
        self.ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- room

    def _nodes(self) -> list[tuple[str, float, float]]:
        """(address, processors, GPUs) of the nodes that are alive."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        has = [(node.get("NodeManagerAddress", "?"), node["Resources"]) for node in alive]
        return [(name, float(had.get("CPU", 0)), float(had.get("GPU", 0))) for name, had in has]

    def _fits(self, cpus: float, gpus: float) -> int:
        most = int(cpus // self.threads)
        return min(most, int(gpus / self.gpu_share + 1e-9)) if self.gpu_share else most

    def _refuse_the_impossible(self) -> None:
        nodes = self._nodes()
        if not any(self._fits(cpus, gpus) for _, cpus, gpus in nodes):
            has = "; ".join(f"{name}: {cpus:g} CPUs, {gpus:g} GPUs" for name, cpus, gpus in nodes) or "no node"
            share = f" and {self.gpu_share:g} of a GPU" if self.gpu_share else ""
            raise ValueError(f"a job needs {self.threads} CPUs{share}, which no node of the cluster has: {has}")

    def _mind_the_room(self, slots: int) -> None:
        now = time.monotonic()
        self._roomless = None if slots else self._roomless or now
        if self._roomless is not None and now - self._roomless > PATIENCE_S:
            raise ClusterError(
                f"no node of the Ray cluster has had room for a job for {PATIENCE_S:g} s; run again later"
            )

    # ---- to and from the nodes

    def _send(self, handle: Handle, share: float) -> None:
        job, token = handle.job, secrets.token_hex(8)
        self.store.outcome_path(job.key, handle.attempt).unlink(missing_ok=True)
        self.store.events_path(job.key).write_text(json.dumps({"token": token}) + "\n")
        work = Work(
            job, handle.attempt, str(self.store.root), token, self.execute, self.preload, self.threads, self.limits,
            share, tuple(path or os.getcwd() for path in sys.path),
            {need: self._parcel(need) for need in job.needs} if self._apart else None,
        )  # fmt: skip
        task = self._do.options(
            num_cpus=self.threads, num_gpus=share, max_retries=0, num_returns="streaming", name=job.label[:80]
        )
        handle.gpu = {"id": "any", "share": share} if share else None
        self._tasks[handle.number] = handle, task.remote(work)

    def _parcel(self, key: str) -> Any:
        if key not in self._parcels:
            self._parcels[key] = self.ray.put(pack(self.store, key))
        self._parcels.move_to_end(key)
        while len(self._parcels) > PARCELS:
            self._parcels.popitem(last=False)
        return self._parcels[key]

    def _hear(self, number: int, stream: Any) -> Outcome | None:
        """Take one piece of news; the outcome if it is the last."""
        handle = self._tasks[number][0]
        try:
            news: News = self.ray.get(next(stream))
            if news.missing:
                self._apart = True
                self._send(handle, 0.0 if handle.gpu is None else handle.gpu["share"])
                return None
            return self._take(handle, news)
        except (self.ray.exceptions.RayError, StopIteration) as error:
            return self._lost(handle, error)
        except Damaged as error:
            return Outcome(False, Failure.environment, str(error))
        except (CorruptArtifact, MissingArtifact) as error:
            return _unfit(error)

    def _take(self, handle: Handle, news: News) -> Outcome | None:
        if handle.started is None:
            handle.started = time.monotonic()
        handle.event = news.event or handle.event
        if news.log is not None:
            self.store.log_path(handle.job.key, handle.attempt).write_bytes(news.log)
        if news.parcel is not None:
            unpack(self.store, handle.job.key, news.parcel)
        if news.outcome is not None and handle.verdict is not None and not news.outcome.ok:
            return replace(news.outcome, failure=handle.verdict[0], error=handle.verdict[1])
        return news.outcome

    def _lost(self, handle: Handle, error: BaseException) -> Outcome:
        if handle.verdict is not None:
            return Outcome(False, *handle.verdict)
        known, says = (
            self.ray.exceptions,
            f"{type(error).__name__}: {_hidden(str(error)).strip().partition(chr(10))[0]}",
        )
        if isinstance(error, known.OutOfMemoryError):
            return Outcome(False, Failure.memory, f"Ray stopped it, because its node ran out of memory ({says})")
        if isinstance(error, known.RayTaskError):
            cause = getattr(error, "cause", None) or error
            return Outcome(False, classify(cause), f"its node could not run it: {_hidden(repr(cause))}")
        return Outcome(False, Failure.killed, f"its Ray worker or node was lost ({says})")


def _unfit(error: CorruptArtifact | MissingArtifact) -> Outcome:
    return Outcome(False, Failure.data, str(error), corrupt=error.key)


def _connect(address: str | None, cpus: int | None) -> Any:
    """The module ray, connected. Raises ClusterError with one line that holds no token."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ClusterError("the engine 'ray' needs Ray: pip install 'diffusion-defense-bench[ray]'") from None
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"num_cpus": cpus or processors(), "include_dashboard": False} if where == "local" else {}
    try:
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:
        says = _hidden(str(error)).strip().partition("\n")[0]
        raise ClusterError(f"no Ray cluster at {where}: {says}") from None
    return ray


def _hidden(text: str) -> str:
    """The text without the cluster's token, wherever Ray may have found it."""
    for token in _tokens():
        text = text.replace(token, "***")
    return text


def _tokens() -> Iterator[str]:
    """The tokens in the places where Ray looks for one; all of them, as a message may hold one that Ray passed over."""
    yield from filter(None, [os.environ.get("RAY_AUTH_TOKEN", "").strip()])
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    files = [Path(named)] if named else []
    with suppress(RuntimeError):  # nobody's home
        files.append(Path.home() / ".ray" / "auth_token")
    for file in files:
        with suppress(OSError):
            yield from filter(None, [file.read_text(errors="replace").strip()])


# ---- artifacts on their way


def pack(store: Store, key: str) -> Parcel:
    """The artifact, its digests verified. Raises MissingArtifact, CorruptArtifact."""
    import numpy

    folder, manifest = store.open_artifact(key), store.manifest(key)
    return Parcel(manifest, {name: numpy.fromfile(folder / name, numpy.uint8) for name in manifest["files"]})


def unpack(store: Store, key: str, parcel: Parcel) -> None:
    """Publish the artifact, if it is not there yet. Raises Damaged if the bytes are not those that were sent."""
    sent = parcel.manifest

    def fill(folder: Path) -> Mapping[str, Any]:
        for name, content in parcel.files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise Damaged(f"artifact {key[:12]} contains a file {name!r} outside of its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if store.digest(path) != sent["files"][name]["sha256"]:
                raise Damaged(f"artifact {key[:12]} was damaged on its way ({name})")
        return sent["facts"]

    if not store.has(key):
        store.publish(key, fill, {name: sent[name] for name in ("kind", "label", "ingredients") if name in sent})


# ---- on the node


_supervisors: dict[Any, Supervisor] = {}  # of this worker, so that its fork server imports only once


def do(work: Work) -> Iterator[News]:
    """The body of a Ray task: run the job, say how it goes, and end with its outcome."""
    sys.path += [path for path in work.paths if path not in sys.path and Path(path).exists()]
    node = os.uname().nodename
    store, shared = _store_here(work)
    if not shared:
        missing = tuple(need for need in work.job.needs if not store.has(need))
        if missing and work.parcels is None:
            yield News(node, missing=missing)
            return
        _fetch(store, missing, work)
    supervisor = _supervisor(store, work)
    handle = supervisor.start(work.job, work.attempt, _gpu(work.share))
    yield News(node)
    said = None
    while True:
        for _, outcome in supervisor.poll(0.1):
            yield _last_news(node, store, work, outcome, shared)
            return
        if handle.event is not None and handle.event is not said:
            said = handle.event
            yield News(node, event=said)


def _store_here(work: Work) -> tuple[Store, bool]:
    """(the store to work in, whether it is the driver's)."""
    own = os.environ.get("BENCH_NODE_STORE")
    theirs = Store(Path(work.root))
    if own is None and theirs.has_event(work.job.key, work.token):
        return theirs, True
    default = Path(tempfile.gettempdir()) / f"diffusion-defense-bench-{os.getuid()}" / "store"
    return Store(Path(own) if own else default), False


def _fetch(store: Store, missing: Sequence[str], work: Work) -> None:
    import ray

    for key in missing:
        unpack(store, key, ray.get((work.parcels or {})[key]))


def _supervisor(store: Store, work: Work) -> Supervisor:
    limits = work.limits if work.limits.rss_bytes else replace(work.limits, rss_bytes=most_memory())
    how = (str(store.root), work.execute, work.preload, work.threads, limits)
    if how not in _supervisors:
        _supervisors[how] = Supervisor(store, work.execute, work.preload, work.threads, limits)
    return _supervisors[how]


def _gpu(share: float) -> dict[str, Any] | None:
    return {"id": os.environ["CUDA_VISIBLE_DEVICES"], "share": share} if share else None


def _last_news(node: str, store: Store, work: Work, outcome: Outcome, shared: bool) -> News:
    if shared:
        return News(node, outcome=outcome)
    log = store.log_path(work.job.key, work.attempt)
    parcel = pack(store, work.job.key) if outcome.ok else None
    return News(node, outcome=outcome, parcel=parcel, log=log.read_bytes() if log.exists() else None)
