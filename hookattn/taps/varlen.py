"""``torch.nn.attention.varlen``: torch's own attention over packed sequences."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..torch_internals.code_patching import Patch
from .base import Tap
from .packed_kernels import Kernel, Reading, Sequences, add_masks, find, lay_out, paged_as_batch, window_of

_MODULE = "torch.nn.attention.varlen"
_KNOWN = frozenset(
    {
        "block_table",
        "cu_seq_k",
        "cu_seq_q",
        "enable_gqa",
        "is_causal",
        "key",
        "max_k",
        "max_q",
        "num_splits",
        "out",
        "query",
        "return_aux",
        "scale",
        "seqused_k",
        "value",
        "window_size",
    }
)


def read(given: dict[str, Any], out: Tensor | None) -> Reading:
    """One call of the kernel in the contract's layout.

    Args:
        given: query: N H D; key, value: N G D, or pages of a cache with ``block_table``.
        out: N H D; None: it has not run yet.
    """
    q, k, v, ends = given["query"], given["key"], given["value"], given["cu_seq_k"]
    table, used = given.get("block_table"), given.get("seqused_k")
    paged = table is not None
    if table is not None:
        longest = table.shape[1] * k.shape[1] if used is None else int(used.max())
        k, v, ends = paged_as_batch(k, table, longest), paged_as_batch(v, table, longest), None
    queries, keys = Sequences.of(q, given["cu_seq_q"]), Sequences.of(k, ends, used)
    call = lay_out(q, k, v, out, queries, keys, given.get("scale"), "varlen_attn")
    add_masks(call, queries, keys, window_of(given.get("window_size"), bool(given.get("is_causal"))))
    ways = {"q": ("query", queries.back)}
    if not paged:  # what is in pages is the model's cache
        ways |= {"k": ("key", keys.back), "v": ("value", keys.back)}
    return Reading(call, queries.back, ways)


KERNELS = {"varlen_attn": Kernel(read, _KNOWN), "varlen_attn_out": Kernel(read, _KNOWN)}


def patches() -> Iterable[Patch]:
    """The functions, where this version of torch has them and something has imported them."""
    return find([sys.modules.get(_MODULE)], KERNELS)


TAP = Tap("varlen_attn", patches=patches)
