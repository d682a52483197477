"""`bench schema`: the form of what commands print as JSON."""

from __future__ import annotations

import click

from harness.cli.common import print_json


@click.command(short_help="Print the JSON Schema of what a command prints as JSON.")
@click.argument("command", type=click.Choice(["scan"]))
def schema(command: str) -> None:
    """Print the JSON Schema (2020-12) of what COMMAND prints as JSON."""
    from harness.scan import document

    print_json({"scan": document.schema}[command]())
