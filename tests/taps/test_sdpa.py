"""torch's scaled_dot_product_attention, called by modules of the user's own, with every argument it has."""

from __future__ import annotations

import math
from typing import Any

import einops
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hookattn
from tests.reference import (
    alibi,
    assert_untouched,
    causal,
    check_call,
    draw,
    heads,
    paths,
    same_bits,
    snapshot,
    trace_checked,
)

B, H, T, S, D, E = 2, 4, 5, 7, 8, 32


class Sdpa(nn.Module):
    """Nothing but the call, with keywords."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **self.kwargs)


class Host(nn.Module):
    """A model around one attention module, so that it has a path."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": attn})])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.blocks[0]["attn"](*inputs)


def qkv(
    n_k: int = S, groups: int = H, width: int = D, dtype: torch.dtype = torch.float32, std: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    q = draw(B, H, T, D, seed=1, std=std, dtype=dtype)
    k = draw(B, groups, n_k, D, seed=2, std=std, dtype=dtype)
    return q, k, draw(B, groups, n_k, width, seed=3, dtype=dtype)


def trace_one(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """Exactly one call, nothing skipped, nothing changed; returns the trace."""
    import hookattn

    trace = trace_checked(hookattn.trace, model, inputs, **options)
    assert len(trace.calls) == 1, paths(trace.calls)
    assert not list(trace.skipped)
    assert "sdpa" in trace.calls[0].tap or "scaled_dot_product" in trace.calls[0].tap
    return trace


# --------------------------------------------------------------------------------------------- arguments


def test_plain() -> None:
    q, k, v = qkv()
    trace = trace_one(Host(Sdpa()), (q, k, v))
    assert paths(trace.calls) == ["blocks.0.attn"]
    call = trace.calls[0]
    check_call(call, q=q, k=k, v=v, scale=D**-0.5, output=trace.output)
    assert call.site.layer == 0
    assert call.step == 0
    assert not call.causal
    assert not call.window
    assert call.mask.all()
    assert trace.calls[0].certificate.max_error < 1e-5


def test_value_width_differs() -> None:
    q, k, v = qkv(width=3)
    trace = trace_one(Sdpa(), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=trace.output)
    assert trace.calls[0].output.shape == (B, H, T, 3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_scale(scale: float) -> None:
    q, k, v = qkv()
    trace = trace_one(Sdpa(scale=scale), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=scale, output=trace.output)


@pytest.mark.parametrize("n_k", [T, S, 3])
def test_is_causal(n_k: int) -> None:
    """The kernel's causal flag is aligned to the upper left, whatever the lengths."""
    q, k, v = qkv(n_k=n_k)
    trace = trace_one(Sdpa(is_causal=True), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(T, n_k), output=trace.output)
    assert trace.calls[0].causal


def test_one_query_causal() -> None:
    q, k, v = qkv()
    q = q[:, :, :1].contiguous()
    trace = trace_one(Sdpa(is_causal=True), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(1, S), output=trace.output)


MASK_SHAPES = [
    (T, S),
    (1, S),
    (1, 1),
    (B, 1, 1, S),
    (B, H, T, S),
    (1, H, T, S),
    (B, 1, T, S),
    (H, T, S),
    (1, T, S),
    (1, 1, T, S),
    (1, 1, 1, S),
    (B, H, 1, S),
    (1, H, 1, S),
    (B, 1, T, 1),
]
mask_shapes = pytest.mark.parametrize("shape", MASK_SHAPES, ids=["x".join(map(str, shape)) for shape in MASK_SHAPES])


def some_mask(shape: tuple[int, ...]) -> Tensor:
    """About a third is forbidden; the first key never is."""
    mask = draw(*shape, seed=7) > -0.4
    mask[..., 0] = True
    return mask


@mask_shapes
def test_bool_mask(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = some_mask(shape)
    trace = trace_one(Sdpa(), (q, k, v, mask))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)
    assert not trace.calls[0].causal


@mask_shapes
def test_float_mask_is_a_bias(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    bias = draw(*shape, seed=8)
    trace = trace_one(Sdpa(), (q, k, v, bias))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=bias, output=trace.output)


@pytest.mark.parametrize("shape", [shape for shape in MASK_SHAPES if shape[-1] == S])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -10000.0, -100.0])
def test_float_mask_of_zero_and_a_fill(shape: tuple[int, ...], fill: float) -> None:
    """0 and one very low number: a mask, and no bias."""
    q, k, v = qkv()
    mask = some_mask(shape)
    assert not mask.all()
    trace = trace_one(Sdpa(), (q, k, v, torch.zeros(shape).masked_fill(~mask, fill)))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


def test_float_mask_that_forbids_nothing() -> None:
    """All zeros: a bias of zeros is as true as none."""
    q, k, v = qkv()
    trace = trace_one(Sdpa(), (q, k, v, torch.zeros(1, 1, T, S)))
    call = trace.calls[0]
    assert call.mask.all()
    assert call.bias is None or not call.bias.any()
    assert same_bits(call.output, trace.output)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e30])
def test_bias_and_mask_summed(fill: float) -> None:
    """ALiBi where attention is allowed, a fill where it is not."""
    q, k, v = qkv(n_k=T)
    bias, mask = alibi(H, T, T), causal(T)
    trace = trace_one(Sdpa(), (q, k, v, bias.masked_fill(~mask, fill)))
    check_call(
        trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=bias, mask=mask, output=trace.output, masked_scores=False
    )


def test_bias_and_mask_added() -> None:
    """The minimum is added to the bias, not written over it."""
    q, k, v = qkv()
    bias, mask = draw(1, H, T, S, seed=8), some_mask((B, 1, 1, S))
    additive = bias + torch.zeros(B, 1, 1, S).masked_fill(~mask, torch.finfo(torch.float32).min)
    trace = trace_one(Sdpa(), (q, k, v, additive))
    check_call(
        trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=bias, mask=mask, output=trace.output, masked_scores=False
    )


def test_alibi_with_steep_slopes_is_no_mask() -> None:
    """A bias may be below -100 and still be a bias."""
    q, k, v = qkv()
    bias = alibi(H, T, S) * 200
    assert bias.min() < -100
    trace = trace_one(Sdpa(), (q, k, v, bias))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=bias, output=trace.output)


@pytest.mark.parametrize("kind", ["bool", "minus_inf"])
def test_row_without_keys(kind: str) -> None:
    """One query may attend to nothing: its mask row is empty and its derived weights are 0."""
    q, k, v = qkv()
    mask = some_mask((B, 1, T, S))
    mask[0, 0, 2] = False
    given = mask if kind == "bool" else torch.zeros(B, 1, T, S).masked_fill(~mask, -math.inf)
    trace = trace_one(Sdpa(), (q, k, v, given), warns=True)
    call = trace.calls[0]
    check_call(call, q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)
    assert not call.weights[0, :, 2].any()
    assert not call.weights.isnan().any()


# ---------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "causal", "bias"])
def test_dtypes(dtype: torch.dtype, kind: str) -> None:
    q, k, v = qkv(n_k=T, dtype=dtype, std=0.7)
    bias = draw(1, H, T, T, seed=8).to(dtype) if kind == "bias" else None
    model = Sdpa(is_causal=True) if kind == "causal" else Sdpa()
    trace = trace_one(model, (q, k, v) if bias is None else (q, k, v, bias))
    mask = causal(T) if kind == "causal" else None
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=bias, mask=mask, output=trace.output)
    assert trace.calls[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_minimum_of_a_small_dtype(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype, std=0.7)
    mask = some_mask((B, 1, 1, S))
    additive = torch.zeros(B, 1, 1, S, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    trace = trace_one(Sdpa(), (q, k, v, additive))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


# ------------------------------------------------------------------------------------------ grouped heads


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_enable_gqa(groups: int, is_causal: bool) -> None:
    q = draw(B, 8, T, D, seed=1)
    _, k, v = qkv(groups=groups)
    trace = trace_one(Sdpa(enable_gqa=True, is_causal=is_causal), (q, k, v))
    mask = causal(T, S) if is_causal else None
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)
    assert trace.calls[0].k.shape[1] == groups


class Repeats(nn.Module):
    """Every way to repeat key heads before the kernel."""

    def __init__(self, how: str, heads: int) -> None:
        super().__init__()
        self.how, self.heads = how, heads

    def repeated(self, x: Tensor) -> Tensor:
        b, g, s, d = x.shape
        r = self.heads // g
        if self.how == "method":
            return x.repeat_interleave(r, dim=1)
        if self.how == "function":
            return torch.repeat_interleave(x, r, 1)
        if self.how == "expand_reshape":
            return x[:, :, None, :, :].expand(b, g, r, s, d).reshape(b, g * r, s, d)
        if self.how == "unsqueeze_repeat_flatten":
            return x.unsqueeze(2).repeat(1, 1, r, 1, 1).flatten(1, 2)
        if self.how == "einops":
            return einops.repeat(x, "b g s d -> b (g r) s d", r=r)
        if self.how == "heads_last":
            return x.transpose(1, 2).repeat_interleave(r, dim=2).transpose(1, 2)
        assert self.how == "expand" and g == 1
        return x.expand(-1, self.heads, -1, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), is_causal=True)


@pytest.mark.parametrize(
    ("how", "groups"),
    [
        ("method", 2),
        ("function", 2),
        ("expand_reshape", 2),
        ("unsqueeze_repeat_flatten", 2),
        ("einops", 2),
        ("heads_last", 2),
        ("method", 1),
        ("expand_reshape", 1),
        ("expand", 1),
    ],
)
def test_repeated_heads_are_recorded_once(how: str, groups: int) -> None:
    q = draw(B, 8, T, D, seed=1)
    _, k, v = qkv(groups=groups)
    trace = trace_one(Repeats(how, 8), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(T, S), output=trace.output)


# --------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_in_train_mode(is_causal: bool) -> None:
    """The output is the dropped one, bit for bit; the weights are those before dropout."""

    class Dropping(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            p = 0.4 if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal)

    q, k, v = qkv()
    mask = causal(T, S) if is_causal else None
    model = Dropping().train()
    trace = trace_one(model, (q, k, v), seed=9)
    assert model.training
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output, dropout=0.4)
    trace = trace_one(model.eval(), (q, k, v), seed=9)
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


# --------------------------------------------------------------------------------------------- layouts


def test_single_head_3d() -> None:
    """B T D straight from the inputs: one head."""
    q, k, v = draw(B, T, D, seed=1), draw(B, S, D, seed=2), draw(B, S, D, seed=3)
    trace = trace_one(Sdpa(), (q, k, v))
    check_call(trace.calls[0], q=q[:, None], k=k[:, None], v=v[:, None], scale=D**-0.5, output=trace.output[:, None])


def test_single_head_3d_from_projections() -> None:
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(E, D)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)

    model, x = OneHead(), draw(B, T, E)
    trace = trace_one(model, x)
    q, k, v = (linear(x)[:, None] for linear in (model.q, model.k, model.v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(T), output=trace.output[:, None])


def test_unbatched_2d() -> None:
    q, k, v = draw(T, D, seed=1), draw(S, D, seed=2), draw(S, D, seed=3)
    trace = trace_one(Sdpa(), (q, k, v))
    args = {name: t[None, None] for name, t in (("q", q), ("k", k), ("v", v), ("output", trace.output))}
    check_call(trace.calls[0], **args, scale=D**-0.5)


def test_leading_axes_5d() -> None:
    """An axis of windows before the heads joins the batch."""
    q, k, v = (draw(B, 3, H, T, D, seed=i) for i in range(3))
    trace = trace_one(Sdpa(), (q, k, v))
    args = {name: t.flatten(0, 1) for name, t in (("q", q), ("k", k), ("v", v), ("output", trace.output))}
    check_call(trace.calls[0], **args, scale=D**-0.5)


class Folded(nn.Module):
    """Heads in the batch, in several hands."""

    def __init__(self, how: str, masked: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
        self.how, self.masked = how, masked

    def fold(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.how == "view_transpose_reshape":
            return x.view(b, n, H, D).transpose(1, 2).reshape(b * H, n, D)
        if self.how == "reshape_permute_reshape":
            return x.reshape(b, n, H, D).permute(0, 2, 1, 3).reshape(b * H, n, D)
        if self.how == "einops":
            return einops.rearrange(x, "b n (h d) -> (b h) n d", h=H)
        if self.how == "flatten":
            return x.unflatten(-1, (H, D)).transpose(1, 2).flatten(0, 1)
        if self.how == "chunk_cat":
            return torch.stack(x.chunk(H, dim=-1), dim=1).view(b * H, n, D)
        assert self.how == "time_first"
        return x.transpose(0, 1).contiguous().view(n, b * H, D).transpose(0, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.fold(self.to_q(x)), self.fold(self.to_k(y)), self.fold(self.to_v(y))
        mask = folded_mask().repeat_interleave(H, dim=0) if self.masked else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.how == "time_first":
            return out.transpose(0, 1).reshape(T, B, E).transpose(0, 1)
        return out.view(B, H, T, D).transpose(1, 2).reshape(B, T, E)


def folded_mask() -> Tensor:
    """B T S."""
    return some_mask((B, T, S))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "how",
    ["view_transpose_reshape", "reshape_permute_reshape", "einops", "flatten", "chunk_cat", "time_first"],
)
def test_heads_folded_into_the_batch(how: str, masked: bool) -> None:
    model, x, y = Folded(how, masked), draw(B, T, E, seed=1, std=1.5), draw(B, S, E, seed=2, std=1.5)
    trace = trace_one(model, (x, y))
    q, k, v = heads(model.to_q(x), H), heads(model.to_k(y), H), heads(model.to_v(y), H)
    mask = folded_mask()[:, None] if masked else None
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=heads(trace.output.contiguous(), H))


# ------------------------------------------------------------------------------------ ways of calling


class ByName(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3)


class AllKeywords(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            value=v, key=k, query=q, scale=0.3, is_causal=False, dropout_p=0.0, attn_mask=mask
        )


class ThroughTorchNn(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)


class KeptOnTheModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = F.scaled_dot_product_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.kernel(q, k, v, mask, scale=0.3)


@pytest.mark.parametrize("kind", [ByName, AllKeywords, ThroughTorchNn, KeptOnTheModule])
def test_ways_of_calling(kind: type[nn.Module]) -> None:
    q, k, v = qkv()
    mask = some_mask((B, 1, T, S))
    trace = trace_one(kind(), (q, k, v, mask))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=0.3, mask=mask, output=trace.output)


def test_inputs_as_a_dict() -> None:
    q, k, v = qkv()
    trace = trace_one(Sdpa(), {"q": q, "k": k, "v": v})
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=trace.output)


def test_several_calls_in_one_forward() -> None:
    import hookattn

    class Thrice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for i in range(3):
                q = F.scaled_dot_product_attention(q, k, v, scale=0.1 * (i + 1))
            return q

    q, k, v = qkv()
    trace = trace_checked(hookattn.trace, Host(Thrice()), (q, k, v))
    assert paths(trace.calls) == ["blocks.0.attn"] * 3
    for i, call in enumerate(trace.calls):
        check_call(call, q=q, k=k, v=v, scale=0.1 * (i + 1))
        q = F.scaled_dot_product_attention(q, k, v, scale=0.1 * (i + 1))
    assert torch.equal(q, trace.output)


def test_inputs_overwritten_afterwards() -> None:
    """What was captured is what the kernel saw, whatever the model does with it later."""

    class Overwrites(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q, k, v, mask = q.clone(), k.clone(), v.clone(), mask.clone()
            out = F.scaled_dot_product_attention(q, k, v, mask)
            q.zero_()
            k.neg_()
            v.fill_(3.0)
            mask.logical_not_()
            return out.mul_(2.0)

    q, k, v = qkv()
    mask = some_mask((B, 1, T, S))
    trace = trace_one(Overwrites(), (q, k, v, mask))
    output = F.scaled_dot_product_attention(q, k, v, mask)
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=output)


def test_not_contiguous() -> None:
    q, k, v = (draw(B, n, H, D, seed=n).transpose(1, 2) for n in (T, S, S))
    trace = trace_one(Sdpa(), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=trace.output)


# ------------------------------------------------------------------------------- tracing changes nothing


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_gradients_are_the_same() -> None:
    import hookattn

    model, x = Trained(), draw(B, T, E)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    trace = hookattn.trace(model, x)
    assert trace.output.requires_grad and not trace.calls[0].q.requires_grad and not trace.calls[0].output.requires_grad
    trace.output.square().sum().backward()
    traced = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(traced) > 0 and all(map(torch.equal, plain, traced))
    with torch.no_grad():
        assert not trace_one(model, x).output.requires_grad
    with torch.inference_mode():
        assert trace_one(model, x).output.is_inference()


def test_clean_after_an_error() -> None:
    import hookattn

    class Fails(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v)
            return F.scaled_dot_product_attention(out, k, v, attn_mask=torch.ones(3, 3, 3))

    model = Host(Fails())
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        model(*qkv())
    with pytest.raises(RuntimeError):
        hookattn.trace(model, qkv())
    assert_untouched(model, before)


def test_a_mode_of_the_callers_stays() -> None:
    """A torch function mode that was there before is there during the trace and after it."""
    import hookattn

    seen: list[Any] = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q, k, v = qkv()
    model = Host(Sdpa())
    plain = model(q, k, v)
    with Watching():
        trace = hookattn.trace(model, (q, k, v))
        assert torch._C._len_torch_function_stack() == 1
    assert_untouched(model)
    assert same_bits(trace.output, plain)
    assert F.scaled_dot_product_attention in seen
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=plain)


def test_forwards_after_the_trace_are_not_seen() -> None:
    import hookattn

    q, k, v = qkv()
    model = Host(Sdpa())
    with hookattn.tracing(model) as trace:
        model(q, k, v)
        model(q, k, v)
    model(q, k, v)
    assert [call.step for call in trace.calls] == [0, 1]
    assert_untouched(model)


class Learned(nn.Module):
    """One set of learned queries for every row of the batch, and other axes that the kernel broadcasts by itself."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], watched: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes))
        self.watched = watched

    def forward(self, mask: Tensor | None) -> Tensor:
        q, k, v = (x * 1.0 if self.watched else x for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 3, 4), (5, 2, 7, 4), (5, 2, 7, 6)),
        ((5, 2, 3, 4), (1, 2, 7, 4), (5, 2, 7, 6)),
        ((5, 2, 3, 4), (5, 2, 7, 4), (1, 2, 7, 6)),
        ((5, 1, 3, 4), (5, 2, 7, 4), (5, 2, 7, 6)),
        ((5, 2, 3, 4), (5, 1, 7, 4), (5, 1, 7, 6)),
        ((5, 2, 3, 4), (5, 1, 7, 4), (5, 2, 7, 6)),
        ((1, 1, 3, 4), (5, 2, 7, 4), (1, 2, 7, 6)),
    ],
    ids=str,
)
def test_what_the_kernel_broadcasts(shapes: tuple[tuple[int, ...], ...], watched: bool, masked: bool) -> None:
    model = Learned(shapes, watched)
    mask = torch.rand(5, 1, 3, 7, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None
    (call,) = hookattn.trace(model, (mask,), verify="full", strict=True)
    assert call.shape.startswith("B5 H2 T3 S7") and call.q.shape[:2] == (5, 2)
    assert call.k.shape[0] == call.v.shape[0] == 5
    groups = call.k.shape[1]
    k, v = (x.double().repeat_interleave(2 // groups, 1) for x in (call.k, call.v))
    scores = call.q.double() @ k.mT * call.scale
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    assert (weights - call.weights.double()).abs().max() < 1e-6
    assert (weights @ v - call.output.double()).abs().max() < 1e-5
