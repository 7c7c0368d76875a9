"""What libraries of the field do that is not read as it should be, each in the fewest lines that show it.

Every entry fails for the reason it gives; one that starts to pass has to be moved to the tests of its tap.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn

import hookattn
from hookattn.models.registry import using
from hookattn.testing import check_trace
from tests.field.common import drawn, seeded


class Kernel(nn.Module):
    """Handed q with heads and k, v without: multi-query attention whose heads were split elsewhere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (einsum("bhid,bjd->bhij", q, k) * 0.5).softmax(-1)
        return einsum("bhij,bjd->bhid", weights, v)


def test_heads_of_a_multi_query_product_are_told_from_its_dimensions() -> None:
    q, k, v = seeded(2, 4, 3, 4), seeded(2, 3, 4, seed=1), seeded(2, 3, 4, seed=2)
    call = hookattn.trace(Kernel(), (q, k, v), verify="full")[0]
    assert call.weights.shape == (2, 4, 3, 3)
    assert call.k.shape == (2, 1, 3, 4)


class InnerSite(hookattn.Adapter):
    """An adapter that names the innermost module, as asked; the projections are outside of it."""

    name = "inner-site"
    covers = (__name__,)
    attention = {"Kernel": "self"}


class MultiQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.kernel = nn.Linear(16, 16), nn.Linear(16, 8), Kernel()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        return self.kernel(q, *self.kv(x).chunk(2, -1))


def test_an_adapter_that_names_the_inner_module_sees_the_same() -> None:
    model, x = drawn(MultiQuery()), seeded(2, 3, 16)
    generic = hookattn.trace(model, x)[0]
    with using(InnerSite()):
        adapted = hookattn.trace(model, x)[0]
    assert generic.weights.shape == adapted.weights.shape


class Sliced(nn.Module):
    """Heads folded into the batch and taken a few at a time, to save memory (diffusers' SlicedAttnProcessor)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2).flatten(0, 1) for y in self.qkv(x).chunk(3, -1))
        out = torch.zeros_like(q)
        for i in range(0, len(q), 2):
            some = slice(i, i + 2)
            weights = (q[some] @ k[some].mT * 0.5).softmax(-1)
            out[some] = weights @ v[some]
        return out


def test_slices_of_folded_heads_are_one_call() -> None:
    trace = hookattn.trace(drawn(Sliced()), seeded(2, 3, 16), verify="full")
    assert trace.faithful
    assert [call.weights.shape for call in trace] == [(2, 4, 3, 3)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


def test_the_layers_of_a_model_in_a_pipeline_are_numbered() -> None:
    """As sentence-transformers does: Sequential(transformer, pooling, norm)."""
    pipeline = drawn(nn.Sequential(Encoder(), nn.Identity(), nn.Tanh()))
    assert [call.site.layer for call in hookattn.trace(pipeline, seeded(2, 3, 16))] == [0, 1]


class TalkingHeads(nn.Module):
    """Heads mixed after the softmax (CaiT, DeepViT, x-transformers' talking heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mix = nn.Linear(16, 48), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * 0.5).softmax(-1)
        return self.mix(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


def test_mixed_weights_pass_the_check_of_a_trace() -> None:
    trace = hookattn.trace(drawn(TalkingHeads()), seeded(2, 3, 16), verify="full")
    assert trace.faithful and trace[0].mixed
    check_trace(trace)
