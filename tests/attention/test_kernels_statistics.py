"""The GPU kernels of statistics against explicit float64 matrices: on a GPU as they are compiled, elsewhere in Triton's
interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional as F

import hookattn
from hookattn import statistics as st
from hookattn.attention.kernels import launch
from hookattn.attention.kernels import statistics as kernels
from hookattn.checks import LARGEST
from hookattn.statistics import fused
from hookattn.torch_internals import devices
from tests.interpreter import DEVICE, Broken, interpreted
from tests.reference import draw, reference_attention
from tests.statistics.test_statistics import ALL, POSITIONAL, Layer, asked, causal, check, close, explicit

pytest.importorskip("triton.language")

__all__ = ["interpreted"]  # a fixture
OWN = "top_k(5): no kernel takes them"
few = settings(max_examples=10, deadline=None, phases=[Phase.generate])  # shrinking takes minutes in the interpreter


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles also where a test is small, and the engine is told that there is a GPU."""
    tile = launch.Tile(16, 16, 4)
    monkeypatch.setattr(kernels, "_tile_pair", lambda *args: (tile, tile))
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)


def computed(problem: st.Problem, notes: tuple[str, ...] = (OWN,), wanted: Any = None) -> dict[str, Any]:
    """What comes of the kernels, on the CPU; ``notes``: the ends of those that are expected."""
    there = {name: getattr(problem, name) for name in problem.__slots__}
    there = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in there.items()}
    own = st.Problem(**{**there, "notes": []})
    found = st.compute(own, wanted or asked())
    assert len(own.notes) == len(notes)
    assert all(note.endswith(end) for note, end in zip(own.notes, notes, strict=True)), own.notes
    return {name: x if x is None else x.cpu() for name, x in found.items()}


def allowed(problem: st.Problem) -> Tensor:
    """B H T S: mask, causality and window, as a matrix."""
    (b, h, t, _), s = problem.q.shape, problem.k.shape[2]
    rows = torch.arange(t) if problem.rows is None else problem.rows
    away = (rows.unsqueeze(1) + problem.offset - torch.arange(s)).expand(b, h, t, s)
    mask = torch.ones(b, h, t, s, dtype=torch.bool) if problem.mask is None else problem.mask.expand(b, h, t, s)
    if problem.causal:
        mask = mask & (away >= 0)
    if problem.window is not None:
        mask = mask & (away < problem.window) & (away > -problem.window)
    return mask


def matrix(problem: st.Problem) -> dict[str, Tensor]:
    """Every statistic by its definition, in float64."""
    q, k, scores = problem.q, problem.k, problem.scores
    if scores is None:
        given = {"scale": problem.scale, "bias": problem.bias, "softcap": problem.softcap}
        scores = reference_attention(q, k, k, **given)[0]
    return explicit(scores, allowed(problem), problem.sinks, problem.positions)


def compare(problem: st.Problem) -> None:
    found = computed(problem)
    check(found.get, matrix(problem), allowed(problem))
    for name, value in found.items():
        assert value is None or value.is_contiguous(), name


@pytest.mark.slow
@given(data=some.data())
@few
def test_everything_at_once(data: some.DataObject) -> None:
    """Any part there is or is not, in any shape that broadcasts; rows with nothing to attend to among them."""
    compare(drawn(data, heads=2, t=40, s=50))


# More heads repeat what two show, and the interpreter needs a second and more for each of these.
@pytest.mark.slow
@given(data=some.data())
@settings(few, max_examples=60)
def test_everything_at_once_in_more_shapes(data: some.DataObject) -> None:
    compare(drawn(data, heads=3, t=40, s=70))


def drawn(data: some.DataObject, heads: int, t: int, s: int) -> st.Problem:
    """A problem of one to ``heads`` query heads for a key head, and of up to t queries and s keys."""
    pick = data.draw
    b, g, per = pick(some.integers(1, 2)), pick(some.integers(1, 2)), pick(some.integers(1, heads))
    t, s, d = pick(some.integers(1, t)), pick(some.integers(1, s)), pick(some.integers(1, 20))
    h, seed = g * per, pick(some.integers(0, 99))
    dtype = pick(some.sampled_from([torch.float32, torch.float16, torch.bfloat16]))

    def part(name: str, *wide: bool) -> Tensor | None:
        """Of numbers, in a shape that broadcasts; or none."""
        if not pick(some.booleans(), label=name):
            return None
        shape = [n if pick(some.booleans(), label=name) else 1 for n in (b, h, t, s)[: len(wide)]]
        return draw(*shape, *[1] * (4 - len(shape)), seed=seed + len(name))

    full = (True,) * 4
    scale: Any = part("scale", *full)
    bias, sinks, hide = part("bias", *full), part("sinks", True, True, True), part("mask", *full)
    mask = None if hide is None else hide > pick(some.sampled_from([-1.0, 0.5, 9.0]))
    problem = st.Problem(
        draw(b, h, t, d, seed=seed, dtype=dtype),
        draw(pick(some.sampled_from([1, b])), g, s, d, seed=seed + 1, dtype=dtype),
        pick(some.floats(-2, 2)) if scale is None else scale,
        pick(some.sampled_from([None, 2.0])),
        None if bias is None else (3 * bias).to(dtype),
        mask,
        sinks,
        causal=pick(some.booleans()),
        window=pick(some.one_of(some.none(), some.integers(1, 50))),
        offset=pick(some.integers(-50, 50)),
        rows=pick(some.sampled_from([None, torch.arange(t), torch.randperm(t) * 2])),
        positions=torch.randint(0, s + 3, (pick(some.sampled_from([1, b])), t)),
    )
    problem.k = problem.k.expand(b, -1, -1, -1) if pick(some.booleans()) else problem.k
    if pick(some.booleans()):
        problem.scores = draw(b, t, h, s, seed=3, dtype=dtype).transpose(1, 2)
    return problem


@pytest.mark.parametrize("causality", ["none", "causal", "window", "both"])
@pytest.mark.parametrize("rows", [None, "last", "any"])
def test_tiles_that_all_rows_see_and_edges(causality: str, rows: str | None) -> None:
    """Where queries are on the diagonal as in a real call, so that most tiles are read without a look at any mask."""
    t = s = 70  # four tiles and a part of one
    q, k = draw(1, 2, t, 8, seed=1), draw(1, 1, s, 8, seed=2)
    at = torch.arange(t) if rows is None else torch.arange(t)[-40:] if rows == "last" else torch.randperm(t)[:40]
    problem = st.Problem(q[:, :, at], k, 0.4, rows=at, positions=at.unsqueeze(0))
    problem.causal = causality in ("causal", "both")
    problem.window = 35 if causality in ("window", "both") else None
    compare(problem)
    problem.positions = None  # they alone would keep tiles at the diagonal from being taken for whole ones
    close(computed(problem, (), [st.LogSumExp()])["lse"], matrix(problem)["lse"], "lse")


def test_spans_are_those_of_the_matrix() -> None:
    """Outside of first and last nothing is seen, from left to right everything; and no block more is taken than needed
    where queries are in order."""
    for seed in range(200):
        make = torch.Generator().manual_seed(seed)
        t, s, bm, bn = (int(torch.randint(1, n, (), generator=make)) for n in (60, 60, 7, 7))
        rows = torch.randperm(2 * t, generator=make)[:t]
        rows = rows.sort().values if seed % 2 else rows
        problem = st.Problem(torch.zeros(1, 1, t, 1), torch.zeros(1, 1, s, 1), rows=rows)
        problem.causal, problem.window = seed % 3 > 0, (None, 1, 7, 30)[seed % 4]
        problem.offset = int(torch.randint(-30, 30, (), generator=make))
        if not problem.causal and problem.window is None:
            continue
        seen = allowed(problem)[0, 0]
        for c, (first, left, right, last) in enumerate(kernels._query_blocks(problem, bm, bn).T.tolist()):
            assert 0 <= first <= left <= right <= last <= -(-t // bn)
            column = seen[:, c * bm : (c + 1) * bm]
            assert not column[: first * bn].any() and not column[last * bn :].any()
            assert column[left * bn : right * bn].all()
            if seed % 2:
                blocks = [x.any().item() for x in column.split(bn)]
                assert sum(blocks) == last - first or not any(blocks)


# Tiles are chosen by width alone where a number has 16 bits, so that one width shows what the other type does.
@pytest.mark.parametrize(
    ("dtype", "d"), [*((torch.float16, d) for d in (1, 24, 80, 128, 256)), (torch.bfloat16, 80)], ids=str
)
def test_head_widths_and_the_tiles_that_are_used(monkeypatch: pytest.MonkeyPatch, d: int, dtype: torch.dtype) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(devices, "on_gpu", lambda x: True)
    for t, s in ((3, 300), (150, 140)):
        q, k = draw(1, 2, t, d, seed=1, dtype=dtype), draw(1, 1, s, d, seed=2, dtype=dtype)
        at = torch.arange(t) + max(s - t, 0)
        compare(st.Problem(q, k, d**-0.5, causal=True, offset=max(s - t, 0), positions=at.unsqueeze(0)))
    if d <= 128:
        q, k = draw(1, 2, 140, d, seed=1), draw(1, 1, 40, d, seed=2)
        compare(st.Problem(q, k, d**-0.5, positions=torch.arange(140).unsqueeze(0)))


def test_large_scores_and_short_distances_far_out() -> None:
    """Nothing cancels: the entropy where scores are in the thousands, distances where positions are."""
    q, k = draw(1, 2, 40, 8, seed=1, std=30), draw(1, 2, 60, 8, seed=2, std=30)
    compare(st.Problem(q, k, scores=reference_attention(q, k, k, scale=1.0)[0].float()))
    s, t = 5000, 16
    bias = -(torch.arange(s - t, s)[:, None] - torch.arange(s)).abs().float()[None, None]
    at = torch.arange(s - t, s).unsqueeze(0)
    q, k = draw(1, 1, t, 8, seed=1), draw(1, 1, s, 8, seed=2)
    problem = st.Problem(q, k, 0.1, bias=bias, positions=at, causal=True, offset=s - t)
    found = computed(problem, (), [st.MeanDistance()])["mean_distance"]
    close(found, matrix(problem)["mean_distance"], "mean_distance", 1e-5)


@pytest.mark.parametrize("spot", [math.inf, -math.inf, math.nan])
def test_what_is_hidden_need_not_be_finite(spot: float) -> None:
    q, k = draw(1, 2, 20, 8, seed=1), draw(1, 2, 20, 8, seed=2)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    k[:, :, 5, 0], mask[..., 5] = spot, False
    k[:, :, 19], mask[..., 19] = spot, False
    clean = k.clone()
    clean[:, :, [5, 19]] = 0
    problem = st.Problem(q, k, 0.3, mask=mask, positions=torch.arange(20).unsqueeze(0))
    want = computed(replace(problem, k=clean))
    for name, value in computed(problem).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("sinks", [None, draw(1, 2, 1, 1, seed=5)])
def test_nan_is_not_hidden(sinks: Tensor | None) -> None:
    q, k, at = draw(1, 2, 40, 8, seed=1), draw(1, 2, 40, 8, seed=2), torch.arange(40).unsqueeze(0)
    q[0, 0, 20] = math.nan
    problem = st.Problem(q, k, sinks=sinks, positions=at, causal=True)
    found = computed(problem)
    for name in {x for s in asked() for x in s.fields} - {"received", "top_k(5)", "top_k_keys(5)", "max_score"}:
        value = found[name].flatten(3) if found[name].dim() > 3 else found[name].unsqueeze(-1)
        assert value[0, 0, 20].isnan().all(), name
        assert value[0, 0, 19].isfinite().all() and value[0, 1].isfinite().all(), name
    assert found["max_score"][0, 0, 20].isnan()
    assert found["received"][0, 0, :21].isnan().all() and found["received"][0, 1].isfinite().all()


def test_rows_with_nothing_to_attend_to() -> None:
    q, k = draw(1, 2, 20, 8, seed=1), draw(1, 2, 30, 8, seed=2)
    mask = draw(1, 1, 20, 30, seed=3) > 0
    mask[:, :, [2, 17]] = False
    problem = st.Problem(q, k, mask=mask, positions=torch.arange(20).unsqueeze(0))
    found = computed(problem)
    for name, value in found.items():
        if name in ("lse", "max_score"):
            assert (value[:, :, [2, 17]] == -math.inf).all()
        elif name not in ("received", "top_k_keys(5)"):
            assert not value[:, :, [2, 17]].any(), name
    check(found.get, matrix(problem), mask)


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("one", [x for x in asked() if not isinstance(x, st.TopK)], ids=lambda x: x.key)
def test_each_alone(one: st.Statistic) -> None:
    """Nothing else has to be asked for."""
    q, k, at = draw(1, 4, 40, 8, seed=1), draw(1, 2, 40, 8, seed=2), torch.arange(40).unsqueeze(0)
    problem = st.Problem(q, k, 0.5, causal=True, positions=at)
    found = computed(problem, (), [one])
    assert list(found) == [one.key]
    close(found[one.key], matrix(problem)[one.key], one.key)


def test_several_of_a_kind_are_their_own_tensors_in_their_order() -> None:
    q, k, at = draw(1, 2, 20, 8, seed=1), draw(1, 2, 40, 8, seed=2), torch.arange(20).unsqueeze(0)
    problem = st.Problem(q, k, 0.5, positions=at)
    one, two = st.SegmentMass({"a": [1, 3], "b": range(30)}), st.SegmentMass({"c": [39]})
    wanted = [st.FarMass(3), two, st.TopK(2), st.FirstMass(5), st.LocalMass(3), one, st.FirstMass(6)]
    wanted += [st.OffsetMass(LARGEST), st.OffsetMass(-(LARGEST)), st.LocalMass(LARGEST), st.FirstMass(LARGEST)]
    found = computed(problem, ("top_k(2): no kernel takes them",), wanted)
    assert list(found) == [name for x in wanted for name in x.fields]
    weights = matrix(problem)["weights"]
    close(found[one.key], torch.stack([weights[..., [1, 3]].sum(-1), weights[..., :30].sum(-1)], -1), "one")
    close(found[two.key], weights[..., 39:], "two")
    close(found["first_mass(5)"], weights[..., :5].sum(-1), "5")
    for name in (f"first_mass({LARGEST})", f"local_mass({LARGEST})"):
        close(found[name], weights.sum(-1), name)
    for name in (f"offset_mass({LARGEST})", f"offset_mass(-{LARGEST})"):
        assert not found[name].any()
    close(found["far_mass(3)"] + found["local_mass(3)"], weights.sum(-1), "both")
    store = [x.untyped_storage().data_ptr() for x in found.values()]
    assert len(set(store)) == len(store)


def test_a_subclass_is_its_own_statistic() -> None:
    @dataclass(frozen=True)
    class Halved(st.LogSumExp):
        name: ClassVar[str] = "halved"

        def write(self, block: Any, sums: Tensor, out: Any) -> None:
            out[self.key][block.place] = block.lse.squeeze(-1) / 2

    problem = st.Problem(draw(1, 2, 20, 8, seed=1), draw(1, 2, 40, 8, seed=2))
    found = computed(problem, ("halved: no kernel takes them",), [Halved(), st.LogSumExp()])
    torch.testing.assert_close(found["halved"], found["lse"] / 2)


def test_more_sets_than_fit() -> None:
    many = st.SegmentMass({str(i): [i] for i in range(kernels.MOST_SETS - 1)})
    more = st.SegmentMass({"x": [0], "y": [1]})
    one = st.SegmentMass({"z": [2]})
    problem = st.Problem(draw(1, 2, 20, 8, seed=1), draw(1, 2, 70, 8, seed=2))
    found = computed(problem, (f"{more.key}: no kernel takes them",), [many, more, one])
    weights = matrix(problem)["weights"]
    close(found[many.key], weights[..., : kernels.MOST_SETS - 1], "many")
    close(found[more.key], weights[..., :2], "more")
    close(found[one.key], weights[..., 2:3], "one")


@pytest.mark.parametrize(
    ("q", "k", "reason"),
    [
        (torch.float64, torch.float64, "no kernel takes float64"),
        (torch.float32, torch.bfloat16, "no kernel multiplies float32 by bfloat16"),
    ],
)
def test_what_no_kernel_takes_is_done_and_said(q: torch.dtype, k: torch.dtype, reason: str) -> None:
    problem = st.Problem(draw(1, 2, 20, 8, seed=1, dtype=q), draw(1, 2, 20, 8, seed=2, dtype=k))
    found = computed(problem, (f"entropy, received: {reason}",), [st.Entropy(), st.Received()])
    for name, value in found.items():
        close(value, matrix(problem)[name], name)


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 129), (torch.float16, 257)])
def test_wider_heads(dtype: torch.dtype, d: int) -> None:
    problem = st.Problem(draw(1, 1, 9, d, seed=1, dtype=dtype), draw(1, 1, 9, d, seed=2, dtype=dtype), 0.1)
    name = str(dtype).removeprefix("torch.")
    found = computed(problem, (f"lse: no kernel takes {name} heads wider than {d - 1}",), [st.LogSumExp()])
    close(found["lse"], matrix(problem)["lse"], "lse")


def test_a_kernel_that_cannot_start_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken()
    monkeypatch.setattr(launch, "_refused", {})
    monkeypatch.setattr(kernels, "kernels", lambda: SimpleNamespace(sum_rows=broken))
    problem = st.Problem(draw(1, 2, 20, 8, seed=1), draw(1, 2, 20, 8, seed=2))
    for _ in range(2):
        found = computed(problem, ("RuntimeError: out of resource: shared memory",), [st.Entropy()])
        close(found["entropy"], matrix(problem)["entropy"], "entropy")
    assert broken.tried == 1


def test_every_statistic_but_the_top_keys_has_a_kernel() -> None:
    kinds = {*fused._SUMS, *fused._RANGES, st.SegmentMass}
    assert kinds == set(st.STATISTICS.values()) - {st.TopK}
    assert set(fused._SUMS.values()) <= {*kernels.SUMS, "received"}


# ------------------------------------------------------------------------------------------------ in a trace


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"queries": slice(3, None, 5)}, torch.float32),
        ({"heads": [3, 0], "queries": [9, 2]}, torch.float32),
        ({"heads": [1, 2, 3]}, torch.float32),
    ],
)
def test_a_trace(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Selected heads and queries of a causal kernel; what was left to the engine is said in the call."""
    q = draw(2, 4, 40, 16, seed=1, dtype=dtype)
    k, v = (draw(2, 2, 40, 16, seed=i, dtype=dtype) for i in (2, 3))
    model = Layer(enable_gqa=True, is_causal=True)
    [call] = hookattn.trace(model, tuple(x.to(DEVICE) for x in (q, k, v)), capture=ALL, **options)
    assert call.notes == (f"computed by torch's own operations: {OWN}",)
    rows, heads = torch.arange(40)[options.get("queries", slice(None))], options.get("heads", slice(None))
    scores = reference_attention(q, k, v, scale=0.25)[0][:, heads][:, :, rows]
    mask = causal(40, 40)[rows].expand(scores.shape)
    check(lambda name: getattr(call.get(name), "cpu", lambda: None)(), explicit(scores, mask, None, rows[None]), mask)


def test_a_trace_of_scores_that_the_model_forms() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = (x @ x.mT).masked_fill(~causal(40, 40).to(x.device), -torch.inf)
            return F.softmax(scores, -1) @ x

    x = draw(1, 3, 40, 8, seed=4)
    [call] = hookattn.trace(Written(), x.to(DEVICE), capture=("entropy", "received", "mean_distance"))
    assert not call.notes
    want = matrix(st.Problem(x, x, causal=True, positions=torch.arange(40).unsqueeze(0)))
    for name in ("entropy", "received", "mean_distance"):
        close(call.get(name).cpu(), want[name], name)  # type: ignore[union-attr]


def test_without_positions() -> None:
    problem = st.Problem(draw(1, 2, 20, 8, seed=1), draw(1, 2, 30, 8, seed=2))
    found = computed(problem)
    assert all(found[name] is None for name in POSITIONAL)
    check(found.get, matrix(problem), None)
