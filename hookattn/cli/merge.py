"""``hookattn merge``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from ..console.screen import Screen, counted, decimal_size, plain
from ..console.tables import print_calls, print_verdict
from ..errors import TraceWriteError
from ..traces import Trace, load, merge
from .command import Command


@click.command(
    "merge",
    cls=Command,
    short_help="Put the trace files of several ranks together.",
    examples=(
        "hookattn merge run.rank*.safetensors -o run.safetensors",
        "hookattn merge stage.rank*.safetensors --steps batches -o run.safetensors",
    ),
)
@click.argument("files", type=click.Path(), nargs=-1, required=True)
@click.option("--out", "-o", required=True, type=click.Path(), help="The file to write, which must not be there yet.")
@click.option("--steps", type=click.Choice(("batches",)), help="Steps are microbatches: put them together along B.")
@click.option("--compact", is_flag=True, help="Leave out scores and weights that can be derived.")
@click.pass_obj
def command(screen: Screen, files: tuple[str, ...], out: str, steps: str | None, compact: bool) -> None:
    """Put the trace FILES that the ranks of one sharded run have written together into one, in any order.

    The result is the trace of the whole model: all heads, query rows, batch entries and layers. Nothing is written
    where a rank is missing, or where the files are of different runs.
    """
    if os.path.lexists(out):
        raise TraceWriteError(f"{out}: there is such a file already. Give -o another name, or remove it first.")
    several = [load(file) for file in files]
    whole = merge(several, steps=steps)
    with screen.working(f"writing {out}"):
        whole.save(out, compact=compact)
    data: dict[str, Any] = {
        "file": out,
        "bytes": os.path.getsize(out),
        "calls": len(whole),
        "faithful": whole.faithful,
        "merged": [_of_rank(file, trace) for file, trace in zip(files, several, strict=True)],
        "notes": whole.notes,
    }
    if screen.as_json:
        screen.json(data)
        return
    screen.out.print(_table(data["merged"]))
    print_calls(screen.out, whole.calls, False)
    print_verdict(screen.out, whole)
    screen.out.print(f"wrote {out} ({decimal_size(data['bytes'])})", markup=False, soft_wrap=True)


def _of_rank(file: str, trace: Trace) -> dict[str, Any]:
    """What one file has put in."""
    shards = dict.fromkeys(str(shard) for call in trace.calls for shard in call.shards)
    return {
        "file": file,
        "bytes": os.path.getsize(file),
        "calls": len(trace),
        "layers": sorted({c.site.layer for c in trace.calls if c.site.layer is not None}),
        "shards": list(shards),
    }


def _table(ranks: Sequence[dict[str, Any]]) -> Table:
    made = Table(box=None, pad_edge=False)
    # A long path goes on in the next line, and not what the file has.
    made.add_column("file", overflow="fold")
    made.add_column("size", justify="right")
    made.add_column("has", no_wrap=True)
    for rank in ranks:
        shards = "; ".join(rank["shards"][:4]) + ("; …" if len(rank["shards"]) > 4 else "")
        layers = f", layers {rank['layers'][0]} to {rank['layers'][-1]}" if rank["layers"] else ""
        has = f"{counted(rank['calls'], 'call')}{layers}: {shards or 'whole attention'}"
        made.add_row(plain(rank["file"]), decimal_size(rank["bytes"]), plain(has))
    return made
