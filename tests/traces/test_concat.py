"""``hookattn.concat``: traces of one model over several inputs, as one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import edit
from hookattn.calls.call import Skipped
from hookattn.calls.shard import Shard
from hookattn.errors import InputError, MergeError, SelectionError
from hookattn.serving import requests_of_batch
from tests import tiny_models
from tests.traces.test_to import model

WORDS = [["a", "b", "c", "d", "e"], ["f", "g", "h", "i", "j"], ["k", "l", "m", "n", "o"]]
FIELDS = ("q", "k", "v", "scores", "mask", "weights", "output")


def x(b: int, t: int, seed: int) -> Tensor:
    return torch.randn(b, t, 8, generator=torch.Generator().manual_seed(seed))


def explicit(call: hookattn.Call) -> Tensor:
    """The weights in float64, of q, k and the mask."""
    scores = torch.einsum("bhtd,bhsd->bhts", call.q.double(), call.k.double()) * call.scale
    return scores.masked_fill(~call.mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("stored", ["in memory", "in files", "compact"])
def test_batches_are_what_one_batch_would_be(stored: str, tmp_path: Path) -> None:
    several = [
        hookattn.trace(model(), x(2, 5, 1), tokens=WORDS[:2]),
        hookattn.trace(model(), x(1, 5, 2), tokens=WORDS[2:]),
    ]
    whole = hookattn.trace(model(), torch.cat([x(2, 5, 1), x(1, 5, 2)]), tokens=WORDS)
    given: list[Any] = several
    if stored != "in memory":
        given = [t.save(tmp_path / f"{i}.safetensors", compact=stored == "compact") for i, t in enumerate(several)]
    made = hookattn.concat(given, dim="batch")
    assert type(made) is hookattn.Trace and len(made) == len(whole) == 2 and made.tokens == WORDS
    for i, (one, other) in enumerate(zip(made, whole, strict=True)):
        assert (one.index, one.step, one.site) == (i, 0, other.site)
        for name in FIELDS:
            torch.testing.assert_close(one.get(name), other.get(name), atol=1e-6, rtol=0)
        torch.testing.assert_close(one.weights.double(), explicit(one), atol=1e-6, rtol=0)
        assert torch.equal(one.at(batch=2).weights, several[1][i].weights), "an entry is to the bit what it was"
        assert one.certificate.faithful
        assert one.certificate.output_error == max(t[i].certificate.output_error for t in several)
    again = hookattn.load(made.save(tmp_path / "whole.safetensors"))
    assert torch.equal(again[1].weights, made[1].weights) and again.tokens == WORDS
    assert [len(t) for t in several] == [2, 2] and several[0][0].q.shape[0] == 2, "they are left as they are"


def test_steps_are_appended_and_numbered_anew(tmp_path: Path) -> None:
    several = [hookattn.trace(model(), x(1, t, t)) for t in (5, 3)]
    net = model()
    with hookattn.tracing(net) as third:
        net(x(1, 4, 7))
        net(x(2, 2, 8))
    made = hookattn.concat([*several, third[2:]], dim="step")
    assert [c.step for c in made] == [0, 0, 1, 1, 2, 2] and [c.index for c in made] == list(range(6))
    assert [c.step for c in third] == [0, 0, 1, 1] and third[2].index == 2, "they are left as they are"
    assert torch.equal(made[4].weights, third[2].weights) and made[2].weights.shape == (1, 2, 3, 3)
    assert made.select(step=1)[0].q.shape[2] == 3
    again = hookattn.load(made.save(tmp_path / "t.safetensors"))
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(again, made, strict=True))


def test_what_is_said_of_steps() -> None:
    first, second = (hookattn.trace(model(), x(1, 5, i), tokens=WORDS[0]) for i in (1, 2))
    first.skipped = [Skipped("a", "why", (0,))]
    second.skipped = [Skipped("a", "why", (0,)), Skipped("b", "else", (1,))]
    first.notes, second.notes = ["both", "mine"], ["both"]
    made = hookattn.concat([first, second], dim="step")
    assert made.tokens == [WORDS[0]]
    assert made.skipped == [Skipped("a", "why", (0, 1)), Skipped("b", "else", (2,))]
    assert made.notes[:2] == ["both", "trace 0: mine"] and "step after step" in made.notes[2]
    second.tokens = [WORDS[1]]
    made = hookattn.concat([first, second], dim="step")
    assert made.tokens is None and any("trace 0 and trace 1 have different tokens" in n for n in made.notes)
    second.tokens = None
    assert hookattn.concat([first, second], dim="step").tokens is None
    first.tokens = None
    first.stack_tokens = second.stack_tokens = {"main": [WORDS[0]]}
    assert hookattn.concat([first, second], dim="step").stack_tokens == {"main": [WORDS[0]]}


def test_tokens_of_batches() -> None:
    first, second = hookattn.trace(model(), x(2, 5, 1), tokens=WORDS[0]), hookattn.trace(model(), x(1, 5, 2))
    with pytest.raises(MergeError, match="trace 0 has tokens and trace 1 has none"):
        hookattn.concat([first, second], dim="batch")
    second.tokens = [WORDS[2]]
    assert hookattn.concat([first, second], dim="batch").tokens == [WORDS[0], WORDS[0], WORDS[2]]
    first.stack_tokens = {"main": [WORDS[1]]}
    with pytest.raises(
        MergeError, match=r"trace 0 has tokens of the main and trace 1 has none.*stack_tokens\['main'\]"
    ):
        hookattn.concat([first, second], dim="batch")
    second.stack_tokens = {"main": [WORDS[2]]}
    assert hookattn.concat([first, second], dim="batch").stack_tokens == {"main": [WORDS[1], WORDS[1], WORDS[2]]}


def test_segments_follow_the_tokens() -> None:
    several = [hookattn.trace(model(), x(b, 5, b), tokens=WORDS[0]) for b in (2, 1)]
    several[0].segments, several[1].segments = [[0, 0, 1, 1, -1]], [[0, 1, 1, 1, 1]]
    assert hookattn.concat(several, dim="batch").segments == [[0, 0, 1, 1, -1]] * 2 + [[0, 1, 1, 1, 1]]
    made = hookattn.concat(several, dim="step")
    assert made.segments is None and made.tokens == [WORDS[0]] and any("segments" in note for note in made.notes)
    several[1].segments = None
    with pytest.raises(MergeError, match=r"trace 0 has segments and trace 1 has none.*trace\.segments"):
        hookattn.concat(several, dim="batch")


def test_requests_and_lengths_are_of_all_entries() -> None:
    gpt2, ids = tiny_models.gpt2(), tiny_models.ids()
    several = []
    for names in (["a", "b"], ["c", "d"]):
        with hookattn.tracing(gpt2) as trace, requests_of_batch(names), torch.no_grad():
            gpt2(ids)
        several.append(trace)
    assert several[0][0].lengths is not None
    made = hookattn.concat(several, dim="batch")
    assert made[0].requests == ("a", "b", "c", "d") and made[0].lengths == (several[0][0].lengths or ()) * 2
    split = made.split()
    assert list(split) == ["a", "b", "c", "d"] and torch.equal(split["d"][0].weights, several[1][0].weights[1:])


def test_edits_keep_to_their_entries() -> None:
    clean, other = hookattn.trace(model(), x(1, 5, 1)), x(2, 5, 2)
    edited = hookattn.edited(model(), other, edit.zero("weights", heads=[1]))
    made = hookattn.concat([clean, edited], dim="batch")
    (applied,) = made[0].edits
    assert applied.batch == (1, 2) and applied.heads == (1,)
    assert not made[0].weights[1:, 1].any() and made[0].weights[0, 1].any()


def test_a_generation_goes_on_in_batches() -> None:
    gpt2, ids = tiny_models.gpt2(), tiny_models.ids()
    several = []
    for row in ids[:2]:
        with hookattn.tracing(gpt2) as trace, torch.no_grad():
            gpt2.generate(row[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
        several.append(trace)
    made = hookattn.concat(several, dim="batch")
    assert [c.step for c in made] == [c.step for c in several[0]]
    for one, a, b in zip(made, *several, strict=True):
        assert torch.equal(one.k, torch.cat([a.k, b.k])) and torch.equal(one.weights, torch.cat([a.weights, b.weights]))
    steps = hookattn.concat(several, dim="step")
    assert [c.step for c in steps] == [*(c.step for c in made), *(c.step + made[-1].step + 1 for c in made)]


def test_statistics_and_gradients() -> None:
    several = [hookattn.trace(model(), x(b, 5, b), capture=("entropy", "received")) for b in (1, 2)]
    made = hookattn.concat(several, dim="batch")
    for name in ("entropy", "received"):
        assert torch.equal(made[0].get(name), torch.cat([t[0].get(name) for t in several]))  # type: ignore[misc, arg-type]
    with torch.enable_grad():
        graded = [hookattn.trace(model(), x(1, 5, i), gradients=True) for i in (1, 2)]
        for trace in graded:
            trace.output.sum().backward()
    for dim, grad in (
        ("batch", torch.cat([t[0].grad("weights") for t in graded])),
        ("step", graded[0][0].grad("weights")),
    ):
        torch.testing.assert_close(hookattn.concat(graded, dim=dim)[0].grad("weights"), grad)


def test_what_does_not_fit_says_which_and_how() -> None:
    first, longer = hookattn.trace(model(), x(1, 5, 1)), hookattn.trace(model(), x(1, 6, 1))
    with pytest.raises(MergeError, match=r"5 queries in trace 0 and 6 in trace 1.*padded batch.*dim='step'"):
        hookattn.concat([first, longer], dim="batch")
    with pytest.raises(MergeError, match=r"1 \(step 0\) ran in trace 0 and not in trace 1.*dim='step'"):
        hookattn.concat([first, first[:1]], dim="batch")
    with pytest.raises(MergeError, match="what was selected differs: capture"):
        hookattn.concat([first, hookattn.trace(model(), x(1, 5, 1), capture="weights")], dim="step")
    with pytest.raises(MergeError, match="the model's class differs"):
        hookattn.concat([first, hookattn.trace(model()[0], x(1, 5, 1))], dim="step")
    other = replace(first, calls=[replace(c, softcap=3.0) for c in first])
    with pytest.raises(MergeError, match=r"softcap is None in trace 0 and 3.0 in trace 1.*one model"):
        hookattn.concat([first, other], dim="batch")
    cut = replace(first, calls=[replace(c, shards=(Shard("B", 0, 2, count=2),)) for c in first])
    with pytest.raises(MergeError, match=r"hookattn\.merge"):
        hookattn.concat([cut, cut], dim="batch")


def test_arguments() -> None:
    trace = hookattn.trace(model(), x(1, 5, 1))
    for wrong in (trace, [], {}, "a.safetensors", [trace, 3], 5):
        with pytest.raises(InputError):
            hookattn.concat(wrong, dim="step")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="dim="):
        hookattn.concat([trace], dim="head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dim in ("batch", "step"):
            one = hookattn.concat([trace], dim=dim)
            assert torch.equal(one[1].weights, trace[1].weights) and one.notes == trace.notes and one[0] is not trace[0]
    twice = hookattn.concat([trace, trace], dim="batch")
    assert torch.equal(twice[0].weights, torch.cat([trace[0].weights] * 2))
