"""torch's own attention over packed sequences: the installed functions over a kernel that runs here, and stand-ins."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import trace, tracing
from tests.reference import check_call, draw, same_bits, trace_checked
from tests.standins import Calls, Give, counted, ends, from_pages, give, packed, pad, pad_masks

__all__ = ["give"]  # a fixture

H, G, D = 4, 2, 8
NAME = "torch.nn.attention.varlen"


class Varlen:
    """The functions of ``torch.nn.attention.varlen`` in torch 2.13."""

    @staticmethod
    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: Any = None,
        window_size: Any = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Any = None,
        block_table: Any = None,
        num_splits: Any = None,
    ) -> Any:
        out = packed(
            query, key, value, cu_seq_q, cu_seq_k, scale, False, window_size, used_k=seqused_k, table=block_table
        )
        return (out, torch.zeros(1)) if return_aux else out

    @staticmethod
    def varlen_attn_out(
        out: Any,
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: Any = None,
        window_size: Any = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: Any = None,
        block_table: Any = None,
        num_splits: Any = None,
    ) -> Any:
        return out.copy_(
            packed(
                query, key, value, cu_seq_q, cu_seq_k, scale, False, window_size, used_k=seqused_k, table=block_table
            )
        )


class Older:
    """The function as it was when it had ``is_causal``."""

    @staticmethod
    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        return_aux: Any = None,
    ) -> Any:
        return packed(query, key, value, cu_seq_q, cu_seq_k, None, is_causal, None)


@pytest.fixture
def varlen(give: Give) -> types.ModuleType:
    return give(NAME, Varlen)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed functions; their kernel wants a GPU and is stood in for."""
    module = pytest.importorskip(NAME)
    given: list[tuple[Any, ...]] = []

    def kernel(
        query: Any,
        key: Any,
        value: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        is_causal: bool,
        scale: Any,
        window: Any,
        gqa: bool,
        used: Any,
        table: Any,
        splits: Any,
    ) -> Any:
        given.append((query, key, value))
        out = packed(query, key, value, cu_q, cu_k, scale, is_causal, window, used_k=used, table=table)
        return out, torch.zeros(1), torch.zeros(1)

    def kernel_out(out: Any, *args: Any) -> Any:
        out.copy_(kernel(*args)[0])
        return torch.zeros(1)

    ops = torch.ops.torch_attn
    monkeypatch.setattr(ops, "_varlen_attn", kernel)
    monkeypatch.setattr(ops, "_varlen_attn_out", kernel_out, raising=False)
    code = module.varlen_attn.__code__
    yield module
    assert given and module.varlen_attn.__code__ is code


def inputs(n_q: Sequence[int], n_k: Sequence[int], g: int = G) -> tuple[Any, ...]:
    q, k, v = draw(sum(n_q), H, D, seed=4), draw(sum(n_k), g, D, seed=5), draw(sum(n_k), g, D, seed=6)
    return q, k, v, ends(n_q), ends(n_k), max(n_q), max(n_k)


def as_batch(n_q: Sequence[int], n_k: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"q": pad(q.split(list(n_q))), "k": pad(k.split(list(n_k))), "v": pad(v.split(list(n_k)))}


def one(function: Any, args: Any, **kwargs: Any) -> Any:
    made = trace_checked(trace, Calls(function, **kwargs), args, verify="full")
    assert len(made) == 1 and not made.skipped, made.skipped
    assert made[0].tap == "varlen_attn"
    return made[0]


LENGTHS = [((3, 1, 4), (3, 1, 4)), ((2, 3), (5, 4)), ((4, 2), (2, 4)), ((3, 3), (3, 3))]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1), (1, 2)])
@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_sequences(
    varlen: types.ModuleType, n_q: tuple[int, ...], n_k: tuple[int, ...], window: tuple[int, int]
) -> None:
    args = inputs(n_q, n_k)
    call = one(varlen.varlen_attn, args, window_size=window, enable_gqa=True)
    masks = [counted(t, s, *window) for t, s in zip(n_q, n_k, strict=True)]
    check_call(
        call,
        **as_batch(n_q, n_k, *args[:3]),
        scale=D**-0.5,
        mask=pad_masks(masks),
        output=pad(varlen.varlen_attn(*args, window_size=window).split(list(n_q))),
    )
    assert call.causal == (window[1] == 0)


@pytest.mark.parametrize(("n_q", "n_k"), LENGTHS)
def test_the_installed_function(real: Any, n_q: tuple[int, ...], n_k: tuple[int, ...]) -> None:
    args = inputs(n_q, n_k)
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    call = one(real.varlen_attn, dict(zip(names, args, strict=True)), window_size=(-1, 0), scale=0.3, enable_gqa=True)
    masks = [counted(t, s, -1, 0) for t, s in zip(n_q, n_k, strict=True)]
    check_call(call, **as_batch(n_q, n_k, *args[:3]), scale=0.3, mask=pad_masks(masks))


def test_the_installed_function_that_writes_to_a_tensor(real: Any) -> None:
    if not hasattr(real, "varlen_attn_out"):
        pytest.skip("this torch has none")
    n = (3, 1, 4)
    args = inputs(n, n)
    out = torch.zeros(8, H, D)
    call = one(real.varlen_attn_out, (out, *args), enable_gqa=True)
    check_call(
        call,
        **as_batch(n, n, *args[:3]),
        scale=D**-0.5,
        output=pad(out.split(list(n))),
        mask=pad_masks([counted(t, t, -1, -1) for t in n]),
    )


def test_log_sum_exp_beside_it_and_an_output_of_ones_own(varlen: types.ModuleType) -> None:
    n = (3, 1, 4)
    args, out = inputs(n, n), torch.zeros(8, H, D)
    mask = pad_masks([counted(t, t, -1, -1) for t in n])
    check_call(one(varlen.varlen_attn, args, return_aux=True), **as_batch(n, n, *args[:3]), scale=D**-0.5, mask=mask)
    call = one(varlen.varlen_attn_out, (out, *args))
    check_call(call, **as_batch(n, n, *args[:3]), scale=D**-0.5, mask=mask, output=pad(out.split(list(n))))


def test_keys_of_which_only_a_part_is_used(varlen: types.ModuleType) -> None:
    n_q, n_k, used = (1, 1), (4, 5), (4, 2)
    q, k, v, *rest = inputs(n_q, n_k)
    call = one(varlen.varlen_attn, (q, k, v, *rest), seqused_k=torch.tensor(used), window_size=(-1, 0))
    check_call(
        call,
        q=pad(q.split([1, 1])),
        k=pad([k[:4], k[4:6]]),
        v=pad([v[:4], v[4:6]]),
        scale=D**-0.5,
        mask=pad_masks([counted(1, 4, -1, 0), counted(1, 2, -1, 0)]),
    )


@pytest.mark.parametrize("ends_k", [None, ends((5, 3))])
def test_pages(varlen: types.ModuleType, ends_k: Tensor | None) -> None:
    q, k, v = draw(3, H, D, seed=4), draw(6, 2, G, D, seed=5), draw(6, 2, G, D, seed=6)
    table, used = torch.tensor([[4, 0, 5], [1, 3, -7]], dtype=torch.int32), torch.tensor([5, 3])
    call = one(
        varlen.varlen_attn,
        (q, k, v, ends((2, 1)), ends_k, 2, 5),
        seqused_k=used,
        block_table=table,
        window_size=(-1, 0),
    )
    rows = list(zip(table, (5, 3), strict=True))
    check_call(
        call,
        q=pad(q.split([2, 1])),
        k=pad([from_pages(k, t, n) for t, n in rows]),
        v=pad([from_pages(v, t, n) for t, n in rows]),
        scale=D**-0.5,
        mask=pad_masks([counted(2, 5, -1, 0), counted(1, 3, -1, 0)]),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_an_older_signature(give: Give, causal: bool) -> None:
    older = give(NAME, Older)
    n_q, n_k = (2, 3), (5, 4)
    args = inputs(n_q, n_k)
    call = one(older.varlen_attn, (*args, causal))
    masks = [counted(t, s, -1, 0 if causal else -1) for t, s in zip(n_q, n_k, strict=True)]
    check_call(call, **as_batch(n_q, n_k, *args[:3]), scale=D**-0.5, mask=pad_masks(masks))


def test_no_ends_of_keys_is_skipped_aloud(give: Give) -> None:
    class Loose:
        @staticmethod
        def varlen_attn(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any) -> Any:
            return query * 2

    function = give(NAME, Loose).varlen_attn
    q, k, v, n, *_ = inputs((2, 1), (2, 1))
    with pytest.warns(hookattn.SkippedWarning, match="no lengths of sequences"):
        made = trace(Calls(function), (q, k, v, n, None))
    assert len(made) == 0
    made = trace_checked(trace, Calls(function), (q, k, v, n, ends((1, 1, 1))), warns=True)
    assert made.skipped[0].reason == "varlen_attn: 2 sequences of queries and 3 of keys"
    made = trace_checked(trace, Calls(function), (q[:0], k, v, ends((0, 0)), ends((2, 1))), warns=True)
    assert made.skipped[0].reason == "varlen_attn: there is no token in any sequence"


def test_restored_after_the_forward_raised(varlen: types.ModuleType) -> None:
    code = varlen.varlen_attn.__code__
    with pytest.raises(TypeError):
        trace(Calls(varlen.varlen_attn), (torch.zeros(1),))
    assert varlen.varlen_attn.__code__ is code


def test_a_trace_in_another_thread_sees_nothing_of_ours(varlen: types.ModuleType) -> None:
    n = (3, 1, 4)
    args, out = inputs(n, n), []
    model = Calls(varlen.varlen_attn)
    plain = model(*args)
    with tracing(model) as made:
        model(*args)
        thread = threading.Thread(target=lambda: out.append(model(*args)))
        thread.start()
        thread.join()
    assert len(made) == 1 and same_bits(out[0], plain)


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(hookattn.NoAttentionError):
        trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    assert NAME not in sys.modules
