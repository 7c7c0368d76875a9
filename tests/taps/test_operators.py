"""Kernels under their operators' names: exported graphs, whole and taken apart, pipeline stages, and direct calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.torch_internals.operators import operator_name
from tests.reference import assert_untouched, causal, draw, paths, same_bits, snapshot

B, T, E, H = 2, 6, 32, 4
D = E // H
X = draw(B, T, E, seed=3)
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=2e-6, rtol=2e-6)


class Attention(nn.Module):
    """One attention, spelled in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv, self.table = how, nn.Linear(E, 3 * E), nn.Embedding(2 * T, H)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [y.view(*y.shape[:2], H, D).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "sdpa with a mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        elif self.how == "grouped":
            y = F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)
        elif self.how == "biased":
            steps = torch.arange(T)
            bias = self.table(steps[:, None] - steps + T).permute(2, 0, 1)
            scores = (q @ k.mT / math.sqrt(D) + bias).masked_fill(~mask, float("-inf"))
            y = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        elif self.how == "last token":
            q = q[:, :, -1:]
            y = torch.einsum("bhts,bhsd->bhtd", F.softmax(torch.einsum("bhtd,bhsd->bhts", q, k), dim=-1), v)
        elif self.how == "steps":
            scores = torch.where(mask, q @ k.mT, -1e9)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            y = (weights / weights.sum(-1, keepdim=True)) @ v
        else:  # heads in the batch
            q, k, v = (z.reshape(B * H, T, D) for z in (q, k, v))
            y = torch.bmm(torch.softmax(torch.bmm(q, k.mT) * 0.5, -1), v).view(B, H, T, D)
        return y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers, the second of them in a module of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.rest = Attention(how), nn.ModuleList([nn.Sequential(nn.LayerNorm(E), Attention(how))])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        for block in self.rest:
            x = x + block(x)
        return x


HOWS = ("sdpa", "sdpa with a mask", "grouped", "biased", "last token", "steps", "heads in the batch")


def model(how: str) -> Model:
    torch.manual_seed(5)
    return Model(how).eval()


def whole(m: nn.Module) -> nn.Module:
    return torch.export.export(m, (X,)).module()


def decomposed(m: nn.Module) -> nn.Module:
    return torch.export.export(m, (X,)).run_decompositions().module()


def unflattened(m: nn.Module) -> nn.Module:
    return torch.export.unflatten(torch.export.export(m, (X,)))


@pytest.mark.parametrize("made", [whole, decomposed, unflattened])
@pytest.mark.parametrize("how", HOWS)
def test_an_exported_graph(how: str, made: Callable[[nn.Module], Any]) -> None:
    """As the module that it was made from: the same weights at the same paths, and axes that nobody guessed."""
    m = model(how)
    plain, graph = hookattn.trace(m, X), made(m)
    before, expected = snapshot(graph), graph(X)
    trace = hookattn.trace(graph, X, verify="full")
    assert_untouched(graph, before)
    assert same_bits(trace.output, expected) and not trace.skipped and trace.faithful
    assert paths(trace.calls) == paths(plain.calls) == ["first", "rest.0.1"]
    for call, reference in zip(trace, plain, strict=True):
        assert_close(call.weights, reference.weights)
        assert_close(call.v, reference.v)
        assert_close(call.output, reference.output)
        assert (
            call.site.module in ("Attention", "InterpreterModule")
            and call.shape == reference.shape
            and call.notes == reference.notes
        )
        assert torch.equal(call.mask.expand_as(call.weights), reference.mask.expand_as(call.weights))
        assert "guessed" not in call.basis.values() or call.basis == reference.basis


def test_a_graph_in_a_larger_model() -> None:
    m = nn.Sequential(model("sdpa"), whole(model("biased")))
    trace = hookattn.trace(m, X)
    assert paths(trace.calls) == ["0.first", "0.rest.0.1", "1.first", "1.rest.0.1"] and not trace.skipped


class Switched(nn.Module):
    """Runs a part without gradients and a part in half precision: operations with a graph in them."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.mixed = Attention("biased"), Attention("sdpa")

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.frozen(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.mixed(x + y)


def test_operations_with_a_graph_in_them() -> None:
    torch.manual_seed(1)
    m = Switched().eval()
    graph = whole(m)
    assert "wrap_with" in graph.code
    plain, trace = hookattn.trace(m, X), hookattn.trace(graph, X)
    assert paths(trace.calls) == paths(plain.calls) == ["frozen", "mixed"] and not trace.skipped
    for call, reference in zip(trace, plain, strict=True):
        assert_close(call.weights, reference.weights)


def test_stages_of_a_pipeline() -> None:
    pipelining = pytest.importorskip("torch.distributed.pipelining")
    m = nn.Sequential(*(Attention("biased") for _ in range(3))).eval()
    plain, x = hookattn.trace(m, X), X
    pipe = pipelining.pipeline(m, (X,), split_spec={"1": pipelining.SplitPoint.BEGINNING})
    found = []
    for i in range(pipe.num_stages):
        stage = pipe.get_stage_module(i)
        trace = hookattn.trace(stage, x)
        x, found = trace.output, [*found, *trace]
    assert paths(found) == paths(plain.calls) == ["0", "1", "2"]
    for call, reference in zip(found, plain, strict=True):
        assert_close(call.weights, reference.weights)


class Spelled(nn.Module):
    """Written in functions, or in the operators that have other names or another order of arguments."""

    def __init__(self, which: str, operators: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.which, self.operators = which, operators
        self.table, self.qkv = nn.Embedding(20, E), nn.Linear(E, 3 * E)
        self.register_buffer("order", torch.randperm(T))

    def forward(self, ids: Tensor) -> Tensor:
        a = self.operators and torch.ops.aten
        x = a.embedding.default(self.table.weight, ids) if a and self.which == "embedding" else self.table(ids)
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.which == "picked keys":
            k, v = (a.index.Tensor(y, [None, None, self.order]) if a else y[:, :, self.order] for y in (k, v))
        scores = q @ k.mT
        if self.which == "views":
            scores = a._unsafe_view.default(scores, [B, H, T, T]) if a else scores.reshape(B, H, T, T)
        if self.which == "casts":
            scores = a._to_copy.default(scores, dtype=torch.float64) if a else scores.to(torch.float64)
            return (a._softmax.default(scores, -1, False) if a else scores.softmax(-1)).to(v.dtype) @ v
        if self.which == "logarithms":
            return (a._log_softmax.default(scores, -1, False) if a else scores.log_softmax(-1)).exp() @ v
        weights = a._safe_softmax.default(scores, -1) if a else scores.softmax(-1)
        if self.which == "slices":
            parts = [(0, 2), (2, T)]
            cut = [a.slice.Tensor(weights, 3, i, j) if a else weights[..., i:j] for i, j in parts]
            return sum(w @ v[:, :, i:j] for w, (i, j) in zip(cut, parts, strict=True))  # type: ignore[return-value]
        return weights @ v  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", ["embedding", "picked keys", "views", "casts", "logarithms", "slices", "softmax"])
def test_operators_that_are_named_or_ordered_otherwise(which: str) -> None:
    ids = torch.randint(20, (B, T), generator=torch.Generator().manual_seed(2))
    trace, plain = (hookattn.trace(Spelled(which, operators), ids, verify="full") for operators in (True, False))
    assert same_bits(trace.output, plain.output) and not trace.skipped and trace.faithful
    for call, reference in zip(trace, plain, strict=True):
        assert call.shape == reference.shape and call.basis == reference.basis and call.notes == reference.notes
        assert call.normalizer == reference.normalizer == "softmax"
        for field in ("q", "k", "v", "weights"):
            assert_close(getattr(call, field), getattr(reference, field))


# ------------------------------------------------------------------------------------ kernels by their own names


class Named(nn.Module):
    """Calls one kernel by the name of its operator."""

    def __init__(self, kernel: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.kernel, self.options = kernel, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.kernel(q, k, v, **self.options)


ADDED = draw(B, 1, T, T, seed=9)
ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (ATEN._scaled_dot_product_flash_attention_for_cpu.default, {"is_causal": True}),
        (ATEN._scaled_dot_product_flash_attention_for_cpu, {"attn_mask": ADDED, "scale": 0.2}),
        (torch._scaled_dot_product_flash_attention_for_cpu, {"is_causal": True}),
        (ATEN._scaled_dot_product_attention_math.default, {"attn_mask": ADDED > 0}),
        (ATEN._scaled_dot_product_attention_math, {"is_causal": True, "dropout_p": 0.25}),
        (ATEN.scaled_dot_product_attention.default, {"is_causal": True}),
    ],
)
def test_a_kernel_by_its_own_name(kernel: Any, options: dict[str, Any]) -> None:
    q, k, v = (draw(B, H, T, D, seed=i) for i in range(3))
    m = Named(kernel, **options)
    torch.manual_seed(0)
    expected = m(q, k, v)
    torch.manual_seed(0)
    trace = hookattn.trace(m, (q, k, v))
    assert same_bits(trace.output, expected) and not trace.skipped and trace.faithful
    (call,) = trace
    scores = q.double() @ k.double().mT * options.get("scale", D**-0.5)
    mask = options.get("attn_mask")
    if mask is not None:
        scores = scores + mask.double()  # booleans, too: what hides by them is the function around these kernels
    if options.get("is_causal"):
        scores = scores.masked_fill(~causal(T, T), -math.inf)
    assert_close(call.weights, scores.softmax(-1).nan_to_num(0.0))
    assert_close(call.q, q)
    assert call.tap == "sdpa" and call.dropout == options.get("dropout_p", 0.0)


def test_flash_attention_counts_from_the_end() -> None:
    """Of the kernels, it alone aligns what is causal to the last key; a stand-in, as it runs on GPUs alone."""
    q, k, v = draw(B, H, 2, D, seed=1), draw(B, H, T, D, seed=2), draw(B, H, T, D, seed=3)
    mask = causal(T, T)[-2:]

    def _scaled_dot_product_flash_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None

    class Dispatched(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            operands = (q, k, v)
            return torch.overrides.handle_torch_function(
                _scaled_dot_product_flash_attention, operands, *operands, 0.0, True
            )[0]

    (call,) = hookattn.trace(Dispatched(), (q, k, v))
    assert torch.equal(call.mask[0, 0], mask) and call.certificate.status == "faithful"


def test_what_lies_below_is_said_not_to_be_read() -> None:
    def _efficient_attention_forward(q: Tensor, *_: Any) -> Tensor:
        return q

    class Dispatched(nn.Module):
        def forward(self, q: Tensor) -> Any:
            return torch.overrides.handle_torch_function(_efficient_attention_forward, (q,), q)

    with pytest.warns(hookattn.SkippedWarning):
        trace = hookattn.trace(Dispatched(), X)
    assert [s.reason for s in trace.skipped] == [
        "aten._efficient_attention_forward was called by its own name, which is not read"
    ]


def test_the_name_of_an_operator() -> None:
    """Another library's operator is none of torch's, whatever its name is."""
    assert operator_name(ATEN.softmax.int) == operator_name(ATEN.softmax) == ("aten", "softmax")
    assert operator_name(torch.softmax) is operator_name(Tensor.softmax) is None
    with torch.library._scoped_library("hookattn_test", "DEF") as library:
        library.define("softmax(Tensor x, int dim) -> Tensor")
        library.impl("softmax", lambda x, dim: x * 0 + 1 / x.shape[dim], "CompositeExplicitAutograd")
        mine = torch.ops.hookattn_test.softmax
        assert operator_name(mine) == operator_name(mine.default) == ("hookattn_test", "softmax")

        class Uniform(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                q, k, v = x.unflatten(-1, (3, -1)).unbind(-2)
                return F.scaled_dot_product_attention(q, k, v) + mine.default(q @ k.mT, -1) @ v

        with pytest.warns(hookattn.GuessedAxesWarning):
            calls = list(hookattn.trace(Uniform(), draw(B, T, 24)))
        assert [c.normalizer for c in calls] == ["softmax", "hookattn_test::softmax"]
