"""How large a recorded call is, and which key head each of its query heads reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from einops import repeat
from torch import Tensor

from ..attention.kernel_call import FIELD_SPECS, FieldSpec
from ..errors import FieldNotCaptured
from ..statistics.received import Received
from .fields import Derived, Field, Later, shape_of

# Vectors first, as they are smaller, and what tells for sure before what may be the same for all.
_TELLING = sorted(FIELD_SPECS.items(), key=lambda item: (item[1].broadcast, not item[1].is_vectors))


class KeptCall(Protocol):
    """What is asked of a :class:`~hookattn.calls.call.Call` here. A Call asks this module how large it is, so that the
    module must not ask for the class."""

    fields: dict[str, Field]
    heads: tuple[int, ...] | None
    kv_heads: tuple[int, ...] | None
    queries: tuple[int, ...] | None
    of_queries: int | None
    keys: int | None


class Extents(NamedTuple):
    """The extents of a call as it was kept; None: nothing that was kept tells.

    Attributes:
        b: batch entries.
        h: query heads that were kept.
        g: key heads that were kept.
        t: query rows that were kept.
        s: keys.
        d: width of a query and of a key.
        e: width of a value.
    """

    b: int | None
    h: int | None
    g: int | None
    t: int | None
    s: int | None
    d: int | None
    e: int | None

    def known(self, letters: str = "BHGTSDE") -> dict[str, int]:
        """Letter → extent, of those that are known, in the order of ``letters``."""
        return {x: n for x in letters if (n := getattr(self, x.lower())) is not None}


def extents_of(call: KeptCall, letters: str = "BHGTSDE") -> Extents:
    """The extents of a call, from whatever was kept of it. What is in a file is not read for it.

    Args:
        call: the call.
        letters: those that are asked for: a field that would have to be derived is derived for these alone.
    """
    found: dict[str, int] = {}
    if call.heads is not None:
        found["H"] = len(call.heads)
    if call.queries is not None:
        found["T"] = len(call.queries)
    if call.keys is not None:
        found["S"] = call.keys
    # What is here or in a file says its shape for nothing; making what is not costs as much as reading it.
    for later in (False, True):
        for name, spec in _fields(call):
            value = call.fields[name]
            # What it would be derived of was kept, and tells as much.
            if value is None or isinstance(value, Derived) or isinstance(value, Later) is not later:
                continue
            if later and not any(x in spec.axes and x not in found for x in letters):
                continue
            try:
                shape = shape_of(value)
            except FieldNotCaptured:  # it was given up as the traced block raised
                continue
            axes = spec.axes if len(shape) >= len(spec.axes) else spec.axes[len(spec.axes) - len(shape) :]
            if spec.is_column and len(shape) == 1:
                axes = "H"
            for letter, n in zip(axes, shape, strict=False):
                # An axis of size 1 may be there by broadcasting, and then says nothing.
                if letter != "1" and (n > 1 or not spec.broadcast):
                    found[letter] = max(n, found.get(letter, 0)) if letter == "B" else found.get(letter, n)
    return Extents(*(found.get(x) for x in "BHGTSDE"))


def _fields(call: KeptCall) -> Iterator[tuple[str, FieldSpec]]:
    """Each field that was kept, vectors first, as they are smaller, and what tells for sure before the others."""
    for name, spec in _TELLING:
        if name in call.fields:
            yield name, spec
    for name in call.fields:
        if name not in FIELD_SPECS:  # a statistic: some have a further axis of their own
            yield name, FieldSpec(name, "BHS" if name == Received.name else "BHT")


def kernel_queries(call: KeptCall) -> int | None:
    """How many query rows the kernel had, of which some or all were kept; None: nothing that was kept tells."""
    return extents_of(call, "T").t if call.queries is None else call.of_queries


def key_heads(call: KeptCall, h: int, g: int) -> list[int]:
    """H: for each query head that was kept the index in ``k`` and ``v`` of the head that it reads.

    Args:
        call: the call.
        h, g: H and G.
    """
    return [i // (h // g) for i in range(h)] if call.kv_heads is None else list(call.kv_heads)


def per_query_head(call: KeptCall, x: Tensor, h: int) -> Tensor:
    """``k`` or ``v`` of each query head: B G S D -> B H S D."""
    if call.kv_heads is None:
        return repeat(x, "b g s d -> b (g group) s d", group=h // x.shape[1])
    return x[:, list(call.kv_heads)]


def evenly_grouped(call: KeptCall, x: Tensor) -> Tensor:
    """``k`` or ``v`` so that query head h reads head h // (H / G): as it is, or with one for each query head."""
    return x if call.kv_heads is None else x[:, list(call.kv_heads)]
