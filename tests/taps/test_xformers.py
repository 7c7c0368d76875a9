"""xformers, by a stand-in of its operator and of its bias classes: every call against float64 math."""

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
from tests.standins import Calls, Give, bent, counted, ends, give, table_of

__all__ = ["give"]  # a fixture

B, H, T, S, D = 2, 4, 3, 5, 8
NONE = torch.zeros(0)

# ------------------------------------------------------------------------------------- the classes of attn_bias


class AttentionBias:
    """What a query i of t sees of keys j of s, and what is added."""

    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        raise NotImplementedError

    def materialize(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        t, s = shape[-2:]
        seen = torch.tensor([[self.sees(i, j, t, s) for j in range(s)] for i in range(t)])
        return torch.zeros(shape, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


class LowerTriangularMask(Tensor, AttentionBias):
    """As in the package, this one poses as a tensor."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor = NONE) -> Any:
        made = Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype)  # type: ignore[attr-defined]
        made.content = content
        return made

    def __init__(self, content: Tensor = NONE) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented

    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        return j <= i

    def materialize(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        return AttentionBias.materialize(self, shape, dtype, device)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def materialize(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        return super().materialize(shape, dtype, device) + self.content


class LowerTriangularFromBottomRightMask(AttentionBias):
    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        return s - j >= t - i


class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    def __init__(self, _window_size: int) -> None:
        self._window_size = _window_size

    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        return t - i <= s - j < t - i + self._window_size


class LocalAttentionFromBottomRightMask(AttentionBias):
    def __init__(self, window_left: int, window_right: int) -> None:
        self.window_left, self.window_right = window_left, window_right

    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        return i - self.window_left <= j + t - s <= i + self.window_right


class BlockDiagonalMask(AttentionBias):
    """Blocks of queries and keys; those of the keys may have unused places behind them."""

    inner: Any = None

    def __init__(
        self,
        q: Sequence[int],
        k: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        room: int | None = None,
    ) -> None:
        self.q, self.k = q, q if k is None else k
        self.starts = ends(self.k)[:-1].tolist() if starts is None else starts
        self.room = sum(self.k) if room is None else room

    def sees(self, i: int, j: int, t: int, s: int) -> bool:
        first = 0
        for n, start, m in zip(self.q, self.starts, self.k, strict=True):
            if first <= i < first + n and start <= j < start + m:
                return self.inner is None or self.inner.sees(i - first, j - start, n, m)
            first += n
        return False

    def materialize(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        assert tuple(shape[-2:]) == (sum(self.q), self.room)
        return super().materialize(shape, dtype, device)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    inner = LowerTriangularMask()


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalMask):
    inner = LowerTriangularFromBottomRightMask()


class BlockDiagonalGappyKeysMask(BlockDiagonalMask):
    pass


class PagedBlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    block_tables = torch.zeros(1, 1)


class Unfinished(AttentionBias):
    def materialize(self, shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ the operator


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, p: float, scale: float | None) -> Tensor:
    """B M H K, B M K or B M G H K, in float32, head by head."""
    if not k.is_floating_point():
        return q * 1
    if q.dim() == 5:
        parts = [
            attend(
                q[:, :, g],
                k[:, :, g],
                v[:, :, g],
                bias[:, g] if type(bias) is Tensor and bias.dim() == 5 else bias,
                p,
                scale,
            )
            for g in range(q.shape[2])
        ]
        return torch.stack(parts, 2)
    if q.dim() == 3:
        return attend(q[:, :, None], k[:, :, None], v[:, :, None], bias, p, scale)[:, :, 0]
    t, s, out = q.shape[1], k.shape[1], q.new_zeros(*q.shape[:3], v.shape[3])
    added: Any = None
    if isinstance(bias, LowerTriangularMaskWithTensorBias):
        added = bias.content
    elif type(bias) is Tensor:
        added = bias if bias.dim() == 4 else bias[:, None]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            logits = (q[b, :, h].float()[:, None] * k[b, :, h].float()[None]).sum(-1)
            logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
            if added is not None:
                logits = logits + added.expand(q.shape[0], q.shape[2], t, s)[b, h].float()
            if hasattr(bias, "sees"):
                hidden = torch.tensor([[not bias.sees(i, j, t, s) for j in range(s)] for i in range(t)])
                logits = logits.masked_fill(hidden, -torch.inf)
            weights = torch.nn.functional.dropout(torch.softmax(logits, -1), p)
            out[b, :, h] = (weights[..., None] * v[b, :, h].float()[None]).sum(1).to(q.dtype)
    return out


class Xformers:
    """The functions of ``xformers.ops.fmha``."""

    @staticmethod
    def memory_efficient_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> Any:
        out = attend(query, key, value, attn_bias, p, scale)
        return out if output_dtype is None else out.to(output_dtype)

    @staticmethod
    def memory_efficient_attention_forward(
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> Any:
        return attend(query, key, value, attn_bias, p, scale)

    @staticmethod
    def memory_efficient_attention_forward_requires_grad(
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> Any:
        return attend(query, key, value, attn_bias, p, scale), torch.zeros(1)

    @staticmethod
    def memory_efficient_attention_partial(
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> Any:
        return attend(query, key, value, attn_bias, p, scale), torch.zeros(1)


@pytest.fixture
def ops(give: Give) -> types.ModuleType:
    """The module users import from; the functions are defined one deeper."""
    fmha = give("xformers.ops.fmha", Xformers)
    return give("xformers.ops", fmha=fmha, **{k: getattr(fmha, k) for k in vars(Xformers) if k.startswith("memory")})


def qkv(
    t: int = T, s: int = S, e: int = D, b: int = B, h: int = H, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(b, t, h, D, seed=1, dtype=dtype),
        draw(b, s, h, D, seed=2, dtype=dtype),
        draw(b, s, h, e, seed=3, dtype=dtype),
    )


def bhtd(*tensors: Tensor) -> dict[str, Tensor]:
    return {name: x.transpose(1, 2) for name, x in zip("qkv", tensors, strict=True)}


def one(ops: types.ModuleType, inputs: Any, name: str = "memory_efficient_attention", **kwargs: Any) -> Any:
    made = trace_checked(trace, Calls(getattr(ops, name), **kwargs), inputs, verify="full")
    assert len(made) == 1 and not made.skipped, made.skipped
    assert made[0].tap == "xformers"
    return made[0]


# ------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", [name for name in vars(Xformers) if name.startswith("memory")])
def test_every_form_of_the_operator(ops: types.ModuleType, name: str) -> None:
    q, k, v = qkv(e=6)
    call = one(ops, (q, k, v, None, 0.0, 0.3), name)
    check_call(call, **bhtd(q, k, v), scale=0.3, output=attend(q, k, v, None, 0.0, 0.3).transpose(1, 2))
    assert not call.causal


def test_one_head_without_an_axis(ops: types.ModuleType) -> None:
    q, k, v = (x[:, :, 0] for x in qkv())
    bias = draw(B, T, S, seed=7)
    call = one(ops, (q, k, v, bias))
    check_call(call, q=q[:, None], k=k[:, None], v=v[:, None], scale=D**-0.5, bias=bias[:, None])


def test_groups_whose_keys_are_there_once(ops: types.ModuleType) -> None:
    q = draw(B, T, 2, 3, D, seed=1)
    k, v = (draw(B, S, 2, 1, D, seed=n).expand(-1, -1, -1, 3, -1) for n in (2, 3))
    call = one(ops, (q, k, v))
    check_call(
        call,
        q=q.flatten(2, 3).transpose(1, 2),
        k=k[:, :, :, 0].transpose(1, 2),
        v=v[:, :, :, 0].transpose(1, 2),
        scale=D**-0.5,
    )


def test_groups_with_keys_of_their_own(ops: types.ModuleType) -> None:
    q, k, v = draw(B, T, 2, 3, D, seed=1), draw(B, S, 2, 3, D, seed=2), draw(B, S, 2, 3, D, seed=3)
    bias = draw(B, 2, 3, T, S, seed=7)
    call = one(ops, (q, k, v, bias))
    check_call(call, **bhtd(*(x.flatten(2, 3) for x in (q, k, v))), scale=D**-0.5, bias=bias.flatten(1, 2))
    call = one(ops, (q, k, v, bias[:, :, :1]))
    check_call(
        call,
        **bhtd(*(x.flatten(2, 3) for x in (q, k, v))),
        scale=D**-0.5,
        bias=bias[:, :, :1].expand(-1, -1, 3, -1, -1).flatten(1, 2),
    )


def test_one_key_head_for_all_queries(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    k, v = (x[:, :, :1].expand(-1, -1, H, -1) for x in (k, v))
    check_call(one(ops, (q, k, v)), **bhtd(q, k[:, :, :1], v[:, :, :1]), scale=D**-0.5)


def test_keys_by_broadcasting_and_values_not(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    k = k[:, :, :1].expand(-1, -1, H, -1)
    check_call(one(ops, (q, k, v)), **bhtd(q, k, v), scale=D**-0.5)
    q, v = draw(B, T, 2, 3, D, seed=1), draw(B, S, 2, 3, D, seed=3)
    k = draw(B, S, 2, 1, D, seed=2).expand(-1, -1, -1, 3, -1)
    check_call(one(ops, (q, k, v)), **bhtd(*(x.flatten(2, 3) for x in (q, k, v))), scale=D**-0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_output_dtype(ops: types.ModuleType, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    call = one(ops, (q, k, v), output_dtype=torch.float32)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5)
    assert call.output.dtype == torch.float32


def test_dropout(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    call = one(ops, (q, k, v, LowerTriangularFromBottomRightMask()), p=0.5)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, dropout=0.5, mask=counted(T, S, -1, 0))
    assert "without dropout" in call.certificate.basis


# ------------------------------------------------------------------------------------------------ biases, masks


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -10_000.0])
def test_a_tensor_of_bias_and_mask(ops: types.ModuleType, low: float) -> None:
    q, k, v = qkv()
    keep = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[..., 0] = True
    bias = draw(B, H, T, S, seed=7)
    given = torch.where(keep, bias, low)
    check_call(one(ops, (q, k, v, given)), **bhtd(q, k, v), scale=D**-0.5, bias=bias, mask=keep, masked_scores=False)


def test_a_bias_that_needs_a_gradient(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    bias = draw(1, H, T, S, seed=7).requires_grad_()
    call = one(ops, (q, k, v, bias))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, bias=bias)
    out = trace(Calls(ops.memory_efficient_attention), (q, k, v, bias)).output
    out.sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize(
    ("bias", "rows", "causal", "window"),
    [
        (LowerTriangularMask(), ("10000", "11000", "11100"), True, None),
        (LowerTriangularFromBottomRightMask(), ("11100", "11110", "11111"), True, None),
        (LowerTriangularFromBottomRightLocalAttentionMask(2), ("01100", "00110", "00011"), True, 2),
        (LocalAttentionFromBottomRightMask(1, 1), ("01110", "00111", "00011"), False, None),
        (LocalAttentionFromBottomRightMask(2, 0), ("11100", "01110", "00111"), False, None),
    ],
)
def test_masks_as_they_are_printed(
    ops: types.ModuleType, bias: Any, rows: tuple[str, ...], causal: bool, window: int | None
) -> None:
    q, k, v = qkv()
    call = one(ops, (q, k, v), attn_bias=bias)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=table_of(*rows))
    assert (call.causal, call.window) == (causal, window)
    assert call.notes == (f"the mask is that of a {type(bias).__name__}",)


def test_the_triangle_is_aligned_to_the_top_with_more_queries_than_keys(ops: types.ModuleType) -> None:
    q, k, v = qkv(4, 2)
    call = one(ops, (q, k, v), attn_bias=LowerTriangularMask())
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=table_of("10", "11", "11", "11"))


def test_a_triangle_with_a_tensor(ops: types.ModuleType) -> None:
    q, k, v = qkv(T, T)
    bias = bent(torch.tensor([0.5, 0.25, 2.0, 1.0]), T, T).expand(B, H, T, T).contiguous()
    call = one(ops, (q, k, v), attn_bias=LowerTriangularMaskWithTensorBias(bias))
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, bias=bias, mask=counted(T, T, -1, 0), masked_scores=False)


def test_a_triangle_over_groups(ops: types.ModuleType) -> None:
    q, k, v = draw(B, T, 2, 3, D, seed=1), draw(B, T, 2, 3, D, seed=2), draw(B, T, 2, 3, D, seed=3)
    call = one(ops, (q, k, v), attn_bias=LowerTriangularMask())
    check_call(call, **bhtd(*(x.flatten(2, 3) for x in (q, k, v))), scale=D**-0.5, mask=counted(T, T, -1, 0))


@pytest.mark.parametrize(
    ("bias", "rows"),
    [
        (BlockDiagonalMask((2, 1), (3, 2)), ("11100", "11100", "00011")),
        (BlockDiagonalCausalMask((2, 1), (3, 2)), ("10000", "11000", "00010")),
        (BlockDiagonalCausalWithOffsetPaddedKeysMask((2, 1), (3, 2), (0, 4), 8), ("11000000", "11100000", "00001100")),
        (BlockDiagonalGappyKeysMask((1, 2), (2, 3), (1, 5), 9), ("011000000", "000001110", "000001110")),
    ],
)
def test_packed_sequences_stay_in_one_batch_entry(ops: types.ModuleType, bias: Any, rows: tuple[str, ...]) -> None:
    q, k, v = qkv(3, len(rows[0]), b=1)
    call = one(ops, (q, k, v), attn_bias=bias)
    check_call(call, **bhtd(q, k, v), scale=D**-0.5, mask=table_of(*rows))


# --------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_bias": PagedBlockDiagonalPaddedKeysMask((3,), (5,))}, "pages of a cache"),
        ({"attn_bias": BlockDiagonalMask((2,), (4,))}, "do not fit"),
        ({"key": torch.zeros(1, 5, H, D, dtype=torch.int32)}, "quantized"),
    ],
)
def test_skipped_aloud(ops: types.ModuleType, change: dict[str, Any], reason: str) -> None:
    q, k, v = qkv(b=1)
    with pytest.warns(hookattn.SkippedWarning, match=reason):
        made = trace(Calls(ops.memory_efficient_attention), {"query": q, "key": k, "value": v, **change})
    assert len(made) == 0 and reason in made.skipped[0].reason


def test_a_bias_that_cannot_be_formed(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    Unfinished.sees = lambda *_: True  # type: ignore[method-assign]
    made = trace_checked(trace, Calls(ops.memory_efficient_attention, attn_bias=Unfinished()), (q, k, v), warns=True)
    assert len(made) == 0 and "NotImplementedError" in made.skipped[0].reason


# --------------------------------------------------------------------------------------------- leaving it alone


def test_restored_after_the_forward_raised(ops: types.ModuleType) -> None:
    function = ops.memory_efficient_attention
    assert function is sys.modules["xformers.ops.fmha"].memory_efficient_attention
    code = function.__code__
    with pytest.raises(TypeError):
        trace(Calls(function), (torch.zeros(1),))
    assert function.__code__ is code


def test_gradients_are_left_alone(ops: types.ModuleType) -> None:
    def grads(traced: bool) -> list[Tensor | None]:
        inputs = tuple(x.requires_grad_() for x in qkv())
        model = Calls(ops.memory_efficient_attention)
        out = trace(model, inputs).output if traced else model(*inputs)
        out.square().sum().backward()
        return [x.grad for x in inputs]

    assert same_bits(grads(True), grads(False))


def test_a_trace_in_another_thread_sees_nothing_of_ours(ops: types.ModuleType) -> None:
    q, k, v = qkv()
    model = Calls(ops.memory_efficient_attention)
    plain, out = model(q, k, v), []
    with tracing(model) as made:
        model(q, k, v)
        thread = threading.Thread(target=lambda: out.append(model(q, k, v)))
        thread.start()
        thread.join()
    assert len(made) == 1 and same_bits(out[0], plain)
