"""One trace for each request of batches that come and go, and its picture beside one forward over its sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hookattn
from hookattn import FieldNotCaptured, InputError, SelectionError, StitchError
from hookattn.serving import requests_of_batch
from tests.serving_requests.batches import PAGE, Request, Server, difference, flash, request, traced
from tests.standins import Give, give

__all__ = ["give"]

EXACT = {"q": 2e-6, "k": 2e-6, "v": 2e-6, "mask": 0.0, "scores": 2e-6, "weights": 1e-6, "output": 2e-6}


@pytest.fixture
def server(give: Give) -> Iterator[Server]:
    flash(give)
    yield Server()


def run(server: Server, requests: list[Request], seed: int, chunk: int = 5, preempts: bool = False) -> set[str]:
    """Steps with some requests each, in any order, of a few tokens each, until all are computed; who was preempted."""
    draw, preempted = random.Random(seed), set()
    while open_ := [r for r in requests if r.computed < len(r.ids)]:
        chosen = draw.sample(open_, draw.randint(1, len(open_)))
        server.step([(r, draw.randint(1, min(chunk, len(r.ids) - r.computed))) for r in chosen])
        one, keep = draw.choice(requests), draw.choice((0, 0, 1))
        if preempts and draw.random() < 0.3 and one.computed > keep * PAGE:
            server.preempt(one, keep)
            preempted.add(one.name)
    return preempted


@pytest.mark.parametrize("seed", range(6))
def test_each_picture_is_that_of_one_forward(server: Server, seed: int) -> None:
    requests = [request(name, n, seed) for name, n in (("a", 9), ("b", 3), ("c/d", 14))]
    with traced(server) as trace:
        run(server, requests, seed)
    found = trace.split("request")
    assert sorted(found) == ["a", "b", "c/d"]
    assert all(call.certificate.faithful for one in found.values() for call in one)
    for one in requests:
        whole = found[one.name].stitch()
        difference(whole, server.alone(one), EXACT)
        assert {c.requests for c in whole} == {(one.name,)} and {c.lengths for c in whole} == {((len(one.ids),) * 2,)}


@pytest.mark.parametrize("seed", range(6))
def test_what_is_computed_again_is_taken_of_the_later_run(server: Server, seed: int) -> None:
    requests = [request(name, n, seed) for name, n in (("a", 9), ("b", 7), ("c", 14))]
    with traced(server) as trace:
        preempted = run(server, requests, seed, chunk=3, preempts=True)
    again = set()
    for name, one in trace.split().items():
        whole = one.stitch()
        kept = next(r for r in requests if r.name == name)
        difference(whole, server.alone(kept), EXACT)
        if any("computed again" in note for note in whole[0].notes):
            again.add(name)
    assert again == preempted and preempted


def test_a_step_of_a_request_has_its_own_rows_alone(server: Server) -> None:
    a, b = request("a", 6), request("b", 11)
    with traced(server) as trace:
        server.step([(a, 2), (b, 7)])
        server.step([(b, 4)])
        server.step([(b, 0), (a, 4)])
    found = trace.split()
    assert [(c.step, tuple(c.weights.shape)) for c in found["a"]] == [(0, (1, 4, 2, 2))] * 2 + [(2, (1, 4, 4, 6))] * 2
    assert [(c.step, tuple(c.weights.shape)) for c in found["b"]] == [(0, (1, 4, 7, 7))] * 2 + [(1, (1, 4, 4, 11))] * 2
    assert [c.index for c in found["a"]] == [0, 1, 2, 3]
    assert found["a"].output is None and found["a"].path is None
    assert not any("filled up" in note for call in found["a"] for note in call.notes)


def test_a_prefix_that_another_has_computed_has_keys_and_no_rows(server: Server) -> None:
    a, b = request("a", 12), request("b", 15)
    b.ids[:8] = a.ids[:8]
    with traced(server) as trace:
        server.step([(a, 12)])
        b.pages, b.computed = a.pages[:2], 8
        server.step([(b, 3)])
        server.step([(b, 4), (a, 0)])
    whole = trace.split()["b"].stitch()
    assert whole[0].queries == tuple(range(8, 15)) and whole[0].of_queries == 15
    assert tuple(whole[0].weights.shape) == (1, 4, 7, 15)
    difference(whole, server.alone(b), EXACT)
    part = whole[0].at(queries=[9, 14], heads=1)
    assert torch.allclose(part.weights, whole[0].weights[:, 1:2, [1, 6]], atol=1e-6) and part.queries == (9, 14)
    assert torch.equal(part.output, whole[0].output[:, 1:2, [1, 6]])


def test_what_a_request_lost_is_said(server: Server) -> None:
    a = request("a", 12)
    with traced(server) as trace:
        server.step([(a, 12)])
        server.preempt(a)
        server.step([(a, 5)])
    whole = trace.split()["a"].stitch()
    assert tuple(whole[0].weights.shape) == (1, 4, 5, 5)
    assert any("computed again from step 1 on" in n and "but those from 5 on" in n for n in whole[0].notes)


def test_two_requests_of_one_name_are_no_picture(server: Server) -> None:
    a, other = request("a", 6), request("a", 9, seed=5)
    with traced(server) as trace:
        server.step([(a, 6)])
        server.step([(other, 4)])
    with pytest.raises(StitchError, match="continues no row"):
        trace.split()["a"].stitch()


def test_a_step_that_is_missing_is_said(server: Server) -> None:
    a = request("a", 12)
    with traced(server) as trace:
        server.step([(a, 3)])
    server.step([(a, 3)])
    with traced(server) as later:
        server.step([(a, 3)])
    later_calls = later.split()["a"].calls
    for call in later_calls:
        call.step = 1
    both = trace.split()["a"]
    both.calls += later_calls
    with pytest.raises(StitchError, match="a step is missing"):
        both.stitch()


def test_the_whole_trace_says_to_split_it(server: Server) -> None:
    a, b = request("a", 6), request("b", 6)
    with traced(server) as trace:
        server.step([(a, 2), (b, 2)])
        server.step([(b, 4)])
    with pytest.raises(StitchError, match=r'split\("request"\)'):
        trace.stitch()


def test_statistics_are_of_its_own_rows_and_keys(server: Server) -> None:
    a, b = request("a", 5), request("b", 9)
    capture = ("entropy", "received", hookattn.statistics.TopK(3))
    with traced(server, capture=capture) as trace:
        server.step([(a, 5), (b, 9)])
    for one in (a, b):
        for mine, alone in zip(trace.split()[one.name], server.alone(one, capture=capture), strict=True):
            assert mine.keys == len(one.ids)
            for name in ("entropy", "received", "top_k(3)", "top_k_keys(3)"):
                x, y = mine.get(name), alone.get(name)
                assert x is not None and y is not None and torch.allclose(x.float(), y.float(), atol=1e-5)


def test_parts_of_it_come_back_from_a_file(server: Server, tmp_path: Path) -> None:
    a, b = request("a", 5), request("b", 9)
    with traced(server, to=tmp_path / "all.safetensors") as trace:
        server.step([(a, 4), (b, 9)])
        server.step([(a, 1)])
    loaded = hookattn.load(tmp_path / "all.safetensors")
    for source in (trace, loaded):
        found = source.split()["a"]
        assert found[0].lengths == ((4, 4),)
        difference(found.stitch(), server.alone(a), EXACT)
        found.save(tmp_path / "a.safetensors")
        difference(hookattn.load(tmp_path / "a.safetensors").stitch(), server.alone(a), EXACT)


def test_selected_heads_and_queries_are_kept(server: Server) -> None:
    a, b = request("a", 5), request("b", 9)
    with traced(server, heads=[1, 3], queries=[0, 4, 8]) as trace:
        server.step([(a, 5), (b, 9)])
    found = trace.split()
    assert found["a"][0].queries == (0, 4) and found["a"][0].of_queries == 5 and found["a"][0].heads == (1, 3)
    assert found["b"][0].queries == (0, 4, 8)
    whole = server.alone(a)
    assert torch.allclose(found["a"][1].weights, whole[1].weights[:, [1, 3]][:, :, [0, 4]], atol=1e-6)


class Padded(nn.Module):
    """Attention of a batch that is filled up, at its left or its right, with a mask that says so."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


PADDED = Padded()


def padded(lengths: list[int], right: bool) -> tuple[Tensor, Tensor]:
    n = max(lengths)
    real = torch.stack([torch.arange(n) < m if right else torch.arange(n) >= n - m for m in lengths])
    return torch.randn(len(lengths), 2, n, 4), real[:, None, None] & torch.ones(n, n, dtype=torch.bool).tril()


def test_padding_at_the_right_is_left_out_and_tokens_are_its_own() -> None:
    x, mask = padded([3, 5], right=True)
    tokens = [["a", "b", "c", "<pad>", "<pad>"], ["v", "w", "x", "y", "z"]]
    with hookattn.tracing(PADDED, tokens=tokens) as trace, requests_of_batch(["one", "two"]):
        PADDED(x, mask)
    found = trace.split()
    assert found["one"][0].lengths == ((3, 3),) and found["one"].tokens == [["a", "b", "c"]]
    assert found["two"].tokens == [["v", "w", "x", "y", "z"]]
    assert torch.equal(found["one"][0].weights, trace[0].weights[:1, :, :3, :3])


def test_padding_at_the_left_stays() -> None:
    x, mask = padded([3, 5], right=False)
    with hookattn.tracing(PADDED) as trace, requests_of_batch(["one", "two"]):
        PADDED(x, mask)
    assert trace.split()["one"][0].lengths == ((5, 5),)


def test_requests_may_be_said_afterwards() -> None:
    x, mask = padded([3, 5], right=True)
    trace = hookattn.trace(PADDED, (x, mask))
    trace[0].requests = ("one", "two")
    assert tuple(trace.split()["one"][0].weights.shape) == (1, 2, 3, 3)
    blind = hookattn.trace(PADDED, (x, mask), capture=("q", "k"))
    blind[0].requests = ("one", "two")
    with pytest.raises(FieldNotCaptured, match="'mask'"):
        blind.split()


def test_several_entries_of_one_request_stay_together() -> None:
    x, mask = padded([3, 5, 2], right=True)
    with hookattn.tracing(PADDED) as trace, requests_of_batch(["one", "two", "one"]):
        PADDED(x, mask)
    one = trace.split()["one"][0]
    assert one.lengths == ((3, 3), (2, 2)) and one.requests == ("one", "one")
    assert torch.equal(one.weights, trace[0].weights[[0, 2], :, :3, :3])


def test_an_entry_that_changes_its_place_has_no_tokens() -> None:
    x, mask = padded([3, 3], right=True)
    with hookattn.tracing(PADDED, tokens=[["a", "b", "c"], ["x", "y", "z"]]) as trace:
        for names in (["one", "two"], ["two", "one"]):
            with requests_of_batch(names):
                PADDED(x, mask)
    one = trace.split()["one"]
    assert one.tokens is None and any("in several" in note for note in one.notes)


def test_the_names_may_be_asked_for_as_it_runs() -> None:
    x, mask = padded([3, 5], right=True)
    names: list[str] = []
    with hookattn.tracing(PADDED) as trace, requests_of_batch(lambda: names):
        names += ["one", "two"]
        PADDED(x, mask)
    assert trace[0].requests == ("one", "two")


def test_a_batch_of_another_size_says_no_request() -> None:
    x, mask = padded([3, 5], right=True)
    with hookattn.tracing(PADDED) as trace, requests_of_batch(["one", "two", "three"]):
        PADDED(x, mask)
    assert trace[0].requests is None
    with pytest.raises(SelectionError, match=r"1 of 1 calls do not say whose requests.*requests_of_batch"):
        trace.split()


@pytest.mark.parametrize("ids", ["one", 3, [1, 2], None])
def test_names_are_texts(ids: object) -> None:
    with pytest.raises(InputError, match="requests_of_batch: ids"), requests_of_batch(ids):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="requests_of_batch: only"), requests_of_batch([], only=ids or 1):  # type: ignore[arg-type]
        pass


def test_the_batch_around_it_comes_back() -> None:
    x, mask = padded([3], right=True)
    with hookattn.tracing(PADDED) as trace, requests_of_batch(["outer"]):
        with pytest.raises(RuntimeError), requests_of_batch(["inner"]):
            raise RuntimeError
        PADDED(x, mask)
    assert trace[0].requests == ("outer",)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(SelectionError, match="no calls"):
        hookattn.Trace().split()
    x, mask = padded([3], right=True)
    trace = hookattn.trace(PADDED, (x, mask))
    with pytest.raises(SelectionError, match="by='head': expected one of request"):
        trace.split("head")
    trace[0].requests, trace[0].lengths = ("a",), ((1, 1), (2, 2))
    with pytest.raises(SelectionError, match="1 requests and has lengths of 2"):
        trace.split()
