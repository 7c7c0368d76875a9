"""A slice of every attack, small enough for every run of the tests."""

from __future__ import annotations

import pytest

from . import Attack, present


@pytest.mark.parametrize("attack", present(), ids=lambda attack: attack.name)
def test_a_slice_of_each_holds(attack: Attack) -> None:
    through = [f for f in attack.run(attack.slice) if not f.held]
    assert not through, "\n".join(f"{f.what}: {f.measured:g}, at most {f.bar:g}\n  {f.examples}" for f in through)
