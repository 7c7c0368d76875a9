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
from tests.hands import (
    Between,
    Chunked,
    Differential,
    E,
    H,
    HeadModules,
    InOneModule,
    Loops,
    RawParameters,
    SharedKeys,
    Steps,
    TwoOutputs,
    WeightsAgain,
)
from tests.reference import draw, merge
from tests.replayed import again, alike, play, seen, traced, without_recipes
from tests.zoo import CASES

X = draw(2, 5, E, seed=1)
ONE_INPUT = (InOneModule, RawParameters, Differential, TwoOutputs, Chunked, Loops, HeadModules, SharedKeys)
ONE_INPUT += (WeightsAgain, Between, Steps)  # type: ignore[assignment]


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


def at_every_operation(build: Callable[[], nn.Module], inputs: Any, first: int = 1, step: int = 1) -> None:
    """Have following take over at one operation after another, from the first on in steps."""
    with torch.no_grad():
        model = build()
        with without_recipes():
            expected = seen(traced(model, inputs))
        at, most = first, first + 1
        while at < most:
            model = build()  # of which nothing else was learned
            for _ in range(2):
                traced(model, inputs)
            with taken_over(at) as count:
                alike(seen(traced(model, inputs)), expected, f"taken over at operation {at}")
            if at == first:
                with taken_over(-1) as count:
                    traced(model, inputs)
                most = count[0] + 1
            alike(seen(traced(model, inputs)), expected, f"after it was taken over at operation {at}")
            at += step


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_the_zoo(number: int) -> None:
    case = CASES[number]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.model().train(case.train)

    if "view" in case.name:
        at_every_operation(build, case.inputs())
    else:  # one of them in four, and others in the next case
        at_every_operation(build, case.inputs(), 1 + number % 4, 4)


@pytest.mark.parametrize("build", ONE_INPUT, ids=lambda build: build.__name__)
def test_models_in_other_hands(build: Callable[[], nn.Module]) -> None:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return build()

    at_every_operation(seeded, X, 2, 7)


class Turned(nn.Module):
    """Axes are moved about in place, so that tensors have another shape later than when an operation ran."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layers = how, nn.ModuleList([nn.Linear(E, 3 * E) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (one.unflatten(-1, (H, -1)) for one in layer(x).chunk(3, -1))
            if self.how == "transposed":
                for one in (q, k, v):
                    one.transpose_(1, 2)
                k.transpose_(-1, -2)
                weights = (q @ k / 2).softmax(-1)
            elif self.how == "scores":
                q, k, v = (one.transpose(1, 2) for one in (q, k, v))
                scores = k @ q.mT / 2
                scores.transpose_(-1, -2)
                weights = scores.softmax(-1)
            else:
                q, k, v = (one.transpose(1, 2).contiguous() for one in (q, k, v))
                for one in (q, k, v):
                    one.resize_(x.shape[0] * H, x.shape[1], E // H)
                out = (q @ k.mT / 2).softmax(-1) @ v
                out.resize_(x.shape[0], H, x.shape[1], E // H)
                x = x + merge(out)
                continue
            x = x + merge(weights @ v)
        return x


@pytest.mark.parametrize("how", ["transposed", "scores", "resized"])
def test_axes_that_are_moved_in_place(how: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Turned(how)

    with torch.no_grad():
        play(build, again(X, 4), math=False)
    at_every_operation(build, X)
