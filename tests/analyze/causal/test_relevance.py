"""Relevance, against the rules of the paper written out over weights and gradients that autograd gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hookattn
from hookattn.analyze import log_probability, relevance
from hookattn.errors import GradientError, InputError, MeasureError
from hookattn.render.head_scores import scores_of
from tests import tiny_models
from tests.analyze.causal.twin import HEADS, LENGTH, Twin, curved_metric, gradients, ids

EYE = torch.eye(LENGTH, dtype=torch.float64)


def test_self_attention() -> None:
    model, x = Twin(3), ids()
    kept, slopes = model.fields(x), gradients(model, x, curved_metric)
    r = EYE.repeat(2, 1, 1)
    sums = []
    for layer in range(3):
        a = (kept[layer, "weights"] * slopes[layer, "weights"]).clamp(min=0)
        sums += a.sum((0, 2, 3)).tolist()
        r = r + a.mean(1) @ r
    found = relevance(model, x, curved_metric)
    assert [*found.maps] == [("main", "main")]
    assert torch.allclose(found.maps["main", "main"], r, rtol=0, atol=1e-10)
    assert (r - EYE).abs().max() > 1e-2
    assert found.heads["relevance"].tolist() == pytest.approx(sums, abs=1e-10)
    assert [*found.heads["head"]] == [*range(HEADS)] * 3
    assert scores_of(found.heads, hookattn.trace(model, x))["relevance"]["values"][0][0] == pytest.approx(sums[0])


class Attention(nn.Module):
    """One head of each of two, written with the fused kernel or out, and watched in the latter case."""

    def __init__(self, seed: int):
        super().__init__()
        self.w = nn.Parameter(
            0.5 * torch.randn(4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )
        self.watched: list[Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            (z @ w).unflatten(-1, (2, 4)).transpose(1, 2) for z, w in ((x, self.w[0]), (y, self.w[1]), (y, self.w[2]))
        )
        if self.watched is None:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            a = (q @ k.mT / 2).softmax(-1)
            a.retain_grad()
            self.watched.append(a)
            z = a @ v
        return z.transpose(1, 2).flatten(2) @ self.w[3]


class Cross(nn.Module):
    """Of one stack: attends to itself, then to the other."""

    def __init__(self, seed: int, cross: bool = True):
        super().__init__()
        self.self_attn = Attention(seed)
        self.cross_attn = Attention(seed + 1) if cross else None


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Cross(1, False), Cross(3, False)])
        self.decoder = nn.ModuleList([Cross(5), Cross(7)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.encoder:
            x = x + layer.self_attn(x, x)
        for layer in self.decoder:
            y = y + layer.self_attn(y, y)
            y = y + layer.cross_attn(y, x)
        return y


class CoAttention(nn.Module):
    """Text and vision: each attends to the other, both to what there was before, and then to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList([Cross(1), Cross(3)])
        self.vision = nn.ModuleList([Cross(5), Cross(7)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for text, vision in zip(self.text, self.vision, strict=True):
            x, y = x + text.cross_attn(x, y), y + vision.cross_attn(y, x)
            x, y = x + text.self_attn(x, x), y + vision.self_attn(y, y)
        return x[:, 0] + y[:, 0]


def inputs() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(2)
    return (torch.randn(2, 5, 8, dtype=torch.float64, generator=made),
            torch.randn(2, 4, 8, dtype=torch.float64, generator=made))  # fmt: skip


def metric(out: Tensor) -> Tensor:
    return torch.sin(out).sum()


def patterns(model: nn.Module, values: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ā of each attention, in the order in which they ran."""
    watched: list[Tensor] = []
    parts = [m for m in model.modules() if isinstance(m, Attention)]
    for m in parts:
        m.watched = watched
    metric(model(*values)).backward()
    for m in parts:
        m.watched = None
    model.zero_grad()
    return [(a * a.grad).clamp(min=0).mean(1).detach() for a in watched]


def normalised(r: Tensor) -> Tensor:
    more = r - torch.eye(r.shape[-1])
    total = more.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, more / total) + torch.eye(r.shape[-1])


def test_encoder_decoder() -> None:
    model, values = EncoderDecoder(), inputs()
    e1, e2, s1, c1, s2, c2 = patterns(model, values)
    ee = torch.eye(5).double().repeat(2, 1, 1)
    dd, de = torch.eye(4).double().repeat(2, 1, 1), torch.zeros(2, 4, 5).double()
    for a in (e1, e2):
        ee = ee + a @ ee
    for own, cross in ((s1, c1), (s2, c2)):
        dd, de = dd + own @ dd, de + own @ de
        de = de + normalised(dd).mT @ cross @ normalised(ee)
    found = relevance(model, values, metric)
    assert {*found.maps} == {("encoder", "encoder"), ("decoder", "decoder"), ("decoder", "encoder")}
    for pair, wanted in ((("encoder",) * 2, ee), (("decoder",) * 2, dd), (("decoder", "encoder"), de)):
        assert torch.allclose(found.maps[pair], wanted, rtol=0, atol=1e-10), pair
    assert de.abs().max() > 1e-2


def test_co_attention() -> None:
    model, values = CoAttention(), inputs()
    a = patterns(model, values)
    tt, vv = torch.eye(5).double().repeat(2, 1, 1), torch.eye(4).double().repeat(2, 1, 1)
    tv, vt = torch.zeros(2, 5, 4).double(), torch.zeros(2, 4, 5).double()
    for n in (0, 4):
        to_vision, to_text, of_text, of_vision = a[n : n + 4]
        more = (
            normalised(tt).mT @ to_vision @ normalised(vv), to_vision @ vt,
            normalised(vv).mT @ to_text @ normalised(tt), to_text @ tv,
        )  # fmt: skip
        tv, tt, vt, vv = tv + more[0], tt + more[1], vt + more[2], vv + more[3]
        tt, tv = tt + of_text @ tt, tv + of_text @ tv
        vv, vt = vv + of_vision @ vv, vt + of_vision @ vt
    found = relevance(model, values, metric).maps
    wanted = {("text", "text"): tt, ("text", "vision"): tv, ("vision", "text"): vt, ("vision", "vision"): vv}
    assert {*found} == {*wanted}
    for pair, r in wanted.items():
        assert torch.allclose(found[pair], r, rtol=0, atol=1e-10), pair


def test_transformers() -> None:
    """Against autograd through the eager model, whose softmax is in float32."""
    x = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    y, score = x[:, :4], log_probability(7)
    eager = tiny_models.t5("eager").double()
    out = eager(input_ids=x, decoder_input_ids=y, output_attentions=True)
    every = [*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions]
    slopes = torch.autograd.grad(score(out), every)
    bar = [(a * g).clamp(min=0).mean(1).detach() for a, g in zip(every, slopes, strict=True)]
    ee, dd, de = torch.eye(6).double()[None], torch.eye(4).double()[None], torch.zeros(1, 4, 6).double()
    for a in bar[:2]:
        ee = ee + a @ ee
    for own, cross in zip(bar[2:4], bar[4:], strict=True):
        dd, de = dd + own @ dd, de + own @ de
        de = de + normalised(dd).mT @ cross @ normalised(ee)
    found = relevance(tiny_models.t5().double(), {"input_ids": x, "decoder_input_ids": y}, score).maps
    for pair, wanted in ((("encoder",) * 2, ee), (("decoder",) * 2, dd), (("decoder", "encoder"), de)):
        assert (found[pair] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), pair


def test_keys_that_may_be_of_two_stacks() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.text, self.decoder = (nn.ModuleList([Cross(n)]) for n in (1, 3, 5))

        def forward(self, x: Tensor) -> Tensor:
            y, z = (stack[0].self_attn(x, x) for stack in (self.vision, self.text))
            return x + self.decoder[0].cross_attn(x, y) + z

    x = inputs()[0]
    with pytest.raises(MeasureError, match="may be of vision or text"):
        relevance(Three(), x, metric)
    with pytest.raises(InputError, match="stacks that read another: here decoder"):
        relevance(Three(), x, metric, keys={"decoder": "vision", "text": "vision"})
    assert ("decoder", "vision") in relevance(Three(), x, metric, keys={"decoder": "vision"}).maps


def test_keys_of_no_attention() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.ModuleList([Cross(5)])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.decoder[0].cross_attn(y, x)

    model, values = Pooled(), inputs()
    (a,) = patterns(model, values)
    found = relevance(model, values, metric).maps
    assert torch.allclose(found["decoder", "keys of decoder"], a, rtol=0, atol=1e-12)


def test_what_is_no_such_layer() -> None:
    model, x = Twin(), ids()
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: relevance(model, x, curved_metric, keys="encoder"), InputError, "keys='encoder'"),  # type: ignore[arg-type]
        (lambda: relevance(model, x, lambda y: y), InputError, "scalar"),
        (lambda: relevance(model, x, lambda y: y.sum().detach()), GradientError, "in no graph"),
    ]

    class Windows(Twin):
        def forward(self, x: Tensor) -> Tensor:
            y = self.embedding(x)
            y = self.layers[0](y)
            return self.layers[1](y.view(-1, LENGTH // 2, y.shape[-1])).flatten()

    class Shrinks(Twin):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.embedding(x))[:, 1:])

    class Cached(Twin):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layers[0].self_attn
            z = self.embedding(x)
            q, k, v = (y.heads(n, p) for n, p in ((z[:, -1:], y.q), (z, y.k), (z, y.v)))
            return F.scaled_dot_product_attention(q, k, v)

    for kind, words in ((Windows, "batch entries"), (Shrinks, "5 tokens"), (Cached, "cache")):
        refused.append((lambda kind=kind: relevance(kind(), x, lambda y: y.sum()), MeasureError, words))
    for attempt, error, words in refused:
        with pytest.raises(error, match=words):
            attempt()
