"""Composition and copying, against the whole C C and V V matrices in float64, and on a model whose circuit is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookattn.analyze.circuits.circuit import Circuit, Projection
from hookattn.analyze.circuits.composition import composition
from hookattn.analyze.circuits.copying import copying, vocabulary
from hookattn.analyze.circuits.find_weights import circuit
from hookattn.calls.site import Site
from hookattn.demo.induction import example_tokens, load_pretrained
from hookattn.errors import MeasureError, SelectionError
from tests.reference import draw

C = 20


def random_circuit(
    layer: int, h: int = 4, g: int = 2, d: int = 3, e: int = 5, c: int = C, dtype: Any = torch.float32, **site: str
) -> Circuit:
    shapes = {"q": (h, c, d), "k": (g, c, d), "v": (g, c, e), "o": (h, e, c)}
    made = {
        name: Projection(draw(*shape, seed=10 * layer + i).to(dtype), None, "equal")
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Circuit(Site(f"layers.{layer}", layer, **site), layer, h, g, **made)


def whole(c: Circuit, head: int) -> tuple[Tensor, Tensor]:
    """W_QK and W_OV of one head, C C."""
    group = head // (c.heads // c.kv_heads)
    w = {name: c.projection(name).weight[group if name in "kv" else head].double() for name in "qkvo"}
    return w["q"] @ w["k"].t(), w["v"] @ w["o"]


@pytest.mark.parametrize("sizes", [{}, {"g": 4}, {"d": 24, "e": 24, "c": 20}, {"dtype": torch.float64}])
@pytest.mark.parametrize("baseline", [False, True])
def test_against_whole_matrices(sizes: dict[str, Any], baseline: bool) -> None:
    circuits = [random_circuit(0, **sizes), random_circuit(1, **sizes), random_circuit(2, **{**sizes, "h": 2, "g": 1})]
    table = composition(circuits, baseline=baseline)
    assert len(table) == 3 * (16 + 8 + 8)
    assert table["value"].is_monotonic_decreasing
    for row in table.itertuples():
        _, ov = whole(circuits[row.from_layer], row.from_head)
        qk, other = whole(circuits[row.layer], row.head)
        reads = {"q": qk, "k": qk.t(), "v": other}[row.kind]
        want = float((ov @ reads).norm() / (ov.norm() * reads.norm())) - (C**-0.5 if baseline else 0)
        assert row.value == pytest.approx(want, abs=1e-6)
        assert (row.from_path, row.path) == (f"layers.{row.from_layer}", f"layers.{row.layer}")


def test_the_baseline_is_what_random_matrices_have() -> None:
    circuits = [random_circuit(i, h=30, g=30) for i in range(3)]
    values = composition(circuits)["value"]
    assert (values**2).mean() == pytest.approx(1 / C, rel=0.02)
    assert abs(composition(circuits, baseline=True)["value"].mean()) < 0.01


def test_a_head_that_reads_what_another_writes_and_nothing_else() -> None:
    basis, _ = torch.linalg.qr(draw(C, C, seed=1))

    def head(layer: int, reads: int, writes: int) -> Circuit:
        column, row = basis[:, reads].view(1, C, 1), basis[:, writes].view(1, 1, C)
        made = {"q": column, "k": basis[:, 9].view(1, C, 1), "v": column, "o": row}
        projections = {name: Projection(w, None, "equal") for name, w in made.items()}
        return Circuit(Site(f"layers.{layer}", layer), layer, 1, 1, **projections)

    table = composition([head(0, 0, 1), head(1, 1, 2), head(2, 3, 4)])
    one = {(r.kind, r.from_layer, r.layer) for r in table.itertuples() if r.value > 1e-6}
    assert one == {("q", 0, 1), ("v", 0, 1)}
    assert table["value"][:2].tolist() == pytest.approx([1, 1])


def test_stacks_and_cross_attention() -> None:
    encoder, cross = random_circuit(0, stack="encoder"), random_circuit(2, stack="decoder", kind="cross")
    decoder, last = random_circuit(1, stack="decoder"), random_circuit(3, stack="decoder")
    table = composition([encoder, decoder, cross, last])
    pairs = {(r.kind, r.from_layer, r.layer) for r in table.itertuples()}
    assert pairs == {("q", 1, 2), *((k, 1, 3) for k in "qkv"), *((k, 2, 3) for k in "qkv")}
    with pytest.raises(MeasureError, match="two calls of one stack that can be compared by v"):
        composition([decoder, cross], ("v",))


def test_what_composition_cannot_do_is_said() -> None:
    with pytest.raises(SelectionError, match=r"kinds='o': expected one of q, k, v"):
        composition([random_circuit(0), random_circuit(1)], ("o",))
    with pytest.raises(MeasureError, match=r"layers\.0 writes 20 wide, and what layers\.1 makes its q of is 7 wide"):
        composition([random_circuit(0), random_circuit(1, c=7)])
    first = random_circuit(0)
    half = Circuit(first.site, 0, 4, 2, v=first.v, o=first.o, missing={"q": "a norm", "k": "a norm"})
    with pytest.raises(MeasureError, match=r"layers\.0: W_Q is not known: a norm"):
        composition([half, random_circuit(1)])
    assert len(composition([half, random_circuit(1)], ("v",))) == 16


@pytest.mark.parametrize("e", [5, 24])
def test_copying_against_the_eigenvalues_of_the_whole_matrix(e: int) -> None:
    embed, unembed = draw(50, C, seed=1).double(), draw(50, C, seed=2).double()
    circuits = [random_circuit(i, e=e, dtype=torch.float64) for i in range(2)]
    table = copying(circuits, embed, unembed)
    assert table["value"].is_monotonic_decreasing and len(table) == 8
    for row in table.itertuples():
        values = torch.linalg.eigvals(embed @ whole(circuits[row.layer], row.head)[1] @ unembed.t())
        assert row.value == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-6)


def test_copying_by_sign() -> None:
    embed, w_v = nn.Embedding(30, C), draw(3, C, 4, seed=3)
    w_v[2] = 0
    out = w_v.transpose(1, 2) * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
    made = Circuit(Site("a", 0), 0, 3, 3, v=Projection(w_v, None, "equal"), o=Projection(out, None, "equal"))
    table = copying([made], embed, embed).set_index("head")["value"]
    assert table[:2].tolist() == pytest.approx([1, -1], abs=1e-5) and table.isna()[2]


def test_what_copying_cannot_do_is_said() -> None:
    tm = pytest.importorskip("tests.tiny_models")
    model = tm.gpt2()
    embed, unembed = vocabulary(model)
    assert embed.shape == unembed.shape == (60, 32)
    assert len(copying(circuit(model, {"input_ids": tm.ids(9)}), embed, unembed)) == 8
    with pytest.raises(MeasureError, match="InductionTransformer does not say what its input embedding is"):
        vocabulary(load_pretrained())
    circuits = [random_circuit(0)]
    for given, message in (
        ((embed, unembed), "layers.0 reads 20 wide and writes 20 wide, and the embedding is 32 wide"),
        ((embed, unembed[:9]), r"embed has shape \(60, 32\) and unembed \(9, 32\): expected V C"),
        ((embed[0], unembed), r"embed: expected a tensor V C .*; got Tensor of shape \(32,\)"),
        ((embed, nn.Dropout()), r"unembed: expected a tensor V C .*; got Dropout\."),
    ):
        with pytest.raises(MeasureError, match=message):
            copying(circuits, *given)
    with pytest.raises(MeasureError, match="there are no circuits"):
        copying([], embed, unembed)


def test_the_circuit_of_the_demo_model() -> None:
    """Previous-token heads 0, 1, 3 of the first layer are read as keys by the induction heads, which copy."""
    model = load_pretrained()
    found = circuit(model, example_tokens(0))
    table = composition(found, baseline=True)
    largest = {kind: table[table["kind"] == kind]["value"].max() for kind in "qkv"}
    assert largest["k"] > max(largest["q"], largest["v"]) and largest["q"] < 0
    keys = table[table["kind"] == "k"].groupby("from_head")["value"]
    assert keys.min()[[0, 1, 3]].min() > 0.1 > keys.max()[2]
    copies = copying(found, model.embed, model.unembed).set_index(["layer", "head"])["value"]
    assert copies[1].min() > 0.5 > 0.2 > copies[0].max()
