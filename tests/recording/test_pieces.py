"""Attention that a model computes piece by piece is one call, or each call says which piece it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import Call, Site, edit
from hookattn.attention.pieces import Piece
from hookattn.calls.edits import AppliedEdit
from hookattn.recording.edits_of_pieces import edits_of_pieces
from hookattn.testing import check_trace
from hookattn.testing.recheck import recheck

B, H, G, T, D = 2, 4, 2, 7, 4
Kernel = Callable[..., Tensor]


class Pieces(nn.Module):
    """Self-attention whose kernel is run as a function of it says; q, k and v of the last forward are kept."""

    def __init__(self, how: Callable[..., Tensor], fused: bool, groups: int = H, copies: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, H * D), nn.Linear(16, 2 * groups * D)
        self.how, self.fused, self.groups, self.copies = how, fused, groups, copies

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.copies:
            q, k, v = torch.from_numpy(q.numpy().copy()), k.clone(), v.clone()
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q * D**-0.5 @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ v

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.groups, D)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.kernel, *self.parts(x)).transpose(1, 2).flatten(2)


def folded(step: int) -> Callable[..., Tensor]:
    def run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out = torch.empty_like(q)
        for i in range(0, B * H, step):
            out[i : i + step] = kernel(q[i : i + step], k[i : i + step], v[i : i + step])
        return out.view(shape)

    return run


def buffered(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for i in range(0, T, 3):
        out[:, :, i : i + 3] = kernel(q[:, :, i : i + 3], k, v)
    return out


def sub(x: Tensor, dim: int, start: int, n: int) -> Tensor:
    return x.narrow(dim, start, n)


WAYS: dict[str, Callable[..., Tensor]] = {
    "query chunks": lambda f, q, k, v: torch.cat([f(q[:, :, i : i + 3], k, v) for i in range(0, T, 3)], 2),
    "query chunk()": lambda f, q, k, v: torch.cat([f(c, k, v) for c in q.chunk(3, 2)], 2),
    "query split()": lambda f, q, k, v: torch.cat([f(c, k, v) for c in q.split((1, 4, 2), 2)], 2),
    "query narrow()": lambda f, q, k, v: torch.cat([f(sub(q, 2, 0, 4), k, v), f(sub(q, 2, 4, 3), k, v)], 2),
    "queries one by one": lambda f, q, k, v: torch.cat([f(q[:, :, i : i + 1], k, v) for i in range(T)], 2),
    "query chunks into a buffer": buffered,
    "heads": lambda f, q, k, v: torch.stack([f(q[:, i], k[:, i], v[:, i]) for i in range(H)], 1),
    "heads unbind()": lambda f, q, k, v: torch.stack(list(map(f, q.unbind(1), k.unbind(1), v.unbind(1))), 1),
    "heads as slices": lambda f, q, k, v: torch.cat([f(*(x[:, i : i + 1] for x in (q, k, v))) for i in range(H)], 1),
    "heads two at a time": lambda f, q, k, v: torch.cat([f(*(x[:, i : i + 2] for x in (q, k, v))) for i in (0, 2)], 1),
    "samples": lambda f, q, k, v: torch.stack([f(q[i], k[i], v[i]) for i in range(B)]),
    "samples as slices": lambda f, q, k, v: torch.cat([f(*(x[i : i + 1] for x in (q, k, v))) for i in range(B)]),
    "samples and heads": lambda f, q, k, v: torch.stack(
        [torch.stack([f(q[i, j], k[i, j], v[i, j]) for j in range(H)]) for i in range(B)]
    ),
    **{f"folded heads, {n} at a time": folded(n) for n in (1, 2, 3, 4)},
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def check(call: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, hidden: Tensor | None = None) -> None:
    """Against explicit float64 math on the model's own q, k and v."""
    r = H // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(r, 1).transpose(-1, -2) * D**-0.5 + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    scale = call.scale or 1.0
    assert (call.q * scale - q * D**-0.5).abs().max() < 1e-6
    assert torch.equal(call.k, k) and torch.equal(call.v, v)
    assert (call.weights - weights).abs().max() < 1e-6
    assert (call.output - weights @ v.double().repeat_interleave(r, 1)).abs().max() < 1e-5
    assert call.certificate.faithful and call.heads is None and call.queries is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_one_call(way: str, fused: bool) -> None:
    model, x = Pieces(WAYS[way], fused).eval(), torch.randn(B, T, 16)
    untraced = model(x)
    trace = hookattn.trace(model, x)
    assert torch.equal(trace.output, untraced) and len(trace) == 1 and not trace.skipped
    check(trace[0], *model.parts(x))
    check_trace(trace)
    assert "put together" in trace[0].notes[-1] and not trace[0].guessed
    only = hookattn.trace(model, x, capture=("weights",))
    assert len(only) == 1 and torch.equal(only[0].weights, trace[0].weights)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads_one_by_one(groups: int, fused: bool) -> None:
    """Keys that several heads read are there once."""
    r = H // groups

    def way(f: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([f(q[:, i], k[:, i // r], v[:, i // r]) for i in range(H)], 1)

    model, x = Pieces(way, fused, groups).eval(), torch.randn(B, T, 16)
    trace = hookattn.trace(model, x)
    assert len(trace) == 1
    check(trace[0], *model.parts(x))


@pytest.mark.parametrize("fused", [True, False])
def test_each_piece_has_a_mask_and_a_bias(fused: bool) -> None:
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    bias = torch.randn(1, H, T, T)
    additive = bias.masked_fill(hidden, -torch.inf)

    def way(f: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([f(q[:, :, i : i + 3], k, v, additive[:, :, i : i + 3]) for i in range(0, T, 3)], 2)

    model, x = Pieces(way, fused).eval(), torch.randn(B, T, 16)
    trace = hookattn.trace(model, x)
    assert len(trace) == 1 and torch.equal(trace[0].mask.expand(1, H, T, T), ~hidden.expand(1, H, T, T))
    check(trace[0], *model.parts(x), bias=bias.double(), hidden=hidden)


def test_queries_that_see_keys_of_their_own_say_which_they_are() -> None:
    """Chunks that are given no more keys than they may see do not fit together."""

    def way(f: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([f(q[:, :, i : i + 3], k[:, :, : i + 3], v[:, :, : i + 3]) for i in range(0, T, 3)], 2)

    model, x = Pieces(way, True).eval(), torch.randn(B, T, 16)
    trace = hookattn.trace(model, x)
    assert [(c.queries, c.of_queries) for c in trace] == [((0, 1, 2), 7), ((3, 4, 5), 7), ((6,), 7)]
    assert [c.weights.shape[2:] for c in trace] == [(3, 3), (3, 6), (1, 7)]
    assert "queries 3 to 5 of 7" in " ".join(trace[1].notes) and "2 of 3 calls" in trace[1].notes[-1]
    check_trace(trace)


@pytest.mark.parametrize("fused", [True, False])
def test_what_does_not_tile_is_not_put_together(fused: bool) -> None:
    """Backwards, with a hole, twice, or of two tensors: what is beside what is not guessed."""
    heads = torch.arange(H)
    ways: dict[str, Callable[..., Tensor]] = {
        "backwards": lambda f, q, k, v: torch.stack([f(q[:, i], k[:, i], v[:, i]) for i in heads.flip(0).tolist()], 1),
        "a hole": lambda f, q, k, v: torch.cat([f(q[:, :, :2], k, v), q[:, :, 2:4], f(q[:, :, 4:], k, v)], 2),
        "twice": lambda f, q, k, v: torch.cat([f(q[:, :, :4], k, v), f(q[:, :, :4], k, v)[:, :, :3]], 2),
        "two": lambda f, q, k, v: f(q, k, v) + f(q + 1, k, v),
    }
    x = torch.randn(B, T, 16)
    for name, way in ways.items():
        trace = hookattn.trace(Pieces(way, fused).eval(), x)
        n = H if name == "backwards" else 2
        assert len(trace) == n and [c.index for c in trace] == list(range(n)), name
        assert all(f"{i} of {n} calls" in c.notes[-1] for i, c in enumerate(trace, 1)), name
        check_trace(trace)
    trace = hookattn.trace(Pieces(ways["backwards"], fused).eval(), x)
    assert [c.heads for c in trace] == [(3,), (2,), (1,), (0,)] and trace[0].kv_heads == (0,)


def test_copies_whose_origin_is_unknown_say_how_many_there_are() -> None:
    model = Pieces(WAYS["query chunks"], True, copies=True).eval()
    trace = hookattn.trace(model, torch.randn(B, T, 16))
    assert len(trace) == 3 and [c.notes[-1][:10] for c in trace] == ["1 of 3 cal", "2 of 3 cal", "3 of 3 cal"]


class TwoLayers(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pieces(WAYS[way], True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_layers_and_steps_stay_apart() -> None:
    model, x = TwoLayers("heads").eval(), torch.randn(B, T, 16)
    with hookattn.tracing(model) as trace:
        model(x)
        model(x * 2)
    assert [(c.site.path, c.step, c.index) for c in trace] == [
        ("layers.0", 0, 0),
        ("layers.1", 0, 1),
        ("layers.0", 1, 2),
        ("layers.1", 1, 3),
    ]
    check(trace[2], *model.layers[0].parts(x * 2))  # type: ignore[operator]


def test_one_module_that_runs_twice_is_two_attentions() -> None:
    """The layers of a model may share their weights."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
                x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x

    trace = hookattn.trace(Shared().eval(), torch.randn(B, T, 16))
    assert [tuple(c.weights.shape) for c in trace] == [(B, H, T, T)] * 2
    assert [c.notes for c in trace] == [(f"{i} of 2 calls that this module made in this step",) for i in (1, 2)]


def test_in_a_file_each_piece_says_which_it_is(tmp_path: Path) -> None:
    """A file has what was written as the model ran; a trace in memory that is saved has them together."""
    model, x = Pieces(WAYS["query chunks"], True).eval(), torch.randn(B, T, 16)
    hookattn.trace(model, x, to=tmp_path / "streamed.safetensors")
    streamed = hookattn.load(tmp_path / "streamed.safetensors")
    assert [c.queries for c in streamed] == [(0, 1, 2), (3, 4, 5), (6,)]
    whole = hookattn.trace(model, x)
    whole.save(tmp_path / "saved.safetensors")
    saved = hookattn.load(tmp_path / "saved.safetensors")
    assert len(saved) == 1
    check(saved[0], *model.parts(x))
    check_trace(saved)


def test_pieces_keep_nothing_of_what_they_were_made_of() -> None:
    import gc
    import weakref

    model, x = Pieces(WAYS["heads"], False).eval(), torch.randn(B, T, 16)
    with hookattn.tracing(model) as trace:
        model(x)
        before = weakref.ref(trace.calls[0])
        assert len(trace) == H
    gc.collect()
    assert len(trace) == 1 and before() is None


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_selected_is_counted_in_the_whole(fused: bool) -> None:
    x = torch.randn(B, T, 16)

    def traced(way: str, **selected: Any) -> hookattn.Trace:
        torch.manual_seed(1)
        return hookattn.trace(Pieces(WAYS[way], fused).eval(), x, **selected)

    for way in WAYS:
        whole = traced(way)[0]
        if way == "folded heads, 3 at a time":
            with pytest.raises(hookattn.SelectionError, match="some heads of one batch entry"):
                traced(way, heads=[-1])
            continue
        one = traced(way, heads=[-1])
        assert {c.heads for c in one} == {(H - 1,)}, way
        assert torch.equal(torch.cat([c.weights for c in one]), whole.weights[:, -1:]), way
        assert torch.equal(torch.cat([c.k for c in one]), whole.k[:, -1:]), way
        last = traced(way, queries=slice(-2, None))
        got = torch.cat([c.weights for c in last], 2)
        assert [q for c in last for q in c.queries or ()] == [T - 2, T - 1] and {c.of_queries for c in last} == {T}, way
        assert torch.equal(got, whole.weights[:, :, -2:]), way
        check_trace(one)
        check_trace(last)
    some = traced("heads", heads=[1, 3])
    assert [c.heads for c in some] == [(1,), (3,)] and not some.skipped
    with pytest.raises(hookattn.SelectionError, match="has 4 heads"):
        traced("heads", heads=[4])


class OneByOne(nn.Module):
    """Cross-attention, one query after the other, of queries that lie in ``order``."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.q, self.kv, self.order = nn.Linear(16, H * D), nn.Linear(6, 2 * H * D), order

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (H, D))  # B T H D
        k, v = self.kv(y).unflatten(-1, (2, H, D)).unbind(2)
        equation = f"{self.order}d,bshd->bhts"
        q = q.permute(*("bth".index(letter) for letter in self.order), 3)
        dim = self.order.index("t")
        outs = []
        for i in range(T):
            w = (torch.einsum(equation, q.narrow(dim, i, 1), k) * 0.3).softmax(-1)
            outs.append(torch.einsum("bhts,bshd->bthd", w, v))
        return torch.cat(outs, 1).flatten(2)


@pytest.mark.parametrize("order", ["bth", "hbt", "tbh", "htb"])
@pytest.mark.parametrize("batch", [1, B])
def test_queries_of_another_sequence_one_by_one(order: str, batch: int) -> None:
    torch.manual_seed(0)
    model = OneByOne(order).eval()
    with torch.no_grad():
        x, y = torch.randn(batch, T, 16), torch.randn(batch, 5, 6)
        (call,) = hookattn.trace(model, (x, y), verify="full")
        q = model.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        k = model.kv(y).unflatten(-1, (2, H, D))[:, :, 0].transpose(1, 2)
        want = (q.double() @ k.double().mT * 0.3).softmax(-1)
    assert call.weights.shape == want.shape and torch.allclose(call.weights.double(), want, atol=1e-5)


# What was edited in pieces is said of the whole

CUT = [way for way in WAYS if way.startswith("quer") or way in ("heads as slices", "heads two at a time")]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (edit.zero("weights", heads=[1], queries=[6]), "zero(weights) head 1, query 6"),
        (edit.zero("weights", heads=[1]), "zero(weights) head 1"),
        (edit.zero("weights"), "zero(weights)"),
        (edit.scale("scores", 3.0, heads=[1, 2], queries=[0, 6]), "scale(scores) head 1 2, query 0 6"),
        (edit.zero("output", heads=[1], batch=[1]), "zero(output) head 1, batch entry 1"),
        (edit.knockout(heads=[2], queries=[3], keys=[1]), "knockout(mask) head 2, query 3, key 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("way", CUT)
def test_edits_of_pieces_are_those_of_the_whole(way: str, made: Any, told: str) -> None:
    x = torch.randn(B, T, 16)
    cut, plain = Pieces(WAYS[way], True).eval(), Pieces(lambda f, q, k, v: f(q, k, v), True).eval()
    plain.load_state_dict(cut.state_dict())
    trace, whole = hookattn.edited(cut, x, made), hookattn.edited(plain, x, made)
    assert len(trace) == 1 and trace[0].edits == whole[0].edits and str(trace[0].edits[0]) == told
    assert (trace[0].derivable, trace[0].own_scores) == (whole[0].derivable, whole[0].own_scores)
    for name in whole[0].fields:
        mine, theirs = trace[0].get(name), whole[0].get(name)
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            assert (mine.double() - theirs.double()).abs().max() < 1e-5, name
    assert False not in [check.passed for check in recheck(trace[0]).values()]
    check_trace(trace)


def test_edits_of_folded_pieces_are_those_of_the_whole() -> None:
    """Heads in the batch, three at a time: a piece has heads of two batch entries."""
    q = torch.zeros(1, 3, T, D)
    mark, axes = object(), (("B", 2), ("H", 4))
    calls, pieces = [], []
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        fields: dict[str, Any] = {"q": q[:, : stop - start], "k": q[:, : stop - start]}
        made = Call(Site("a"), 0, 0, "sdpa", torch.float32, 1.0, fields=fields)
        made.edits = (AppliedEdit("zero", "weights", heads=None if start == 3 else (1,)),)
        calls.append(made)
        pieces.append(Piece(mark, axes, start, stop))
    # Of the first piece entry 0's head 1; of the second entry 0's head 3 and entry 1's 0 and 1; of the third, which has
    # two heads of entry 1 from head 2 on, none is numbered 1.
    calls[2].edits = (AppliedEdit("zero", "weights", heads=(3,)),)
    assert edits_of_pieces(calls, pieces) == (
        AppliedEdit("zero", "weights", heads=(1, 3), batch=(0,)),
        AppliedEdit("zero", "weights", heads=(0, 1, 3), batch=(1,)),
    )
    for made in calls:
        made.edits = (AppliedEdit("zero", "weights"),)
    assert edits_of_pieces(calls, pieces) == (AppliedEdit("zero", "weights"),)


def test_edits_of_single_samples_are_those_of_the_whole() -> None:
    x = torch.zeros(1, 2, T, D)
    calls = [Call(Site("a"), 0, 0, "sdpa", torch.float32, 1.0, fields={"q": x, "k": x}) for _ in range(3)]
    a, b = AppliedEdit("add", "output"), AppliedEdit("scale", "output", heads=(1,), batch=(0,))
    calls[0].edits, calls[2].edits = (b, a), (a, b, a)
    pieces = [Piece(1, (("B", 3),), i, i + 1) for i in range(3)]
    # In the order of each call; what was done twice stands there twice.
    assert edits_of_pieces(calls, pieces) == (
        b.numbered(batch=(0,)),
        a.numbered(batch=(0, 2)),
        b.numbered(batch=(2,)),
        a.numbered(batch=(2,)),
    )


def test_a_mask_of_one_row_is_that_of_its_row() -> None:
    """Where each piece has one query, a mask of size 1 there is not that of all queries."""
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)

    def run(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros(T, T).masked_fill(hidden, -torch.inf)
        return torch.cat([kernel(q[:, :, i : i + 1], k, v, bias[i : i + 1]) for i in range(T)], 2)

    model, x = Pieces(run, True).eval(), torch.randn(B, T, 16)
    trace = hookattn.trace(model, x)
    assert len(trace) == 1
    check(trace[0], *model.parts(x), hidden=hidden)
