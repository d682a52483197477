"""`bench doctor`: the capabilities of this machine and this installation."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click

from harness import registry
from harness.cli import Exit
from harness.cli.common import as_json, columns, echo, plugin_files, print_json, store_option
from harness.registry import OWN, PluginError

LEAST_FREE = 2 * 2**30  # bytes; the default suite leaves less than 1 GiB in the store


@dataclass(frozen=True)
class Check:
    """One line of the report. "bad" means that runs will fail, "note" that they may be slower or smaller."""

    name: str
    state: Literal["ok", "note", "bad"]
    says: str


@click.command(short_help="What this machine and installation can do.")
@store_option
@plugin_files
@as_json
def doctor(store: Path | None, files: tuple[Path, ...], as_json: bool) -> int:
    """Check Python, libraries, store, disk, processors, GPUs and plugins."""
    checks = [*_libraries(), *_store(store), *_hardware(), *_plugins(files)]
    if as_json:
        print_json(checks)
    else:
        echo(columns([(check.state, check.name, check.says) for check in checks]))
    bad = {check.name for check in checks if check.state == "bad"}
    return Exit.ok if not bad else Exit.plugin if bad == {"plugins"} else Exit.missing


def _libraries() -> Iterator[Check]:
    from packaging.requirements import Requirement

    yield Check("python", "ok" if sys.version_info >= (3, 11) else "bad", f"{platform.python_version()}, needs 3.11")
    try:
        lines = metadata.requires(OWN) or []
    except metadata.PackageNotFoundError:
        yield Check(OWN, "bad", "not installed; pip install it")
        return
    for need in map(Requirement, lines):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield Check(need.name, "bad", f"not installed, needs {need.specifier or 'any version'}")
            continue
        fits = need.specifier.contains(version, prereleases=True)
        floor = f", needs {need.specifier}" if need.specifier else ""
        yield Check(need.name, "ok" if fits else "bad", f"{version}{floor}")


def _store(root: Path | None) -> Iterator[Check]:
    from harness.runs.store import default_root

    place = (root or default_root()).expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / ".doctor"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        yield Check("store", "bad", f"{place}: {error.strerror}; name another with --store or BENCH_STORE")
        return
    yield Check("store", "ok", f"{place} is writable")
    free = shutil.disk_usage(place).free
    yield Check("disk", "ok" if free > LEAST_FREE else "note", f"{free / 2**30:.1f} GiB free")


def _hardware() -> Iterator[Check]:
    import psutil

    from harness.diffusion import memory

    flags = _cpu_flags()
    quick = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    yield Check("processors", "ok", f"{psutil.cpu_count()} with {', '.join(quick) or 'unknown features'}")
    bf16 = {"avx512_bf16", "amx_bf16"} & flags
    yield Check(
        "bf16", "ok" if bf16 else "note", "in hardware" if bf16 else "not in hardware: bf16 training is slow here"
    )
    free, there = (size / 2**30 for size in (memory.available(), memory.total()))
    limit = "; a control group (container) limits it" if memory.limited() else ""
    yield Check("memory", "ok", f"{free:.1f} of {there:.1f} GiB free{limit}")
    try:
        import torch
    except Exception as error:
        yield Check("torch", "bad", f"cannot be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Check("gpus", "note", "none; the embedded models need none")
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield Check(f"gpu {i}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")


def _cpu_flags() -> set[str]:
    """The features of the processor by their names in Linux; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _plugins(files: tuple[Path, ...]) -> Iterator[Check]:
    try:
        index = registry.load(files).index() if files else registry.index()
    except PluginError as error:
        yield Check("plugins", "bad", str(error))
        return
    yield Check("plugins", "ok" if index.entries else "bad", f"{len(index.entries)} loaded")
    for warning in index.warnings:
        yield Check("plugins", "note", str(warning))
