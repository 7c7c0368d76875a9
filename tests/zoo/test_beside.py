"""Every entry of the zoo traced several times, with a second follower beside what is recognised."""

from __future__ import annotations

import pytest

from tests.beside import trace_beside
from tests.zoo import CASES, Case


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_recognised_is_what_following_makes(case: Case, train: bool) -> None:
    assert not trace_beside(case.model().train(train), case.inputs).problem
