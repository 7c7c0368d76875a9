"""flash-attn 2, 3 and 4, by whatever package ships their interface: batched, packed, and with a cache.

Nothing here runs a kernel a second time (but without dropout, where there is dropout): q, k, v and every term of the
scores are read from the arguments. A function of the same name that takes an argument this file does not know is
listed as skipped as soon as that argument is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
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
    recorded,
    window_of,
)

_NAME = "flash_attn"
# The module of the functions of versions 2 and 3, wherever a package keeps it; version 4 has its own.
_INTERFACE, _CUTE = "flash_attn_interface", "flash_attn.cute.interface"
# How, not what, is computed, and what is returned beside the output; lengths are read from their cumulative sums.
_ASIDE = frozenset(
    {
        "deterministic",
        "fa_version",
        "max_seqlen",
        "max_seqlen_k",
        "max_seqlen_q",
        "num_splits",
        "out",
        "pack_gqa",
        "return_attn_probs",
        "return_lse",
        "return_softmax_lse",
        "scheduler_metadata",
        "sm_margin",
    }
)
_TERMS = frozenset(
    {
        "alibi_slopes",
        "attention_chunk",
        "causal",
        "dropout_p",
        "k_descale",
        "learnable_sink",
        "q",
        "q_descale",
        "s_aux",
        "softcap",
        "softmax_scale",
        "v_descale",
        "window_size",
    }
)
_BATCHED = _ASIDE | _TERMS | {"k", "kv", "num_heads_q", "qkv", "v"}
_PACKED = _BATCHED | {
    "block_table",
    "cu_seqlens",
    "cu_seqlens_k",
    "cu_seqlens_q",
    "page_table",
    "seqused_k",
    "seqused_q",
}
_CACHED = (
    _ASIDE
    | _TERMS
    | {
        "block_table",
        "cache_batch_idx",
        "cache_leftpad",
        "cache_seqlens",
        "cu_seqlens_q",
        "k",
        "k_cache",
        "page_table",
        "rotary_cos",
        "rotary_interleaved",
        "rotary_sin",
        "v",
        "v_cache",
    }
)


def read(given: dict[str, Any], out: Tensor | None) -> Reading:
    """``flash_attn_func``, ``flash_attn_varlen_func`` and their packed forms.

    Args:
        given: q: B T H D or N H D; k, v: B S G D or N G D, or pages of a cache; kv, qkv: stacked before the heads.
        out: B T H E or N H E; None: it has not run yet.
    """
    check_plain(given)
    parts = _parts(given)
    q, k, v = (part(given[argument]) for argument, part in parts.values())
    both = given.get("cu_seqlens")
    queries = Sequences.of(q, given.get("cu_seqlens_q") if both is None else both, given.get("seqused_q"))
    ends, used, table = given.get("cu_seqlens_k") if both is None else both, given.get("seqused_k"), _table(given)
    entries, requests, slopes = None, None, given.get("alibi_slopes")
    if table is not None:
        used, ends = ends.diff() if used is None and ends is not None else used, None
        entries, requests = recorded(queries)
        if entries is not None:
            queries, chosen = queries.take(entries), list(entries)
            table, used = table[chosen], used if used is None else used[chosen]
            slopes = slopes[chosen] if slopes is not None and slopes.dim() == 2 else slopes
        longest = table.shape[1] * k.shape[1] if used is None else int(used.max())
        k, v = paged_as_batch(k, table, longest), paged_as_batch(v, table, longest)
    keys = Sequences.of(k, ends, used)
    call = lay_out(q, k, v, out, queries, keys, given.get("softmax_scale"), _NAME)
    call = _finish(call, {**given, "alibi_slopes": slopes}, queries, keys)
    call.requests = requests
    places = {"q": queries} if table is not None else {"q": queries, "k": keys, "v": keys}  # pages: the model's cache
    return Reading(
        call, queries.back, {x: (parts[x][0], partial(place.back, part=parts[x][1])) for x, place in places.items()}
    )


def read_cached(given: dict[str, Any], out: Tensor | None) -> Reading:
    """``flash_attn_with_kvcache``. When it has run, new keys are in the cache, rotated; before, they are put beside it.

    Keys and values can't be exchanged: those of this call are the model's cache, which others will read.

    Args:
        given: q: B T H D (N H D with ``cu_seqlens_q``); k_cache, v_cache: rows of a cache, S G D each, or its pages;
            k, v: what is appended, B A G D and B A G E.
        out: B T H E or N H E; None: it has not run yet.
    """
    check_plain(given)
    q, k, v, table = given["q"], given["k_cache"], given["v_cache"], _table(given)
    queries = Sequences.of(q, given.get("cu_seqlens_q"))
    n = len(queries.lengths)
    room = k.shape[1] if table is None else table.shape[1] * k.shape[1]
    before = _integers(given.get("cache_seqlens"), n, room)
    rows = _integers(given.get("cache_batch_idx"), n, 0) if given.get("cache_batch_idx") is not None else list(range(n))
    skipped = _integers(given.get("cache_leftpad"), n, 0)
    added = given["k"].shape[1] if given.get("k") is not None else 0
    if table is not None:
        longest = max(before, default=0) + added
        k, v = paged_as_batch(k, table, longest), paged_as_batch(v, table, longest)
        room = k.shape[1]
    # The cache has rows for more sequences than the call, in any order, and some begin behind padding: each sequence is
    # cut out of the rows laid end to end.
    keys = Sequences(
        tuple(row * room + pad for row, pad in zip(rows, skipped, strict=True)),
        tuple(b + added - pad for b, pad in zip(before, skipped, strict=True)),
    )
    rotated = given.get("rotary_cos") is not None
    if rotated:
        if q.dim() != 4:
            raise UnreadableError("rotary embedding of packed queries")
        local = bool(given.get("causal")) or window_of(given.get("window_size"), False) != (-1, -1)
        q = _rotate(q, given["rotary_cos"], given["rotary_sin"], before, local, bool(given.get("rotary_interleaved")))
    call = _finish(lay_out(q, k, v, out, queries, keys, given.get("softmax_scale"), _NAME), given, queries, keys)
    if added and out is None:
        new = given["k"]
        if rotated:
            new = _rotate(
                new, given["rotary_cos"], given["rotary_sin"], before, True, bool(given.get("rotary_interleaved"))
            )
        call.k, call.v = _appended(call.k, new, keys), _appended(call.v, given["v"], keys)
    if rotated:
        call.notes.append("the kernel rotates q itself and never hands it out: it is rotated here")
        # To be turned back for the kernel to turn it again, a changed q would be rounded twice, in all its heads.
        return Reading(call, queries.back)
    return Reading(call, queries.back, {"q": ("q", queries.back)})


def _appended(x: Tensor, new: Tensor, keys: Sequences) -> Tensor:
    """Keys or values of a batch with those that are about to be appended to the cache.

    Args:
        x: B G S D, where the last places of each sequence are still to be filled.
        new: B A G D.
        keys: the lengths of the sequences, with those that are appended.
    """
    made, n = x.clone().transpose(1, 2), new.shape[1]
    last = torch.tensor(keys.lengths, device=x.device)[:, None] - n + torch.arange(n, device=x.device)
    made[torch.arange(len(last), device=x.device)[:, None], last] = new.to(x.dtype)
    return made.transpose(1, 2)


def _finish(call: KernelCall, given: dict[str, Any], queries: Sequences, keys: Sequences) -> KernelCall:
    """Soft-cap, sinks, masks and ALiBi."""
    call.softcap = float(given.get("softcap") or 0.0) or None
    call.sinks = given.get("learnable_sink") if given.get("s_aux") is None else given.get("s_aux")
    add_masks(
        call,
        queries,
        keys,
        window_of(given.get("window_size"), bool(given.get("causal"))),
        int(given.get("attention_chunk") or 0),
        given.get("alibi_slopes"),
    )
    return call


_Part = Callable[[Tensor], Tensor]


def _parts(given: dict[str, Any]) -> dict[str, tuple[str, _Part]]:
    """Of q, k and v each: the argument that it came in, and what makes it of that one, as a view of it."""
    if "qkv" in given:
        qkv, heads = given["qkv"], given.get("num_heads_q")
        if heads is not None and qkv.dim() == 4:  # B T (H + 2G) D
            groups = (qkv.shape[2] - heads) // 2
            bounds = ((0, heads), (heads, groups), (heads + groups, groups))
            return {
                x: ("qkv", partial(torch.narrow, dim=2, start=a, length=n))
                for x, (a, n) in zip("qkv", bounds, strict=True)
            }
        return {x: ("qkv", partial(torch.select, dim=-3, index=i)) for i, x in enumerate("qkv")}
    if "kv" in given:
        return {"q": ("q", _whole), **{x: ("kv", partial(torch.select, dim=-3, index=i)) for i, x in enumerate("kv")}}
    return {x: (x, _whole) for x in "qkv"}


def _whole(x: Tensor) -> Tensor:
    return x


def _table(given: dict[str, Any]) -> Tensor | None:
    """B by pages: where the pages of a sequence are, by either name."""
    table: Tensor | None = given.get("page_table") if given.get("block_table") is None else given.get("block_table")
    return table


def _integers(x: Any, n: int, default: int) -> list[int]:
    """One for each sequence, from a tensor, one number for all, or nothing."""
    if x is None or isinstance(x, int):
        return [default if x is None else x] * n
    return [int(i) for i in x.tolist()]


def _rotate(q: Tensor, cos: Tensor, sin: Tensor, first: list[int], each: bool, interleaved: bool) -> Tensor:
    """Rotary embedding of q at positions ``first`` and on, or, unless ``each``, all at ``first``.

    Args:
        q: B T H D.
        cos: positions by half the rotated width.
        sin: likewise.
        first: B.
        each: whether the queries stand at different positions.
        interleaved: whether neighbours make a pair, rather than the two halves.
    """
    step = torch.arange(q.shape[1], device=q.device) * each
    at = torch.tensor(first, device=q.device)[:, None] + step
    cos, sin = (x[at].float().unsqueeze(2) for x in (cos, sin))
    width = 2 * cos.shape[-1]
    turned = q[..., :width].float()
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(q.dtype), q[..., width:]], -1)


KERNELS = {
    "flash_attn_func": Kernel(read, _BATCHED),
    "flash_attn_kvpacked_func": Kernel(read, _BATCHED),
    "flash_attn_qkvpacked_func": Kernel(read, _BATCHED),
    "flash_attn_varlen_func": Kernel(read, _PACKED),
    "flash_attn_varlen_kvpacked_func": Kernel(read, _PACKED),
    "flash_attn_varlen_qkvpacked_func": Kernel(read, _PACKED),
    "flash_attn_with_kvcache": Kernel(read_cached, _CACHED),
}


def patches() -> Iterable[Patch]:
    """The functions of every loaded package that has the interface."""
    names = [n for n in list(sys.modules) if n.rpartition(".")[2] == _INTERFACE or n in ("flash_attn", _CUTE)]
    return find([sys.modules[name] for name in names if name in sys.modules], KERNELS)


TAP = Tap(_NAME, patches=patches)
