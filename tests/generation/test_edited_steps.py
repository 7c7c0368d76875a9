"""What was edited in the steps of a generation is said of the picture of all of them; nothing is derived past it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hookattn
from hookattn import edit
from hookattn.generation.merge_statistics import merge
from hookattn.testing import check_trace
from tests import tiny_models as tiny

PROMPT, NEW = 6, 4


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def generated(*edits: hookattn.edit.Edit, model: Any = None, **options: Any) -> hookattn.Trace:
    model = tiny.gpt2() if model is None else model
    torch.manual_seed(1)
    with hookattn.editing(model, *edits, **options) as trace:
        model.generate(torch.randint(3, 60, (2, PROMPT)), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return trace


LAST = PROMPT + NEW - 2
EDITS: list[tuple[Any, str, tuple[str, ...]]] = [
    (edit.zero("weights", layer=0, heads=[1]), "zero(weights) head 1", ("scores",)),
    (edit.zero("weights", layer=0, heads=[1], step=2), "zero(weights) head 1, query 7", ("scores",)),
    (edit.zero("weights", layer=0, step=[1, 3]), "zero(weights) query 6 8", ("scores",)),
    (
        edit.zero("weights", layer=0, heads=[1], queries=[4, 8], keys=[2]),
        "zero(weights) head 1, query 4 8, key 2",
        ("scores",),
    ),
    (edit.scale("scores", 3.0, layer=0, heads=[1], step=1), "scale(scores) head 1, query 6", ()),
    (
        edit.knockout(layer=0, heads=[2], queries=[7], keys=[1]),
        "knockout(mask) head 2, query 7, key 1",
        ("scores", "weights"),
    ),
    (
        edit.zero("output", layer=0, batch=[1], step=0),
        "zero(output) query 0 1 2 3 4 5, batch entry 1",
        ("scores", "weights"),
    ),
    (edit.set("q", 0.5, layer=0, heads=[0], step=1), "set(q) head 0, query 6", ("scores", "weights")),
    (edit.zero("k", layer=0, heads=[1], step=1), "zero(k) head 1 as query 6 met it", ()),
    (edit.zero("v", layer=0, heads=[1]), "zero(v) head 1", ("scores", "weights")),
]


@pytest.mark.parametrize(("made", "told", "derivable"), EDITS, ids=[told for _, told, _ in EDITS])
def test_the_rows_are_those_of_their_steps(made: Any, told: str, derivable: tuple[str, ...], tmp_path: Path) -> None:
    trace = generated(made)
    whole = trace.stitch()
    call = whole[0]
    assert [str(x) for x in call.edits] == [told] and call.derivable == derivable
    assert whole[1].edits == ()
    for compact in (False, True):
        loaded = hookattn.load(whole.save(tmp_path / "run.safetensors", compact=compact))[0]
        assert loaded.edits == call.edits
        first = 0
        for step in (c for c in trace if c.site.path == call.site.path):
            t, s = step.weights.shape[2:]
            for name in ("weights", "scores", "output"):
                mine, theirs = loaded.get(name), step.get(name)
                assert mine is not None and theirs is not None
                mine = mine[:, :, first : first + t, : s if name != "output" else None]
                seen = step.mask.expand(*theirs.shape) if name == "scores" else torch.tensor(True)
                assert torch.where(seen, mine - theirs, 0.0).abs().max() < 1e-5, name
            first += t
        assert first == LAST + 1
    if "k" not in {x.field for x in call.edits}:
        check_trace(whole)


def test_a_cache_that_turns_its_keys_cannot_be_followed_past_edited_ones() -> None:
    trace = generated(edit.zero("k", layer=0, heads=[1], step=1), model=tiny.llama())
    with pytest.raises(hookattn.StitchError, match=r"edited: zero\(k\) head 1"):
        trace.stitch()


def test_statistics_of_edited_steps_say_whose_rows_they_are() -> None:
    whole = generated(edit.zero("weights", layer=0, heads=[1], step=1)).calls[0]
    trace = generated(edit.zero("weights", layer=0, heads=[1], step=1), capture=("entropy",))
    merged = merge(trace)
    assert [str(x) for x in merged[0].edits] == ["zero(weights) head 1, query 6"] and whole.edits == ()
    entropy = merged[0].get("entropy")
    assert entropy is not None and entropy.shape[2] == LAST + 1
    assert not entropy[:, 1, PROMPT].any() and entropy[:, 1, PROMPT + 1 :].any() and entropy[:, 0].any()
    two = merge([trace.select(step=1), trace.select(step=1)], over="batches")
    assert [str(x) for x in two[0].edits] == ["zero(weights) head 1"]
    both = merge([trace.select(step=2), trace.select(step=2)], over="batches")
    assert both[0].edits == ()
