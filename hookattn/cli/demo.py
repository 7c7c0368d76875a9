"""``hookattn demo``."""

from __future__ import annotations

import click

from ..console.screen import Screen
from .command import Command


@click.command(
    cls=Command,
    short_help="Trace two real trained models, offline.",
    examples=("hookattn demo", "hookattn demo --out /tmp/out", "hookattn demo --json"),
)
@click.option(
    "--out", default="out", show_default=True, type=click.Path(), help="Directory for the trace files and the page."
)
@click.pass_obj
def demo(screen: Screen, out: str) -> None:
    """Trace two real trained models, offline: a sentence encoder and a small causal model that has learned to copy.

    Prints every call with its certificate, finds the heads that do the copying, saves both traces and reads them back.
    Then takes out the head that the copying rests on, and writes a page with both runs side by side.
    """
    from ..demo.run import run

    report = run(out, screen.out, screen.working)
    if screen.as_json:
        screen.json(report)
