"""The kind of an attention is told by where its queries and keys come from, where the whole model is followed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn.models.site_names import kind_of


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Attention(nn.Module):
    """The same class for every kind, under whatever name."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.fused = fused

    def heads(self, x: Tensor, y: Tensor) -> list[Tensor]:
        pairs = ((self.q, x), (self.k, y), (self.v, y))
        return [f(t).unflatten(-1, (2, 8)).transpose(1, 2) for f, t in pairs]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out = attend(*self.heads(x, x if y is None else y), self.fused)
        return self.out(out.transpose(1, 2).flatten(2))


class Conditioned(nn.Module):
    """Blocks of two, of which the second attends to a text; its path does not say so."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attn1, self.attn2, self.norm = Attention(fused), Attention(fused), nn.LayerNorm(16)
        self.table = nn.Embedding(9, 16)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        text = self.table(ids)
        for _ in range(2):
            x = x + self.attn1(self.norm(x))
            x = x + self.attn2(self.norm(x), text)
        return x


class Perceiver(nn.Module):
    """Learned queries that read a sequence, and themselves beside it; then each other."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.read, self.mix = Attention(fused), Attention(fused)
        self.latents = nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        latents = latents + self.read(latents, torch.cat([x, latents], 1))
        return latents + self.mix(latents)


class TwoStreams(nn.Module):
    """An image and a text with projections of their own, attending together."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, 2)
        self.image, self.text, self.fused = nn.Linear(16, 48), nn.Linear(16, 48), fused

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        both = [f(t).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4) for f, t in ((self.text, text), (self.image, x))]
        q, k, v = torch.cat(both, 3)
        return attend(q, k, v, self.fused)


class Image(nn.Module):
    """Patches of an image that lie along two axes, with a learned token in front."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 2, 2), nn.Parameter(torch.randn(1, 2, 16))
        self.a = Attention(fused)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.a(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


class Latents(nn.Module):
    """Learned rows that attend to a sequence, and to themselves."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.latents, self.read, self.think = nn.Parameter(torch.randn(5, 16)), Attention(fused), Attention(fused)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.read(z, x)
        return z + self.think(z)


class Tokens(nn.Module):
    """A learned token in front, and keys that are a smaller image of the queries."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.token, self.a, self.b = nn.Parameter(torch.randn(1, 3, 16)), Attention(fused), Attention(fused)
        self.smaller = nn.Conv2d(16, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.smaller(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
        x = x + self.a(x, small)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.b(x)


class Cached(Attention):
    """Keys of earlier steps, put in front or in a buffer."""

    def __init__(self, fused: bool, how: str) -> None:
        super().__init__(fused)
        self.how, self.at = how, 0
        empty = torch.zeros(0) if how == "cat" else torch.zeros(2, 2, 20, 8)
        self.past: list[Tensor] = [empty.clone() for _ in range(2)]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, *new = self.heads(x, x)
        span = slice(self.at, self.at + x.shape[1])
        for i, t in enumerate(new):
            if self.how == "cat":
                self.past[i] = torch.cat([self.past[i], t], 2)
            elif self.how == "copy_":
                self.past[i][:, :, span].copy_(t)
            elif self.how == "item":
                self.past[i][:, :, span] = t
            else:
                self.past[i].index_copy_(2, torch.arange(span.start, span.stop), t)
        self.at = span.stop
        return attend(q, *(t[:, :, : self.at] for t in self.past), self.fused)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def kinds(trace: hookattn.Trace) -> list[tuple[str, str]]:
    return [(c.site.path, c.site.kind) for c in trace]


fused = pytest.mark.parametrize("fused", [True, False])


@fused
@pytest.mark.parametrize("length", [9, 4])
def test_cross_is_told_by_the_sequences(fused: bool, length: int) -> None:
    trace = hookattn.trace(Conditioned(fused), (torch.randn(2, 9, 16), torch.randint(9, (2, length))))
    assert kinds(trace) == [("attn1", "self"), ("attn2", "cross")] * 2
    assert {c.site.path for c in trace.select(kind="cross")} == {"attn2"}


@fused
def test_joint_is_told_by_what_is_laid_end_to_end(fused: bool) -> None:
    trace = hookattn.trace(TwoStreams(fused), (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 16)))
    assert kinds(trace) == [("", "joint")] and tuple(trace[0].weights.shape) == (2, 2, 21, 21)


@fused
def test_learned_queries_attend_to_another_sequence(fused: bool) -> None:
    assert kinds(hookattn.trace(Latents(fused), torch.randn(2, 9, 16))) == [("read", "cross"), ("think", "self")]


@fused
def test_one_sequence_stays_one(fused: bool) -> None:
    """With a token in front, and of another size."""
    assert kinds(hookattn.trace(Tokens(fused), torch.randn(2, 16, 16))) == [("a", "self"), ("b", "self")]
    assert kinds(hookattn.trace(Image(fused), torch.randn(2, 3, 8, 8))) == [("a", "self")]


@fused
@pytest.mark.parametrize("how", ["cat", "copy_", "item", "index"])
def test_a_cache_makes_no_cross_attention(how: str, fused: bool) -> None:
    model, x = Cached(fused, how), torch.randn(2, 9, 16)
    with hookattn.tracing(model) as trace:
        model(x)
        model(torch.randn(2, 1, 16))
        model(torch.randn(2, 3, 16))
    assert kinds(trace) == [("", "self")] * 3 and trace[2].weights.shape[-2:] == (3, 13)


def test_a_step_of_one_query_has_the_kind_of_its_site() -> None:
    model, text = Conditioned(True), torch.randint(9, (2, 4))
    with hookattn.tracing(model) as trace:
        model(torch.randn(2, 9, 16), text)
        model(torch.randn(2, 1, 16), text)
    assert kinds(trace) == [("attn1", "self"), ("attn2", "cross")] * 4


def test_a_path_that_says_cross_is_believed() -> None:
    """The source and the target of a translation may be one and the same tensor."""
    model, x = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval(), torch.randn(2, 9, 16)
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert kinds(hookattn.trace(model, (x, x))) == list(zip(names, ["self", "self", "cross"], strict=True))


@fused
def test_a_map_of_positions_and_an_unknown_operation_tell_nothing(fused: bool) -> None:
    class Unknown(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 1.5)

    class Model(Attention):
        def __init__(self) -> None:
            super().__init__(fused)
            self.positions = nn.Linear(9, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            x = self.out(x)
            q, k, v = self.heads(x, self.positions(x.transpose(1, 2)).transpose(1, 2))
            out = attend(q, k, v, fused)
            q, k, v = self.heads(x, x)
            return out + attend(Unknown.apply(q), Unknown.apply(k), v, fused)  # type: ignore[no-untyped-call]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hookattn.GuessedAxesWarning)
        trace = hookattn.trace(Model(), torch.randn(2, 9, 16))
    assert kinds(trace) == [("", "self")] * 2


@fused
def test_rows_of_a_table_are_picked_as_by_an_embedding(fused: bool) -> None:
    """``table[ids]`` is data, though nothing but a parameter is in it."""

    class Model(Attention):
        def __init__(self) -> None:
            super().__init__(fused)
            self.table = nn.Parameter(torch.randn(9, 16))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(self.table[x])

    trace = hookattn.trace(Model(), torch.randint(9, (2, 5)))
    assert kinds(trace) == [("", "self")] and tuple(trace[0].weights.shape) == (2, 2, 5, 5) and not trace.skipped


@pytest.mark.parametrize("fused", [False, True])
def test_learned_queries_read_what_they_are_laid_beside(fused: bool) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        trace = hookattn.trace(Perceiver(fused), torch.randn(2, 5, 16))
    assert [call.site.kind for call in trace] == ["cross", "self"]


@pytest.mark.parametrize("name", ["x_attn", "xattn", "X_Attention"])
def test_a_path_may_say_cross_with_one_letter(name: str) -> None:
    assert kind_of(f"blocks.0.{name}") == "cross"
    assert kind_of(f"blocks.0.max_{name[1:]}") == "self"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("queries", [1, 5])
def test_one_query_or_one_key_has_a_sequence(queries: int, length: int, fused: bool) -> None:
    x, y = torch.randn(2, queries, 16), torch.randn(2, length, 16)
    with torch.no_grad():
        assert hookattn.trace(Attention(fused), (x, y))[0].site.kind == "cross"
        assert hookattn.trace(Attention(fused), x)[0].site.kind == "self"


MODELS = {
    "cross": (Conditioned, lambda: (torch.randn(2, 9, 16), torch.randint(9, (2, 4))), ["self", "cross"] * 2),
    "joint": (TwoStreams, lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 16)), ["joint"]),
    "learned": (Latents, lambda: torch.randn(2, 9, 16), ["cross", "self"]),
    "beside": (Perceiver, lambda: torch.randn(2, 5, 16), ["cross", "self"]),
    "token": (Tokens, lambda: torch.randn(2, 16, 16), ["self", "self"]),
}


@fused
@pytest.mark.parametrize("name", MODELS)
def test_what_runs_again_and_is_recognised_has_the_same_kinds(name: str, fused: bool) -> None:
    """Whatever else ran in between: several forwards in one trace, and several traces."""
    make, inputs, expected = MODELS[name]
    model = make(fused)
    for forwards in (1, 1, 3, 1):
        with hookattn.tracing(model) as trace:
            for _ in range(forwards):
                x = inputs()
                model(*x) if isinstance(x, tuple) else model(x)
        assert [c.site.kind for c in trace] == expected * forwards


@pytest.mark.parametrize("order", ["hbtd", "bhtd"])
def test_where_the_heads_of_a_fused_call_are_is_followed_and_the_rest_is_its_own_word(order: str) -> None:
    """Heads in front, as windows or sequences of one head are given, and where the kernel has them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (2, 8)) for y in self.qkv(x).chunk(3, -1))
            q, k, v = (y.permute(["bthd".index(z) for z in order]) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return out.permute([order.index(z) for z in "bthd"]).flatten(2)

    model, x = Model(), torch.randn(3, 5, 16)
    call = hookattn.trace(model, x, verify="full")[0]
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in model.qkv(x).chunk(3, -1))
    assert torch.equal(call.q, q) and torch.equal(call.k, k) and torch.equal(call.v, v)
    followed = {"B", "H", "G"} if order == "hbtd" else set()
    assert dict(call.basis) == {x: "followed" if x in followed else "kernel" for x in "BHTSG"}
    torch.testing.assert_close(call.weights, (q @ k.mT * 8**-0.5).softmax(-1))


@fused
def test_what_goes_on_otherwise_after_it_was_recognised_has_the_same_kind(fused: bool) -> None:
    """The sequences are laid end to end as in every run before, and what follows is new: it is followed from there."""

    class Changing(TwoStreams):
        change = staticmethod(lambda y: y)

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            x = self.patches(image).flatten(2).transpose(1, 2)
            both = torch.cat([self.text(text), self.image(x)], 1)
            q, k, v = type(self).change(both).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return attend(q, k, v, self.fused)

    model = Changing(fused)
    changes = [lambda y: y, lambda y: y * 2, lambda y: y + 1, lambda y: y.clone(), lambda y: y.tanh(), lambda y: y / 2]
    for change in (changes[0], changes[0], *changes, *changes):
        Changing.change = staticmethod(change)
        trace = hookattn.trace(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 16)))
        assert kinds(trace) == [("", "joint")]
