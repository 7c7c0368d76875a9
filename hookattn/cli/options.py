"""Values of options: lists of numbers, slices, field names, dtypes."""

from __future__ import annotations

import click
import torch

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def ints(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """``0,-1,3`` as a list of ints."""
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected integers with commas between them, such as 0,-1.") from None


def positions(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | slice | None:
    """``-1``, ``0,3``, or a slice such as ``-8:`` or ``0:64:2``."""
    if value is None or ":" not in value:
        return ints(ctx, param, value)
    try:
        parts = [int(part) if part.strip() else None for part in value.split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3) or parts[2:] == [0]:
        raise click.BadParameter(f"{value!r}: expected positions such as 0,3,-1, or a slice such as -8: or 0:64.")
    return slice(*parts)


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``q,k,weights`` as a tuple."""
    return None if value is None else tuple(part.strip() for part in value.split(","))


def pairs(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str] | None:
    """``blocks.0.attn=BTHD``, several times, as a mapping; ``=BTHD`` is for the model itself. None: none was given."""
    made = {}
    for text in value:
        path, parted, letters = text.rpartition("=")
        if not parted or not letters:
            raise click.BadParameter(f"{text!r}: expected PATH=AXES, such as blocks.0.attn=BTHD.")
        made[path.strip()] = letters.strip()
    return made or None
