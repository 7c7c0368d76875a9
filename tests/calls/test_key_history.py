"""Keys of a generation are kept once: each step reads as the whole that the model had, and nothing is assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hookattn.calls.key_history import KeyHistory, joined
from tests.reference import draw

B, G, D = 3, 2, 4


def growing() -> Iterator[Tensor]:
    k = draw(B, G, 5, D, seed=0)
    for i in range(12):
        yield k
        k = torch.cat([k, draw(B, G, 1 + i % 3, D, seed=i + 1)], 2)


def static() -> Iterator[Tensor]:
    """A cache of fixed size whose end is empty, and moves on once it is full."""
    k = torch.zeros(B, G, 16, D)
    k[:, :, :5] = draw(B, G, 5, D, seed=0)
    for i in range(5, 16):
        yield k.clone()
        k[:, :, i] = draw(B, G, D, seed=i)
    for i in range(6):
        yield k
        k = torch.cat([k[:, :, 1:], draw(B, G, 1, D, seed=30 + i)], 2)


def sliding() -> Iterator[Tensor]:
    k = draw(B, G, 8, D, seed=0)
    for i in range(9):
        yield k
        k = torch.cat([k[:, :, 1 + i % 2 :], draw(B, G, 1 + i % 2, D, seed=i + 1)], 2)


def beams() -> Iterator[Tensor]:
    k = draw(B, G, 4, D, seed=0)
    for i in range(9):
        yield k
        order = torch.randint(0, B, (B,), generator=torch.Generator().manual_seed(i))
        k = torch.cat([k[order], draw(B, G, 1, D, seed=i + 1)], 2)


def the_same_in_every_step() -> Iterator[Tensor]:
    for _ in range(5):
        yield draw(B, G, 6, D, seed=0)


GENERATIONS: dict[str, Callable[[], Iterator[Tensor]]] = {
    f.__name__: f for f in (growing, static, sliding, beams, the_same_in_every_step)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GENERATIONS)
def test_every_step_is_what_it_was(name: str, dtype: torch.dtype) -> None:
    steps = [k.to(dtype) for k in GENERATIONS[name]()]
    history = KeyHistory(steps[0].clone())
    assert all(history.goes_on(k.clone()) for k in steps[1:])
    again = joined(history.own(0), [(history.link(i), history.own(i)) for i in range(1, len(steps))])  # type: ignore[misc]
    for i, k in enumerate(steps):
        for made in (history, again):
            assert made.shape(i) == k.shape and torch.equal(made.keys(i), k)
    first = history.keys(1)
    first.zero_()
    assert torch.equal(history.keys(1), steps[1]) and torch.equal(history.keys(2), steps[2]), "a reader may write"
    rows = sum(history.own(i).shape[2] for i in range(len(steps)))
    assert rows <= steps[0].shape[2] + 2 * len(steps), "each step has its new keys alone"


def changed(at: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def change(k: Tensor) -> Tensor:
        k = torch.cat([k, draw(B, G, 1, D, seed=9)], 2)
        k[at] += 1e-3
        return k

    return change


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one number of an old key": changed((1, 1, 2, 3)),
    "the first number": changed((0, 0, 0, 0)),
    "fewer keys": lambda k: k[:, :, :-1],
    "fewer heads": lambda k: k[:, :1],
    "another batch": lambda k: torch.cat([k, k]),
    "another dtype": lambda k: torch.cat([k, k[:, :, :1]], 2).double(),
    "all new": lambda k: draw(B, G, 5, D, seed=7),
    "NaN, which equals nothing": lambda k: torch.cat([k, k[:, :, :1]], 2) * torch.nan,
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_does_not_go_on_is_not_taken(what: str) -> None:
    k = draw(B, G, 5, D, seed=0)
    history = KeyHistory(k.clone())
    assert not history.goes_on(OTHERS[what](k.clone()))
    assert len(history) == 1 and torch.equal(history.keys(0), k)
    assert history.goes_on(torch.cat([k, k[:, :, :1]], 2)), "and the next may go on"
