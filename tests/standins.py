"""Stand-ins of attention functions that need packages or devices which are not here.

They have the documented names and signatures of the real ones and are explicit float32 math, one query of one head of
one sequence at a time, written from what the documentation says the arguments mean. Nothing here imports hookattn.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------ the math


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: Any,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """T H D, S G D, S G E -> T H E, in float32; ``slopes``: H."""
    (t, h, d), (s, g, e) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    left, right = (-1 if n is None else n for n in (window or (-1, -1)))
    right = 0 if causal else right
    out = torch.zeros(t, h, e)
    for head in range(h):
        group = head * g // h
        for i in range(t):
            here = i + s - t
            seen = [
                j
                for j in range(s)
                if (left < 0 or j >= here - left)
                and (right < 0 or j <= here + right)
                and (not chunk or j // chunk == here // chunk)
            ]
            if not seen:
                continue
            logits = (k[seen, group].float() * q[i, head].float()).sum(-1) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if slopes is not None:
                logits = logits - slopes[head] * torch.tensor([abs(here - j) for j in seen])
            if sink is not None:
                logits = torch.cat([logits, sink[head].float().view(1)])
            weights = torch.softmax(logits, -1)[: len(seen)]
            if dropout:
                weights = torch.nn.functional.dropout(weights, dropout)
            out[i, head] = (weights[:, None] * v[seen, group].float()).sum(0)
    return out.to(q.dtype)


def slopes_of(slopes: Tensor | None, b: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[b]


def dense(q: Tensor, k: Tensor, v: Tensor, *args: Any, slopes: Tensor | None = None, **kwargs: Any) -> Tensor:
    return torch.stack(
        [one_sequence(q[b], k[b], v[b], *args, slopes=slopes_of(slopes, b), **kwargs) for b in range(q.shape[0])]
    )


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    *args: Any,
    slopes: Tensor | None = None,
    used_q: Any = None,
    used_k: Any = None,
    table: Any = None,
    **kwargs: Any,
) -> Tensor:
    """What no sequence owns is NaN, so that nobody takes it for an output."""
    out = q.new_full((*q.shape[:2], v.shape[-1]), torch.nan)
    for b in range(len(cu_q) - 1):
        at = int(cu_q[b])
        n = int(used_q[b]) if used_q is not None else int(cu_q[b + 1]) - at
        if table is None:
            assert cu_k is not None
            first = int(cu_k[b])
            m = int(used_k[b]) if used_k is not None else int(cu_k[b + 1]) - first
            keys, values = k[first : first + m], v[first : first + m]
        else:
            m = int(used_k[b]) if used_k is not None else int(cu_k[b + 1] - cu_k[b])
            keys, values = from_pages(k, table[b], m), from_pages(v, table[b], m)
        out[at : at + n] = one_sequence(q[at : at + n], keys, values, *args, slopes=slopes_of(slopes, b), **kwargs)
    return out


def from_pages(pool: Tensor, table: Tensor, n: int) -> Tensor:
    size = pool.shape[1]
    return torch.stack([pool[int(table[i // size]), i % size] for i in range(n)]) if n else pool[:0, 0]


def turn(x: Tensor, cos: Tensor, sin: Tensor, at: Sequence[int], interleaved: bool) -> Tensor:
    """T H D, rotated as complex numbers."""
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    number = torch.complex(x[..., first].float(), x[..., second].float())
    number = number * torch.complex(cos[list(at)].float(), sin[list(at)].float())[:, None]
    out = x.clone()
    out[..., first], out[..., second] = number.real.to(x.dtype), number.imag.to(x.dtype)
    return out


def with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Any,
    sin: Any,
    lengths: Any,
    rows: Any,
    leftpad: Any,
    table: Any,
    scale: float | None,
    causal: bool,
    window: Any,
    softcap: float,
    interleaved: bool,
    slopes: Tensor | None,
) -> Tensor:
    """Writes k and v to the cache, then attends to it."""
    out = []
    local = causal or tuple(window) != (-1, -1)
    for b in range(q.shape[0]):
        if lengths is None:
            n = k_cache.shape[1]
        else:
            n = lengths if isinstance(lengths, int) else int(lengths[b])
        row = b if rows is None else int(rows[b])
        query, added = q[b], 0
        if cos is not None:
            query = turn(query, cos, sin, [n + (i if local else 0) for i in range(len(query))], interleaved)
        if k is not None and v is not None:
            added = k.shape[1]
            new = k[b] if cos is None else turn(k[b], cos, sin, range(n, n + added), interleaved)
            for i in range(added):
                at = n + i
                place = (row, at) if table is None else (int(table[b][at // k_cache.shape[1]]), at % k_cache.shape[1])
                k_cache[place], v_cache[place] = new[i], v[b, i]
        first = 0 if leftpad is None else int(leftpad[b])
        if table is None:
            keys, values = k_cache[row, first : n + added], v_cache[row, first : n + added]
        else:
            keys, values = (from_pages(x, table[b], n + added)[first:] for x in (k_cache, v_cache))
        out.append(one_sequence(query, keys, values, scale, causal, window, softcap, slopes_of(slopes, b)))
    return torch.stack(out)


# ----------------------------------------------------------------------------------------------------- flash-attn


class Flash2:
    """The functions of ``flash_attn.flash_attn_interface``."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        out = dense(q, k, v, softmax_scale, causal, window_size, softcap, slopes=alibi_slopes, dropout=dropout_p)
        return (out, torch.zeros(1), None) if return_attn_probs else out

    @staticmethod
    def flash_attn_qkvpacked_func(
        qkv: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return dense(q, k, v, softmax_scale, causal, window_size, softcap, slopes=alibi_slopes, dropout=dropout_p)

    @staticmethod
    def flash_attn_kvpacked_func(
        q: Any,
        kv: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        k, v = kv[:, :, 0], kv[:, :, 1]
        return dense(q, k, v, softmax_scale, causal, window_size, softcap, slopes=alibi_slopes, dropout=dropout_p)

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:
        out = packed(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            slopes=alibi_slopes,
            dropout=dropout_p,
            table=block_table,
        )
        return (out, torch.zeros(1), None) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_qkvpacked_func(
        qkv: Any,
        cu_seqlens: Any,
        max_seqlen: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        return packed(
            qkv[:, 0],
            qkv[:, 1],
            qkv[:, 2],
            cu_seqlens,
            cu_seqlens,
            softmax_scale,
            causal,
            window_size,
            softcap,
            slopes=alibi_slopes,
            dropout=dropout_p,
        )

    @staticmethod
    def flash_attn_varlen_kvpacked_func(
        q: Any,
        kv: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        return packed(
            q,
            kv[:, 0],
            kv[:, 1],
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            slopes=alibi_slopes,
            dropout=dropout_p,
        )

    @staticmethod
    def flash_attn_with_kvcache(
        q: Any,
        k_cache: Any,
        v_cache: Any,
        k: Any = None,
        v: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        cache_seqlens: Any = None,
        cache_batch_idx: Any = None,
        cache_leftpad: Any = None,
        block_table: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        alibi_slopes: Any = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Any:
        out = with_cache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
            rotary_interleaved,
            alibi_slopes,
        )
        return (out, torch.zeros(1)) if return_softmax_lse else out


class FlashOfVllm:
    """``flash_attn_varlen_func`` as vLLM ships it."""

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        max_seqlen_q: Any,
        cu_seqlens_q: Any,
        max_seqlen_k: Any,
        cu_seqlens_k: Any = None,
        seqused_k: Any = None,
        q_v: Any = None,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = None,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Any = None,
        return_softmax_lse: bool = False,
        out: Any = None,
        scheduler_metadata: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        num_splits: int = 0,
        output_scale: Any = None,
        fa_version: int = 2,
        s_aux: Any = None,
        cp_world_size: int = 1,
        cp_rank: int = 0,
        cp_tot_seqused_k: Any = None,
        mask_mod: Any = None,
        block_sparse_tensors: Any = None,
        aux_tensors: Any = None,
        aux_tensor_leading_dims: Any = None,
        dynamic_causal: Any = None,
    ) -> Any:
        made = packed(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            slopes=alibi_slopes,
            used_k=seqused_k,
            table=block_table,
            sink=s_aux,
        )
        out = made if out is None else out.copy_(made)
        return (out, torch.zeros(1)) if return_softmax_lse else out


class Flash3:
    """The functions of the top-level module ``flash_attn_interface``."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: Any = None,
        causal: bool = False,
        qv: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        window_size: Any = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: Any = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:
        out = dense(q, k, v, softmax_scale, causal, window_size, softcap, chunk=attention_chunk)
        return (out, torch.zeros(1)) if return_attn_probs else out

    @staticmethod
    def flash_attn_qkvpacked_func(
        qkv: Any,
        softmax_scale: Any = None,
        causal: bool = False,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        window_size: Any = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        deterministic: bool = False,
        num_heads_q: Any = None,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:
        if qkv.dim() == 5:
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            n = (qkv.shape[2] - num_heads_q) // 2
            q, k, v = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + n], qkv[:, :, -n:]
        return dense(q, k, v, softmax_scale, causal, window_size, softcap, chunk=attention_chunk)

    @staticmethod
    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        seqused_q: Any = None,
        seqused_k: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
        qv: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        window_size: Any = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: Any = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Any:
        return packed(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale,
            causal,
            window_size,
            softcap,
            chunk=attention_chunk,
            used_q=seqused_q,
            used_k=seqused_k,
        )

    @staticmethod
    def flash_attn_with_kvcache(
        q: Any,
        k_cache: Any,
        v_cache: Any,
        k: Any = None,
        v: Any = None,
        qv: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        cache_seqlens: Any = None,
        cache_batch_idx: Any = None,
        cache_leftpad: Any = None,
        page_table: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k_new: Any = None,
        max_seqlen_q: Any = None,
        rotary_seqlens: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Any = None,
        num_splits: int = 0,
        pack_gqa: Any = None,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
    ) -> Any:
        return with_cache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            page_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
            rotary_interleaved,
            None,
        )


class Flash4:
    """The functions of ``flash_attn.cute.interface``."""

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        qv: Any = None,
        softmax_scale: Any = None,
        causal: bool = False,
        window_size: Any = (None, None),
        learnable_sink: Any = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: Any = None,
        deterministic: bool = False,
        score_mod: Any = None,
        mask_mod: Any = None,
        block_sparse_tensors: Any = None,
        return_lse: bool = False,
    ) -> Any:
        return dense(q, k, v, softmax_scale, causal, window_size, softcap, sink=learnable_sink), None


# ------------------------------------------------------------------------------------------- putting them in place


def module(name: str, functions: type | None = None, **more: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in vars(functions).items() if functions is not None else ():
        if isinstance(value, staticmethod):
            function = value.__func__
            parts = function.__code__, function.__globals__, key, function.__defaults__, function.__closure__
            copy = types.FunctionType(*parts)
            copy.__kwdefaults__ = function.__kwdefaults__
            copy.__module__ = name
            more[key] = copy
    vars(made).update(more)
    return made


Give = Callable[..., types.ModuleType]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Iterator[Give]:
    """Puts a module in its place; in the end every function has its own code again."""
    codes: dict[Any, types.CodeType] = {}

    def put(name: str, functions: type | None = None, **more: Any) -> types.ModuleType:
        made = module(name, functions, **more)
        monkeypatch.setitem(sys.modules, name, made)
        codes.update({f: f.__code__ for f in vars(made).values() if isinstance(f, types.FunctionType)})
        return made

    yield put
    for function, code in codes.items():
        assert function.__code__ is code, f"{function.__name__} is still patched"


# ------------------------------------------------------------------------------------ what a test says and expects


class Calls(nn.Module):
    """Nothing but a call of a function whose name was imported long before."""

    def __init__(self, function: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__()
        self.function, self.kwargs = function, kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.function(*args, **self.kwargs, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def table_of(*rows: str) -> Tensor:
    """A mask as it is printed: 1 may attend."""
    return torch.tensor([[c == "1" for c in row] for row in rows])


def counted(t: int, s: int, left: int, right: int, chunk: int = 0) -> Tensor:
    """The mask of the documentation, key by key: [i + S − T − left, i + S − T + right], both included."""
    mask = torch.zeros(t, s, dtype=torch.bool)
    for i in range(t):
        for j in range(s):
            place = i + s - t
            mask[i, j] = (
                (left == -1 or place - left <= j)
                and (right == -1 or j <= place + right)
                and (not chunk or place // chunk == j // chunk)
            )
    return mask


def bent(slopes: Tensor, t: int, s: int) -> Tensor:
    """−slope·|i + S − T − j|: H T S."""
    return torch.stack(
        [torch.tensor([[-float(m) * abs(i + s - t - j) for j in range(s)] for i in range(t)]) for m in slopes]
    )


def pad(pieces: Sequence[Tensor]) -> Tensor:
    """Each L H D -> B H L D, zeros at the end."""
    longest = max(len(p) for p in pieces)
    out = pieces[0].new_zeros(len(pieces), pieces[0].shape[1], longest, pieces[0].shape[2])
    for b, piece in enumerate(pieces):
        out[b, :, : len(piece)] = piece.transpose(0, 1)
    return out


def pad_masks(masks: Sequence[Tensor]) -> Tensor:
    """Each T S -> B 1 T S, False outside."""
    t, s = max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)
    out = torch.zeros(len(masks), 1, t, s, dtype=torch.bool)
    for b, mask in enumerate(masks):
        out[b, 0, : mask.shape[0], : mask.shape[1]] = mask
    return out


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
