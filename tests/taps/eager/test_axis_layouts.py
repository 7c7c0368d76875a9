"""What views make of axes, entry by entry: an axis that is said to lie along a dimension counts up along it.

Each case is carried out on a tensor that holds, for every entry, its index along each axis that it began with.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hookattn.taps.eager import axis_history as views
from hookattn.taps.eager.axis_history import Atom, Layout, refine, sizes, split
from hookattn.taps.eager.correspondence import Correspondence
from hookattn.taps.eager.cuts import place_in

many = settings(max_examples=300, deadline=None)
shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def indices(shape: tuple[int, ...]) -> Tensor:
    """… n: the index of each entry along each of the dimensions."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1)


def number(atom: Atom, at: Tensor, of: dict[Atom, int]) -> Tensor:
    """Where each entry is along an axis, by the one that its line began with and how far its entries lie apart."""
    line = atom
    while line not in of:
        assert line.parent is not None, "an axis that came from nowhere"
        line = line.parent
    return at[..., of[line]] // atom.step % atom.size


def check(layout: Layout, at: Tensor, of: dict[Atom, int]) -> None:
    """Along every dimension the axes that are said to lie there count up, the last the fastest."""
    assert sizes(layout) == at.shape[:-1]
    for dim, atoms in enumerate(layout):
        found = torch.zeros(at.shape[:-1], dtype=torch.long)
        for atom in atoms:
            if atom.birth != "lost":
                found = found * atom.size + number(atom, at, of)
        if all(a.birth != "lost" for a in atoms):
            n = at.shape[dim]
            assert torch.equal(
                found, torch.arange(n).view([n if i == dim else 1 for i in range(at.dim() - 1)]).expand_as(found)
            )


def begun(shape: tuple[int, ...]) -> tuple[Layout, dict[Atom, int]]:
    atoms = [Atom(n) for n in shape]
    return tuple((a,) if a.size != 1 else () for a in atoms), {a: i for i, a in enumerate(atoms)}


@given(shapes, st.data())
@many
def test_views_one_after_the_other(extents: list[int], data: st.DataObject) -> None:
    shape = tuple(extents)
    layout, of = begun(shape)
    at = indices(shape)
    for _ in range(3):
        now = tuple(at.shape[:-1])
        what = data.draw(st.sampled_from(["reshape", "permute", "transpose"]))
        if what == "reshape":
            new: list[int] = []
            left = math.prod(now)
            while left > 1:
                new.append(data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, left) if left % n == 0])))
                left //= new[-1]
            at = at.reshape(*new, len(shape))
            layout = views.reshape(layout, tuple(new), None)
        elif what == "permute":
            order = data.draw(st.permutations(range(len(now))))
            at = at.permute(*order, len(now))
            layout = views.permute(layout, tuple(at.shape[:-1]), order)
        else:
            a, b = (data.draw(st.integers(0, len(now) - 1)) for _ in range(2)) if now else (0, 0)
            if now:
                at = at.transpose(a, b)
                layout = views.transpose(layout, tuple(at.shape[:-1]), (a, b))
        check(layout, at, of)


@given(shapes, st.data())
@many
def test_what_can_be_told_of_a_reshape_is(extents: list[int], data: st.DataObject) -> None:
    """Neighbours made one, and one made several: no axis is lost where every new extent is made of whole ones."""
    shape = tuple(extents)
    layout, of = begun(shape)
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(shape)), st.integers(0, len(shape)))))
    joined = (*shape[:a], math.prod(shape[a:b]), *shape[b:])
    made = views.reshape(layout, joined, None)
    assert [x for dim in made for x in dim if x.size != 1] == [x for dim in layout for x in dim if x.size != 1]
    back = views.reshape(made, shape, None)
    check(back, indices(shape), of)
    assert not any(x.birth == "lost" for dim in back for x in dim)


@given(st.lists(st.sampled_from([2, 3, 4, 6]), max_size=3), st.lists(st.sampled_from([2, 3, 4, 6]), max_size=3))
@many
def test_two_factorings_of_one_extent_have_a_common_one(one: list[int], other: list[int]) -> None:
    left, right = [Atom(n) for n in one], [Atom(n) for n in other]
    pairs = refine(left, right)
    if math.prod(one) != math.prod(other):
        assert pairs is None
        return
    cuts = [{math.prod(x[i:]) for i in range(len(x) + 1)} for x in (one, other)]
    every = sorted(cuts[0] | cuts[1])
    if any(b % a for a, b in pairwise(every)):
        assert pairs is None
        return
    assert pairs is not None
    assert math.prod(a.size for a, _ in pairs) == math.prod(one)
    for side, atoms in ((0, left), (1, right)):
        index = torch.arange(math.prod(one))
        places, rest = {}, index
        for atom in reversed(atoms):
            places[atom], rest = rest % atom.size, rest // atom.size
        found = torch.zeros_like(index)
        for pair in pairs:
            part, line = pair[side], pair[side]
            while line not in places:
                assert line.parent is not None
                line = line.parent
            found = found * part.size + places[line] // part.step % part.size
        assert torch.equal(found, index)
    assert all(a.size == b.size for a, b in pairs)


@pytest.mark.parametrize("outer", [1, 2, 3, 4, 6, 12])
def test_the_outer_of_two_parts_counts_the_inner_one(outer: int) -> None:
    whole = Atom(12, role="H", birth="feature")
    one, two = split(whole, outer)
    assert (one.size, two.size, one.step, two.step) == (outer, 12 // outer, 12 // outer, 1)
    assert one.parent is two.parent is whole and one.role == two.role == "H" and one.root is two.root is whole
    inner = split(one, outer)[0] if outer > 1 else one
    assert inner.step == 12 // outer


# ------------------------------------------------------------------------------------------------ pieces in memory


@given(shapes, st.data())
@many
def test_where_a_part_of_a_tensor_was_cut(extents: list[int], data: st.DataObject) -> None:
    """Some entries along one dimension, or one entry of one or two: the rows that are named hold what the part does."""
    whole = torch.arange(math.prod(extents) + 5)[3 : 3 + math.prod(extents)].view(extents)
    whole = whole.permute(data.draw(st.permutations(range(whole.dim()))))
    part = whole
    if data.draw(st.booleans()):
        dim = data.draw(st.integers(0, whole.dim() - 1))
        start = data.draw(st.integers(0, whole.shape[dim] - 1))
        part = whole.narrow(dim, start, data.draw(st.integers(1, whole.shape[dim] - start)))
    else:
        for _ in range(data.draw(st.integers(1, min(3, whole.dim())))):
            dim = data.draw(st.integers(0, part.dim() - 1))
            part = part.select(dim, data.draw(st.integers(0, part.shape[dim] - 1)))
    found = place_in(whole, part)
    if whole.dim() - part.dim() > 2 or part.shape == whole.shape:
        assert found is None
        return
    distinct = [s for s, n in zip(whole.stride(), whole.shape, strict=True) if n > 1]
    if found is None:  # nothing tells dimensions of one entry apart
        assert len(set(whole.stride())) < whole.dim() or len(distinct) < whole.dim()
        return
    dims, first, last = found
    rest = [d for d in range(whole.dim()) if d not in dims]
    rows = whole.permute(*dims, *rest).flatten(0, len(dims) - 1)[first:last]
    if part.dim() == whole.dim():
        assert torch.equal(rows, part.permute(*dims, *rest))
    else:
        assert last - first == 1 and torch.equal(rows[0], part)


def test_what_was_not_cut_off_a_tensor_has_no_place_in_it() -> None:
    x = torch.arange(24).view(2, 3, 4)
    assert place_in(x, x[:, 1:]) == ((1,), 1, 3) and place_in(x, x[1, :, 2]) == ((0, 2), 6, 7)
    other = x.clone()
    for part in (other[:, 1:], x[:, ::2], x[:, 1:, 1:], x[:, :0], x[1, 1, 1], x.transpose(0, 1)[:2], x[None], x):
        assert place_in(x, part) is None, part.shape
    assert place_in(x[:, 1:], x[:, :1]) is None, "before it"
    assert place_in(x[:, :2], x[:, 2:]) is None, "behind it"
    assert place_in(x[:0], x[:1]) is None


# ------------------------------------------------------------------------------------------------ pictures of axes


def test_a_picture_of_an_axis_has_pictures_of_all_that_it_came_from() -> None:
    """No axis of the recipe is left in it, and what is one axis there is one here."""
    root, other = Atom(12, birth="data"), Atom(5, birth="data")
    outer, inner = split(root, 3)
    inner.beside, inner.through, inner.maps = frozenset([other, root]), outer, frozenset(["map"])
    here = Correspondence()
    made = here.atom(inner)
    assert made is here.atom(inner) and made is not inner
    for name in ("size", "role", "repeated", "birth", "step"):
        assert getattr(made, name) == getattr(inner, name), name
    assert made.parent is here.atom(root) is made.root and made.through is here.atom(outer)
    assert made.beside == {here.atom(other), here.atom(root)} and not made.beside & {other, root}
    assert here.atom(outer).parent is made.parent and here.atom(other).root is here.atom(other)
    assert made.maps != inner.maps, "of a map that is not there any more"
    here.apply("map", "another map")
    assert Correspondence.atom(here, split(root, 2)[0]).parent is made.parent


DIFFERENT: dict[str, Any] = {"size": 6, "birth": "feature", "step": 3, "role": "H", "repeated": True}


@pytest.mark.parametrize("name", [*DIFFERENT, "parent", "through", "beside", "maps"])
def test_axes_that_differ_in_one_thing_are_not_the_same(name: str) -> None:
    def pair(change: bool) -> bool:
        one, two = Atom(4), Atom(4)
        if change and name in DIFFERENT:
            setattr(two, name, DIFFERENT[name])
        elif change and name == "parent":
            two = Atom(4, Atom(8))
        elif change and name == "through":
            two.through = Atom(4)
        elif change and name == "beside":
            two.beside = frozenset([Atom(4)])
        elif change:
            two.maps = frozenset(["map"])
        return Correspondence().pair(views.known(((one,),)), views.known(((two,),)))

    assert pair(change=False) and not pair(change=True)


def test_axes_lie_to_each_other_as_they_did() -> None:
    """One axis twice is no two axes, and two are not one."""
    a, b, c = Atom(4), Atom(4), Atom(4)
    once, twice = views.known(((a,), (a,))), views.known(((b,), (c,)))
    assert not Correspondence().pair(once, twice) and not Correspondence().pair(twice, once)
    here = Correspondence()
    assert here.pair(twice, views.known(((a,), (Atom(4),)))) and here.atom(b) is a
    assert here.pair(views.known(((b,),)), views.known(((a,),)))
    assert not here.pair(views.known(((c,),)), views.known(((a,),)))
    turned = here.turned()
    assert turned.atom(a) is b
    copied = here.copy()
    assert copied.pair(views.known(((Atom(3),),)), views.known(((Atom(3),),))) and copied.atom(b) is a


@pytest.mark.parametrize("birth", ["feature", "data"])
def test_axes_of_one_entry_are_told_by_the_side_on_which_they_are_made_or_lost(birth: Any) -> None:
    """Heads are split from a width and lie beside it; where there is none, it is a batch axis, which comes first."""
    one, two, three, wide = Atom(1), Atom(1), Atom(1), Atom(8, birth=birth)
    made = views.reshape(((one,), (two,), (wide,)), (1, 1, 1, 8), None)
    assert made == (((one,), (two,), (), (wide,)) if birth == "feature" else ((), (one,), (two,), (wide,)))
    lost = views.reshape(((one,), (two,), (three,), (wide,)), (1, 1, 8), None)
    assert lost == (((one,), (two,), (wide,)) if birth == "feature" else ((two,), (three,), (wide,)))
    moved = views.reshape(((one,), (wide,), (two,)), (1, 1, 8), None)
    assert moved == ((one,), (two,), (wide,)), "as many as before: in their order"
    narrow = views.reshape(((one,), (Atom(1, birth=birth),)), (1, 1, 1), None)
    assert narrow[-1] != () and narrow[0] == (), "a width of one entry is no width that heads were split from"


def test_a_dimension_that_does_not_divide_is_not_known() -> None:
    six, four = Atom(6), Atom(4)
    made = views.reshape(((six,), (four,)), (4, 6), None)
    assert sizes(made) == (4, 6) and all(a.birth == "lost" for dim in made for a in dim)
    for extent, inner in ((8, (four,)), (10, ()), (3, ())):
        (after,) = views.resized(((six, four),), (extent,), None)
        assert sizes((after,)) == (extent,)
        assert after[1:] == inner
    (after,) = views.resized(((six, Atom(5), four),), (8,), None)
    assert sizes((after,)) == (8,) and after[0].birth == "lost" and len(after) == 1


def test_complex_numbers_and_pairs_of_real_ones() -> None:
    """Rotary positions as complex numbers: the pairs are the inner part of the width, and make it again."""
    t, wide = Atom(5), Atom(8, birth="feature")
    shape, layout = (5, 8), ((t,), (wide,))
    at, of = indices(shape), {t: 0, wide: 1}
    pairs = views.reshape(layout, (5, 4, 2), None)
    check(pairs, at.reshape(5, 4, 2, 2), of)
    numbers = views.pairs_as_numbers(pairs, (5, 4), None)
    assert numbers[0] == (t,) and sizes(numbers) == (5, 4)
    back = views.numbers_as_pairs(numbers, (5, 4, 2), None)
    assert sizes(back) == (5, 4, 2)
    assert all(a.root is wide and a.birth == "feature" for dim in back[1:] for a in dim)
    for empty in ((), ((t,), ())):  # a number, or a width of one number: nothing is known of what the pairs are part of
        made = views.numbers_as_pairs(empty, (*sizes(empty), 2), None)
        assert made[:-1] == empty and made[-1][0].size == 2 and made[-1][0].birth == "lost"
