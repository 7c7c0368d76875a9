"""What ranks have of a model, put together, is the trace of the whole model."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hookattn
from hookattn import edit
from hookattn.calls.extents import extents_of, key_heads
from hookattn.calls.key_history import Continued, KeyHistory
from hookattn.statistics import FirstMass, TopK
from hookattn.store import LazyFile
from tests import tiny_models
from tests.merging.cuts import cut, same_tensor, same_trace

WORDS = [["a", "b", "c", "d", "e"], ["f", "g", "h", "i", "j"], ["k", "l", "m", "n", "o"]]
STATISTICS = ("entropy", "lse", "received", "top_k", FirstMass(2), TopK(3))


class Attention(nn.Module):
    """Attention on given tensors: whatever a kernel may be given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if scale is None:
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups > 1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v


def counts_of(draw: Any, n: int) -> list[int]:
    ends = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    return [b - a for a, b in pairwise([0, *ends, n])]


@st.composite
def wholes(draw: Any) -> hookattn.Trace:
    """A trace of any attention: grouped or not, with any form of mask or bias, with a learned scale, and statistics."""
    b, g, per_group, t, s = (draw(st.integers(1, n)) for n in (3, 3, 4, 4, 5))
    h = g * per_group
    torch.manual_seed(draw(st.integers(0, 100)))
    sizes = [draw(st.sampled_from([1, n])) for n in (b, h, t)] + [s]
    kind = draw(st.sampled_from(["none", "bool", "bias"]))
    mask = None if kind == "none" else torch.rand(sizes) > 0.4 if kind == "bool" else torch.randn(sizes)
    if kind == "bool":
        mask[..., 0] = True  # type: ignore[index]
    scale = torch.rand(1, h, 1, 1) if draw(st.booleans()) else None
    inputs = {"q": torch.randn(b, h, t, 6), "k": torch.randn(b, g, s, 6), "v": torch.randn(b, g, s, 7)}
    statistics = draw(st.sampled_from([(), STATISTICS]))
    capture = draw(st.sampled_from([None, ("weights", "output"), ("q", "k", "v", "mask", "bias"), ("scores", "mask")]))
    capture = (*(capture or hookattn.FIELDS), *statistics)
    return hookattn.trace(Attention(), {**inputs, "mask": mask, "scale": scale}, capture=capture)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), trace=wholes(), axes=st.sampled_from(["H", "T", "B", "HT", "HB", "TB", "HTB"]))
def test_any_cut_of_any_attention_merges_into_it(data: st.DataObject, trace: hookattn.Trace, axes: str) -> None:
    known = extents_of(trace[0], "BHT").known("BHT")
    ranks = [trace]
    for axis in axes:
        counts = counts_of(data.draw, known[axis])
        ranks = [part for rank in ranks for part in cut(rank, axis, counts, {"H": "tp", "T": "cp", "B": "dp"}[axis])]
    ranks = data.draw(st.permutations(ranks))
    if data.draw(st.booleans()):
        with tempfile.TemporaryDirectory() as folder:
            paths = [rank.save(f"{folder}/{i}.safetensors") for i, rank in enumerate(ranks)]
            whole = hookattn.merge(paths)
            same_trace(whole, trace)
            same_trace(hookattn.load(whole.save(f"{folder}/whole.safetensors")), trace)
    else:
        same_trace(hookattn.merge(ranks), trace)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), trace=wholes())
def test_a_part_of_a_merged_call_is_that_of_the_whole(data: st.DataObject, trace: hookattn.Trace) -> None:
    known = extents_of(trace[0], "BHT").known("BHT")
    axis = data.draw(st.sampled_from("BHT"))
    call = hookattn.merge(cut(trace, axis, counts_of(data.draw, known[axis])))[0]
    chosen = {}
    for name, letter in (("batch", "B"), ("heads", "H"), ("queries", "T")):
        every = range(known[letter])
        numbers = st.lists(st.sampled_from(every), min_size=1, unique=True)
        steps = st.builds(slice, st.sampled_from(every), st.none(), st.sampled_from([1, 2, 3]))
        chosen[name] = data.draw(st.one_of(st.none(), numbers, steps))
    found, expected = call.at(**chosen), trace[0].at(**chosen)
    for name in trace[0].fields:
        if (other := expected.get(name)) is not None:
            one = found.get(name)
            assert one is not None
            same_tensor(one, other)


def traced(model: Any = None, **options: Any) -> hookattn.Trace:
    with torch.no_grad():
        return hookattn.trace(
            model or tiny_models.llama(), {"input_ids": tiny_models.ids(5, 3)}, tokens=WORDS, **options
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("axis", "counts"), [("H", [2, 2]), ("H", [1, 1, 1, 1]), ("H", [3, 1]), ("T", [2, 3]), ("B", [1, 2])]
)
def test_a_model(implementation: str, axis: str, counts: list[int], tmp_path: Path) -> None:
    trace = traced(tiny_models.llama(implementation))
    ranks = cut(trace, axis, counts)
    same_trace(hookattn.merge(ranks[::-1]), trace)
    paths = [rank.save(tmp_path / f"{i}.safetensors", compact=i % 2 == 0) for i, rank in enumerate(ranks)]
    same_trace(hookattn.merge(paths), trace)


def test_key_heads_that_several_ranks_have_are_there_once() -> None:
    trace = traced()
    whole = hookattn.merge(cut(trace, "H", [1, 1, 1, 1]))
    assert whole[0].k.shape[1] == 2 and whole[0].kv_heads is None
    assert torch.equal(whole[0].k, trace[0].k)


def test_sinks_and_per_head_bias() -> None:
    model = tiny_models.t5("eager")
    with torch.no_grad():
        trace = hookattn.trace(model, {"input_ids": tiny_models.ids(5), "decoder_input_ids": tiny_models.ids(3)})
    assert trace[0].bias is not None and trace[0].bias.shape[1] == 4
    same_trace(hookattn.merge(cut(trace, "H", [1, 2, 1])), trace)
    same_trace(hookattn.merge(cut(trace.select(stack="encoder"), "T", [1, 4])), trace.select(stack="encoder"))


@pytest.mark.parametrize("form", ["by head", "column"])
@pytest.mark.parametrize(("axis", "counts"), [("H", [1, 3]), ("T", [2, 3]), ("B", [1, 2])])
def test_sinks(form: str, axis: str, counts: list[int], tmp_path: Path) -> None:
    trace = traced()
    for call in trace:
        sinks = torch.arange(4.0)
        call.fields["sinks"] = sinks if form == "by head" else sinks.view(1, 4, 1, 1).repeat(1, 1, 5, 1)
    same_trace(hookattn.merge(cut(trace, axis, counts)), trace)
    paths = [rank.save(tmp_path / f"{i}.safetensors") for i, rank in enumerate(cut(trace, axis, counts))]
    same_trace(hookattn.merge(paths), trace)


# Selections


@pytest.mark.parametrize(("heads", "there"), [([3], [1]), ([0, 3], [0, 1]), ([1, 0, -1], [0, 1]), ([-4], [0])])
@pytest.mark.parametrize("empty", [False, True])
def test_heads_that_were_selected_are_enough(heads: list[int], there: list[int], empty: bool, tmp_path: Path) -> None:
    """A rank that has none of them has no call, or an empty one."""
    trace = traced(heads=heads)
    whole = traced()
    ranks = cut(whole, "H", [2, 2])
    wanted = sorted(h % 4 for h in heads)
    for rank in ranks:
        rank.selection = trace.selection
        for i, call in enumerate(rank.calls):
            own = [h for h in call.heads or () if h in wanted]
            made = call.at(heads=own or 0 if own else list(call.heads or ())[:1])
            made.heads = tuple(own)
            rank.calls[i] = made
        if not empty:
            rank.calls = [c for c in rank.calls if c.heads]
    found = hookattn.merge(ranks)
    assert found[0].heads == tuple(wanted)
    for one, other in zip(found, whole, strict=True):
        for name in ("q", "k", "v", "weights", "output"):
            same_tensor(one.get(name), other.at(heads=wanted).get(name))  # type: ignore[arg-type]
        assert [one.k[:, i] is not None for i in key_heads(one, len(wanted), one.k.shape[1])]
    if not empty:
        paths = [r.save(tmp_path / f"run.rank0{i}-of-02.safetensors") for i, r in enumerate(ranks) if r.calls]
        assert hookattn.merge(paths)[0].heads == tuple(wanted)
    if len(there) > 1:
        with pytest.raises(hookattn.MergeError, match="rank 1 of 2 on tp is missing"):
            hookattn.merge(ranks[0])


def test_queries_that_were_selected_are_enough() -> None:
    whole = traced()
    for queries, wanted in ((slice(1, 4), [1, 2, 3]), ([0, -1], [0, 4]), ([1], [1])):
        ranks = cut(whole, "T", [2, 3], "cp")
        for rank in ranks:
            rank.selection = traced(queries=queries).selection
            rank.calls = [c for c in rank.calls if set(c.queries or ()) & set(wanted)]
            for i, call in enumerate(rank.calls):
                own = [q for q in call.queries or () if q in wanted]
                rank.calls[i] = call.at(queries=own)
        found = hookattn.merge([r for r in ranks if r.calls])
        assert found[0].queries == tuple(wanted) and found[0].of_queries == 5
        same_tensor(found[0].weights, whole[0].weights[:, :, wanted])


# Edits and gradients


EDITS = [
    edit.zero(field="weights", heads=[3], layer=0),
    edit.zero(field="weights", heads=[1, 2]),
    edit.zero(field="output"),
    edit.scale(field="scores", gates=0.5, heads=[0], layer=1),
    edit.add(field="scores", values=0.5, heads=[0]),
    edit.scale(field="k", gates=0.5, heads=[1]),
    edit.scale(field="v", gates=0.5),
    edit.scale(field="q", gates=0.5, queries=[1, 3]),
    edit.knockout(queries=[4], keys=[1], heads=[0, 1]),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
@pytest.mark.parametrize(("axis", "counts"), [("H", [2, 2]), ("H", [1, 3]), ("T", [2, 3])])
def test_edits(number: int, axis: str, counts: list[int], tmp_path: Path) -> None:
    model = tiny_models.llama()
    with torch.no_grad(), hookattn.editing(model, EDITS[number], tokens=WORDS) as trace:
        model(tiny_models.ids(5, 3))
    assert any(call.edits for call in trace)
    ranks = cut(trace, axis, counts)
    for rank in ranks:
        for call in rank:
            if axis == "H" and not call.edits:  # nothing was done to the heads of this rank
                call.own_scores = call.own_by_edits = False
    same_trace(hookattn.merge(ranks), trace)
    paths = [rank.save(tmp_path / f"{i}.safetensors") for i, rank in enumerate(ranks)]
    same_trace(hookattn.merge(paths), trace)


def test_edits_of_the_key_heads_of_some_ranks() -> None:
    """Numbers of key heads are the model's, of which the ranks have kept some, or none."""
    model = tiny_models.llama()
    with torch.no_grad(), hookattn.editing(model, edit.scale(field="v", gates=0.5)) as trace:
        model(tiny_models.ids(5, 3))
    for capture in (("v", "weights"), ("weights",)):
        ranks = cut(trace, "H", [2, 2])
        for rank, head in zip(ranks, (0, 3), strict=True):
            rank.selection = {"heads": [0, 3]}
            rank.calls = [call.at(heads=head) for call in rank]
            for call in rank:
                call.fields = {name: call.get(name) for name in capture}
                call.derivable = ()
        assert all(call.edits == trace[0].edits for call in hookattn.merge(ranks))
        ranks[1][0].edits = ()
        assert [e.heads for e in hookattn.merge(ranks)[0].edits] == [(0,)]
    ranks = cut(trace, "H", [2, 2])
    ranks[1][0].edits = ()
    assert [e.heads for e in hookattn.merge(ranks)[0].edits] == [(0,)]


@pytest.mark.parametrize(("axis", "counts"), [("H", [2, 2]), ("T", [2, 3]), ("B", [1, 2])])
def test_gradients_of_the_output(axis: str, counts: list[int], tmp_path: Path) -> None:
    model = tiny_models.llama()
    trace = hookattn.trace(model, {"input_ids": tiny_models.ids(5, 3)}, gradients=True)
    ranks = cut(trace, axis, counts)
    before = hookattn.merge(ranks)
    with pytest.raises(hookattn.GradientError, match="no backward"):
        before[0].grad("output")
    trace.output.logits.square().mean().backward()
    saved = hookattn.merge([rank.save(tmp_path / f"{i}.safetensors") for i, rank in enumerate(ranks)])
    for whole in (before, hookattn.merge(ranks), saved, hookattn.load(saved.save(tmp_path / "whole.safetensors"))):
        for one, other in zip(whole, trace, strict=True):
            for name in ("output", "weights", "scores", "q", "k", "v"):
                same_tensor(one.grad(name), other.grad(name))


# Steps


def generated(tmp_path: Path | None = None) -> hookattn.Trace:
    model = tiny_models.llama()
    with torch.no_grad(), hookattn.tracing(model) as trace:
        model.generate(tiny_models.ids(4), max_new_tokens=5, do_sample=False)
    return trace


@pytest.mark.parametrize("counts", [[2, 2], [1, 1, 1, 1]])
def test_a_generation(counts: list[int], tmp_path: Path) -> None:
    trace = generated()
    ranks = []
    for index, start in enumerate(range(0, 4, counts[0])):  # keys stay steps of a history, as each rank writes them
        with torch.no_grad():
            own = generated()
        for call in own:
            part = cut(hookattn.Trace(calls=[call]), "H", counts)[index][0]
            for name, place in list(part.fields.items()):
                call.fields[name] = place
            call.heads, call.shards = part.heads, part.shards
        del start
        for name in ("k", "v"):
            for path in {c.site.path for c in own}:
                calls = [c for c in own if c.site.path == path]
                history = KeyHistory(calls[0].get(name))  # type: ignore[arg-type]
                for step, call in enumerate(calls):
                    assert step == 0 or history.goes_on(call.get(name))  # type: ignore[arg-type]
                for step, call in enumerate(calls):
                    call.fields[name] = Continued(history, step)
        ranks.append(own)
    same_trace(hookattn.merge(ranks), trace)
    whole = hookattn.merge([r.save(tmp_path / f"{i}.safetensors") for i, r in enumerate(ranks)])
    same_trace(whole, trace)
    assert isinstance(whole[-1].fields["k"], Continued)
    saved = hookattn.load(whole.save(tmp_path / "whole.safetensors"))
    same_trace(saved, trace)
    names = [n for n in LazyFile(tmp_path / "whole.safetensors") if n.endswith("/k")]
    rows = sum(LazyFile(tmp_path / "whole.safetensors").shape(n)[2] for n in names)
    assert rows == 2 * 8  # of each site the keys of all positions, once
    same_tensor(saved.stitch()[0].weights, trace.stitch()[0].weights)


def test_microbatches_are_batch_entries() -> None:
    trace = traced()
    parts = cut(trace, "B", [1, 2])
    steps = hookattn.Trace(model=trace.model, selection=trace.selection, tokens=trace.tokens)
    for step, part in enumerate(parts):
        steps.calls += [replace(c, step=step, shards=()) for c in part.calls]
    whole = hookattn.merge(steps, steps="batches")
    same_trace(whole, trace)
    ranks = cut(replace(steps, tokens=None), "H", [2, 2])
    same_trace(replace(hookattn.merge(ranks, steps="batches"), tokens=trace.tokens), trace)


# Stages


def test_stages_are_put_in_order() -> None:
    config = {"n_layer": 5}
    trace = traced(tiny_models.gpt2(**config))
    stages = [replace(trace, calls=[trace[i] for i in own]) for own in ([0, 1, 4], [2, 3])]
    for order in (stages, stages[::-1]):
        whole = hookattn.merge(order)
        assert [c.site.layer for c in whole] == [0, 1, 2, 3, 4] == [c.index for c in whole]
        same_trace(whole, replace(trace, calls=[replace(c, index=i) for i, c in enumerate(trace)]))
    ranks = [rank for stage in stages for rank in cut(stage, "H", [2, 2])]
    assert [c.site.layer for c in hookattn.merge(ranks[::-1])] == [0, 1, 2, 3, 4]


def test_an_encoder_runs_before_its_decoder() -> None:
    model = tiny_models.t5()
    with torch.no_grad():
        trace = hookattn.trace(model, {"input_ids": tiny_models.ids(5), "decoder_input_ids": tiny_models.ids(3)})
    stages = [trace.select(stack="decoder"), trace.select(stack="encoder")]
    assert [c.site.path for c in hookattn.merge(stages)] == [c.site.path for c in trace]


def test_what_was_skipped_is_told_once() -> None:
    trace = traced()
    ranks = cut(trace, "H", [2, 2])
    ranks[0].skipped = [hookattn.Skipped("a", "why", (0,)), hookattn.Skipped("b", "why", (0,))]
    ranks[1].skipped = [hookattn.Skipped("a", "why", (0, 1))]
    ranks[0].notes, ranks[1].notes = ["one", "both"], ["both", "two"]
    whole = hookattn.merge(ranks)
    assert whole.skipped == [hookattn.Skipped("a", "why", (0, 1)), hookattn.Skipped("b", "why", (0,))]
    assert whole.notes[:3] == ["both", "trace 0: one", "trace 1: two"]


def test_the_certificate_is_the_worst() -> None:
    ranks = cut(traced(), "H", [2, 2])
    good = ranks[0][0].certificate
    ranks[1][0].certificate = replace(good, status="unfaithful", output_error=1.0, basis="weights")
    found = hookattn.merge(ranks)[0].certificate
    assert (found.status, found.output_error, found.basis) == ("unfaithful", 1.0, f"{good.basis} and weights")
    assert (found.rows, found.of_rows) == (good.rows, good.of_rows)
    parts = cut(traced(), "T", [2, 3])
    parts[0][0].certificate = replace(parts[0][0].certificate, rows=1)
    found = hookattn.merge(parts)[0].certificate
    assert (found.rows, found.of_rows) == (4, 5)


def test_requests_are_those_of_the_entries() -> None:
    trace = traced()
    for call in trace:
        call.requests = ("x", "y", "z")
    assert hookattn.merge(cut(trace, "B", [2, 1]))[0].requests == ("x", "y", "z")
    assert hookattn.merge(cut(trace, "H", [2, 2]))[0].requests == ("x", "y", "z")


def test_a_call_that_every_rank_has_whole_is_one() -> None:
    trace = traced()
    ranks = cut(trace, "H", [2, 2])
    for rank in ranks:
        rank.calls[1] = trace[1]
    same_trace(hookattn.merge(ranks), trace)
