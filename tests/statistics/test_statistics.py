"""Statistics against the explicit matrix in float64, which nothing here forms but the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import hookattn
from hookattn import statistics as st
from hookattn.errors import FieldNotCaptured, SelectionError, StitchError
from hookattn.statistics import engine
from hookattn.torch_internals import devices
from tests.reference import as_sinks, draw, masked_softmax, reference_attention, same_bits

SETS = {"a": (0, 2, 3), "b": (1,), "none": ()}
ALL: tuple[Any, ...] = (
    "entropy", "lse", "max_score", st.FirstMass(3), st.LocalMass(4), st.FarMass(4), "previous_mass",
    st.SegmentMass(SETS), st.OffsetMass(), st.OffsetMass(2), st.OffsetMass(-3),
    "mean_distance", st.TopK(5), "received",
)  # fmt: skip
POSITIONAL = (
    "local_mass(4)", "far_mass(4)", "previous_mass", "mean_distance",
    "offset_mass(0)", "offset_mass(2)", "offset_mass(-3)",
)  # fmt: skip


def explicit(
    scores: Tensor, mask: Tensor | None, sinks: Tensor | None = None, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """Every statistic of ALL but the top keys, from B H T S in float64; ``positions``: (B or 1) T."""
    scores = scores.double()
    b, h, t, s = scores.shape
    weights = masked_softmax(scores, mask, sinks)
    hidden = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    joined = hidden if sinks is None else torch.cat([hidden, as_sinks(sinks, hidden)], -1)
    found = {
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
        "lse": joined.logsumexp(-1),
        "max_score": hidden.amax(-1),
        "first_mass(3)": weights[..., :3].sum(-1),
        "segment_mass(a,b,none)": torch.stack(
            [weights[..., [i for i in k if i < s]].sum(-1) for k in SETS.values()], -1
        ),
        "received": weights.sum(2),
    }
    if positions is not None:
        away = (positions.view(-1, 1, t, 1) - torch.arange(s)).expand(b, h, t, s)
        total = weights.sum(-1)
        mean = (weights * away.abs()).sum(-1) / total
        found["local_mass(4)"] = (weights * (away.abs() < 4)).sum(-1)
        found["far_mass(4)"] = (weights * (away.abs() >= 4)).sum(-1)
        found["previous_mass"] = (weights * (away == 1)).sum(-1)
        for offset in (0, 2, -3):
            found[f"offset_mass({offset})"] = (weights * (away == -offset)).sum(-1)
        found["mean_distance"] = torch.where(total > 0, mean, 0.0)
    found["weights"] = weights
    return found


def close(actual: Tensor | None, expected: Tensor, name: str, tol: float = 1e-4) -> None:
    assert actual is not None and actual.shape == expected.shape, (name, actual, expected.shape)
    same = (actual.double() == expected) | ((actual.double() - expected).abs() <= tol * (1 + expected.abs()))
    assert bool(same.all()), (name, (actual.double() - expected).abs()[~same].max())


def check_top(get: Callable[[str], Tensor | None], weights: Tensor, mask: Tensor | None, k: int = 5) -> None:
    """The weights are the largest, and the keys are where they are."""
    top, keys = get(f"top_k({k})"), get(f"top_k_keys({k})")
    assert top is not None and keys is not None and keys.dtype == torch.int64
    best = weights.sort(-1, descending=True).values
    best = F.pad(best[..., :k], (0, max(0, k - best.shape[-1])))
    close(top, best, "top_k")
    close(torch.where(keys >= 0, F.pad(weights, (0, 1)).gather(-1, keys % (weights.shape[-1] + 1)), 0.0), best, "keys")
    allowed = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand(weights.shape)
    assert torch.equal((keys >= 0).sum(-1), allowed.sum(-1).clamp_max(k))


def check(get: Callable[[str], Tensor | None], expected: dict[str, Tensor], mask: Tensor | None) -> None:
    for name, value in expected.items():
        if name != "weights":
            close(get(name), value, name)
    for name in POSITIONAL:
        assert name in expected or get(name) is None
    check_top(get, expected["weights"], mask)


def asked() -> list[st.Statistic]:
    made = [x if isinstance(x, st.Statistic) else st.named(x) for x in ALL]
    assert None not in made
    return made  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the engine alone


@pytest.fixture(params=[1 << 20, 300, 40])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of everything, of some heads, of some rows."""
    monkeypatch.setattr(engine, "_BLOCK", request.param)
    monkeypatch.setattr(engine, "_LEAST", 3)
    return int(request.param)


@settings(max_examples=150, deadline=None)
@given(data=some.data())
def test_against_explicit_matrices(data: some.DataObject) -> None:
    pick = data.draw
    b, g, per = pick(some.integers(1, 3)), pick(some.integers(1, 3)), pick(some.integers(1, 3))
    t, s, d = pick(some.integers(1, 20)), pick(some.integers(1, 24)), pick(some.integers(1, 9))
    h, seed = g * per, pick(some.integers(0, 1 << 20))
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    causal, window = pick(some.booleans()), pick(some.one_of(some.none(), some.integers(1, 12)))
    offset = pick(some.sampled_from([0, s - t, 2]))
    lead = pick(some.sampled_from([None, (1, 1, t, s), (b, 1, 1, s), (b, h, t, s), (1, h, t, s)]))
    own = None if lead is None else torch.rand(lead, generator=make) > 0.4
    bias = 3 * normal(*pick(some.sampled_from([(1, h, t, s), (b, 1, 1, s)]))) if pick(some.booleans()) else None
    sinks = normal(h) if pick(some.booleans()) else None
    softcap = pick(some.sampled_from([None, 2.0]))
    scale: Any = pick(some.sampled_from([1.0, 0.3, normal(1, h, 1, 1)]))
    q, k = normal(b, h, t, d), normal(b, g, s, d)
    positions = torch.randint(0, s + 3, (pick(some.sampled_from([1, b])), t), generator=make)
    rows = torch.randint(0, t + 3, (t,), generator=make) if pick(some.booleans()) else None
    scores, _, _ = reference_attention(q, k, k, scale=scale, bias=bias, softcap=softcap)
    problem = st.Problem(q, k, scale, softcap, bias, own, None if sinks is None else sinks.view(1, -1, 1, 1))
    problem.causal, problem.offset, problem.window, problem.positions = causal, offset, window, positions
    problem.rows = rows
    if pick(some.booleans()):
        problem.scores = scores.float()
    away = ((torch.arange(t) if rows is None else rows).unsqueeze(1) + offset - torch.arange(s)).expand(b, h, t, s)
    mask = torch.ones(b, h, t, s, dtype=torch.bool) if own is None else own.expand(b, h, t, s)
    if causal:
        mask = mask & (away >= 0)
    if window is not None:
        mask = mask & (away < window) & (away > -window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_BLOCK", pick(some.sampled_from([engine._BLOCK, 100, 2000])))
        patch.setattr(engine, "_LEAST", pick(some.sampled_from([1, 3, 16])))
        patch.setattr(engine, "_WIDEST", pick(some.sampled_from([engine._WIDEST, 1, 5])))
        found = st.compute(problem, asked())
    check(found.get, explicit(scores, mask, sinks, positions), mask)


def test_large_scores_and_float64(block: int) -> None:
    q, k = 40 * draw(2, 4, 31, 8, seed=1).double(), draw(2, 2, 33, 8, seed=2).double()
    positions = torch.arange(31).unsqueeze(0)
    found = st.compute(st.Problem(q, k, positions=positions), asked())
    expected = explicit(reference_attention(q, k, k, scale=1.0)[0], None, None, positions)
    for name, value in expected.items():
        if name != "weights":
            close(found[name], value, name, 1e-11)


@pytest.mark.parametrize("size", [1e3, 1e12, 1e25])
def test_huge_scores_of_float32(size: float) -> None:
    """Scores that are alike weigh alike, whatever their size; masked ones nothing."""
    q = torch.tensor([size, -size, size]).view(1, 1, 3, 1)
    k = torch.tensor([1.0, 1.0, 0.5, 1.0]).view(1, 1, 4, 1)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 1, 4)
    positions = torch.arange(3).unsqueeze(0)
    expected = explicit(q.double() * k.view(1, 1, 1, 4), mask, None, positions)
    found = st.compute(st.Problem(q, k, mask=mask, positions=positions), asked())
    for own in (st.Problem(q, k, 3.0, mask=mask), st.Problem(q, k, bias=2 * q, mask=mask)):
        assert st.compute(own, asked())["entropy"].tolist() == found["entropy"].tolist()
    check(found.get, expected, mask)


def test_nan_is_not_hidden() -> None:
    q = draw(1, 1, 4, 8, seed=1)
    q[0, 0, 2] = math.nan
    found = st.compute(st.Problem(q, draw(1, 1, 4, 8, seed=2)), asked())
    for name in ("entropy", "lse", "max_score", "first_mass(3)"):
        value = found[name]
        assert value is not None and value.isnan().any(-1).all() and value[0, 0, 0].isfinite()


# ---------------------------------------------------------------------------------------------- through a trace


class Layer(nn.Module):
    """One attention by sdpa."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def causal(t: int, s: int) -> Tensor:
    return torch.ones(t, s, dtype=torch.bool).tril(s - t)


MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda t: None,
    "causal": lambda t: causal(t, t),
    "band": lambda t: causal(t, t).triu(-3),
    "left padding": lambda t: torch.stack([torch.arange(t) >= n for n in (0, 5)]).view(2, 1, 1, t),
    "causal, left padding": lambda t: MASKS["left padding"](t) & causal(t, t),  # type: ignore[operator]
    "additive": lambda t: torch.zeros(t, t).masked_fill(~causal(t, t), -torch.inf) + 0.1 * torch.arange(t),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("capture", ["lean", "whole"])
def test_masks(name: str, capture: str, block: int) -> None:
    t = 19
    q, k, v = draw(2, 6, t, 8, seed=1), draw(2, 3, t, 8, seed=2), draw(2, 3, t, 8, seed=3)
    mask = MASKS[name](t)
    wanted = ALL if capture == "lean" else (*ALL, *hookattn.FIELDS)
    [call] = hookattn.trace(Layer(enable_gqa=True), (q, k, v, mask), capture=wanted, strict=True)
    bias = None
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = 0.1 * torch.arange(t).float(), mask.isfinite()
    scores = reference_attention(q, k, v, scale=8**-0.5)[0]
    whole = None if mask is None else mask.expand(2, 6, t, t)
    scores = scores if bias is None else scores + bias
    check(call.get, explicit(scores, whole, None, torch.arange(t).unsqueeze(0)), whole)
    assert call.certificate.faithful and call.certificate.of_rows == t
    if capture == "whole":
        close(call.get("entropy"), -torch.special.xlogy(call.weights, call.weights).sum(-1).double(), "entropy")


@pytest.mark.parametrize("verify", ["off", "sample", "full"])
def test_causal_kernel_with_selected_heads_and_queries(verify: str, block: int) -> None:
    t, heads = 23, [4, -1, 0]
    q, k, v = draw(2, 6, t, 8, seed=1), draw(2, 3, t, 8, seed=2), draw(2, 3, t, 8, seed=3)
    model = Layer(enable_gqa=True, is_causal=True)
    for queries in (None, slice(-4, None), [20, 3, -1], slice(1, None, 5)):
        [call] = hookattn.trace(model, (q, k, v), capture=ALL, heads=heads, queries=queries, verify=verify)
        rows = torch.arange(t) if queries is None else torch.arange(t)[queries]
        scores = reference_attention(q, k, v, scale=8**-0.5)[0][:, [4, 5, 0]][:, :, rows]
        mask = causal(t, t)[rows].expand(scores.shape)
        check(call.get, explicit(scores, mask, None, rows.unsqueeze(0)), mask)
        assert call.certificate.faithful == (verify != "off")
        assert verify == "off" or call.certificate.of_rows == len(rows)


def test_empty_rows_and_no_nan() -> None:
    x = draw(1, 2, 6, 4, seed=1)
    mask = causal(6, 6).clone()
    mask[2] = False
    [call] = hookattn.trace(Layer(), (x, x, x, mask), capture=ALL)
    scores = reference_attention(x, x, x, scale=0.5)[0]
    check(call.get, explicit(scores, mask.expand(1, 2, 6, 6), None, torch.arange(6)[None]), mask)
    assert call.get("lse")[0, 0, 2] == call.get("max_score")[0, 0, 2] == -math.inf  # type: ignore[index]
    for name in set(call.fields) - {"lse", "max_score", "top_k_keys(5)", "received"}:
        assert not call.get(name)[:, :, 2].any(), name  # type: ignore[index]


class Written(nn.Module):
    """Attention by hand, with a soft-cap, sinks and heads that are mixed before the softmax."""

    def __init__(self, softcap: bool = False, sinks: bool = False, mix: bool = False, dropout: float = 0.0):
        super().__init__()
        self.softcap, self.sinks, self.mix, self.dropout = softcap, sinks, mix, dropout
        self.sink = nn.Parameter(torch.tensor([0.5, -0.5, 2.0]))
        self.talk = nn.Parameter(draw(3, 3, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT * 0.5
        if self.softcap:
            scores = 2 * torch.tanh(scores / 2)
        if self.mix:
            scores = torch.einsum("bhts,gh->bgts", scores, self.talk)
        scores = scores.masked_fill(~causal(x.shape[2], x.shape[2]), -torch.inf)
        if self.sinks:
            column = self.sink.view(1, 3, 1, 1).expand(x.shape[0], 3, x.shape[2], 1)
            return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ x
        return F.dropout(scores.softmax(-1), self.dropout, self.training) @ x


@pytest.mark.parametrize("name", ["softcap", "sinks", "mix"])
def test_written_out_attention(name: str) -> None:
    model, x = Written(**{name: True}), draw(2, 3, 17, 4, seed=4)
    with torch.no_grad():
        [call] = hookattn.trace(model, x, capture=ALL, strict=True)
        scores = reference_attention(x, x, x, scale=0.5, softcap=2.0 if name == "softcap" else None)[0]
        if name == "mix":
            scores = torch.einsum("bhts,gh->bgts", scores, model.talk.double())
    sinks = model.sink.detach() if name == "sinks" else None
    mask = causal(17, 17).expand(scores.shape)
    check(call.get, explicit(scores, mask, sinks, torch.arange(17)[None]), mask)


def test_dropout_and_changed_weights_are_noted() -> None:
    x = draw(1, 3, 9, 4, seed=4)
    [call] = hookattn.trace(Written(dropout=0.4).train(), x, capture=("entropy",))
    assert any("before dropout" in note for note in call.notes)
    mask = causal(9, 9).expand(1, 3, 9, 9)
    close(call.get("entropy"), explicit(reference_attention(x, x, x, scale=0.5)[0], mask)["entropy"], "entropy")

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(-1)
            return torch.einsum("bhts,gh->bgts", weights, torch.eye(3) + 0.1) @ x

    [call] = hookattn.trace(Mixed(), x, capture=("entropy",))
    assert call.mixed and any("changed the weights after" in note for note in call.notes)
    close(call.get("entropy"), explicit(reference_attention(x, x, x, scale=1.0)[0], None)["entropy"], "entropy")


class Cached(nn.Module):
    """Keys of all steps so far; or of a fixed number of slots."""

    def __init__(self, slots: int | None = None):
        super().__init__()
        self.slots, self.attn = slots, Layer()
        self.keys: Tensor | None = None
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[2]
        if self.slots is None:
            self.keys = x if self.keys is None else torch.cat([self.keys, x], 2)
        else:
            if self.keys is None:
                self.keys = x.new_zeros(*x.shape[:2], self.slots, x.shape[3])
            self.keys = torch.cat([self.keys[:, :, : self.seen], x, self.keys[:, :, self.seen + t :]], 2)
        at = self.seen + torch.arange(t)
        self.seen += t
        mask = torch.arange(self.keys.shape[2]) <= at[:, None]
        return self.attn(x, self.keys, self.keys, None if t == 1 and self.slots is None else mask)


@pytest.mark.parametrize("slots", [None, 20])
def test_decoding_with_a_cache_and_merge(slots: int | None, tmp_path: Path) -> None:
    x, n = draw(2, 3, 14, 4, seed=5), 14
    model = Cached(slots)
    with hookattn.tracing(model, capture=ALL, strict=True) as found:
        for a, b in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 14)):
            model(x[:, :, a:b])
    assert [c.notes for c in found] == [()] * 5
    found.save(tmp_path / "steps.safetensors")
    scores = F.pad(reference_attention(x, x, x, scale=0.5)[0], (0, 0 if slots is None else slots - n))
    mask = causal(n, n).expand(2, 3, n, n)
    mask = F.pad(mask, (0, scores.shape[3] - n))
    expected = explicit(scores, mask, None, torch.arange(n)[None])
    for trace in (found, hookattn.load(tmp_path / "steps.safetensors")):
        [call] = st.merge(trace)
        check(call.get, expected, mask)
    if slots is None:
        with pytest.raises(StitchError, match="merged before"):
            st.merge([st.merge(found), st.merge(found)])


def test_merge_over_batches() -> None:
    x = draw(5, 3, 9, 4, seed=6)
    model = Layer(is_causal=True)
    parts = [hookattn.trace(model, (y, y, y), capture=ALL) for y in (x[:2], x[2:])]
    whole = hookattn.trace(model, (x, x, x), capture=ALL)
    [call] = st.merge(parts, over="batches")
    for name in whole[0].fields:
        value = whole[0].get(name)
        assert value is not None
        close(call.get(name), value.double(), name, 1e-6)
    y = x[:, :, :5]
    with pytest.raises(StitchError, match="has the shapes"):
        st.merge([parts[0], hookattn.trace(model, (y, y, y), capture=ALL)], over="batches")
    with pytest.raises(StitchError, match="over='heads'"):
        st.merge(parts, over="heads")
    with pytest.raises(StitchError, match="has the statistics"):
        st.merge(hookattn.trace(model, (x, x, x)))


@pytest.mark.parametrize("capture", [("received", "entropy"), ("top_k", "entropy")])
def test_keys_that_fell_out_of_a_cache_are_not_summed(capture: tuple[str, ...]) -> None:
    x = draw(1, 2, 8, 4, seed=7)
    for first in (8, 1):  # from the first step on, or with a window that is full already
        layer = Layer()
        with hookattn.tracing(layer, capture=capture) as found:
            layer(x[:, :, :first], x, x)
            for _ in range(2):
                layer(x[:, :, :1], x, x)
        with pytest.raises(StitchError, match="fell out of the cache"):
            st.merge(found)


@pytest.mark.parametrize("queries", [-1, [2, -1]])
def test_merge_of_selected_rows(tmp_path: Path, queries: Any) -> None:
    """How many tokens each step brought is known, whatever rows of it were kept."""
    x, layer = draw(1, 2, 8, 4, seed=7), Layer()
    with hookattn.tracing(layer, capture=("received", "entropy"), queries=queries) as found:
        layer(x[:, :, :5], x[:, :, :5], x[:, :, :5])
        layer(x[:, :, 5:], x, x)
    merged = st.merge(found)
    assert merged[0].queries is merged[0].of_queries is None
    entropy = merged[0].get("entropy")
    assert entropy is not None and entropy.shape[2] == sum(len(call.queries or ()) for call in found)
    assert same_bits(hookattn.load(merged.save(tmp_path / "f"))[0].get("entropy"), entropy)
    expected = torch.zeros(1, 2, 8, dtype=torch.float64)
    for call, s in zip(found, (5, 8), strict=True):
        q = x[:, :, s - (call.of_queries or 0) : s][:, :, list(call.queries or ())].double()
        expected[..., :s] += (q @ x[:, :, :s].double().mT / 2).softmax(-1).sum(2)
    close(merged[0].get("received"), expected, "received", 1e-6)
    with hookattn.tracing(layer, capture=("received", "entropy"), queries=queries) as found:
        for first in (0, 3):  # the oldest keys fall out
            layer(x[:, :, :5], x[:, :, first : first + 5], x[:, :, first : first + 5])
    with pytest.raises(StitchError, match="fell out of the cache"):
        st.merge(found)
    found[1].of_queries = None
    with pytest.raises(StitchError, match="queries were left out"):
        st.merge(found)


def test_the_empty_end_of_a_cache_is_not_seen_by_some_rows() -> None:
    x, layer = draw(1, 2, 8, 4, seed=7), Layer()
    for queries in (0, -1):
        with hookattn.tracing(layer, capture=("received", "entropy"), queries=queries) as found:
            layer(x[:, :, :5], x, x, causal(8, 8)[:5])
            layer(x[:, :, 5:], x, x, causal(8, 8)[5:])
        if queries == -1:
            assert st.merge(found)[0].get("entropy").shape[2] == 2  # type: ignore[union-attr]
            continue
        with pytest.raises(StitchError, match="queries were left out"):
            st.merge(found)


def test_a_cache_that_becomes_static_after_the_first_step() -> None:
    x, layer = draw(1, 2, 8, 4, seed=7), Layer()
    with hookattn.tracing(layer, capture=("received", "entropy")) as found:
        layer(x[:, :, :5], x[:, :, :5], x[:, :, :5], causal(5, 5))
        for i in (5, 6, 7):
            layer(x[:, :, i : i + 1], x, x, torch.arange(8)[None] <= i)
    expected = explicit(reference_attention(x, x, x, scale=0.5)[0], causal(8, 8).expand(1, 2, 8, 8))
    [call] = st.merge(found)
    close(call.get("received"), expected["received"], "received")
    close(call.get("entropy"), expected["entropy"], "entropy")


def test_cross_attention_has_no_positions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn = Layer()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.cross_attn(x, y, y)

    x, y = draw(1, 2, 5, 4, seed=1), draw(1, 2, 5, 4, seed=2)
    [call] = hookattn.trace(Two(), (x, y), capture=ALL)
    assert call.site.kind == "cross"
    check(call.get, explicit(reference_attention(x, y, y, scale=0.5)[0], None), None)
    assert any(all(name in note for name in POSITIONAL) for note in call.notes)
    [call] = hookattn.trace(Layer(), (x, y[:, :, :3], y[:, :, :3]), capture=ALL)
    assert call.get("mean_distance") is None and any("not defined" in note for note in call.notes)


# ------------------------------------------------------------------------------------ files, dtypes, names, errors


@pytest.mark.parametrize("stream", [False, True])
def test_file(stream: bool, tmp_path: Path) -> None:
    x, path = draw(2, 3, 9, 4, seed=6), tmp_path / "a.safetensors"
    found = hookattn.trace(Layer(is_causal=True), (x, x, x), capture=(*ALL, "q"), to=path if stream else None)
    plain = hookattn.trace(Layer(is_causal=True), (x, x, x), capture=(*ALL, "q"))
    if not stream:
        found.save(path)
    read = hookattn.load(path)
    assert list(read[0].fields) == list(plain[0].fields) and read[0].keys == 9
    assert read.selection["capture"] == ["q", *(s.key for s in asked())]
    assert read.selection["statistics"]["first_mass(3)"] == {"n": 3}
    sets = read.selection["statistics"]["segment_mass(a,b,none)"]["sets"]
    assert sets == {"a": [[0, 1], [2, 4]], "b": [[1, 2]], "none": []}
    for name in plain[0].fields:
        for trace in (found, read):
            value, expected = trace[0].get(name), plain[0].get(name)
            assert value is not None and expected is not None and value.dtype == expected.dtype
            assert torch.equal(value, expected), name


def test_dtypes() -> None:
    x = draw(2, 3, 40, 16, seed=6)
    [call] = hookattn.trace(Layer(is_causal=True), (x.bfloat16(),) * 3, capture=ALL)
    half = x.bfloat16()
    mask = causal(40, 40).expand(2, 3, 40, 40)
    expected = explicit(reference_attention(half, half, half, scale=0.25)[0], mask, None, torch.arange(40)[None])
    check(call.get, expected, mask)
    [call] = hookattn.trace(Layer(is_causal=True), (x, x, x), capture=ALL, dtype=torch.float16)
    for name in call.fields:
        value = call.get(name)
        assert value is not None and value.dtype == (torch.int64 if name == "top_k_keys(5)" else torch.float16)


def test_names() -> None:
    x = draw(1, 2, 9, 4, seed=6)
    [call] = hookattn.trace(Layer(), (x, x, x), capture=("first_mass", st.LocalMass(2), st.LocalMass(3), "top_k"))
    assert list(call.fields) == ["first_mass(1)", "local_mass(2)", "local_mass(3)", "top_k(8)", "top_k_keys(8)"]
    assert call.get("first_mass") is call.get("first_mass(1)") is call.get(st.FirstMass())
    assert call.get("top_k_keys") is not None and call.get("top_k") is call.get(st.TopK(8))
    with pytest.raises(FieldNotCaptured, match=r"may be local_mass\(2\) or local_mass\(3\)"):
        call.get("local_mass")
    with pytest.raises(FieldNotCaptured, match=r"'entropy' .* was not captured .*in capture="):
        call.get("entropy")
    with pytest.raises(AttributeError, match=r"no field 'entropie'; there are q, .*entropy"):
        call.get("entropie")
    assert hookattn.trace(Layer(), (x, x, x), capture=st.FirstMass(2))[0].get("first_mass") is not None
    assert hookattn.trace(Layer(), (x, x, x), capture="lse")[0].get("lse") is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ("entropy", "nothing"), "no field 'nothing'.*statistics entropy"),
        (lambda: "segment_mass", r"no defaults; give SegmentMass\(…\)"),
        (lambda: st.FirstMass(0), r"FirstMass: n=0"),
        (lambda: st.LocalMass(True), r"LocalMass: window=True"),
        (lambda: st.TopK(1.5), r"TopK: k=1.5"),  # type: ignore[arg-type]
        (lambda: st.SegmentMass({}), "SegmentMass"),
        (lambda: st.SegmentMass({"a": [-1]}), "ints from 0"),
        (lambda: (st.SegmentMass({"a": [1]}), st.SegmentMass({"a": [2]})), "two different statistics"),
    ],
)
def test_errors(make: Callable[[], Any], message: str) -> None:
    x = draw(1, 2, 9, 4, seed=6)
    with pytest.raises(SelectionError, match=message):
        hookattn.trace(Layer(), (x, x, x), capture=make())


def test_segments_beyond_the_keys_are_noted() -> None:
    x = draw(1, 2, 9, 4, seed=6)
    [call] = hookattn.trace(Layer(), (x, x, x), capture=st.SegmentMass({"in": [8], "out": [3, 9]}))
    assert call.notes == ("segment_mass: out has positions beyond the 9 keys",)


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(text.split("```python")[1].split("```")[0], "statistics.md", "exec"), names)
    call = names["call"]
    weights = masked_softmax(reference_attention(*[names["x"]] * 3, scale=32**-0.5)[0], causal(600, 600), None)
    close(call.get("first_mass"), weights[..., :4].sum(-1), "first_mass")
    close(call.get(names["prompt"])[..., 1], weights[..., 100:130].sum(-1), "question")
    for kind in st.STATISTICS.values():
        assert f"| `{kind.name}` | `{kind.__name__}(" in text
    assert len(st.merge(names["trace"])) == 1


# ------------------------------------------------------------------------------------------------ memory


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes())
        return out


def test_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine does not look whether a block has rows with nothing to attend to, the values are the same."""
    q, k, mask = draw(1, 4, 30, 8, seed=1), draw(1, 2, 33, 8, seed=2), draw(1, 1, 30, 33, seed=3) > 0
    mask[:, :, 7:9] = False
    problem = st.Problem(q, k, mask=mask, positions=torch.arange(30).unsqueeze(0))
    want = st.compute(problem, asked())
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    monkeypatch.setattr(engine, "_BLOCK_ON_GPU", 300)
    monkeypatch.setattr(
        "hookattn.attention.kernels.launch._has_triton", lambda: False
    )  # as its kernels have tests of their own
    found = st.compute(problem, asked())
    assert any("triton is not installed" in note for note in problem.notes)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, equal_nan=False)


@pytest.mark.parametrize("queries", [None, slice(-700, None)])
def test_nothing_of_the_size_of_the_matrix_is_formed(monkeypatch: pytest.MonkeyPatch, queries: Any) -> None:
    monkeypatch.setattr(engine, "_BLOCK", 1 << 14)
    x = draw(1, 2, 2048, 8, seed=1)
    layer = Layer(is_causal=True)
    with Largest() as seen:
        [call] = hookattn.trace(layer, (x, x, x), capture=ALL, queries=queries)
    assert call.certificate.faithful and seen.most <= 4 * 2 * 2048 * 16
