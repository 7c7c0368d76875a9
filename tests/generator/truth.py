"""What a case computes, in float64 and in the axes of the contract: no layouts, no folds, no spellings.

Letters: B H T S D E as in the documentation, ``i`` the width of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Truth:
    """The attention of a case.

    Attributes:
        q: B H T D, as it enters the product.
        k, v: B H S D and B H S E, repeated for grouped queries.
        scores: B H T S, finite.
        mask: bool, B H T S.
        weights: B H T S.
        heads_out: B H T E, what each head returns.
        output: what the module returns, ``b n f``; ``b n h e`` where it has no output projection.
        scale: of q·k.
        shift: what a sigmoid takes off the scores before.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    mask: Tensor
    weights: Tensor
    heads_out: Tensor
    output: Tensor
    scale: float
    shift: float


def compute(t: dict[str, Any], features: dict[str, str], sizes: dict[str, int]) -> Truth:
    """From the parameters in their own axes."""
    t = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in t.items()}
    f = features
    x = t["x"]
    windows, n = f["windows"] != "none", sizes["w"]
    order = f.get("window order", "")
    if windows:  # B N i -> B·W T i
        x = x.unflatten(1, (n, -1)) if order == "w t" else x.unflatten(1, (-1, n)).transpose(1, 2)
        if f.get("window batch") == "w b":
            x = x.transpose(0, 1)
        batch = x.shape[:2]
        x = x.flatten(0, 1)
    if f.get("pick of") == "x":
        x = x[:, t["picked"]]
    context = t.get("context", x)
    k, v = _keys(t, f, context)
    q = _queries(t, f, x, k)
    q, k = _positions(t, f, q, k)
    if f.get("pick of") in ("all", "queries"):
        q = q[:, :, t["picked"]]
    if f.get("pick of") in ("all", "keys"):
        k, v = k[:, :, t["picked keys"]], v[:, :, t["picked keys"]]
    heads = q.shape[1]
    k, v = (_repeat(y, heads, f.get("group order", "g r")) for y in (k, v))
    scores = _scores(t, f, q, k)
    if "softcap" in t:
        scores = t["softcap"] * torch.tanh(scores / t["softcap"])
    if "temperature" in t:
        scores = scores * t["temperature"][:, None, None]
    if "bias" in t:
        scores = scores + t["bias"]
    mask = t.get("mask")
    if mask is None:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if t.get("mask by window"):  # W 1 T S -> B·W 1 T S
        mask = mask.repeat(len(scores) // n, 1, 1, 1)
    mask = mask.expand_as(scores)
    if "top" in t:  # ties there are none of, but of what is masked: weights of 0 in any case
        hidden = scores.masked_fill(~mask, -torch.inf)
        mask = mask & (hidden >= hidden.topk(t["top"], -1).values[..., -1:])
    weights = _weights(t, f, scores, mask)
    out = weights @ v
    scaled_q = q * t.get("scale q", 1.0) if f["score"] == "dot" else q
    scaled_k = k * t.get("scale k", 1.0) if f["score"] == "dot" else k
    left = t.get("scale", 1.0) / (t.get("scale q", 1.0) * t.get("scale k", 1.0))
    final = out
    if f["projection"] == "latent":
        final = torch.einsum("bhtc,hdc->bhtd", out, t["uv"])
    if windows:
        final = final.unflatten(0, batch)
        if f.get("window batch") == "w b":
            final = final.transpose(0, 1)  # B W H T E
        final = final.movedim(1, 2 if order == "w t" else 3)  # B H W T E, or B H T W E
        final = final.flatten(2, 3)
    final = final.transpose(1, 2)
    if f["out"] != "none":
        final = torch.einsum("bnhe,fhe->bnf", final, t["wo"])
    return Truth(scaled_q, scaled_k, v, scores, mask, weights, out, final, left, t.get("normalizer shift", 0.0))


def _keys(t: dict[str, Any], f: dict[str, str], context: Tensor) -> tuple[Tensor, Tensor]:
    if f["projection"] == "latent":
        c = torch.einsum("bsi,ci->bsc", context, t["wc"])[:, None]
        return c, c
    k = torch.einsum("bsi,gdi->bgsd", context, t["wk"])
    v = torch.einsum("bsi,gei->bgse", context, t["wv"])
    if "bk" in t:
        k = k + t["bk"][:, None]
    if "bv" in t:
        v = v + t["bv"][:, None]
    return k, v


def _queries(t: dict[str, Any], f: dict[str, str], x: Tensor, k: Tensor) -> Tensor:
    if f["kind"] == "pool":
        return t["queries"].transpose(0, 1)[None].expand(len(k), -1, -1, -1)
    q = torch.einsum("bti,hdi->bhtd", x, t["wq"])
    if f["projection"] == "latent":
        return torch.einsum("bhtd,hdc->bhtc", q, t["up"])
    return q + t["bq"][:, None] if "bq" in t else q


def _positions(t: dict[str, Any], f: dict[str, str], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    form = f["positions"]
    if form == "normalised":
        return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    if form == "learned":
        return q + t["pq"], k + t["pk"]
    if form in ("halves", "pairs", "complex"):
        return _turn(q, form), _turn(k, form)
    return q, k


def _turn(y: Tensor, form: str) -> Tensor:
    n, d = y.shape[-2:]
    pairs = d // 2
    angles = torch.arange(n).double()[:, None] * 1.7 ** -torch.arange(pairs).double()
    first = torch.arange(pairs) if form == "halves" else 2 * torch.arange(pairs)
    second = first + (pairs if form == "halves" else 1)
    a, b = y[..., first], y[..., second]
    out = torch.empty_like(y)
    out[..., first] = a * angles.cos() - b * angles.sin()
    out[..., second] = b * angles.cos() + a * angles.sin()
    return out


def _repeat(y: Tensor, heads: int, order: str) -> Tensor:
    g = y.shape[1]
    head = torch.arange(heads)
    return y[:, head // (heads // g) if order == "g r" else head % g]


def _scores(t: dict[str, Any], f: dict[str, str], q: Tensor, k: Tensor) -> Tensor:
    form = f["score"]
    pairs_q, pairs_k = q[:, :, :, None], k[:, :, None]
    if form == "additive":
        vector = t["vector"]
        if vector.dim() == 2:
            vector = vector[:, None, None]
        return (torch.tanh(pairs_q + pairs_k) * vector).sum(-1)
    if form == "distance":
        return -((pairs_q - pairs_k) ** 2).sum(-1)
    if form == "cosine":
        return 4 * (pairs_q * pairs_k).sum(-1) / (pairs_q.norm(dim=-1) * pairs_k.norm(dim=-1))
    if form == "bilinear":
        m = t["matrix"]
        return torch.einsum("bhtd,hde,bhse->bhts", q, m if m.dim() == 3 else m.expand(q.shape[1], -1, -1), k)
    return (pairs_q * pairs_k).sum(-1) * t["scale"]


def _weights(t: dict[str, Any], f: dict[str, str], scores: Tensor, mask: Tensor) -> Tensor:
    form = f["normalizer"]
    shift, divisor = t.get("normalizer shift", 0.0), t.get("normalizer divisor", 1)
    hidden = scores.masked_fill(~mask, -torch.inf)
    if "sinks" in t:
        column = t["sinks"][:, None, None].expand(*hidden.shape[:3], 1)
        return torch.cat([hidden, column], -1).softmax(-1)[..., :-1]
    if form in ("softmax", "late"):
        return hidden.softmax(-1)
    if form == "softmax1":
        return torch.cat([hidden, torch.zeros_like(hidden[..., :1])], -1).softmax(-1)[..., :-1]
    if form == "sigmoid":
        return torch.sigmoid(hidden - shift)
    if form == "sparsemax":
        return _sparsemax(hidden)
    plain = {"relu": scores.relu(), "relu squared": scores.relu() ** 2, "none": scores}[form]
    return plain.masked_fill(~mask, 0) / divisor


def _sparsemax(z: Tensor) -> Tensor:
    """By bisection for the threshold: the sum of what is above it is 1."""
    high = z.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(80):
        mid = (low + high) / 2
        above = (z - mid).clamp(min=0).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return (z - low).clamp(min=0)
