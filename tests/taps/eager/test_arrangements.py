"""How tensors are brought into B H T S: every entry where the factors of its dimensions say it belongs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hookattn.taps.eager.axis_history import Atom, known
from hookattn.taps.eager.origins import Origins
from hookattn.taps.eager.products import Factor, LayoutError, arrange

many = settings(max_examples=300, deadline=None)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, list[list[Factor]]]:
    """A tensor and the factors of its dimensions; some are there only by broadcasting."""
    roles = [r for r in "BHTS" for _ in range(draw(st.integers(0, 2)))]
    order = draw(st.permutations(range(len(roles))))
    places = draw(st.permutations(range(len(roles))))
    factors = [
        Factor(draw(st.sampled_from([2, 3])), roles[i], broadcast=draw(st.booleans()), place=(places[i], 0))
        for i in order
    ]
    dims: list[list[Factor]] = [[]]
    for factor in factors:
        if draw(st.booleans()) or any(f.broadcast is not factor.broadcast for f in dims[-1]):
            dims.append([])
        dims[-1].append(factor)
    shape = [math.prod(1 if f.broadcast else f.size for f in dim) for dim in dims]
    return torch.arange(math.prod(shape)).view(shape), dims


def expected(x: Tensor, dims: list[list[Factor]], full: bool) -> Tensor:
    """One entry after the other, by the index of each factor."""
    factors = [f for dim in dims for f in dim]
    by_role = {r: sorted((f for f in factors if f.role == r), key=lambda f: f.place) for r in "BHTS"}

    def extent(of: list[Factor]) -> int:
        if not full and all(f.broadcast for f in of):
            return 1
        return math.prod(f.size for f in of)

    out = torch.empty([extent(by_role[r]) for r in "BHTS"], dtype=x.dtype)
    for place in itertools.product(*(range(n) for n in out.shape)):
        index = {}
        for r, at in zip("BHTS", place, strict=True):
            for f in reversed(by_role[r]):
                index[id(f)], at = at % f.size, at // f.size
        where = []
        for dim in dims:
            at = 0
            for f in dim:
                at = at if f.broadcast else at * f.size + index[id(f)]
            where.append(at)
        out[place] = x[tuple(where)]
    return out


@given(drawn())
@many
def test_every_entry_is_in_its_place(case: tuple[Tensor, list[list[Factor]]]) -> None:
    x, dims = case
    assert torch.equal(arrange(x, dims, "BHTS"), expected(x, dims, full=True))


@given(drawn())
@many
def test_what_is_there_only_by_broadcasting_stays_one(case: tuple[Tensor, list[list[Factor]]]) -> None:
    x, dims = case
    assert torch.equal(arrange(x, dims, "BHTS", broadcast=True), expected(x, dims, full=False))


@pytest.mark.parametrize("copies", [{"broadcast": True}, {"repeated": True}])
def test_heads_that_are_only_copies_are_left_out_where_they_are_the_innermost(copies: dict[str, bool]) -> None:
    """Query head h reads key head h // n; copies in any other place are heads like all others."""
    inner, outer = Factor(3, "H", **copies, place=(1, 0)), Factor(2, "H", place=(0, 0))
    x = (
        torch.arange(2 * 5).view(2, 1, 5)
        if "broadcast" in copies
        else torch.arange(2 * 5).view(2, 1, 5).repeat(1, 3, 1)
    )
    dims = [[outer], [inner], [Factor(5, "S")]]
    assert torch.equal(arrange(x, dims, "HS", group=True), torch.arange(10).view(2, 5))
    assert torch.equal(arrange(x, dims, "HS"), torch.arange(10).view(2, 5).repeat_interleave(3, 0))
    turned = [[Factor(2, "H", place=(1, 0))], [Factor(3, "H", **copies, place=(0, 0))], [Factor(5, "S")]]
    assert torch.equal(arrange(x, turned, "HS", group=True), torch.arange(10).view(2, 5).repeat(3, 1))


def test_an_axis_without_a_role_is_refused() -> None:
    with pytest.raises(LayoutError, match="an axis in the role D is left over"):
        arrange(torch.ones(2, 3), [[Factor(2, "B")], [Factor(3, "D")]], "BHTS")


def test_axes_that_somebody_names_keep_the_line_that_they_have() -> None:
    """Roles are what is said; where an axis comes from is what was followed."""
    origins, x = Origins(), torch.ones(2, 1, 4, 8)
    atoms = [Atom(n, birth=birth) for n, birth in ((2, "data"), (4, "data"), (8, "feature"))]  # type: ignore[arg-type]
    origins.set(x, known(((atoms[0],), (), (atoms[1],), (atoms[2],))))
    origins.seed(x, "BHTD")
    found = origins.of(x).layout()
    assert [a.role for dim in found for a in dim] == ["B", "T", "D"]
    assert [a.root for dim in found for a in dim] == atoms and found[3][0].birth == "feature"
    y = torch.ones(2, 1, 4, 8)
    origins.seed(y, "BHTD")
    assert [a.role for dim in origins.of(y).layout() for a in dim] == ["B", "T", "D"]
    assert not {a.root for dim in origins.of(y).layout() for a in dim} & set(atoms)
