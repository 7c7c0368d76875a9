"""Scores shifted, cut, gathered and poured into buffers before the softmax: against explicit math in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import check_call, draw, heads, merge, paths, trace_checked
from tests.zoo.base import B, D, E, H

T, W, X = 6, 2, 3  # positions, keys on either side, the length of a block


class Moved(nn.Module):
    """Attention to some of the keys, however they are found."""

    def __init__(self, how: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.how, self.dropout = how, dropout
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (heads(t, H) for t in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge(getattr(self, self.how)(*self.parts(x))))

    def band(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Column j of a row is the key j − W further on."""
        scores = F.pad(q @ k.mT / math.sqrt(D), (W, W), value=-torch.inf)
        at = torch.arange(T)[:, None] + torch.arange(2 * W + 1)
        weights = scores.gather(-1, at.expand(B, H, -1, -1)).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        near = F.pad(v, (0, 0, W, W)).unfold(2, 2 * W + 1, 1)
        return torch.einsum("bhtj,bhtdj->bhtd", weights, near)

    def skewed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Diagonals are made columns by a row that is one longer, and the weights' columns diagonals again."""
        rows = F.pad(q @ k.mT * D**-0.5, (0, T - 1), value=-torch.inf).flatten(2)  # of 2T − 1 each
        weights = F.pad(rows, (T, 0), value=-torch.inf).view(B, H, T, 2 * T).softmax(-1)
        return weights.flatten(2)[..., T:].view(B, H, T, 2 * T - 1)[..., :T] @ v

    def poured(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block by block into one buffer."""
        scores = q.new_full((B, H, T, T), torch.finfo(q.dtype).min)
        for i in range(0, T, X):
            scores[:, :, i : i + X, : i + X] = q[:, :, i : i + X] @ k[:, :, : i + X].transpose(-1, -2) / math.sqrt(D)
        return scores.softmax(-1) @ v

    def gathered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.tensor([4, 1, 3]).expand(B, H, T, 3)
        return (q @ k.mT * D**-0.5).gather(-1, index).softmax(-1) @ v[:, :, [4, 1, 3]]

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * D**-0.5)[..., 1:4].softmax(-1) @ v[:, :, 1:4]

    def last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * D**-0.5)[:, :, -2:].softmax(-1) @ v

    def scaled_after(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT)[..., :4] / math.sqrt(D)).softmax(-1) @ v[:, :, :4]

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT * D**-0.5)[..., :4] + self.bias()).softmax(-1) @ v[:, :, :4]

    def bias(self) -> Tensor:
        return draw(1, H, T, 4, seed=9, dtype=self.proj.weight.dtype)

    def split(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one, two = (q @ k.mT * D**-0.5)[..., :5].softmax(-1).split([2, 3], -1)
        return (one @ v[:, :, :2]) + two @ v[:, :, 2:5]

    def folded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(B * H, T, D) for t in (q, k, v))
        return torch.bmm((torch.bmm(q, k.mT) * D**-0.5)[:, :, :4].softmax(-1), v[:, :4]).view(B, H, T, D)


BAND = (torch.arange(T)[:, None] - torch.arange(T)).abs() <= W
BLOCKS = torch.arange(T)[None] < (torch.arange(T)[:, None] // X + 1) * X
KEPT: dict[str, list[int]] = {"gathered": [4, 1, 3], "cut": [1, 2, 3], "split": [0, 1, 2, 3, 4]}
KEPT |= {how: [0, 1, 2, 3] for how in ("scaled_after", "biased", "folded")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "how", ["band", "skewed", "poured", "gathered", "cut", "last", "scaled_after", "biased", "split", "folded"]
)
def test_some_of_the_keys(how: str, dtype: torch.dtype) -> None:
    import hookattn

    torch.manual_seed(1)
    model, x = Moved(how).to(dtype).eval(), draw(B, T, E, std=1.5, dtype=dtype)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
        output = getattr(model, how)(q, k, v)
    assert not trace.skipped, [(item.path, item.reason) for item in trace.skipped]
    assert paths(trace.calls) == [""]
    kept = sorted(KEPT.get(how, range(T)))
    wanted: dict[str, Any] = {"q": q[:, :, -2:] if how == "last" else q, "k": k[:, :, kept], "v": v[:, :, kept]}
    wanted["mask"] = {"band": BAND, "poured": BLOCKS}.get(how)
    wanted["bias"] = model.bias() if how == "biased" else None
    check_call(trace[0], **wanted, scale=D**-0.5, output=output)


def test_dropout_in_a_band() -> None:
    import hookattn

    torch.manual_seed(2)
    model, x = Moved("band", dropout=0.4), draw(B, T, E, std=1.5)
    with torch.no_grad():
        trace = hookattn.trace(model, x, verify="full")
        q, k, v = model.parts(x)
    assert not trace.skipped and len(trace) == 1
    check_call(trace[0], q=q, k=k, v=v, scale=D**-0.5, mask=BAND, dropout=0.4)


def test_heads_that_share_their_keys() -> None:
    import hookattn

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(E, E), nn.Linear(E, 2 * D)

        def parts(self, x: Tensor) -> tuple[Tensor, ...]:
            return heads(self.q(x), H), *(heads(t, 1) for t in self.kv(x).chunk(2, -1))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.parts(x)
            k, v = (t.expand(-1, H, -1, -1) for t in (k, v))
            return merge((q @ k.mT)[..., 1:4].softmax(-1) @ v[:, :, 1:4])

    torch.manual_seed(5)
    model, x = Grouped().eval(), draw(B, T, E)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, model, x, verify="full")
        q, k, v = model.parts(x)
    k, v = (t[:, :, 1:4].expand(-1, H, -1, -1) for t in (k, v))
    check_call(trace[0], q=q, k=k, v=v, scale=1.0)


class Unread(Moved):
    """What can't be laid out as queries by keys: listed with the reason."""

    def zeros(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.new_zeros(B, H, T, T)
        scores[:, :, :, 1:] = (q @ k.mT)[..., :-1]
        return scores.softmax(-1) @ v

    def two_queries(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT)[..., :4]
        return torch.where(torch.arange(4) < 2, scores, scores.flip(2)).softmax(-1) @ v[:, :, :4]

    def other_values(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each query has values of its own: none belongs to a key."""
        own = v[:, :, :, None] * torch.arange(1, 4)[:, None]
        return torch.einsum("bhts,bhtsd->bhtd", (q @ k.mT)[..., :3].softmax(-1), own)

    def no_values(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT)[..., :3].softmax(-1)[..., None] * v[:, :, None, :3]).sum(-2)

    def half(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT)[..., :4].softmax(-1)[..., :2] @ v[:, :, :2]

    def overwritten(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT)[..., :4].contiguous()
        weights = scores.softmax(-1)
        scores.zero_()
        return weights @ v[:, :, :4]

    def dropped_in_place(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT)[..., :4].softmax(-1), 0.5, True, inplace=True) @ v[:, :, :4]

    def sorted(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).sort(-1).values[..., :4].softmax(-1) @ v[:, :, :4]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("zeros", "no score takes part"),
        ("two_queries", "several queries"),
        ("other_values", "several values"),
        ("no_values", "part of the scores"),
        ("half", "part of the scores"),
        ("overwritten", "written to"),
        ("dropped_in_place", "part of the scores"),
        ("sorted", "'sort'"),
    ],
)
def test_what_can_not_be_laid_out_is_listed(how: str, says: str) -> None:
    import hookattn

    torch.manual_seed(3)
    with torch.no_grad():
        trace = trace_checked(hookattn.trace, Unread(how).eval(), draw(B, T, E, std=1.5), warns=True)
    assert not trace.calls
    assert [item.path for item in trace.skipped] == [""]
    assert says in trace.skipped[0].reason


@pytest.mark.parametrize("global_tokens", [0, 1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_longformer(global_tokens: int, padded: bool) -> None:
    """Its own attentions are a band, with the global keys before it."""
    transformers = pytest.importorskip("transformers")
    import hookattn

    config = transformers.LongformerConfig(
        vocab_size=50,
        hidden_size=E,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=E,
        attention_window=4,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    torch.manual_seed(4)
    model = transformers.LongformerModel(config).eval()
    n, g = 16, global_tokens
    inputs = {"input_ids": torch.randint(2, 50, (B, n)), "attention_mask": torch.ones(B, n).long()}
    if padded:
        inputs["attention_mask"][1, -3:] = 0
    everywhere = torch.zeros(B, n).long()
    everywhere[:, :g] = 1
    inputs["global_attention_mask"] = everywhere
    with torch.no_grad():
        trace = hookattn.trace(model, inputs, verify="full")
        theirs = model(**inputs, output_attentions=True)
    assert not trace.skipped and trace.faithful
    local = [call for call in trace if call.weights.shape[2] == n and call.notes]
    assert len(local) == 2 and len(trace) == (4 if g else 2)
    for call, offered in zip(local, theirs.attentions, strict=True):
        assert call.weights.shape == (B, H, n, g + n)
        wide = torch.zeros(B, H, n, g + n + 4)
        wide[..., :g] = offered[..., :g]
        for t in range(n):
            wide[:, :, t, g + t : g + t + 5] = offered[:, :, t, g:]
        wanted = torch.cat([wide[..., :g], wide[..., g + 2 : g + 2 + n]], -1)
        rows = slice(g, None)  # what a global token sees here is filler
        assert (call.weights[:, :, rows] - wanted[:, :, rows]).abs().max() < 1e-6
        seen = call.mask.expand_as(call.weights)
        band = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 2
        assert not (seen[..., g:] & ~band).any()
