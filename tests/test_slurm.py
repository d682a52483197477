"""examples/slurm.sh inside real allocations of a Slurm of two nodes, which the test starts on this machine."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.runs.store import Store
from tests import whole_runs
from tests.engine_tools import marked, wait_for

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")
WHERE = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(  # not importorskip: test_ray says what Ray is to read when it is imported
        find_spec("ray") is None, reason="the Ray engine is tested where ray is installed: pip install -e '.[ray]'"
    ),
    pytest.mark.skipif(
        not all(shutil.which(command, path=WHERE) for command in COMMANDS), reason="Slurm is not installed"
    ),
]
MANIFESTS = "artifacts/*/*/manifest.json"
SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
CONFIGURATION = """
ClusterName=bench
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
KillWait=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
NodeName=one NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=two NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=all Nodes=one,two Default=YES State=UP
"""


class Slurm:
    """A Slurm of two nodes. environment: what its commands, and so the allocations, see."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {
            "PATH": WHERE,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "BENCH_TEST_MARK": folder.as_posix(),
        }
        self.environment.pop("RAY_AUTH_TOKEN", None)  # which another test module may have set for a cluster of its own

    def do(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, folder: Path, *words: str) -> str:
        """The number of a job that runs `bench run WORDS` on both nodes and writes to FOLDER/NUMBER.out."""
        allocation = ("--nodes=2", "--cpus-per-task=1", f"--output={folder}/%j.out")
        return self.do("sbatch", "--parsable", *allocation, str(SCRIPT), *words)

    def states(self) -> list[str]:
        return self.do("squeue", "--noheader", "--format=%T").split()

    def wait(self) -> None:
        """Until no job is left and none of its processes is."""
        wait_for(lambda: not self.states() and not self.processes(), within=120)

    def processes(self) -> list[int]:
        return [pid for pid in marked(self.environment["BENCH_TEST_MARK"]) if not is_of_slurm(pid)]


def is_of_slurm(pid: int) -> bool:
    try:
        return psutil.Process(pid).name().startswith(("slurm", "munged"))
    except psutil.Error:
        return True


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    key, configuration = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration.write_text(CONFIGURATION.format(folder=folder, user=getpass.getuser(), ports=free_ports(3)))
    munge = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    cluster = Slurm(folder)
    with ExitStack() as stack:

        def start(*words: str) -> None:
            log = stack.enter_context((folder / f"{words[0]}.log").open("ab"))
            daemon = subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=log)
            stack.callback(daemon.wait, 20)
            stack.callback(daemon.terminate)

        start("munged", "--foreground", "--force", *(f"--{name}={folder}/munge.{end}" for name, end in munge.items()))
        start("slurmctld", "-D", "-c", "-f", str(configuration))
        for node in ("one", "two"):
            start("slurmd", "-D", "-f", str(configuration), "-N", node)
        wait_for(lambda: ready(cluster))
        yield cluster
        cluster.do("scancel", "--user", getpass.getuser())
        cluster.wait()


def ready(cluster: Slurm) -> bool:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    said = subprocess.run(words, env=cluster.environment, capture_output=True, text=True).stdout
    return said.split() == ["idle", "idle"]


def records(store: Path, suite: Path) -> list[dict[str, Any]]:
    """What of the records that the allocation left in the store may not depend on where they were made."""
    report = whole_runs.run(store, str(suite), "--cpus", "1")
    assert set(report["jobs"]) == {"hit"}
    return whole_runs.unplaced(report)


def test_a_suite_gives_the_same_records_on_two_nodes_of_an_allocation_as_here(
    slurm: Slurm, suite: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    number = slurm.submit(tmp_path, str(suite), "--store", str(store))
    slurm.wait()
    said = (tmp_path / f"{number}.out").read_text()
    assert "0 failed" in said, said
    assert most_at_once(store) == 2  # with a processor on each node
    assert records(store, suite) == whole_runs.unplaced(undisturbed[1])
    token = Path(slurm.environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text().strip() not in said


def most_at_once(store: Path) -> int:
    """The most jobs that ran at one time, by the events of the only run."""
    (path,) = store.glob("runs/*/events.jsonl")
    running, most = 0, 0
    for event in map(json.loads, path.read_text().splitlines()):
        running += {"started": 1, "finished": -1}.get(event["event"], 0)
        most = max(most, running)
    return most


@pytest.mark.parametrize("end", [(), ("--signal=INT", "--batch")], ids=["cancelled", "its time is nearly up"])
def test_an_allocation_that_ends_early_loses_nothing(
    slurm: Slurm, suite: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, end: tuple[str, ...]
) -> None:
    store = Store(tmp_path / "store")
    words = (str(suite), "--store", str(store.root))
    first = slurm.submit(tmp_path, *words)
    wait_for(lambda: [*store.root.glob(MANIFESTS)], within=120)
    slurm.do("scancel", *end, first)
    slurm.wait()
    made = len([*store.root.glob(MANIFESTS)])
    assert store.verify_all() == {}
    second = slurm.submit(tmp_path, *words)
    slurm.wait()
    assert "0 failed" in (said := (tmp_path / f"{second}.out").read_text()), said
    assert f"jobs: {made} in the store" in said
    assert records(store.root, suite) == whole_runs.unplaced(undisturbed[1])
