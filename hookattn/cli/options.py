"""Values of options: lists of numbers, slices, dtypes."""

from __future__ import annotations

from typing import Any

import click
import torch

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class Ints(click.ParamType):
    """``0,-1,3`` as a list of ints."""

    name = "int,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse it."""
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r}: expected integers with commas between them, such as 0,-1.", param, ctx)


class Positions(click.ParamType):
    """``-1``, ``0,3`` or a slice such as ``-8:`` or ``0:64:2``."""

    name = "int,...|a:b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int] | slice:
        """Parse it."""
        if isinstance(value, (list, slice)):
            return value
        text = str(value)
        try:
            if ":" not in text:
                return [int(part) for part in text.split(",")]
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3 or (len(parts) == 3 and parts[2] == 0):
                raise ValueError
            return slice(*parts)
        except ValueError:
            self.fail(f"{value!r}: expected positions such as 5 or 0,3,-1, or a slice such as -8: or 0:64.", param, ctx)


class Fields(click.ParamType):
    """``q,k,weights`` as a tuple of field names."""

    name = "field,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse it."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))
