"""A server in plain torch: requests come and go in one batch, and their keys lie in pages of a pool that all share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import hookattn
from hookattn.serving import requests_of_batch
from tests.standins import Flash2, Give, ends

PAGE, HEADS, GROUPS, WIDTH, VOCABULARY = 4, 4, 2, 8, 50


class Paged(nn.Module):
    """Two layers that attend with flash-attn's packed function, to keys in pages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        d = HEADS * WIDTH
        self.embed = nn.Embedding(VOCABULARY, d)
        self.positions = nn.Embedding(200, d)
        self.layers = nn.ModuleList(PagedAttention(d) for _ in range(2))

    def forward(self, ids: Tensor, at: Tensor, pool: Pool, batch: Batch) -> Tensor:
        x = self.embed(ids) + self.positions(at)
        for i, layer in enumerate(self.layers):
            x = x + layer(x, pool.keys[i], pool.values[i], batch)
        return x @ self.embed.weight.T


class PagedAttention(nn.Module):
    """Writes keys and values to their slots, and attends to those of each sequence."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, n * WIDTH, bias=False) for n in (HEADS, GROUPS, GROUPS))
        self.out = nn.Linear(HEADS * WIDTH, d, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> Tensor:
        q, k, v = (f(x).view(len(x), -1, WIDTH) for f in (self.q, self.k, self.v))
        keys.view(-1, GROUPS, WIDTH)[batch.slots], values.view(-1, GROUPS, WIDTH)[batch.slots] = k, v
        import flash_attn  # type: ignore[import-not-found]

        out = flash_attn.flash_attn_varlen_func(
            q, keys, values, batch.queries, batch.ends, batch.longest[0], batch.longest[1], causal=True,
            block_table=batch.table,
        )  # fmt: skip
        return self.out(out.flatten(1))  # type: ignore[no-any-return]


@dataclass
class Batch:
    """One step: where the tokens of each sequence are, and its keys."""

    queries: Tensor
    ends: Tensor
    longest: tuple[int, int]
    table: Tensor
    slots: Tensor


@dataclass
class Pool:
    """Pages of keys and values of two layers."""

    pages: int = 200
    used: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for several in (self.keys, self.values):
            several += [torch.full((self.pages, PAGE, GROUPS, WIDTH), 7.0) for _ in range(2)]

    def page(self) -> int:
        self.used += 1
        return self.used - 1


@dataclass
class Request:
    """A sequence of tokens, of which some are computed."""

    name: str
    ids: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class Server:
    """Runs batches; whoever calls :meth:`step` says which requests, in which order, and how many tokens of each."""

    def __init__(self) -> None:
        self.model, self.pool = Paged().eval(), Pool()

    @torch.no_grad()
    def step(self, batch: Sequence[tuple[Request, int]], named: bool = True) -> None:
        ids, at, slots, rows = [], [], [], []
        for request, n in batch:
            end = request.computed + n
            while len(request.pages) * PAGE < end:
                request.pages.append(self.pool.page())
            positions = range(request.computed, end)
            ids += [request.ids[p] for p in positions]
            at += positions
            slots += [request.pages[p // PAGE] * PAGE + p % PAGE for p in positions]
            rows.append(torch.tensor(request.pages))
            request.computed = end
        counts, ns = [n for _, n in batch], [r.computed for r, _ in batch]
        table = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pool.pages - 1)
        made = Batch(ends(counts), ends(ns), (max(counts), max(ns)), table.int(), torch.tensor(slots))
        inputs = torch.tensor(ids), torch.tensor(at), self.pool, made
        if not named:
            self.model(*inputs)
            return
        with requests_of_batch([r.name for r, _ in batch]):
            self.model(*inputs)

    def preempt(self, request: Request, keep: int = 0) -> None:
        """Its keys are given up, but those of its first pages; they are computed again into others."""
        request.computed = keep * PAGE
        request.pages = request.pages[:keep]

    def alone(self, request: Request, **options: object) -> hookattn.Trace:
        """One forward over the whole sequence."""
        whole = Request(request.name, request.ids)
        with hookattn.tracing(self.model, **options) as trace:  # type: ignore[arg-type]
            self.step([(whole, request.computed)])
        return trace


def flash(give: Give) -> None:
    """Put a stand-in of flash-attn where the server looks for it."""
    give("flash_attn", Flash2)


@contextmanager
def traced(server: Server, **options: object) -> Iterator[hookattn.Trace]:
    with hookattn.tracing(server.model, **options) as trace:  # type: ignore[arg-type]
        yield trace


def request(name: str, n: int, seed: int = 0) -> Request:
    generator = torch.Generator().manual_seed(seed * 1000 + n)
    return Request(name, torch.randint(VOCABULARY, (n,), generator=generator).tolist())


def difference(one: hookattn.Trace, other: hookattn.Trace, names: Mapping[str, float]) -> None:
    """Raises AssertionError: calls of one sequence differ, whose rows may begin later in the first trace."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.site == b.site
        t, s = a.weights.shape[2], a.weights.shape[3]
        assert (a.queries is None and t == s) or a.queries == tuple(range(s - t, s))
        for name, within in names.items():
            x, y = getattr(a, name), getattr(b, name)
            if name not in ("k", "v"):
                y = y.expand(*y.shape[:2], s, -1)[:, :, s - t :] if y.shape[2] == 1 else y[:, :, s - t :]
            if name == "mask":
                assert torch.equal(x.expand_as(y), y)
            else:
                assert x.shape == y.shape, (name, x.shape, y.shape)
                assert float((x - y).abs().max()) <= within, (name, a)
