"""torch's flex_attention, not compiled: score_mod and block masks become bias, softcap and mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.attention.flex_attention as flex_module
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from tests.reference import (
    alibi,
    assert_untouched,
    causal,
    check_call,
    check_invariants,
    draw,
    paths,
    reference_attention,
    snapshot,
    trace_checked,
)

B, H, T, S, D = 2, 4, 6, 8, 8

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated"),
]


class ByName(nn.Module):
    """Calls the function under the name it was imported by."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, **self.kwargs)


class ByModule(ByName):
    """Looks the function up at every call."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.nn.attention.flex_attention.flex_attention(q, k, v, **self.kwargs)


class Kept(ByName):
    """Keeps the function on the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kernel = flex_module.flex_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.kernel(q, k, v, **self.kwargs)


class Positional(ByName):
    """Every argument that can be is positional."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, self.kwargs.get("score_mod"), self.kwargs.get("block_mask"), 0.3)


class Host(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": attn})])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.layers[0]["self_attn"](q, k, v)


def qkv(n_k: int = S, groups: int = H, width: int = D, n_q: int = T) -> tuple[Tensor, Tensor, Tensor]:
    q, k = draw(B, H, n_q, D, seed=1, std=1.3), draw(B, groups, n_k, D, seed=2, std=1.3)
    return q, k, draw(B, groups, n_k, width, seed=3)


def blocks(mask_mod: Callable[..., Tensor], n_q: int, n_k: int, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, n_q, n_k, device="cpu")


def trace_one(model: nn.Module, inputs: Any, **options: Any) -> Any:
    import hookattn

    trace = trace_checked(hookattn.trace, model, inputs, **options)
    assert len(trace.calls) == 1, paths(trace.calls)
    assert not list(trace.skipped)
    assert "flex" in trace.calls[0].tap
    return trace


# ------------------------------------------------------------------------------------------ score mods

HEAD_BIAS = draw(H, T, S, seed=5)
SLOPES = torch.tensor([2.0 ** (-8.0 * (i + 1) / H) for i in range(H)])
DOCUMENT = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def add_head_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + HEAD_BIAS[h, q_idx, kv_idx]


def add_alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - SLOPES[h] * (q_idx - kv_idx).abs()


def add_distance(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + (q_idx - kv_idx) * 0.25


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def softcap_then_alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return add_alibi(softcap(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)


def causal_in_the_score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def unchanged(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


DISTANCE = (torch.arange(T)[:, None] - torch.arange(S)[None, :]) * 0.25

SCORE_MODS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "head_bias": (add_head_bias, {"bias": HEAD_BIAS[None]}),
    "alibi": (add_alibi, {"bias": alibi(H, T, S)}),
    "distance": (add_distance, {"bias": DISTANCE}),
    "causal_in_the_score": (causal_in_the_score, {"mask": causal(T, S)}),
    "unchanged": (unchanged, {}),
}


# ------------------------------------------------------------------------------------------- mask mods


def causal_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def window_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 3)


def document_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) & (q_idx >= kv_idx)


def prefix_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx < 2 + b) | (q_idx >= kv_idx)


MASK_MODS: dict[str, tuple[Callable[..., Tensor], int | None, Tensor]] = {
    "causal": (causal_mod, None, causal(S)),
    "window": (window_mod, None, causal(S) & ~causal(S, S, -3)),
    "document": (document_mod, None, causal(S) & (DOCUMENT[:, None] == DOCUMENT[None, :])),
    "prefix": (prefix_mod, B, causal(S) | (torch.arange(S) < torch.tensor([2, 3])[:, None])[:, None, None]),
}


# ---------------------------------------------------------------------- the reference against the kernel


@pytest.mark.parametrize("name", SCORE_MODS)
def test_reference_matches_score_mods(name: str) -> None:
    score_mod, terms = SCORE_MODS[name]
    q, k, v = (t.double() for t in qkv())
    _, _, output = reference_attention(q, k, v, scale=D**-0.5, **terms)
    returned = flex_attention(q, k, v, score_mod=score_mod)
    assert torch.allclose(returned, output, atol=1e-5)


@pytest.mark.parametrize("name", MASK_MODS)
def test_reference_matches_block_masks(name: str) -> None:
    mask_mod, batch, mask = MASK_MODS[name]
    q, k, v = (t.double() for t in qkv(n_q=S))
    _, _, output = reference_attention(q, k, v, scale=D**-0.5, mask=mask)
    returned = flex_attention(q, k, v, block_mask=blocks(mask_mod, S, S, batch))
    assert torch.allclose(returned, output, atol=1e-5)


# ---------------------------------------------------------------------------------------------- traced


@pytest.mark.parametrize("kind", [ByName, ByModule, Kept])
def test_plain(kind: type[ByName]) -> None:
    q, k, v = qkv(width=5)
    trace = trace_one(Host(kind()), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=trace.output)
    assert paths(trace.calls) == ["layers.0.self_attn"]
    assert trace.calls[0].site.layer == 0


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(name: str) -> None:
    score_mod, terms = SCORE_MODS[name]
    q, k, v = qkv()
    trace = trace_one(ByName(score_mod=score_mod), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, output=trace.output, **terms)


@pytest.mark.parametrize("then_alibi", [False, True])
def test_softcap_in_the_score_mod(then_alibi: bool) -> None:
    """The scores are the capped ones; the cap itself need not be known by name."""
    q, k, v = qkv()
    bias = alibi(H, T, S) if then_alibi else None
    trace = trace_one(ByName(score_mod=softcap_then_alibi if then_alibi else softcap), (q, k, v))
    call = trace.calls[0]
    terms = {"scale": D**-0.5, "softcap": 2.0, "bias": bias}
    scores, weights, output = reference_attention(q, k, v, **terms)
    assert torch.equal(call.q, q) and torch.equal(call.k, k) and torch.equal(call.v, v)
    assert torch.equal(call.output, trace.output)
    assert torch.allclose(call.scores.double(), scores, atol=1e-5)
    assert torch.allclose(call.weights.double(), weights, atol=1e-5)
    assert torch.allclose(call.output.double(), output, atol=1e-5)
    assert call.mask.all()
    check_invariants(call, tol=1e-5)
    if call.softcap:
        check_call(call, q=q, k=k, v=v, output=trace.output, **terms)


@pytest.mark.parametrize("name", MASK_MODS)
def test_block_masks(name: str) -> None:
    mask_mod, batch, mask = MASK_MODS[name]
    q, k, v = qkv(n_q=S)
    trace = trace_one(ByName(block_mask=blocks(mask_mod, S, S, batch)), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


def test_block_mask_of_several_blocks() -> None:
    """Small blocks, so that some are empty, some partial and some full."""
    n = 12
    q, k, v = (draw(1, 2, n, D, seed=i) for i in range(3))
    block_mask = create_block_mask(window_mod, None, None, n, n, device="cpu", BLOCK_SIZE=4)
    trace = trace_one(ByName(block_mask=block_mask), (q, k, v))
    mask = causal(n) & ~causal(n, n, -3)
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


def test_block_mask_and_score_mod() -> None:
    q, k, v = qkv(n_q=S)
    trace = trace_one(ByName(block_mask=blocks(causal_mod, S, S), score_mod=add_alibi), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=alibi(H, S, S), mask=causal(S), output=trace.output)


def test_rectangular_causal() -> None:
    q, k, v = qkv()
    trace = trace_one(ByName(block_mask=blocks(causal_mod, T, S)), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(T, S), output=trace.output)


def test_row_without_keys() -> None:
    """The first query may attend to nothing: weights 0, as the kernel has it."""

    def strictly_before(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx > kv_idx

    q, k, v = qkv(n_q=S)
    trace = trace_one(ByName(block_mask=blocks(strictly_before, S, S)), (q, k, v), warns=True)
    call = trace.calls[0]
    check_call(call, q=q, k=k, v=v, scale=D**-0.5, mask=causal(S, S, -1), output=trace.output)
    assert not call.weights[:, :, 0].any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_enable_gqa(groups: int, masked: bool) -> None:
    q, k, v = qkv(n_q=S, groups=groups)
    block_mask = blocks(causal_mod, S, S) if masked else None
    trace = trace_one(ByName(enable_gqa=True, block_mask=block_mask), (q, k, v))
    mask = causal(S) if masked else None
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=mask, output=trace.output)


def test_enable_gqa_with_a_score_mod() -> None:
    """The head index that the score_mod sees is the query's."""
    q, k, v = qkv(groups=2)
    trace = trace_one(ByName(enable_gqa=True, score_mod=add_head_bias), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, bias=HEAD_BIAS[None], output=trace.output)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_scale(scale: float) -> None:
    """The scale comes before the score_mod."""
    q, k, v = qkv()
    trace = trace_one(ByName(scale=scale, score_mod=add_alibi), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=scale, bias=alibi(H, T, S), output=trace.output)


def test_positional_arguments() -> None:
    q, k, v = qkv(n_q=S)
    model = Positional(score_mod=add_alibi, block_mask=blocks(causal_mod, S, S))
    trace = trace_one(model, (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=0.3, bias=alibi(H, S, S), mask=causal(S), output=trace.output)


@pytest.mark.parametrize("kwargs", [{"return_lse": True}, {"return_aux": AuxRequest(lse=True)}], ids=["lse", "aux"])
def test_second_result(kwargs: dict[str, Any]) -> None:
    """The model gets its tuple; the record has the output alone."""
    q, k, v = qkv(n_q=S)
    trace = trace_one(ByName(block_mask=blocks(causal_mod, S, S), **kwargs), (q, k, v))
    output, extra = trace.output
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(S), output=output)
    lse = extra if isinstance(extra, Tensor) else extra.lse
    scores, _, _ = reference_attention(q, k, v, scale=D**-0.5)
    wanted = scores.masked_fill(~causal(S), -math.inf).logsumexp(dim=-1)
    assert torch.allclose(lse.double(), wanted, atol=1e-5)


def test_bfloat16() -> None:
    q, k, v = ((t * 0.5).to(torch.bfloat16) for t in qkv(n_q=S))
    trace = trace_one(ByName(block_mask=blocks(causal_mod, S, S)), (q, k, v))
    check_call(trace.calls[0], q=q, k=k, v=v, scale=D**-0.5, mask=causal(S), output=trace.output)
    assert trace.calls[0].dtype == torch.bfloat16


def test_window_and_causal_attributes_do_not_lie() -> None:
    """What is not causal is not called causal."""
    q, k, v = qkv(n_q=S)
    trace = trace_one(ByName(block_mask=blocks(prefix_mod, S, S, B)), (q, k, v))
    assert not trace.calls[0].causal
    assert not trace.calls[0].window


def test_two_calls_and_a_step_each() -> None:
    import hookattn

    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(flex_attention(q, k, v, score_mod=add_alibi), k, v)

    q, k, v = qkv()
    model = Host(Twice())
    before = snapshot(model)
    with hookattn.tracing(model) as trace:
        model(q, k, v)
        model(q, k, v)
    assert_untouched(model, before)
    assert [call.step for call in trace.calls] == [0, 0, 1, 1]
    first = flex_attention(q, k, v, score_mod=add_alibi)
    for i in (0, 2):
        check_call(trace.calls[i], q=q, k=k, v=v, scale=D**-0.5, bias=alibi(H, T, S), output=first)
        check_call(trace.calls[i + 1], q=first, k=k, v=v, scale=D**-0.5)


def test_clean_after_an_error() -> None:
    import hookattn

    def fails(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        raise ValueError("on purpose")

    model = ByName(score_mod=fails)
    before = snapshot(model)
    with pytest.raises(Exception, match="on purpose"):
        model(*qkv())
    with pytest.raises(Exception, match="on purpose"):
        hookattn.trace(model, qkv())
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "options",
    # The largest scores are something that the kernel has on a GPU alone.
    [{}, {"return_lse": True}, {"return_aux": AuxRequest()}, {"return_aux": AuxRequest(lse=True)}],
    ids=str,
)
def test_what_a_plan_takes_for_the_result_has_its_form(options: dict[str, Any]) -> None:
    """The same tuples, shapes and dtypes as the kernel returns, of values that are wider than the keys."""
    from hookattn.taps.flex import shaped

    q, k, v = draw(B, H, T, D, seed=1), draw(B, H, S, D, seed=2), draw(B, H, S, 2 * D, seed=3)
    given = {"query": q, "key": k, "value": v, "return_lse": False, "return_aux": None} | options
    real, found = flex_attention(q, k, v, **options), shaped(given)

    def form(x: Any) -> Any:
        return (x.shape, x.dtype) if isinstance(x, Tensor) else x if x is None else (type(x), *map(form, x))

    assert form(found) == form(real)


def test_what_is_alike_for_all_batch_entries_or_heads_is_kept_once() -> None:
    """And what differs between queries or keys alone is not."""
    from hookattn.taps.flex import _narrow

    whole = draw(B, H, T, S, seed=1)
    same = {"both": whole[:1, :1], "batch": whole[:1], "heads": whole[:, :1], "queries": whole[:, :, :1], "none": whole}
    for name, x in same.items():
        found = _narrow(x.expand(B, H, T, S))
        assert found is not None and torch.equal(found, whole if name == "none" else x.expand(-1, -1, T, S)), name
        assert found.is_contiguous()
    assert _narrow(None) is None


@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, H), (B, H)])
def test_the_record_of_a_bias_has_the_axes_along_which_it_changes(shape: tuple[int, int]) -> None:
    """Shape and values of what a score_mod adds and hides, for each head and batch entry that it looks at."""
    bias, hidden = draw(*shape, T, S, seed=5), draw(*shape, T, S, seed=6) > 0.9

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = (b if shape[0] > 1 else b * 0, h if shape[1] > 1 else h * 0, i, j)
        return torch.where(hidden[at], -math.inf, score + bias[at])

    q, k, v = qkv()
    call = trace_one(ByName(score_mod=modify), (q, k, v)).calls[0]
    assert call.bias.shape == call.mask.shape == (*shape, T, S)
    check_call(call, q=q, k=k, v=v, scale=D**-0.5, bias=bias.masked_fill(hidden, 0.0), mask=~hidden)
