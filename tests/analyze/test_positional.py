"""Positional heads against an argmax in a loop."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import hookattn
from hookattn import analyze
from hookattn.analyze import Positional, best_offset
from hookattn.errors import MeasureError
from hookattn.statistics import TopK
from tests.analyze.build import CASES, Case, case, given, previous
from tests.analyze.test_repeats import Causal


def offsets(made: Case, layer: int, head: int) -> list[list[int]]:
    """Of each batch entry, of each query that counts: its largest weight's key − its own place."""
    w = made.weights[layer]
    assert made.positions is not None
    return [
        [int(w[b, head, i].argmax()) - int(made.positions[i]) for i in range(w.shape[2]) if made.rows[b, i]]
        for b in range(len(w))
    ]


@pytest.mark.parametrize("kind", CASES)
def test_share_of_queries(kind: str) -> None:
    made = case(**CASES[kind])
    for of in (Positional(-1), Positional(1), Positional(0), Positional()):
        table = analyze.measure(made.trace, of)
        best = best_offset(made.trace)
        for layer, w in enumerate(made.weights):
            for head in range(w.shape[1]):
                found = [x for row in offsets(made, layer, head) for x in row]
                counts = Counter(found)
                most = max(counts.values())
                wanted = counts[of.offset] if of.offset is not None else most
                value = table[table.call == layer][of.key].to_numpy()[head]
                assert value == pytest.approx(wanted / len(found))
                row = best[best.call == layer].iloc[head]
                assert row["share"] == pytest.approx(most / len(found))
                assert row["offset"] == min(x for x, n in counts.items() if n == most)


def test_the_best_offset_is_that_of_the_batch() -> None:
    w = torch.zeros(2, 1, 4, 4)
    w[0, 0, range(4), [0, 1, 2, 2]] = 1  # offsets 0 0 0 −1
    w[1, 0, range(4), [0, 0, 1, 2]] = 1  # offsets 0 −1 −1 −1
    trace = given(w)
    assert best_offset(trace)["offset"].tolist() == [-1]
    assert analyze.measure(trace, Positional(), by="example")["positional"].tolist() == [0.25, 0.75]
    assert analyze.measure(trace, Positional(), by="query")["positional"].tolist() == [0, 0, 0, 1, 0, 1, 1, 1]


def test_closed_form() -> None:
    assert Positional(-1)(given(previous(10, 2)))["positional(offset=-1)"].tolist() == [0.9, 0.9]


def test_of_the_statistic_alone_and_of_a_file(tmp_path: object) -> None:
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(4))
    whole = hookattn.trace(Causal(), x)
    alone = hookattn.trace(Causal(), x, capture=(TopK(1),))
    alone.save(f"{tmp_path}/x.safetensors")
    for trace in (alone, hookattn.load(f"{tmp_path}/x.safetensors")):
        for of in (Positional(), Positional(-1)):
            assert of(trace)[of.key].tolist() == of(whole)[of.key].tolist()
    assert analyze.capture("positional") == (TopK(1),)


def test_cross_attention_has_no_offsets() -> None:
    with pytest.raises(MeasureError, match="places in one sequence"):
        best_offset(case(cross=True).trace)


def test_a_row_with_nothing_to_attend_to_is_left_out() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    w: Tensor = torch.where(mask, torch.eye(4), 0.0).view(1, 1, 4, 4)
    trace = given(w, mask)
    assert Positional(0)(trace)["positional(offset=0)"].item() == 1
    assert best_offset(trace)["share"].item() == 1
    nothing = best_offset(given(torch.zeros(1, 1, 3, 3), torch.zeros(3, 3, dtype=torch.bool)))
    assert nothing[["offset", "share"]].isna().to_numpy().all()
