"""What of a trace is drawn: the same numbers as the call has, for any selection, wherever the trace is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("transformers")

import hookattn
from hookattn.calls.choose import part_of_one_call, parts_of_one_stack
from hookattn.calls.part import parts_of
from hookattn.errors import FieldNotCaptured, InputError, SelectionError
from hookattn.render.by_distance import mean_by_distance
from hookattn.render.values import block_maxima, drawn_values
from tests import tiny_models as tiny

FIELDS = ("q", "scores", "mask", "weights", "output")


def traced(name: str, **options: Any) -> hookattn.Trace:
    if name == "t5":
        return hookattn.trace(tiny.t5(), {"input_ids": tiny.ids(7), "decoder_input_ids": tiny.ids(5)}, **options)
    inputs: Any = tiny.image(16) if name == "vit" else tiny.padded("left") if name == "gpt2" else tiny.ids(9)
    return hookattn.trace(getattr(tiny, name)(), inputs, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "gemma2", "bloom", "t5", "vit"])
@pytest.mark.parametrize("where", ["memory", "file", "compact"])
def test_the_numbers_are_the_calls(name: str, where: str, tmp_path: Path) -> None:
    trace = traced(name)
    if where != "memory":
        trace.save(tmp_path / "x.safetensors", compact=where == "compact")
        trace = hookattn.load(tmp_path / "x.safetensors")
    for batch, heads in ((0, [2, 0]), (1, [3]), (-1, None)):
        parts = parts_of(trace, batch=batch, heads=heads)
        assert len(parts) == len(trace)
        for part, call in zip(parts, trace, strict=True):
            chosen = list(range(4)) if heads is None else heads
            assert part.heads == tuple(chosen)
            for field in FIELDS:
                whole = getattr(call, field)
                if field == "mask":
                    whole = whole.expand(call.weights.shape)
                expected = whole[batch, chosen].double()
                torch.testing.assert_close(part.tensor(field), expected, rtol=1e-6, atol=1e-7)
            groups = [h * call.k.shape[1] // 4 for h in chosen]
            for field in ("k", "v"):
                found = part.tensor(field)
                torch.testing.assert_close(found, getattr(call, field)[batch, groups].double(), rtol=0, atol=0)


def test_grouped_heads_that_were_captured_alone() -> None:
    """Numbers are those of the model, and each head has its own group's keys."""
    whole = traced("llama")
    few = traced("llama", heads=[3, 1])
    for part, call in zip(parts_of(few, heads=[1]), whole, strict=True):
        assert part.heads == (1,)
        torch.testing.assert_close(part.tensor("k")[0], call.k[0, 0].double())
        torch.testing.assert_close(part.tensor("weights")[0], call.weights[0, 1].double())
    with pytest.raises(SelectionError, match=r"kept heads 3, 1, so there is none at 0"):
        parts_of(few, heads=[0])


def test_a_learned_scale_and_sinks_are_cut_too() -> None:
    trace = traced("gpt_oss")
    for part, call in zip(parts_of(trace, heads=[2]), trace, strict=True):
        assert part.tensor("sinks").ravel().tolist() == call.sinks.expand(2, 4, -1, 1)[0, 2, :, 0].tolist()
    call = trace[0]
    call.scale = torch.arange(1.0, 5.0).view(4, 1, 1)
    assert parts_of(trace[:1], heads=[2])[0].call.scale.flatten().tolist() == [3.0]


def test_labels() -> None:
    trace = traced("gpt2")
    words = ["Ġa", "b", "Ġc", "Ċ", "Ġd", "Ġe", "."]
    trace.tokens = [words, list("ABCDEFG")]
    assert list(part_of_one_call(trace[:1], "x").keys) == ["a", "…b", "c", "↵", "␣d", "e", "."]
    part = part_of_one_call(trace, "x", layer=0, batch=1, queries=[-1, 2], keys=slice(4, None))
    assert part.row_labels == ["G", "C"] and part.column_labels == ["E", "F", "G"]
    part = part_of_one_call(trace, "x", layer=0, tokens=list("1234567"), key_tokens=list("tuvwxyz"))
    assert part.row_labels == list("1234567") and part.column_labels == list("tuvwxyz")
    with pytest.raises(InputError, match=r"key_tokens has 3 labels, and transformer\.h\.0\.attn has 7 keys"):
        part_of_one_call(trace, "x", layer=0, key_tokens=["a"] * 3)
    with pytest.raises(InputError, match="tokens has 3 labels"):
        part_of_one_call(trace, "x", layer=0, tokens=["a"] * 3)


def test_labels_of_an_encoder_and_decoder() -> None:
    """The tokens of a trace are the input's: the encoder's, and the keys of the cross-attention."""
    trace = traced("t5", tokens=[list("ABCDEFG")] * 2)
    encoder = part_of_one_call(trace, "x", stack="encoder", layer=0)
    assert encoder.row_labels == encoder.column_labels == list("ABCDEFG")
    decoder = part_of_one_call(trace, "x", stack="decoder", kind="self", layer=0)
    assert decoder.row_labels == decoder.column_labels == list("01234")
    cross = part_of_one_call(trace, "x", kind="cross", layer=0)
    assert cross.row_labels == list("01234") and cross.column_labels == list("ABCDEFG") and cross.places is None
    named = part_of_one_call(trace, "x", kind="cross", layer=0, tokens=list("vwxyz"))
    assert named.row_labels == list("vwxyz") and named.column_labels == list("ABCDEFG")


def test_tokens_of_something_else_are_no_labels() -> None:
    """More tokens than keys, in one step: they belong to another sequence."""
    assert part_of_one_call(traced("gpt2", tokens=[list("abcdefgh")] * 2)[:1], "x").keys == tuple("0123456")


def test_patches_have_numbers() -> None:
    assert part_of_one_call(traced("vit", tokens=[["a"] * 17] * 2)[:1], "x").keys[:3] == ("0", "1", "2")


def test_a_step_with_a_cache() -> None:
    model, ids = tiny.gpt2(), tiny.ids(5, batch=1)
    with hookattn.tracing(model, tokens=[list("abcdefghij")]) as trace, torch.no_grad():
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=59)
    part = part_of_one_call(trace, "x", layer=0, step=2)
    assert part.title == "decoder step 2 layer 0"
    whole = part_of_one_call(trace.stitch(), "x", layer=0)
    assert whole.row_labels == whole.column_labels == list("abcdefgh"), "the last token was never fed"
    assert part.places == (6,) and part.row_labels == ["g"] and part.column_labels == list("abcdefg")
    with pytest.raises(SelectionError, match=r"step= of 0, 1, 2, 3, or put the steps together with trace.stitch"):
        part_of_one_call(trace, "x", layer=0)
    with pytest.raises(SelectionError, match="layers draws one step"):
        parts_of_one_stack(trace, "layers")


def test_rows_that_were_captured_alone() -> None:
    trace = traced("gpt2", queries=[2, 5], tokens=[list("abcdefg")] * 2)
    part = part_of_one_call(trace, "x", layer=1, queries=5)
    assert part.rows == (1,) and part.row_labels == ["f"] and part.places == (2, 5)
    with pytest.raises(SelectionError, match=r"queries=3: .* has queries 2, 5, so there is none at 3"):
        part_of_one_call(trace, "x", layer=1, queries=3)


def test_labels_for_all_queries_of_which_some_were_captured() -> None:
    trace = traced("t5", queries=[3, 1], tokens=[list("ABCDEFG")] * 2)
    part = part_of_one_call(trace, "x", kind="cross", layer=0, tokens=list("vwxyz"))
    assert part.row_labels == ["y", "w"] and part.column_labels == list("ABCDEFG")
    part = part_of_one_call(trace, "x", stack="decoder", kind="self", layer=0, tokens=list("vwxyz"))
    assert part.row_labels == ["y", "w"] and part.column_labels == list("vwxyz") and part.places == (3, 1)
    for given in ("vwxy", "vwxyzz"):
        with pytest.raises(InputError, match=f"tokens has {len(given)} labels"):
            part_of_one_call(trace, "x", kind="cross", layer=0, tokens=list(given))


@pytest.mark.parametrize(("first", "queries"), [(0, None), (-2, None), (0, (2, 1)), (-2, (3, 2))])
def test_queries_before_and_behind_all_keys(first: int, queries: tuple[int, ...] | None) -> None:
    """A diagonal of more queries than keys goes on where there is none: no key's label is theirs."""
    rows = list(queries or range(5))
    fields: Any = {
        "mask": torch.ones(1, 1, 5, 3).tril(first).bool()[:, :, rows],
        "weights": torch.ones(1, 1, len(rows), 3),
    }
    given: Any = {"causal": True, "queries": queries, "of_queries": queries and 5, "fields": fields}
    call = hookattn.Call(hookattn.Site("attn"), 0, 0, "test", torch.float32, 1.0, **given)
    part = part_of_one_call(hookattn.Trace([call]), "x", key_tokens=list("abc"))
    assert part.places == tuple(i + first for i in rows)
    assert part.row_labels == [{0: "a", 1: "b", 2: "c"}.get(i + first, str(i + first)) for i in rows]


@pytest.mark.parametrize(("where", "message"), [
    ({"layer": 9}, r"no call fits \{'layer': 9\}"),
    ({}, r"x draws one call, and 2 fit; give layer= of 0, 1\."),
    ({"layer": 0, "heads": [4]}, r"heads=\[4\]: .* has heads 0, 1, 2, 3, so there is none at 4"),
    ({"layer": 0, "heads": []}, "none is selected"),
    ({"layer": 0, "batch": 2}, r"batch=2: .* has batch entries 0, 1, so there is none at 2"),
    ({"layer": 0, "queries": [7]}, "so there is none at 7"),
    ({"layer": 0, "keys": slice(7, 9)}, "none is selected"),
])  # fmt: skip
def test_what_is_not_there(where: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        part_of_one_call(traced("gpt2"), "x", **where)


def test_a_missing_field_names_the_capture() -> None:
    trace = traced("gpt2", capture=("weights", "mask"))
    with pytest.raises(FieldNotCaptured, match=r"capture=\('scores', 'mask', 'weights'\)"):
        part_of_one_call(trace, "x", layer=0).tensor("scores")
    with pytest.raises(FieldNotCaptured, match=r"trace again with capture=\('v', 'mask', 'weights'\)"):
        parts_of(traced("gpt2", capture="v"))
    with pytest.raises(SelectionError, match="no calls"):
        parts_of(hookattn.Trace())


# -------------------------------------------------------------------------------------------------- the numbers


def test_masked_entries_are_apart() -> None:
    part = part_of_one_call(traced("gpt2"), "x", layer=0, batch=1, queries=[4, 6], keys=[0, 3, 5])
    found = drawn_values(part)
    assert found.data.mask.tolist() == [[[True, False, True], [True, False, False]]] * 4
    torch.testing.assert_close(torch.from_numpy(found.data.data), part.tensor("weights")[:, [4, 6]][:, :, [0, 3, 5]])


def test_without_the_sink() -> None:
    call = traced("gpt2").select(layer=1)[0]
    part = part_of_one_call(traced("gpt2"), "x", layer=1)
    dropped, renormalised = drawn_values(part, sink="drop"), drawn_values(part, sink="renormalise")
    weights = call.weights[0].double()
    assert dropped.columns == (1, 2, 3, 4, 5, 6)
    assert torch.equal(torch.from_numpy(dropped.data.data), weights[:, :, 1:])
    expected = weights[:, 1:, 1:] / weights[:, 1:, 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(torch.from_numpy(renormalised.data.data)[:, 1:], expected)
    assert renormalised.data.mask[:, 0].all(), "nothing is left of the first row"
    with pytest.raises(SelectionError, match="the only one that is drawn"):
        drawn_values(part_of_one_call(traced("gpt2"), "x", layer=1, keys=0), sink="drop")


def test_the_sink_stands_behind_the_padding() -> None:
    call = traced("gpt2")[1]
    found = drawn_values(part_of_one_call(traced("gpt2"), "x", layer=1, batch=1), sink="renormalise")
    assert found.columns == (0, 1, 2, 4, 5, 6)
    weights = call.weights[1].double()
    expected = weights[:, 4:, 4:] / weights[:, 4:, 4:].sum(-1, keepdim=True)
    torch.testing.assert_close(torch.from_numpy(found.data.data)[:, 4:, 3:], expected)


def test_pooling_keeps_the_largest() -> None:
    np = pytest.importorskip("numpy")
    data = np.ma.masked_array(np.random.default_rng(0).random((2, 70, 50)), np.tri(70, 50, 3) == 0 * np.ones((2, 1, 1)))
    small, n = block_maxima(data, 20)
    assert n == 4 and small.shape == (2, 18, 13)
    for i in range(18):
        for j in range(13):
            block = data[1, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert small.mask[1, i, j] == block.mask.all() and (block.mask.all() or small[1, i, j] == block.max())
    assert block_maxima(data, 70)[0] is data


def test_distances() -> None:
    """Against a sum over all pairs, written out."""
    trace = traced("gpt2")
    call = trace[1]
    at, means = mean_by_distance(part_of_one_call(trace, "x", layer=1, batch=1))
    assert at.tolist() == [0, 1, 2, 3]  # three of seven are padding
    for d in range(4):
        pairs = [(i, i - d) for i in range(7) if i - d >= 0 and call.mask.expand_as(call.weights)[1, 0, i, i - d]]
        for h in range(4):
            assert means[h, d] == pytest.approx(sum(call.weights[1, h, i, j].item() for i, j in pairs) / len(pairs))
    with pytest.raises(SelectionError, match="has no distances"):
        mean_by_distance(part_of_one_call(traced("t5"), "x", kind="cross", layer=0))
