"""``hookattn adapters``."""

from __future__ import annotations

import click
from rich import box
from rich.table import Table
from rich.text import Text

from ..console.screen import Screen, plain
from ..models.registry import adapters as installed
from .command import Command


@click.command(cls=Command, short_help="List the adapters.", examples=("hookattn adapters", "hookattn adapters --json"))
@click.pass_obj
def adapters(screen: Screen) -> None:
    """List the adapters: who brought them, which Python modules they cover, which classes are attention.

    A model needs no adapter to be traced; one gives its attention sites their right names and makes tracing cheaper.
    """
    found = installed()
    if screen.as_json:
        screen.json([{**adapter.describe(), "distribution": source} for adapter, source in found.values()])
        return
    if not found:
        screen.out.print("No adapters: every model is traced by watching what it runs.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "distribution", "covers", "attention classes"):
        table.add_column(name, overflow="fold")
    for adapter, source in found.values():
        covers = Text("\n").join(map(plain, adapter.covers))
        classes = Text("\n").join(plain(f"{name} ({kind})") for name, kind in adapter.attention.items())
        table.add_row(plain(adapter.name, "bold"), plain(str(source)), covers, classes)
    screen.out.print(table)
