"""Heads and queries are chosen by their numbers in the whole model: kept, edited, measured, shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from torch import Tensor, nn

import hookattn
from hookattn import Shard, Site, analyze, edit, render
from hookattn.attention.kernel_call import KernelCall
from hookattn.attention.pieces import Cut
from hookattn.planning.byte_counts import SeenCalls, field_bytes
from hookattn.recording.selection import Selection
from tests.ranks import run_ranks
from tests.sharding.models import Attention, by_columns, inputs, mesh
from tests.sharding.test_heads import held_against

SECOND = Shard("H", 4, 8, 2, 4, "tp", 1, 2)


class Part(nn.Module):
    """Four heads that read two key heads, as a process has them that nothing tells of."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 6)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q[:, :2], q[:, 1:3], enable_gqa=True)


def traced(**options: Any) -> hookattn.Trace:
    return hookattn.trace(Part(), inputs(t=7), **{"shard": SECOND, **options})


def test_heads_are_numbers_in_the_whole_model() -> None:
    whole = hookattn.trace(Part(), inputs(t=7))[0]
    call = traced()[0]
    assert call.heads == (4, 5, 6, 7) and call.shard == SECOND and call.kv_heads is None
    assert "heads from 4 of 8, rank 1 of 2 on tp" in repr(call)
    chosen = traced(heads=[-1, 4])[0]
    assert chosen.heads == (7, 4)
    torch.testing.assert_close(chosen.weights, whole.weights[:, [3, 0]])
    torch.testing.assert_close(call.at(heads=-2).weights, whole.weights[:, 2:3])
    assert call.at(heads=slice(5, 7)).heads == (5, 6)
    with pytest.raises(hookattn.SelectionError, match="has kept heads 4, 5, 6, 7, so there is none at -8"):
        call.at(heads=-8)


def test_a_head_of_another_process_is_no_error_and_one_of_none_is() -> None:
    trace = traced(heads=[1, 5])
    assert trace[0].heads == (5,)
    trace = traced(heads=[3])
    assert len(trace) == 0 and not trace.skipped
    assert any("heads=[3] this process has none" in note and "heads from 4 of 8" in note for note in trace.notes)
    with pytest.raises(hookattn.SelectionError, match="has 8 heads, so there is no head 8"):
        traced(heads=[8])


def test_query_rows_likewise() -> None:
    rows = Shard("T", 7, 14, mesh="cp", index=1, count=2)
    whole = hookattn.trace(Part(), inputs(t=7))[0]
    call = traced(shard=rows)[0]
    assert call.queries == tuple(range(7, 14)) and call.of_queries == 14 and call.heads is None
    chosen = traced(shard=[rows, SECOND], queries=slice(-2, None), heads=[5])[0]
    assert chosen.queries == (12, 13) and chosen.heads == (5,) and chosen.shards == (SECOND, rows)
    torch.testing.assert_close(chosen.weights, whole.weights[:, 1:2, 5:])
    assert len(traced(shard=rows, queries=[0, 6])) == 0
    torch.testing.assert_close(call.at(queries=-1).q, whole.q[:, :, 6:])


def test_numbers_that_are_not_known_are_not_chosen_by() -> None:
    unknown = Shard("H", None, None)
    call = traced(shard=unknown)[0]
    assert call.heads is None and call.shards == (unknown,)
    for choose in ({"heads": [0]},):
        with pytest.raises(hookattn.SelectionError, match=r"numbers of its heads in the whole model are not known"):
            traced(shard=unknown, **choose)
    with pytest.raises(hookattn.SelectionError, match="numbers of its queries"):
        traced(shard=Shard("T", None, None), queries=[0])
    with pytest.raises(hookattn.EditError, match="numbers in the whole model are not known"):
        hookattn.edited(Part(), inputs(), edit.zero("weights", heads=[0]), shard=unknown)
    with pytest.raises(hookattn.EditError, match="numbers in the whole model are not known"):
        hookattn.edited(Part(), inputs(), edit.zero("weights", queries=[0]), shard=Shard("T", None, None))
    hookattn.edited(Part(), inputs(), edit.zero("weights"), shard=unknown)  # all of them need no number


def test_what_is_said_of_a_call_has_to_fit_it() -> None:
    for shard, words in (
        (Shard("H", 5, 8), "has 4 heads in this process, which cannot be those from 5 on of 8"),
        (Shard("H", 4, 8, 3, 4), "has 2 key heads in this process, which cannot be those from 3 on of 4"),
        (Shard("T", 8, 14), "has 7 query rows"),
        (Shard("B", 1, 2), "has 2 batch entries"),
        ({"nowhere": SECOND}, "the model has no module at 'nowhere'"),
    ):
        with pytest.raises(hookattn.SelectionError, match=words):
            traced(shard=shard)
    for wrong in ("H", 3, [], [SECOND, SECOND], {"": "H"}, {1: SECOND}, [SECOND, None]):
        with pytest.raises(hookattn.InputError, match=r"hookattn\.Shard"):
            traced(shard=wrong)


def test_shards_by_path() -> None:
    model = nn.Sequential(Part(), nn.Flatten(2), nn.Linear(42, 24), Part())
    said = {"0": SECOND, "1": Shard("H", 0, 8)}
    trace = hookattn.trace(model, inputs(t=7), shard=said)
    assert [call.heads for call in trace] == [(4, 5, 6, 7), None]
    assert "shard= names '1', where no attention was recorded" in trace.notes


def test_edits_are_of_the_models_heads() -> None:
    plain = hookattn.trace(Part(), inputs(t=7))
    trace = hookattn.edited(Part(), inputs(t=7), edit.zero("output", heads=[-1, 5, 2]), shard=SECOND)
    changed = (trace.output != plain.output).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, False, True]
    assert trace[0].edits[0].heads == (5, 7)
    keys = hookattn.edited(Part(), inputs(t=7), edit.zero("v", heads=[3]), shard=SECOND)  # key heads 2 and 3 are here
    changed = (keys.output != plain.output).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True] and keys[0].edits[0].heads == (3,)
    elsewhere = hookattn.edited(Part(), inputs(t=7), edit.zero("weights", heads=[1]), shard=SECOND)
    assert torch.equal(elsewhere.output, plain.output) and not elsewhere[0].edits
    with pytest.raises(hookattn.EditError, match="names 8, and this call has 8 heads"):
        hookattn.edited(Part(), inputs(t=7), edit.zero("weights", heads=[8]), shard=SECOND)


def test_edits_of_query_rows_of_a_part() -> None:
    rows = Shard("T", 7, 14)
    plain = hookattn.trace(Part(), inputs(t=7))
    trace = hookattn.edited(Part(), inputs(t=7), edit.zero("output", queries=[8, 3]), shard=rows)
    changed = (trace.output != plain.output).any(-1).any(0).any(0)
    assert changed.tolist() == [False, True, False, False, False, False, False]
    assert trace[0].edits[0].queries == (8,)


def test_values_of_another_run_stand_where_they_stood() -> None:
    clean = traced()
    half = inputs(t=7) / 2
    for field in ("v", "output", "weights"):
        trace = hookattn.edited(Part(), half, edit.patch(field, of=clean), shard=SECOND)
        torch.testing.assert_close(getattr(trace[0], field), getattr(clean[0], field))


def test_edited_weights_and_selected_heads(tmp_path: Path) -> None:
    for options in ({}, {"to": tmp_path / "x.safetensors"}, {"heads": [5, 6]}):
        trace = hookattn.edited(Part(), inputs(t=7), edit.zero("weights", heads=[6]), shard=SECOND, **options)
        call = trace[0]
        assert call.certificate.faithful
        at = list(call.heads or ()).index(6)
        assert not call.weights[:, at].any() and call.weights[:, at - 1].any()


def test_pieces_of_a_part() -> None:
    class Pieces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (4, 6)).transpose(1, 2)
            return torch.cat([F.scaled_dot_product_attention(*(q[:, i : i + 1],) * 3) for i in range(4)], 1)

    shard = Shard("H", 4, 8, 4, 8)
    trace = hookattn.trace(Pieces(), inputs(), shard=shard)
    assert len(trace) == 1 and trace[0].heads == (4, 5, 6, 7)
    assert hookattn.trace(Pieces(), inputs(), shard=shard, heads=[6])[0].heads == (6,)
    edited = hookattn.edited(Pieces(), inputs(), edit.zero("output", heads=[5]), shard=shard)
    changed = (edited.output != trace.output).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, False, False]
    assert edited[0].edits[0].heads == (5,) and edited[0].heads == (4, 5, 6, 7)


def test_what_reads_a_trace_names_the_models_heads(tmp_path: Path) -> None:
    trace = traced(capture=("q", "k", "v", "weights", "entropy"))
    trace.save(tmp_path / "x.safetensors")
    for read in (trace, hookattn.load(tmp_path / "x.safetensors")):
        assert sorted(set(analyze.measure(read, "sink")["head"])) == [4, 5, 6, 7]
        drawn = render.heatmap(read, heads=5)
        assert any("head 5" in text.get_text() for text in drawn.findobj(Text))
        with pytest.raises(hookattn.SelectionError, match="kept heads 4, 5, 6, 7"):
            render.heatmap(read, heads=1)


def test_room_is_asked_for_what_is_here() -> None:
    x = torch.zeros(1, 4, 5, 6, device="meta")
    call = KernelCall(x, x, x, x, 1.0, "sdpa", cuts={"H": Cut(4, 8), "G": Cut(4, 8)})
    for heads, calls in (([5, 1], 1), ([1], 0)):
        rows, _ = field_bytes(SeenCalls([(call, Site("a"), 0)]), Selection.of(heads=heads), False)
        assert len(rows) == calls and all(row.shapes["q"] == (1, 1, 5, 6) for row in rows)


def _on_two(rank: int, folder: Path) -> dict[str, Any]:
    along = mesh(tp=2)
    whole = hookattn.trace(Attention(4, 2), inputs())
    without = hookattn.edited(Attention(4, 2), inputs(), edit.zero("output", heads=[3])).output
    model = by_columns(Attention(4, 2), along, "q", "k", "v")
    found: dict[str, Any] = {}
    trace = hookattn.trace(model, inputs(), heads=[3], queries=[-1])
    for call in trace:
        held_against(call, whole[0])
    found["heads"] = [call.heads for call in trace]
    found["notes"] = trace.notes
    edited = hookattn.edited(model, inputs(), edit.zero("output", heads=[3]))
    torch.testing.assert_close(edited.output, without, atol=1e-6, rtol=1e-6)
    found["edits"] = [one.heads for one in edited[0].edits]
    try:
        hookattn.trace(model, inputs(), heads=[4])
    except hookattn.SelectionError as error:
        found["error"] = str(error)
    said = hookattn.trace(model, inputs(), shard=Shard("H", 2 * rank, 4, mesh="mine", index=rank, count=2))
    found["said"] = said[0].shard
    return found


def test_heads_of_a_model_that_is_cut(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_two, tmp_path)
    assert (first["heads"], second["heads"]) == ([], [(3,)])
    assert any("this process has none" in note for note in first["notes"]) and not second["notes"]
    assert (first["edits"], second["edits"]) == ([], [(3,)])
    assert "has 4 heads, so there is no head 4" in first["error"] and first["error"] == second["error"]
    assert second["said"] == Shard("H", 2, 4, mesh="mine", index=1, count=2)
