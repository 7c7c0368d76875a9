"""How the demo prints weights and heads, in a terminal with colours and in a file without."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .heads import Head

_SHADES = " ░▒▓█"
_DARK = (33, 102, 172)


def shaded(weight: float, colours: bool) -> Text:
    """One weight, five characters wide: on a ground as dark as it is large, or before a shade character."""
    number = f"{weight:.2f}".removeprefix("0") if weight < 0.995 else "1.0"
    number = number if weight >= 0.005 else "·"
    if not colours:
        return Text(f"{number:>4}{_SHADES[min(4, round(weight * 4 + 0.25))]}")
    ground = tuple(round(255 + (d - 255) * weight) for d in _DARK)
    ink = "#ffffff" if weight > 0.5 else "#202020"
    return Text(f"{number:>4} ", f"{ink} on #{ground[0]:02x}{ground[1]:02x}{ground[2]:02x}")


def print_grid(out: Console, weights: Tensor, queries: Sequence[str], keys: Sequence[str]) -> None:
    """A small matrix of weights, queries down and keys across.

    Args:
        out: where to.
        weights: T S.
        queries: T tokens.
        keys: S tokens.
    """
    colours = out.color_system is not None
    width = max(map(len, queries))
    header = Text(" " * (width + 3))
    for key in keys:
        header.append(f"{key.strip('[]')[:4]:>4} ", "bold")
    out.print(header, no_wrap=True, overflow="crop")
    for token, row in zip(queries, weights.tolist(), strict=True):
        line = Text.assemble((f"{token:>{width + 2}} ", "bold"))
        for weight in row:
            line.append_text(shaded(weight, colours))
        out.print(line, no_wrap=True, overflow="crop")


def print_ranking(out: Console, heads: Sequence[Head], count: int = 4) -> None:
    """The best head and its runners-up, with bars."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for place, head in enumerate(heads[:count]):
        style = "bold" if place == 0 else "dim"
        bar = "█" * round(head.score * 30)
        grid.add_row(
            Text(f"  {head.name}", style),
            Text(f"{head.score:.3f}", style),
            Text(bar or "▏", "green" if place == 0 else "dim"),
        )
    out.print(grid)


def heading(out: Console, text: str) -> None:
    """A title with an empty line before and after it."""
    out.print(Text(f"\n{text}\n", "bold cyan"))
