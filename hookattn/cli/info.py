"""``hookattn info``."""

from __future__ import annotations

import click

from ..console.screen import Screen
from ..console.tables import print_calls, print_head, print_verdict, trace_as_json
from ..traces import load
from .command import Command


@click.command(
    cls=Command,
    short_help="Show what is in a trace file.",
    examples=(
        "hookattn info run.safetensors",
        "hookattn info run.safetensors --every-call",
        "hookattn info run.safetensors --json | jq '.calls[].certificate.output_error'",
    ),
)
@click.argument("file", type=click.Path())
@click.option("--every-call", is_flag=True, help="A row for each call, not one for each site over all steps.")
@click.pass_obj
def info(screen: Screen, file: str, every_call: bool) -> None:
    """Show what is in a trace FILE: its calls with their certificates, what was skipped, tokens, versions, sizes."""
    trace = load(file)
    data = trace_as_json(trace)
    if screen.as_json:
        screen.json(data)
        return
    print_head(screen.out, data)
    print_calls(screen.out, trace.calls, every_call)
    print_verdict(screen.out, trace)
