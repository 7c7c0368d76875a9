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
@click.option("--out", default="out", show_default=True, type=click.Path(), help="Directory for the two trace files.")
@click.pass_obj
def demo(screen: Screen, out: str) -> None:
    """Trace two real trained models, offline: a sentence encoder and a small causal model that has learned to copy.

    Prints every call with its certificate, finds the heads that do the copying, saves both traces and reads them back.
    """
    from ..demo.run import run

    report = run(out, screen.out, screen.working)
    if screen.as_json:
        screen.json(report)
