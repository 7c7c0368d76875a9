"""The measures of a head against definitions written out in float64, from each thing that a trace may hold."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import analyze
from hookattn.errors import FieldNotCaptured, MeasureError, SelectionError
from tests.analyze.build import CASES, Case, case, given, previous, uniform

POSITIONAL = ("local_mass", "global_spread", "mean_distance", "previous_token", "next_token", "self_token")
NAMES = ("entropy", "normalised_entropy", "confidence", "first_token", "sink", "learned_sink", *POSITIONAL)


def row(name: str, w: Tensor, allowed: Tensor, i: int | None, first: int) -> float:
    """One query's value, from the formula; NaN: the query does not count. ``i``: its key position."""
    total = float(w.sum())
    if name == "entropy":
        return -sum(float(x) * math.log(x) for x in w if x > 0)
    if name == "normalised_entropy":
        n = int(allowed.sum())
        return row("entropy", w, allowed, i, first) / math.log(n) if n > 1 else math.nan
    if name == "confidence":
        return float(w.max())
    if name == "first_token":
        return float(w[first])
    if name == "learned_sink":
        return 1 - total
    assert i is not None
    near = [abs(i - j) for j in range(len(w))]
    if name == "local_mass":
        return sum(float(x) for x, n in zip(w, near, strict=True) if n < 4)
    if name == "global_spread":
        return sum(float(x) for x, n in zip(w, near, strict=True) if n >= 4)
    if name == "mean_distance":
        return sum(float(x) * n for x, n in zip(w, near, strict=True)) / total
    j = i + {"previous_token": -1, "next_token": 1, "self_token": 0}[name]
    return float(w[j]) if 0 <= j < len(w) else 0.0


def explicit(name: str, made: Case, layer: int) -> tuple[Tensor, Tensor]:
    """(B H, H) in float64: the mean over the queries that count, for each batch entry and over all of them."""
    weights = made.weights[layer]
    b, h, t, _ = weights.shape
    own, heads = torch.full((b, h), math.nan, dtype=torch.float64), []
    for head in range(h):
        every = []
        for i in range(b):
            first = int(made.real[i].byte().argmax())
            found = []
            for j in range(t):
                if not made.rows[i, j]:
                    continue
                place = None if made.positions is None else int(made.positions[j])
                base = "first_token" if name == "sink" else name
                found.append(row(base, weights[i, head, j], made.mask[i, 0, j], place, first))
            found = [x for x in found if not math.isnan(x)]
            if found:
                own[i, head] = sum(found) / len(found)
                if name == "sink":
                    own[i, head] = float(own[i, head] > 0.3)
                every += [own[i, head].item()] if name == "sink" else found
        heads.append(sum(every) / len(every) if every else math.nan)
    return own, torch.tensor(heads, dtype=torch.float64)


def columns(table: Any, name: str, layer: int, *shape: int) -> Tensor:
    return torch.tensor(table[table.call == layer][name].to_numpy()).view(*shape)


def check(trace: hookattn.Trace, made: Case, names: tuple[str, ...], atol: float = 2e-6, **options: Any) -> None:
    head = analyze.measure(trace, names, **options)
    example = analyze.measure(trace, names, by="example", **options)
    for layer, weights in enumerate(made.weights):
        b, h = weights.shape[:2]
        for name in names:
            own, over = explicit(name, made, layer)
            torch.testing.assert_close(columns(example, name, layer, b, h), own, atol=atol, rtol=1e-5, equal_nan=True)
            torch.testing.assert_close(columns(head, name, layer, h), over, atol=atol, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", CASES)
def test_equal_to_the_formulas(kind: str) -> None:
    made = case(**CASES[kind])
    assert bool(made.rows.any())
    check(made.trace, made, NAMES)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("keep", ["weights mask", "scores mask sinks", "q k mask bias sinks"])
def test_from_whatever_the_trace_holds(kind: str, keep: str) -> None:
    made = case(**CASES[kind], keep=keep.split())
    # What a row of float32 weights lacks of 1 is a sink only where it is more than rounding.
    check(made.trace, made, NAMES, atol=2e-5)


def test_cross_attention() -> None:
    made = case(cross=True, t=5, s=8, pad=(0, 3))
    names = tuple(n for n in NAMES if n not in POSITIONAL)
    check(made.trace, made, names)
    for name in POSITIONAL:
        with pytest.raises(MeasureError, match=rf"{name} of call 0 \(layers.0.attn, step 0\)"):
            analyze.measure(made.trace, name)
    table = analyze.measure(made.trace, NAMES, missing=True)
    assert table[list(POSITIONAL)].isna().all().all() and not table[list(names)].isna().any().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights(dtype: torch.dtype) -> None:
    made = case(dtype=dtype, keep=("weights", "mask"))
    check(made.trace, made, tuple(n for n in NAMES if n not in ("sink", "learned_sink")), atol=0.05)


def test_real_says_what_is_padding() -> None:
    made = case(causal=False)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, 6:] = 0
    made.real, made.rows = real.bool(), real.bool()
    check(made.trace, made, ("entropy", "mean_distance", "first_token"), real=real)
    with pytest.raises(MeasureError, match=r"real= has shape \(2, 5\); expected B S = 2 9"):
        analyze.measure(made.trace, "entropy", real=real[:, :5])


# ------------------------------------------------------------------------------------------------- closed forms


def one(trace: hookattn.Trace, name: str) -> float:
    return float(analyze.measure(trace, name)[name][0])


@pytest.mark.parametrize("s", [2, 5, 33])
def test_uniform_causal_attention(s: int) -> None:
    trace = given(uniform(s))
    rows = analyze.Entropy()(trace, by="query").entropy
    assert rows.tolist() == pytest.approx([math.log(i + 1) for i in range(s)], abs=1e-6)
    assert one(trace, "mean_distance") == pytest.approx((s - 1) / 4, rel=1e-6)
    assert one(trace, "first_token") == pytest.approx(sum(1 / n for n in range(1, s + 1)) / s, rel=1e-6)
    assert one(trace, "normalised_entropy") == pytest.approx(1, rel=1e-6)
    assert one(trace, "confidence") == pytest.approx(one(trace, "self_token"), rel=1e-6)


@pytest.mark.parametrize("s", [2, 5, 33])
def test_a_perfect_previous_token_head(s: int) -> None:
    trace = given(previous(s))
    assert one(trace, "previous_token") == pytest.approx((s - 1) / s, rel=1e-6)
    assert one(trace, "entropy") == 0
    assert one(trace, "confidence") == 1


# ----------------------------------------------------------------------------------- beside the kernel, and after it


class Attention(nn.Module):
    """Two heads of causal attention, with a padding mask where one is given."""

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        mask = None
        if real is not None:
            t = x.shape[1]
            mask = torch.ones(t, t, dtype=torch.bool).tril() & real[:, None, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_beside_the_kernel_give_the_same(padded: bool) -> None:
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 8:] = False
    inputs = (x, real) if padded else (x,)
    names = [n for n in NAMES if "mask" not in analyze.capture(n)]
    whole = hookattn.trace(Attention(), inputs)
    lean = hookattn.trace(Attention(), inputs, capture=analyze.capture(*names))
    assert not {"weights", "scores", "mask", "q"} & set(lean[0].fields)
    options = {"real": real} if padded else {}
    for by in analyze.table.BY:
        names = [n for n in names if by != "query" or n != "sink"]
        left, right = (analyze.measure(t, names, by=by, **options) for t in (whole, lean))
        assert list(left.columns) == list(right.columns)
        for name in names:
            assert right[name].to_numpy() == pytest.approx(left[name].to_numpy(), abs=2e-6, nan_ok=True)
    if padded:  # nothing but real= can tell a trace without a mask
        apart = analyze.measure(lean, "entropy").entropy - analyze.measure(lean, "entropy", real=real).entropy
        assert apart.abs().max() > 0.05


def test_a_file_gives_the_same(tmp_path: Any) -> None:
    whole = hookattn.trace(Attention(), torch.randn(1, 9, 16))
    expected = analyze.measure(whole, NAMES)
    for compact in (False, True):
        whole.save(tmp_path / "t.safetensors", compact=compact)
        table = analyze.measure(hookattn.load(tmp_path / "t.safetensors"), NAMES)
        for name in NAMES:
            assert table[name].to_numpy() == pytest.approx(expected[name].to_numpy(), abs=2e-6, nan_ok=True)


@pytest.mark.parametrize(
    "measured", [lambda t: analyze.measure(t, "entropy"), analyze.report, lambda t: analyze.compare(t, t)]
)
def test_calls_are_held_one_at_a_time(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is derived of a call goes before much more is: a trace may be larger than the memory."""
    held: list[Any] = []
    most = 0
    init = analyze.View.__init__

    def watched(self: analyze.View, *given: Any, **more: Any) -> None:
        nonlocal most
        init(self, *given, **more)
        held.append(weakref.ref(self))
        most = max(most, sum(one() is not None for one in held))

    monkeypatch.setattr(analyze.View, "__init__", watched)
    measured(case(layers=9).trace)
    assert len(held) >= 9 and most <= 4


# --------------------------------------------------------------------------------------------------------- tables


def test_the_table() -> None:
    made = case(heads=(3, 0), queries=(1, 4, 8), tokens=[[f"t{i}" for i in range(9)]])
    table = analyze.Entropy()(made.trace, by="query")
    assert list(table.columns) == [
        "call", "step", "layer", "stack", "kind", "path", "head", "example", "query", "token", "entropy",
    ]  # fmt: skip
    assert len(table) == 2 * 2 * 2 * 3
    line = table.iloc[5]
    assert (line["head"], line["example"], line["query"], line["token"]) == (0, 0, 8, "t8")
    assert table.attrs["units"] == {"entropy": "nats"}
    best = table.sort_values("entropy").iloc[-1]
    i = {3: 0, 0: 1}[best["head"]]
    j = (1, 4, 8).index(best["query"])
    w = made.weights[best["call"]][best["example"], i, j]
    assert best["entropy"] == pytest.approx(float(torch.special.entr(w).sum()), abs=1e-6)


def test_parameters_name_the_column() -> None:
    trace = given(uniform(6))
    table = analyze.measure(trace, [analyze.LocalMass(2), "local_mass", analyze.AtOffset(-2)])
    assert list(table.columns[7:]) == ["local_mass(window=2)", "local_mass", "at_offset(offset=-2)"]


def test_layers_of_other_sizes() -> None:
    table = analyze.measure(given([uniform(4, 2), uniform(7, 3)]), "mean_distance")
    assert table.mean_distance.tolist() == pytest.approx([0.75] * 2 + [1.5] * 3)
    assert table["head"].tolist() == [0, 1, 0, 1, 2]


# ------------------------------------------------------------------------------------------------------- bad input


def test_clear_errors() -> None:
    trace = given(uniform(4))
    with pytest.raises(SelectionError, match="there is no measure 'entropie'; there are entropy, "):
        analyze.measure(trace, "entropie")
    with pytest.raises(SelectionError, match="no measure was named"):
        analyze.measure(trace, [])
    with pytest.raises(SelectionError, match=r"by='token': expected one of head, example, query"):
        analyze.measure(trace, "entropy", by="token")
    with pytest.raises(MeasureError, match="no calls"):
        analyze.measure(hookattn.Trace(), "entropy")
    with pytest.raises(MeasureError, match=r"sink of call 0 .* no value by query"):
        analyze.measure(trace, "sink", by="query")


@pytest.mark.parametrize("keep", [("v",), ("q",), ("output", "mask")])
def test_a_field_that_is_missing(keep: tuple[str, ...]) -> None:
    with pytest.raises(FieldNotCaptured, match=r"call 0 \(layers.0.attn, step 0\)"):
        analyze.measure(case(keep=keep).trace, "entropy")


def test_tokens_that_do_not_fit() -> None:
    trace = given(uniform(4), tokens=[["a", "b"]])
    with pytest.raises(MeasureError, match=r"tokens don't fit.*4 keys"):
        analyze.DuplicateToken()(trace)
    assert analyze.measure(trace, "entropy", by="query")["token"].isna().all()
    assert analyze.received(trace)["token"].isna().all()


def test_what_is_not_finite_is_nan_and_never_a_number() -> None:
    w = uniform(4)
    w[0, 0, 2, 1] = math.nan
    for trace in (given(w, mask=torch.ones(4, 4, dtype=torch.bool).tril()), given(w)):
        assert analyze.measure(trace, list(NAMES))[["entropy", "confidence", "first_token"]].isna().all().all()


def test_every_measure_that_has_a_name_is_exported() -> None:
    exported = [getattr(analyze, name) for name in analyze.__all__]
    assert all(kind in exported for kind in analyze.MEASURES.values())
    assert all(kind.name == name for name, kind in analyze.MEASURES.items())
