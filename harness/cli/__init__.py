"""The `bench` command: one file per noun, imported when it is called. Exit codes are in `Exit`."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any

import click

from harness.cli import streams
from harness.registry import RegistryError, did_you_mean
from harness.runs.printable import printable

LONGEST_LINE, START_OF_LINE, END_OF_LINE = 2000, 1200, 400  # characters of an error


class Exit(IntEnum):
    ok = 0
    failed = 1  # some cells failed
    usage = 2
    plugin = 3
    missing = 4  # a prerequisite: weights, a readable checkpoint, a writable store
    mismatch = 5  # verification found other numbers
    undecided = 6  # nothing to judge a model by
    bug = 70  # an error that nobody expected
    interrupted = 130


COMMANDS = {
    "run": "harness.cli.run:run",
    "plan": "harness.cli.run:plan",
    "rehearse": "harness.cli.rehearse:rehearse",
    "status": "harness.cli.status:status",
    "logs": "harness.cli.status:logs",
    "retry": "harness.cli.status:retry",
    "report": "harness.cli.report:report",
    "compare": "harness.cli.compare:compare",
    "reproduce": "harness.cli.reproduce:reproduce",
    "analyse": "harness.cli.analyse:analyse",
    "leaderboard": "harness.cli.leaderboard:leaderboard",
    "list": "harness.cli.plugins:list_",
    "show": "harness.cli.plugins:show",
    "plugins": "harness.cli.plugins:plugins",
    "plugin": "harness.cli.plugin:plugin",
    "scan": "harness.cli.scan:scan",
    "schema": "harness.cli.schema:schema",
    "purify": "harness.cli.purify:purify",
    "calibrate": "harness.cli.calibrate:calibrate",
    "build": "harness.cli.build:build",
    "export": "harness.cli.export:export",
    "store": "harness.cli.store:store",
    "doctor": "harness.cli.doctor:doctor",
}
EXITS = (  # errors of modules that are not imported here
    ("harness.diffusion.model_files", "CheckpointError", Exit.missing),
    ("harness.runs.store", "StoreError", Exit.missing),
    ("harness.engine.driver", "Interrupted", Exit.interrupted),
    ("harness.engine.ray", "ClusterError", Exit.missing),
    ("leaderboard.results", "NoResultsError", Exit.missing),
    ("leaderboard.results", "ResultsError", Exit.usage),
)


class LazyGroup(click.Group):
    """Imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # not of stdout or stderr; click would end with 1, without a word
            raise ConnectionError("the connection to another process broke; run the same command again") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(
                f"no command '{args[0]}'{did_you_mean(args[0], COMMANDS)} bench --help lists what there is"
            )
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="diffusion-defense-bench", prog_name="bench")
def bench() -> None:
    """Any backdoor defense for diffusion models against any backdoor attack, on equal terms.

    `bench run` computes the default suite and prints its leaderboard; run again, it resumes.
    """


def main() -> None:
    """Entry point of the console script. A bug shows its traceback and has its own exit code."""
    if sys.platform == "win32":  # processes, locks and limits are POSIX's
        sys.exit("bench: Windows is not supported; use Linux, or the Windows Subsystem for Linux")
    streams.install()
    try:
        code = call(sys.argv[1:])
    except Exception as error:
        traceback.print_exc()
        code = exit_code_of(error)
        if code is None:
            command = shlex.join(["bench", *sys.argv[1:]])
            click.echo(
                f"bench: this is a bug; please report it with the lines above and the command: {command}", err=True
            )
            code = Exit.bug
    _end(_told(code))


def _told(code: int) -> int:
    """The exit code of work that ended with `code`, where what it printed may not have arrived."""
    reason = streams.full(sys.stdout)
    if reason is None:
        return code
    click.echo(f"bench: stdout: {reason}; the work is done, but not all of its output was written", err=True)
    return code or Exit.missing


def _end(code: int) -> None:
    """End the process with `code`, also where a thread that a plugin has started would keep it."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def call(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code. A mistake of the user is one line on stderr; a bug is raised."""
    try:
        result = bench.main(list(arguments) or ["--help"], prog_name="bench", standalone_mode=False)
        return int(result) if isinstance(result, int) else Exit.ok
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; run the same command again to resume", err=True)
        return Exit.interrupted
    except Exception as error:
        code = exit_code_of(error)
        if code is None or os.environ.get("BENCH_DEBUG") == "1":
            raise
        with suppress(OSError):
            click.echo(f"bench: {line_of(error)}", err=True)
        return code


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error that is not a bug of this program; None for a bug."""
    if isinstance(error, RegistryError):
        return error.exit_code
    if isinstance(error, click.ClickException):
        return Exit.usage
    for module, cls, code in EXITS:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], cls)):
            return code
    return Exit.missing if isinstance(error, OSError) else None


def line_of(error: Exception) -> str:
    """What an error says to the user, on one line. Where one quotes a file at length, the middle is left out."""
    says = error.format_message() if isinstance(error, click.ClickException) else str(error)
    where = getattr(error, "ctx", None)
    hint = f" ({where.command_path} --help)" if where is not None else ""
    line = printable(" ".join(says.split()))
    return (line if len(line) <= LONGEST_LINE else f"{line[:START_OF_LINE]} … {line[-END_OF_LINE:]}") + hint
