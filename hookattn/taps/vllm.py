"""vLLM's own attention kernels: ``cpu_attention_with_kv_cache`` of its CPU backend, and ``unified_attention``, which is
written in Triton. flash_attn.py reads the functions of flash-attn that vLLM brings along.

All are given the queries of several requests laid end to end. The keys and values of these requests lie in pages of a
cache, so that a step of decoding has all of them there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..attention.kernel_call import KernelCall
from ..torch_internals.code_patching import Patch
from .base import Tap
from .packed_kernels import (
    Kernel,
    Reading,
    Sequences,
    UnreadableError,
    add_masks,
    check_plain,
    find,
    lay_out,
    paged_as_batch,
    pages_of,
    recorded,
    running_layer,
)

_NAME = "vllm"
_OPS, _TRITON = "vllm._custom_ops", "vllm.v1.attention.ops.triton_unified_attention"
_CPU_KNOWN = frozenset(
    {
        "alibi_slopes",
        "block_table",
        "causal",
        "key_cache",
        "output",
        "query",
        "query_start_loc",
        "s_aux",
        "scale",
        "scheduler_metadata",
        "seq_lens",
        "sliding_window",
        "softcap",
        "value_cache",
    }
)
_TRITON_KNOWN = frozenset(
    {
        "alibi_slopes",
        "block_table",
        "causal",
        "cu_seqlens_q",
        "k",
        "k_descale",
        "max_seqlen_k",
        "max_seqlen_q",
        "num_par_softmax_segments",
        "out",
        "q",
        "q_descale",
        "seq_threshold_3D",
        "seqused_k",
        "sinks",
        "softcap",
        "softmax_scale",
        "softmax_segm_expsum",
        "softmax_segm_max",
        "softmax_segm_output",
        "use_td",
        "v",
        "v_descale",
        "window_size",
    }
)


@dataclass(frozen=True)
class _Pages:
    """How the CPU kernel stores a page of one head; b: sequences, p: their pages, g: heads, n: tokens, d: of a head.

    Attributes:
        keys, values: patterns of einops; no, ni, do and di are tiles and places in a tile.
        dtypes: for which vLLM was seen to write pages like this.
        key_tile, value_tile: how many places a tile has, by name.
    """

    keys: str
    values: str
    dtypes: frozenset[torch.dtype]
    key_tile: dict[str, int] = field(default_factory=dict)
    value_tile: dict[str, int] = field(default_factory=dict)


_PLAIN = _Pages(
    "b p g (d n) -> b (p n) g d",
    "b p g (n d) -> b (p n) g d",
    frozenset({torch.float32, torch.bfloat16, torch.float16}),
)
_PAGES = {
    "vec": _PLAIN,
    "vec16": _PLAIN,
    "amx": _Pages(
        "b p g (no do ni di) -> b (p no ni) g (do di)",
        "b p g (do no di ni) -> b (p no ni) g (do di)",
        frozenset({torch.bfloat16}),
        {"ni": 16, "di": 2},
        {"ni": 2, "di": 16},
    ),
}
"""By the instruction set that the layer has chosen its kernel for (``layer.isa``)."""


def sizes_of(tile: dict[str, int], width: int) -> dict[str, int]:
    """What a pattern of :class:`_Pages` cannot know: how wide a head is, counted in tiles where there are some."""
    return {**tile, "do": width // tile["di"]} if tile else {"d": width}


def read_cpu(given: dict[str, Any], out: Tensor | None) -> Reading:
    """``cpu_attention_with_kv_cache``.

    Args:
        given: query: N H D; key_cache, value_cache: pages, G, tokens of a page, D, of which the last two say how many
            numbers a page has for each head, and not where they are.
        out: N H D; None: it has not run yet.
    """
    key_pool, value_pool, layer = given["key_cache"], given["value_cache"], running_layer.get()
    isa = getattr(layer, "isa", None)
    pages = _PAGES.get(str(isa))
    if pages is None or key_pool.dtype not in pages.dtypes:
        of = "outside a layer of vLLM" if layer is None else f"for the instruction set {isa!r} in {key_pool.dtype}"
        raise UnreadableError(f"how it lays out its cache {of} is not known")
    batch = _Batch.of(given["query"], given["query_start_loc"], given["seq_lens"], given["block_table"])
    size, width = key_pool.shape[-2:]
    k, v = (
        rearrange(
            pages_of(pool, batch.table, size, batch.longest).flatten(-2),
            pattern,
            **sizes_of(tile, width),
        )
        for pool, pattern, tile in (
            (key_pool, pages.keys, pages.key_tile),
            (value_pool, pages.values, pages.value_tile),
        )
    )
    last, causal = int(given["sliding_window"]), bool(given["causal"])
    # A window of n keys has the query's own among them; one that is not causal has as many on its other side.
    window = (last - 1, 0 if causal else last - 1) if last > 0 else (-1, 0 if causal else -1)
    return batch.reading(given, "query", k, v, out, given["scale"], window, given["s_aux"], from_query=True)


def read_triton(given: dict[str, Any], out: Tensor | None) -> Reading:
    """``unified_attention``.

    Args:
        given: q: N H D; k, v: pages, tokens of a page, G, D.
        out: N H D; None: it has not run yet.
    """
    check_plain(given)
    if isinstance(given["causal"], Tensor):
        raise UnreadableError("its argument causal differs from sequence to sequence")
    batch = _Batch.of(given["q"], given["cu_seqlens_q"], given["seqused_k"], given["block_table"])
    k, v = (paged_as_batch(given[name], batch.table, batch.longest) for name in "kv")
    left, causal = int(given["window_size"][0]), bool(given["causal"])
    # It looks at the left end alone, and takes it for both where it is not causal.
    window = (left, 0 if causal else left)
    return batch.reading(given, "q", k, v, out, given["softmax_scale"], window, given.get("sinks"), from_query=False)


@dataclass(frozen=True)
class _Batch:
    """The sequences of a call that are recorded, and where their keys are.

    Attributes:
        queries: their queries, among all tokens.
        lengths: how many keys each has.
        table: their rows of the table of pages.
        requests: whose they are; None: nobody has said.
    """

    queries: Sequences
    lengths: tuple[int, ...]
    table: Tensor
    requests: tuple[str, ...] | None

    @classmethod
    def of(cls, q: Tensor, ends: Tensor, used: Tensor, table: Tensor) -> _Batch:
        queries, lengths = Sequences.of(q, ends), [int(n) for n in used.tolist()]
        if len(lengths) != len(queries.lengths):
            raise UnreadableError(f"{len(queries.lengths)} sequences of queries and {len(lengths)} of keys")
        entries, requests = recorded(queries)
        if entries is None:
            return cls(queries, tuple(lengths), table, requests)
        return cls(queries.take(entries), tuple(lengths[i] for i in entries), table[list(entries)], requests)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def reading(
        self,
        given: dict[str, Any],
        queries: str,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        scale: float,
        window: tuple[int, int],
        sinks: Tensor | None,
        from_query: bool,
    ) -> Reading:
        """The call, of which q and the output alone can be exchanged: the keys are the model's cache.

        Args:
            given: the arguments.
            queries: the name of the one that has the queries.
            k, v: B L G D, behind whose own keys may be anything.
            out: N H D.
            scale, window, sinks: as in :class:`~hookattn.attention.kernel_call.KernelCall`, window as (left, right).
            from_query: whether ALiBi is slope times the distance from a query to a key, and not from the first query of
                a sequence. The rows of one differ from those of the other by a constant, which a sink does not have.
        """
        room = k.shape[1]
        keys = Sequences(tuple(i * room for i in range(len(self.lengths))), self.lengths)
        call = lay_out(given[queries], k, v, out, self.queries, keys, scale, _NAME)
        call.softcap, call.sinks, call.requests = float(given["softcap"] or 0) or None, sinks, self.requests
        add_masks(call, self.queries, keys, window)
        slopes: Tensor | None = given["alibi_slopes"]
        if slopes is not None:
            call.bias = slopes.float().view(1, -1, 1, 1) * self._ahead(call, from_query)
        return Reading(call, self.queries.back, {"q": (queries, self.queries.back)})

    def _ahead(self, call: KernelCall, from_query: bool) -> Tensor:
        """B 1 T S, or B 1 1 S: how far each key stands ahead of its query, or of the first query of its sequence."""
        device, (_, _, t, s) = call.device, call.shape
        offsets = [s - t for s, t in zip(self.lengths, self.queries.lengths, strict=True)]
        at = torch.arange(s, device=device) - torch.tensor(offsets, device=device).view(-1, 1, 1, 1)
        return at - torch.arange(t, device=device).view(-1, 1) if from_query else at


CPU_KERNELS = {"cpu_attention_with_kv_cache": Kernel(read_cpu, _CPU_KNOWN, place="output")}
TRITON_KERNELS = {"unified_attention": Kernel(read_triton, _TRITON_KNOWN)}


def patches() -> Iterable[Patch]:
    """Those of the modules of vLLM that are loaded."""
    yield from find([sys.modules.get(_OPS)], CPU_KERNELS)
    yield from find([sys.modules.get(_TRITON)], TRITON_KERNELS)


TAP = Tap(_NAME, patches=patches)
