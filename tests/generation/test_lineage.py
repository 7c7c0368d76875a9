"""The parts of stitching: where keys are found again, which rows are whose, and which step has a position."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookattn import StitchError
from hookattn.generation import lineage, stitch
from hookattn.generation.lineage import CallPositions
from tests.reference import draw

many = settings(max_examples=200, deadline=None)


# ---------------------------------------------------------------------------------------------------- one order of keys


@given(st.lists(st.lists(st.integers(0, 5), max_size=3, unique=True).map(sorted), max_size=5))
@many
def test_keys_are_in_order_where_one_choice_of_places_goes_up(found: list[list[int]]) -> None:
    chosen = [list(places) or [None] for places in found]
    orders = []
    for choice in itertools.product(*chosen):
        there = [p for p in choice if p is not None]
        if all(a < b for a, b in itertools.pairwise(there)):
            orders.append(list(choice))
    assert lineage._in_order(found) == (orders[0] if len(orders) == 1 else None)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], range(0)),
        ([3], range(3, 4)),
        ([3, 4, 5], range(3, 6)),
        ([3, 5], [3, 5]),
        ([4, 3], [4, 3]),
        ([3, 3], [3, 3]),
    ],
)
def test_positions_are_a_range_if_they_are_one(positions: list[int], expected: Any) -> None:
    found = lineage._as_range(positions)
    assert type(found) is type(expected) and found == expected


@given(st.integers(1, 3), st.integers(1, 6), st.data())
@many
def test_keys_are_found_where_they_were(batch: int, n_before: int, data: st.DataObject) -> None:
    """Some of the keys of the step before, in any order of the batch, and new ones behind them or among them."""
    start = data.draw(st.integers(0, 3))
    kept = sorted(data.draw(st.sets(st.integers(0, n_before - 1), min_size=1)))
    new = data.draw(st.integers(0, 2))
    before, fresh = draw(batch, 2, n_before, 3, seed=1), draw(batch, 2, new, 3, seed=2)
    order = data.draw(st.permutations(range(batch)))
    split = data.draw(st.integers(0, len(kept)))
    some, rest = before[:, :, kept[:split]][list(order)], before[:, :, kept[split:]][list(order)]
    keys = torch.cat([some, fresh, rest], 2)
    at = range(start, start + n_before)
    found = lineage._positions_found(keys, before, at, len(kept), [])
    assert found == [*(at[i] for i in kept[:split]), *[None] * new, *(at[i] for i in kept[split:])]
    assert lineage._positions_found(keys, before, at, len(kept) + 1, []) is None, "one is missing"


def test_all_batch_entries_find_their_keys_in_the_same_places() -> None:
    before = draw(2, 2, 4, 3, seed=1)
    keys = torch.stack([before[0][:, [0, 1]], before[1][:, [0, 2]]])
    assert lineage._positions_found(keys, before, range(4), 2, []) is None
    assert lineage._positions_found(keys[:1], before, range(4), 2, []) == [0, 1]


@pytest.mark.parametrize("change", ["heads", "width", "dtype"])
def test_keys_of_another_shape_are_not_found(change: str) -> None:
    before = draw(1, 2, 4, 4, seed=1)
    other = {"heads": before[:, :1], "width": before[..., :2], "dtype": before.double()}[change]
    assert lineage._positions_found(before, before, range(4), 4, []) == [0, 1, 2, 3]
    assert lineage._positions_found(other, before, range(4), 4, []) is None


def test_a_key_that_is_there_twice_is_where_a_layer_further_in_found_it() -> None:
    """The same token twice, in a first layer: the order tells where it can, and another layer where that cannot."""
    a, b = (draw(1, 2, 1, 3, seed=i) for i in (1, 2))
    before = torch.cat([a, b, a], 2)
    assert lineage._positions_found(torch.cat([b, a], 2), before, range(5, 8), 2, []) == [6, 7]
    one = torch.cat([a, b[:, :, :0]], 2)
    assert lineage._positions_found(one, before, range(5, 8), 1, []) is None
    assert lineage._positions_found(one, before, range(5, 8), 1, [[6], [7]]) == [7]
    assert lineage._positions_found(one, before, range(5, 8), 1, [[7, None]]) is None, "of another number of keys"
    # An own key that is the same as an earlier one is an own key all the same.
    assert lineage._positions_found(torch.cat([a, b, a, b], 2), before, range(3), 3, []) == [0, 1, 2, None]


# ---------------------------------------------------------------------------------------------------- how far apart


def test_distances_are_relative_and_between_all_rows() -> None:
    a, b = draw(3, 2, 4, 5, seed=1), draw(2, 2, 4, 5, seed=2)
    found = lineage._distance(a, b)
    for i, j in itertools.product(range(3), range(2)):
        expected = (a[i] - b[j]).norm() / max(a[i].norm(), b[j].norm())
        assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-5)
    same = lineage._distance(a, a.clone())
    assert same.tolist() == [[0.0 if i == j else 2.0 for j in range(3)] for i in range(3)]
    assert lineage._distance(a * 0, a * 0 + 0).max() <= 2.0


def test_a_window_is_the_last_of_the_keys_before_it() -> None:
    before = draw(2, 2, 6, 4, seed=1)
    assert lineage._is_window(before[:, :, 2:] + 1e-3, before)
    assert lineage._is_window(before, before)
    assert not lineage._is_window(before[:, :, :4], before) and not lineage._is_window(before[:, :, 1:5], before)
    assert not lineage._is_window(torch.cat([before, before[:, :, :1]], 2), before), "more than there were"
    assert not lineage._is_window(before[:, :1, 2:], before) and not lineage._is_window(before[..., :2], before)
    half = torch.cat([before[:1, :, 2:], draw(1, 2, 4, 4, seed=9)])
    assert not lineage._is_window(half, before), "every row has to be one"


# ---------------------------------------------------------------------------------------------------- places


@given(st.integers(0, 4), st.integers(1, 6), st.data())
@many
def test_the_columns_of_positions(first: int, n: int, data: st.DataObject) -> None:
    at = data.draw(st.sampled_from([range(first, first + n), [2 * (first + i) for i in range(n)]]))
    place = CallPositions(1, first, at, n + 2)
    assert place.slots == n and place.gapless is isinstance(at, range)
    a, b = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    wanted = range(at[0] + a, at[0] + b) if place.gapless else range(at[a], at[a] + 1) if a < n else range(0)
    columns = place.columns(wanted)
    assert [at[c] for c in (range(n)[columns] if isinstance(columns, slice) else columns)] == list(wanted)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6), st.data())
@many
def test_each_position_is_of_the_last_step_that_fed_it(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    """Steps that feed some tokens, and before that take some back."""
    places, owner = [], {}
    length = 0
    for i, (queries, back) in enumerate(steps):
        first = max(length - back, 0) if i else 0
        owner = {p: j for p, j in owner.items() if p < first} | dict.fromkeys(range(first, first + queries), i)
        places.append([CallPositions(queries, first, range(first + queries), first + queries)])
        length = first + queries
    end = data.draw(st.integers(1, length))
    spans = stitch._spans(SimpleNamespace(places=places), end)  # type: ignore[arg-type]
    assert {p: i for i, a, b in spans for p in range(a, b)} == {p: i for p, i in owner.items() if p < end}
    assert sum(b - a for _, a, b in spans) == end and all(a < b for _, a, b in spans)


def test_rows_are_followed_back_from_the_last_step() -> None:
    orders = [torch.arange(3), torch.tensor([2, 0, 0]), torch.tensor([1, 1, 2])]
    of: Any = SimpleNamespace(places=[None] * 3, reorder=orders, batch=3)
    rows = stitch._rows_of_steps(of, None, "decoder")
    assert [r.tolist() for r in rows] == [[0, 0, 0], [1, 1, 2], [0, 1, 2]]
    for final in range(3):
        row = final
        for step in (2, 1, 0):
            assert rows[step][final] == row
            row = int(orders[step][row])


def test_rows_that_beam_search_names() -> None:
    of: Any = SimpleNamespace(places=[None] * 4, batch=3)
    beams = torch.tensor([[0, 2, -1], [1, 0, 2]])
    rows = stitch._rows_of_steps(of, beams, "decoder")
    assert [r.tolist() for r in rows] == [[0, 1], [2, 0], [-1, 2], [-1, -1]]
    with pytest.raises(StitchError, match="beams has 5 steps, and the decoder stack ran in 4"):
        stitch._rows_of_steps(of, torch.zeros(2, 5, dtype=torch.long), "decoder")
    assert len(stitch._rows_of_steps(of, torch.zeros(2, 4, dtype=torch.long), "decoder")) == 4
    with pytest.raises(StitchError, match="beams names row 3, and the decoder stack ran with 3 rows"):
        stitch._rows_of_steps(of, beams + 1, "decoder")


def test_rows_by_index() -> None:
    x = draw(3, 2, 4, seed=1)
    found = stitch._taken_rows(x, torch.tensor([2, -1, 0, 2]))
    assert torch.equal(found, torch.stack([x[2], torch.zeros(2, 4), x[0], x[2]]))
    shared = stitch._taken_rows(x[:1], torch.tensor([1, -1, 0]))
    assert torch.equal(shared, torch.stack([x[0], torch.zeros(2, 4), x[0]]))
    assert torch.equal(x, draw(3, 2, 4, seed=1)), "what was captured is not written to"


def test_keys_are_known_to_go_on_only_in_one_history_and_from_the_step_before() -> None:
    class History:
        def link(self, step: int) -> Any:
            return self, step

    def call(k: Any = None, v: Any = None) -> Any:
        return SimpleNamespace(fields={"k": k, "v": v})

    def at(history: Any, step: int) -> Any:
        made = lineage.Continued.__new__(lineage.Continued)
        object.__setattr__(made, "history", history)
        object.__setattr__(made, "step", step)
        return made

    one, other = History(), History()
    assert lineage._link(call(at(one, 1)), call(at(one, 2))) == (one, 2)
    assert lineage._link(call(None, at(one, 1)), call(None, at(one, 2))) == (one, 2), "the values tell as well"
    for before, now in (
        (call(at(one, 1)), call(at(other, 2))),
        (call(at(one, 1)), call(at(one, 3))),
        (call(at(one, 2)), call(at(one, 2))),
        (call(at(one, 1)), call(torch.ones(1))),
        (call(torch.ones(1)), call(at(one, 2))),
        (call(), call()),
    ):
        assert lineage._link(before, now) is None


def test_scales_of_the_steps() -> None:
    """One for all, or one for each row; numbers that differ are no one generation."""

    def scale(*values: Any) -> Any:
        site = SimpleNamespace(label="layers.0")
        return stitch._Site._scale(SimpleNamespace(calls=[SimpleNamespace(scale=x, site=site) for x in values]))  # type: ignore[arg-type]

    assert scale(0.5, 0.5) == 0.5 and scale(None, None) is None
    one = torch.tensor(0.25)
    assert scale(one, torch.tensor(0.25)) is one
    with pytest.raises(StitchError) as caught:
        scale(0.5, 0.5, 0.25, 1.0, 2.0, 3.0)
    assert str(caught.value) == "layers.0: the scale differs between the steps: [0.5, 0.5, 0.25, 1.0]…"
    with pytest.raises(StitchError):
        scale(0.5, one)


def test_a_mask_of_fewer_axes_is_the_mask_that_it_stands_for() -> None:
    """As a file may hold it: one number for each key."""
    from hookattn import Call, Site
    from hookattn.generation.lineage import Lineage

    def filled(mask: torch.Tensor) -> int:
        fields = {"q": torch.zeros(1, 2, 1, 4), "k": torch.zeros(1, 2, 8, 4), "mask": mask}
        call = Call(Site("a"), 0, 0, "tap", torch.float32, 1.0, fields=fields)
        return Lineage._filled(object.__new__(Lineage), call, 1, 8)

    seen = torch.arange(8) < 5
    assert filled(seen) == filled(seen[None]) == filled(seen.expand(1, 1, 1, 8)) == 5
