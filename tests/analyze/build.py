"""Traces for the tests of measures: random ones of every kind, and ones whose weights are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hookattn
from hookattn import Call
from hookattn.calls.site import Site
from tests.reference import draw, reference_attention


@dataclass
class Case:
    """A trace of one or more layers, and beside it what is true of it in float64.

    Attributes:
        trace: the trace.
        weights: a list of B H T S, float64, one for each call.
        mask: bool, B 1 T S.
        real: bool, B S: which keys are real tokens.
        rows: bool, B T: which queries count.
        positions: T, the key position of each query; None in cross-attention.
    """

    trace: hookattn.Trace
    weights: list[Tensor]
    mask: Tensor
    real: Tensor
    rows: Tensor
    positions: Tensor | None


def case(
    b: int = 2,
    h: int = 4,
    g: int = 2,
    t: int = 9,
    s: int | None = None,
    d: int = 6,
    *,
    layers: int = 2,
    causal: bool = True,
    pad: Sequence[int] | None = None,
    side: str = "right",
    sinks: bool = False,
    cross: bool = False,
    heads: tuple[int, ...] | None = None,
    queries: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    keep: Sequence[str] = ("q", "k", "v", "bias", "scores", "mask", "sinks", "weights", "output"),
    tokens: list[list[str]] | None = None,
    seed: int = 0,
) -> Case:
    """A random trace.

    Args:
        b, h, g, t, s, d: the extents; ``s`` keys, by default as many as queries (more: a cache before the queries).
        layers: how many calls.
        causal: whether a query sees no later key.
        pad: how many padded positions each batch entry has.
        side: where they are.
        sinks: whether there is a learned sink for each head.
        cross: whether queries and keys are of different sequences (never causal).
        heads, queries: what is kept, as a selection would.
        dtype: of the fields.
        keep: which fields the trace has.
        tokens: as in a trace.
        seed: of the random numbers.
    """
    s = t if s is None else s
    causal = causal and not cross
    at = torch.arange(t) + (s - t)
    mask = (at[:, None] >= torch.arange(s)) if causal else torch.ones(t, s, dtype=torch.bool)
    real = torch.ones(b, s, dtype=torch.bool)
    for i, n in enumerate(pad or ()):
        real[i, (s - n) if side == "right" else 0 : s if side == "right" else n] = False
    mask = (mask & real[:, None]).unsqueeze(1)
    rows = mask.any(-1)[:, 0] if cross else mask.any(-1)[:, 0] & real[:, at]
    calls, exact = [], []
    for layer in range(layers):
        q, k = draw(b, h, t, d, seed=seed + 10 * layer), draw(b, g, s, d, seed=seed + 10 * layer + 1, std=2.0)
        v = draw(b, g, s, d, seed=seed + 10 * layer + 2)
        sink = draw(h, seed=seed + 10 * layer + 3) if sinks else None
        scores, weights, output = reference_attention(q, k, v, scale=d**-0.5, mask=mask, sinks=sink)
        own_mask, kv = mask, None
        if heads is not None:
            index = list(heads)
            q, scores, weights, output = q[:, index], scores[:, index], weights[:, index], output[:, index]
            sink = None if sink is None else sink[index]
            used = sorted({x // (h // g) for x in index})
            k, v, kv = k[:, used], v[:, used], tuple(used.index(x // (h // g)) for x in index)
        if queries is not None:
            index = list(queries)
            q, scores, weights, output = q[:, :, index], scores[:, :, index], weights[:, :, index], output[:, :, index]
            own_mask = own_mask[:, :, index]
        fields: dict[str, Any] = {
            "q": q, "k": k, "v": v, "bias": None, "scores": scores, "mask": own_mask, "sinks": sink, "weights": weights,
            "output": output,
        }  # fmt: skip
        kept = {n: _as(x, dtype) for n, x in fields.items() if n in keep}
        site = Site(f"layers.{layer}.attn", layer, "main", "cross" if cross else "self", "Attention", layers=layers)
        derivable = ("scores", "weights") if {"q", "k", "mask", "bias", "sinks"} <= set(kept) else ()
        calls.append(
            Call(site, 0, layer, "eager", dtype, d**-0.5, causal=causal, heads=heads, kv_heads=kv, queries=queries,
                 of_queries=None if queries is None else t, derivable=derivable, fields=kept)
        )  # fmt: skip
        exact.append(weights.double())
    index_ = slice(None) if queries is None else list(queries)
    return Case(
        hookattn.Trace(calls, tokens=tokens), exact, mask[:, :, index_], real, rows[:, index_],
        None if cross else at[index_],
    )  # fmt: skip


def _as(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return value if value is None or value.dtype == torch.bool else value.to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "both ways": {"causal": False},
    "padded right": {"pad": (0, 3)},
    "padded left": {"pad": (2, 4), "side": "left"},
    "encoder, padded": {"causal": False, "pad": (4, 0)},
    "sinks": {"sinks": True},
    "cache": {"t": 3, "s": 11},
    "one query": {"t": 1, "s": 7, "b": 3},
    "some heads": {"heads": (3, 0)},
    "some queries": {"queries": (1, 4, 8)},
    "one head a group": {"g": 4},
}
"""Self-attention of every kind, for parametrized tests: ``case(**CASES[name])``."""


def given(
    weights: Tensor | Sequence[Tensor], mask: Tensor | None = None, tokens: Any = None, **site: Any
) -> hookattn.Trace:
    """A trace with these weights (B H T S, or one such for each layer); without ``mask`` it is causal if they are."""
    several = [weights] if isinstance(weights, Tensor) else list(weights)
    calls = []
    for layer, w in enumerate(several):
        place = replace(Site(f"layers.{layer}.attn", layer, layers=len(several)), **site)
        lower = torch.ones(w.shape[2:], dtype=torch.bool).tril()
        own = mask if mask is not None else lower if not bool(w[..., ~lower].any()) else torch.ones_like(lower)
        fields = {"weights": w, "mask": own, "sinks": None, "bias": None}
        calls.append(Call(place, 0, layer, "eager", w.dtype, 1.0, fields=fields))
    return hookattn.Trace(calls, tokens=tokens)


def uniform(s: int, h: int = 1, b: int = 1) -> Tensor:
    """B H S S: causal attention that is the same for all keys it may go to."""
    w = torch.ones(s, s).tril()
    return (w / w.sum(-1, keepdim=True)).expand(b, h, s, s).clone()


def previous(s: int, h: int = 1) -> Tensor:
    """1 H S S: every token looks at the one before, the first at itself."""
    w = torch.zeros(s, s)
    w[torch.arange(1, s), torch.arange(s - 1)] = 1
    w[0, 0] = 1
    return w.expand(1, h, s, s).clone()
