"""Following takes over from what is recognised, at whatever operation that ends: nothing is lost and nothing is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookattn.recording.session import Session
from hookattn.taps.eager.recogniser import Recogniser
from tests.hands import E, H
from tests.reference import draw, heads, merge
from tests.replayed import alike, again, play, seen, traced, without_recipes
from tests.zoo import CASES, Case

X = draw(2, 5, E, seed=1)


@contextmanager
def taken_over(at: int) -> Iterator[list[int]]:
    """In the block the operation of a number is none of the expected; gives how many operations were recognised."""
    count = [0]

    class TakenOver(Recogniser):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.run is not None and self.run.lesson is None:
                count[0] += 1
                if count[0] == at:
                    self._catch_up(self.run)
            return super().__torch_function__(func, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "follower_class", TakenOver)
        yield count


def at_every_operation(build: Callable[[], nn.Module], inputs: Any, step: int = 1) -> None:
    """Have following take over at one operation after another."""
    with torch.no_grad():
        model = build()
        with without_recipes():
            expected = seen(traced(model, inputs))
        at, most = 1, 2
        while at < most:
            model = build()  # of which nothing else was learned
            for _ in range(2):
                traced(model, inputs)
            with taken_over(at) as count:
                alike(seen(traced(model, inputs)), expected, f"taken over at operation {at}")
            if at == 1:
                with taken_over(-1) as count:
                    traced(model, inputs)
                most = count[0] + 1
            alike(seen(traced(model, inputs)), expected, f"after it was taken over at operation {at}")
            at += step


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_zoo(case: Case) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.model().train(case.train)

    at_every_operation(build, case.inputs(), 1)
