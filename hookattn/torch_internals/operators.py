"""What ``torch.ops`` gives: operators and their overloads, as graphs that were exported call them.

An overload is no function of torch: its ``__name__`` has the overload in it (``softmax.int``), and another library's
operator may have the name of one of torch's. What an operator is called in full is said by attributes with an
underscore alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .private import private

_PIECE = "names of operators"
_OVERLOAD: Any = private("torch._ops", "OpOverload", _PIECE)
_PACKET: Any = private("torch._ops", "OpOverloadPacket", _PIECE)
_HIGHER_ORDER: Any = private("torch._ops", "HigherOrderOperator", _PIECE)


def operator_name(func: Any) -> tuple[str, str] | None:
    """Library and name of an operator, its overload left out: ``("aten", "softmax")``; None: it is none of these."""
    if isinstance(func, _OVERLOAD):
        full: str = func._schema.name
    elif isinstance(func, _PACKET):
        full = func._qualified_op_name
    elif isinstance(func, _HIGHER_ORDER):
        return "higher_order", func.__name__
    else:
        return None
    library, _, name = full.partition("::")
    return library, name


@functools.cache
def argument_defaults(name: str) -> dict[str, Any]:
    """The arguments of one of torch's own operators in order, each with its default (None where it has none)."""
    schema = getattr(torch.ops.aten, name).default._schema
    return {a.name: a.default_value for a in schema.arguments}
