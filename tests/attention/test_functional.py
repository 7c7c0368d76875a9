"""The pure functions behind every record, compared with explicit float64 math over many shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hookattn import attention
from tests.reference import alibi, assert_close, causal, draw, masked_softmax, reference_attention

few = settings(max_examples=60, deadline=None)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
sizes = st.fixed_dictionaries(
    {name: st.integers(1, most) for name, most in zip("bgrtsde", (3, 3, 3, 6, 7, 5, 5), strict=True)}
    | {"seed": st.integers(0, 99)}
)


def make(n: dict[str, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q = draw(n["b"], n["g"] * n["r"], n["t"], n["d"], seed=n["seed"], std=1.5, dtype=dtype)
    k = draw(n["b"], n["g"], n["s"], n["d"], seed=n["seed"] + 1, std=1.5, dtype=dtype)
    return q, k, draw(n["b"], n["g"], n["s"], n["e"], seed=n["seed"] + 2, dtype=dtype)


def broadcast(data: st.DataObject, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Some shape that broadcasts to ``shape``."""
    return tuple(data.draw(st.sampled_from(sorted({1, n}))) for n in shape)


# ------------------------------------------------------------------------------------------------ scores


@given(sizes, st.sampled_from(DTYPES), st.sampled_from([1.0, 0.125, 2.5, -1.0, 0.0]))
@few
def test_scores_of_grouped_heads(n: dict[str, int], dtype: torch.dtype, scale: float) -> None:
    q, k, v = make(n, dtype)
    scores = attention.dot_scores(q, k, scale)
    expected, _, _ = reference_attention(q, k, v, scale=scale)
    assert scores.dtype == attention.compute_dtype(dtype) == (dtype if dtype in DTYPES[:2] else torch.float32)
    assert_close(scores, expected, 1e-12 if dtype == torch.float64 else 1e-5, "scores")


@given(st.data(), sizes)
@few
def test_scale_as_a_tensor(data: st.DataObject, n: dict[str, int]) -> None:
    q, k, v = make(n)
    scale = draw(*broadcast(data, (n["b"], q.shape[1], n["t"], n["s"])), seed=5)
    assert_close(attention.dot_scores(q, k, scale), reference_attention(q, k, v, scale=scale)[0], 1e-5, "scores")


def test_scores_from_strided_and_expanded_operands() -> None:
    q, k = draw(2, 5, 4, 6, seed=1).transpose(1, 2), draw(1, 7, 2, 6, seed=2).transpose(1, 2)
    expected, _, _ = reference_attention(q, k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), scale=0.5)
    before = q.clone(), k.clone()
    scores = attention.dot_scores(q, k, 0.5)
    assert_close(scores, expected, 1e-5, "one key for the whole batch")
    scores.zero_()
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]), "the scores share memory with their operands"


@given(st.data(), sizes, st.sampled_from([None, 1.0, 30.0]))
@few
def test_softcap_then_bias(data: st.DataObject, n: dict[str, int], cap: float | None) -> None:
    q, k, v = make(n)
    shape = (n["b"], q.shape[1], n["t"], n["s"])
    bias = draw(*broadcast(data, shape), seed=9) if data.draw(st.booleans()) else None
    kept = None if bias is None else bias.clone()
    scores = attention.finish_scores(attention.dot_scores(q, k, 2.0), cap, bias)
    assert_close(scores, reference_attention(q, k, v, scale=2.0, softcap=cap, bias=bias)[0], 1e-5, "scores")
    assert bias is None or torch.equal(bias, kept)


# ------------------------------------------------------------------------------------------------ weights


@given(st.data(), sizes, st.sampled_from([None, "heads", "rows"]), st.booleans())
@few
def test_weights(data: st.DataObject, n: dict[str, int], sinks: str | None, masked: bool) -> None:
    """Any mask, rows with nothing to attend to among them; with and without sinks."""
    q, k, v = make(n, torch.float64)
    scores, _, _ = reference_attention(q, k, v, scale=1.0)
    shape = tuple(scores.shape)
    mask = None
    if masked:
        mask = draw(*broadcast(data, shape), seed=n["seed"]) > data.draw(st.sampled_from([-1.0, 0.3, 9.0]))
    extra = None
    if sinks is not None:
        extra = draw(shape[1], seed=4) if sinks == "heads" else draw(*broadcast(data, (*shape[:3], 1)), seed=4)
    before = scores.clone()
    weights = attention.softmax_weights(scores, mask, extra)
    assert_close(weights, masked_softmax(scores, mask, extra), 1e-12, "weights")
    assert torch.equal(scores, before), "the scores were written to"
    everywhere = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    assert not weights[~everywhere].any(), "a masked entry weighs something"
    filled = everywhere.any(-1)
    sums = weights.sum(-1)
    assert torch.equal(sums[~filled], torch.zeros_like(sums[~filled]))
    if extra is None:
        assert_close(sums[filled], torch.ones_like(sums[filled]), 1e-12, "row sums")
    else:
        assert bool((sums[filled] < 1).all()), "the sink takes a share of every row"


def test_a_row_with_nothing_to_attend_to_weighs_nothing() -> None:
    scores = draw(1, 2, 4, 4, seed=1)
    mask = causal(4).clone()
    mask[2] = False
    weights = attention.softmax_weights(scores, mask.view(1, 1, 4, 4))
    assert not weights.isnan().any() and not weights[:, :, 2].any()
    assert_close(weights, masked_softmax(scores, mask, None), 1e-6, "the other rows")
    huge = torch.full((1, 1, 2, 3), 1e30)
    assert torch.equal(attention.softmax_weights(huge, None), torch.full_like(huge, 1 / 3))


@given(sizes)
@few
def test_weighted_values(n: dict[str, int]) -> None:
    q, k, v = make(n)
    _, weights, output = reference_attention(q, k, v, scale=1.0)
    assert_close(attention.weighted_values(weights, v), output, 1e-9, "output")
    assert_close(
        attention.weighted_values(weights, v[:1]),
        weights @ v[:1].double().repeat_interleave(n["r"], 1),
        1e-9,
        "one value for the whole batch",
    )


# ------------------------------------------------------------------------------------------------ masks


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 1, 2, 5, 100]), st.integers(-9, 9), st.booleans())
@settings(max_examples=150, deadline=None)
def test_causal_mask(t: int, s: int, window: int | None, offset: int, is_causal: bool) -> None:
    mask = attention.causal_mask(t, s, window=window, offset=offset, causal=is_causal)
    assert mask.shape == (1, 1, t, s) and mask.dtype == torch.bool
    for i in range(t):
        for j in range(s):
            back = i + offset - j  # how far key j lies behind query i
            expected = back >= 0 if is_causal else True
            if window is not None:
                expected = expected and (back if is_causal else abs(back)) < window
            assert bool(mask[0, 0, i, j]) == expected, (i, j)


LOWEST = {"half": -65504.0, "bfloat16": torch.finfo(torch.bfloat16).min, "float": torch.finfo(torch.float32).min}
FILLS = LOWEST | {f"{fill:g}": fill for fill in (-math.inf, -1e4, -1e9, -2e4, -100.0, -1000.0)}
T = 6


def check_split(additive: Tensor, hidden: Tensor | None, bias: Tensor | None) -> None:
    """What the two parts have to be; the bias counts where nothing is hidden."""
    before = additive.clone()
    got_bias, got_mask = attention.split_additive(additive)
    assert torch.equal(additive, before), "the model's tensor was written to"
    assert (got_mask is None) == (hidden is None), f"mask: {got_mask}"
    if hidden is not None:
        assert got_mask is not None and got_mask.dtype == torch.bool and torch.equal(got_mask, ~hidden)
    assert (got_bias is None) == (bias is None), f"bias: {got_bias}"
    if bias is not None:
        assert got_bias is not None and got_bias.dtype == additive.dtype and bool(got_bias.isfinite().all())
        seen = torch.ones_like(additive, dtype=torch.bool) if hidden is None else ~hidden
        assert torch.equal(got_bias[seen], bias[seen])
        assert hidden is None or not got_bias[hidden].any(), "a masked entry has a bias"


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("shape", [(T, T), (2, 1, T, T), (1, 1, 1, T)])
def test_a_mask_of_zeros_and_fills(fill: float, shape: tuple[int, ...]) -> None:
    hidden = ~causal(T) if shape[-2] == T else torch.arange(T).view(shape) >= 4
    hidden = hidden.expand(shape)
    for dtype in DTYPES:
        if math.isinf(fill) or abs(fill) <= torch.finfo(dtype).max:
            check_split(torch.zeros(shape, dtype=dtype).masked_fill(hidden, fill), hidden, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_of_each_dtype_alone_and_added_twice(dtype: torch.dtype) -> None:
    hidden = ~causal(T)
    mask = torch.zeros(T, T, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    check_split(mask, hidden, None)
    check_split(mask + mask, hidden, None)
    check_split(mask.float(), hidden, None)
    bias = draw(T, T, seed=1, std=3, dtype=dtype)
    check_split(bias + mask, hidden, bias + 0 * mask)


@pytest.mark.parametrize(
    "fill", [v for v in FILLS.values() if abs(v) >= 9000], ids=[k for k, v in FILLS.items() if abs(v) >= 9000]
)
def test_a_relative_bias_summed_into_the_mask(fill: float) -> None:
    """T5's, whatever its sign: the mask is taken out, and the bias stays where it was."""
    hidden, bias = ~causal(T), draw(1, 4, T, T, seed=2, std=8)
    check_split(bias.masked_fill(hidden, fill), hidden.expand(1, 4, T, T), bias)
    summed = bias + torch.zeros(T, T).masked_fill(hidden, fill)
    check_split(summed, hidden.expand(1, 4, T, T), bias)


@pytest.mark.parametrize("n_k", [16, 1024, 4096, 32768, 131072])
def test_a_slope_is_no_mask(n_k: int) -> None:
    """ALiBi over a long context falls below every value that masks are made of, but without a gap."""
    slope = alibi(8, 4, n_k)
    slope[:, 0] *= 0.84 / 0.5  # the steepest that head counts other than powers of two have
    check_split(slope, None, slope)
    check_split(slope.expand(2, 8, 4, n_k), None, slope.expand(2, 8, 4, n_k))


LONG = [
    (n, fill)
    for fill in (*LOWEST.values(), -math.inf, -1e9, -1e4)
    for n in (16, 1024, 4096, 32768)
    if n < 9000 or fill < -6e4
]


@pytest.mark.parametrize(("n_k", "fill"), LONG)
def test_a_slope_and_a_mask(n_k: int, fill: float) -> None:
    slope = alibi(8, 4, n_k)
    hidden = (torch.arange(n_k) % 5 == 3).expand(1, 8, 4, n_k)
    check_split(slope.masked_fill(hidden, fill), hidden, slope)
    check_split(slope + torch.zeros(n_k).masked_fill(hidden[0, 0, 0], fill), hidden, slope)


def test_a_bias_alone() -> None:
    for bias in (draw(2, 3, T, T, seed=3), draw(T, T, seed=4).abs(), torch.full((T, T), -3.0), torch.full((T,), 2.0)):
        check_split(bias, None, bias)


def shifted_windows(heads: int, width: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The hidden entries and the relative position bias of four windows of 3x3 patches, shifted by one: 4 H 9 9.

    The bias is spread evenly over ±``width``, its ends included.
    """
    region = torch.zeros(6, 6, dtype=torch.long)
    region[:5, 5], region[5, :5], region[5, 5] = 1, 2, 3
    windows = region.view(2, 3, 2, 3).transpose(1, 2).reshape(4, 9)
    hidden = (windows[:, None] != windows[:, :, None])[:, None].expand(4, heads, 9, 9)
    row, column = torch.arange(9) // 3, torch.arange(9) % 3
    place = (row[:, None] - row + 2) * 5 + column[:, None] - column + 2
    table = (torch.linspace(-width, width, 25 * heads)[torch.randperm(25 * heads)]).view(heads, 25)
    return hidden, table[:, place].expand(4, -1, -1, -1).to(dtype)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("fill", "width"), [(-100.0, 16.0), (-100.0, 2.0), (-100.0, 0.0), (-50.0, 3.0), (-1000.0, 16.0), (-5000.0, 30.0)]
)
def test_a_small_penalty_summed_with_a_bias_is_a_mask(heads: int, fill: float, width: float) -> None:
    """Shifted windows: what belongs to other parts of the image is hidden by 0/-100, with a bias in the same tensor."""
    torch.manual_seed(3)
    for dtype in DTYPES:
        hidden, bias = shifted_windows(heads, width, dtype)
        additive = bias + torch.zeros_like(bias).masked_fill(hidden, fill)
        seen = additive.masked_fill(hidden, 0.0)
        check_split(additive, hidden, seen if width else None)
        for window in range(4):  # of one window alone it is the same, with or without a mask
            mine = hidden[window : window + 1]
            part = additive[window : window + 1]
            expected = seen[window : window + 1]
            check_split(part, mine if mine.any() else None, expected if width else None)
        twice = bias + torch.zeros_like(bias).masked_fill(hidden, fill)
        twice[3, :, :, 4:6] += torch.where(hidden[3, :, :, 4:6], fill, 0.0)  # masked by two masks
        check_split(twice, hidden, seen if width else None)


def test_a_small_penalty_beside_a_large_one() -> None:
    """Keys that are padding, in windows that are shifted."""
    hidden, bias = shifted_windows(2, 10.0)
    padding = (torch.arange(9) == 0).expand_as(hidden)
    for lowest in (-math.inf, torch.finfo(torch.float32).min, -1e4):
        additive = (bias + torch.zeros_like(bias).masked_fill(hidden, -100.0)).masked_fill(padding, lowest)
        got_bias, got_mask = attention.split_additive(additive)
        assert got_bias is not None and got_mask is not None
        live = ~(hidden | padding).all(-1, keepdim=True)
        assert torch.equal(~got_mask & live, (hidden | padding) & live)
        assert torch.equal(got_bias[got_mask & live], bias[got_mask & live])


def test_a_low_bias_without_a_gap_is_no_mask() -> None:
    slope = alibi(8, 4, 1024)  # down to -512
    check_split(slope, None, slope)
    check_split(slope[:, :, -1:], None, slope[:, :, -1:])
    one = draw(1, 4, T, T, seed=7) * 5
    one[:, 2, :, 3] = -90.0  # learned, of one head: a mask hides the same keys from all
    check_split(one, None, one)
    wide = torch.linspace(-60, 0, T * T).view(1, 1, T, T) - 60 * (torch.arange(T * T).view(1, 1, T, T) < 9)
    check_split(wide, None, wide)  # a gap of no more than what lies above it
    head = draw(1, 4, T, T, seed=8)
    head[:, 1] -= 80.0  # the same for all keys, which changes nothing
    check_split(head, None, head)
    row = draw(1, 1, T, T, seed=8)
    row[:, :, 2] -= 80.0
    check_split(row, None, row)
    check_split(
        torch.full((1, 1, T, T), -70.0) + row.clamp(-9, 9), None, torch.full((1, 1, T, T), -70.0) + row.clamp(-9, 9)
    )


def test_nothing_at_all() -> None:
    for zeros in (torch.zeros(T, T), torch.zeros(()), torch.zeros(0, T), torch.zeros(2, 1, 1, T, dtype=torch.half)):
        check_split(zeros, None, None)
    assert attention.split_additive(torch.tensor(-2.0)) == (torch.tensor(-2.0), None)


@pytest.mark.parametrize("fill", [v for v in FILLS.values() if abs(v) >= 9000])
def test_everything_hidden(fill: float) -> None:
    for shape in ((), (1, 1, 1, 1), (3, 4)):
        check_split(torch.full(shape, fill), torch.ones(shape, dtype=torch.bool), None)
    hidden = torch.zeros(T, T, dtype=torch.bool)
    hidden[3] = True  # one row that may not look anywhere
    check_split(torch.zeros(T, T).masked_fill(hidden, fill), hidden, None)
    weights = attention.softmax_weights(
        torch.zeros(1, 1, T, T), attention.split_additive(torch.zeros(T, T).masked_fill(hidden, fill))[1]
    )
    assert not weights[0, 0, 3].any() and not weights.isnan().any()


@given(sizes, st.sampled_from(sorted(FILLS)), st.sampled_from(["zeros", "bias", "alibi"]), st.integers(0, 99))
@few
def test_the_weights_are_those_of_the_sum(n: dict[str, int], fill: str, kind: str, seed: int) -> None:
    """Whatever is called a bias and whatever a mask, the weights are what the model's own sum gives."""
    q, k, v = make(n, torch.float64)
    shape = (1, q.shape[1], n["t"], n["s"])
    base = {"zeros": torch.zeros(shape), "bias": draw(*shape, seed=seed), "alibi": alibi(*shape[1:])}[kind].double()
    hidden = draw(*shape, seed=seed + 1) > 0.5
    hidden[..., 0] = False
    additive = base + torch.zeros(shape).masked_fill(hidden, FILLS[fill])
    bias, mask = attention.split_additive(additive)
    scores = attention.finish_scores(attention.dot_scores(q, k, 1.0), None, bias)
    expected = masked_softmax(reference_attention(q, k, v, scale=1.0)[0] + additive, None, None)
    assert_close(attention.softmax_weights(scores, mask), expected, 1e-12, "weights")


@pytest.mark.parametrize("masked", ["none", "causal", "padding", "each head"])
@pytest.mark.parametrize("kind", ["plain", "capped and biased", "sinks", "tensor scale", "one key", "bfloat16"])
def test_blocks_equal_the_plain_path(kind: str, masked: str) -> None:
    """Large calls are derived block by block on the CPU; the numbers are those of the plain functions."""
    b, h, g, t, s = 2, 4, 2, 449, 420
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    q, k = draw(b, h, t, 8, seed=1, dtype=dtype), draw(1 if kind == "one key" else b, g, s, 8, seed=2, dtype=dtype)
    mask = {
        "none": None,
        "causal": attention.causal_mask(t, s),
        "padding": draw(b, 1, 1, s, seed=3) > -0.5,
        "each head": (draw(1, h, t, s, seed=3) > 0).index_fill(2, torch.tensor([7]), False),  # one row hides all
    }[masked]
    both = kind == "capped and biased"
    cap, bias, sinks = 20.0 if both else None, draw(1, h, 1, s) if both else None, draw(h) if kind == "sinks" else None
    scale = draw(h, 1, 1, seed=6) if kind == "tensor scale" else 0.4
    plain = attention.finish_scores(attention.dot_scores(q, k, scale), cap, bias)
    expected = attention.softmax_weights(plain, mask, sinks)
    options: dict[str, Any] = {"softcap": cap, "bias": bias, "mask": mask, "sinks": sinks}
    scores, weights = attention.derive(q, k, scale, **options)
    assert scores is not None and weights is not None
    assert_close(scores, plain, 1e-5, "scores")
    assert_close(weights, expected, 1e-6, "weights")
    only = attention.derive(q, k, scale, want_scores=False, **options)[1]
    other, none = attention.derive(q, k, scale, want_weights=False, **options)
    assert none is None and other is not None and only is not None
    assert torch.equal(only, weights) and torch.equal(other, scores)


@pytest.mark.parametrize("spot", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_hidden_need_not_be_finite(where: str, spot: float) -> None:
    """In blocks as in one piece: a masked entry weighs nothing, whatever its score."""
    for t in (16, 800):
        q, k = draw(1, 2, t, 4, seed=1), draw(1, 2, t, 4, seed=2)
        mask = torch.ones(1, 1, t, t, dtype=torch.bool)
        if where == "k":
            k[:, :, 5, 0], mask[..., 5] = spot, False
        else:
            q[:, :, 5, 0], mask[:, :, 5] = spot, False
        weights = attention.derive(q, k, 0.5, mask=mask)[1]
        assert weights is not None and weights.isfinite().all() and not weights[..., ~mask[0, 0, 0]].any()
        live = mask.any(-1)[0, 0]
        scores = torch.where(mask, (q.double() @ k.double().mT) * 0.5, -math.inf)
        torch.testing.assert_close(weights[:, :, live].double(), scores.softmax(-1)[:, :, live], atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_the_math_has_gradients(softcap: float | None, sunk: bool) -> None:
    """Against finite differences; a query with nothing to attend to has none, and spoils nobody else's."""
    q, k = draw(1, 4, 5, 3, seed=1, dtype=torch.float64), draw(1, 2, 6, 3, seed=2, dtype=torch.float64)
    bias, scale = draw(1, 4, 5, 6, seed=3, dtype=torch.float64), draw(1, 4, 1, 1, seed=4, dtype=torch.float64)
    mask = torch.ones(5, 6, dtype=torch.bool).tril()[None, None]
    mask[..., 0, :] = False

    def weights(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, *sinks: Tensor) -> Tensor:
        scores = attention.finish_scores(attention.dot_scores(q, k, scale), softcap, bias)
        return attention.softmax_weights(scores, mask, sinks[0] if sinks else None)

    given = [q, k, scale, bias] + ([draw(4, seed=5, dtype=torch.float64)] if sunk else [])
    assert torch.autograd.gradcheck(weights, [x.requires_grad_() for x in given])
