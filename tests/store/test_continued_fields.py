"""Keys and values of a generation in a file: each row once, and the keys of every step whole when they are read."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import hookattn
from hookattn import Call, CorruptFileError, Site, Trace
from hookattn.calls.derived_cache import DerivedCache
from hookattn.calls.fields import InFile
from hookattn.calls.key_history import Continued, KeyHistory, Link
from hookattn.store import LazyFile, StreamWriter, stored_history, write_file
from hookattn.store import document as document_module
from hookattn.store.document import save
from hookattn.store.links import Chain
from hookattn.store.stored_history import StoredHistory
from tests import tiny_models
from tests.reference import draw, same_bits
from tests.store.test_trace_file import changed, check_same

B, H, G, D, WIDTH, PROMPT, STEPS, WINDOW, MOST = 2, 4, 2, 8, 32, 5, 7, 6, 16
Kept = tuple[Tensor, Tensor]
Document = dict[str, Any]


class Layer(nn.Module):
    """One attention with a cache, which notes what it attends to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.cache, self.seen = kind, None, list[Kept]()
        self.q, self.kv = nn.Linear(WIDTH, H * D), nn.Linear(WIDTH, 2 * G * D)

    def keys(self, x: Tensor, at: int, order: Tensor | None) -> Kept:
        k, v = self.kv(x).unflatten(-1, (2 * G, D)).transpose(1, 2).split((G, G), 1)
        if self.cache is None and self.kind == "static":
            self.cache = k.new_zeros(B, G, MOST, D), v.new_zeros(B, G, MOST, D)
        if self.kind == "static":
            for cache, new in zip(self.cache, (k, v), strict=True):
                cache[:, :, at : at + x.shape[1]] = new
        elif self.cache is None:
            self.cache = k, v
        elif self.kind != "cross":
            if order is not None:
                self.cache = self.cache[0][order], self.cache[1][order]
            self.cache = torch.cat([self.cache[0], k], 2), torch.cat([self.cache[1], v], 2)
        if self.kind == "sliding":
            self.cache = self.cache[0][:, :, -WINDOW:], self.cache[1][:, :, -WINDOW:]
        return self.cache

    def forward(self, x: Tensor, at: int, order: Tensor | None) -> Tensor:
        k, v = self.keys(x, at, order)
        self.seen.append((k.clone(), v.clone()))
        q = self.q(x).unflatten(-1, (H, D)).transpose(1, 2)
        mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool)
        if self.kind != "cross":
            mask = mask.tril(at if self.kind == "static" else k.shape[2] - x.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2)


class Decoder(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kind) for kind in kinds)

    def forward(self, x: Tensor, at: int = 0, order: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, at, order)
        return x

    def generate(self) -> Iterator[int]:
        """A prompt and steps of one token; beams are reordered in some of them."""
        with torch.no_grad():
            self(draw(B, PROMPT, WIDTH, seed=1))
            yield 0
            for i in range(STEPS):
                order = torch.tensor([[0, 0], [1, 0], [0, 1]][i % 3]) if self.layers[0].kind == "beams" else None
                self(draw(B, 1, WIDTH, seed=2 + i), PROMPT + i, order)
                yield i + 1


KINDS = ("growing", "static", "sliding", "beams", "cross")
kinds = pytest.mark.parametrize("kind", KINDS)


def run(kind: str, **options: Any) -> tuple[Trace, list[Kept]]:
    """The trace of a generation, and for each call the keys and values that the model itself noted."""
    torch.manual_seed(0)
    model = Decoder(kind, kind)
    with hookattn.tracing(model, **options) as trace:
        for _ in model.generate():
            pass
    return trace, [model.layers[i % 2].seen[i // 2] for i in range(len(trace))]


def check(trace: Trace, expected: list[Kept], order: list[int] | None = None) -> None:
    """Keys and values are those that the model noted, bit for bit, in whichever order they are read."""
    for i in range(len(trace)) if order is None else order:
        for name, x in zip("kv", expected[i], strict=True):
            place = trace[i].fields[name]
            assert trace[i].get(name).shape == x.shape == (place.shape if isinstance(place, Continued) else x.shape)
            assert same_bits(trace[i].get(name), x), (i, name)


def document(path: Path | str) -> Document:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hookattn"])


def rows(path: Path | str, name: str) -> int:
    """How many rows of keys or values a file has for both layers."""
    with LazyFile(path) as file:
        return sum(file.shape(n)[2] for n in file if n.endswith(f"/{name}"))


# What each kind has to keep of one layer: the prompt and a row a step, a static cache with its empty end, keys alone
ROWS = {"growing": 12, "static": MOST + STEPS, "sliding": WINDOW + STEPS - 1, "beams": 12, "cross": PROMPT}


@kinds
@pytest.mark.parametrize("how", ["saved", "streamed", "saved again", "compact", "pickled", "copied"])
def test_every_step_is_what_the_model_had(tmp_path: Path, kind: str, how: str) -> None:
    path = tmp_path / "f"
    trace, expected = run(kind, to=path) if how == "streamed" else run(kind)
    check(trace, expected)
    if how != "streamed":
        trace.save(path, compact=how == "compact")
    loaded = hookattn.load(path)
    if how == "saved again":
        path = tmp_path / "g"
        loaded.save(path)
        loaded.save(tmp_path / "f")  # and over what it is read from
        check_same(trace, loaded)
        loaded = hookattn.load(path)
    if how in ("pickled", "copied"):
        loaded = pickle.loads(pickle.dumps(loaded)) if how == "pickled" else copy.deepcopy(loaded)
    last = list(range(len(trace)))
    check(loaded, expected, last[::-1] if how == "saved" else last)
    check(hookattn.load(path), expected, [9, 3, 15, 0, 1, 14, 9])
    if how != "compact":
        check_same(trace, hookattn.load(path), measured=how != "streamed")
    assert [rows(path, n) for n in "kv"] == [2 * ROWS[kind]] * 2
    entries = document(path)["calls"]
    assert all(e["continued"].keys() == {"k", "v"} and "k" not in e["fields"] for e in entries[6:])
    assert all("continued" not in e for e in entries[:2])


@kinds
def test_the_same_file_is_written_at_once_and_as_it_comes(tmp_path: Path, kind: str) -> None:
    run(kind)[0].save(tmp_path / "f")
    run(kind, to=tmp_path / "g")
    one, two = LazyFile(tmp_path / "f"), LazyFile(tmp_path / "g")
    assert set(one) == set(two) and all(same_bits(one.tensor(n), two.tensor(n)) for n in one)
    entries = [document(tmp_path / n)["calls"] for n in "fg"]
    assert [e.get("continued") for e in entries[0]] == [e.get("continued") for e in entries[1]]


@kinds
def test_the_header_of_a_generation_has_the_room_that_was_left_for_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    own = document_module._header_size
    monkeypatch.setattr(document_module, "_header_size", lambda *a: (found.append(own(*a)), found[0])[1])
    raw = Path(run(kind)[0].save(tmp_path / "f")).read_bytes()
    used = 8 + len(raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip())
    assert used <= found[0] < used + 900 * 2 * (STEPS + 1)


@kinds
@pytest.mark.parametrize("loaded", [False, True])
def test_a_part_of_a_trace_is_written_with_what_it_needs(tmp_path: Path, kind: str, loaded: bool) -> None:
    trace, expected = run(kind)
    if loaded:
        trace = hookattn.load(trace.save(tmp_path / "whole"))
    n = len(trace)
    parts = {
        "later steps": range(6, n),
        "every other step": [i for i in range(n) if i // 2 % 2],
        "one layer": range(1, n, 2),
        "backwards": range(n)[::-1],
        "twice": [*range(n), *range(n)],
        "doubled": [i for i in range(n) for _ in (0, 1)],
        "one call": [9],
        "a gap": [*range(8), *range(10, n)],
    }
    for name, chosen in parts.items():
        path = Trace([trace[i] for i in chosen]).save(tmp_path / "part")
        check(hookattn.load(path), [expected[i] for i in chosen])
        few = {"later steps", "one layer", "twice", "doubled", "a gap"}
        assert any("continued" in e for e in document(path)["calls"]) == (name in few), name
    part = trace[4:].select(layer=1)
    check(hookattn.load(part.save(tmp_path / "selected")), expected[5::2])


def test_a_static_cache_that_is_cut_off_before_a_step_without_rows(tmp_path: Path) -> None:
    """Which rows were put to its end cannot be told any more, so that the next step is written whole."""
    first, new = draw(1, 2, 9, 4, seed=1), draw(1, 2, 3, 4, seed=2)
    history, expected = KeyHistory(first), [first]
    for at, count in ((5, 1), (9, 0), (6, 1), (7, 1)):
        history.extend(Link(None, 0, at, count), new[:, :, at - 5 :][:, :, :count])
        expected.append(naive(expected[-1], Link(None, 0, at, count), new[:, :, at - 5 :][:, :, :count]))
    calls = [
        Call(Site("attn"), i, i, "t", torch.float32, 1.0, fields={"k": Continued(history, i)})
        for i in range(len(expected))
    ]
    for start, linked in ((0, [0, 1, 1, 1, 1]), (1, [0, 1, 0, 1]), (2, [0, 1, 1])):
        path = Trace(calls[start:]).save(tmp_path / "f")
        assert ["continued" in e for e in document(path)["calls"]] == list(map(bool, linked))
        assert all(same_bits(c.k, x) for c, x in zip(hookattn.load(path), expected[start:], strict=True))


@kinds
def test_parts_of_a_call_and_whole_fields(tmp_path: Path, kind: str) -> None:
    trace, expected = run(kind)
    loaded = hookattn.load(trace.save(tmp_path / "f", compact=True))
    for i in (0, 7, 15):
        for call in (trace[i], loaded[i]):
            part = call.at(heads=[3], batch=1, queries=-1)
            assert same_bits(part.k, expected[i][0][1:, 1:]) and same_bits(part.v, expected[i][1][1:, 1:])
            assert torch.allclose(part.weights, trace[i].weights[1:, 3:, -1:], rtol=0, atol=1e-6)
        written = hookattn.load(Trace([loaded[i].at(heads=[3], batch=1)]).save(tmp_path / "g"))
        assert same_bits(written[0].k, expected[i][0][1:, 1:])
    save(loaded, tmp_path / "h", linked=False)  # for a reader that puts nothing together
    assert not any("continued" in e for e in document(tmp_path / "h")["calls"])
    check(hookattn.load(tmp_path / "h"), expected)


@kinds
def test_an_unfinished_file_is_read(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Decoder(kind, kind)
    held: list[Call] = []
    with hookattn.tracing(model, to=tmp_path / "f") as trace:
        for step in model.generate():
            held += [dataclasses.replace(trace[-1], fields=dict(trace[-1].fields))]
            assert not any(isinstance(x, Tensor) for call in trace for x in call.fields.values())
            check(trace, [layer.seen[i] for i in range(step + 1) for layer in model.layers], [2 * step + 1, step, 0])
            assert same_bits(trace[-1].at(batch=1).k, model.layers[1].seen[-1][0][1:])
            assert same_bits(trace[-1].at(batch=1).q, trace[-1].q[1:])
            with pytest.raises(hookattn.TraceFileError, match="unfinished file can't be pickled"):
                pickle.dumps(trace[-1])
        trace.save(tmp_path / "g")
    for call, seen in zip(held, model.layers[1].seen, strict=True):  # what was taken in the block reads on
        assert same_bits(call.k, seen[0]) and same_bits(copy.deepcopy(call).v, seen[1])
    check(hookattn.load(tmp_path / "g"), [layer.seen[i] for i in range(STEPS + 1) for layer in model.layers])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_second_prompt_begins_anew_and_a_module_that_runs_twice_is_two_sites(tmp_path: Path, streamed: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.caches = Layer("growing"), [None, None]

        def forward(self, x: Tensor, at: int = 0) -> Tensor:
            for i in (0, 1):
                self.layer.cache = self.caches[i]
                x = x + self.layer(x, at, None)
                self.caches[i] = self.layer.cache
            return x

    model = Twice()
    with hookattn.tracing(model, to=tmp_path / "f" if streamed else None) as trace:
        for seed in (1, 20):
            model.caches = [None, None]
            model(draw(B, PROMPT, WIDTH, seed=seed))
            for i in range(3):
                model(draw(B, 1, WIDTH, seed=seed + i), PROMPT + i)
    if not streamed:
        trace.save(tmp_path / "f")
    check(trace, model.layer.seen)
    check(hookattn.load(tmp_path / "f"), model.layer.seen)
    assert rows(tmp_path / "f", "k") == 2 * 2 * (PROMPT + 3)


def test_selected_layers_of_a_stream(tmp_path: Path) -> None:
    """Which layers there are is known at the end: until then the last one waits, and the others are written."""
    model = Decoder("growing", "sliding", "growing")
    with hookattn.tracing(model, to=tmp_path / "f", layers=[0, -1]) as trace:
        for _ in model.generate():
            pass
    seen = [layer.seen[i] for i in range(STEPS + 1) for layer in (model.layers[0], model.layers[2])]
    check(trace, seen)
    check(hookattn.load(tmp_path / "f"), seen)
    assert rows(tmp_path / "f", "k") == 2 * ROWS["growing"]


def test_what_a_stream_compares_with_goes_when_its_generation_ends(tmp_path: Path) -> None:
    """One run of keys a site is held, and of forwards that are no generation none, nor is anything read back."""
    made: list[weakref.ref[KeyHistory]] = []
    own, back = KeyHistory.__init__, StreamWriter.slice

    def watched(self: KeyHistory, first: Tensor) -> None:
        made.append(weakref.ref(self))
        own(self, first)

    reads: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyHistory, "__init__", watched)
        patch.setattr(StreamWriter, "slice", lambda self, name, i: (reads.append(name), back(self, name, i))[1])
        model = Decoder("growing")
        with hookattn.tracing(model, to=tmp_path / "f"):
            for _ in range(3):
                model.layers[0].cache = None
                for _ in model.generate():
                    assert sum(ref() is not None for ref in made) <= 2
            assert len(made) == 6 and len(reads) == 6  # keys and values of each first step, once
            before = len(reads)
            for seed in range(3):
                model.layers[0].cache = None
                model(draw(B, PROMPT, WIDTH, seed=seed))
            assert len(reads) == before and not any(ref() is not None for ref in made)
    assert rows(tmp_path / "f", "k") == 3 * ROWS["growing"] + 3 * PROMPT


@pytest.mark.parametrize("streamed", [False, True])
def test_how_large_the_file_of_a_generation_is(tmp_path: Path, streamed: bool) -> None:
    """12 layers of width 128: beside scores, weights and a header it grows with the tokens, not with their square."""
    model = tiny_models.gpt2(n_layer=12, n_embd=128, n_head=4, n_positions=64)
    path, tokens = tmp_path / "f", 40
    with hookattn.tracing(model, to=path if streamed else None) as trace:
        model.generate(tiny_models.ids(8, 1), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if not streamed:
        trace.save(path)
    with LazyFile(path) as file:
        sizes = {f: sum(file.tensor(n).nbytes for n in file if n.endswith(f"/{f}")) for f in ("q", "k", "v", "output")}
    assert set(sizes.values()) == {12 * (8 + tokens - 1) * 128 * 4}  # a row for each token, and no more


# What reading costs


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read from files."""
    found: list[str] = []
    own = LazyFile.slice

    def counted(self: LazyFile, name: str, index: Any) -> Tensor:
        found.append(name)
        return own(self, name, index)

    monkeypatch.setattr(LazyFile, "slice", counted)
    return found


@kinds
def test_what_is_read_of_a_file(tmp_path: Path, kind: str, reads: list[str]) -> None:
    trace, _ = run(kind, capture=("q", "k", "v"))
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    assert [repr(c) for c in loaded] == [repr(c) for c in trace] and [c.shape for c in loaded] == [
        c.shape for c in trace
    ]
    assert not reads
    _ = loaded[8].k  # of the fifth step: what it goes on from, and nothing of the steps after it
    assert len(reads) == len(set(reads)) == len(own := [f"calls/{i:04d}/layers.0/k" for i in range(0, 10, 2)]) or (
        kind == "cross" and len(reads) == 1
    )
    assert set(reads) <= set(own)
    reads.clear()
    for i in (8, 6, 4, 2):
        _ = loaded[i].k
    assert not reads
    _ = loaded[14].k
    assert len(reads) <= 3


def test_what_was_joined_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    """By the cache of what was derived: what has no room is read anew."""
    trace, expected = run("growing")
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    size = B * G * (PROMPT + STEPS) * D * 4
    for limit, again in ((2 * size, 0), (2 * size - 1, 8)):
        monkeypatch.setattr(stored_history, "DERIVED_CACHE", DerivedCache(limit))
        check(loaded, expected)
        reads.clear()
        _ = loaded[15].k
        assert len(reads) == again, limit
        loaded = hookattn.load(tmp_path / "f")
    cache = DerivedCache(3 * size)
    monkeypatch.setattr(stored_history, "DERIVED_CACHE", cache)
    check(loaded, expected)  # of two layers keys and values: three of these histories fit
    assert 2 * size < cache.size <= 3 * size


def test_what_a_reader_writes_to_stays_with_the_reader(tmp_path: Path) -> None:
    trace, expected = run("growing")
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    for i in range(len(trace)):
        loaded[i].k.zero_()
    check(loaded, expected)


def test_threads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In different orders, with a cache that has room for some of what is read."""
    trace, expected = run("beams")
    loaded = hookattn.load(trace.save(tmp_path / "f"))
    monkeypatch.setattr(stored_history, "DERIVED_CACHE", DerivedCache(3 * B * G * (PROMPT + STEPS) * D * 4))
    orders = [[(i * step + start) % 16 for i in range(16)] for step in (1, 3, 5, 15) for start in (0, 7)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda order: check(loaded, expected, order), orders))


def chain(path: Path, count: int) -> Trace:
    """A file in which one field goes on through so many calls, a row each."""
    history = KeyHistory(draw(1, 1, 1, 4, seed=1))
    for i in range(1, count):
        history.extend(Link(None, 0, i, 1), torch.full((1, 1, 1, 4), float(i)))
    site, calls = Site("attn"), []
    for i in range(count):
        calls.append(Call(site, i, i, "test", torch.float32, 1.0, fields={"k": Continued(history, i)}))
    return hookattn.load(Trace(calls).save(path))


def test_a_long_chain_is_read_in_linear_time(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        loaded = chain(tmp_path / "f", count)
        begin = time.process_time()
        loaded = hookattn.load(tmp_path / "f")
        last = loaded[-1].k
        assert last.shape == (1, 1, count, 4) and torch.equal(last[0, 0, 1:, 0], torch.arange(1.0, count))
        for i in range(0, count, 7):
            assert loaded[i].fields["k"].shape[2] == i + 1
        assert loaded[count // 2].k[0, 0, -1, 0] == count // 2
        return time.process_time() - begin

    seconds(200)
    assert seconds(5000) < 5
    copies = pickle.loads(pickle.dumps(hookattn.load(tmp_path / "f")[4999]))
    assert copies.k.shape[2] == 5000 and copy.deepcopy(copies).k.shape[2] == 5000


def naive(x: Tensor, link: Link, own: Tensor) -> Tensor:
    """What the page on the format says of a link."""
    rest = (x if link.batch is None else x[list(link.batch)])[:, :, link.dropped :]
    return torch.cat([rest[:, :, : link.at], own, rest[:, :, link.at + link.count :]], 2)


LINKS = st.builds(
    Link, st.none() | st.lists(st.integers(-1, 2), min_size=1, max_size=3).map(tuple), *[st.integers(-1, 9)] * 3
)
LIKELY = st.tuples(st.sampled_from(["grow", "beams", "window", "same", "fill", "first"]), st.integers(0, 3))


@settings(deadline=None, max_examples=300)
@given(size=st.integers(1, 6), wanted=st.lists(LINKS | LIKELY, max_size=8))
def test_what_may_be_in_a_file_is_read_right(tmp_path_factory: pytest.TempPathFactory, size: int, wanted: Any) -> None:
    """Any links that are taken, likely ones and others: every step is what the page says."""
    whole, tensors = [draw(2, 1, size, 2, seed=1)], {"0": draw(2, 1, size, 2, seed=1)}
    taken: list[Link] = []
    known, end = Chain(2, size), 0
    for x in wanted:
        s = whole[-1].shape[2]
        if isinstance(x, tuple):
            kind, n = x
            x = {
                "grow": Link(None, 0, s, n),
                "beams": Link((1, n % 2), 0, s, n),
                "window": Link(None, min(n, s), s - min(n, s), n),
                "same": Link(None, 0, s, 0),
                "fill": Link(None, 0, end, 1),
                "first": Link(None, 0, min(n, s - 1), 1),
            }[kind]
        if x.count < 0 or known.problem(x) is not None:
            continue
        own = draw(2, 1, x.count, 2, seed=10 + len(taken))
        known.add(x)
        taken.append(x)
        whole.append(naive(whole[-1], x, own))
        end = x.at + x.count
        assert known.s == whole[-1].shape[2]
        if x.count:
            tensors[str(len(taken))] = own
    path = write_file(tmp_path_factory.mktemp("links") / "f", tensors, {})
    history = StoredHistory(LazyFile(path), "0")
    for i, x in enumerate(taken):
        history.add(x.batch, x.dropped, x.at, str(i + 1) if x.count else None)
    for order in (range(len(whole)), range(len(whole))[::-1]):
        for i in order:
            assert history.shape(i) == whole[i].shape and same_bits(history.keys(i), whole[i]), (taken, i)
            assert history.link(i) == (taken[i - 1] if i else None)


# Damage


def link(i: int, field: str = "k") -> Callable[[Document], Document]:
    return lambda d: d["calls"][i]["continued"][field]


def put(i: int, field: str = "k", **values: Any) -> Callable[[Document], Any]:
    return lambda d: d["calls"][i]["continued"][field].update(values)


DAMAGE: list[tuple[str, Callable[[Document], Any], str]] = [
    ("growing", put(4, continues=4), "call 4, continued k: 'continues' is 4, expected the number of a call before it"),
    ("growing", put(4, continues=6), "'continues' is 6, expected the number of a call before"),
    ("growing", put(4, continues=-1), "'continues' is -1"),
    ("growing", put(4, continues=10**30), "'continues' is 1000"),
    ("growing", put(4, continues=None), "call 4, continued k: 'continues' is None, expected an integer from 0"),
    ("growing", put(4, continues=True), "'continues' is True, expected an integer from 0"),
    ("growing", put(6, continues=2), "call 6, continued k: another call continues that of call 2 already"),
    ("growing", put(6, continues=1), "call 6, continued k: another call continues that of call 1 already"),
    ("growing", put(4, dropped=-1), "call 4, continued k: 'dropped' is -1, expected an integer from 0"),
    ("growing", put(4, dropped=7), "'dropped' is 7, and the field it continues has 6 keys"),
    ("growing", put(4, dropped=1), "'at' is 6, and 5 keys are there"),
    ("growing", put(4, at=7), "'at' is 7, and 6 keys are there"),
    ("growing", put(4, at=-1), "'at' is -1, expected an integer from 0"),
    ("growing", put(4, at=3), "call 4, continued k: 'at' is 3, expected 6: behind the rows before"),
    ("growing", put(4, at=2**70), "'at' is"),
    ("growing", put(4, at="6"), "call 4, continued k: 'at' is '6', expected an integer from 0"),
    ("growing", put(4, batch=[0]), r"'batch' is \[0\], expected 2 numbers below 2"),
    ("growing", put(4, batch=[0, 2]), r"'batch' is \[0, 2\], expected 2 numbers below 2"),
    ("growing", put(4, batch=[0, -1]), "'batch' is"),
    ("growing", put(4, batch=[0, True]), "'batch' is .*expected a list of integers from 0 or null"),
    ("growing", put(4, tensor="gone"), "call 4, continued k names the tensor 'gone', which is not in the file"),
    ("growing", put(4, tensor=None), "call 4: field 'k' has S = 6, and 'scores' has S = 7"),
    ("growing", put(4, tensor="shared/mask/000"), "'shared/mask/000' is .*expected .2, 2, 'n', 8."),
    ("growing", put(4, tensor=7), "'tensor' is 7, expected a string or null"),
    ("growing", lambda d: d["calls"][4]["continued"].update(k=None), "call 4: 'continued' is"),
    ("growing", lambda d: d["calls"][4].update(continued=[]), "call 4: 'continued' is"),
    ("growing", lambda d: link(4)(d).pop("dropped"), "call 4, continued k has no 'dropped'"),
    ("growing", lambda d: d["calls"][4]["continued"].update(x=link(4)(d)), "call 4, continued x: expected k or v"),
    ("growing", lambda d: d["calls"][4]["fields"].update(k=None), "call 4, continued k: 'fields' has it, too"),
    ("growing", lambda d: d["calls"][0]["fields"].pop("k"), "call 0: 'derivable' has 'scores', which follows from 'k'"),
    ("growing", lambda d: d["calls"][0]["fields"].update(k=None), "call 0: field 'k' is null"),
    (
        "growing",
        lambda d: d["calls"][0]["fields"].update(k="shared/mask/000"),
        "call 0: field 'k' is bool, expected floating",
    ),
    ("static", put(4, batch=[0, 1]), "call 4, continued k: a field that is written to in its middle takes all keys"),
    ("static", put(4, dropped=1), "a field that is written to in its middle takes all keys"),
    ("static", put(4, at=8), "call 4, continued k: 'at' is 8, expected 6: behind the rows before"),
    ("static", put(4, at=16), "call 4, continued k: 'at' is 16, expected 6: behind the rows before"),
    ("static", put(2, at=15, tensor="calls/0000/layers.0/k"), "'at' is 15, where 16 rows do not go into 16 keys"),
    ("static", put(2, tensor=None), "'at' is 5, where 0 rows do not go into 16 keys"),
]


@pytest.mark.parametrize(("kind", "change", "message"), DAMAGE)
def test_what_does_not_go_on_is_refused(
    tmp_path: Path, kind: str, change: Callable[[Document], Any], message: str
) -> None:
    raw = Path(run(kind)[0].save(tmp_path / "f")).read_bytes()
    with pytest.raises(CorruptFileError, match=message) as caught:
        hookattn.load(changed(raw, tmp_path / "g", change))
    assert str(tmp_path / "g") in str(caught.value)


def test_other_dtypes_and_empty_fields_go_on_from_nothing(tmp_path: Path) -> None:
    site = Site("attn")

    def calls(*keys: Tensor) -> Trace:
        return Trace([Call(site, i, i, "test", torch.float32, 1.0, fields={"k": k}) for i, k in enumerate(keys)])

    def join(d: Document) -> None:
        name = d["calls"][1]["fields"].pop("k")
        d["calls"][1]["continued"] = {"k": {"continues": 0, "batch": None, "dropped": 0, "at": 3, "tensor": name}}

    wrong = {
        "torch.float64, and .* is torch.float32": (draw(1, 1, 3, 2, seed=1), draw(1, 1, 1, 2, seed=2).double()),
        "expected four axes, none of them empty": (torch.zeros(0, 1, 3, 2), torch.zeros(0, 1, 1, 2)),
        r"is \[1, 1, 0, 2\], expected \[1, 1, 'n', 2\]": (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 0, 2)),
    }
    for message, keys in wrong.items():
        raw = Path(calls(*keys).save(tmp_path / "f")).read_bytes()
        with pytest.raises(CorruptFileError, match=f"call 1, continued k: .*{message}"):
            hookattn.load(changed(raw, tmp_path / "g", join))
    history = KeyHistory(torch.zeros(1, 1, 0, 2))  # nor are they written so
    history.extend(Link(None, 0, 0, 1), torch.ones(1, 1, 1, 2))
    steps = [Call(site, i, i, "t", torch.float32, 1.0, fields={"k": Continued(history, i)}) for i in (0, 1)]
    loaded = hookattn.load(Trace(steps).save(tmp_path / "f"))
    assert isinstance(loaded[1].fields["k"], InFile) and torch.equal(loaded[1].k, torch.ones(1, 1, 1, 2))


@pytest.mark.parametrize("minor", [2, 3, 4])
def test_readers_of_other_versions(tmp_path: Path, minor: int) -> None:
    """One of 1.2 passes over what it does not know: to it these keys were not captured, and all else is there."""
    trace, expected = run("growing")
    raw = Path(trace.save(tmp_path / "f")).read_bytes()

    def older(d: Document) -> None:
        d["format_version"] = [1, minor]
        if minor == 2:
            for entry in d["calls"]:
                if entry.pop("continued", None):
                    entry["derivable"] = []  # which a reader of 1.2 did not look at before it was asked for

    loaded = hookattn.load(changed(raw, tmp_path / "g", older))
    if minor > 2:
        check(loaded, expected)
    else:
        check(loaded, expected, [0, 1])
        with pytest.raises(hookattn.FieldNotCaptured, match=r"'k' of layers\.1 was not captured"):
            _ = loaded[3].k
        assert same_bits(loaded[3].weights, trace[3].weights)


@kinds
def test_the_page_on_the_format(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example reads every step with safetensors and json alone."""
    page = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text(encoding="utf-8")
    *_, code = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    _, expected = run(kind, to=tmp_path / "run.safetensors")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    assert "hookattn." not in code and len(space["keys"]) == len(expected)
    assert all(same_bits(x, k) for x, (k, _) in zip(space["keys"], expected, strict=True))
    with safe_open(tmp_path / "run.safetensors", framework="pt") as file:
        found = [space["whole"](file, space["calls"], i, "v") for i in range(len(expected))]
        assert space["whole"](file, space["calls"], 0, "bias") is None
    assert all(same_bits(x, v) for x, (_, v) in zip(found, expected, strict=True))
