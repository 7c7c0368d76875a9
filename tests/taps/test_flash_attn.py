"""flash-attn, by stand-ins: every call against float64 math, and against masks that are counted key by key."""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookattn
from hookattn import trace, tracing
from tests.reference import check_call, draw, same_bits, trace_checked
from tests.standins import (
    Calls,
    Flash2,
    Flash3,
    Flash4,
    Give,
    bent,
    counted,
    dense,
    ends,
    from_pages,
    give,
    pad,
    pad_masks,
    table_of,
    turn,
)

__all__ = ["give"]  # a fixture

B, H, G, T, S, D = 2, 4, 2, 3, 5, 8


@pytest.fixture
def flash2(give: Give) -> types.ModuleType:
    """The package of version 2, which has every function under two names; the package is returned."""
    interface = give("flash_attn.flash_attn_interface", Flash2)
    functions = {k: v for k, v in vars(interface).items() if isinstance(v, types.FunctionType)}
    return give("flash_attn", flash_attn_interface=interface, **functions)


@pytest.fixture
def flash3(give: Give) -> types.ModuleType:
    return give("flash_attn_interface", Flash3)


def qkv(
    t: int = T, s: int = S, h: int = H, g: int = G, e: int = D, b: int = B, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """B T H D, B S G D, B S G E."""
    return (
        draw(b, t, h, D, seed=1, dtype=dtype),
        draw(b, s, g, D, seed=2, dtype=dtype),
        draw(b, s, g, e, seed=3, dtype=dtype),
    )


def one(function: Callable[..., Any], inputs: Any, **kwargs: Any) -> Any:
    made = trace_checked(trace, Calls(function, **kwargs), inputs, verify="full")
    assert len(made) == 1 and not made.skipped, made.skipped
    assert made[0].tap == "flash_attn"
    return made[0]


def bhtd(*tensors: Tensor) -> dict[str, Tensor]:
    return {name: x.transpose(1, 2) for name, x in zip("qkv", tensors, strict=True)}


# ------------------------------------------------------------------------------------------------ batched calls


def test_plain_grouped_heads(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    call = one(flash2.flash_attn_func, (q, k, v))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, output=flash2.flash_attn_func(q, k, v).transpose(1, 2))
    assert not call.causal and call.window is None and not call.notes


def test_scale_positional_arguments_and_other_value_width(flash2: types.ModuleType) -> None:
    q, k, v = qkv(e=6)
    call = one(flash2.flash_attn_func, (q, k, v, 0.0, 0.3, True))
    check_call(call, **bhtd(q, k, v), scale=0.3, mask=counted(T, S, -1, 0))


@pytest.mark.parametrize(
    ("t", "s", "rows"),
    [
        (2, 5, ("11110", "11111")),
        (5, 2, ("00", "00", "00", "10", "11")),
        (3, 3, ("100", "110", "111")),
        (1, 4, ("1111",)),
    ],
)
def test_causal_is_aligned_to_the_bottom_right(flash2: types.ModuleType, t: int, s: int, rows: tuple[str, ...]) -> None:
    q, k, v = qkv(t, s)
    call = one(flash2.flash_attn_func, (q, k, v), causal=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=table_of(*rows))
    assert call.causal
    empty = ~table_of(*rows).any(-1)
    assert (call.weights[:, :, empty] == 0).all() and (call.output[:, :, empty] == 0).all()


def test_a_window_as_it_is_printed(flash2: types.ModuleType) -> None:
    q, k, v = qkv(3, 5)
    call = one(flash2.flash_attn_func, (q, k, v), window_size=(1, 0))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=table_of("01100", "00110", "00011"))
    assert call.causal and call.window == 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "window",
    [(0, 0), (1, 0), (3, 0), (1, 1), (2, 2), (1, 3), (3, 1), (2, -1), (-1, 1), (-1, 0), (0, 1), (9, 9), (-1, -1)],
)
@pytest.mark.parametrize(("t", "s"), [(4, 4), (3, 6), (6, 3)])
def test_windows(flash2: types.ModuleType, t: int, s: int, window: tuple[int, int], causal: bool) -> None:
    q, k, v = qkv(t, s)
    call = one(flash2.flash_attn_func, (q, k, v), window_size=window, causal=causal)
    left, right = window[0], 0 if causal else window[1]
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(t, s, left, right))
    assert call.causal == (right == 0)
    said = right in (0, left)
    assert call.window == (left + 1 if said and left >= 0 else None)
    assert bool(call.notes) == (not said and left >= 0)


def test_softcap(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    q = q * 10
    call = one(flash2.flash_attn_func, (q, k, v), softcap=5.0, causal=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, softcap=5.0, mask=counted(T, S, -1, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("t", "s"), [(4, 4), (2, 5), (5, 2)])
def test_alibi(flash2: types.ModuleType, t: int, s: int, causal: bool) -> None:
    q, k, v = qkv(t, s)
    slopes = torch.tensor([0.5, 0.25, 0.125, 2.0])
    call = one(flash2.flash_attn_func, (q, k, v), alibi_slopes=slopes, causal=causal)
    check_call(
        call,
        **bhtd(q, k, v),
        scale=D**-0.5,
        bias=bent(slopes, t, s)[None],
        mask=counted(t, s, -1, 0) if causal else None,
    )


def test_alibi_of_each_batch_entry_with_softcap(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    slopes = draw(B, H, seed=9).abs()
    call = one(flash2.flash_attn_func, (q, k, v), alibi_slopes=slopes, softcap=2.0)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, softcap=2.0, bias=torch.stack([bent(m, T, S) for m in slopes]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(flash2: types.ModuleType, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    call = one(flash2.flash_attn_func, (q, k, v), causal=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, -1, 0))


def test_dropout_is_checked_against_the_kernel_without_it(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    call = one(flash2.flash_attn_func, (q, k, v), dropout_p=0.4, causal=True, return_attn_probs=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, -1, 0), dropout=0.4)
    assert "without dropout" in call.certificate.basis
    full = flash2.flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    assert not same_bits(call.output, full)


def test_probabilities_and_lse_returned_beside_it(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    model = Calls(flash2.flash_attn_func, return_attn_probs=True)
    made = trace_checked(trace, model, (q, k, v))
    check_call(made[0], **bhtd(q, k, v), scale=D**-0.5)


def test_stacked_inputs(flash2: types.ModuleType) -> None:
    q, k, v = qkv(T, T, H, H)
    call = one(flash2.flash_attn_qkvpacked_func, (torch.stack([q, k, v], 2),), causal=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, T, -1, 0))
    q, k, v = qkv()
    call = one(flash2.flash_attn_kvpacked_func, (q, torch.stack([k, v], 2)), window_size=(2, 0))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, 2, 0))


def test_gradients_are_left_alone(flash2: types.ModuleType) -> None:
    def grads(traced: bool) -> list[Tensor | None]:
        inputs = tuple(x.requires_grad_() for x in qkv())
        model = Calls(flash2.flash_attn_func, causal=True)
        if traced:
            made = trace(model, inputs)
            assert not made[0].q.requires_grad
            out = made.output
        else:
            out = model(*inputs)
        out.square().sum().backward()
        return [x.grad for x in inputs]

    assert same_bits(grads(True), grads(False))


def test_selection_of_heads_and_queries(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    slopes = draw(B, H, seed=9).abs()
    model = Calls(flash2.flash_attn_func, causal=True, alibi_slopes=slopes)
    full = trace(model, (q, k, v))[0]
    part = trace(model, (q, k, v), heads=[3], queries=slice(-1, None))[0]
    assert part.certificate.faithful
    assert torch.allclose(part.weights, full.weights[:, 3:, -1:], atol=1e-6)


# ------------------------------------------------------------------------------------------------- packed calls

LENGTHS = [
    ((3, 1, 4), (3, 1, 4)),
    ((2, 3), (5, 4)),
    ((4, 2), (2, 4)),
    ((3, 3), (3, 3)),
    ((2, 0, 3), (4, 2, 3)),
    ((2, 0, 3), (4, 1, 5)),
    ((1, 1, 1), (2, 5, 3)),
]


def packed_inputs(n_q: Sequence[int], n_k: Sequence[int], h: int = H, g: int = G) -> tuple[Tensor, Tensor, Tensor]:
    return draw(sum(n_q), h, D, seed=4), draw(sum(n_k), g, D, seed=5), draw(sum(n_k), g, D, seed=6)


def as_batch(n_q: Sequence[int], n_k: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"q": pad(q.split(list(n_q))), "k": pad(k.split(list(n_k))), "v": pad(v.split(list(n_k)))}


@pytest.mark.parametrize(
    ("left", "right", "causal"),
    [(-1, -1, False), (-1, -1, True), (2, 2, True), (1, 1, False), (1, 2, False), (2, -1, False), (-1, 1, False)],
)
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_packed_sequences(
    flash2: types.ModuleType, n_q: tuple[int, ...], n_k: tuple[int, ...], left: int, right: int, causal: bool
) -> None:
    q, k, v = packed_inputs(n_q, n_k)
    args = (q, k, v, ends(n_q), ends(n_k), max(n_q), max(n_k))
    call = one(flash2.flash_attn_varlen_func, args, causal=causal, window_size=(left, right))
    masks = [counted(t, s, left, 0 if causal else right) for t, s in zip(n_q, n_k, strict=True)]
    out = flash2.flash_attn_varlen_func(*args, causal=causal, window_size=(left, right))
    check_call(
        call, **as_batch(n_q, n_k, q, k, v), scale=D**-0.5, mask=pad_masks(masks), output=pad(out.split(list(n_q)))
    )
    alike = len({s - t for t, s in zip(n_q, n_k, strict=True) if t}) == 1
    assert call.causal == causal
    assert call.window == (left + 1 if left >= 0 and alike and (causal or left == right) else None)
    assert call.notes[0].startswith(f"{len(n_q)} packed sequences")
    assert any("filled up" in note for note in call.notes) == (len(set(n_q)) > 1 or len(set(n_k)) > 1)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS[:3])
def test_packed_sequences_with_alibi_and_softcap(
    flash2: types.ModuleType, n_q: tuple[int, ...], n_k: tuple[int, ...], each: bool
) -> None:
    q, k, v = packed_inputs(n_q, n_k)
    slopes = draw(len(n_q), H, seed=9).abs() if each else draw(H, seed=9).abs()
    call = one(
        flash2.flash_attn_varlen_func,
        (q, k, v, ends(n_q), ends(n_k), max(n_q), max(n_k)),
        alibi_slopes=slopes,
        softcap=3.0,
        softmax_scale=0.5,
    )
    bias = torch.zeros(len(n_q), H, max(n_q), max(n_k))
    for b, (t, s) in enumerate(zip(n_q, n_k, strict=True)):
        bias[b, :, :t, :s] = bent(slopes[b] if each else slopes, t, s)
    check_call(
        call,
        **as_batch(n_q, n_k, q, k, v),
        scale=0.5,
        softcap=3.0,
        bias=bias,
        masked_scores=False,
        mask=pad_masks([counted(t, s, -1, -1) for t, s in zip(n_q, n_k, strict=True)]),
    )


def test_packed_and_stacked(flash2: types.ModuleType) -> None:
    n = (3, 1, 4)
    q, k, v = packed_inputs(n, n, H, H)
    mask = pad_masks([counted(t, t, -1, 0) for t in n])
    call = one(flash2.flash_attn_varlen_qkvpacked_func, (torch.stack([q, k, v], 1), ends(n), max(n)), causal=True)
    check_call(call, **as_batch(n, n, q, k, v), scale=D**-0.5, mask=mask)
    m = (4, 2, 5)
    q, k, v = packed_inputs(n, m)
    call = one(
        flash2.flash_attn_varlen_kvpacked_func,
        (q, torch.stack([k, v], 1), ends(n), ends(m), max(n), max(m)),
        causal=True,
    )
    check_call(
        call,
        **as_batch(n, m, q, k, v),
        scale=D**-0.5,
        mask=pad_masks([counted(t, s, -1, 0) for t, s in zip(n, m, strict=True)]),
    )


def test_packed_with_dropout(flash2: types.ModuleType) -> None:
    n = (3, 1, 4)
    q, k, v = packed_inputs(n, n)
    call = one(flash2.flash_attn_varlen_func, (q, k, v, ends(n), ends(n), 4, 4), dropout_p=0.5, causal=True)
    check_call(
        call, **as_batch(n, n, q, k, v), scale=D**-0.5, dropout=0.5, mask=pad_masks([counted(t, t, -1, 0) for t in n])
    )


def test_packed_with_pages(flash2: types.ModuleType) -> None:
    n_q, n_k, size = (2, 1), (5, 3), 2
    q = draw(3, H, D, seed=4)
    k, v = draw(7, size, G, D, seed=5), draw(7, size, G, D, seed=6)
    table = torch.tensor([[4, 0, 6], [1, 5, 99]], dtype=torch.int32)  # behind the last page lies nonsense
    call = one(flash2.flash_attn_varlen_func, (q, k, v, ends(n_q), ends(n_k), 2, 5), causal=True, block_table=table)
    check_call(
        call,
        q=pad(q.split([2, 1])),
        k=pad([from_pages(k, t, n) for t, n in zip(table, n_k, strict=True)]),
        v=pad([from_pages(v, t, n) for t, n in zip(table, n_k, strict=True)]),
        scale=D**-0.5,
        mask=pad_masks([counted(2, 5, -1, 0), counted(1, 3, -1, 0)]),
    )


# --------------------------------------------------------------------------------------------------- the cache


def cached(flash2: types.ModuleType, q: Tensor, k_cache: Tensor, v_cache: Tensor, **kwargs: Any) -> Any:
    """The call, and the cache after it; a trace must leave the same cache behind as no trace."""
    plain = (k_cache.clone(), v_cache.clone())
    expected = Calls(flash2.flash_attn_with_kvcache)(q, *plain, **kwargs)
    made = trace(
        Calls(flash2.flash_attn_with_kvcache), {"q": q, "k_cache": k_cache, "v_cache": v_cache, **kwargs}, verify="full"
    )
    assert same_bits(made.output, expected) and same_bits((k_cache, v_cache), plain)
    assert len(made) == 1 and not made.skipped
    return made[0]


@pytest.mark.parametrize(("lengths", "new"), [(None, 0), (4, 0), ((2, 5), 0), (4, 2), ((2, 5), 2), ((0, 3), 2)])
@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
def test_cache(flash2: types.ModuleType, lengths: Any, new: int, window: tuple[int, int]) -> None:
    q, k_cache, v_cache = draw(B, 2, H, D, seed=1), draw(B, 7, G, D, seed=2), draw(B, 7, G, D, seed=3)
    k, v = (draw(B, new, G, D, seed=s) if new else None for s in (4, 5))
    given = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, tuple) else lengths
    call = cached(flash2, q, k_cache, v_cache, k=k, v=v, cache_seqlens=given, causal=True, window_size=window)
    n = [x + new for x in ((7, 7) if lengths is None else (lengths,) * 2 if isinstance(lengths, int) else lengths)]
    check_call(
        call,
        q=q.transpose(1, 2),
        k=pad([k_cache[b, : n[b]] for b in range(B)]),
        v=pad([v_cache[b, : n[b]] for b in range(B)]),
        scale=D**-0.5,
        mask=pad_masks([counted(2, m, window[0], 0) for m in n]),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1))])
def test_cache_that_rotates(flash2: types.ModuleType, interleaved: bool, causal: bool, window: Any) -> None:
    q, k_cache, v_cache = draw(B, 2, H, D, seed=1), draw(B, 7, G, D, seed=2), draw(B, 7, G, D, seed=3)
    k, v = draw(B, 2, G, D, seed=4), draw(B, 2, G, D, seed=5)
    angle = draw(9, D // 4, seed=6)
    n = torch.tensor([3, 1], dtype=torch.int32)
    call = cached(
        flash2,
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        rotary_cos=angle.cos(),
        rotary_sin=angle.sin(),
        cache_seqlens=n,
        causal=causal,
        window_size=window,
        rotary_interleaved=interleaved,
    )
    local = causal or window != (-1, -1)
    turned = torch.stack(
        [turn(q[b], angle.cos(), angle.sin(), [int(n[b]) + i * local for i in range(2)], interleaved) for b in range(B)]
    )
    masks = [counted(2, m, window[0], 0 if causal else window[1]) for m in (5, 3)]
    check_call(
        call,
        q=turned.transpose(1, 2),
        k=pad([k_cache[0, :5], k_cache[1, :3]]),
        v=pad([v_cache[0, :5], v_cache[1, :3]]),
        scale=D**-0.5,
        mask=pad_masks(masks),
        exact=False,
    )
    assert any("rotates" in note for note in call.notes)


def test_cache_rows_in_another_order_with_room_at_their_beginning(flash2: types.ModuleType) -> None:
    q, k_cache, v_cache = draw(B, 1, H, D, seed=1), draw(4, 6, G, D, seed=2), draw(4, 6, G, D, seed=3)
    call = cached(
        flash2,
        q,
        k_cache,
        v_cache,
        cache_seqlens=torch.tensor([4, 6]),
        causal=True,
        cache_batch_idx=torch.tensor([3, 0]),
        cache_leftpad=torch.tensor([1, 2]),
        return_softmax_lse=True,
    )
    check_call(
        call,
        q=q.transpose(1, 2),
        k=pad([k_cache[3, 1:4], k_cache[0, 2:6]]),
        v=pad([v_cache[3, 1:4], v_cache[0, 2:6]]),
        scale=D**-0.5,
        mask=pad_masks([counted(1, 3, -1, 0), counted(1, 4, -1, 0)]),
    )


def test_cache_in_pages(flash2: types.ModuleType) -> None:
    q, k_cache, v_cache = draw(B, 1, H, D, seed=1), draw(6, 2, G, D, seed=2), draw(6, 2, G, D, seed=3)
    k, v = draw(B, 1, G, D, seed=4), draw(B, 1, G, D, seed=5)
    table = torch.tensor([[5, 2, 0], [3, 4, -1]], dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    call = cached(
        flash2,
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        cache_seqlens=torch.tensor([4, 2]),
        block_table=table,
        alibi_slopes=slopes,
    )
    bias = torch.zeros(B, H, 1, 5)
    bias[0], bias[1, :, :, :3] = bent(slopes, 1, 5), bent(slopes, 1, 3)
    rows = list(zip(table, (5, 3), strict=True))
    check_call(
        call,
        q=q.transpose(1, 2),
        k=pad([from_pages(k_cache, t, n) for t, n in rows]),
        v=pad([from_pages(v_cache, t, n) for t, n in rows]),
        scale=D**-0.5,
        bias=bias,
        masked_scores=False,
        mask=pad_masks([counted(1, 5, -1, -1), counted(1, 3, -1, -1)]),
    )


# ------------------------------------------------------------------------------------------------ other versions


def test_version_3(flash3: types.ModuleType) -> None:
    q, k, v = qkv(e=6)
    call = one(flash3.flash_attn_func, (q, k, v, 0.3, True), window_size=(2, -1), softcap=4.0, return_attn_probs=True)
    check_call(call, **bhtd(q, k, v), scale=0.3, softcap=4.0, mask=counted(T, S, 2, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("t", "s"), [(6, 6), (3, 7), (7, 3)])
def test_version_3_chunks(flash3: types.ModuleType, t: int, s: int, causal: bool) -> None:
    q, k, v = qkv(t, s)
    call = one(flash3.flash_attn_func, (q, k, v), causal=causal, attention_chunk=2)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(t, s, -1, 0 if causal else -1, chunk=2))


def test_version_3_stacked(flash3: types.ModuleType) -> None:
    q, k, v = qkv(T, T)
    call = one(flash3.flash_attn_qkvpacked_func, (torch.cat([q, k, v], 2),), num_heads_q=H, causal=True)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, T, -1, 0))
    q, k, v = qkv(T, T, H, H)
    call = one(flash3.flash_attn_qkvpacked_func, (torch.stack([q, k, v], 2),))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5)


def test_version_3_of_which_only_a_part_is_used(flash3: types.ModuleType) -> None:
    n_q, n_k, used_q, used_k = (3, 4), (4, 5), (2, 3), (4, 2)
    q, k, v = packed_inputs(n_q, n_k)
    call = one(
        flash3.flash_attn_varlen_func,
        (q, k, v, ends(n_q), ends(n_k), 4, 5),
        causal=True,
        seqused_q=torch.tensor(used_q),
        seqused_k=torch.tensor(used_k),
    )
    check_call(
        call,
        q=pad([x[:n] for x, n in zip(q.split(list(n_q)), used_q, strict=True)]),
        k=pad([x[:n] for x, n in zip(k.split(list(n_k)), used_k, strict=True)]),
        v=pad([x[:n] for x, n in zip(v.split(list(n_k)), used_k, strict=True)]),
        scale=D**-0.5,
        mask=pad_masks([counted(t, s, -1, 0) for t, s in zip(used_q, used_k, strict=True)]),
    )


def test_version_3_cache(flash3: types.ModuleType) -> None:
    q, k_cache, v_cache = draw(B, 1, H, D, seed=1), draw(6, 2, G, D, seed=2), draw(6, 2, G, D, seed=3)
    table = torch.tensor([[5, 2, 0], [3, 4, 1]], dtype=torch.int32)
    call = cached(flash3, q, k_cache, v_cache, cache_seqlens=torch.tensor([5, 3]), page_table=table, causal=True)
    rows = list(zip(table, (5, 3), strict=True))
    check_call(
        call,
        q=q.transpose(1, 2),
        k=pad([from_pages(k_cache, t, n) for t, n in rows]),
        v=pad([from_pages(v_cache, t, n) for t, n in rows]),
        scale=D**-0.5,
        mask=pad_masks([counted(1, 5, -1, 0), counted(1, 3, -1, 0)]),
    )


def test_version_4_sinks_and_open_windows(give: Give) -> None:
    cute = give("flash_attn.cute.interface", Flash4)
    give("flash_attn.cute", flash_attn_func=cute.flash_attn_func)
    give("flash_attn")  # an installation that has no other version
    q, k, v = qkv()
    sinks = draw(H, seed=8)
    call = one(sys.modules["flash_attn.cute"].flash_attn_func, (q, k, v), window_size=(1, None), learnable_sink=sinks)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, sinks=sinks, mask=counted(T, S, 1, -1))


def test_the_same_interface_in_another_package(give: Give) -> None:
    vendor = give("vendor_kernels_1a2b.flash_attn_interface", Flash2)
    q, k, v = qkv()
    check_call(
        one(vendor.flash_attn_func, (q, k, v), causal=True), **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, -1, 0)
    )


# --------------------------------------------------------------------------------------------- what cannot be read


def test_an_argument_of_unknown_meaning_is_skipped_aloud(flash3: types.ModuleType) -> None:
    q, k, v = qkv()
    with pytest.warns(hookattn.SkippedWarning, match="qv"):
        made = trace(Calls(flash3.flash_attn_func, qv=torch.zeros(B, T, H, D)), (q, k, v))
    assert len(made) == 0 and "argument qv is not known" in made.skipped[0].reason


def test_scales_of_one_scale_nothing(flash3: types.ModuleType) -> None:
    q, k, v = qkv()
    call = one(flash3.flash_attn_func, (q, k, v), q_descale=torch.ones(B, G), k_descale=torch.ones(B, G))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, -1, -1))


def test_scales_that_scale_are_skipped_aloud(flash3: types.ModuleType) -> None:
    q, k, v = qkv()
    with pytest.warns(hookattn.SkippedWarning, match="v_descale is not 1"):
        assert not len(trace(Calls(flash3.flash_attn_func, v_descale=torch.full((B, G), 2.0)), (q, k, v)))


class Strange:
    """Other meanings by the same names."""

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, tree: Any = None, **more: Any) -> Any:
        return dense(q, k, v, None, False, None)

    @staticmethod
    def flash_attn_varlen_func(q: Any, k: Any, v: Any) -> Any:
        return q * 2


def test_other_meanings_by_the_same_name(give: Give) -> None:
    strange = give("strange.flash_attn_interface", Strange)
    q, k, v = qkv()
    assert one(strange.flash_attn_func, (q, k, v), tree=None) is not None
    for function, args, kwargs, reason in (
        (strange.flash_attn_func, (q, k, v), {"tree": torch.ones(2)}, "argument tree"),
        (strange.flash_attn_func, (q, k, v), {"branch": 1}, "argument more"),
        (strange.flash_attn_varlen_func, (q[0], k[0], v[0]), {}, "no lengths of sequences"),
        (strange.flash_attn_varlen_func, (q, k, [1]), {}, "do not fit"),
    ):
        made = trace_checked(trace, Calls(function, **kwargs), args, warns=True)
        assert len(made) == 0 and reason in made.skipped[0].reason


# --------------------------------------------------------------------------------------------- leaving it alone


class Writing:
    """A package whose function can write to a tensor of the caller's."""

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float = 0.0, out: Any = None) -> Any:
        made = dense(q, k, v, None, False, None, dropout=dropout_p)
        return made if out is None else out.copy_(made)


def test_an_output_that_was_written_to_is_not_written_to_again(give: Give) -> None:
    writing = give("writing.flash_attn_interface", Writing)
    q, k, v = qkv()
    call = one(writing.flash_attn_func, (q, k, v), dropout_p=0.5, out=torch.zeros(B, T, H, D))
    assert "without dropout" in call.certificate.basis and call.certificate.faithful
    model = Calls(writing.flash_attn_func, dropout_p=0.5)
    torch.manual_seed(3)
    out = torch.zeros(B, T, H, D)
    made = trace(model, {"q": q, "k": k, "v": v, "out": out})
    torch.manual_seed(3)
    assert same_bits(out, model(q, k, v)) and same_bits(made[0].output, out.transpose(1, 2))


class Wrapped:
    """A package whose functions are made of each other."""

    @staticmethod
    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False, dropout_p: float = 0.0) -> Any:
        return sys.modules["flash_attn"].flash_attn_func(q, k, v, dropout_p, causal=causal)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_functions_made_of_each_other_are_one_call(flash2: types.ModuleType, give: Give, dropout: float) -> None:
    outer = give("outer.flash_attn_interface", Wrapped)
    q, k, v = qkv()
    one(outer.flash_attn_func, (q, k, v), causal=True, dropout_p=dropout)


def test_a_function_of_two_modules_whose_own_is_not_loaded(give: Give, monkeypatch: pytest.MonkeyPatch) -> None:
    function = give("gone.flash_attn_interface", Flash2).flash_attn_func
    monkeypatch.delitem(sys.modules, "gone.flash_attn_interface")
    for name in ("one.flash_attn_interface", "two.flash_attn_interface"):
        give(name, flash_attn_func=function)
    q, k, v = qkv()
    check_call(one(function, (q, k, v), causal=True), **bhtd(q, k, v), scale=D**-0.5, mask=counted(T, S, -1, 0))


def test_restored_after_the_forward_raised(flash2: types.ModuleType) -> None:
    function = flash2.flash_attn_func
    code = function.__code__
    q, k, v = qkv()
    with pytest.raises(TypeError, match="no_such_argument"):
        trace(Calls(function, no_such_argument=1), (q, k, v))
    assert function.__code__ is code
    model = Calls(function)
    with pytest.raises(ZeroDivisionError), tracing(model):
        model(q, k, v)
        assert function.__code__ is not code
        raise ZeroDivisionError
    assert function.__code__ is code and function.__defaults__ is not None
    assert list(inspect.signature(function).parameters)[:4] == ["q", "k", "v", "dropout_p"]


def test_a_trace_in_another_thread_sees_nothing_of_ours(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    plain = flash2.flash_attn_func(q, k, v, causal=True)
    model = Calls(flash2.flash_attn_func, causal=True)
    ready, done, out = threading.Event(), threading.Event(), []

    def other() -> None:
        ready.wait()
        out.append(model(q, k, v))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tracing(model) as made:
        model(q, k, v)
        ready.set()
        assert done.wait(60)
    thread.join()
    assert len(made) == 1 and same_bits(out[0], plain)


def test_two_traces_at_once(flash2: types.ModuleType) -> None:
    q, k, v = qkv()
    barrier, traces = threading.Barrier(2), []

    def work() -> None:
        model = Calls(flash2.flash_attn_func, causal=True)
        with tracing(model) as made:
            barrier.wait(60)
            model(q, k, v)
            barrier.wait(60)
        traces.append(made)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(made) for made in traces] == [1, 1]


def test_nothing_is_imported() -> None:
    before = set(sys.modules)
    with pytest.raises(hookattn.NoAttentionError):
        trace(nn.Linear(2, 2), torch.ones(1, 2))
    assert not {name for name in set(sys.modules) - before if "flash" in name or "xformers" in name}


# ----------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def llama() -> Any:
    """Asked for before the stand-ins: what is imported with it looks for the real packages."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attn_implementation="sdpa",
        )
    ).eval()


def test_inside_a_function_registered_with_transformers(llama: Any, flash2: types.ModuleType) -> None:
    model, utils = llama, pytest.importorskip("transformers.modeling_utils")
    flash_attn_func = flash2.flash_attn_func

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attn_func(query, key, value, softmax_scale=scaling, causal=True), None

    utils.ALL_ATTENTION_FUNCTIONS.register("flash_standin", attend)
    try:
        ids = torch.arange(10).view(2, 5)
        sdpa = trace(model, {"input_ids": ids, "use_cache": False})
        model.config._attn_implementation = "flash_standin"
        made = trace_checked(trace, model, {"input_ids": ids, "use_cache": False}, verify="full")
    finally:
        del utils.ALL_ATTENTION_FUNCTIONS._global_mapping["flash_standin"]
    assert [call.tap for call in made] == ["flash_attn"] * 2 and not made.skipped
    for ours, theirs in zip(made, sdpa, strict=True):
        assert ours.certificate.faithful and ours.causal and tuple(ours.k.shape) == (2, 2, 5, 8)
        assert ours.site.path == theirs.site.path
        assert torch.allclose(ours.weights, theirs.weights, atol=1e-5)


def test_inside_the_flash_implementation_of_transformers(
    llama: Any, flash2: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, utils = llama, pytest.importorskip("transformers.modeling_flash_attention_utils")
    packed_func = flash2.flash_attn_varlen_func
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash2.flash_attn_func,
        "_flash_varlen_fn": packed_func,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(packed_func),
    }.items():
        monkeypatch.setattr(utils, name, value)
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    sdpa = trace(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    model.config._attn_implementation = "flash_attention_2"
    whole = trace_checked(trace, model, {"input_ids": ids, "use_cache": False})
    assert [call.tap for call in whole] == ["flash_attn"] * 2 and not whole.skipped
    made = trace_checked(trace, model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}, verify="full")
    assert [call.tap for call in made] == ["flash_attn"] * 2 and not made.skipped
    for ours, theirs in zip(made, sdpa, strict=True):
        assert "2 packed sequences, one a batch entry" in ours.notes
        assert torch.allclose(ours.weights[0], theirs.weights[0], atol=1e-5)
        assert torch.allclose(ours.weights[1, :, :4, :4], theirs.weights[1, :, 2:, 2:], atol=1e-5)
        assert not ours.weights[1, :, 4:].any() and not ours.mask[1, :, :, 4:].any()

    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    with tracing(model, verify="full") as steps:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [call.step for call in steps] == [0, 0, 1, 1, 2, 2] and not steps.skipped
    assert all(call.tap == "flash_attn" and call.certificate.faithful for call in steps)
    last = steps[-1]
    assert last.mask.sum(-1).flatten().tolist() == [8, 6] and tuple(last.weights.shape) == (2, 4, 1, 8)
