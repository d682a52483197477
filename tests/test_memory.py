"""The memory that a process may use, in containers that are made of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.cli import doctor
from harness.diffusion import memory, networks
from harness.diffusion.model_files import CheckpointError, ModelFiles
from harness.engine.local import most_memory
from harness.testing import tiny

TOTAL, FREE = 16 * 2**30, 12 * 2**30  # of the machine
GIB = 2**30
V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """container(member, files): what /proc/self/cgroup says, and the files below /sys/fs/cgroup."""

    def make(member: str, files: Mapping[str, object]) -> None:
        root = tmp_path / "groups"
        root.mkdir()
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{content}\n")
        (tmp_path / "member").write_text(member)
        monkeypatch.setattr(memory, "MOUNTED", root)
        monkeypatch.setattr(memory, "MEMBER", tmp_path / "member")
        machine = SimpleNamespace(total=TOTAL, available=FREE)
        monkeypatch.setattr("psutil.virtual_memory", lambda: machine)

    return make


V1 = "12:cpu,cpuacct:/\n4:memory:{}\n1:name=systemd:/\n0::/\n"
USED = {"used": 3 * GIB, "pages": GIB}  # of them, pages that can be dropped


def second(folder: str, limit: object) -> dict[str, object]:
    """The files of a group of version 2."""
    stat = f"anon 5\ninactive_file {USED['pages']}\nactive_file 7"
    files = {"memory.max": limit, "memory.current": USED["used"], "memory.stat": stat}
    return {f"{folder}{name}": content for name, content in files.items()}


def first(folder: str, limit: object) -> dict[str, object]:
    """The files of a group of version 1, whose own pages are fewer than those with the groups below it."""
    stat = f"inactive_file 0\ntotal_inactive_file {USED['pages']}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": USED["used"], "memory.stat": stat}
    return {f"memory/{folder}{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    ("member", "files", "limit"),
    [
        pytest.param("0::/\n", second("", 4 * GIB), 4 * GIB, id="a container sees its own group as the root"),
        pytest.param("0::/a/b\n", second("a/b/", 4 * GIB), 4 * GIB, id="a group"),
        pytest.param("0::/a/b\n", second("a/", 4 * GIB) | second("a/b/", "max"), 4 * GIB, id="a group around it"),
        pytest.param("0::/a\n", second("a/", 8 * GIB) | second("", 4 * GIB), 4 * GIB, id="the smallest"),
        pytest.param("0::/a b/c:d\n", second("a b/c:d/", 4 * GIB), 4 * GIB, id="a blank and a colon in its name"),
        pytest.param("0::/../x\n", second("", 4 * GIB), 4 * GIB, id="a group outside of the namespace"),
        pytest.param("0::/a\n", second("unified/a/", 4 * GIB), 4 * GIB, id="version 2 beside version 1"),
        pytest.param(V1.format("/docker/x"), first("docker/x/", 4 * GIB), 4 * GIB, id="version 1"),
        pytest.param(V1.format("/docker/x"), first("", 4 * GIB), 4 * GIB, id="version 1 by its name outside"),
        pytest.param("0::/other\n", second("a/", 4 * GIB), None, id="a group of others"),
        pytest.param("0::/\n", second("", "max"), None, id="no limit"),
        pytest.param("0::/\n", second("", 10**6 * GIB), None, id="more than the machine has"),
        pytest.param(V1.format("/"), first("", V1_UNLIMITED), None, id="no limit in version 1"),
        pytest.param("0::/\n", second("", "what"), None, id="no number"),
        pytest.param("nonsense\n\n::\n", {}, None, id="no groups"),
    ],
)
def test_the_limit_of_a_container_counts(
    member: str, files: Mapping[str, object], limit: int | None, container, monkeypatch: pytest.MonkeyPatch
) -> None:
    container(member, files)
    assert memory.total() == (limit or TOTAL) and memory.limited() is (limit is not None)
    assert memory.available() == (FREE if limit is None else limit - 2 * GIB)


def test_a_system_without_groups_has_its_own_memory(container, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    container("", {})
    monkeypatch.setattr(memory, "MEMBER", tmp_path / "nothing")
    assert (memory.total(), memory.available(), memory.limited()) == (TOTAL, FREE, False)


def test_a_limit_that_is_used_up_leaves_nothing(container) -> None:
    container("0::/\n", {"memory.max": GIB, "memory.current": 2 * GIB})
    assert memory.available() == 0


def test_whoever_asks_for_memory_gets_that_of_the_container(container, tmp_path: Path) -> None:
    container("0::/\n", second("", 4 * GIB))
    assert most_memory() == int(0.9 * 4 * GIB)
    (told,) = [check.says for check in doctor._hardware() if check.name == "memory"]
    assert told == "2.0 of 4.0 GiB free; a control group (container) limits it"


def test_weights_above_the_limit_of_the_container_are_refused(container, tmp_path: Path) -> None:
    tiny.model("noise").denoiser.save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    container("0::/\n", {"memory.max": 10**4})
    with pytest.raises(CheckpointError, match=r"its weights take .* GB in fp32, and .* GB of memory are here"):
        networks.load(ModelFiles(tmp_path), "unet", "UNet2DModel")
